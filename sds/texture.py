"""Textures: a mesh is cut open and laid flat by xatlas, and its colours are baked into a picture."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sds.mesh import Mesh, Texture, vertex_normals
from sds.rasterise import pieces

Skin = Callable[[Tensor, Tensor], Tensor]
"""Points (n, 3) on the surface and their unit normals (n, 3) -> colours (n, 3) in [0, 1]."""

ATLAS = 1024
"""Side, in texels, of the atlas that xatlas lays out; its gaps are scaled to the side of the picture."""

GAP = 2
"""Texels of the picture between two charts: what a filter reads beyond an edge is still that chart's colour."""


def baked(flat: Mesh, places: Float[Tensor, "v 2"], size: int, skin: Skin) -> Mesh:
    """Return a mesh that was cut open, with a baked texture of ``size`` x ``size`` texels.

    Texels between the charts have the colour of the nearest texel of a chart, so no filter finds a seam.

    Args:
        flat: From :func:`unfolded`, without a texture.
        places: Of its vertices in the picture.
        size: Side of the picture in texels, at least 16.
        skin: Gives the colours of the surface.

    Raises ``ValueError`` for a smaller size.
    """
    if size < 16:
        raise ValueError(f"a texture needs a side of at least 16 texels; got {size}.")
    texel, face, weights = covered(places, flat.faces, size)
    corners = flat.faces[face]
    normals = vertex_normals(flat) if flat.normals is None else flat.normals
    points, towards = ((weights[..., None] * values[corners]).sum(1) for values in (flat.vertices, normals))
    picture, known = torch.zeros(size * size, 3), torch.zeros(size * size, dtype=torch.bool)
    picture[texel] = skin(points.float(), torch.nn.functional.normalize(towards, dim=1).float())
    known[texel] = True
    picture = spread(picture.view(size, size, 3), known.view(size, size))
    return replace(flat, texture=Texture(places, picture.permute(2, 0, 1).contiguous()))


def unfolded(mesh: Mesh, size: int) -> tuple[Mesh, Float[Tensor, "v 2"], Int[Tensor, " v"]]:
    """Return the mesh with its vertices split at the seams, their places in the picture, and what each one was.

    Args:
        mesh: A mesh without a texture.
        size: Side of the picture in texels, for the gaps between charts.

    Returns:
        The mesh; places (v, 2) in [0, 1], right and down; for each of its vertices that of ``mesh`` (v,).
    """
    import xatlas

    atlas, pack = xatlas.Atlas(), xatlas.PackOptions()
    atlas.add_mesh(mesh.vertices.numpy(), mesh.faces.numpy().astype(np.uint32))
    pack.padding = max(1, round(GAP * ATLAS / size))
    atlas.generate(pack_options=pack)
    origin, faces, places = atlas[0]
    old = torch.from_numpy(origin.astype(np.int64))
    split = Mesh(
        mesh.vertices[old], torch.from_numpy(faces.astype(np.int64)), mesh.colours[old],
        None if mesh.normals is None else mesh.normals[old],
    )  # fmt: skip
    return split, torch.from_numpy(np.ascontiguousarray(places)).float().clamp(0, 1), old


def covered(places: Float[Tensor, "v 2"], faces: Tensor, size: int) -> tuple[Tensor, Tensor, Float[Tensor, "n 3"]]:
    """Return the texels (n,) whose centre lies in a triangle, the triangle of each (n,), and its weights (n, 3).

    Texels are numbered row by row. If several triangles cover one, the first counts.
    """
    corners = places.double()[faces] * size - 0.5
    low, high = corners.amin(1).ceil().clamp(min=0).long(), corners.amax(1).floor().clamp(max=size - 1).long()
    extent = (high - low + 1).clamp(min=0)
    counts = extent.prod(1)
    found = []
    for chunk in pieces(counts):
        face = torch.repeat_interleave(chunk, counts[chunk])
        first = torch.repeat_interleave(counts[chunk].cumsum(0) - counts[chunk], counts[chunk])
        number = torch.arange(len(face)) - first
        column, row = low[face, 0] + number % extent[face, 0], low[face, 1] + number // extent[face, 0]
        weights = _barycentric(corners[face], torch.stack([column, row], dim=1))
        hit = (weights >= -1e-9).all(1)
        found.append(((row * size + column)[hit], face[hit], weights[hit]))
    texel, face, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    lowest = torch.full((size * size,), len(faces)).scatter_reduce(0, texel, face, "amin")
    chosen = lowest[texel] == face
    return texel[chosen], face[chosen], weights[chosen]


def _barycentric(corners: Float[Tensor, "n 3 2"], points: Tensor) -> Float[Tensor, "n 3"]:
    (ax, ay), (bx, by), (cx, cy) = (corner.unbind(1) for corner in (corners - points[:, None]).unbind(1))
    parts = torch.stack([bx * cy - by * cx, cx * ay - cy * ax, ax * by - ay * bx], dim=1)
    total = parts.sum(1, keepdim=True)
    return torch.where(total == 0, -1.0, parts / total)


def spread(picture: Float[Tensor, "h w c"], known: Tensor) -> Float[Tensor, "h w c"]:
    """Return the picture in which each unknown texel has the colour of the nearest known one."""
    from scipy.ndimage import distance_transform_edt

    if not bool(known.any()):
        return picture
    row, column = distance_transform_edt(~known.numpy(), return_distances=False, return_indices=True)
    return picture[torch.from_numpy(row).long(), torch.from_numpy(column).long()]
