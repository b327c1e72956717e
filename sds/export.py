"""Export of a scene: meshes, points and videos that other programs open, and a report on the quality of the mesh.

    scene = RadianceField(density=..., colour=..., render=...)
    report = export(scene, Path("runs/mug/export"))

Writes ``scene.glb`` (mesh with its texture), ``scene.obj`` with ``scene.mtl`` and ``scene.png`` (the same),
``points.ply`` (coloured points), ``turntable.mp4`` and ``turntable.gif``, ``depth.mp4`` and ``normals.mp4``,
``contact.png`` (one row each of renders, mesh, depth and normals) and ``report.json``. Without a texture, glb and
obj have colours at their vertices.

The mesh is the surface on which the density equals a level, around all space that no camera sees into. No fixed
level suits all scenes, so several are tried. The mesh at each is compared with the scene's own renders from the
same cameras, in colour, silhouette and distance, and the best is exported. The gap that is left is in the report,
and so is what pictures do not show: parts, voids and handles of the mesh.
"""

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from scorefield.atomic import whole_folder
from scorefield.progress import working
from scorefield.randomness import derived_generator
from sds.export_options import Export
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
from sds.level import LevelSearch, choose_level, compare, pictures_of, surface_at
from sds.mesh import Mesh, recoloured, seen_colours, surface_points
from sds.radiance import RadianceField, Rendered
from sds.simplify import simplified
from sds.solid import Space, field_normals, survey
from sds.texture import baked, unfolded
from sds.topology import Topology, topology
from sds.turntable import colour_frames, contact_sheet, depth_frames, normal_frames, turntable_cameras

FORMAT = "scorefield-export-2"
FILES = ("scene.glb", "scene.obj", "points.ply", "turntable.mp4", "turntable.gif", "depth.mp4", "normals.mp4",
         "contact.png", "report.json")  # fmt: skip
TEXTURE_FILES = ("scene.mtl", "scene.png")
"""Beside ``scene.obj`` if it has a texture."""

SHEET_COLUMNS = 8

REACHES = (1.0, 2.0)
"""How far outside the surface rays begin that look for its colour, in spacings of the lattice."""

LOWEST_PSNR, LOWEST_IOU, LARGEST_DEPTH_ERROR, LARGEST_GENUS = 20.0, 0.9, 0.1, 2
"""A mesh beyond one of these is warned of. The depth error is a share of the box's longest side."""


