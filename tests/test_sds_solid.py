"""Which space is hidden from cameras: balls, shells, bowls and plates, by chords and volumes that are known."""

import math

import pytest
import torch

from sds.mesh import Lattice, extract_mesh, sample_lattice
from sds.radiance import RadianceField
from sds.simplify import simplified
from sds.solid import Space, field_normals, hidden_share, lookouts, optical_depth, survey
from sds.topology import Topology, topology
from sds.turntable import turntable_cameras

close = torch.testing.assert_close
DENSITY = 60.0


def scene(inside):
    return RadianceField(
        density=lambda p: DENSITY * inside(p).float(), colour=lambda p: (p + 1) / 2,
        render=lambda *_: pytest.fail("no picture is needed"),
    )  # fmt: skip


def shell(p, outer=0.62, inner=0.45):
    radius = p.norm(dim=1)
    return (radius < outer) & (radius > inner)


def mesh_of(inside, resolution=32, **settings):
    found = scene(inside)
    return extract_mesh(survey(found, resolution, **settings).at(DENSITY / 2), found.colours, DENSITY / 2)


def test_the_optical_depth_of_a_ball_is_its_density_times_the_chord():
    """A fog of density 1 with a soft edge, so that the samples between two points of the lattice are right."""
    lattice = sample_lattice(
        RadianceField(
            density=lambda p: (1 - p.square().sum(1) / 0.64).clamp(min=0), colour=lambda p: p,
            render=lambda *_: None,
        ), 64,
    )  # fmt: skip
    camera = turntable_cameras(3, elevations=(20.0,), distance=3.0)[1]
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    found = optical_depth(lattice, camera, points, resolution=64)
    # Midpoint rule with 2,000 steps along each ray.
    origin = camera[:, 3].double()
    along = points.double() - origin
    steps = (torch.arange(2000).double() + 0.5) / 2000
    samples = origin + along[:, None] * steps[:, None]
    density = (1 - samples.square().sum(-1) / 0.64).clamp(min=0)
    expected = density.mean(1) * along.norm(dim=1)
    close(found.double(), expected, atol=0.01, rtol=0)
    behind = camera[None, :, 3] + torch.tensor([[0.0, 0, 0]]) + camera[:, 2]
    assert optical_depth(lattice, camera, behind).isinf().all()


def test_a_shell_whose_inside_no_camera_sees_is_solid():
    lattice = sample_lattice(scene(shell), 32)
    foam = extract_mesh(lattice, lambda p: p * 0, DENSITY / 2)
    whole = mesh_of(shell)
    ball = 4 / 3 * math.pi * 0.62**3
    for mesh in (foam, whole):  # marching cubes fills what is enclosed, in any case
        assert topology(mesh) == Topology(closed=True, components=1, voids=0, genus=0)
        assert abs(mesh.volume - ball) < float(mesh.areas.sum()) * lattice.spacing / 2
    # With a crack it is not enclosed, but still no four cameras see into it.
    cracked = mesh_of(lambda p: shell(p) & ~((p[:, 0].abs() < 0.05) & (p[:, 1] > 0)))
    assert topology(cracked) == Topology(closed=True, components=1, voids=0, genus=0)
    assert cracked.volume == pytest.approx(ball, rel=0.12)
    leaky = sample_lattice(scene(lambda p: shell(p) & ~((p[:, 0].abs() < 0.05) & (p[:, 1] > 0))), 32)
    hollow = extract_mesh(leaky, lambda p: p * 0, DENSITY / 2)
    assert hollow.volume < 0.8 * ball


def test_a_bowl_stays_open_because_cameras_see_into_it():
    """The half of a shell below z = 0.1; its hollow is seen from above, its underside not at all."""
    bowl = mesh_of(lambda p: shell(p) & (p[:, 2] < 0.1))

    def cap(radius):  # of a ball, below z = 0.1
        height = radius + 0.1
        return math.pi * height**2 * (3 * radius - height) / 3

    assert bowl.volume == pytest.approx(cap(0.62) - cap(0.45), rel=0.1)
    assert topology(bowl) == Topology(closed=True, components=1, voids=0, genus=0)


def test_nothing_grows_below_an_object_that_is_seen_from_above_alone():
    plate = mesh_of(lambda p: (p[:, :2].norm(dim=1) < 0.6) & ((p[:, 2] - 0.1).abs() < 0.1))
    spacing = 2 / 32
    assert plate.vertices[:, 2].min() > -2 * spacing
    assert abs(plate.volume - math.pi * 0.36 * 0.2) < float(plate.areas.sum()) * spacing / 2


def test_the_share_is_that_of_the_best_cameras_but_some():
    lattice = sample_lattice(scene(lambda p: (p[:, 0] > 0.2) & (p[:, 0] < 0.5)), 32)
    front, back = turntable_cameras(2, elevations=(0.0,), distance=200.0)  # a wall between x = 0.2 and 0.5
    hidden = hidden_share(lattice, torch.stack([front]), num_witnesses=1, resolution=32)
    assert hidden[28:, 16, 16].max() < 0.01
    assert hidden[:16, 16, 16].min() > 0.99
    either = hidden_share(lattice, torch.stack([front, back]), num_witnesses=1, resolution=32)
    assert either[:16, 16, 16].max() < 0.01
    both = hidden_share(lattice, torch.stack([front, back]), num_witnesses=2, resolution=32)
    close(both, torch.maximum(hidden, hidden_share(lattice, back[None], num_witnesses=1, resolution=32)))
    for number in (0, 3):
        with pytest.raises(
            ValueError, match=f"num_witnesses must lie between 1 and the number .*, 2; got {number}"
        ):
            hidden_share(lattice, torch.stack([front, back]), num_witnesses=number)


def test_at_a_level_the_surface_bounds_what_is_denser_or_more_than_half_hidden():
    lattice = Lattice(torch.zeros(5, 5, 5), (-1.0,) * 3, (1.0,) * 3, 0.5)
    values, hidden = lattice.values.clone(), torch.zeros(5, 5, 5)
    values[1, 2, 2], values[2, 2, 2], hidden[3, 2, 2], hidden[4, 2, 2] = 9.0, 11.0, 0.4, 0.6
    space = Space(Lattice(values, lattice.lower, lattice.upper, 0.5), hidden, smooth=0.0)
    assert (space.at(10.0).values > 10.0)[:, 2, 2].tolist() == [False, False, True, False, True]
    assert space.at(3.0).values.max() == 6.0
    assert Space(lattice, hidden, smooth=1.0).at(10.0).values.sum() < space.at(10.0).values.sum()


def test_normals_of_the_field_are_those_of_the_ball_also_where_triangles_are_few():
    found = RadianceField(
        density=lambda p: 100 * torch.sigmoid((0.62 - p.norm(dim=1)) / 0.05), colour=lambda p: (p + 1) / 2,
        render=lambda *_: None,
    )  # fmt: skip
    lattice = sample_lattice(found, 64)
    mesh = simplified(extract_mesh(lattice, found.colours, 50.0), 400, found.colours)
    normals = field_normals(lattice, mesh.vertices)
    radial = torch.nn.functional.normalize(mesh.vertices, dim=1)
    assert (normals * radial).sum(1).min() > 0.999


def test_cameras_look_from_all_sides_and_from_above():
    views = lookouts(2.0)
    assert len(views) == 49
    position = views[:, :, 3]
    close(position.norm(dim=1), torch.full((49,), 200.0))
    assert (position[:, 2] >= -1e-4).all()
    close(position[-1], torch.tensor([0.0, 0.0, 200.0]), atol=1e-4, rtol=0)
