"""Parts, voids and handles of meshes whose topology and volume are known."""

import math
from dataclasses import replace

import pytest
import torch

from sds.mesh import Lattice, Mesh, extract_mesh
from sds.topology import Topology, topology


def surface(distance, *, resolution=40):
    """Marching cubes of a signed distance."""
    axis = torch.linspace(-1, 1, resolution + 1)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    lattice = Lattice((0.5 - distance(points) * 8).clamp(0, 1), (-1.0,) * 3, (1.0,) * 3, 2 / resolution)
    return extract_mesh(lattice, lambda p: p * 0, 0.5, min_part=0.0)


def joined(a, b):
    return Mesh(
        torch.cat([a.vertices, b.vertices]),
        torch.cat([a.faces, b.faces + len(a.vertices)]),
        torch.cat([a.colours, b.colours]),
    )


def sphere(radius, centre=(0.0, 0.0, 0.0)):
    return lambda p: (p - torch.tensor(centre)).norm(dim=-1) - radius


def torus(big, small):
    return lambda p: torch.hypot(p[..., :2].norm(dim=-1) - big, p[..., 2]) - small


def shell(outer, inner):
    return lambda p: torch.maximum(sphere(outer)(p), -sphere(inner)(p))


def hollow(outer, inner):
    """A ball with a void, whose surface faces inwards."""
    void = surface(sphere(inner))
    return joined(surface(sphere(outer)), replace(void, faces=void.faces.flip(1)))


def both(a, b):
    return lambda p: torch.minimum(a(p), b(p))


BALL = 4 / 3 * math.pi


@pytest.mark.parametrize(("mesh", "components", "voids", "genus", "volume"), [
    (lambda: surface(sphere(0.7)), 1, 0, 0, BALL * 0.7**3),
    (lambda: surface(torus(0.6, 0.25)), 1, 0, 1, 2 * math.pi**2 * 0.6 * 0.25**2),
    (lambda: hollow(0.8, 0.5), 1, 1, 0, BALL * (0.8**3 - 0.5**3)),
    (lambda: surface(both(sphere(0.3, (-0.5, 0, 0)), sphere(0.4, (0.4, 0, 0)))), 2, 0, 0,
     BALL * (0.3**3 + 0.4**3)),
    (lambda: surface(both(torus(0.7, 0.15), sphere(0.3))), 2, 0, 1,
     2 * math.pi**2 * 0.7 * 0.15**2 + BALL * 0.3**3),
])  # fmt: skip
def test_parts_voids_handles_and_volume_are_those_of_the_solid(mesh, components, voids, genus, volume):
    mesh = mesh()
    assert topology(mesh) == Topology(closed=True, components=components, voids=voids, genus=genus)
    assert mesh.volume == pytest.approx(volume, rel=0.025)


def test_a_void_is_filled_and_a_hole_through_the_solid_is_none():
    filled = surface(shell(0.8, 0.5))
    assert topology(filled) == Topology(closed=True, components=1, voids=0, genus=0)
    assert filled.volume == pytest.approx(BALL * 0.8**3, rel=0.01)


TETRAHEDRON = torch.tensor([(0, 2, 1), (0, 1, 3), (1, 2, 3), (2, 0, 3)])


def tetrahedra(second_faces):
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1]])
    faces = torch.cat([TETRAHEDRON, second_faces])
    return Mesh(corners, faces, torch.zeros(len(corners), 3))


def test_solids_that_touch_at_a_corner_are_two():
    other = torch.tensor([0, 4, 5, 6])[TETRAHEDRON].flip(1)  # mirrored at the corner that they share
    assert topology(tetrahedra(other)) == Topology(closed=True, components=2, voids=0, genus=0)


def test_an_open_mesh_and_one_with_a_third_triangle_at_an_edge_are_not_closed():
    whole = tetrahedra(torch.zeros(0, 3, dtype=torch.long))
    assert topology(whole) == Topology(closed=True, components=1, voids=0, genus=0)
    opened = topology(replace(whole, faces=whole.faces[1:]))
    assert (opened.closed, opened.genus) == (False, None)
    fin = topology(tetrahedra(torch.tensor([(0, 1, 4)])))
    assert (fin.closed, fin.genus) == (False, None)
    nothing = replace(whole, faces=whole.faces[:0])
    assert topology(nothing) == Topology(closed=True, components=0, voids=0, genus=0)
