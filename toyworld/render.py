"""Renderer of scenes: pictures, with the geometry behind every pixel.

Lighting: one directional light moves with the camera, over its right shoulder, and there are no shadows. A surface
shows its own colour times ``0.65 + 0.35 normal . light``, which lies between 0.3 and 1, in display values (no
gamma). So the light alone does not reveal the view.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toyworld.camera import FIELD_OF_VIEW, focal_length, orbit, ray_directions
from toyworld.scene import BACKGROUNDS, COLOURS, Scene
from toyworld.solids import Solid, find_solid
from toyworld.trace import Hits, trace

LIGHT = (0.48, 0.64, 0.60)
"""Unit vector towards the light in the camera's frame: right, up, backwards."""

CHUNK = 32
"""Scenes traced together; few enough for the cache of a processor core. It changes no result."""


@dataclass(frozen=True, eq=False)
class Rendering:
    """Pictures (b, channels, size, size) of b scenes, rows from the top.

    Attributes:
        rgb: (b, 3, size, size) in [-1, 1], averaged over four rays per pixel along edges.
        depth: (b, 1, size, size) distance from the camera along the ray through the pixel's centre, in world
            units; 0 where that ray hits nothing.
        normals: (b, 3, size, size) unit vectors in world coordinates; 0 where the ray hits nothing.
        mask: (b, 1, size, size) bool: whether the ray through the pixel's centre hits the solid.
        edges: (b, 1, size, size) bool: where mask, depth or normals change abruptly to a neighbouring pixel.
        camera_to_world: (b, 3, 4), as in nerfstudio and OpenGL; see :mod:`toyworld.camera`.
        field_of_view: Vertical, in degrees. Pixels are square and the principal point is the centre.
    """

    rgb: Tensor
    depth: Tensor
    normals: Tensor
    mask: Tensor
    edges: Tensor
    camera_to_world: Tensor
    field_of_view: float

    @property
    def focal_length(self) -> float:
        """Focal length in pixels, the same for both axes."""
        return focal_length(self.rgb.shape[-1], self.field_of_view)


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    *,
    size: int = 64,
    field_of_view: float = FIELD_OF_VIEW,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Rendering:
    """Render scenes. A picture does not depend on the other scenes of its batch.

    Raises ``ValueError`` for no scenes, or a size or field of view out of range.
    """
    if not scenes or size < 1 or not 0 < field_of_view < 180:
        raise ValueError(
            "render needs at least one scene, size >= 1 and a field_of_view in (0, 180) degrees; got "
            f"{len(scenes)} scenes, {size} and {field_of_view}."
        )
    shapes = {scene.shape: None for scene in scenes}
    groups = [[i for i, scene in enumerate(scenes) if scene.shape == shape] for shape in shapes]
    chunks = [group[start : start + CHUNK] for group in groups for start in range(0, len(group), CHUNK)]
    parts = [_render_chunk([scenes[i] for i in chunk], size, field_of_view, dtype, device) for chunk in chunks]
    order = torch.tensor([i for chunk in chunks for i in chunk], device=device).argsort()

    def gathered(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[order]

    return Rendering(
        rgb=gathered("rgb"),
        depth=gathered("depth"),
        normals=gathered("normals"),
        mask=gathered("mask"),
        edges=gathered("edges"),
        camera_to_world=gathered("camera_to_world"),
        field_of_view=field_of_view,
    )


def shade(normals: Tensor, camera_to_world: Tensor) -> Tensor:
    """Return brightness (n,) in [0.3, 1] of surfaces with unit world normals (3, n), for cameras (n, 3, 4)."""
    right, up, back = camera_to_world[..., :3].permute(2, 1, 0)
    x, y, z = LIGHT[0] * right + LIGHT[1] * up + LIGHT[2] * back
    return 0.65 + 0.35 * (normals[0] * x + normals[1] * y + normals[2] * z)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Scenes of the same solid; each tensor has a row per scene."""

    solid: Solid
    camera: Tensor
    origin: Tensor
    colour: Tensor
    background: Tensor
    focal: float
    size: int

    def trace(self, number: Tensor, column: Tensor, row: Tensor) -> tuple[Hits, Tensor, Tensor]:
        """Return hits of rays through points of the pictures ``number`` (n,), their points (3, n) and colours."""
        camera, origin = self.camera[number], self.origin[number].T
        direction = ray_directions(camera, column, row, self.focal, self.size)
        hits = trace(self.solid, origin, direction)
        lit = self.colour[number].T * shade(hits.normal, camera)
        colour = torch.where(hits.hit, lit, self.background[number].T)
        return hits, origin + hits.depth * direction, colour


def _render_chunk(
    scenes: list[Scene], size: int, field_of_view: float, dtype: torch.dtype, device: torch.device | str
) -> Rendering:
    def rows(values: list[tuple[float, float, float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(device, dtype)

    poses = [orbit(scene.azimuth, scene.elevation, scene.distance) for scene in scenes]
    camera = torch.stack(poses).to(device, dtype)
    chunk = _Chunk(
        solid=find_solid(scenes[0].shape),
        camera=camera,
        origin=camera[:, :, 3] - rows([scene.position for scene in scenes]),
        colour=rows([COLOURS[scene.colour] for scene in scenes]),
        background=rows([BACKGROUNDS[scene.background] for scene in scenes]),
        focal=focal_length(size, field_of_view),
        size=size,
    )
    number, row, column = torch.ones(len(scenes), size, size, device=device).nonzero(as_tuple=True)
    hits, points, colour = chunk.trace(number, column.to(dtype) + 0.5, row.to(dtype) + 0.5)
    depth, mask = (x.view(-1, 1, size, size) for x in (hits.depth, hits.hit))
    normals, points, colour = (x.view(3, -1, size, size).transpose(0, 1) for x in (hits.normal, points, colour))
    edges = _edges(points, normals, mask)
    rgb = _antialiased(chunk, colour.clone(), edges)
    return Rendering(rgb * 2 - 1, depth, normals, mask, edges, camera, field_of_view)


def _edges(points: Tensor, normals: Tensor, mask: Tensor) -> Tensor:
    """Return the pixels (b, 1, h, w) next to, above or below one that shows another face, or a step in depth."""
    edges = torch.zeros_like(mask)
    for axis in (2, 3):
        length = mask.shape[axis] - 1
        here, there = ([x.narrow(axis, at, length) for x in (points, normals, mask, edges)] for at in (0, 1))
        turned = (here[1] * there[1]).sum(1, keepdim=True) < 0.8
        # Measured along the normal: on a plane at a grazing angle, depth changes as much as at a step.
        apart = ((here[0] - there[0]) * here[1]).sum(1, keepdim=True).abs() > 0.05
        changed = (here[2] != there[2]) | (here[2] & there[2] & (turned | apart))
        here[3] |= changed
        there[3] |= changed
    return edges


def _antialiased(chunk: _Chunk, rgb: Tensor, edges: Tensor) -> Tensor:
    """Return ``rgb`` (b, 3, h, w), changed in place: every pixel of an edge is the mean of 2 x 2 rays."""
    number, row, column = edges[:, 0].nonzero(as_tuple=True)
    quarters = [
        chunk.trace(number, column.to(rgb.dtype) + x, row.to(rgb.dtype) + y)[2]
        for y in (0.25, 0.75)
        for x in (0.25, 0.75)
    ]
    rgb[number, :, row, column] = (sum(quarters[1:], quarters[0]) / 4).T
    return rgb
