"""Meshes, points and videos as files: read again by other programs, and byte by byte."""

import io
import json
import struct
import subprocess
import sys
from dataclasses import replace

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
from sds.mesh import Mesh, Texture

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


def glb(content):
    """Tree and binary part of a glb, whose headers say what is there (glTF 2.0, section 4.4)."""
    magic, version, total, length, kind = struct.unpack("<4sIII4s", content[:20])
    assert (magic, version, total, kind) == (b"glTF", 2, len(content), b"JSON")
    size, kind = struct.unpack("<I4s", content[20 + length : 28 + length])
    assert (length % 4, size % 4, kind, 28 + length + size) == (0, 0, b"BIN\0", total)
    return json.loads(content[20 : 20 + length]), content[28 + length :]


WIDTHS = {5126: 4, 5125: 4, 5123: 2, 5121: 1}
NUMBERS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}
KINDS = {5126: "<f4", 5125: "<u4", 5123: "<u2", 5121: "u1"}


def accessed(tree, binary, number):
    """Values of an accessor; it lies within its view, aligned, and its bounds are those of its values."""
    accessor = tree["accessors"][number]
    view = tree["bufferViews"][accessor["bufferView"]]
    width, columns = WIDTHS[accessor["componentType"]], NUMBERS[accessor["type"]]
    start, size = accessor.get("byteOffset", 0), width * columns * accessor["count"]
    assert start + size <= view["byteLength"]
    start += view.get("byteOffset", 0)
    assert start % width == 0
    assert view.get("byteOffset", 0) + view["byteLength"] <= tree["buffers"][0]["byteLength"] == len(binary)
    values = np.frombuffer(binary[start : start + size], KINDS[accessor["componentType"]]).reshape(-1, columns)
    for bound, found in (("min", values.min(0)), ("max", values.max(0))):
        if bound in accessor:
            np.testing.assert_allclose(accessor[bound], found, rtol=1e-6)
    return values, accessor


@pytest.fixture
def textured(box):
    """The box with a picture of 16 x 16 texels, red to the right and green downwards, and normals of its own."""
    ramp = torch.linspace(0, 1, 16)
    picture = torch.stack([ramp.expand(16, 16), ramp[:, None].expand(16, 16), torch.full((16, 16), 0.25)])
    places = torch.linspace(0, 1, 16).view(8, 2)
    normals = torch.nn.functional.normalize(box.vertices - box.vertices.mean(0), dim=1)
    return replace(box, normals=normals, texture=Texture(places, picture))


def test_a_textured_glb_is_valid_and_holds_the_picture_in_its_place(textured, tmp_path):
    tree, binary = glb(write_glb(textured, tmp_path / "a.glb").read_bytes())
    assert tree["asset"]["version"] == "2.0"
    (primitive,) = tree["meshes"][0]["primitives"]
    assert primitive["attributes"].keys() == {"POSITION", "NORMAL", "TEXCOORD_0"}
    values = {}
    for name, number in primitive["attributes"].items():
        values[name], accessor = accessed(tree, binary, number)
        assert tree["bufferViews"][accessor["bufferView"]]["target"] == 34962
        assert accessor["componentType"] == 5126
        assert (name == "POSITION") <= ("min" in accessor and "max" in accessor)
    indices, accessor = accessed(tree, binary, primitive["indices"])
    assert tree["bufferViews"][accessor["bufferView"]]["target"] == 34963
    np.testing.assert_array_equal(indices.reshape(-1, 3), textured.faces)
    np.testing.assert_allclose(values["POSITION"], y_up(textured.vertices), atol=1e-6)
    np.testing.assert_allclose(values["NORMAL"], y_up(textured.normals), atol=1e-6)
    np.testing.assert_allclose(values["TEXCOORD_0"], textured.texture.places, atol=1e-6)  # v grows downwards
    material = tree["materials"][primitive["material"]]
    assert material["pbrMetallicRoughness"] == {
        "metallicFactor": 0.0, "roughnessFactor": 1.0, "baseColorTexture": {"index": 0}
    }  # fmt: skip
    (texture,), (sampler,), (image,) = tree["textures"], tree["samplers"], tree["images"]
    assert (texture["source"], texture["sampler"], image["mimeType"]) == (0, 0, "image/png")
    assert sampler == {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}
    view = tree["bufferViews"][image["bufferView"]]
    assert "target" not in view
    start = view.get("byteOffset", 0)
    picture = np.asarray(Image.open(io.BytesIO(binary[start : start + view["byteLength"]])).convert("RGB"))
    np.testing.assert_array_equal(picture, (textured.texture.picture * 255).round().permute(1, 2, 0))


