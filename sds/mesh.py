"""Meshes and point clouds of a density, by marching cubes on a lattice: closed, with a colour at every vertex.

Parts that float apart from the object are dropped, and voids that it encloses are filled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from sds.radiance import CHUNK, Corner, RadianceField

Query = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Texture:
    """A picture of a mesh's colours, and where in it each vertex is.

    Attributes:
        places: (v, 2) in [0, 1]: how far right and how far down in the picture.
        picture: (3, h, w) in [0, 1], in display values, rows from the top.
    """

    places: Float[Tensor, "v 2"]
    picture: Float[Tensor, "3 h w"]


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles with coloured corners, in world coordinates (z up).

    Attributes:
        vertices: (v, 3). Where a texture has a seam, two of them share a place.
        faces: (f, 3) indices of vertices, counter-clockwise seen from outside.
        colours: (v, 3) in [0, 1], in display values.
        normals: (v, 3) unit vectors, outwards; None: those of the triangles, averaged.
        texture: Colours between the vertices; None: those of the vertices, interpolated.
    """

    vertices: Float[Tensor, "v 3"]
    faces: Int[Tensor, "f 3"]
    colours: Float[Tensor, "v 3"]
    normals: Float[Tensor, "v 3"] | None = None
    texture: Texture | None = None

    @property
    def volume(self) -> float:
        """Enclosed volume in cubic world units; negative if the triangles face inwards."""
        a, b, c = self.vertices.double()[self.faces].unbind(1)
        return float((a * torch.linalg.cross(b, c)).sum() / 6)

    @property
    def areas(self) -> Float[Tensor, " f"]:
        """Areas of the triangles in float64."""
        a, b, c = self.vertices.double()[self.faces].unbind(1)
        return torch.linalg.cross(b - a, c - a).norm(dim=1) / 2


@dataclass(frozen=True, eq=False)
class Lattice:
    """Samples of a density at the points ``lower + spacing * (i, j, k)``.

    Attributes:
        values: (i, j, k) densities.
        lower: Corner of the box with the smallest coordinates.
        upper: Opposite corner, at most one spacing before the last points.
        spacing: Distance between neighbouring points, in world units.
    """

    values: Float[Tensor, "i j k"]
    lower: Corner
    upper: Corner
    spacing: float

    @property
    def border(self) -> Tensor:
        """Values on the six faces of the box, one face after the other."""
        return torch.cat([self.values.select(axis, end).flatten() for axis in range(3) for end in (0, -1)])


