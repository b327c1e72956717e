"""Meshes, points and videos as files: read again by other programs, and byte by byte."""

import json
import struct
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from sds.formats import (
    check_encoder,
    linear,
    write_gif,
    write_glb,
    write_mp4,
    write_obj,
    write_ply,
    write_png,
    y_up,
)
from sds.mesh import Mesh

close = torch.testing.assert_close
LOWER, UPPER = torch.tensor([0.1, -0.2, 0.5]), torch.tensor([0.3, 0.2, 1.4])
"""A box whose sides and place differ on every axis: front +x from 0.1 to 0.3, up +z from 0.5 to 1.4."""


@pytest.fixture
def box():
    vertices = torch.cartesian_prod(*torch.stack([LOWER, UPPER], dim=1))
    faces = [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6), (0, 2, 6),
             (0, 6, 4), (1, 5, 7), (1, 7, 3)]  # fmt: skip
    return Mesh(vertices, torch.tensor(faces), torch.linspace(0, 1, 24).view(8, 3))


def test_up_becomes_y_and_the_front_z_by_a_rotation_and_light_becomes_linear():
    """glTF 2.0, section 3.4: +Y up, the front faces +Z. IEC 61966-2-1: mid grey 188 / 255 is half the light."""
    assert y_up(torch.eye(3)).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    values = torch.tensor([0.0, 0.04045, 0.5, 188 / 255, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0031308, 0.2140411, 0.5028865, 1.0], dtype=torch.float64)
    close(linear(values), expected, atol=1e-6, rtol=0)


def test_a_glb_holds_the_box_upright_with_linear_colours_and_no_metal(box, tmp_path):
    content = write_glb(box, tmp_path / "a.glb").read_bytes()
    length = struct.unpack("<I", content[12:16])[0]
    tree, binary = json.loads(content[20 : 20 + length]), content[20 + length + 8 :]
    (primitive,) = tree["meshes"][0]["primitives"]
    values = {}
    for name, number in primitive["attributes"].items():
        accessor = tree["accessors"][number]
        assert (accessor["componentType"], accessor["type"]) == (5126, "VEC3")
        start = tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0) + accessor.get("byteOffset", 0)
        values[name] = np.frombuffer(binary[start : start + 12 * accessor["count"]], "<f4").reshape(-1, 3)
    assert set(values) == {"POSITION", "NORMAL", "COLOR_0"}
    np.testing.assert_allclose(values["COLOR_0"], linear(box.colours).numpy(), atol=1e-7)
    positions, normals = values["POSITION"], values["NORMAL"]
    np.testing.assert_allclose(positions.min(0), [-0.2, 0.5, 0.1], atol=1e-6)
    np.testing.assert_allclose(positions.max(0), [0.2, 1.4, 0.3], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    assert ((positions - positions.mean(0)) * normals > 0).all()
    material = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert material == {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    indices = tree["bufferViews"][tree["accessors"][primitive["indices"]]["bufferView"]]
    assert indices["target"] == 34963


def test_other_programs_load_what_was_written(box, tmp_path):
    (glb,) = trimesh.load_scene(write_glb(box, tmp_path / "a.glb")).geometry.values()
    obj = trimesh.load_mesh(write_obj(box, tmp_path / "a.obj"), process=False, maintain_order=True)
    for loaded in (glb, obj):
        np.testing.assert_allclose(loaded.extents, [0.4, 0.9, 0.2], atol=1e-6)
        assert loaded.volume == pytest.approx(0.4 * 0.9 * 0.2, rel=1e-5)
    colours = np.asarray(glb.visual.vertex_attributes["color"])[:, :3]
    np.testing.assert_allclose(colours, linear(box.colours).numpy(), atol=1e-6)
    np.testing.assert_allclose(obj.vertices, y_up(box.vertices), atol=1e-6)
    np.testing.assert_allclose(obj.visual.vertex_colors[:, :3] / 255, box.colours, atol=0.51 / 255)
    points = torch.tensor([[0.0, 1.0, 2.0], [-3.0, 0.5, 0.25]])
    colours = torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.4, 0.6]])
    cloud = trimesh.load(write_ply(points, colours, tmp_path / "a.ply"))
    np.testing.assert_allclose(cloud.vertices, points)  # in the world
    np.testing.assert_array_equal(cloud.colors[:, :3], [[255, 128, 0], [51, 102, 153]])


