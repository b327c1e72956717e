"""Options of an export: at the end of ``scorefield sds``, and of ``scorefield export``. Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

Colour = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Export:
    """Options of an export: the mesh, the search for its level, its texture, and the videos.

    Raises ``ValueError`` for a value that is out of range.
    """

    resolution: int = 128
    """Cubes of marching cubes along the longest side of the box."""
    level: float | None = None
    """Density of the mesh's surface. None: the level at which the mesh is most like the renders."""
    num_levels: int = 9
    """Levels in each of the two rounds of the search."""
    num_views: int = 8
    """Cameras for the search and for the figures in the report: half at an elevation of 10 degrees, half at 40."""
    view_size: int = 64
    """Height and width of the pictures from these cameras, in pixels."""
    smooth: float = 1.0
    """Standard deviation, in cubes, of the Gaussian that closes cracks and removes ripples. 0 is none."""
    min_part: float = 0.01
    """Smallest part of the mesh to keep, as a share of the largest part's volume. Smaller ones are floaters. 0
    keeps all."""
    faces: int = 5000
    """Triangles of the mesh, at most. 0 keeps all of marching cubes'."""
    texture: int = 512
    """Height and width of the texture in texels. 0: colours of the vertices instead."""
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
        check_mesh(self.level, self.faces, self.texture)
        if not 0 <= self.min_part <= 1 or not 0 < self.fps <= 100 or not -90 <= self.elevation <= 90:
            raise ValueError(
                "min_part must lie in [0, 1], fps in (0, 100] and elevation in [-90, 90]; got "
                f"{self.min_part}, {self.fps} and {self.elevation}."
            )
        if not 0 <= self.smooth <= 10:
            raise ValueError(f"smooth must lie in [0, 10] cubes; got {self.smooth}.")
        if self.background is not None and not all(0 <= value <= 1 for value in self.background):
            raise ValueError(f"background must be three numbers in [0, 1]; got {self.background}.")


def check_mesh(level: float | None, faces: int | None, texture: int | None, dashes: str = "") -> None:
    """Raise ``ValueError`` for a level, number of triangles or side of a texture that cannot be.

    ``dashes`` stand before the names of options in a message.
    """
    if level is not None and not 0 < level < math.inf:
        raise ValueError(f"{dashes}level must be a positive density; got {level}. None searches for it.")
    if faces is not None and faces != 0 and not 100 <= faces < 2**31:
        raise ValueError(f"{dashes}faces must be 0, for all of them, or at least 100 triangles; got {faces}.")
    if texture is not None and texture != 0 and not 16 <= texture <= 8192:
        raise ValueError(
            f"{dashes}texture must be 0, for colours of vertices, or lie in [16, 8192] texels; got {texture}."
        )


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """Export the scene of a finished run of `scorefield sds` again, without its teacher."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run: --out of `scorefield sds`."""
    out: Path | None = None
    """Folder for the export, whose earlier export is replaced. None: the folder export in the run."""
    level: float | None = None
    """Density of the mesh's surface. None: the level at which the mesh is most like the renders."""
    faces: int | None = None
    """Triangles of the mesh, at most. 0 keeps all of marching cubes'. None: as many as the run had."""
    texture: int | None = None
    """Height and width of the texture in texels. 0: colours of the vertices instead. None: as the run had."""
    mesh_resolution: int | None = None
    """Cells of marching cubes along a side. None: as many as the run had."""
    turntable_size: int | None = None
    """Height and width of the videos, in pixels. None: as the run had."""

    @property
    def folder(self) -> Path:
        """Folder that is written."""
        return self.run / "export" if self.out is None else self.out


def check_export(config: ExportRun) -> None:
    """Raise ``ValueError`` for a folder that is no finished run, or values that are out of range."""
    for name in ("config.json", "scene.safetensors"):
        if not (config.run / name).is_file():
            raise ValueError(
                f"{config.run} is no finished scene: it holds no {name}. Expected --out of a `scorefield sds` "
                "that ran to its end."
            )
    check_mesh(config.level, config.faces, config.texture, "--")
    for name, lowest in (("mesh_resolution", 2), ("turntable_size", 1)):
        value = getattr(config, name)
        if value is not None and not lowest <= value < 2**16:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must lie between {lowest} and 65,535; got {value}.")


def export_folders(config: ExportRun) -> list[Path]:
    """Return the folders that no other run may use meanwhile: the run, if it is one."""
    return [config.run] if config.run.is_dir() else []
