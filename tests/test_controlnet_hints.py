"""Every hint against a closed form on a simple picture; all of them: range, shape, batch = loop, determinism."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from controlnet.hints import canny as canny_module
from controlnet.hints import degraded, edges, geometry
from controlnet.hints.canny import ROUNDS, Canny, canny, track
from controlnet.hints.degraded import Blur, Inpaint, LowResolution, Palette, Tile
from controlnet.hints.edges import LineArt, Scribble, SoftEdge, thicken
from controlnet.hints.geometry import Depth, Segmentation
from controlnet.hints.hint import Precomputed, annotate, check_source, hint_generators

RANDOM = {
    "canny": Canny((20, 200), (200, 400)),
    "soft edge": SoftEdge(levels=0), "soft edge in three steps": SoftEdge(gain=(1.0, 8.0)),
    "line art": LineArt((3.0, 24.0)), "scribble": Scribble(Canny((20, 100), (100, 200)), thickness=(8.0, 48.0)),
    "tile": Tile(), "low resolution": LowResolution(), "blur": Blur(), "inpaint": Inpaint(), "palette": Palette(4),
}  # fmt: skip
HINTS = {**RANDOM, "depth": Depth(), "segmentation": Segmentation(5)}
BLURRED = {"soft edge", "line art", "blur", "low resolution"}


def generators(number, seed=0, epoch=0):
    return hint_generators(seed, range(number), [epoch] * number)


def one_of(hint, image):
    return hint(image, generators(len(image)))


def photos(number, height=64, width=96, channels=3, seed=0):
    """Smooth shapes with grain: both strong edges and faint ones. Images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, channels, height // 8, width // 8, generator=generator)
    smooth = interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    grain = 0.05 * torch.rand(number, channels, height, width, generator=generator)
    return (smooth + grain).clamp(0, 1) * 2 - 1


