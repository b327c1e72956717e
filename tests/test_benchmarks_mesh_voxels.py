"""Voxels of meshes whose solids are known, also of one that was written and read again."""

import numpy as np
import pytest
import torch
import yardsticks
from mesh_voxels import inside, load_mesh

from sds.formats import write_glb
from sds.mesh import extract_mesh, sample_lattice
from sds.radiance import RadianceField
from toyworld.solids import occupancy, signed_distance


@pytest.mark.parametrize("shape", ["mug", "torus", "letter L"])
def test_voxels_are_those_of_the_solid_and_the_file_keeps_its_place(shape, tmp_path):
    scene = RadianceField(
        density=lambda p: 200 * torch.sigmoid(-signed_distance(shape, p) / 0.02), colour=lambda p: p * 0 + 0.5,
        render=lambda *_: None,
    )  # fmt: skip
    mesh = extract_mesh(sample_lattice(scene, 64), scene.colours, 100.0)
    found, true = inside(mesh), occupancy(shape, yardsticks.voxels()).numpy()
    # Faces of the solid run along borders of voxels, so half a voxel is what either may be off by.
    assert yardsticks.iou(found, true) > 0.9
    assert abs(found.mean() * 8 - mesh.volume) < float(mesh.areas.sum()) * (2 / 64) / 2
    read = load_mesh(write_glb(mesh, tmp_path / "a.glb"))
    np.testing.assert_allclose(read.vertices, mesh.vertices, atol=1e-6)
    assert (inside(read) == found).mean() > 0.9999
