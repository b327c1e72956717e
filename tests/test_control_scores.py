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


def maps(seed, density=0.2, shape=(4, 1, 12, 9)):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density).float()


def square(top, left, side=3, size=12):
    mask = torch.zeros(1, 1, size, size)
    mask[0, 0, top : top + side, left : left + side] = 1
    return mask


def f1_by_loops(made, wanted, tolerance):
    def pixels(mask):
        return [tuple(place) for place in mask[0].nonzero().tolist()]

    def met(place, others):
        return any(max(abs(place[0] - y), abs(place[1] - x)) <= tolerance for y, x in others)

    a, b = pixels(made), pixels(wanted)
    if not a or not b:
        return float(a == b)
    precision, recall = sum(met(p, b) for p in a) / len(a), sum(met(p, a) for p in b) / len(b)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_f1_is_that_of_loops_over_pixels(tolerance):
    made, wanted = maps(0, 0.1, (4, 1, 16, 16)), maps(1, 0.12, (4, 1, 16, 16))
    made[2], made[3], wanted[3] = 0, 0, 0
    expected = [f1_by_loops(a, b, tolerance) for a, b in zip(made, wanted, strict=True)]
    assert expected[2:] == [0.0, 1.0]
    assert 0 < expected[0] < 1
    close(edge_f1(made, wanted, tolerance).double(), torch.tensor(expected, dtype=torch.float64))


def test_an_edge_one_pixel_off_counts_only_with_tolerance():
    made, wanted = square(2, 2, side=1), square(3, 3, side=1)
    assert edge_f1(made, wanted).tolist() == [0.0]
    assert edge_f1(made, wanted, tolerance=1).tolist() == [1.0]
    assert edge_f1(square(5, 3, side=1), wanted, tolerance=1).tolist() == [0.0]


def test_more_edges_than_wanted_cost_precision_and_fewer_cost_recall():
    whole, half = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    half[..., 2:] = 0
    close(edge_f1(whole, half), torch.tensor([2 / 3]))  # precision 1/2, recall 1
    close(edge_f1(half, whole), torch.tensor([2 / 3]))


def test_iou_of_squares():
    close(mask_iou(square(2, 2, 4), square(2, 4, 4)), torch.tensor([8 / 24]))
    assert mask_iou(square(2, 2), square(2, 2)).tolist() == [1.0]
    assert mask_iou(square(0, 0), square(6, 6)).tolist() == [0.0]
    assert mask_iou(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).tolist() == [1.0]
    assert mask_iou(torch.zeros(1, 1, 12, 12), square(2, 2)).tolist() == [0.0]


def test_centres_are_compared_in_pixels():
    close(centre_error(square(1, 1), square(4, 5)), torch.tensor([5.0]))
    close(centre_error(square(2, 2, 5), square(3, 3, 3)), torch.tensor([0.0]))
    nothing = torch.zeros(1, 1, 12, 12)
    close(centre_error(nothing, square(1, 1)), torch.tensor([math.hypot(12, 12)]))
    close(centre_error(square(1, 1), nothing), torch.tensor([math.hypot(12, 12)]))
    assert centre_error(nothing, nothing).tolist() == [0.0]


def test_colour_error_looks_inside_the_mask_only():
    images = torch.full((3, 3, 12, 12), -1.0)
    images[:, :, 2:5, 2:5] = torch.tensor([1.0, 0.0, -1.0])[:, None, None]
    mask = square(2, 2).repeat(3, 1, 1, 1)
    mask[2] = 0
    colours = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, -1.0], [1.0, 0.0, -1.0]])
    close(colour_error(images, colours, mask), torch.tensor([0.0, math.sqrt(1 / 3), 1.0]))


def test_rmse_is_per_sample():
    made, wanted = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    made[1, 0] = 0.5
    close(rmse(made, wanted), torch.tensor([0.0, math.sqrt(0.125)]))


def test_ssim_is_that_of_scikit_image():
    """Which drops the border, where ours mirrors the image: so it is given the mirrored one."""
    a, b = torch.rand(2, 3, 1, 24, 30, generator=torch.Generator().manual_seed(0))
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [
        structural_similarity(*(np.pad(m[0].numpy(), 5, "reflect") for m in (x, y)), **settings)
        for x, y in zip(a, b, strict=True)
    ]
    close(ssim(a, b), torch.tensor(expected, dtype=torch.float32), rtol=1e-3, atol=1e-3)
    assert ssim(a[:1], a[:1]).tolist() == pytest.approx([1.0])


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
    close(rmse(made, wanted, inside)[:1], rmse(made[part], wanted[part]))
    close(rmse(made, wanted, torch.ones(2, 1, 24, 30)), rmse(made, wanted))
    close(ssim(made, wanted, torch.ones(2, 1, 24, 30)), ssim(made, wanted))


def test_shading_is_the_correlation_of_numpy_whatever_the_colour():
    made, wanted = torch.rand(2, 1, 1, 24, 30, generator=torch.Generator().manual_seed(2))
    inside = torch.zeros(1, 1, 24, 30)
    inside[:, :, 4:10, 5:20] = 1
    pixels = [x[0, 0, 4:10, 5:20].flatten().numpy() for x in (made, wanted)]
    expected = float(np.corrcoef(*pixels)[0, 1])
    assert abs(expected) > 0.01
    assert float(shading(made, wanted, inside)) == pytest.approx(expected, rel=5e-3)
    assert float(shading(0.3 * wanted + 0.5, wanted, inside)) == pytest.approx(1, abs=0.01)
    assert float(shading(1 - wanted, wanted, inside)) == pytest.approx(-1, abs=0.01)
    assert float(shading(torch.full_like(wanted, 0.4), wanted, inside)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["edge_f1", "edge_f1_1px", "ssim", "mask_iou", "centre_error", "rmse"])
def test_a_sample_does_not_see_its_neighbours(name):
    score = {**EDGE_SCORES, **MASK_SCORES, **DENSE_SCORES}[name]
    made, wanted = maps(2, 0.4, (4, 1, 16, 16)), maps(3, 0.4, (4, 1, 16, 16))
    whole = score(made, wanted)
    assert whole.shape == (4,)
    close(whole, torch.cat([score(made[i : i + 1], wanted[i : i + 1]) for i in range(4)]))
    assert len(set(whole.tolist())) == 4


@pytest.mark.parametrize("score", [edge_f1, mask_iou, ssim, rmse, centre_error])
def test_maps_of_different_shapes_are_refused(score):
    with pytest.raises(
        ValueError, match=r"share a shape \(b, c, h, w\); got \(1, 1, 16, 16\) and \(1, 1, 16, 15\)"
    ):
        score(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 15))