@dataclass(frozen=True, eq=False)
class Finished:
    """A mesh as it is written, and what is known of it."""

    mesh: Mesh
    compared: Mapping[str, float]
    topology: Topology


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
    check_installed(*needed(choices))
    text = json.dumps(dict(facts or {}))  # facts that JSON cannot hold are refused before any work
    with _whole_export(folder) as temporary:
        check_encoder(temporary)
        with working("density of the scene"):
            space = survey(scene, choices.resolution, smooth=choices.smooth)
            cameras = turntable_cameras(choices.num_views, elevations=(10.0, 40.0), distance=scene.distance)
            rendered = scene.pictures(cameras, choices.view_size)
        search = _search(scene, space, cameras, rendered, choices)
        with working("colours of the mesh"):
            finished = _finished(scene, space, search.level, choices, cameras, rendered)
        mesh = finished.mesh
        write_glb(mesh, temporary / "scene.glb")
        write_obj(mesh, temporary / "scene.obj")
        generator = generator or derived_generator(0, "points")
        points = surface_points(mesh, choices.num_points, generator=generator)
        write_ply(*points, temporary / "points.ply")
        with working("turntables"):
            _write_turntables(scene, mesh, temporary, choices)
        report = {"format": FORMAT, "facts": json.loads(text), **_describe(finished, search, choices)}
        side = max(high - low for low, high in zip(scene.lower, scene.upper, strict=True))
        report["warnings"] = warnings_of(report, side)
        (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def needed(choices: Export) -> tuple[str, ...]:
    """Return the modules that an export with these options imports."""
    more = [("fast_simplification", choices.faces), ("xatlas", choices.texture)]
    return ("skimage", "trimesh", "imageio_ffmpeg", *(module for module, wanted in more if wanted))


def _search(
    scene: RadianceField, space: Space, cameras: Tensor, rendered: Rendered, choices: Export
) -> LevelSearch:
    if choices.level is not None:
        return LevelSearch(choices.level, ())
    return choose_level(scene, space, cameras, rendered, num_levels=choices.num_levels, min_part=choices.min_part)


def _finished(
    scene: RadianceField, space: Space, level: float, choices: Export, cameras: Tensor, rendered: Rendered
) -> Finished:
    """Return the mesh within its budget, in those colours that make it most like the renders."""
    mesh = surface_at(scene, space, level, min_part=choices.min_part)
    if choices.faces:
        mesh = simplified(mesh, choices.faces, scene.colours)
    mesh = replace(mesh, normals=field_normals(space.at(level), mesh.vertices))
    compared = [
        (candidate, compare(pictures_of(candidate, scene, cameras, rendered), rendered, scene.background))
        for candidate in _coloured(mesh, scene, space.lattice.spacing, choices.texture)
    ]
    best, figures = max(compared, key=lambda pair: pair[1]["psnr"])
    return Finished(best, figures, topology(mesh))  # of the mesh before it is cut at seams


def _coloured(mesh: Mesh, scene: RadianceField, spacing: float, texture: int) -> Sequence[Mesh]:
    """Return the mesh in its own colours, and in those that rays see from each of ``REACHES``."""
    seen = [recoloured(mesh, scene, reach * spacing) for reach in REACHES]
    if not texture:
        return [mesh, *seen]

    def skin(points: Tensor, normals: Tensor, reach: float) -> Tensor:
        own = scene.colours(points)
        return seen_colours(scene, points, normals, own, reach * spacing) if reach else own

    flat, places, vertices = unfolded(mesh, texture)
    return [
        baked(replace(flat, colours=one.colours[vertices]), places, texture, partial(skin, reach=reach))
        for one, reach in zip((mesh, *seen), (0.0, *REACHES), strict=True)
    ]


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


def _describe(finished: Finished, search: LevelSearch, choices: Export) -> dict[str, Any]:
    mesh, shape = finished.mesh, finished.topology
    colours = "the texture" if mesh.texture else "vertex colours"
    return {
        "mesh_versus_render": {
            **finished.compared,
            "rasteriser": f"z-buffer, 2 x 2 rays a pixel, unlit {colours}",
            "num_views": choices.num_views,
            "view_size": choices.view_size,
        },
        "level": search.level,
        "levels_tried": [{"level": level, "likeness": reached} for level, reached in search.tried],
        "mesh": {
            "vertices": len(mesh.vertices),
            "faces": len(mesh.faces),
            "closed": shape.closed,
            "components": shape.components,
            "voids": shape.voids,
            "genus": shape.genus,
            "volume": mesh.volume,
            "area": float(mesh.areas.sum()),
            "lower": mesh.vertices.amin(0).tolist(),
            "upper": mesh.vertices.amax(0).tolist(),
        },
    }


def warnings_of(report: Mapping[str, Any], side: float) -> list[str]:
    """Return a sentence for each figure in a report by which the mesh is not the object that the renders show.

    Args:
        report: As from :func:`export`.
        side: Longest side of the scene's box.
    """
    mesh, seen = report["mesh"], report["mesh_versus_render"]
    error = seen["depth_error"]
    found = {
        f"the mesh looks unlike the renders: {seen['psnr']:.1f} dB": seen["psnr"] < LOWEST_PSNR,
        f"its silhouettes are not the renders': IoU {seen['silhouette_iou']:.2f}": (
            seen["silhouette_iou"] < LOWEST_IOU
        ),
        f"its surface is {error:.2f} from where the renders have it, on average": (
            error > LARGEST_DEPTH_ERROR * side
        ),
        f"it is in {mesh['components']} parts": mesh["components"] > 1,
        f"it has {mesh['voids']} inner voids": mesh["voids"] > 0,
        f"it has {mesh['genus']} handles": (mesh["genus"] or 0) > LARGEST_GENUS,
        "it is not closed": not mesh["closed"],
    }
    return [text for text, wrong in found.items() if wrong]


def summary(report: Mapping[str, Any]) -> str:
    """Return one line about the mesh of a report."""
    mesh, seen = report["mesh"], report["mesh_versus_render"]
    return (
        f"mesh versus renders: {seen['psnr']:.1f} dB, silhouettes {seen['silhouette_iou']:.2f}, depth error "
        f"{seen['depth_error']:.3f}; {mesh['faces']:,} triangles, volume {mesh['volume']:.3f}, genus "
        f"{mesh['genus']}"
    )


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
