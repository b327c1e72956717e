"""A finished scene as files that other programs open, with a report of how good the mesh is.

    scene = Exportable(density=..., colour=..., render=...)
    report = export(scene, Path("runs/mug/export"))

Writes ``scene.glb`` and ``scene.obj`` (coloured mesh), ``points.ply`` (coloured points), ``turntable.mp4`` and
``turntable.gif``, ``depth.mp4`` and ``normals.mp4``, ``contact.png`` (rendered, mesh, depth, normals: a row each)
and ``report.json``. The mesh's level is chosen by PSNR against the scene's own pictures, and that PSNR is in the
report: the gap between what was optimised and what one gets.
"""

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from scorefield.atomic import whole_folder
from scorefield.progress import working
from scorefield.randomness import derived_generator
from sds.exportable import Colour, Exportable, Rendered, check_colour
from sds.extra import check_extra
from sds.formats import write_glb, write_obj, write_ply
from sds.level import LevelSearch, choose_level, compare, pictures_of, surface_at
from sds.mesh import Lattice, Mesh, recoloured, sample_lattice, surface_points
from sds.turntable import colour_frames, contact_sheet, depth_frames, normal_frames, turntable_cameras
from sds.video import check_encoder, write_gif, write_mp4, write_png

FORMAT = "scorefield-export-1"
FILES = ("scene.glb", "scene.obj", "points.ply", "turntable.mp4", "turntable.gif", "depth.mp4", "normals.mp4",
         "contact.png", "report.json")  # fmt: skip
SHEET_COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is exported, and how finely."""

    resolution: int = 128
    """Cubes of marching cubes along the longest side of the box."""
    level: float | None = None
    """Density of the mesh's surface; searched for by PSNR if not given."""
    num_levels: int = 9
    """Levels tried in each of the two rounds of the search."""
    num_views: int = 8
    """Cameras of the search and of the PSNR in the report, half of them 10 degrees above the horizon, half 40."""
    view_size: int = 64
    """Height and width of their pictures."""
    min_part: float = 0.01
    """Parts of the mesh below this share of the largest part's volume are dropped: floaters. 0 keeps all."""
    num_points: int = 100_000
    """Points of the cloud, evenly on the mesh."""
    num_frames: int = 48
    """Of a turntable: once round."""
    fps: float = 24.0
    """Frames a second."""
    size: int = 128
    """Height and width of a turntable."""
    elevation: float = 15.0
    """Of the turntable's camera above the horizon, in degrees."""
    background: Colour | None = None
    """Behind turntables and contact sheet, RGB in [0, 1]; the scene's own if not given."""

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
    scene: Exportable,
    folder: Path,
    choices: Export | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    generator: Generator | None = None,
) -> dict[str, Any]:
    """Write all files of a scene into ``folder``, which appears whole or not at all, and return the report.

    Args:
        scene: what to export.
        folder: new, empty, or an earlier export, which is replaced.
        choices: by default :class:`Export`'s.
        facts: JSON-able, kept in the report, such as the prompt.
        generator: of the point cloud; one of seed 0 by default.

    Raises:
        ValueError: missing libraries or encoder, a folder that holds other files, before any work; a scene that is
            empty, full, or not finite.
        OSError: a folder that cannot be written, before any work; a full disk. Nothing is left behind.
    """
    choices = choices or Export()
    check_extra("skimage", "trimesh", "imageio_ffmpeg")
    text = json.dumps(dict(facts or {}))  # what cannot be written is said before any work, too
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
    scene: Exportable, lattice: Lattice, cameras: Tensor, rendered: Rendered, choices: Export
) -> LevelSearch:
    if choices.level is not None:
        return LevelSearch(choices.level, ())
    return choose_level(
        scene, lattice, cameras, rendered, num_levels=choices.num_levels, min_part=choices.min_part
    )


def _surface(
    scene: Exportable, lattice: Lattice, level: float, min_part: float, cameras: Tensor, rendered: Rendered
) -> tuple[Mesh, dict[str, float]]:
    """The mesh in its own colours or in those that rays see, whichever is more like the pictures; and how much."""
    mesh = surface_at(scene, lattice, level, min_part=min_part)
    compared = [
        (candidate, compare(pictures_of(candidate, scene, cameras, rendered), rendered, scene.background))
        for candidate in (mesh, recoloured(mesh, scene, lattice.spacing))
    ]
    return max(compared, key=lambda pair: pair[1]["psnr"])


def _write_turntables(scene: Exportable, mesh: Mesh, folder: Path, choices: Export) -> None:
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
    """A folder to write in; a full disk is said to have changed nothing."""
    try:
        with whole_folder(folder) as temporary:
            yield temporary
    except OSError as error:
        why = error.strerror or str(error).partition("\n")[0]
        message = f"{why}; {folder} is as it was before. Free space, or choose another folder"
        raise OSError(error.errno or errno.EIO, message) from error