def step_image(size=64, channels=3):
    image = torch.full((1, channels, size, size), -1.0)
    image[..., size // 2 :] = 1.0
    return image


def inputs(hint, number):
    images = photos(number)
    if hint.source == "depth":
        depth = 2 + images[:, :1]
        return torch.where(depth < 1.2, 0.0, depth)
    return (images[:, :1] * 2.4 + 2.5).long() if hint.source == "labels" else images


def test_all_kinds_of_hints_are_tested():
    known = {type(hint) for hint in HINTS.values()}
    for module in (canny_module, degraded, edges, geometry):
        for kind in vars(module).values():
            assert not isinstance(kind, type) or kind.__module__ != module.__name__ or kind in known


@pytest.mark.parametrize("name", HINTS)
def test_hints_are_in_range_and_a_batch_is_a_loop(name):
    hint = HINTS[name]
    x = inputs(hint, 5)
    made = one_of(hint, x)
    assert made.shape == (5, hint.channels, 64, 96)
    assert made.is_floating_point()
    assert ((made >= 0) & (made <= 1)).all()
    assert made.flatten(1).std(1).min() > 0.01
    singly = torch.cat([hint(row[None], generators(5)[i : i + 1]) for i, row in enumerate(x)])
    if name in BLURRED:  # sums of products are rounded in another order
        assert torch.allclose(made, singly, atol=1e-6)
    else:
        assert torch.equal(made, singly)
    assert torch.equal(made, one_of(hint, x))
    with pytest.raises(ValueError, match="5 samples need as many generators"):
        hint(x, generators(3))


@pytest.mark.parametrize("name", RANDOM)
def test_seed_sample_and_epoch_change_what_is_drawn(name):
    hint, image = RANDOM[name], photos(1, 32, 48)
    made = [hint(image, hint_generators(seed, [index], [0]))[0] for seed in range(2) for index in range(4)]
    made += [hint(image, hint_generators(0, [0], [epoch]))[0] for epoch in (1, 2, 3)]
    assert len({tuple(one.flatten().tolist()) for one in made}) >= 4


# Edges and strokes.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("low", "high"), [(100, 200), (20, 60), (80, 80)])
def test_opencvs_edges_pixel_by_pixel(channels, low, high):
    cv2 = pytest.importorskip("cv2", reason="compares with OpenCV, which is not installed")
    noise = torch.rand(2, channels, 48, 64, generator=torch.Generator().manual_seed(1))
    pixels = ((torch.cat([photos(4, 48, 64, channels) / 2 + 0.5, noise])) * 255).round().to(torch.uint8)
    edges = canny(pixels.float() / 127.5 - 1, torch.tensor(float(low)), torch.tensor(float(high)))
    assert 0.02 < edges.mean() < 0.5
    for made, picture in zip(edges, pixels, strict=True):
        array = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
        expected = torch.from_numpy(cv2.Canny(array, low, high))
        assert torch.equal(made[0] * 255, expected.float())


def test_each_sample_has_thresholds_of_its_own_of_which_the_smaller_is_the_lower():
    images = photos(5, 48, 64)
    same = one_of(Canny((50, 150), (150, 300)), images[:1].expand(5, -1, -1, -1))
    assert len({tuple(edges.flatten().tolist()) for edges in same}) >= 4
    expected = canny(images, torch.tensor(120.0), torch.tensor(200.0))
    for first, second in ((120.0, 200.0), (200.0, 120.0)):
        assert torch.equal(one_of(Canny((first, first), (second, second)), images), expected)


def test_weak_pixels_are_followed_to_the_end_with_one_look_in_eight_rounds(monkeypatch):
    """Along one line that winds inwards: a path as long as the image can hold."""
    path = torch.zeros(1, 1, 33, 33, dtype=torch.bool)
    row, column, turn, length = 0, 0, 0, 1
    path[0, 0, 0, 0] = True
    for run in [32] + [n for m in range(32, 1, -2) for n in (m, m)]:
        for _ in range(run):
            row, column = row + (0, 1, 0, -1)[turn], column + (1, 0, -1, 0)[turn]
            path[0, 0, row, column] = True
        turn, length = (turn + 1) % 4, length + run
    strong, looks = torch.zeros_like(path), []
    strong[0, 0, 0, 0] = True
    monkeypatch.setattr(torch, "equal", lambda a, b, equal=torch.equal: looks.append(1) or equal(a, b))
    edges = track(strong, path)
    monkeypatch.undo()
    assert torch.equal(edges, path)
    assert len(looks) <= length / ROUNDS + 2
    assert length > 400
    assert not track(torch.zeros_like(path), path).any()
    path[0, 0, 0, 4:6] = False
    assert track(strong, path).sum() == 4


def test_a_step_of_full_height_has_strength_one_at_every_scale_and_a_gaussian_profile():
    edge = slice(31, 33)
    for scales in ((0.0,), (8.0,), (40.0,), (0.0, 8.0, 24.0)):
        strength = one_of(SoftEdge(scales, gain=(1.0, 1.0), levels=0), step_image())[0, 0]
        assert torch.allclose(strength[:, edge], torch.ones(64, 2), atol=1e-5)
        assert strength[:, :8].max() < 1e-3
    # Of a plain Sobel magnitude a step of 0.3 keeps 0.3, and only the pixels beside it see it.
    faint = one_of(SoftEdge((0.0,), gain=(1.0, 1.0), levels=0), step_image() * 0.3)[0, 0]
    expected = torch.zeros(64, 64)
    expected[:, edge] = 0.3
    assert torch.allclose(faint, expected, atol=1e-5)
    sigma = 3.0
    profile = one_of(SoftEdge((sigma * 512 / 64,), gain=(1.0, 1.0), levels=0), step_image())[0, 0, 32]
    wide = sigma**2 + 0.25  # the central difference averages two kernel values
    expected = torch.exp(-((torch.arange(64) - 31.5) ** 2) / 2 / wide) / math.exp(-0.25 / 2 / wide)
    assert torch.allclose(profile, expected, atol=0.01)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_quantised_edges_have_that_many_values(levels):
    ramp = (torch.linspace(0, 1, 65) ** 2).cumsum(0)  # gradients from 0 to 1
    image = (ramp / ramp.max())[None, None, None].expand(1, 1, 65, -1) * 2 - 1
    made, exact = (one_of(SoftEdge((0.0,), gain=(64.0, 64.0), levels=number), image) for number in (levels, 0))
    assert torch.allclose(made.unique(), torch.linspace(0, 1, levels))
    assert ((made - exact).abs() <= 1 / (levels - 1)).all()


def test_line_art_is_how_much_darker_than_around():
    image = torch.ones(2, 3, 64, 64)
    image[0, :, :, 20] = -1.0  # a dark line
    image[1, :, :, 20] = -0.2
    image[1, 1] = 1.0  # which one channel does not see
    made = one_of(LineArt((48.0, 48.0)), image)
    # One strength alone is its own median: 1/2, however faint.
    assert torch.allclose(made[0, 0, :, 20], torch.full((64,), 0.5), atol=1e-5)
    assert made[0, 0, :, :20].max() == made[0, 0, :, 21:].max() == 0
    assert made[1].max() == 0
    # Of a line whose smaller part is 0.4 as strong, the larger is the median.
    image[0, :, 40:, 20] = 0.2
    made = one_of(LineArt((48.0, 48.0)), image)[0, 0, :, 20]
    assert float(made[4]) == pytest.approx(0.5, abs=1e-5)
    assert float(made[60]) == pytest.approx(0.2, abs=1e-5)
    assert one_of(LineArt(), torch.ones(1, 3, 32, 32)).max() == 0
    assert one_of(LineArt(), photos(1) * 0.02).max() < 0.2, "faint noise is no line art"


@pytest.mark.parametrize("widths", [[1, 2], [3, 4], [5, 12]])
def test_thickened_lines_are_that_wide(widths):
    lines = torch.zeros(2, 1, 32, 32)
    lines[:, :, 16] = 1
    thick = thicken(lines, widths)
    assert [int(column) for column in thick[:, 0, :, 8].sum(1)] == widths
    centre = (thick[:, 0, :, 8] * torch.arange(32)).sum(1) / torch.tensor(widths)
    assert ((centre - 16).abs() <= 0.5).all()


def test_a_scribble_follows_the_edges():
    for wide in (1, 6, 11):
        scribble = Scribble(Canny((50, 50), (100, 100)), smoothing=3.0, thickness=(wide * 4.0, wide * 4.0))
        made = one_of(scribble, step_image(128, 1))[0, 0]
        assert made[64].sum() == wide
        assert abs(float((made[64] * torch.arange(128)).sum() / wide) - 63.5) <= 1


# What is left of an image.


@pytest.mark.parametrize("factor", [1, 4, 7])
def test_tiles_have_the_mean_colour(factor):
    image = photos(1)
    made = one_of(Tile((factor, factor)), image)[0]
    for top in range(0, 64, factor):
        for left in range(0, 96, factor):
            part = (slice(None), slice(top, top + factor), slice(left, left + factor))
            mean = ((image[0][part] + 1) / 2).flatten(1).mean(1)
            assert torch.allclose(made[part], mean[:, None, None].expand_as(made[part]), atol=1e-6)


def test_every_factor_is_drawn_and_equally_often():
    counts, image = torch.zeros(9), torch.zeros(1, 1, 8, 8)
    image[..., 0, 0] = 1
    for index in range(700):
        peak = Tile((2, 8), channels=1)(image, hint_generators(0, [index], [0])).max() * 2 - 1
        counts[round(float(peak) ** -0.5)] += 1
    assert counts[:2].sum() == 0
    assert ((counts[2:] - 100).abs() < 40).all()


def test_low_resolution_keeps_what_is_smooth_and_loses_what_is_fine():
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    smooth = torch.sin(2 * math.pi * rows / 64).expand(1, 3, -1, -1)
    fine = ((rows + columns) % 2 * 2.0 - 1).expand(1, 3, -1, -1)
    inner = (..., slice(8, -8), slice(8, -8))
    assert (one_of(LowResolution((4, 4)), smooth) - (smooth + 1) / 2)[inner].abs().max() < 0.02
    assert (one_of(LowResolution((4, 4)), fine) - 0.5)[inner].abs().max() < 0.02
    assert torch.equal(one_of(LowResolution((1, 1)), fine), (fine + 1) / 2)


def test_a_blurred_point_is_a_gaussian_whose_width_scales_with_the_picture():
    image = torch.full((2, 3, 64, 64), -1.0)
    image[:, :, 32, 20] = 1.0
    made = one_of(Blur((16.0, 16.0)), image)[0, 0]
    rows, columns = torch.meshgrid(torch.arange(64) - 32.0, torch.arange(64) - 20.0, indexing="ij")
    gaussian = torch.exp(-(rows**2 + columns**2) / 2 / 2**2) / (2 * math.pi * 4)
    assert torch.allclose(made, gaussian, atol=2e-4)
    assert torch.allclose(one_of(Blur((0.0, 0.0)), photos(1)), (photos(1) + 1) / 2)
    large = photos(1, 256, 256)
    a, b = (one_of(Blur((40.0, 40.0)), x) for x in (large, avg_pool2d(large, 4)))
    assert (avg_pool2d(a, 4) - b).abs().max() < 0.02


def test_what_is_cut_out_is_black_and_marked_and_boxes_and_strokes_have_their_size():
    images = photos(200, 32, 48)
    made = one_of(Inpaint(), images)
    rest, missing = made[:, :3], made[:, 3:]
    assert set(missing.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(rest, (images + 1) / 2 * (1 - missing))
    shares = missing.flatten(1).mean(1)
    assert shares.min() > 0
    assert 0.1 < shares.mean() < 0.6
    assert shares.std() > 0.05
    images, inside = torch.zeros(40, 3, 128, 64), 0
    for mask in one_of(Inpaint(num_boxes=1, num_strokes=0), images)[:, 3]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert (len(rows) <= 65) & (len(columns) <= 33)
        inside += len(rows) >= 12 and len(columns) >= 6
    assert inside > 20
    strokes = one_of(Inpaint(num_boxes=0, num_strokes=1), images)[:, 3]
    # Two lines of at most the picture's diagonal each, and 6.4 pixels wide, with round ends.
    assert strokes.flatten(1).sum(1).max() <= 2 * 6.4 * math.hypot(128, 64) + 2 * math.pi * 3.2**2
    assert strokes.flatten(1).sum(1).min() >= 4


def test_palette_colours_are_means_of_what_they_replace_and_few_colours_are_kept():
    image = photos(1, 48, 64)
    flat = one_of(Palette(4, rounds=60), image)[0].flatten(1).T
    pixels, colours = (image[0].flatten(1).T + 1) / 2, flat.unique(dim=0)
    assert len(colours) == 4
    for colour in colours:
        assert torch.allclose(pixels[(flat == colour).all(1)].mean(0), colour, atol=5e-3)
    nearest = torch.cdist(pixels, colours).argmin(1)
    assert (colours[nearest] == flat).all(1).float().mean() > 0.999
    four = torch.tensor([[1.0, -1, -1], [0.2, 0.5, -0.7], [-1, -1, 1], [0, 0, 0.1]])
    image = four[torch.arange(64).reshape(8, 8).repeat(8, 8) % 4].permute(2, 0, 1)[None]
    assert torch.allclose(one_of(Palette(7), image), (image + 1) / 2, atol=1e-6)
    assert len(one_of(Palette(2), image).flatten(2)[0].T.unique(dim=0)) == 2


# Geometry.


def test_depth_is_linear_between_near_and_far():
    own = one_of(Depth(), torch.tensor([[[[math.inf, 2.0, 4.0, 6.0]]], [[[1.0, 2.0, 0.0, 5.0]]]]))
    assert torch.allclose(own[:, 0, 0], torch.tensor([[0, 1, 0.5, 0], [1, 0.75, 0, 0]]))
    flat = one_of(Depth(), torch.tensor([[[[0.0, 2.0]]], [[[0.0, 0.0]]]]))
    assert torch.equal(flat[:, 0, 0], torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


def test_labels_become_channels():
    labels = torch.tensor([[[[0, 1, 2], [4, 255, 1]]]])
    channels = one_of(Segmentation(5), labels)
    assert torch.equal(channels.argmax(1)[0], torch.tensor([[0, 1, 2], [4, 0, 1]]))
    assert torch.equal(channels.sum(1)[0], torch.tensor([[1.0, 1, 1], [1, 0, 1]]))
    with pytest.raises(ValueError, match=r"labels from 0 to 255; expected 0 to 2, or 255 for none"):
        one_of(Segmentation(3), labels)


# Maps, several hints.


def test_precomputed_maps_take_the_channels_asked_for():
    grey, colour = torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(one_of(Precomputed("x"), grey), grey)
    assert torch.equal(one_of(Precomputed("x", 3), colour), colour)
    assert torch.equal(one_of(Precomputed("x", 3), grey), grey.expand(-1, 3, -1, -1))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose(one_of(Precomputed("x"), colour), (colour * weights).sum(1, keepdim=True), atol=1e-6)
    with pytest.raises(ValueError, match="map 'x' has 3 channels, its hint 4"):
        one_of(Precomputed("x", 4), colour)


def test_several_hints_stand_one_above_the_other():
    maps, hints = {"image": photos(2), "mask": torch.rand(2, 1, 64, 96)}, [Blur(), Precomputed("mask"), Tile()]
    own = [[hint_generators(0, [3, 4], [1, 1], purpose) for purpose in "abc"] for _ in range(2)]
    made = annotate(hints, maps, own[0])
    expected = [hint(maps[hint.source], some) for hint, some in zip(hints, own[1], strict=True)]
    assert torch.equal(made, torch.cat(expected, 1))

    class Own(Blur):
        """A hint of the reader's own that says it has two channels."""

    with pytest.raises(
        ValueError, match=r"Own must give hints \(2, 2, 64, 96\) of image .*; got \(2, 3, 64, 96\)"
    ):
        annotate([Own(channels=2)], maps, [own[0][0]])
    with pytest.raises(ValueError, match="Depth is made of 'depth', but the samples hold image, mask only"):
        check_source(Depth(), maps)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SoftEdge(gain=(2.0, 1.0)), "gain must be"), (lambda: SoftEdge(scales=()), "need scales"),
    (lambda: SoftEdge(levels=1), "levels of 0 or at least 2"), (lambda: LineArt((-1.0, 1.0)), "radius must be"),
    (lambda: Scribble(Blur()), "edges of one channel"), (lambda: Tile((0, 4)), "factor must be"),
    (lambda: LowResolution((4, 2)), "factor must be"), (lambda: Blur((1.0, math.inf)), "sigma must be"),
    (lambda: Inpaint(0, 0), "need boxes or strokes"), (lambda: Palette(0), "num_colours >= 1"),
    (lambda: Canny(low=(200, 100)), r"low of Canny must be \(smallest, largest\) within"),
    (lambda: Canny(high=(100, 5000)), "high of Canny"), (lambda: Canny(low=(0, math.nan)), "low of Canny"),
    (lambda: Segmentation(300), "ignore outside"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["canny", "soft edge", "line art", "scribble", "tile", "blur", "palette"])
def test_grey_images_have_hints_too_and_half_precision_gives_nearly_the_same(name):
    assert len(one_of(RANDOM[name], photos(2, channels=1))) == 2
    if name in ("soft edge", "line art", "blur", "tile"):
        a, b = (one_of(RANDOM[name], x).float() for x in (photos(2), photos(2).bfloat16()))
        assert (a - b).abs().mean() < 0.03
