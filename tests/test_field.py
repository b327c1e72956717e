import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from sds.field import DenseGrid, Field, cone_blob, gaussian_blob, normalised, scaled_softplus
from sds.scene import background_network, clipped_exp, frequency_network, hash_network, triplane_network

close = torch.testing.assert_close


class Ellipsoid(nn.Module):
    """Raw density 3 - sum (x / axis)^2, whose normals are known; colours 0, which is albedo a half."""

    def __init__(self):
        super().__init__()
        self.axes = nn.Parameter(torch.tensor([0.5, 0.8, 1.1], dtype=torch.float64))

    def forward(self, points):
        raw = 3 - (points / self.axes).square().sum(1, keepdim=True)
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


@pytest.fixture(params=list(NETWORKS))
def network(request):
    """Every network a field can have, with parameters large enough to see."""
    built = NETWORKS[request.param]()
    for parameter in built.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(3))
    return built


def test_blobs_are_the_published_ones():
    points = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, 0.4], [1.0, 0.0, 0.0]], dtype=torch.float64)
    expected = [5.0, 5 * math.exp(-0.25 / 0.08), 5 * math.exp(-1 / 0.08)]
    close(gaussian_blob()(points), torch.tensor(expected, dtype=torch.float64))
    close(cone_blob()(points), torch.tensor([10.0, 0.0, -10.0]).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("blob", [gaussian_blob(), cone_blob()])
def test_blobs_have_finite_derivatives_at_their_centre(blob):
    points = torch.zeros(1, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(blob(points).sum(), points, create_graph=True)
    slope.square().sum().backward()
    assert bool(slope.isfinite().all() and points.grad.isfinite().all())


def test_matter_is_made_of_raw_numbers():
    class Raw(nn.Module):
        def forward(self, points):
            return torch.cat([points[:, :1], points], 1)

    points = points_of()
    matter = Field(Raw(), half_size=2.0, blob=gaussian_blob(), activation=softplus)(points)
    close(matter.density, softplus(points[:, 0] / 2 + gaussian_blob()(points)))
    close(matter.albedo, (points / 2).sigmoid())
    assert matter.normals is None


def test_a_scaled_softplus_is_a_multiple_of_it():
    raw = torch.tensor([-3.0, 0.0, 4.0])
    close(scaled_softplus(7.0)(raw), 7 * torch.log1p(raw.exp()))


def test_a_clipped_exponential_is_one_with_a_clipped_slope():
    raw = torch.tensor([-2.0, 3.0, 16.0], requires_grad=True)
    clipped_exp(raw).sum().backward()
    close(clipped_exp(raw.detach()), raw.detach().exp())
    close(raw.grad, torch.tensor([math.exp(-2), math.exp(3), math.exp(15)]))


def test_a_grid_holds_linear_functions_exactly():
    """So its axes are x, y, z, and its corners lie on the faces of the cube."""
    grid = DenseGrid((5,), channels=1).double()
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, 5).double()] * 3, indexing="ij")
    grid.grids[0].data[0, 0] = 1 + 2 * x - 3 * y + 5 * z
    points = points_of(50)
    close(grid(points)[:, 0], 1 + points @ torch.tensor([2.0, -3.0, 5.0]).double(), rtol=0, atol=1e-12)
    beyond = torch.tensor([[3.0, 0.0, 0.0]]).double()
    close(grid(beyond).item(), 3.0)


def test_a_grid_is_the_sum_of_its_resolutions():
    grid = DenseGrid((2, 5, 3), channels=2)
    assert [part.shape[-1] for part in grid.grids] == [2, 3, 5]
    for part in grid.grids:
        part.data.normal_(generator=seeded(part.shape[-1]))
    points = points_of(dtype=torch.float32)
    parts = []
    for part in grid.grids:
        alone = DenseGrid((part.shape[-1],), channels=2)
        alone.grids[0].data.copy_(part.data)
        # A grid is interpolated twice, first to the corners of the finest one.
        finest = DenseGrid((5,), channels=2)
        corners = torch.linspace(-1, 1, 5)
        z, y, x = torch.meshgrid(corners, corners, corners, indexing="ij")
        values = alone(torch.stack([x, y, z], -1).reshape(-1, 3))
        finest.grids[0].data[0] = values.T.reshape(2, 5, 5, 5)
        parts.append(finest(points))
    close(grid(points), sum(parts), rtol=1e-5, atol=1e-6)


def test_a_grid_starts_at_its_initial_density():
    values = DenseGrid((2, 4), initial=-3.0)(points_of(dtype=torch.float32))
    close(values, torch.tensor([-3.0, 0.0, 0.0, 0.0]).expand(20, 4))
    for wrong in ((), (1,), (4, 0)):
        with pytest.raises(ValueError, match="resolutions"):
            DenseGrid(wrong)


def test_normals_are_those_of_the_level_sets():
    network, points = Ellipsoid(), points_of()
    normals = Field(network)(points, normals=True).normals
    outward = points / network.axes**2
    close(normals, outward / outward.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-6)


