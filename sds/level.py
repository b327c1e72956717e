"""Which density is the surface? The one whose mesh looks most like what the scene renders.

A fixed level is right for no scene: a mesh at too low a density is swollen by fog, at too high a one it has holes.
Here each level is tried, and its mesh compared with the scene's own pictures from the same cameras.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scorefield.progress import progress
from sds.exportable import Colour, Exportable, Rendered
from sds.mesh import Lattice, Mesh, extract_mesh
from sds.rasterise import rasterise

FULL = 0.5
"""Share of the box's faces above a level from which on the level shows the box and not what is in it."""


@dataclass(frozen=True)
class LevelSearch:
    """Levels tried, and the best of them.

    Attributes:
        level: of the surface, a density.
        tried: (level, PSNR in dB) in increasing order of level.
    """

    level: float
    tried: tuple[tuple[float, float], ...]


def choose_level(
    scene: Exportable, lattice: Lattice, cameras: Float[Tensor, "b 3 4"], rendered: Rendered, *,
    num_levels: int = 9, min_part: float = 0.01,
) -> LevelSearch:  # fmt: skip
    """The level whose mesh has the highest PSNR against ``rendered``.

    ``num_levels`` levels in even ratios over all that can be a surface, then as many between the neighbours of the
    best.

    Args:
        scene: for its colours, background and field of view.
        lattice: its density.
        cameras: of ``rendered``.
        rendered: the scene's own pictures.
        num_levels: tried in each of the two rounds, at least 3.
        min_part: as for :func:`sds.mesh.extract_mesh`.

    Raises:
        ValueError: the scene is empty or full, and has no surface at any level.
    """
    if num_levels < 3:
        raise ValueError(f"num_levels must be at least 3: the ends and one between; got {num_levels}.")

    def quality(level: float) -> float:
        mesh = (
            None if shows_box(lattice, level) else extract_mesh(lattice, scene.colours, level, min_part=min_part)
        )
        return -math.inf if mesh is None else psnr(pictures_of(mesh, scene, cameras, rendered).rgb, rendered.rgb)

    coarse = _even_ratios(*level_range(lattice), num_levels)
    reached = {level: quality(level) for level in progress(coarse, "levels of the mesh tried")}
    best = max(coarse, key=reached.__getitem__)
    if reached[best] == -math.inf:
        raise ValueError(_full_scene(lattice))
    at = coarse.index(best)
    below, above = coarse[max(at - 1, 0)], coarse[min(at + 1, num_levels - 1)]
    fine = _even_ratios(below, above, num_levels + 2)[1:-1]
    new = [level for level in fine if level not in reached]
    reached |= {level: quality(level) for level in progress(new, "levels of the mesh tried more finely")}
    tried = tuple((level, reached[level]) for level in sorted(reached) if reached[level] > -math.inf)
    return LevelSearch(max(reached, key=reached.__getitem__), tried)


def surface_at(scene: Exportable, lattice: Lattice, level: float, *, min_part: float = 0.01) -> Mesh:
    """The mesh at a level. Raises ``ValueError`` if there is no surface, saying whether the scene has any."""
    level_range(lattice)
    if shows_box(lattice, level):
        raise ValueError(_full_scene(lattice))
    mesh = extract_mesh(lattice, scene.colours, level, min_part=min_part)
    if mesh is None:
        raise ValueError(
            f"no surface at level {level}: the largest density is {float(lattice.values.max()):.4g}. Pass a lower "
            "one, or None to search for it."
        )
    return mesh


def level_range(lattice: Lattice) -> tuple[float, float]:
    """Lowest and highest density that can be a surface.

    At 0.1 / side the whole box hides a tenth of what is behind it, at 10 / spacing a single cube hides it all.

    Raises ``ValueError`` for a scene that is empty: nowhere above the lowest.
    """
    side = max(high - low for low, high in zip(lattice.lower, lattice.upper, strict=True))
    low, largest = 0.1 / side, float(lattice.values.max())
    if largest <= 1.01 * low:
        raise ValueError(
            f"the scene is empty: its largest density in the box from {lattice.lower} to {lattice.upper} is "
            f"{largest:.3g} per world unit, and what is nowhere above {low:.3g} cannot be seen. Export an earlier "
            "checkpoint, train longer or with a stronger density blob, or check lower and upper."
        )
    return low, min(0.99 * largest, 10 / lattice.spacing)


def shows_box(lattice: Lattice, level: float) -> bool:
    """Whether the surface at that level is mostly the faces of the box."""
    return float((lattice.border > level).float().mean()) >= FULL


def _full_scene(lattice: Lattice) -> str:
    return (
        f"the scene is full: wherever there is a surface, {FULL:.0%} or more of the faces of the box from "
        f"{lattice.lower} to {lattice.upper} are inside. Train with a stronger opacity regulariser or a lower "
        "learning rate, or pass lower and upper that leave room round the object."
    )


def pictures_of(mesh: Mesh, scene: Exportable, cameras: Tensor, rendered: Rendered) -> Rendered:
    """The mesh, rasterised as ``rendered`` was rendered."""
    size = rendered.rgb.shape[-1]
    return rasterise(mesh, cameras, size, field_of_view=scene.field_of_view, background=scene.background)


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, at most 100, over all pixels of all pictures in [-1, 1]."""
    error = float(((images - reference).double() / 2).square().mean())
    return -10 * math.log10(max(error, 1e-10))


def compare(mesh: Rendered, rendered: Rendered, background: Colour) -> dict[str, float]:
    """How far a mesh's pictures are from the scene's, in dB.

    Over whole pictures; over the object's crop, which is the rectangle of every picture in which either has
    anything; and what no mesh at all would reach over that crop.

    Raises ``ValueError`` if no picture shows anything.
    """
    seen = torch.maximum(mesh.opacity, rendered.opacity)[:, 0] > 0.5
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
    }


def _crop(seen: Tensor) -> tuple[slice, slice]:
    """Rows and columns of the smallest rectangle round what is True in (h, w)."""
    found = (seen.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    rows, columns = (slice(places[0], places[-1] + 1) if places else slice(0) for places in found)
    return rows, columns


def _even_ratios(low: float, high: float, num: int) -> list[float]:
    return [low * (high / low) ** (i / (num - 1)) for i in range(num)]
