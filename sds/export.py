"""Export of a scene: meshes, points and videos that other programs open, and a report on the quality of the mesh.

    scene = RadianceField(density=..., colour=..., render=...)
    report = export(scene, Path("runs/mug/export"))

Writes ``scene.glb`` and ``scene.obj`` (mesh with vertex colours), ``points.ply`` (coloured points),
``turntable.mp4`` and ``turntable.gif``, ``depth.mp4`` and ``normals.mp4``, ``contact.png`` (one row each of
renders, mesh, depth and normals) and ``report.json``.

The mesh is the surface on which the density equals a level. No fixed level suits all scenes: at too low a level
fog swells the mesh, at too high a level the mesh has holes. So several levels are tried. The mesh at each is
compared with the scene's own renders from the same cameras, and the best is exported. Its PSNR is in the report:
it is the gap between what was optimised and what one gets.
"""

import errno
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from scorefield.atomic import whole_folder
from scorefield.progress import progress, working
from scorefield.randomness import derived_generator
from sds.formats import (
    check_encoder,
    check_installed,
    write_gif,
    write_glb,
    write_mp4,
    write_obj,
    write_ply,
    write_png,
)
from sds.mesh import Lattice, Mesh, extract_mesh, recoloured, sample_lattice, surface_points
from sds.radiance import Colour, RadianceField, Rendered, check_colour
from sds.rasterise import rasterise
from sds.turntable import colour_frames, contact_sheet, depth_frames, normal_frames, turntable_cameras

FORMAT = "scorefield-export-1"
FILES = ("scene.glb", "scene.obj", "points.ply", "turntable.mp4", "turntable.gif", "depth.mp4", "normals.mp4",
         "contact.png", "report.json")  # fmt: skip
SHEET_COLUMNS = 8

FULL = 0.5
"""A level shows the box rather than its content if at least this share of the samples on the box's faces is above
it."""


@dataclass(frozen=True)
class LevelSearch:
    """Result of a search for the density of the mesh's surface.

    Attributes:
        level: Best density of the surface.
        tried: (level, PSNR in dB) in increasing order of level; empty if the level was given.
    """

    level: float
    tried: tuple[tuple[float, float], ...]


