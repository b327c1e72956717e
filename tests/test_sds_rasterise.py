"""The rasteriser against projections, planes and cubes that are written down here, and against the toy world."""

import pytest
import torch
from closed_form_scenes import rays

import sds.rasterise as module
from sds.mesh import Mesh
from sds.rasterise import rasterise
from toyworld.camera import focal_length, orbit
from toyworld.render import render
from toyworld.scene import Scene

close = torch.testing.assert_close
SIZE = 48
FRONT = orbit(0, 0, 3.0)[None]
POSES = [(0, 0), (37, 20), (-120, 45), (10, -72), (0, 90)]


def mesh_of(vertices, faces, colours=None):
    vertices = torch.as_tensor(vertices, dtype=torch.float32)
    colours = torch.full_like(vertices, 0.5) if colours is None else torch.as_tensor(colours, dtype=torch.float32)
    return Mesh(vertices, torch.tensor(faces), colours)


def plane_points(camera, normal, offset, size=SIZE):
    """Distances (b, h, w) along the rays, and points (b, h, w, 3), where they meet normal . x = offset."""
    origin, direction = rays(camera, size)
    normal = torch.tensor(normal, dtype=torch.float64)
    depth = (offset - origin @ normal) / (direction @ normal)
    return depth, origin + depth[..., None] * direction


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("turned", [False, True])
def test_a_triangle_covers_the_pixels_whose_centres_lie_in_its_projection(seed, turned):
    corners = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8
    camera = orbit(*POSES[seed], 3.0)[None]
    local = (corners.double() - camera[0, :, 3]) @ camera[0, :, :3]
    focal = focal_length(SIZE)
    x, y = SIZE / 2 - focal * local[:, 0] / local[:, 2], SIZE / 2 + focal * local[:, 1] / local[:, 2]
    row, column = torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij")
    sides = torch.stack([
        (x[j] - x[i]) * (row - y[i]) - (y[j] - y[i]) * (column - x[i]) for i, j in ((0, 1), (1, 2), (2, 0))
    ])  # fmt: skip
    expected = (sides > 0).all(0) | (sides < 0).all(0)
    seen = rasterise(mesh_of(corners, [[0, 2, 1] if turned else [0, 1, 2]]), camera, SIZE, num_samples=1)
    assert expected.sum() > 20
    assert torch.equal(seen.opacity[0, 0] > 0.5, expected)


