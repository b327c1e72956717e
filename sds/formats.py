"""Meshes and points as files that other programs open.

The world's z is up and its front is +x. In glb and obj, y is up and the front is +z, as glTF 2.0 (section 3.4)
has it; Blender turns that into its own front view. A point cloud keeps the world's coordinates.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorefield.atomic import whole_file
from sds.extra import check_extra
from sds.mesh import Mesh

MATERIAL = {
    "name": "vertex colours",
    "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0},
    "doubleSided": True,
}
"""Without one, viewers take glTF's default: metal, which is black where there is nothing to mirror."""


def y_up(vectors: Tensor) -> Tensor:
    """Coordinates (n, 3) of the world in glTF's axes: up +z becomes +y, front +x becomes +z. A rotation."""
    return vectors[:, [1, 2, 0]]


def linear(colours: Tensor) -> Tensor:
    """Display values in [0, 1] as linear light: the inverse of sRGB's transfer function (IEC 61966-2-1)."""
    return torch.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)


def write_glb(mesh: Mesh, path: Path) -> Path:
    """A binary glTF 2.0 with normals and vertex colours, y up, rough and not metal.

    COLOR_0 is linear light by the standard (section 3.7.2.1), here in float32: in 8 bits, dark colours would band.
    """
    check_extra("trimesh")
    from trimesh.exchange.gltf import export_glb

    found = _trimesh(mesh)
    found.vertex_attributes["_LINEAR"] = linear(mesh.colours).numpy()
    return _write(path, export_glb(found, include_normals=True, tree_postprocessor=_coloured))


def _coloured(tree: dict[str, Any]) -> None:
    # trimesh stores colours in 8 bits, but attributes of any other name as they are.
    primitive = tree["meshes"][0]["primitives"][0]
    primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_LINEAR")
    primitive["material"] = 0
    tree["materials"] = [MATERIAL]
    for accessor in (primitive["indices"], *primitive["attributes"].values()):
        view = tree["bufferViews"][tree["accessors"][accessor]["bufferView"]]
        view["target"] = 34963 if accessor == primitive["indices"] else 34962  # ELEMENT_ARRAY_BUFFER, ARRAY_BUFFER


def write_obj(mesh: Mesh, path: Path) -> Path:
    """A Wavefront obj, y up, with normals; colours follow the coordinates of a vertex, in display values."""
    check_extra("trimesh")
    from trimesh.exchange.obj import export_obj

    found = _trimesh(mesh)
    found.visual.vertex_colors = _bytes(mesh.colours)
    text = export_obj(found, include_normals=True, header="scorefield: y is up")
    return _write(path, text.encode())


def write_ply(points: Tensor, colours: Tensor, path: Path) -> Path:
    """A binary ply of points (n, 3) in the world (z up) with colours (n, 3) in [0, 1], as bytes."""
    check_extra("trimesh")
    from trimesh import PointCloud

    return _write(path, PointCloud(points.numpy(), colors=_bytes(colours)).export(file_type="ply"))


def _trimesh(mesh: Mesh) -> Any:
    from trimesh import Trimesh

    return Trimesh(y_up(mesh.vertices).numpy(), mesh.faces.numpy(), process=False)


def _bytes(colours: Tensor) -> Any:
    return (colours * 255).round().to(torch.uint8).numpy()


def _write(path: Path, content: bytes) -> Path:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
    return path