def sample_lattice(scene: RadianceField, resolution: int = 128) -> Lattice:
    """Return the density in the scene's box, with ``resolution`` cubes along its longest side.

    Raises ``ValueError`` for a resolution below 2, and for a density that is not finite.
    """
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 cubes; got {resolution}.")
    extents = [high - low for low, high in zip(scene.lower, scene.upper, strict=True)]
    spacing = max(extents) / resolution
    axes = [
        low + spacing * torch.arange(math.ceil(extent / spacing - 1e-6) + 1)
        for low, extent in zip(scene.lower, extents, strict=True)
    ]
    x, y, z = axes
    layers = x.split(max(CHUNK // (len(y) * len(z)), 1))  # the points of all of them may not fit in memory
    values = torch.cat([scene.densities(torch.cartesian_prod(layer, y, z)) for layer in layers])
    return Lattice(values.view(len(x), len(y), len(z)), scene.lower, scene.upper, spacing)


def extract_mesh(lattice: Lattice, colours: Query, level: float, *, min_part: float = 0.01) -> Mesh | None:
    """Return the surface on which the density equals ``level``, or None if the density is nowhere above it.

    The object ends at the box: where it is cut by a face, the mesh is closed there.

    Args:
        lattice: Samples of the density.
        colours: Vertices (v, 3) -> colours (v, 3), such as ``RadianceField.colours``.
        level: Density of the surface, positive.
        min_part: Parts below this share of the largest part's volume are floaters and are dropped. 0 keeps every
            part, 1 keeps the largest alone. A part is a connected set of points above the level; corners connect.

    Raises ``ValueError`` unless ``level`` is positive and ``min_part`` in [0, 1].
    """
    from skimage.measure import marching_cubes

    if not 0 < level < math.inf or not 0 <= min_part <= 1:
        raise ValueError(f"level must be positive and min_part lie in [0, 1]; got {level} and {min_part}.")
    values = _without_voids(_without_floaters(lattice.values.numpy(), level, min_part), level)
    if not (values > level).any():
        return None
    # Zeros around the box close the surface. "ascent" makes triangles face outwards where the inside is denser.
    found, faces, _, _ = marching_cubes(
        np.pad(values, 1), level, spacing=(lattice.spacing,) * 3, gradient_direction="ascent",
        allow_degenerate=False,
    )  # fmt: skip
    low, high = torch.tensor(lattice.lower), torch.tensor(lattice.upper)
    vertices = torch.from_numpy(np.ascontiguousarray(found)) - lattice.spacing + low
    vertices = vertices.float().minimum(high).maximum(low)
    return Mesh(vertices, torch.from_numpy(faces.astype(np.int64)), colours(vertices))


def _without_floaters(values: np.ndarray, level: float, min_part: float) -> np.ndarray:
    from skimage.measure import label

    parts = label(values > level, connectivity=3)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    # Only values above the level are removed: those below it shape the surface of the parts that stay.
    return np.where((parts > 0) & (sizes < min_part * sizes.max())[parts], 0, values)


def _without_voids(values: np.ndarray, level: float) -> np.ndarray:
    from skimage.measure import label

    # Space that touches the border, also by way of the zeros around the box, is outside.
    outside = np.pad(values <= level, 1, constant_values=True)
    parts = label(outside, connectivity=1)
    enclosed = (outside & (parts != parts[0, 0, 0]))[1:-1, 1:-1, 1:-1]
    return np.where(enclosed, 2 * level, values)


def recoloured(mesh: Mesh, scene: RadianceField, reach: float, num_samples: int = 8) -> Mesh:
    """Return the mesh with the colours of :func:`seen_colours` at its vertices. Arguments are those."""
    normals = vertex_normals(mesh) if mesh.normals is None else mesh.normals
    return replace(mesh, colours=seen_colours(scene, mesh.vertices, normals, mesh.colours, reach, num_samples))


def seen_colours(
    scene: RadianceField, points: Tensor, normals: Tensor, own: Tensor, reach: float, num_samples: int = 8
) -> Float[Tensor, "n 3"]:
    """Return the colours that rays along the normals see, as pictures do.

    The colour at the surface itself is poorly determined, since little of what a picture shows comes from there.
    For a field that has become opaque, recolouring gains half a dB. For one that is still foggy it loses as much,
    because the pale colour of its outer layer stands for its transparency. So compare both.

    Args:
        scene: Gives density and colours.
        points: (n, 3) on a surface of the scene.
        normals: (n, 3) unit vectors, outwards.
        own: (n, 3) colours where a ray meets nothing.
        reach: The ray starts this far outside the surface and ends twice as far inside.
        num_samples: Samples along the ray.
    """
    step = 3 * reach / num_samples
    offsets = reach - step * (torch.arange(num_samples) + 0.5)
    rays = points[:, None] + offsets[:, None] * normals[:, None]
    low, high = torch.tensor(scene.lower), torch.tensor(scene.upper)
    samples = rays.flatten(0, 1).minimum(high).maximum(low)
    depth = (scene.densities(samples).view(len(rays), num_samples).clamp(min=0) * step).double()
    passed = torch.exp(depth - depth.cumsum(1))  # transmittance of the ray before each of its samples
    weights = passed * -torch.expm1(-depth)
    total = weights.sum(1, keepdim=True)
    colours = scene.colours(samples).view(len(rays), num_samples, 3)
    seen = (weights[..., None] * colours).sum(1) / total.clamp(min=1e-12)
    return torch.where(total > 1e-6, seen, own).float()


def vertex_normals(mesh: Mesh) -> Float[Tensor, "v 3"]:
    """Return unit normals of the vertices: the mean of their triangles, weighted by area."""
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    normals = torch.zeros_like(mesh.vertices)
    for corner in range(3):
        normals.index_add_(0, mesh.faces[:, corner], torch.linalg.cross(b - a, c - a))
    return torch.nn.functional.normalize(normals, dim=1)


def surface_points(mesh: Mesh, num_points: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return points (n, 3) spread evenly over the surface, and colours (n, 3) interpolated from its corners.

    Raises ``ValueError`` for ``num_points`` below 1.
    """
    _check_points(num_points)
    face = _draw(mesh.areas, num_points, generator)
    u, v = torch.rand(2, num_points, 1, generator=generator)
    # Folding the unit square along its diagonal gives an evenly covered triangle.
    u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
    weights = torch.cat([1 - u - v, u, v], dim=1)[..., None]
    corners = mesh.faces[face]
    return (weights * mesh.vertices[corners]).sum(1), (weights * mesh.colours[corners]).sum(1)


def _draw(weights: Tensor, num: int, generator: Generator) -> Tensor:
    # torch.multinomial takes no more than 2^24 weights, which is a lattice of 256^3.
    heights = weights.double().cumsum(0)
    drawn = torch.rand(num, generator=generator, dtype=torch.float64) * heights[-1]
    return torch.searchsorted(heights, drawn, right=True).clamp(max=len(weights) - 1)


def _check_points(num_points: int) -> None:
    if num_points < 1:
        raise ValueError(f"num_points must be at least 1; got {num_points}.")