def test_depth_is_along_the_ray_and_colours_are_in_perspective():
    """A slanted rectangle whose colour is a linear function of place, which is not linear in the picture."""
    normal, offset = (0.6, 0.0, 0.8), 0.1
    along, across = torch.tensor([0.8, 0.0, -0.6]), torch.tensor([0.0, 1.0, 0.0])
    middle = offset * torch.tensor(normal)
    corners = torch.stack([middle + a * along + b * across for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
    mesh, camera = mesh_of(corners, [[0, 1, 2], [0, 2, 3]], corners / 4 + 0.5), orbit(20, 15, 2.5)[None]
    seen = rasterise(mesh, camera, SIZE, num_samples=1, background=(0, 0, 0))
    depth, points = plane_points(camera, normal, offset)
    inside = ((points @ along.double()).abs() < 1) & ((points @ across.double()).abs() < 1)
    assert torch.equal(seen.opacity[:, 0] > 0.5, inside)
    assert inside.sum() > 200
    close(seen.depth[:, 0][inside], depth[inside].float(), atol=1e-5, rtol=0)
    rgb = seen.rgb.permute(0, 2, 3, 1)
    close(rgb[inside], (points[inside] / 2).float(), atol=1e-5, rtol=0)
    expected = torch.tensor(normal).expand(int(inside.sum()), 3)
    close(seen.normals.permute(0, 2, 3, 1)[inside], expected, atol=1e-5, rtol=0)
    assert (rgb[~inside] == -1).all()


@pytest.mark.parametrize("blue_first", [False, True])
@pytest.mark.parametrize("crossing", [False, True])
def test_the_nearer_of_two_is_seen_and_two_that_cross_meet_in_their_line(blue_first, crossing):
    """A red wall at x = 0, and a blue one at x = 0.3 or at x = y, seen from +x with +y to the right."""
    wall = torch.tensor([(0.0, -1.0, -1.0), (0.0, 1.0, -1.0), (0.0, 1.0, 1.0), (0.0, -1.0, 1.0)])
    other = wall.clone()
    other[:, 0] = wall[:, 1] if crossing else 0.3
    red, blue = [[0, 1, 2], [0, 2, 3]], [[4, 5, 6], [4, 6, 7]]
    colours = [[1.0, 0, 0]] * 4 + [[0, 0, 1.0]] * 4
    mesh = mesh_of(torch.cat([wall, other]), blue + red if blue_first else red + blue, colours)
    seen = rasterise(mesh, FRONT, SIZE, num_samples=1)
    covered = seen.opacity[0, 0] > 0.5
    right = (torch.arange(SIZE) >= SIZE // 2).expand(SIZE, SIZE)
    expected = covered & right if crossing else covered
    assert covered.sum() > 400
    assert torch.equal((seen.rgb[0, 2] == 1) & covered, expected)
    assert torch.equal((seen.rgb[0, 0] == 1) & covered, covered & ~expected)


def test_of_two_in_the_same_place_the_first_is_seen_and_what_is_behind_the_camera_is_not():
    corners = [(0, -1, -1), (0, 1, -1), (0, 0, 1)]
    mesh = mesh_of(corners * 2, [[3, 4, 5], [0, 1, 2]], [[1.0, 0, 0]] * 3 + [[0, 1.0, 0]] * 3)
    seen = rasterise(mesh, FRONT, SIZE, num_samples=1)
    inside = seen.opacity[0, 0] > 0.5
    assert inside.sum() > 100
    assert (seen.rgb[0, 1][inside] == 1).all()
    assert not rasterise(mesh_of([(5, -1, -1), (5, 1, -1), (5, 0, 1)], [[0, 1, 2]]), FRONT, SIZE).opacity.any()


def test_a_floor_that_goes_on_behind_the_camera_is_seen_to_the_horizon():
    big = 1e4
    floor = mesh_of([(-big, -big, -1), (big, -big, -1), (0, big, -1)], [[0, 1, 2]])
    seen = rasterise(floor, FRONT, SIZE, num_samples=1)
    depth, _ = plane_points(FRONT, (0.0, 0.0, 1.0), -1.0)
    inside = depth > 0
    assert torch.equal(seen.opacity[:, 0] > 0.5, inside)
    assert inside.sum() == SIZE * SIZE // 2
    close(seen.depth[:, 0][inside], depth[inside].float(), rtol=1e-5, atol=0)


def test_no_ray_slips_between_triangles_whose_edges_lie_on_pixel_centres():
    """Corners on the centres of pixels: every edge, diagonals too, runs through centres."""
    focal, step = focal_length(SIZE), torch.arange(-12, 13, 3)
    y, z = (part.flatten() for part in torch.meshgrid(step + 0.5, step + 0.5, indexing="ij"))
    vertices = torch.stack([torch.zeros_like(y), y * 3 / focal, z * 3 / focal], dim=1)
    n = len(step)
    quads = [(i * n + j, i * n + j + 1, (i + 1) * n + j + 1, (i + 1) * n + j)
             for i in range(n - 1) for j in range(n - 1)]  # fmt: skip
    faces = [face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))]
    seen = rasterise(mesh_of(vertices, faces), FRONT, SIZE, num_samples=1)
    middle = slice(SIZE // 2 - 11, SIZE // 2 + 11)
    assert (seen.opacity[0, 0, middle, middle] == 1).all()


def cube(half=0.45):
    vertices = torch.cartesian_prod(*[torch.tensor([-half, half])] * 3)
    faces = [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6), (0, 2, 6),
             (0, 6, 4), (1, 5, 7), (1, 7, 3)]  # fmt: skip
    return mesh_of(vertices, [list(face) for face in faces])


@pytest.mark.parametrize("pose", POSES)
def test_a_cube_has_the_mask_depth_and_normals_of_the_toy_world(pose):
    scene = Scene(shape="cube", colour="red", background="white", azimuth=pose[0], elevation=pose[1], distance=2.9)
    truth = render([scene], size=64, dtype=torch.float64)
    assert cube().volume == pytest.approx(0.9**3)
    seen = rasterise(cube(), truth.camera_to_world, 64, num_samples=1)
    assert torch.equal(seen.opacity > 0.5, truth.mask)
    assert truth.mask.sum() > 1000
    close(seen.depth, truth.depth.float(), atol=1e-5, rtol=0)
    inner = (truth.mask & ~truth.edges).expand(-1, 3, -1, -1)
    close(seen.normals[inner], truth.normals[inner].float(), atol=1e-5, rtol=0)


def test_more_rays_a_pixel_are_the_means_of_a_finer_picture_whatever_the_pieces(monkeypatch):
    cameras = torch.stack([orbit(*pose, 2.5) for pose in POSES[:2]])
    coarse = rasterise(cube(), cameras, 20, num_samples=3, background=(0.2, 0.4, 1.0))
    fine = rasterise(cube(), cameras, 60, num_samples=1, background=(0.2, 0.4, 1.0))

    def blocks(x):
        return x.view(*x.shape[:2], 20, 3, 20, 3).sum((3, 5))

    close(coarse.opacity, blocks(fine.opacity) / 9, atol=1e-6, rtol=0)
    close(coarse.rgb, blocks(fine.rgb) / 9, atol=1e-6, rtol=0)
    partial = (coarse.opacity > 0) & (coarse.opacity < 1)
    assert partial.sum() > 20
    close(coarse.depth[partial], (blocks(fine.depth) / blocks(fine.opacity))[partial], atol=1e-5, rtol=0)
    monkeypatch.setattr(module, "PAIRS", 100)
    for number in range(2):
        alone = rasterise(cube(), cameras[number : number + 1], 60, num_samples=1, background=(0.2, 0.4, 1.0))
        for name in ("rgb", "depth", "normals", "opacity"):
            assert torch.equal(getattr(alone, name)[0], getattr(fine, name)[number])


@pytest.mark.parametrize(
    "bad",
    [{"size": 0}, {"num_samples": 0}, {"field_of_view": 180.0}, {"background": (2, 0, 0)}, {"background": (0, 0)}],
)
def test_what_no_picture_has_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        rasterise(cube(), FRONT, **{"size": 8, **bad})