def choose_level(
    scene: RadianceField, lattice: Lattice, cameras: Float[Tensor, "b 3 4"], rendered: Rendered, *,
    num_levels: int = 9, min_part: float = 0.01,
) -> LevelSearch:  # fmt: skip
    """Return the level whose mesh has the highest PSNR against ``rendered``.

    The search has two rounds. The first tries ``num_levels`` levels, spaced geometrically over all densities that
    can be a surface; the second tries as many between the two neighbours of the best.

    Args:
        scene: Gives the colours, the background and the field of view.
        lattice: Samples of its density.
        cameras: Cameras of ``rendered``.
        rendered: The scene's own renders.
        num_levels: Levels in each of the two rounds, at least 3.
        min_part: As for :func:`sds.mesh.extract_mesh`.

    Raises:
        ValueError: The scene is empty or full, so no level has a surface, or ``num_levels`` is below 3.
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


def surface_at(scene: RadianceField, lattice: Lattice, level: float, *, min_part: float = 0.01) -> Mesh:
    """Return the mesh at a level.

    Raises ``ValueError`` if there is no surface. The message says whether the scene has one at any level.
    """
    level_range(lattice)
    if shows_box(lattice, level):
        raise ValueError(_full_scene(lattice))
    mesh = extract_mesh(lattice, scene.colours, level, min_part=min_part)
    if mesh is None:
        raise ValueError(
            f"no surface at level {level}: the largest density is {float(lattice.values.max()):.4g}. Pass a lower "
            "level, or None to search for the best."
        )
    return mesh


def level_range(lattice: Lattice) -> tuple[float, float]:
    """Return the lowest and the highest density that can be a surface.

    At 0.1 / side, a path through the whole box absorbs a tenth of the light; at 10 / spacing, a single cube
    absorbs all of it.

    Raises ``ValueError`` for an empty scene, whose density is nowhere above the lowest.
    """
    side = max(high - low for low, high in zip(lattice.lower, lattice.upper, strict=True))
    low, largest = 0.1 / side, float(lattice.values.max())
    if largest <= 1.01 * low:
        raise ValueError(
            f"the scene is empty: its largest density in the box from {lattice.lower} to {lattice.upper} is "
            f"{largest:.3g} per world unit, and a density below {low:.3g} cannot be seen. Export an earlier "
            "checkpoint, train longer or with a stronger density blob, or check lower and upper."
        )
    return low, min(0.99 * largest, 10 / lattice.spacing)


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


def compare(mesh: Rendered, rendered: Rendered, background: Colour) -> dict[str, float]:
    """Return the PSNR, in dB, of pictures of a mesh against renders of the scene.

    "psnr" is over whole pictures. "psnr_crop" is over the object's crop: in each picture, the smallest rectangle
    that contains every pixel in which the mesh or the scene is visible. "psnr_crop_without_mesh" is what the bare
    background would reach on that crop.

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
    """Return the rows and columns of the smallest rectangle that contains all True pixels of (h, w)."""
    found = (seen.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    rows, columns = (slice(places[0], places[-1] + 1) if places else slice(0) for places in found)
    return rows, columns


def _even_ratios(low: float, high: float, num: int) -> list[float]:
    return [low * (high / low) ** (i / (num - 1)) for i in range(num)]


@dataclass(frozen=True, kw_only=True)
class Export:
    """Options of an export: the mesh, the search for its level, and the videos."""

    resolution: int = 128
    """Cubes of marching cubes along the longest side of the box."""
    level: float | None = None
    """Density of the mesh's surface. None: the level with the best PSNR."""
    num_levels: int = 9
    """Levels in each of the two rounds of the search."""
    num_views: int = 8
    """Cameras for the search and for the PSNR in the report: half at an elevation of 10 degrees, half at 40."""
    view_size: int = 64
    """Height and width of the pictures from these cameras, in pixels."""
    min_part: float = 0.01
    """Smallest part of the mesh to keep, as a share of the largest part's volume. Smaller ones are floaters. 0
    keeps all."""
    num_points: int = 100_000
    """Number of points in the cloud, spread evenly over the mesh."""
    num_frames: int = 48
    """Frames of a turntable, which makes one turn."""
    fps: float = 24.0
    """Frames per second."""
    size: int = 128
    """Height and width of a turntable in pixels."""
    elevation: float = 15.0
    """Elevation of the turntable's camera above the horizon, in degrees."""
    background: Colour | None = None
    """Background of turntables and contact sheet, RGB in [0, 1]. None: the scene's own."""

    def __post_init__(self) -> None:
        lowest = {"resolution": 2, "num_levels": 3}
        for name in (*lowest, "num_views", "view_size", "num_points", "num_frames", "size"):
            if getattr(self, name) < lowest.get(name, 1):
                raise ValueError(f"{name} must be at least {lowest.get(name, 1)}; got {getattr(self, name)}.")
        if self.level is not None and not 0 < self.level < float("inf"):
            raise ValueError(f"level must be a positive density; got {self.level}. None searches for it.")
        if not 0 <= self.min_part <= 1 or not 0 < self.fps <= 100 or not -90 <= self.elevation <= 90:
            raise ValueError(
                "min_part must lie in [0, 1], fps in (0, 100] and elevation in [-90, 90]; got "
                f"{self.min_part}, {self.fps} and {self.elevation}."
            )
        if self.background is not None:
            check_colour("background", self.background)


def export(
    scene: RadianceField,
    folder: Path,
    choices: Export | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    generator: Generator | None = None,
) -> dict[str, Any]:
    """Write all files of a scene into ``folder`` and return the report. The folder appears whole or not at all.

    Args:
        scene: The scene to export.
        folder: A new or empty folder, or an earlier export, which is replaced.
        choices: Options; by default those of :class:`Export`.
        facts: Entries for the report, such as the prompt; must be serialisable as JSON.
        generator: Draws the points of the cloud. By default one of seed 0.

    Raises:
        ValueError: Libraries or the video encoder are missing, or the folder holds other files (both are found
            before any work), or the scene is empty, full, or not finite.
        OSError: The folder cannot be written (found before any work) or the disk is full. Nothing is left behind.
    """
    choices = choices or Export()
    check_installed("skimage", "trimesh", "imageio_ffmpeg")
    text = json.dumps(dict(facts or {}))  # facts that JSON cannot hold are refused before any work
    with _whole_export(folder) as temporary:
        check_encoder(temporary)
        with working("density of the scene"):
            lattice = sample_lattice(scene, choices.resolution)
            cameras = turntable_cameras(choices.num_views, elevations=(10.0, 40.0), distance=scene.distance)
            rendered = scene.pictures(cameras, choices.view_size)
        search = _search(scene, lattice, cameras, rendered, choices)
        with working("colours of the mesh"):
            mesh, compared = _surface(scene, lattice, search.level, choices.min_part, cameras, rendered)
        write_glb(mesh, temporary / "scene.glb")
        write_obj(mesh, temporary / "scene.obj")
        generator = generator or derived_generator(0, "points")
        points = surface_points(mesh, choices.num_points, generator=generator)
        write_ply(*points, temporary / "points.ply")
        with working("turntables"):
            _write_turntables(scene, mesh, temporary, choices)
        report = {"format": FORMAT, "facts": json.loads(text), **_describe(compared, search, mesh, choices)}
        (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _search(
    scene: RadianceField, lattice: Lattice, cameras: Tensor, rendered: Rendered, choices: Export
) -> LevelSearch:
    if choices.level is not None:
        return LevelSearch(choices.level, ())
    return choose_level(
        scene, lattice, cameras, rendered, num_levels=choices.num_levels, min_part=choices.min_part
    )


def _surface(
    scene: RadianceField, lattice: Lattice, level: float, min_part: float, cameras: Tensor, rendered: Rendered
) -> tuple[Mesh, dict[str, float]]:
    """Return the mesh and its PSNR figures, in its own colours or those seen along rays, whichever match best."""
    mesh = surface_at(scene, lattice, level, min_part=min_part)
    compared = [
        (candidate, compare(pictures_of(candidate, scene, cameras, rendered), rendered, scene.background))
        for candidate in (mesh, recoloured(mesh, scene, lattice.spacing))
    ]
    return max(compared, key=lambda pair: pair[1]["psnr"])


def _write_turntables(scene: RadianceField, mesh: Mesh, folder: Path, choices: Export) -> None:
    wanted = scene.background if choices.background is None else choices.background
    cameras = turntable_cameras(choices.num_frames, elevations=(choices.elevation,), distance=scene.distance)
    rendered = scene.pictures(cameras, choices.size)
    colour = colour_frames(rendered, scene.background, wanted)
    depth, normals = depth_frames(rendered, wanted), normal_frames(rendered, wanted)
    write_mp4(colour, folder / "turntable.mp4", fps=choices.fps)
    write_gif(colour, folder / "turntable.gif", fps=choices.fps)
    write_mp4(depth, folder / "depth.mp4", fps=choices.fps)
    write_mp4(normals, folder / "normals.mp4", fps=choices.fps)
    num_columns = min(SHEET_COLUMNS, choices.num_frames)
    columns = torch.arange(num_columns) * choices.num_frames // num_columns
    meshed = pictures_of(mesh, scene, cameras[columns], rendered)
    rows = [colour[columns], colour_frames(meshed, scene.background, wanted), depth[columns], normals[columns]]
    write_png(contact_sheet(rows, background=wanted), folder / "contact.png")


def _describe(compared: Mapping[str, float], search: LevelSearch, mesh: Mesh, choices: Export) -> dict[str, Any]:
    return {
        "mesh_versus_render": {
            **compared,
            "rasteriser": "z-buffer, 2 x 2 rays a pixel, unlit vertex colours",
            "num_views": choices.num_views,
            "view_size": choices.view_size,
        },
        "level": search.level,
        "levels_tried": [{"level": level, "psnr": reached} for level, reached in search.tried],
        "mesh": {
            "vertices": len(mesh.vertices),
            "faces": len(mesh.faces),
            "volume": mesh.volume,
            "area": float(mesh.areas.sum()),
            "lower": mesh.vertices.amin(0).tolist(),
            "upper": mesh.vertices.amax(0).tolist(),
        },
    }


@contextmanager
def _whole_export(folder: Path) -> Iterator[Path]:
    """Yield a folder to write in. If the disk is full, say that the earlier export has not changed."""
    try:
        with whole_folder(folder) as temporary:
            yield temporary
    except OSError as error:
        why = error.strerror or str(error).partition("\n")[0]
        message = f"{why}; {folder} is as it was before. Free space, or choose another folder"
        raise OSError(error.errno or errno.EIO, message) from error
