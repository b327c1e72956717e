"""Search for the level of a mesh: the density of its surface, by the likeness of the mesh to the scene's renders.

No fixed level suits all scenes: at too low a level fog swells the mesh, at too high a level walls have holes.
Colours alone do not tell, since behind a hole there is the inside of the other wall in the same colour. So
silhouettes and distances count, too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scorefield.progress import progress
from sds.mesh import Lattice, Mesh, extract_mesh
from sds.radiance import Colour, RadianceField, Rendered
from sds.rasterise import rasterise
from sds.solid import Space

FULL = 0.5
"""A level shows the box rather than its content if at least this share of the samples on the box's faces is above
it."""


@dataclass(frozen=True)
class LevelSearch:
    """Result of a search for the density of the mesh's surface.

    Attributes:
        level: Best density of the surface.
        tried: (level, likeness in dB) in increasing order of level; empty if the level was given.
    """

    level: float
    tried: tuple[tuple[float, float], ...]


def choose_level(
    scene: RadianceField, space: Space, cameras: Float[Tensor, "b 3 4"], rendered: Rendered, *,
    num_levels: int = 9, min_part: float = 0.01,
) -> LevelSearch:  # fmt: skip
    """Return the level whose mesh is most like ``rendered`` by :func:`likeness`.

    The search has two rounds. The first tries ``num_levels`` levels, spaced geometrically over all densities that
    can be a surface; the second tries as many between the two neighbours of the best.

    Args:
        scene: Gives the colours, the background and the field of view.
        space: Its density, and what is hidden.
        cameras: Cameras of ``rendered``.
        rendered: The scene's own renders.
        num_levels: Levels in each of the two rounds, at least 3.
        min_part: As for :func:`sds.mesh.extract_mesh`.

    Raises:
        ValueError: The scene is empty or full, so no level has a surface, or ``num_levels`` is below 3.
    """
    if num_levels < 3:
        raise ValueError(f"num_levels must be at least 3: the ends and one between; got {num_levels}.")
    side = longest_side(space.lattice)

    def quality(level: float) -> float:
        if shows_box(space.lattice, level):
            return -math.inf
        mesh = extract_mesh(space.at(level), scene.colours, level, min_part=min_part)
        return -math.inf if mesh is None else likeness(pictures_of(mesh, scene, cameras, rendered), rendered, side)

    coarse = _even_ratios(*level_range(space.lattice), num_levels)
    reached = {level: quality(level) for level in progress(coarse, "levels of the mesh tried")}
    best = _best(reached)
    if reached[best] == -math.inf:
        raise ValueError(_full_scene(space.lattice))
    at = coarse.index(best)
    below, above = coarse[max(at - 1, 0)], coarse[min(at + 1, num_levels - 1)]
    fine = _even_ratios(below, above, num_levels + 2)[1:-1]
    new = [level for level in fine if level not in reached]
    reached |= {level: quality(level) for level in progress(new, "levels of the mesh tried more finely")}
    tried = tuple((level, reached[level]) for level in sorted(reached) if reached[level] > -math.inf)
    return LevelSearch(_best(reached), tried)


def _best(reached: Mapping[float, float]) -> float:
    # A surface that is sharp is the same at many levels. The highest of them is taken, on every processor.
    return max(sorted(reached, reverse=True), key=lambda level: round(reached[level], 3))


def surface_at(scene: RadianceField, space: Space, level: float, *, min_part: float = 0.01) -> Mesh:
    """Return the mesh at a level.

    Raises ``ValueError`` if there is no surface. The message says whether the scene has one at any level.
    """
    lattice = space.lattice
    level_range(lattice)
    if shows_box(lattice, level):
        raise ValueError(_full_scene(lattice))
    largest = float(lattice.values.max())
    mesh = None if level >= largest else extract_mesh(space.at(level), scene.colours, level, min_part=min_part)
    if mesh is None:
        raise ValueError(
            f"no surface at level {level}: the largest density is {largest:.4g}. Pass a lower level, or None to "
            "search for the best."
        )
    return mesh


def level_range(lattice: Lattice) -> tuple[float, float]:
    """Return the lowest and the highest density that can be a surface.

    At 0.1 / side, a path through the whole box absorbs a tenth of the light; at 10 / spacing, a single cube
    absorbs all of it.

    Raises ``ValueError`` for an empty scene, whose density is nowhere above the lowest.
    """
    low, largest = 0.1 / longest_side(lattice), float(lattice.values.max())
    if largest <= 1.01 * low:
        raise ValueError(
            f"the scene is empty: its largest density in the box from {lattice.lower} to {lattice.upper} is "
            f"{largest:.3g} per world unit, and a density below {low:.3g} cannot be seen. Export an earlier "
            "checkpoint, train longer or with a stronger density blob, or check lower and upper."
        )
    return low, min(0.99 * largest, 10 / lattice.spacing)


def longest_side(lattice: Lattice) -> float:
    """Return the longest side of the box, in world units."""
    return max(high - low for low, high in zip(lattice.lower, lattice.upper, strict=True))


def shows_box(lattice: Lattice, level: float) -> bool:
    """Return whether the surface at that level consists mostly of the box's faces."""
    return float((lattice.border > level).float().mean()) >= FULL


