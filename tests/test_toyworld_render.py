"""The renderer against intersections of rays with sphere, box and cylinder that are written down here in numpy.

Nothing of the renderer is used for the truth but its ``camera_to_world``, which is itself compared with a camera
built from its definition.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from toyworld import render as module
from toyworld.camera import orbit
from toyworld.render import render
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES, Scene
from toyworld.solids import SOLIDS, occupancy
from toyworld.trace import trace

POSES = [(0, 0), (0, 30), (37, 20), (90, 15), (-120, 45), (180, 33), (250, -25), (10, 72), (0, 90), (77, -90)]
POSITION = (0.08, -0.05, 0.1)
TOLERANCE = {torch.float64: 2e-12, torch.float32: 2e-3}
"""Newton's method ends where the distance is below 16 units of rounding: 3.6e-15, 1.9e-6. A ray that meets the
surface at an angle whose sine is s is then off by 1/s times that, a normal by as much over the radius; of all the
rays of these pictures the flattest has s = 0.0096, and rounding in its own quadratic is magnified just as much."""


def scene(shape, azimuth=30.0, elevation=25.0, **changes):
    return Scene(**{
        "shape": shape, "colour": "red", "background": "grey", "azimuth": azimuth, "elevation": elevation,
        "distance": 2.9, "position": POSITION, **changes,
    })  # fmt: skip


def rays(camera_to_world, size, field_of_view=40.0):
    """Origin and unit directions (size, size, 3) of a nerfstudio camera: x right, y up, z backwards."""
    focal = size / 2 / math.tan(math.radians(field_of_view / 2))
    column, row = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    local = np.stack([(column - size / 2) / focal, -(row - size / 2) / focal, -np.ones_like(row)], -1)
    directions = local @ camera_to_world[:, :3].T
    return camera_to_world[:, 3], directions / np.linalg.norm(directions, axis=-1, keepdims=True)


def first(candidates):
    """Depth and normal of the nearest of several (depth, normal, valid); inf where none is valid."""
    depths = np.stack([np.where(valid, depth, np.inf) for depth, _, valid in candidates])
    normals = np.stack([np.broadcast_to(normal, (*depths.shape[1:], 3)) for _, normal, _ in candidates])
    return depths.min(0), np.take_along_axis(normals, depths.argmin(0)[None, ..., None], 0)[0]


def meet_sphere(origin, direction):
    b = direction @ origin
    c = origin @ origin - 0.62**2
    root = np.sqrt(np.maximum(b * b - c, 0))
    depth = -b - root
    return first([(depth, (origin + depth[..., None] * direction) / 0.62, b * b > c)])


def meet_plane(origin, direction, axis, at):
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = (at - origin[axis]) / direction[..., axis]
        return depth, origin + np.nan_to_num(depth, posinf=1e9, neginf=-1e9)[..., None] * direction


def meet_box(origin, direction):
    candidates = []
    for axis, sign in itertools.product(range(3), (-1, 1)):
        depth, point = meet_plane(origin, direction, axis, sign * 0.45)
        inside = (np.abs(np.delete(point, axis, -1)) <= 0.45).all(-1)
        candidates.append((depth, sign * np.eye(3)[axis], inside & (depth > 0)))
    return first(candidates)


def meet_cylinder(origin, direction):
    a = (direction[..., :2] ** 2).sum(-1).clip(1e-300)
    b = direction[..., :2] @ origin[:2]
    c = origin[:2] @ origin[:2] - 0.42**2
    depth = (-b - np.sqrt(np.maximum(b * b - a * c, 0))) / a
    point = origin + depth[..., None] * direction
    outwards = point * [1, 1, 0] / 0.42
    candidates = [(depth, outwards, (b * b > a * c) & (np.abs(point[..., 2]) <= 0.6))]
    for sign in (-1, 1):
        depth, point = meet_plane(origin, direction, 2, sign * 0.6)
        inside = (point[..., :2] ** 2).sum(-1) <= 0.42**2
        candidates.append((depth, sign * np.eye(3)[2], inside & (depth > 0)))
    return first(candidates)


MEET = {"sphere": meet_sphere, "cube": meet_box, "cylinder": meet_cylinder}


def channels_last(images):
    return images.permute(0, 2, 3, 1).double().numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", MEET)
def test_depth_normals_and_mask_equal_analytic_intersections(shape, dtype):
    out = render([scene(shape, *pose) for pose in POSES], dtype=dtype)
    for i in range(len(POSES)):
        origin, direction = rays(out.camera_to_world[i].double().numpy(), 64)
        depth, normal = MEET[shape](origin - np.array(POSITION), direction)
        mask = np.isfinite(depth)
        assert np.array_equal(out.mask[i, 0].numpy(), mask)
        assert 600 < mask.sum() < 1500
        np.testing.assert_allclose(channels_last(out.depth)[i, :, :, 0][mask], depth[mask], atol=TOLERANCE[dtype])
        np.testing.assert_allclose(channels_last(out.normals)[i][mask], normal[mask], atol=TOLERANCE[dtype])
        assert not out.depth[i, 0].numpy()[~mask].any()
        assert not channels_last(out.normals)[i][~mask].any()
    for size, field_of_view in ((33, 40.0), (20, 60.0)):
        out = render([scene(shape)], size=size, field_of_view=field_of_view, dtype=torch.float64)
        origin, direction = rays(out.camera_to_world[0].numpy(), size, field_of_view)
        depth, _ = MEET[shape](origin - np.array(POSITION), direction)
        np.testing.assert_allclose(out.depth[0, 0].numpy(), np.where(np.isfinite(depth), depth, 0), atol=1e-11)
        assert out.focal_length == pytest.approx(size / 2 / math.tan(math.radians(field_of_view / 2)))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_solid_is_first_met_where_its_occupancy_begins_with_a_normal_out_of_it(shape):
    """Steps of 0.002 along 24 x 24 rays for each of four poses, against the solid's own occupancy."""
    poses = [(20, 25), (110, 15), (-160, 45), (60, 80)]
    scenes = [scene(shape, *pose) for pose in poses]
    out = render(scenes, size=24, dtype=torch.float64)
    step = 0.002
    depths = torch.arange(1.8, 4.0, step, dtype=torch.float64)
    for i in range(len(poses)):
        origin, direction = (torch.from_numpy(x) for x in rays(out.camera_to_world[i].numpy(), 24))
        inside = occupancy(shape, origin + depths[:, None, None, None] * direction, POSITION)
        met, first_inside = inside.any(0), depths[inside.to(torch.uint8).argmax(0)]
        # A ray that cuts a corner between two steps is seen by one of both only.
        assert (met != out.mask[i, 0]).sum() <= 1
        late = (first_inside - out.depth[i, 0])[met & out.mask[i, 0]]
        assert late.min() > -1e-12
        assert late.max() <= step + 1e-12
        mask, normal = out.mask[i, 0], out.normals[i].permute(1, 2, 0)
        point = origin + out.depth[i, 0, :, :, None] * direction
        assert torch.allclose(normal[mask].norm(dim=1), torch.ones(int(mask.sum()), dtype=torch.float64))
        assert ((normal * direction).sum(-1)[mask] < 1e-9).all()
        assert not occupancy(shape, (point + 1e-6 * normal)[mask], POSITION).any()
        assert occupancy(shape, (point - 1e-6 * normal)[mask], POSITION).all()