def test_other_programs_find_the_colours_of_a_textured_box(textured, tmp_path):
    (one,) = trimesh.load_scene(write_glb(textured, tmp_path / "a.glb")).geometry.values()
    other = trimesh.load_mesh(write_obj(textured, tmp_path / "a.obj"), process=False, maintain_order=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.glb", "a.mtl", "a.obj", "a.png"]
    right, down = textured.texture.places.unbind(1)
    expected = torch.stack([right, down, 0 * right + 0.25], dim=1) * 255
    for loaded in (one, other):
        order = [
            int(np.abs(np.asarray(loaded.vertices) - vertex).sum(1).argmin())
            for vertex in y_up(textured.vertices).numpy()
        ]
        colours = np.asarray(loaded.visual.to_color().vertex_colors)[order, :3]
        np.testing.assert_allclose(colours, expected, atol=10)  # trimesh takes the nearest texel
    mtl = (tmp_path / "a.mtl").read_text()
    assert "map_Kd a.png" in mtl
    assert "newmtl a\n" in mtl
    assert "\nusemtl a\n" in (tmp_path / "a.obj").read_text()
    assert "\nmtllib a.mtl\n" in (tmp_path / "a.obj").read_text()


@pytest.mark.slow
def test_pygltflib_reads_what_was_written(textured, tmp_path):
    pygltflib = pytest.importorskip("pygltflib", reason="pip install pygltflib, to read glb by another library")
    found = pygltflib.GLTF2().load(str(write_glb(textured, tmp_path / "a.glb")))
    assert found.materials[0].pbrMetallicRoughness.baseColorTexture.index == 0
    assert found.accessors[found.meshes[0].primitives[0].attributes.POSITION].count == 8


BLENDER = """
import bpy, sys
bpy.ops.wm.read_factory_settings(use_empty=True)
load = bpy.ops.import_scene.gltf if sys.argv[-2].endswith("glb") else bpy.ops.wm.obj_import
load(filepath=sys.argv[-2])
(mesh,) = [thing for thing in bpy.data.objects if thing.type == "MESH"]
sun = bpy.data.objects.new("sun", bpy.data.lights.new("sun", "SUN"))
camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
camera.location, camera.rotation_euler = (0.0, -4.0, 0.95), (1.5707963, 0.0, 0.0)  # from the front, -y
sun.rotation_euler = camera.rotation_euler
for thing in (sun, camera):
    bpy.context.scene.collection.objects.link(thing)
scene = bpy.context.scene
scene.camera, scene.render.engine, scene.cycles.samples = camera, "CYCLES", 4
scene.cycles.device, scene.render.film_transparent = "CPU", True
scene.render.resolution_x = scene.render.resolution_y = 64
scene.view_settings.view_transform, scene.render.filepath = "Standard", sys.argv[-1]
bpy.ops.render.render(write_still=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glb", "obj"])
def test_blender_shows_it_coloured_upright_and_from_its_front(box, tmp_path, kind):
    """The box is red in front (+x here, -y there) and narrow: its height stands upright in the picture."""
    pytest.importorskip("bpy", reason="pip install bpy, Blender as a module, to test what it imports")
    red = torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(3, 16, 16).clone()
    red[2, :, 8:] = 0.9  # magenta where the vertices of the back are
    front = (box.vertices[:, 0] > 0.2).float()
    places = torch.stack([0.75 - 0.5 * front, torch.full((8,), 0.5)], dim=1)
    mesh = replace(box, texture=Texture(places, red))
    path = (write_glb if kind == "glb" else write_obj)(mesh, tmp_path / f"a.{kind}")
    script = tmp_path / "render.py"
    script.write_text(BLENDER)
    subprocess.run([sys.executable, str(script), str(path), str(tmp_path / "a.png")], check=True, timeout=300)
    seen = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    rows, columns = np.nonzero(seen[..., 3] > 128)
    assert np.ptp(rows) > 1.5 * np.ptp(columns)  # 0.9 high, 0.4 wide
    colour = seen[rows, columns, :3].mean(0)
    assert colour[0] > 2 * colour[1]
    assert colour[0] > 2 * colour[2]


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
