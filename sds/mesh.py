"""A scene as plain functions, and the surface of its density: marching cubes, closed, with coloured vertices.

The world has z up and the front of an object faces +x. Cameras are nerfstudio's and OpenGL's: x right, y up, z
backwards, ``camera_to_world`` (3, 4) holding these axes and the position as columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

Colour = tuple[float, float, float]
"""RGB in [0, 1], in display values (sRGB)."""

Corner = tuple[float, float, float]
"""x, y and z in the world."""

CHUNK = 1 << 18
"""Points asked for at once: bounds memory, changes no result."""


Query = Callable[[Tensor], Tensor]

CHANNELS = (("rgb", 3), ("depth", 1), ("normals", 3), ("opacity", 1))


class Pictures(Protocol):
    """Pictures of b cameras, rows from the top; anything with these four tensors will do."""

    @property
    def rgb(self) -> Float[Tensor, "b 3 h w"]:
        """In [-1, 1], in display values, before a background."""

    @property
    def depth(self) -> Float[Tensor, "b 1 h w"]:
        """Distance from the camera along the ray in world units; counts only where opacity is above a half."""

    @property
    def normals(self) -> Float[Tensor, "b 3 h w"] | None:
        """In world coordinates, outwards, of any length; counts only where there is opacity. Not None here."""

    @property
    def opacity(self) -> Float[Tensor, "b 1 h w"]:
        """In [0, 1]: how much of the background is hidden."""


@dataclass(frozen=True, eq=False)
class Rendered:
    """Pictures as :class:`Pictures` says, on the CPU."""

    rgb: Tensor
    depth: Tensor
    normals: Tensor
    opacity: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class RadianceField:
    """A scene as plain functions, called without gradient and in pieces.

    Attributes:
        density: (n,) of points (n, 3): per world unit, so that a segment of length d hides
            1 - exp(-density d) of what is behind.
        colour: (n, 3) in [0, 1] of points (n, 3): what a picture shows there. Albedo, if pictures are unlit.
        render: pictures of cameras (b, 3, 4), ``size`` high and wide, with colours as of ``colour`` (no light that
            a mesh cannot have) over the constant ``background``.
        lower: corner of the box that holds the object, with the smallest x, y, z.
        upper: corner with the largest.
        field_of_view: vertical, in degrees, of ``render``; pixels are square, the principal point is the centre.
        distance: from the origin at which the scene is looked at.
        background: that ``render`` puts behind the scene.
        device: where points and cameras are made.
    """

    density: Callable[[Tensor], Tensor]
    colour: Callable[[Tensor], Tensor]
    render: Callable[[Tensor, int], Pictures]
    lower: Corner = (-1.0, -1.0, -1.0)
    upper: Corner = (1.0, 1.0, 1.0)
    field_of_view: float = 40.0
    distance: float = 3.0
    background: Colour = (1.0, 1.0, 1.0)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        corners = (*self.lower, *self.upper)
        if not all(map(math.isfinite, corners)) or any(
            a >= b for a, b in zip(self.lower, self.upper, strict=True)
        ):
            raise ValueError(f"lower must be below upper on every axis; got {self.lower} and {self.upper}.")
        if not 0 < self.field_of_view < 180:
            raise ValueError(f"field_of_view must lie in (0, 180) degrees; got {self.field_of_view}.")
        if not 0 < self.distance < math.inf:
            raise ValueError(f"distance must be positive; got {self.distance}.")
        check_colour("background", self.background)

    @torch.no_grad()
    def densities(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Float32 on the CPU. Raises ``ValueError`` for another shape, and for nan or inf."""
        return _asked("density", self.density, points, (), self.device)

    @torch.no_grad()
    def colours(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Float32 on the CPU. Raises ``ValueError`` for another shape, and for values outside [0, 1]."""
        colours = _asked("colour", self.colour, points, (3,), self.device)
        _check_range("colour", colours, 0.0, 1.0)
        return colours.clamp(0, 1)

    @torch.no_grad()
    def pictures(self, camera_to_world: Float[Tensor, "b 3 4"], size: int, batch_size: int = 4) -> Rendered:
        """Of any number of cameras. Raises ``ValueError`` for what is not a picture."""
        parts = []
        for cameras in camera_to_world.split(batch_size):
            seen = self.render(cameras.to(self.device), size)
            parts.append([_checked(seen, name, channels, len(cameras), size) for name, channels in CHANNELS])
        return Rendered(*(torch.cat(part) for part in zip(*parts, strict=True)))


def check_colour(name: str, colour: Colour) -> None:
    """Raise ``ValueError`` for what is no RGB in [0, 1]."""
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ValueError(f"{name} must be three numbers in [0, 1]; got {colour}.")


def _asked(
    name: str,
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    tail: tuple[int, ...],
    device: torch.device | str,
) -> Tensor:
    parts = []
    for chunk in points.split(CHUNK):
        values = function(chunk.to(device))
        if values.shape != (len(chunk), *tail):
            expected, got = (len(chunk), *tail), tuple(values.shape)
            raise ValueError(f"{name} of {len(chunk)} points must be of shape {expected}; got {got}.")
        parts.append(values.to("cpu", torch.float32))
    values = torch.cat(parts)
    _check_finite(name, values)
    return values


def _checked(seen: Pictures, name: str, channels: int, batch: int, size: int) -> Tensor:
    values = getattr(seen, name)
    if values is None:
        raise ValueError(f"the rendered {name} are missing; a turntable shows them. Render with {name}.")
    expected = (batch, channels, size, size)
    if values.shape != expected:
        raise ValueError(f"{name} of {batch} pictures must be of shape {expected}; got {tuple(values.shape)}.")
    values = values.to("cpu", torch.float32)
    _check_finite(f"the rendered {name}", values)
    if name in ("rgb", "opacity"):
        low = -1.0 if name == "rgb" else 0.0
        _check_range(f"the rendered {name}", values, low, 1.0)
        return values.clamp(low, 1)
    return values


def _check_finite(name: str, values: Tensor) -> None:
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{name} is nan or inf in {wrong} of {values.numel()} values: the scene has diverged. Export an "
            "earlier checkpoint, and train with a lower learning rate."
        )


def _check_range(name: str, values: Tensor, low: float, high: float) -> None:
    smallest, largest = float(values.min()), float(values.max())
    if smallest < low - 1e-3 or largest > high + 1e-3:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {smallest:.4g} to {largest:.4g}.")


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles with coloured corners, in the world's coordinates (z up).

    Attributes:
        vertices: (v, 3).
        faces: (f, 3), numbers of vertices, counter-clockwise seen from outside.
        colours: (v, 3) in [0, 1], in display values.
    """

    vertices: Float[Tensor, "v 3"]
    faces: Int[Tensor, "f 3"]
    colours: Float[Tensor, "v 3"]

    @property
    def volume(self) -> float:
        """Enclosed, in cubic world units; negative if the triangles face inwards."""
        a, b, c = self.vertices.double()[self.faces].unbind(1)
        return float((a * torch.linalg.cross(b, c)).sum() / 6)

    @property
    def areas(self) -> Float[Tensor, " f"]:
        """Of the triangles, float64."""
        a, b, c = self.vertices.double()[self.faces].unbind(1)
        return torch.linalg.cross(b - a, c - a).norm(dim=1) / 2


@dataclass(frozen=True, eq=False)
class Lattice:
    """A density at the points ``lower + spacing * (i, j, k)``.

    Attributes:
        values: (i, j, k).
        lower: corner of the box.
        upper: corner of the box, at most a spacing before the last points.
        spacing: in world units.
    """

    values: Float[Tensor, "i j k"]
    lower: Corner
    upper: Corner
    spacing: float

    @property
    def border(self) -> Tensor:
        """The values on the six faces of the box, one after the other."""
        return torch.cat([self.values.select(axis, end).flatten() for axis in range(3) for end in (0, -1)])


def sample_lattice(scene: RadianceField, resolution: int = 128) -> Lattice:
    """The density in the scene's box with ``resolution`` cubes along its longest side.

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
    """The surface where the density passes ``level``; None if it nowhere does.

    The box ends the object: what is cut by its faces is closed there.

    Args:
        lattice: the density.
        colours: (v, 3) of the vertices (v, 3), such as ``RadianceField.colours``.
        level: the density of the surface, positive.
        min_part: parts that fill less than this share of the largest part's volume are dropped: floaters. 0 keeps
            every part, 1 the largest alone. A part is what hangs together, by corners too, above the level.
    """
    from skimage.measure import marching_cubes

    if not 0 < level < math.inf or not 0 <= min_part <= 1:
        raise ValueError(f"level must be positive and min_part lie in [0, 1]; got {level} and {min_part}.")
    values = _without_floaters(lattice.values.numpy(), level, min_part)
    if not (values > level).any():
        return None
    # Zeros round the box close the surface. "ascent" turns the triangles outwards where the inside is denser.
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
    # Only what is above the level is taken away: what is below it shapes the surface of the parts that stay.
    return np.where((parts > 0) & (sizes < min_part * sizes.max())[parts], 0, values)


def recoloured(mesh: Mesh, scene: RadianceField, reach: float, num_samples: int = 8) -> Mesh:
    """The mesh with the colours that a ray sees which comes in along the normal, as pictures do.

    The colour just at the surface is poorly known: little of what a picture shows comes from there. For a field
    that has become opaque this gains half a dB; for one that is still foggy it loses as much, because the pale
    colour of its skin stands for its transparency. So compare both.

    Args:
        mesh: a surface of the scene.
        scene: for its density and colours.
        reach: the ray starts this far outside of the surface, and ends twice as far inside of it.
        num_samples: on the ray.
    """
    step = 3 * reach / num_samples
    offsets = reach - step * (torch.arange(num_samples) + 0.5)
    rays = mesh.vertices[:, None] + offsets[:, None] * _vertex_normals(mesh)[:, None]
    low, high = torch.tensor(scene.lower), torch.tensor(scene.upper)
    points = rays.flatten(0, 1).minimum(high).maximum(low)
    depth = (scene.densities(points).view(len(rays), num_samples).clamp(min=0) * step).double()
    passed = torch.exp(depth - depth.cumsum(1))  # what is left of a ray before each of its samples
    weights = passed * -torch.expm1(-depth)
    total = weights.sum(1, keepdim=True)
    colours = scene.colours(points).view(len(rays), num_samples, 3)
    seen = (weights[..., None] * colours).sum(1) / total.clamp(min=1e-12)
    return replace(mesh, colours=torch.where(total > 1e-6, seen, mesh.colours).float())


def _vertex_normals(mesh: Mesh) -> Tensor:
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    normals = torch.zeros_like(mesh.vertices)
    for corner in range(3):
        normals.index_add_(0, mesh.faces[:, corner], torch.linalg.cross(b - a, c - a))
    return torch.nn.functional.normalize(normals, dim=1)


def surface_points(mesh: Mesh, num_points: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """Points (n, 3) spread evenly over the surface, and their colours (n, 3) between those of the corners."""
    _check_points(num_points)
    face = _draw(mesh.areas, num_points, generator)
    u, v = torch.rand(2, num_points, 1, generator=generator)
    # A square folded along its diagonal is a triangle, evenly covered.
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
