"""The solids are what they are called: their size, their volume, and distances that no ray can overstep."""

import math

import pytest
import torch

from toyworld.solids import RADIUS, SOLIDS, occupancy, signed_distance

VOLUMES = {
    "sphere": 4 / 3 * math.pi * 0.62**3,
    "cube": 0.9**3,
    "cylinder": math.pi * 0.42**2 * 1.2,
    "cone": math.pi * 0.55**2 * 1.2 / 3,
    "torus": 2 * math.pi**2 * 0.53 * 0.22**2,
    "arrow": (0.74 * 0.34 + 0.72 * 1.04 / 2) * 0.24,
    "letter L": (0.32 * 1.24 + 0.52 * 0.32) * 0.34,
    "chair": 0.72**2 * 0.14 + 0.12 * 0.72 * 0.62 + 4 * 0.14**2 * 0.46,
}


@pytest.mark.parametrize("shape", SOLIDS)
def test_a_solid_fills_its_box_and_its_volume(shape, generator):
    points = 2 * torch.rand(500_000, 3, generator=generator, dtype=torch.float64) - 1
    inside = points[occupancy(shape, points)]
    for gap in (inside.amin(0) - inside.new_tensor(SOLIDS[shape].lower),
                inside.new_tensor(SOLIDS[shape].upper) - inside.amax(0)):  # fmt: skip
        assert gap.min() >= 0
        # The thin tip of the cone is rarely hit.
        assert gap.max() < 0.05
    assert inside.norm(dim=1).max() <= RADIUS
    if shape in VOLUMES:
        # Four standard deviations of the counts are at most 0.02 of them.
        assert len(inside) * 8 / 500_000 == pytest.approx(VOLUMES[shape], rel=0.02)


@pytest.mark.parametrize("shape", SOLIDS)
def test_a_step_of_the_distance_never_enters_the_solid(shape, generator):
    """|f(p) - f(q)| <= |p - q|: then f bounds the distance to the surface from below."""
    p, q = (2 * torch.rand(2, 20_000, 3, generator=generator, dtype=torch.float64) - 1) * 1.2
    q = torch.cat([q[:10_000], p[10_000:] + 0.01 * q[10_000:]])
    change = (signed_distance(shape, p) - signed_distance(shape, q)).abs()
    assert (change <= (p - q).norm(dim=1) + 1e-12).all()


def test_occupancy_is_in_world_coordinates(generator):
    points = 2 * torch.rand(20, 20, 20, 3, generator=generator) - 1
    shift = torch.tensor([0.1, -0.2, 0.3])
    moved = occupancy("mug", points + shift, (0.1, -0.2, 0.3))
    assert moved.shape == (20, 20, 20)
    # Adding and subtracting rounds: a point may change sides where it is that near to the surface.
    near = signed_distance("mug", points).abs() < 1e-6
    assert torch.equal(moved[~near], occupancy("mug", points)[~near])
    with pytest.raises(ValueError, match=r"shape must be one of sphere, .* got 'duck'"):
        occupancy("duck", points)


@pytest.mark.parametrize("name", SOLIDS)
def test_each_corner_of_a_solid_lies_within_the_radius(name):
    ends = zip(SOLIDS[name].lower, SOLIDS[name].upper, strict=True)
    axes = [torch.linspace(low, high, 61, dtype=torch.float64) for low, high in ends]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    within = signed_distance(name, points) <= 1e-9
    assert float(points[within].norm(dim=-1).max()) <= RADIUS
