"""A whole export, and everything that can go wrong with one: nothing may be left half written."""

import errno
import json
import math
import sys
from dataclasses import replace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh
from closed_form_scenes import Ball
from PIL import Image

from scorefield.atomic import MARKER, whole_folder
from sds import export as module
from sds.export import FILES, TEXTURE_FILES, export, warnings_of
from sds.export_options import Export
from sds.level import compare, pictures_of, surface_at
from sds.mesh import recoloured
from sds.solid import field_normals, survey
from sds.turntable import turntable_cameras

SMALL = Export(resolution=24, num_levels=3, num_views=2, view_size=24, num_points=500, num_frames=5, size=26,
               faces=0, texture=0)  # fmt: skip


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != MARKER)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A ball off the centre over blue, exported with a white background."""
    ball = Ball(radius=0.5, centre=(0.0, 0.1, 0.3), background=(0.0, 0.0, 1.0))
    folder = tmp_path_factory.mktemp("run") / "export"
    choices = Export(
        resolution=40,
        num_levels=4,
        num_views=4,
        view_size=48,
        num_points=2000,
        num_frames=10,
        size=50,
        background=(1.0, 1.0, 1.0),
        faces=1500,
        texture=128,
    )
    report = export(ball.scene(), folder, choices, facts={"prompt": "a ball"})
    return folder, report


def test_an_export_has_every_file_and_the_report_that_it_returns(exported):
    folder, report = exported
    assert names(folder) == sorted((*FILES, *TEXTURE_FILES))
    assert names(folder.parent) == ["export"]
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["facts"] == {"prompt": "a ball"}
    compared = report["mesh_versus_render"]
    assert compared["psnr"] > 25
    assert compared["psnr_crop"] > 20
    assert compared["psnr_crop_without_mesh"] < 10
    assert report["level"] in [tried["level"] for tried in report["levels_tried"]]
    assert report["mesh"]["volume"] == pytest.approx(4 / 3 * math.pi * 0.5**3, rel=0.1)
    np.testing.assert_allclose(report["mesh"]["upper"], [0.5, 0.6, 0.8], atol=2 / 40)
    assert 1300 < report["mesh"]["faces"] <= 1500
    facts = {"closed": True, "components": 1, "voids": 0, "genus": 0}
    assert {name: report["mesh"][name] for name in facts} == facts
    assert compared["silhouette_iou"] > 0.95
    assert compared["depth_error"] < 0.03
    assert "texture" in compared["rasteriser"]
    assert report["warnings"] == []


def test_the_files_hold_the_ball_where_it_is_in_its_colours_with_y_up(exported):
    folder, report = exported
    for name in ("scene.glb", "scene.obj"):
        (loaded,) = trimesh.load_scene(folder / name).geometry.values()
        assert loaded.volume == pytest.approx(report["mesh"]["volume"], rel=1e-3)
        np.testing.assert_allclose(loaded.bounds.mean(0), [0.1, 0.3, 0.0], atol=2 / 40)
        # The part that faces +x is red, and in glTF's axes it faces +z.
        front = loaded.visual.to_color().vertex_colors[loaded.vertices[:, 2] > 0.45, :3].mean(0)
        np.testing.assert_allclose(front, [250, 128, 128], atol=10)
        outwards = (loaded.vertices - [0.1, 0.3, 0.0]) / 0.5
        assert (np.asarray(loaded.vertex_normals) * outwards).sum(1).min() > 0.8
    cloud = trimesh.load(folder / "points.ply")
    local = cloud.vertices - np.array([0.0, 0.1, 0.3])
    assert len(local) == 2000
    np.testing.assert_allclose(np.linalg.norm(local, axis=1), 0.5, atol=2 / 40)
    expected = (local / np.linalg.norm(local, axis=1, keepdims=True) + 1) * 127.5
    assert np.abs(cloud.colors[:, :3] - expected).mean() < 6
    with Image.open(folder / "turntable.gif") as gif:
        assert (gif.n_frames, gif.size) == (10, (50, 50))
    sheet = np.asarray(Image.open(folder / "contact.png")).astype(int)
    assert sheet.shape == (4 * 52 + 2, 8 * 52 + 2, 3)
    tiles = sheet[:-2, :-2].reshape(4, 52, 8, 52, 3).transpose(0, 2, 1, 3, 4)[:, :, 2:, 2:]
    assert np.abs(tiles[0] - tiles[1]).mean() < 3  # rendered and mesh
    assert np.abs(tiles[0] - tiles[2]).mean() > 10


@pytest.mark.parametrize("name", ["turntable", "depth", "normals"])
def test_videos_have_the_frames_and_the_background_that_were_asked_for(exported, name):
    folder, _ = exported
    reader = imageio_ffmpeg.read_frames(folder / f"{name}.mp4")
    assert next(reader)["size"] == (50, 50)
    frames = [np.frombuffer(frame, np.uint8).reshape(50, 50, 3) for frame in reader]
    assert len(frames) == 10
    assert all((frame[0, 0] > 245).all() for frame in frames)
    assert all((frame[20, 25] < 250).any() for frame in frames)
    if name == "turntable":
        # In front of the camera the ball shows where it is looked at from: +x red, then +y green.
        middle = np.stack([frames[i][20, 25].astype(int) for i in (0, 5)])
        assert middle[0, 0] > middle[1, 0] + 100


def test_a_level_and_few_frames_can_be_chosen(tmp_path):
    choices = replace(SMALL, level=20.0, num_frames=3)
    report = export(Ball().scene(), tmp_path / "a", choices)
    assert report["level"] == 20.0
    assert report["levels_tried"] == []
    assert Image.open(tmp_path / "a" / "contact.png").size == (3 * 28 + 2, 4 * 28 + 2)


@pytest.mark.parametrize("skin_is_right", [True, False])
def test_of_two_ways_to_colour_the_mesh_the_one_like_the_pictures_is_taken(tmp_path, skin_is_right):
    """Green is wrong, either inside of a fog or on the thin skin of what is opaque."""
    ball, cube = Ball(), 2 / 24

    def colour(points):
        skin = (points.norm(dim=1) > ball.radius - cube)[:, None]
        return torch.where(skin == skin_is_right, ball.colours(points), torch.tensor([0.0, 1.0, 0.0]))

    def density(points):
        deep = 3.0 if skin_is_right else 300.0
        return torch.where(points.norm(dim=1) > ball.radius - cube, 3.0 * (ball.densities(points) > 0), deep)

    scene = ball.scene(colour=colour, density=density)
    report = export(scene, tmp_path / "a", replace(SMALL, level=1.5))
    space = survey(scene, SMALL.resolution)
    plain = surface_at(scene, space, 1.5)
    plain = replace(plain, normals=field_normals(space.at(1.5), plain.vertices))
    cameras = turntable_cameras(SMALL.num_views, elevations=(10.0, 40.0))
    rendered = scene.pictures(cameras, SMALL.view_size)
    own, *seen = (
        compare(pictures_of(mesh, scene, cameras, rendered), rendered, scene.background)["psnr"]
        for mesh in (plain, *(recoloured(plain, scene, reach * space.lattice.spacing) for reach in (1, 2)))
    )
    assert (own > max(seen) + 1) if skin_is_right else (max(seen) > own + 1)
    assert report["mesh_versus_render"]["psnr"] == pytest.approx(max(own, *seen), abs=1e-9)


@pytest.mark.parametrize("texture", [0, pytest.param(64, marks=pytest.mark.slow)])
def test_an_export_is_replaced_by_the_next_and_is_the_same(tmp_path, texture):
    choices, files = replace(SMALL, texture=texture, faces=200), (*FILES, *(TEXTURE_FILES if texture else ()))
    first = export(Ball().scene(), tmp_path / "a", choices)
    before = {name: (tmp_path / "a" / name).read_bytes() for name in files}
    assert export(Ball().scene(), tmp_path / "a", choices) == first
    assert {name: (tmp_path / "a" / name).read_bytes() for name in files} == before
    assert sorted(before) == names(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def foreign(path, monkeypatch):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    return path


def within_a_file(path, monkeypatch):
    """Root may write anywhere but in a file."""
    path.write_text("")
    return path / "a"


def without(library):
    return lambda path, patch: patch.setitem(sys.modules, library, None) or path


def broken_encoder(path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    return path


def full_disk(path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_bytes", half_a_file)
    return path


@pytest.mark.parametrize(("prepare", "error", "message"), [
    *((without(library), ValueError, rf'not installed: {package}\. Install them: pip install "scorefield\[nerf\]"')
      for library, package in {"skimage": "scikit-image", "trimesh": "trimesh",
                               "imageio_ffmpeg": "imageio-ffmpeg"}.items()),
    (without("xatlas"), ValueError, r'not installed: xatlas\. .*"\. Or do without: --texture 0\.'),
    (without("fast_simplification"), ValueError, r"installed: fast-simplification\. .* Or do without: --faces 0"),
    (broken_encoder, ValueError, "no video can be encoded here"),
    (foreign, ValueError, r"holds thesis\.tex, which no run wrote"),
    (within_a_file, OSError, r"Not a directory; .* is as it was before"),
    (full_disk, OSError, "No space left on device; "),
])  # fmt: skip
def test_what_would_fail_in_the_end_is_said_before_any_work(tmp_path, monkeypatch, prepare, error, message):
    ball, folder = Ball(), prepare(tmp_path / "a", monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        export(ball.scene(), folder, replace(SMALL, faces=200, texture=64))
    assert not ball.queries
    assert sorted(tmp_path.rglob("*")) == before


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_a_file(path, content):
    path.open("wb").write(bytes(content)[:20])
    no_space()


def half_a_picture(image, path, **_):
    half_a_file(path, b"half a picture, and then the end")


def half_a_video(path, *_, **__):
    yield
    half_a_file(path, b"half a video, and then the end")


@pytest.mark.parametrize(
    ("target", "failing", "written"),
    [
        ("pathlib.Path.write_bytes", half_a_file, set()),
        ("sds.export.write_ply", no_space, {"scene.glb", "scene.obj"}),
        ("imageio_ffmpeg.write_frames", half_a_video, {"points.ply"}),
        ("PIL.Image.Image.save", half_a_picture, {"turntable.mp4"}),
        ("pathlib.Path.write_text", no_space, {"contact.png"}),
        ("scorefield.atomic._flush_to_disk", no_space, set(FILES)),
    ],
)
def test_a_full_disk_leaves_the_older_export_and_nothing_else(tmp_path, monkeypatch, target, failing, written):
    with whole_folder(tmp_path / "a") as older:
        (older / "report.json").write_text("old")
    seen = set()

    def full(*arguments, **keywords):
        for unfinished in tmp_path.glob(".writing-*-a"):
            seen.update(names(unfinished))
        return failing(*arguments, **keywords)

    monkeypatch.setattr(module, "check_encoder", lambda folder: None)  # it would already notice
    monkeypatch.setattr(target, full)
    with pytest.raises(OSError, match=r"No space left on device; .* is as it was before\. Free space") as caught:
        export(Ball().scene(), tmp_path / "a", SMALL)
    assert caught.value.errno == errno.ENOSPC
    assert written <= seen
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["report.json"]
    assert (tmp_path / "a" / "report.json").read_text() == "old"


def test_the_budget_and_the_texture_are_what_their_packages_are_for(tmp_path, monkeypatch):
    for library in ("xatlas", "fast_simplification"):
        monkeypatch.setitem(sys.modules, library, None)
    report = export(Ball().scene(), tmp_path / "a", replace(SMALL, level=20.0))
    assert report["mesh"]["faces"] > 2000
    assert names(tmp_path / "a") == sorted(FILES)


def test_a_mesh_that_is_not_what_the_renders_show_is_warned_of(tmp_path):
    """Two balls, of which the renders show one; and figures one by one."""
    ball = Ball(radius=0.3)
    other = Ball(radius=0.2, centre=(0.0, 0.7, 0.0))
    scene = ball.scene(density=lambda p: ball.densities(p) + other.densities(p))
    report = export(scene, tmp_path / "a", replace(SMALL, level=20.0))
    said = " ".join(report["warnings"])
    assert "it is in 2 parts" in said
    assert "its silhouettes are not the renders': IoU 0." in said
    fine = {
        "mesh": {"components": 1, "voids": 0, "genus": 1, "closed": True},
        "mesh_versus_render": {"psnr": 25.0, "silhouette_iou": 0.95, "depth_error": 0.1},
    }
    assert warnings_of(fine, 2.0) == []
    for part, name, value, text in (
        ("mesh_versus_render", "psnr", 19.9, "unlike the renders: 19.9 dB"),
        ("mesh_versus_render", "silhouette_iou", 0.89, "IoU 0.89"),
        ("mesh_versus_render", "depth_error", 0.21, "0.21 from where"),
        ("mesh", "components", 3, "in 3 parts"), ("mesh", "voids", 1, "1 inner voids"),
        ("mesh", "genus", 3, "3 handles"), ("mesh", "closed", False, "not closed"),
    ):  # fmt: skip
        (warning,) = warnings_of({**fine, part: {**fine[part], name: value}}, 2.0)
        assert text in warning
    assert warnings_of({**fine, "mesh": {**fine["mesh"], "genus": None}}, 2.0) == []


def nan_at_one_place(points):
    return torch.where((points - 0.25).norm(dim=1) < 0.1, torch.nan, 1.0)


def seen(**changes):
    """A ball of whose pictures something is wrong."""
    ball = Ball()

    def render(cameras, size):
        pictures = ball.render(cameras, size)
        return replace(pictures, **{name: change(getattr(pictures, name)) for name, change in changes.items()})

    return {"render": render}


@pytest.mark.parametrize(("changes", "message"), [
    ({"density": lambda p: 0 * p[:, 0]}, "the scene is empty"),
    ({"density": lambda p: 0 * p[:, 0] + 50}, "the scene is full"),
    ({"density": nan_at_one_place}, r"density is nan or inf in \d+ of \d+ values: the scene has diverged"),
    ({"density": lambda p: p}, r"density of \d+ points must be of shape \(\d+,\); got \(\d+, 3\)"),
    ({"colour": lambda p: p * torch.nan}, "colour is nan or inf"),
    ({"colour": lambda p: p * 0 - 1}, r"colour must lie in \[0, 1\]; got -1 to -1"),
    ({"colour": lambda p: p[:, :1]}, r"colour of \d+ points must be of shape"),
    (seen(rgb=lambda rgb: rgb * torch.nan), "the rendered rgb is nan or inf"),
    (seen(rgb=lambda rgb: rgb * 2), r"the rendered rgb must lie in \[-1, 1\]"),
    (seen(normals=lambda normals: None), r"the rendered normals are missing; .* Render with normals"),
    (seen(opacity=lambda opacity: opacity - 0.1), r"the rendered opacity must lie in \[0, 1\]"),
    (seen(depth=lambda depth: depth[:, 0]), r"depth of 2 pictures must be of shape \(2, 1, 24, 24\)"),
    ({"lower": (1.0, -1.0, -1.0)}, "lower must be below upper"),
    ({"upper": (1.0, 1.0, math.inf)}, "lower must be below upper"),
    ({"field_of_view": 0.0}, "field_of_view must lie in"), ({"distance": -1.0}, "distance must be positive"),
    ({"background": (0.0, 0.0, 255.0)}, r"background must be three numbers in \[0, 1\]"),
])  # fmt: skip
def test_a_scene_that_cannot_be_exported_says_what_to_do_and_leaves_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export(Ball().scene(**changes), tmp_path / "a", SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [("resolution", 1), ("num_levels", 2), ("num_views", 0), ("view_size", 0), ("num_points", 0),
     ("num_frames", 0), ("size", 0), ("level", 0.0), ("level", math.nan), ("min_part", 2.0), ("fps", 0.0),
     ("elevation", 100.0), ("background", (0.0, 0.0, -1.0)), ("smooth", -1.0), ("faces", 99), ("faces", -1),
     ("texture", 15), ("texture", 8193)],
)  # fmt: skip
def test_choices_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Export(**{name: value})


def test_scenes_are_asked_without_gradient_and_in_pieces(monkeypatch):
    calls = []

    def density(points):
        calls.append((len(points), torch.is_grad_enabled()))
        return points[:, 0]

    monkeypatch.setattr("sds.radiance.CHUNK", 100)
    found = Ball().scene(density=density).densities(torch.rand(250, 3))
    assert calls == [(100, False), (100, False), (50, False)]
    assert found.shape == (250,)