@pytest.mark.parametrize(("azimuth", "elevation"), [*POSES, (725, 10)])
def test_cameras_are_nerfstudio_cameras_on_a_sphere(azimuth, elevation):
    camera = render([scene("sphere", azimuth, elevation)], size=4, dtype=torch.float64).camera_to_world[0].numpy()
    a, e = math.radians(azimuth), math.radians(elevation)
    right, up, back, position = camera.T
    towards = np.array([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
    np.testing.assert_allclose(position, 2.9 * towards, atol=1e-12)
    np.testing.assert_allclose(back, towards, atol=1e-12)
    np.testing.assert_allclose(np.cross(right, up), back, atol=1e-12)
    np.testing.assert_allclose(camera[:, :3].T @ camera[:, :3], np.eye(3), atol=1e-12)
    assert abs(right[2]) < 1e-12
    assert up[2] > -1e-12
    assert (up[2] > 0.1) == (abs(elevation) < 84)


def test_the_front_of_a_solid_is_what_its_docstring_says():
    front = render([scene("letter L", 0.0, 0.0, position=(0, 0, 0))]).mask[0, 0]
    assert front[20, 24]
    assert not front[20, 38]
    assert front[46, 24]
    assert front[46, 38]
    back = render([scene("letter L", 180.0, 0.0, position=(0, 0, 0))]).mask[0, 0]
    assert torch.equal(back, front.flip(1))
    x, y, z = np.eye(3)
    assert occupancy("mug", torch.tensor(0.6 * x)).item()
    assert not occupancy("mug", torch.tensor(np.stack([-0.63 * x, 0.6 * y, -0.6 * y, -0.1 * x + 0.4 * z]))).any()
    assert occupancy("chair", torch.tensor(-0.3 * x + 0.5 * z)).item()
    assert not occupancy("chair", torch.tensor(0.3 * x + 0.5 * z)).item()
    assert occupancy("arrow", torch.tensor(np.stack([0.7 * x, -0.7 * x, 0.1 * x + 0.4 * y]))).all()
    assert not occupancy("arrow", torch.tensor(np.stack([0.7 * x + 0.2 * y, -0.1 * x + 0.4 * y]))).any()


def test_colours_are_shaded_as_stated():
    """colour (0.65 + 0.35 normal . light), the light fixed to the camera, to the right, above and behind it."""
    scenes = [
        scene("cylinder", a, e, colour=c) for (a, e), c in zip(POSES, itertools.cycle(COLOURS), strict=False)
    ]
    out = render(scenes, dtype=torch.float64)
    for i, one in enumerate(scenes):
        right, up, back = orbit(one.azimuth, one.elevation, 1).numpy().T[:3]
        light = np.array([0.48, 0.64, 0.60]) @ np.stack([right, up, back])
        shade = 0.65 + 0.35 * channels_last(out.normals)[i] @ light
        expected = 2 * shade[..., None] * np.array(COLOURS[one.colour]) - 1
        inner = (out.mask & ~out.edges)[i, 0].numpy()
        outer = (~out.mask & ~out.edges)[i, 0].numpy()
        assert min(inner.sum(), outer.sum()) > 400
        np.testing.assert_allclose(channels_last(out.rgb)[i][inner], expected[inner], atol=1e-12)
        assert (channels_last(out.rgb)[i][outer] == 0).all()


def test_a_pixel_of_an_edge_is_the_mean_of_its_quarters(monkeypatch):
    """The rays through the quarters of a pixel are those through the pixels of a picture twice as large."""
    scenes = [scene("mug", 37.0, 20.0), scene("cube", -120.0, 45.0)]
    averaged = render(scenes, dtype=torch.float64)
    monkeypatch.setattr(module, "_antialiased", lambda chunk, rgb, edges: rgb)
    single, twice = (render(scenes, size=size, dtype=torch.float64).rgb for size in (64, 128))
    expected = torch.where(averaged.edges, torch.nn.functional.avg_pool2d(twice, 2), single)
    assert (single - expected).abs().max() > 0.4
    torch.testing.assert_close(averaged.rgb, expected, atol=1e-12, rtol=0)


def test_a_picture_does_not_depend_on_the_others_of_its_batch(monkeypatch):
    scenes = [scene(s, a, e) for (a, e), s in zip(POSES * 2, itertools.cycle(SHAPES), strict=False)]
    together = render(scenes)
    monkeypatch.setattr(module, "CHUNK", 1)
    alone = [render([one]) for one in scenes]
    for name in ("rgb", "depth", "normals", "mask", "edges", "camera_to_world"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(one, name) for one in alone])), name


