"""Voxels of an exported mesh, so that its volume can be compared with that of a solid."""

from pathlib import Path

import numpy as np
import torch

from sds.mesh import Mesh

NUDGE = np.array([1.3e-5, 2.9e-5])
"""Shift of the columns along x and y, in world units: no ray meets an edge of a mesh from a regular lattice."""


def load_mesh(path: Path) -> Mesh:
    """Return the mesh of a glb in world coordinates: z up, front +x. Its colours are left out."""
    import trimesh

    (found,) = trimesh.load_scene(path, process=False).geometry.values()
    vertices = torch.from_numpy(np.asarray(found.vertices)).float()[:, [2, 0, 1]]
    return Mesh(vertices, torch.from_numpy(np.asarray(found.faces)).long(), torch.zeros_like(vertices))


def inside(mesh: Mesh, resolution: int = 64) -> np.ndarray:
    """Return which voxels (r, r, r) of the cube [-1, 1]^3 have their centre in a closed mesh; axes x, y, z.

    A vertical ray through each column of voxels crosses the surface; a centre is inside if the crossings above it
    that lead out are more than those that lead in.
    """
    side = 2 / resolution
    first = -1 + side / 2 + NUDGE
    corners = mesh.vertices.double().numpy()[mesh.faces.numpy()]
    flat = corners[:, :, :2]
    low = np.ceil((flat.min(1) - first) / side).clip(0).astype(int)
    high = np.floor((flat.max(1) - first) / side).clip(max=resolution - 1).astype(int)
    extent = (high - low + 1).clip(0)
    counts = extent.prod(1)
    face = np.repeat(np.arange(len(corners)), counts)
    number = np.arange(len(face)) - np.repeat(counts.cumsum() - counts, counts)
    column = low[face] + np.stack([number % extent[face, 0], number // extent[face, 0]], axis=1)
    shifted = flat[face] - (first + side * column)[:, None]
    following, last = np.roll(shifted, -1, axis=1), np.roll(shifted, -2, axis=1)
    weights = following[..., 0] * last[..., 1] - following[..., 1] * last[..., 0]
    area = weights.sum(1)
    hit = ((weights >= 0).all(1) | (weights <= 0).all(1)) & (area != 0)
    weights, area, column = weights[hit], area[hit], column[hit]
    height = (weights * corners[face[hit], :, 2]).sum(1) / area
    above = np.ceil((height + 1) / side - 0.5).clip(0, resolution).astype(int)  # centres below the crossing
    crossings = np.zeros((resolution, resolution, resolution + 1))
    np.add.at(crossings, (column[:, 0], column[:, 1], above), np.sign(area))
    return crossings[:, :, ::-1].cumsum(2)[:, :, ::-1][:, :, 1:] > 0.5
