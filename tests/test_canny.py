"""Canny edges: OpenCV's and kornia's exactly, thresholds by sample, few looks at whether tracking has ended."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from controlnet import canny as module
from controlnet.canny import ROUNDS, Canny, canny, track
from controlnet.hints import hint_generators


def photos(number, channels, height=48, width=64, seed=0):
    """Smooth shapes with grain, 8 bits: both strong edges and faint ones. Images in [-1, 1] and bytes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, channels, height // 8, width // 8, generator=generator)
    smooth = interpolate(coarse, (height, width), mode="bicubic") * 1.2 - 0.1
    grain = 0.04 * torch.rand(number, channels, height, width, generator=generator)
    pixels = ((smooth + grain).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.float() / 127.5 - 1, pixels


def f1(made, wanted):
    hits = float((made & wanted).sum())
    return 2 * hits / (float(made.sum()) + float(wanted.sum()))


def generators(number, seed=0):
    return hint_generators(seed, range(number), [0] * number)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("l2_gradient", [False, True])
@pytest.mark.parametrize(("low", "high"), [(100, 200), (20, 60), (50, 400), (80, 80)])
def test_opencvs_edges_pixel_by_pixel(channels, l2_gradient, low, high):
    cv2 = pytest.importorskip("cv2", reason="compares with OpenCV, which is not installed")
    images, pixels = photos(4, channels)
    noise = (torch.rand(2, channels, 48, 64, generator=torch.Generator().manual_seed(1)) * 255).to(torch.uint8)
    images, pixels = torch.cat([images, noise.float() / 127.5 - 1]), torch.cat([pixels, noise])
    edges = canny(images, torch.tensor(float(low)), torch.tensor(float(high)), l2_gradient=l2_gradient)
    assert 0.02 < edges.mean() < 0.5
    for made, picture in zip(edges, pixels, strict=True):
        array = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
        expected = torch.from_numpy(cv2.Canny(array, low, high, L2gradient=l2_gradient))
        assert torch.equal(made[0] * 255, expected.float())  # F1 is 1


@pytest.mark.parametrize("l2_gradient", [False, True])
def test_kornia_rs_agrees_on_grey_images(l2_gradient):
    imgproc = pytest.importorskip("kornia_rs.imgproc", reason="compares with kornia_rs, which is not installed")
    if not hasattr(imgproc, "canny"):
        pytest.skip("this kornia_rs has no canny")
    images, pixels = photos(4, 1)
    edges = canny(images, torch.tensor(60.0), torch.tensor(140.0), l2_gradient=l2_gradient)
    for made, picture in zip(edges, pixels, strict=True):
        array = np.ascontiguousarray(picture.permute(1, 2, 0).numpy())
        expected = np.asarray(imgproc.canny(array, 60.0, 140.0, l2_gradient)).squeeze()
        assert torch.equal(made[0] * 255, torch.from_numpy(expected).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.2), (0.05, 0.6), (0.3, 0.3)])
def test_kornias_edges_bit_by_bit(dtype, channels, low, high):
    from kornia.filters import canny as kornia_canny

    images = photos(4, channels)[0].to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    expected = kornia_canny((images.to(precise) + 1) / 2, low, high)[1].to(dtype)
    made = canny(images, torch.tensor(low, dtype=precise), torch.tensor(high, dtype=precise), "kornia")
    assert made.dtype == dtype
    assert made.shape == (4, 1, 48, 64)
    assert 0.02 < made.float().mean() < 0.5
    assert torch.equal(made, expected)


def test_the_two_kinds_differ_and_by_how_much():
    # With the same grey values, blur and norm, what remains are rounding to 8 bits and the border.
    from kornia.color import rgb_to_grayscale
    from kornia.filters import gaussian_blur2d

    images = photos(4, 3, 128, 160)[0]
    theirs = canny(images, torch.tensor(100 / 255), torch.tensor(200 / 255), "kornia") > 0
    blurred = gaussian_blur2d(rgb_to_grayscale((images + 1) / 2), (5, 5), (1.0, 1.0)) * 2 - 1
    matched = canny(blurred, torch.tensor(100.0), torch.tensor(200.0), l2_gradient=True) > 0
    plain = canny(images, torch.tensor(100.0), torch.tensor(200.0)) > 0
    assert f1(matched, theirs) > 0.9
    assert f1(plain, theirs) < 0.75