def test_a_failed_write_leaves_the_older_file(box, tmp_path, monkeypatch):
    path = write_glb(box, tmp_path / "a.glb")
    before = path.read_bytes()

    def full(path, content):
        path.open("wb").write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_glb(box, path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.glb"]


@pytest.mark.parametrize(("library", "write"), [
    ("trimesh", write_glb), ("trimesh", write_obj),
    ("trimesh", lambda mesh, path: write_ply(mesh.vertices, mesh.colours, path)),
    ("imageio_ffmpeg", lambda mesh, path: write_mp4(moving(2), path)),
])  # fmt: skip
def test_a_missing_library_is_named_with_the_extra(library, write, box, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    package = library.replace("_", "-")
    with pytest.raises(
        ValueError, match=rf'are not installed: {package}\. Install them: pip install "scorefield\[nerf\]"'
    ):
        write(box, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# Videos. A coloured square moves over grey, so that every frame differs and its place in time can be told.


def moving(num, height=32, width=48):
    frames = torch.full((num, 3, height, width), 0.5)
    for i in range(num):
        frames[i, :, 8:24, 3 * i : 3 * i + 8] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    return frames


@pytest.mark.parametrize(("height", "width"), [(32, 48), (33, 47)])
def test_an_mp4_has_its_frames_in_order_in_their_size_and_colours(tmp_path, height, width):
    frames = moving(12, height, width)
    reader = imageio_ffmpeg.read_frames(write_mp4(frames, tmp_path / "a.mp4", fps=12))
    facts, even = next(reader), (height + height % 2, width + width % 2)
    found = np.stack([np.frombuffer(frame, np.uint8).reshape(*even, 3) for frame in reader])
    assert (len(found), facts["size"], facts["codec"]) == (12, even[::-1], "h264")
    assert (facts["fps"], facts["duration"]) == (pytest.approx(12), pytest.approx(1.0, abs=0.01))
    for i, frame in enumerate(found):
        expected = frames[i].permute(1, 2, 0).numpy() * 255
        inner = np.s_[10:18, 3 * i + 2 : 3 * i + 6]
        assert np.abs(frame[inner] - expected[inner]).mean() < 4
        assert np.abs(frame[:height, :width] - expected).mean() < 4
    if height % 2:
        assert np.abs(found[:, -1].astype(int) - found[:, -2]).mean() < 4


def test_a_gif_has_its_frames_and_repeats_and_a_png_is_the_picture(tmp_path):
    frames = moving(10)
    with Image.open(write_gif(frames, tmp_path / "a.gif", fps=20)) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"], gif.info["duration"]) == (10, (48, 32), 0, 50)
        for i in range(10):
            gif.seek(i)
            found = torch.tensor(np.asarray(gif.convert("RGB"))).permute(2, 0, 1) / 255
            assert (found - frames[i]).abs().max() < 0.02
    frames[0, :, 0, 0] = torch.tensor([1.2, -0.1, 0.5])
    found = np.asarray(Image.open(write_png(frames[0], tmp_path / "a.png")))
    np.testing.assert_array_equal(found, (frames[0].clamp(0, 1) * 255).round().permute(1, 2, 0))


@pytest.mark.parametrize("write", [write_mp4, write_gif])
def test_no_frames_are_no_video(write, tmp_path):
    nothing, single = torch.zeros(0, 3, 8, 8), torch.zeros(3, 8, 8)
    for frames, fps in ((nothing, 24), (single, 24), (moving(2), 0), (moving(2), 1000)):
        with pytest.raises(ValueError, match="a video needs frames"):
            write(frames, tmp_path / "a", fps=fps)
    assert not list(tmp_path.iterdir())


def test_a_video_that_is_not_whole_leaves_nothing(tmp_path, monkeypatch):
    """On a full disk ffmpeg leaves a torso and imageio-ffmpeg ignores its exit code."""

    def torso(path, *_, **__):
        yield
        path.write_bytes(b"torso")
        while True:
            try:
                yield
            except GeneratorExit:
                return

    with monkeypatch.context() as patch:
        patch.setattr(imageio_ffmpeg, "write_frames", torso)
        with pytest.raises(OSError, match="wrote 0 of 5 frames"):
            write_mp4(moving(5), tmp_path / "a.mp4")
    monkeypatch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda path: (4, 0.2))
    with pytest.raises(OSError, match="wrote 4 of 5 frames"):
        write_mp4(moving(5), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_a_broken_encoder_is_named(tmp_path, monkeypatch):
    check_encoder(tmp_path)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    with pytest.raises(ValueError, match=r'no video can be encoded here.*pip install "scorefield\[nerf\]"'):
        check_encoder(tmp_path)
    assert not list(tmp_path.iterdir())