def test_what_cannot_be_rendered_is_refused():
    for arguments in ({"scenes": []}, {"size": 0}, {"field_of_view": 180.0}, {"field_of_view": 0.0}):
        with pytest.raises(ValueError, match="at least one scene, size >= 1 and a field_of_view"):
            render(**{"scenes": [scene("cube")], **arguments})
    for changes, message in (
        ({"shape": "duck"}, "shape must be one of sphere, .*got 'duck'"),
        ({"colour": "grey"}, "colour must be one of red, .*got 'grey'"),
        ({"background": "red"}, "background must be one of white, .*got 'red'"),
        ({"elevation": 91.0}, "elevation must lie in"),
        ({"distance": 0.9}, "the camera would be in the solid"),
        ({"distance": float("nan")}, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            scene(**{"shape": "cube", **changes})
    assert not set(COLOURS) & set(BACKGROUNDS)
    assert set(SHAPES) == set(SOLIDS)


@pytest.mark.parametrize("gap", [3e-3, 1e-4, 1e-5])
def test_a_ray_that_just_clears_an_edge_meets_what_is_behind(gap):
    """Over the near rim of the mug, whose inner wall has radius 0.36 round x = -0.16, to that wall's far side."""
    direction = torch.tensor([[-2.0], [0.0], [-1.0]], dtype=torch.float64) / 5**0.5
    rim = torch.tensor([[0.2], [0.0], [0.5 + gap]], dtype=torch.float64)
    hits = trace(SOLIDS["mug"], rim - 2 * direction, direction)
    assert hits.hit.all()
    assert hits.depth.item() == pytest.approx(2 + 0.72 * 5**0.5 / 2, abs=1e-12)
    assert hits.normal[:, 0].tolist() == pytest.approx([1, 0, 0], abs=1e-12)
    below = trace(SOLIDS["mug"], rim - 2 * direction - torch.tensor([[0.0], [0.0], [2 * gap]]), direction)
    assert below.normal[:, 0].tolist() == pytest.approx([0, 0, 1], abs=1e-12)
