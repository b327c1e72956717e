"""Opacity, entropy, orientation and distortion in closed form, and as others compute them."""

import math

import pytest
import torch
from nerfstudio.model_components.losses import lossfun_distortion

from sds.penalties import (
    distortion_loss,
    entropy_loss,
    opacity_loss,
    orientation_loss,
    ray_distortion,
    ray_orientation,
)

close = torch.testing.assert_close


@pytest.mark.parametrize("loss", [opacity_loss, entropy_loss, orientation_loss, distortion_loss])
def test_each_view_has_its_own_loss(loss, generator):
    images = torch.rand(3, 1, 4, 6, generator=generator, dtype=torch.float64)
    whole = loss(images)
    close(whole, torch.cat([loss(image[None]) for image in images]), rtol=1e-12, atol=0)
    assert len(whole.unique()) == 3


def test_opacity_is_the_mean_of_a_smooth_absolute_value():
    image = torch.tensor([[0.0, 1.0], [0.5, 0.0]], dtype=torch.float64)[None, None].requires_grad_()
    loss = opacity_loss(image)
    assert loss.item() == pytest.approx((0.1 + math.sqrt(1.01) + math.sqrt(0.26) + 0.1) / 4)
    loss.sum().backward()
    close(image.grad[0, 0, 1, 0].item(), 0.5 / math.sqrt(0.26) / 4)


def test_entropy_is_that_of_a_coin_and_pushes_away_from_the_middle():
    chances = torch.tensor([0.5, 0.25, 0.9, 0.0, 1.0], dtype=torch.float64)
    image = chances.view(5, 1, 1, 1).requires_grad_()
    loss = entropy_loss(image)
    expected = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (0.5, 0.25, 0.9)]
    close(loss[:3].tolist(), expected)
    assert bool((loss[3:].abs() < 2e-4).all())
    loss.sum().backward()
    close(image.grad.flatten().tolist(), [0.0, math.log(3), -math.log(9), 0.0, 0.0])


def test_orientation_counts_seen_matter_that_faces_away():
    weights = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64, requires_grad=True)
    facing = torch.tensor([[0.5, -1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = ray_orientation(weights, facing)
    close(loss.item(), 0.2 * 0.25 + 0.3)
    loss.sum().backward()
    close(facing.grad, torch.tensor([[0.2, 0.0, 0.6]], dtype=torch.float64))
    assert weights.grad is None


def test_distortion_is_what_nerfstudio_computes_over_all_pairs(generator):
    """Of weights that sum to less than one, and uneven edges that do not start at 0; with its gradient."""
    weights = (torch.rand(5, 7, generator=generator, dtype=torch.float64).softmax(1) * 0.9).requires_grad_()
    edges = (2 + torch.rand(5, 8, generator=generator, dtype=torch.float64).cumsum(1)).requires_grad_()
    close(ray_distortion(weights, edges), lossfun_distortion(edges, weights), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(ray_distortion, (weights, edges))


def test_distortion_in_closed_form_keeps_its_digits_far_from_the_camera():
    """Weight 1 spread over a length: the mean distance of two uniform points, a third, for any sampling."""
    for count in (1, 2, 10):
        edges = torch.linspace(3.0, 4.5, count + 1, dtype=torch.float64)[None]
        close(ray_distortion(torch.full((1, count), 1 / count, dtype=torch.float64), edges).item(), 1.5 / 3)
    # A thin surface: two neighbouring intervals of 1/64, at a distance of 1024.
    edges, weights = 1024 + torch.arange(9) / 64, torch.tensor([[0, 0, 0.3, 0.3, 0, 0, 0, 0]])
    assert ray_distortion(weights, edges[None]).item() == pytest.approx(0.18 * (1 + 1 / 3) / 64, rel=1e-5)
