"""Every hint against a closed form on a simple picture; all of them: range, shape, batch = loop, determinism."""

import math

import pytest
import torch

from controlnet.canny import Canny
from controlnet.degraded import Blur, Inpaint, LowResolution, Palette, Tile
from controlnet.geometry import Depth, Normals, Segmentation, voc_colours
from controlnet.hints import Custom, Precomputed, annotate, check_source, draws, hint_generators
from controlnet.lines import LineArt, Scribble, SoftEdge, thicken

RANDOM = {
    "canny": Canny((20, 200), (200, 400)),
    "kornia canny": Canny((0.02, 0.3), (0.3, 0.5), like="kornia"),
    "soft edge": SoftEdge(levels=0),
    "soft edge in three steps": SoftEdge(gain=(1.0, 8.0)),
    "line art": LineArt((3.0, 24.0)),
    "scribble": Scribble(Canny((20, 100), (100, 200)), thickness=(8.0, 48.0)),
    "tile": Tile(),
    "low resolution": LowResolution(),
    "blur": Blur(),
    "inpaint": Inpaint(),
    "palette": Palette(4),
}
GEOMETRY = {
    "depth": Depth(),
    "inverse depth": Depth(1.0, 4.0, inverse=True),
    "normals": Normals(50.0),
    "segmentation": Segmentation(5),
    "colours": Segmentation(5, colours=True),
}
HINTS = {**RANDOM, **GEOMETRY}
BLURRED = {"soft edge", "line art", "blur", "low resolution"}


def generators(number, seed=0, epoch=0):
    return hint_generators(seed, range(number), [epoch] * number)