@pytest.mark.parametrize("like", ["opencv", "kornia"])
def test_each_sample_has_thresholds_of_its_own(like):
    images = photos(5, 3)[0]
    low, high = ((50, 150), (150, 300)) if like == "opencv" else ((0.05, 0.3), (0.3, 0.8))
    hint = Canny(low, high, like)
    edges = hint(images, generators(5))
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    singly = torch.cat([hint(image[None], generators(5)[i : i + 1]) for i, image in enumerate(images)])
    assert torch.equal(edges, singly)
    same = images[:1].expand(5, -1, -1, -1)
    assert len({tuple(map.flatten().tolist()) for map in hint(same, generators(5))}) >= 4
    shared = Canny((low[1], low[1]), (high[0], high[0]), like)
    expected = canny(images, torch.tensor(low[1]), torch.tensor(high[0]), like)
    assert torch.equal(shared(images, generators(5)), expected)


def test_thresholds_follow_from_seed_sample_and_epoch():
    image, hint = photos(1, 3)[0], Canny((20, 200), (200, 400))
    draws = {
        (seed, index, epoch): hint(image, hint_generators(seed, [index], [epoch]))
        for seed in (0, 1) for index in (0, 1) for epoch in (0, 1)
    }  # fmt: skip
    keys = list(draws)
    for i, a in enumerate(keys):
        assert torch.equal(draws[a], hint(image, hint_generators(a[0], [a[1]], [a[2]])))
        assert not any(torch.equal(draws[a], draws[b]) for b in keys[:i])


def test_of_two_thresholds_the_smaller_is_the_lower():
    images = photos(2, 1)[0]
    assert torch.equal(
        Canny((200, 200), (80, 80))(images, generators(2)), Canny((80, 80), (200, 200))(images, generators(2))
    )


@pytest.mark.parametrize("like", ["opencv", "kornia"])
def test_a_square_keeps_all_four_sides(like):
    image = torch.full((1, 1, 32, 32), -1.0)
    image[:, :, 11:21, 11:21] = 1.0
    low, high = (100, 200) if like == "opencv" else (0.1, 0.2)
    edges = canny(image, torch.tensor(float(low)), torch.tensor(float(high)), like)[0, 0] > 0
    for turned in (edges, edges.T, edges.flip(0), edges.T.flip(0)):
        assert turned[9:13].any(0)[13:19].all()  # kornia before 0.9 lost part of one
    assert not edges[13:19, 13:19].any()
    assert not edges[:9].any()


def test_mirrored_images_have_mirrored_edges_where_no_two_gradients_are_equal():
    images = photos(4, 1, seed=3)[0] + 1e-3 * torch.rand(4, 1, 48, 64)
    args = torch.tensor(0.2), torch.tensor(0.4), "kornia"
    assert f1(canny(images.flip(3), *args).flip(3) > 0, canny(images, *args) > 0) > 0.995


def spiral(size):
    """One line that winds inwards: a path as long as the image can hold."""
    path = torch.zeros(1, 1, size, size, dtype=torch.bool)
    row, column, step, turn = 0, 0, [(0, 1), (1, 0), (0, -1), (-1, 0)], 0
    path[0, 0, 0, 0] = True
    length = 1
    for run in [size - 1] + [n for m in range(size - 1, 1, -2) for n in (m, m)]:
        for _ in range(run):
            row, column = row + step[turn][0], column + step[turn][1]
            path[0, 0, row, column] = True
            length += 1
        turn = (turn + 1) % 4
    return path, length


def test_weak_pixels_are_followed_to_the_end_with_one_look_in_eight_rounds(monkeypatch):
    path, length = spiral(33)
    strong = torch.zeros_like(path)
    strong[0, 0, 0, 0] = True
    looks = []
    monkeypatch.setattr(module.torch, "equal", lambda a, b, equal=torch.equal: looks.append(1) or equal(a, b))
    edges = track(strong, path)
    monkeypatch.undo()
    assert torch.equal(edges, path)
    assert len(looks) <= length / ROUNDS + 2
    assert length > 400
    assert not track(torch.zeros_like(path), path).any()
    gap = path.clone()
    gap[0, 0, 0, 4:6] = False
    assert track(strong, gap).sum() == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": (200, 100)}, r"low of Canny\(like='opencv'\) must be \(smallest, largest\) within"),
        ({"low": (-1, 100)}, "low of Canny"),
        ({"high": (100, 5000)}, "high of Canny"),
        ({"like": "kornia"}, r"low of Canny\(like='kornia'\)"),
        ({"low": (0, float("nan"))}, "low of Canny"),
        ({"like": "scipy"}, "like must be one of opencv, kornia; got 'scipy'"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Canny(**arguments)
