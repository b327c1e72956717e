"""Written meshes and points, read again: by trimesh, and byte by byte where a standard says what must be there."""

import json
import struct
import sys

import numpy as np
import pytest
import torch
import trimesh

from sds.formats import linear, write_glb, write_obj, write_ply, y_up
from sds.mesh import Mesh

LOWER, UPPER = torch.tensor([0.1, -0.2, 0.5]), torch.tensor([0.3, 0.2, 1.4])
"""A box whose sides and place differ on every axis: front +x from 0.1 to 0.3, up +z from 0.5 to 1.4."""


@pytest.fixture
def box():
    vertices = torch.cartesian_prod(*torch.stack([LOWER, UPPER], dim=1))
    faces = [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6), (0, 2, 6),
             (0, 6, 4), (1, 5, 7), (1, 7, 3)]  # fmt: skip
    colours = torch.linspace(0, 1, 24).view(8, 3)
    return Mesh(vertices, torch.tensor(faces), colours)


def parse_glb(path):
    content = path.read_bytes()
    length = struct.unpack("<I", content[12:16])[0]
    return json.loads(content[20 : 20 + length]), content[20 + length + 8 :]


def attribute(tree, binary, name):
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"][name]]
    view = tree["bufferViews"][accessor["bufferView"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    columns = {"VEC3": 3, "SCALAR": 1}[accessor["type"]]
    count = accessor["count"] * columns
    return accessor, np.frombuffer(binary[start : start + 4 * count], "<f4").reshape(-1, columns)


def test_up_becomes_y_and_the_front_z_by_a_rotation():
    """The axes of glTF 2.0, section 3.4: +Y up, the front faces +Z."""
    front, left, up = y_up(torch.eye(3))
    assert up.tolist() == [0, 1, 0]
    assert front.tolist() == [0, 0, 1]
    assert float(torch.linalg.det(torch.stack([front, left, up]))) == 1


def test_linear_light_is_the_standard_s_function():
    """IEC 61966-2-1: mid grey 188 / 255 is half the light; the straight piece ends at 0.04045."""
    values = torch.tensor([0.0, 0.04045, 0.5, 188 / 255, 1.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0031308, 0.2140411, 0.5028865, 1.0], dtype=torch.float64)
    torch.testing.assert_close(linear(values), expected, atol=1e-6, rtol=0)


def test_a_glb_holds_the_box_upright_with_linear_colours_and_no_metal(box, tmp_path):
    tree, binary = parse_glb(write_glb(box, tmp_path / "a.glb"))
    (primitive,) = tree["meshes"][0]["primitives"]
    assert set(primitive["attributes"]) == {"POSITION", "NORMAL", "COLOR_0"}
    accessor, colours = attribute(tree, binary, "COLOR_0")
    assert (accessor["componentType"], accessor["type"]) == (5126, "VEC3")
    np.testing.assert_allclose(colours, linear(box.colours).numpy(), atol=1e-7)
    _, positions = attribute(tree, binary, "POSITION")
    np.testing.assert_allclose(positions.min(0), [-0.2, 0.5, 0.1], atol=1e-6)
    np.testing.assert_allclose(positions.max(0), [0.2, 1.4, 0.3], atol=1e-6)
    _, normals = attribute(tree, binary, "NORMAL")
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    assert ((positions - positions.mean(0)) * normals > 0).all()
    material = tree["materials"][primitive["material"]]["pbrMetallicRoughness"]
    assert material == {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    indices = tree["bufferViews"][tree["accessors"][primitive["indices"]]["bufferView"]]
    assert indices["target"] == 34963


def test_a_glb_loads_again(box, tmp_path):
    (loaded,) = trimesh.load_scene(write_glb(box, tmp_path / "a.glb")).geometry.values()
    np.testing.assert_allclose(loaded.extents, [0.4, 0.9, 0.2], atol=1e-6)
    assert loaded.volume == pytest.approx(0.4 * 0.9 * 0.2, rel=1e-5)
    colours = np.asarray(loaded.visual.vertex_attributes["color"])[:, :3]
    np.testing.assert_allclose(colours, linear(box.colours).numpy(), atol=1e-6)


def test_an_obj_loads_again_with_its_colours_as_they_are_shown(box, tmp_path):
    loaded = trimesh.load_mesh(write_obj(box, tmp_path / "a.obj"), process=False, maintain_order=True)
    np.testing.assert_allclose(loaded.vertices, y_up(box.vertices), atol=1e-6)
    assert loaded.volume == pytest.approx(0.4 * 0.9 * 0.2, rel=1e-5)
    np.testing.assert_allclose(loaded.visual.vertex_colors[:, :3] / 255, box.colours, atol=0.51 / 255)


def test_a_ply_loads_again_where_the_points_are_in_the_world(tmp_path):
    points = torch.tensor([[0.0, 1.0, 2.0], [-3.0, 0.5, 0.25]])
    colours = torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.4, 0.6]])
    loaded = trimesh.load(write_ply(points, colours, tmp_path / "a.ply"))
    np.testing.assert_allclose(loaded.vertices, points)
    np.testing.assert_array_equal(loaded.colors[:, :3], [[255, 128, 0], [51, 102, 153]])


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


@pytest.mark.parametrize(
    "write", [write_glb, write_obj, lambda mesh, path: write_ply(mesh.vertices, mesh.colours, path)]
)
def test_a_missing_library_is_named_with_the_extra(write, box, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(ValueError, match=r'this needs trimesh\. Install: pip install "scorefield\[nerf\]"'):
        write(box, tmp_path / "a")
    assert not list(tmp_path.iterdir())