def photos(number, height=64, width=96, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, channels, height // 8, width // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    grain = 0.05 * torch.rand(number, channels, height, width, generator=generator)
    return (smooth + grain).clamp(0, 1) * 2 - 1


def inputs(hint, number):
    images = photos(number)
    if hint.source == "depth":
        depth = 2 + images[:, :1]
        return torch.where(depth < 1.2, 0.0, depth)
    if hint.source == "labels":
        return (images[:, :1] * 2.4 + 2.5).long()
    return images


def test_all_kinds_of_hints_are_tested():
    from controlnet import canny, degraded, geometry, lines

    known = {type(hint) for hint in HINTS.values()}
    for module in (canny, degraded, geometry, lines):
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                assert kind in known


@pytest.mark.parametrize("name", HINTS)
def test_hints_are_in_range_and_a_batch_is_a_loop(name):
    hint = HINTS[name]
    x = inputs(hint, 5)
    made = hint(x, generators(5))
    assert made.shape == (5, hint.channels, 64, 96)
    assert made.is_floating_point()
    assert ((made >= 0) & (made <= 1)).all()
    assert made.flatten(1).std(1).min() > 0.01
    singly = torch.cat([hint(row[None], generators(5)[i : i + 1]) for i, row in enumerate(x)])
    if name in BLURRED:  # sums of products are rounded in another order
        assert torch.allclose(made, singly, atol=1e-6)
    else:
        assert torch.equal(made, singly)
    assert torch.equal(made, hint(x, generators(5)))


@pytest.mark.parametrize("name", RANDOM)
def test_seed_sample_and_epoch_change_what_is_drawn(name):
    hint, image = HINTS[name], photos(1)
    made = [hint(image, hint_generators(seed, [index], [0]))[0] for seed in range(2) for index in range(4)]
    made += [hint(image, hint_generators(0, [0], [epoch]))[0] for epoch in (1, 2, 3)]
    assert len({tuple(one.flatten().tolist()) for one in made}) >= 4
    again = hint(image, hint_generators(0, [0], [3]))[0]
    assert torch.equal(again, made[-1])


@pytest.mark.parametrize("name", HINTS)
def test_each_sample_needs_a_generator(name):
    hint = HINTS[name]
    with pytest.raises(ValueError, match="2 samples need as many generators"):
        hint(inputs(hint, 2), generators(3))


def test_a_step_of_full_height_has_strength_one_at_every_scale():
    step = torch.full((1, 3, 64, 64), -1.0)
    step[..., 32:] = 1.0
    edge = slice(31, 33)
    for scales in ((0.0,), (8.0,), (40.0,), (0.0, 8.0, 24.0)):
        strength = SoftEdge(scales, gain=(1.0, 1.0), levels=0)(step, generators(1))[0, 0]
        assert torch.allclose(strength[:, edge], torch.ones(64, 2), atol=1e-5)
        assert strength[:, :8].max() < 1e-3
    # Of a plain Sobel magnitude a step of 0.3 keeps 0.3, and only the pixels beside it see it.
    faint = SoftEdge((0.0,), gain=(1.0, 1.0), levels=0)(step * 0.3, generators(1))[0, 0]
    expected = torch.zeros(64, 64)
    expected[:, edge] = 0.3
    assert torch.allclose(faint, expected, atol=1e-5)


def test_the_wider_scale_has_a_gaussian_profile():
    step = torch.full((1, 1, 64, 64), -1.0)
    step[..., 32:] = 1.0
    sigma = 3.0
    profile = SoftEdge((sigma * 512 / 64,), gain=(1.0, 1.0), levels=0)(step, generators(1))[0, 0, 32]
    distance = torch.arange(64) - 31.5
    wide = sigma**2 + 0.25  # the central difference averages two kernel values
    expected = torch.exp(-(distance**2) / 2 / wide) / math.exp(-0.25 / 2 / wide)
    assert torch.allclose(profile, expected, atol=0.01)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_quantised_edges_have_that_many_values(levels):
    ramp = (torch.linspace(0, 1, 65) ** 2).cumsum(0)  # gradients from 0 to 1
    image = (ramp / ramp.max())[None, None, None].expand(1, 1, 65, -1) * 2 - 1
    made = SoftEdge((0.0,), gain=(64.0, 64.0), levels=levels)(image, generators(1))
    assert torch.allclose(made.unique(), torch.linspace(0, 1, levels))
    exact = SoftEdge((0.0,), gain=(64.0, 64.0), levels=0)(image, generators(1))
    assert ((made - exact).abs() <= 1 / (levels - 1)).all()


def test_line_art_is_how_much_darker_than_around():
    image = torch.ones(2, 3, 64, 64)
    image[0, :, :, 20] = -1.0  # a dark line
    image[1, :, :, 20] = -0.2
    image[1, 1] = 1.0  # which one channel does not see
    made = LineArt((48.0, 48.0))(image, generators(2))
    sigma = 48 * 64 / 512
    k = torch.exp(-0.5 * (torch.arange(-18, 19) / sigma) ** 2)
    dark = 1 - float(k[18] / k.sum())
    assert dark > 0.9
    # One strength alone is its own median: 1/2, however faint.
    assert torch.allclose(made[0, 0, :, 20], torch.full((64,), 0.5), atol=1e-5)
    assert made[0, 0, :, :20].max() == made[0, 0, :, 21:].max() == 0
    assert made[1].max() == 0
    # Of a line whose smaller part is 0.4 as strong, the larger is the median.
    image[0, :, 40:, 20] = 0.2
    made = LineArt((48.0, 48.0))(image, generators(2))[0, 0, :, 20]
    assert float(made[4]) == pytest.approx(0.5, abs=1e-5)
    assert float(made[60]) == pytest.approx(0.2, abs=1e-5)
    assert LineArt()(torch.ones(1, 3, 32, 32), generators(1)).max() == 0
    assert LineArt()(-torch.ones(1, 3, 32, 32), generators(1)).max() == 0


def test_faint_noise_is_not_made_line_art():
    noise = photos(1) * 0.02
    assert LineArt()(noise, generators(1)).max() < 0.2


@pytest.mark.parametrize("widths", [[1, 2], [3, 4], [5, 12]])
def test_thickened_lines_are_that_wide(widths):
    lines = torch.zeros(2, 1, 32, 32)
    lines[:, :, 16] = 1
    thick = thicken(lines, widths)
    assert [int(column) for column in thick[:, 0, :, 8].sum(1)] == widths
    centre = (thick[:, 0, :, 8] * torch.arange(32)).sum(1) / torch.tensor(widths)
    assert ((centre - 16).abs() <= 0.5).all()
    assert torch.equal(thick, torch.cat([thicken(lines[i : i + 1], [widths[i]]) for i in range(2)]))


def test_a_scribble_follows_the_edges():
    image = torch.full((1, 1, 128, 128), -1.0)
    image[..., 64:] = 1.0
    for wide in (1, 6, 11):
        scribble = Scribble(Canny((50, 50), (100, 100)), smoothing=3.0, thickness=(wide * 4.0, wide * 4.0))
        made = scribble(image, generators(1))[0, 0]
        assert made[64].sum() == wide
        centre = float((made[64] * torch.arange(128)).sum() / wide)
        assert abs(centre - 63.5) <= 1


def test_lengths_scale_with_the_picture():
    large = photos(1, 256, 256)
    small = torch.nn.functional.avg_pool2d(large, 4)
    a, b = (Blur((40.0, 40.0))(x, generators(1)) for x in (large, small))
    assert (torch.nn.functional.avg_pool2d(a, 4) - b).abs().max() < 0.02
    assert (b - (small + 1) / 2).abs().max() > 0.1


@pytest.mark.parametrize("factor", [1, 2, 4, 7])
def test_tiles_have_the_mean_colour(factor):
    image = photos(1, 64, 96)
    made = Tile((factor, factor))(image, generators(1))[0]
    for top in range(0, 64, factor):
        for left in range(0, 96, factor):
            part = (slice(None), slice(top, top + factor), slice(left, left + factor))
            mean = ((image[0][part] + 1) / 2).flatten(1).mean(1)
            assert torch.allclose(made[part], mean[:, None, None].expand_as(made[part]), atol=1e-6)


def test_every_factor_is_drawn_and_equally_often():
    counts = torch.zeros(9)
    for index in range(700):
        image = torch.zeros(1, 1, 8, 8)
        image[..., 0, 0] = 1
        peak = Tile((2, 8), channels=1)(image, hint_generators(0, [index], [0])).max() * 2 - 1
        counts[round(float(peak) ** -0.5)] += 1
    assert counts[:2].sum() == 0
    assert ((counts[2:] - 100).abs() < 40).all()


def test_low_resolution_keeps_what_is_smooth_and_loses_what_is_fine():
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    smooth = torch.sin(2 * math.pi * rows / 64).expand(1, 3, -1, -1)
    fine = ((rows + columns) % 2 * 2.0 - 1).expand(1, 3, -1, -1)
    hint = LowResolution((4, 4))
    inner = (..., slice(8, -8), slice(8, -8))
    assert (hint(smooth, generators(1)) - (smooth + 1) / 2)[inner].abs().max() < 0.02
    assert (hint(fine, generators(1)) - 0.5)[inner].abs().max() < 0.02
    assert torch.equal(LowResolution((1, 1))(fine, generators(1)), (fine + 1) / 2)


def test_a_blurred_point_is_a_gaussian():
    image = torch.full((2, 3, 64, 64), -1.0)
    image[:, :, 32, 20] = 1.0
    made = Blur((16.0, 16.0))(image, generators(2))[0, 0]
    rows, columns = torch.meshgrid(torch.arange(64) - 32.0, torch.arange(64) - 20.0, indexing="ij")
    gaussian = torch.exp(-(rows**2 + columns**2) / 2 / 2**2) / (2 * math.pi * 4)
    assert torch.allclose(made, gaussian, atol=2e-4)
    assert torch.allclose(Blur((0.0, 0.0))(photos(1), generators(1)), (photos(1) + 1) / 2)


def test_what_is_cut_out_is_black_and_marked():
    images = photos(200, 32, 48)
    made = Inpaint()(images, generators(200))
    rest, missing = made[:, :3], made[:, 3:]
    assert set(missing.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(rest, (images + 1) / 2 * (1 - missing))
    shares = missing.flatten(1).mean(1)
    assert shares.min() > 0
    assert 0.1 < shares.mean() < 0.6
    assert shares.std() > 0.05


def test_boxes_and_strokes_have_their_size():
    images = torch.zeros(40, 3, 128, 64)
    boxes = Inpaint(num_boxes=1, num_strokes=0)(images, generators(40))[:, 3]
    inside = 0
    for mask in boxes:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert len(rows) <= 65
        assert len(columns) <= 33
        inside += len(rows) >= 12 and len(columns) >= 6
    assert inside > 20
    strokes = Inpaint(num_boxes=0, num_strokes=1)(images, generators(40))[:, 3]
    # Two lines of at most the picture's diagonal each, and 6.4 pixels wide, with round ends.
    assert strokes.flatten(1).sum(1).max() <= 2 * 6.4 * math.hypot(128, 64) + 2 * math.pi * 3.2**2
    assert strokes.flatten(1).sum(1).min() >= 4


def test_an_image_of_few_colours_keeps_them():
    colours = torch.tensor([[1.0, -1, -1], [0.2, 0.5, -0.7], [-1, -1, 1], [0, 0, 0.1]])
    image = colours[torch.arange(64).reshape(8, 8).repeat(8, 8) % 4].permute(2, 0, 1)[None]
    for number in (4, 7):
        made = Palette(number)(image, generators(1))
        assert torch.allclose(made, (image + 1) / 2, atol=1e-6)
    two = Palette(2)(image, generators(1))
    assert len(two.flatten(2)[0].T.unique(dim=0)) == 2


def test_palette_colours_are_means_of_what_they_replace():
    image = photos(1, 48, 64)
    made = Palette(4, rounds=60)(image, generators(1))
    flat, pixels = made[0].flatten(1).T, (image[0].flatten(1).T + 1) / 2
    colours = flat.unique(dim=0)
    assert len(colours) == 4
    for colour in colours:
        own = (flat == colour).all(1)
        assert torch.allclose(pixels[own].mean(0), colour, atol=5e-3)
    nearest = torch.cdist(pixels, colours).argmin(1)
    assert (colours[nearest] == flat).all(1).float().mean() > 0.999


def test_depth_is_linear_between_near_and_far():
    x = torch.tensor([[[[0.0, 1.0, 2.0, 3.0, 4.0, 9.0, math.inf]]]]).expand(2, 1, 1, 7)
    made = Depth(1.0, 4.0)(x, generators(2))[1, 0, 0]
    assert torch.allclose(made, torch.tensor([0, 1, 2 / 3, 1 / 3, 0, 0, 0]))
    inverse = Depth(1.0, 4.0, inverse=True)(x, generators(2))[0, 0, 0]
    assert torch.allclose(inverse, torch.tensor([0, 1, (1 / 2 - 1 / 4) / 0.75, (1 / 3 - 1 / 4) / 0.75, 0, 0, 0]))
    own = Depth()(torch.tensor([[[[0.0, 2.0, 4.0, 6.0]]], [[[1.0, 2.0, 2.0, 5.0]]]]), generators(2))
    assert torch.allclose(own[:, 0, 0], torch.tensor([[0, 1, 0.5, 0], [1, 0.75, 0.75, 0]]))
    flat = Depth()(torch.tensor([[[[0.0, 2.0]]], [[[0.0, 0.0]]]]), generators(2))
    assert torch.equal(flat[:, 0, 0], torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("along_rays", [False, True])
def test_normals_of_planes_are_exact(along_rays):
    size, angle = 32, 50.0
    focal = size / 2 / math.tan(math.radians(angle / 2))
    rows, columns = torch.meshgrid(torch.arange(size) - 15.5, torch.arange(size) - 15.5, indexing="ij")
    # Rays in the camera's frame: right, up, backwards.
    rays = torch.stack([columns / focal, -rows / focal, -torch.ones(size, size)]).double()
    for normal in ([0.0, 0.0, 1.0], [0.5, 0.1, 0.8], [-0.3, 0.6, 0.7], [0.2, -0.7, 0.9]):
        n = torch.tensor(normal, dtype=torch.float64)
        n = n / n.norm()
        z = -3 * n[2] / (rays * n[:, None, None]).sum(0)  # the plane n . p = -3 n_z
        assert (z > 0).all()
        x = (z * rays.norm(dim=0) if along_rays else z)[None, None]
        made = Normals(angle, along_rays)(x, generators(1))[0] * 2 - 1
        assert torch.allclose(made[:, 1:-1, 1:-1], n[:, None, None].expand(3, 30, 30), atol=1e-6)
    hole = x.clone()
    hole[..., 5, 5] = 0
    assert torch.equal(Normals(angle, along_rays)(hole, generators(1))[0, :, 5, 5], torch.full((3,), 0.5).double())


def test_normals_of_the_toy_world_are_found_from_its_depth():
    from toyworld.data import draw_scenes, hint_images
    from toyworld.render import render

    rendering = render(draw_scenes(range(4)), size=64)
    exact = hint_images(rendering)["normals"].float() / 255
    made = Normals(rendering.field_of_view)(rendering.depth, generators(4))
    inside = -torch.nn.functional.max_pool2d(-rendering.mask.float(), 5, 1, 2) > 0
    error = (made - exact).abs().amax(1, keepdim=True)[inside]
    assert len(error) > 300
    assert error.median() < 0.03


def test_labels_become_channels_or_colours():
    labels = torch.tensor([[[[0, 1, 2], [4, 255, 1]]]])
    channels = Segmentation(5)(labels, generators(1))
    assert channels.shape == (1, 5, 2, 3)
    assert torch.equal(channels.argmax(1)[0], torch.tensor([[0, 1, 2], [4, 0, 1]]))
    assert torch.equal(channels.sum(1)[0], torch.tensor([[1.0, 1, 1], [1, 0, 1]]))
    colours = Segmentation(5, colours=True)(labels, generators(1))
    assert torch.equal(colours[0, :, 0, 1] * 255, torch.tensor([128.0, 0, 0]))
    assert torch.equal(colours[0, :, 1, 0] * 255, torch.tensor([0.0, 0, 128]))
    assert colours[0, :, 1, 1].max() == colours[0, :, 0, 0].max() == 0
    with pytest.raises(ValueError, match=r"labels from 0 to 255; expected 0 to 2, or 255 for none"):
        Segmentation(3)(labels, generators(1))


def test_voc_colours_are_the_published_ones_and_all_different():
    published = {3: (128, 128, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    table = voc_colours(256) * 255
    for label, colour in published.items():
        assert table[label].tolist() == list(colour)
    assert len(table.unique(dim=0)) == 256


def test_any_function_is_a_hint():
    half = Custom(
        lambda x, generators: (x[:, :1] + 1) / 2 * torch.tensor(draws((0, 1), generators))[:, None, None, None], 1
    )
    images = photos(3)
    expected = (images[:, :1] + 1) / 2 * torch.tensor(draws((0, 1), generators(3)))[:, None, None, None]
    assert torch.equal(half(images, generators(3)), expected)
    for wrong in (images, (images + 1) / 0):
        with pytest.raises(ValueError, match=r"hints must lie in \[0, 1\]; the function gave"):
            Custom(lambda x, generators, wrong=wrong: wrong, 3)(images, generators(3))


def test_precomputed_maps_take_the_channels_asked_for():
    grey, colour = torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)
    two = generators(2)
    assert torch.equal(Precomputed("x")(grey, two), grey)
    assert torch.equal(Precomputed("x", 3)(colour, two), colour)
    assert torch.equal(Precomputed("x", 3)(grey, two), grey.expand(-1, 3, -1, -1))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose(Precomputed("x")(colour, two), (colour * weights).sum(1, keepdim=True), atol=1e-6)
    with pytest.raises(ValueError, match="map 'x' has 3 channels, its hint 4"):
        Precomputed("x", 4)(colour, two)


def test_several_hints_stand_one_above_the_other():
    maps = {"image": photos(2), "mask": torch.rand(2, 1, 64, 96)}
    hints = [Blur(), Precomputed("mask"), Tile()]
    own = [hint_generators(0, [3, 4], [1, 1], purpose) for purpose in "abc"]
    made = annotate(hints, maps, own)
    assert made.shape == (2, 7, 64, 96)
    assert torch.equal(made[:, 3:4], maps["mask"])
    own = [hint_generators(0, [3, 4], [1, 1], purpose) for purpose in "abc"]
    assert torch.equal(made[:, :3], Blur()(maps["image"], own[0]))
    assert torch.equal(made[:, 4:], Tile()(maps["image"], own[2]))
    with pytest.raises(
        ValueError, match=r"Custom must give hints \(2, 2, 64, 96\) of image .*; got \(2, 3, 64, 96\)"
    ):
        annotate([Custom(lambda x, generators: (x + 1) / 2, 2)], maps, [own[0]])
    with pytest.raises(ValueError, match="Depth is made of 'depth', but the samples hold image, mask only"):
        check_source(Depth(), maps)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftEdge(gain=(2.0, 1.0)), "gain must be"),
        (lambda: SoftEdge(scales=()), "need scales"),
        (lambda: SoftEdge(levels=1), "levels of 0 or at least 2"),
        (lambda: LineArt((-1.0, 1.0)), "radius must be"),
        (lambda: Scribble(Blur()), "edges of one channel"),
        (lambda: Tile((0, 4)), "factor must be"),
        (lambda: LowResolution((4, 2)), "factor must be"),
        (lambda: Blur((1.0, math.inf)), "sigma must be"),
        (lambda: Inpaint(0, 0), "need boxes or strokes"),
        (lambda: Palette(0), "num_colours >= 1"),
        (lambda: Depth(4.0, 1.0), "need 0 < near < far"),
        (lambda: Normals(180.0), r"field_of_view must lie in \(0, 180\)"),
        (lambda: Segmentation(300), "ignore outside"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["canny", "soft edge", "line art", "scribble", "tile", "blur", "palette"])
def test_grey_images_have_hints_too(name):
    hint = RANDOM[name]
    made = hint(photos(2, channels=1), generators(2))
    assert len(made) == 2
    assert made.shape[2:] == (64, 96)


def test_half_precision_images_give_nearly_the_same():
    images = photos(2)
    for name in ("soft edge", "line art", "blur", "tile"):
        a, b = (RANDOM[name](x, generators(2)).float() for x in (images, images.bfloat16()))
        assert (a - b).abs().mean() < 0.03
