"""Scores of control against loops over pixels, other libraries, and shapes whose answer is known."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from controlnet.scores import (
    DENSE_SCORES,
    EDGE_SCORES,
    MASK_SCORES,
    centre_error,
    colour_error,
    edge_f1,
    mask_iou,
    rmse,
    shading,
    ssim,
)

close = torch.testing.assert_close
SCORES = {**EDGE_SCORES, **MASK_SCORES, **DENSE_SCORES}


def maps(seed, density=0.2, shape=(4, 1, 16, 16)):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).float()


def square(top, left, side=3, size=12):
    mask = torch.zeros(1, 1, size, size)
    mask[0, 0, top : top + side, left : left + side] = 1
    return mask


def f1_by_loops(made, wanted, tolerance):
    def met(place, others):
        return any(max(abs(place[0] - y), abs(place[1] - x)) <= tolerance for y, x in others)

    a, b = ([tuple(place) for place in mask[0].nonzero().tolist()] for mask in (made, wanted))
    if not a or not b:
        return float(a == b)
    precision, recall = sum(met(p, b) for p in a) / len(a), sum(met(p, a) for p in b) / len(b)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_f1_is_that_of_loops_over_pixels(tolerance):
    made, wanted = maps(0, 0.1), maps(1, 0.12)
    made[2], made[3], wanted[3] = 0, 0, 0
    expected = [f1_by_loops(a, b, tolerance) for a, b in zip(made, wanted, strict=True)]
    assert expected[2:] == [0.0, 1.0]
    assert 0 < expected[0] < 1
    close(edge_f1(made, wanted, tolerance).double(), torch.tensor(expected, dtype=torch.float64))


def test_iou_and_centres_of_squares():
    nothing = torch.zeros(1, 1, 12, 12)
    for made, wanted, iou, distance in (
        (square(2, 2, 4), square(2, 4, 4), 8 / 24, 2.0), (square(2, 2), square(2, 2), 1.0, 0.0),
        (square(1, 1), square(4, 5), 0.0, 5.0), (square(2, 2, 5), square(3, 3, 3), 9 / 25, 0.0),
        (nothing, nothing, 1.0, 0.0), (nothing, square(2, 2), 0.0, math.hypot(12, 12)),
        (square(2, 2), nothing, 0.0, math.hypot(12, 12)),
    ):  # fmt: skip
        close(mask_iou(made, wanted), torch.tensor([iou]))
        close(centre_error(made, wanted), torch.tensor([distance]))


def test_colour_error_looks_inside_the_mask_only():
    images = torch.full((3, 3, 12, 12), -1.0)
    images[:, :, 2:5, 2:5] = torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    mask = square(2, 2).repeat(3, 1, 1, 1)
    mask[2] = 0
    colours = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, -1.0], [1.0, 0.0, -1.0]])
    close(colour_error(images, colours, mask), torch.tensor([0.0, math.sqrt(1 / 3), 1.0]))


def test_ssim_is_that_of_scikit_image():
    """Which drops the border, where ours mirrors the image: so it is given the mirrored one."""
    a, b = torch.rand(2, 3, 1, 24, 30, generator=torch.Generator().manual_seed(0))
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [
        structural_similarity(*(np.pad(m[0].numpy(), 5, "reflect") for m in (x, y)), **settings)
        for x, y in zip(a, b, strict=True)
    ]
    close(ssim(a, b), torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=1e-3)


def test_what_is_outside_does_not_count():
    made, wanted = torch.rand(2, 2, 3, 24, 30, generator=torch.Generator().manual_seed(1))
    inside = torch.zeros(2, 1, 24, 30)
    inside[0, :, 4:10, 5:20] = inside[1, :, :, 15:] = 1
    for score in (rmse, ssim, shading):
        # The similarity of a pixel depends on those 5 pixels away.
        near = torch.nn.functional.max_pool2d(inside, 11, 1, 5) if score is ssim else inside
        close(score(made * near, wanted, inside), score(made * near + (1 - near), wanted, inside))
        assert (score(made, wanted, inside) != score(made * (1 - inside), wanted, inside)).all()
    part = (slice(0, 1), slice(None), slice(4, 10), slice(5, 20))
    close(rmse(made, wanted, inside)[:1], (made[part] - wanted[part]).square().mean().sqrt()[None])
    close(ssim(made, wanted, torch.ones(2, 1, 24, 30)), ssim(made, wanted))


def test_shading_is_the_correlation_of_numpy_whatever_the_colour():
    made, wanted = torch.rand(2, 1, 1, 24, 30, generator=torch.Generator().manual_seed(2))
    inside = torch.zeros(1, 1, 24, 30)
    inside[:, :, 4:10, 5:20] = 1
    expected = float(np.corrcoef(*(x[0, 0, 4:10, 5:20].flatten().numpy() for x in (made, wanted)))[0, 1])
    assert abs(expected) > 0.01
    assert float(shading(made, wanted, inside)) == pytest.approx(expected, rel=5e-3)
    for other, value in ((0.3 * wanted + 0.5, 1), (1 - wanted, -1), (torch.full_like(wanted, 0.4), 0)):
        assert float(shading(other, wanted, inside)) == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize("name", SCORES)
def test_a_sample_does_not_see_its_neighbours_and_shapes_must_agree(name):
    made, wanted = maps(2, 0.4), maps(3, 0.4)
    whole = SCORES[name](made, wanted)
    assert whole.shape == (4,)
    close(whole, torch.cat([SCORES[name](made[i : i + 1], wanted[i : i + 1]) for i in range(4)]))
    assert len(set(whole.tolist())) == 4
    with pytest.raises(ValueError, match=r"a shape \(b, c, h, w\); got \(4, 1, 16, 16\) and \(4, 1, 16, 15\)"):
        SCORES[name](made, wanted[..., :15])
