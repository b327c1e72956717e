"""Face budgets and baked textures: the same object with fewer triangles, and every colour where it was."""

import math
from dataclasses import replace

import pytest
import torch
from closed_form_scenes import Ball

from sds.level import psnr
from sds.mesh import Mesh, Texture, extract_mesh, sample_lattice, vertex_normals
from sds.radiance import RadianceField
from sds.rasterise import rasterise
from sds.simplify import simplified
from sds.texture import baked, covered, spread, unfolded
from sds.topology import Topology, topology
from sds.turntable import turntable_cameras

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def ball():
    """A ball of radius 0.62 in the colour (p + 1) / 2, of 600 triangles, in 10,000 of marching cubes'."""
    scene = RadianceField(
        density=lambda p: 100 * torch.sigmoid((0.62 - p.norm(dim=1)) / 0.05), colour=lambda p: (p + 1) / 2,
        render=lambda *_: None,
    )  # fmt: skip
    fine = extract_mesh(sample_lattice(scene, 64), scene.colours, 50.0)
    return fine, simplified(fine, 600, scene.colours)


def test_a_simplified_ball_is_closed_and_nearly_as_large(ball):
    fine, mesh = ball
    assert len(fine.faces) > 10_000
    assert 550 <= len(mesh.faces) <= 600
    assert topology(mesh) == Topology(closed=True, components=1, voids=0, genus=0)
    assert mesh.volume == pytest.approx(fine.volume, rel=0.02)
    assert (mesh.vertices.norm(dim=1) - 0.62).abs().max() < 0.01
    close(mesh.colours, (mesh.vertices + 1) / 2)
    assert simplified(mesh, 600, lambda p: p) is mesh
    with pytest.raises(ValueError, match="at least 4 triangles; got 3"):
        simplified(fine, 3, lambda p: p)


def test_a_pace_that_leaves_it_open_is_not_taken_unless_all_do(ball, monkeypatch):
    fine, _ = ball
    import fast_simplification

    simplify, paces, broken = fast_simplification.simplify, [], set()

    def leaky(vertices, faces, target_count, agg):
        paces.append(agg)
        vertices, faces = simplify(vertices, faces, target_count=target_count, agg=agg)
        return vertices, faces[1:] if agg in broken else faces

    monkeypatch.setattr(fast_simplification, "simplify", leaky)
    for leaking, asked, closed in (((), [5], True), ((5,), [5, 3], True), ((3, 5), [5, 3], False)):
        paces.clear()
        broken.update(leaking)
        found = simplified(fine, 4000, lambda p: p)
        assert paces == asked
        assert topology(found).closed == closed
    assert len(found.faces) in (3999, 3998)  # the first one


def test_a_cut_mesh_is_the_same_surface_with_each_chart_in_the_picture(ball):
    _, mesh = ball
    flat, places, origin = unfolded(mesh, 256)
    assert len(flat.vertices) > len(mesh.vertices)
    close(flat.vertices, mesh.vertices[origin])
    assert flat.volume == pytest.approx(mesh.volume, rel=1e-6)
    assert 0 <= places.min() <= places.max() <= 1
    texel, face, weights = covered(places, flat.faces, 256)
    assert len(texel.unique()) == len(texel)
    assert face.unique().numel() > 0.98 * len(flat.faces)
    assert 0.4 < len(texel) / 256**2 < 1
    close(weights.sum(1), torch.ones(len(weights), dtype=torch.float64))
    close((weights[..., None] * places.double()[flat.faces[face]]).sum(1) * 256 - 0.5,
          torch.stack([texel % 256, texel // 256], dim=1).double())  # fmt: skip
    again = unfolded(mesh, 256)
    assert torch.equal(places, again[1])
    assert torch.equal(flat.faces, again[0].faces)


def test_a_textured_mesh_shows_colours_that_its_few_vertices_cannot():
    """Stripes narrower than a triangle, from one colour of the sphere to another."""
    mesh = simplified(
        extract_mesh(sample_lattice(Ball().scene(), 48), lambda p: p * 0, 30.0), 300, lambda p: p * 0
    )
    mesh = replace(mesh, normals=torch.nn.functional.normalize(mesh.vertices, dim=1))

    def stripes(points):
        z = points[:, 2] / points.norm(dim=1)
        return torch.stack([(40 * z).sin() / 2 + 0.5, 0 * z + 0.5, (40 * z).cos() / 2 + 0.5], dim=1)

    def skin(points, normals):
        close(normals, torch.nn.functional.normalize(points, dim=1), atol=0.1, rtol=0)
        return stripes(points)

    flat, places, _ = unfolded(mesh, 512)
    cameras = turntable_cameras(4, elevations=(-30.0, 30.0))
    textured = rasterise(baked(flat, places, 512, skin), cameras, 96)
    plain = rasterise(replace(mesh, colours=stripes(mesh.vertices)), cameras, 96)
    # True colours, from the place that each pixel's ray meets.
    corners = rasterise(replace(mesh, colours=(mesh.vertices + 1) / 2), cameras, 96, num_samples=1)
    inside = corners.opacity[:, 0] > 0.5
    points = corners.rgb.permute(0, 2, 3, 1)[inside]
    expected = stripes(points) * 2 - 1
    centre = rasterise(baked(flat, places, 512, skin), cameras, 96, num_samples=1)
    assert psnr(centre.rgb.permute(0, 2, 3, 1)[inside], expected) > 28
    assert psnr(plain.rgb, textured.rgb) < 20
    close(plain.opacity, textured.opacity)


def test_a_texel_is_read_where_it_is():
    """Two triangles over a picture of 2 x 2 texels, seen from straight ahead."""
    picture = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]])
    vertices = torch.tensor([[0.0, -1, 1], [0, 1, 1], [0, 1, -1], [0, -1, -1]])  # from +x, right is +y
    places = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    mesh = Mesh(
        vertices, torch.tensor([(0, 2, 1), (0, 3, 2)]), torch.zeros(4, 3), texture=Texture(places, picture)
    )
    field_of_view = 2 * math.degrees(math.atan(1 / 3))
    seen = rasterise(mesh, turntable_cameras(1, elevations=(0.0,)), 2, field_of_view=field_of_view, num_samples=1)
    close(seen.rgb[0] / 2 + 0.5, picture)


def test_unknown_texels_take_the_colour_of_the_nearest_known_one():
    picture, known = torch.zeros(4, 5, 3), torch.zeros(4, 5, dtype=torch.bool)
    picture[0, 0], picture[3, 4] = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
    known[0, 0] = known[3, 4] = True
    found = spread(picture, known)
    assert found[1, 1].tolist() == found[0, 2].tolist() == [1, 0, 0]
    assert found[3, 2].tolist() == found[2, 3].tolist() == [0, 1, 0]
    assert torch.equal(spread(picture, ~known), torch.where((~known)[..., None], picture, spread(picture, ~known)))
    assert torch.equal(spread(picture, known & False), picture)


def test_a_texture_of_a_few_texels_is_refused(ball):
    flat, places, _ = unfolded(ball[1], 64)
    with pytest.raises(ValueError, match="at least 16 texels; got 8"):
        baked(flat, places, 8, lambda points, normals: points)
    assert flat.normals is None
    towards = []
    baked(flat, places, 64, lambda points, normals: towards.append(normals) or points * 0)
    close(towards[0].norm(dim=1), torch.ones(len(towards[0])))
    assert (vertex_normals(flat) * flat.vertices).sum(1).min() > 0