def test_normals_learn():
    """The gradient that nerfstudio's fields lack, and with it lit scenes and the orientation loss."""
    network, points = Ellipsoid(), points_of()
    towards = torch.randn(20, 3, generator=seeded(2), dtype=torch.float64)

    def agreement(axes):
        outward = points / axes**2
        return (outward / outward.norm(dim=1, keepdim=True) * towards).sum()

    (Field(network)(points, normals=True).normals * towards).sum().backward()
    (expected,) = torch.autograd.grad(agreement(network.axes), network.axes)
    assert expected.abs().min() > 0.1
    close(network.axes.grad, expected, rtol=1e-5, atol=1e-7)


def test_normals_of_every_network_learn(network):
    points = points_of(dtype=torch.float32)
    matter = Field(network, half_size=1.0)(points, normals=True)
    close(matter.normals.norm(dim=1), torch.ones(20), rtol=1e-3, atol=0)
    (matter.normals * torch.randn(20, 3, generator=seeded(2))).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)
    assert next(network.parameters()).grad.abs().max() > 1e-3


def test_normals_of_every_network_are_its_slope(network):
    field, points = Field(network.double(), half_size=1.3), points_of()
    normals = field(points, normals=True).normals
    step = 1e-6 * torch.eye(3).double()
    density = [field(points + s).density - field(points - s).density for s in step]
    slope = torch.stack(density, 1)
    close(normals, -slope / slope.norm(dim=1, keepdim=True), rtol=0, atol=1e-4)


def test_the_gradient_of_a_grids_normals_is_that_of_finite_differences():
    grid = DenseGrid((2, 3)).double()
    for part in grid.grids:
        part.data.normal_(generator=seeded(part.shape[-1]))
    towards = torch.randn(20, 3, generator=seeded(2), dtype=torch.float64)

    def agreement(coarse, fine):
        grids = {"grids.0": coarse, "grids.1": fine}
        field = Field(_Called(grid, grids))
        return (field(points_of(), normals=True).normals * towards).sum()

    assert torch.autograd.gradcheck(agreement, tuple(grid.grids))


class _Called(nn.Module):
    """A network with other parameters than its own."""

    def __init__(self, network, parameters):
        super().__init__()
        self.call = lambda points: torch.func.functional_call(network, parameters, (points,))

    def forward(self, points):
        return self.call(points)


def test_normals_do_not_care_how_dense_the_matter_is():
    class Shifted(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.ellipsoid, self.shift = Ellipsoid(), shift

        def forward(self, points):
            return self.ellipsoid(points) + self.shift

    points = points_of()
    reference = Field(Ellipsoid())(points, normals=True).normals
    for shift in (-800.0, 800.0):  # where softplus is 0, and where it saturates in its slope
        close(Field(Shifted(shift))(points, normals=True).normals, reference)


def test_normals_without_gradient_are_the_same_and_hold_no_graph():
    field, points = Field(Ellipsoid()), points_of()
    learning = field(points, normals=True)
    with torch.no_grad():
        matter = field(points, normals=True)
    assert learning.normals.requires_grad
    assert not any(value.requires_grad for value in vars(matter).values())
    for name, value in vars(matter).items():
        close(value, getattr(learning, name).detach(), rtol=0, atol=0)
    plain = field(points)
    close(plain.density, learning.density, rtol=0, atol=0)


def test_what_has_no_direction_has_no_normal_and_no_infinite_gradient():
    vectors = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    normals = normalised(vectors)
    normals.sum().backward()
    assert bool((normals == 0).all() and vectors.grad.isfinite().all())


@pytest.mark.parametrize("name", ["triplane", "hash", "frequency"])
def test_decoders_bend(name):
    """A ReLU, or none, has no second derivative."""
    decoder = NETWORKS[name]()[-1]
    features = torch.randn(5, decoder.in_dim, generator=seeded(), requires_grad=True)
    (slope,) = torch.autograd.grad(decoder(features).sum(), features, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), features)
    assert bend.abs().max() > 1e-4


def test_networks_come_from_their_generator_alone(network, request):
    name = request.node.callspec.params["network"]
    state = torch.get_rng_state()
    first, again = NETWORKS[name](), NETWORKS[name]()
    torch.manual_seed(99)
    third = NETWORKS[name]()
    torch.set_rng_state(state)
    for a, b, c in zip(first.parameters(), again.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    triplane_network(generator=seeded(7), resolution=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_background_has_a_colour_of_its_own_in_every_direction():
    sky = background_network(generator=seeded())
    for parameter in sky.parameters():
        parameter.data *= 3
    directions = normalised(torch.randn(200, 3, generator=seeded(1)))
    colours = sky(directions)
    assert colours.shape == (200, 3)
    assert bool(((colours > 0) & (colours < 1)).all())
    assert (colours - sky(-directions)).abs().amax(1).median() > 0.01
    axes = torch.eye(3)
    assert (sky(axes) - sky(-axes)).abs().amax(1).min() > 1e-3


def test_a_cube_without_extent_is_refused():
    with pytest.raises(ValueError, match="half_size"):
        Field(Ellipsoid(), half_size=0.0)