def _full_scene(lattice: Lattice) -> str:
    return (
        f"the scene is full: at every level with a surface, {FULL:.0%} or more of the faces of the box from "
        f"{lattice.lower} to {lattice.upper} are inside it. Train with a stronger opacity penalty or a lower "
        "learning rate, or pass lower and upper that leave room around the object."
    )


def pictures_of(mesh: Mesh, scene: RadianceField, cameras: Tensor, rendered: Rendered) -> Rendered:
    """Return pictures of the mesh, rasterised at the size, field of view and background of ``rendered``."""
    size = rendered.rgb.shape[-1]
    return rasterise(mesh, cameras, size, field_of_view=scene.field_of_view, background=scene.background)


def psnr(images: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, at most 100, over all pixels of all pictures in [-1, 1]."""
    error = float(((images - reference).double() / 2).square().mean())
    return -10 * math.log10(max(error, 1e-10))


def likeness(mesh: Rendered, rendered: Rendered, side: float) -> float:
    """Return how much pictures of a mesh are like renders of the scene, in dB: in colour, opacity and distance.

    It is -10 log10 of the mean square, over pixels, of the differences of colour in [0, 1], of opacity, and of
    distance divided by ``side``. Distance counts where both are more than half opaque.

    Args:
        mesh: Pictures of the mesh.
        rendered: Renders from the same cameras.
        side: Longest side of the scene's box.
    """
    both = (mesh.opacity > 0.5) & (rendered.opacity > 0.5)
    away = (mesh.depth - rendered.depth).double() / side * both
    colour = (mesh.rgb - rendered.rgb).double() / 2
    opacity = (mesh.opacity - rendered.opacity).double()
    error = sum(float(difference.square().mean()) for difference in (colour, opacity, away))
    return -10 * math.log10(max(error, 1e-10))


def compare(mesh: Rendered, rendered: Rendered, background: Colour) -> dict[str, float]:
    """Return how pictures of a mesh differ from renders of the scene: PSNR in dB, silhouettes and distances.

    "psnr" is over whole pictures. "psnr_crop" is over the object's crop: in each picture, the smallest rectangle
    that contains every pixel in which the mesh or the scene is visible. "psnr_crop_without_mesh" is what the bare
    background would reach on that crop. "silhouette_iou" is the intersection of all silhouettes over their union.
    "depth_error" is the mean difference of the distances from the camera, in world units, where both are visible.

    Raises ``ValueError`` if no picture shows anything.
    """
    one, other = mesh.opacity > 0.5, rendered.opacity > 0.5
    both, seen = one & other, (one | other)[:, 0]
    if not bool(seen.any()):
        raise ValueError("no camera sees the object. Check distance, field_of_view, lower and upper of the scene.")
    crops = [_crop(picture) for picture in seen]
    ours, theirs = (
        torch.cat(
            [picture[:, rows, columns].flatten(1) for picture, (rows, columns) in zip(rgb, crops, strict=True)], 1
        )
        for rgb in (mesh.rgb, rendered.rgb)
    )
    nothing = (torch.tensor(background)[:, None] * 2 - 1).expand_as(theirs)
    return {
        "psnr": psnr(mesh.rgb, rendered.rgb),
        "psnr_crop": psnr(ours, theirs),
        "psnr_crop_without_mesh": psnr(nothing, theirs),
        "silhouette_iou": float(both.sum() / seen.sum()),
        "depth_error": float((mesh.depth - rendered.depth)[both].abs().double().mean())
        if both.any()
        else math.inf,
    }


def _crop(seen: Tensor) -> tuple[slice, slice]:
    """Return the rows and columns of the smallest rectangle that contains all True pixels of (h, w)."""
    found = (seen.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    rows, columns = (slice(places[0], places[-1] + 1) if places else slice(0) for places in found)
    return rows, columns


def _even_ratios(low: float, high: float, num: int) -> list[float]:
    return [low * (high / low) ** (i / (num - 1)) for i in range(num)]
