"""Density, colour and normals of a field, whatever its network, against closed forms and finite differences."""

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from sds.field import DenseGrid, Field, cone_blob, normalised, scaled_softplus
from sds.scene import background_network, frequency_network, hash_network, triplane_network

close = torch.testing.assert_close


class Ellipsoid(nn.Module):
    """Raw density 3 - sum (x / axis)^2 + shift, whose normals are known; colours 0, which is albedo a half."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.axes, self.shift = nn.Parameter(torch.tensor([0.5, 0.8, 1.1], dtype=torch.float64)), shift

    def forward(self, points):
        raw = 3 + self.shift - (points / self.axes).square().sum(1, keepdim=True)
        return torch.cat([raw, torch.zeros_like(points)], 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points_of(n=20, seed=1, dtype=torch.float64):
    return 1.8 * torch.rand(n, 3, generator=seeded(seed), dtype=dtype) - 0.9


NETWORKS = {
    "grid": lambda: DenseGrid((3, 6)),
    "triplane": lambda: triplane_network(generator=seeded(), resolution=8, num_components=4, width=8),
    "hash": lambda: hash_network(generator=seeded(), num_levels=3, finest=32, log2_table=8, width=8),
    "frequency": lambda: frequency_network(generator=seeded(), num_frequencies=2, num_layers=3, width=8),
}


def test_a_blob_is_the_published_one_with_finite_derivatives_at_its_centre():
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.4], [1.0, 0.0, 0.0]], dtype=torch.float64)
    close(cone_blob()(points), torch.tensor([10.0, 0.0, -10.0]).double(), rtol=0, atol=1e-4)
    centre = torch.zeros(1, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(cone_blob()(centre).sum(), centre, create_graph=True)
    slope.square().sum().backward()
    assert bool(slope.isfinite().all() and centre.grad.isfinite().all())


def test_matter_is_made_of_raw_numbers():
    class Raw(nn.Module):
        def forward(self, points):
            return torch.cat([points[:, :1], points], 1)

    points = points_of()
    matter = Field(Raw(), half_size=2.0, blob=cone_blob(), activation=softplus)(points)
    close(matter.density, softplus(points[:, 0] / 2 + cone_blob()(points)))
    close(matter.albedo, (points / 2).sigmoid())
    assert matter.normals is None
    raw = torch.tensor([-3.0, 0.0, 4.0])
    close(scaled_softplus(7.0)(raw), 7 * torch.log1p(raw.exp()))
    with pytest.raises(ValueError, match="half_size"):
        Field(Raw(), half_size=0.0)


def test_a_grid_holds_linear_functions_exactly():
    """So its axes are x, y, z, and its corners lie on the faces of the cube."""
    grid = DenseGrid((5,), channels=1).double()
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, 5).double()] * 3, indexing="ij")
    grid.grids[0].data[0, 0] = 1 + 2 * x - 3 * y + 5 * z
    points = points_of(50)
    close(grid(points)[:, 0], 1 + points @ torch.tensor([2.0, -3.0, 5.0]).double(), rtol=0, atol=1e-12)
    close(grid(torch.tensor([[3.0, 0.0, 0.0]]).double()).item(), 3.0)


def test_a_grid_is_the_sum_of_its_resolutions_and_starts_at_its_initial_density():
    grid, parts = DenseGrid((2, 5, 3), channels=2), []
    assert [part.shape[-1] for part in grid.grids] == [2, 3, 5]
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, 5)] * 3, indexing="ij")
    points = points_of(dtype=torch.float32)
    for part in grid.grids:
        part.data.normal_(generator=seeded(part.shape[-1]))
        alone, finest = DenseGrid((part.shape[-1],), channels=2), DenseGrid((5,), channels=2)
        alone.grids[0].data.copy_(part.data)
        # A grid is interpolated twice, first to the corners of the finest one.
        values = alone(torch.stack([x, y, z], -1).reshape(-1, 3))
        finest.grids[0].data[0] = values.T.reshape(2, 5, 5, 5)
        parts.append(finest(points))
    close(grid(points), sum(parts), rtol=1e-5, atol=1e-6)
    expected = torch.tensor([-3.0, 0.0, 0.0, 0.0]).expand(20, 4)
    close(DenseGrid((2, 4), initial=-3.0)(points), expected)
    for wrong in ((), (1,), (4, 0)):
        with pytest.raises(ValueError, match="resolutions"):
            DenseGrid(wrong)


def test_normals_are_those_of_the_level_sets_and_learn_however_dense_the_matter_is():
    """The gradient that nerfstudio's fields lack, and with it lit scenes and the orientation loss."""
    network, points = Ellipsoid(), points_of()
    towards = torch.randn(20, 3, generator=seeded(2), dtype=torch.float64)
    outward = points / network.axes**2
    expected = outward / outward.norm(dim=1, keepdim=True)
    learning = Field(network)(points, normals=True)
    close(learning.normals, expected, rtol=1e-6, atol=1e-6)
    (wanted,) = torch.autograd.grad((expected * towards).sum(), network.axes)
    (learning.normals * towards).sum().backward()
    assert wanted.abs().min() > 0.1
    close(network.axes.grad, wanted, rtol=1e-5, atol=1e-7)
    for shift in (-800.0, 800.0):  # where softplus is 0, and where it saturates in its slope
        close(Field(Ellipsoid(shift))(points, normals=True).normals, learning.normals)
    with torch.no_grad():
        matter = Field(network)(points, normals=True)
    assert not any(value.requires_grad for value in vars(matter).values())
    for name, value in vars(matter).items():
        close(value, getattr(learning, name).detach(), rtol=0, atol=0)
    vectors = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    nothing = normalised(vectors)  # what has no direction has no infinite gradient either
    nothing.sum().backward()
    assert bool((nothing == 0).all() and vectors.grad.isfinite().all())


@pytest.mark.parametrize("name", NETWORKS)
def test_normals_of_every_network_are_its_slope_and_learn(name):
    network = NETWORKS[name]()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(3))
    field, points = Field(network.double(), half_size=1.3), points_of()
    normals = field(points, normals=True).normals
    steps = 1e-6 * torch.eye(3).double()
    slope = torch.stack([field(points + step).density - field(points - step).density for step in steps], 1)
    close(normals, -slope / slope.norm(dim=1, keepdim=True), rtol=0, atol=1e-4)
    (normals * torch.randn(20, 3, generator=seeded(2))).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)
    assert next(network.parameters()).grad.abs().max() > 1e-3
    if name != "grid":  # a ReLU, or none, has no second derivative
        decoder = network.float()[-1]
        features = torch.randn(5, decoder.in_dim, generator=seeded(), requires_grad=True)
        (slope,) = torch.autograd.grad(decoder(features).sum(), features, create_graph=True)
        assert torch.autograd.grad(slope.sum(), features)[0].abs().max() > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_come_from_their_generator_alone(name):
    first = NETWORKS[name]()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = NETWORKS[name]()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_background_has_a_colour_of_its_own_in_every_direction():
    sky = background_network(generator=seeded())
    for parameter in sky.parameters():
        parameter.data *= 3
    directions = normalised(torch.randn(200, 3, generator=seeded(1)))
    colours = sky(directions)
    assert bool(((colours > 0) & (colours < 1)).all())
    assert (colours - sky(-directions)).abs().amax(1).median() > 0.01
    assert (sky(torch.eye(3)) - sky(-torch.eye(3))).abs().amax(1).min() > 1e-3
