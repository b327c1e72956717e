"""Quality of scenes made from prompts of the toy world, measured against the true solids, beside baselines.

    python benchmarks/scenes_from_prompts.py --runs runs/demo-3d/red-mug-0 runs/demo-3d/red-mug-1

Measured for each run of ``scorefield sds``, from 24 views of a turntable: PSNR on the object's crop against the
true solid, turned and scaled for the best fit, next to a white picture and the best ellipsoid; the mean opacity
outside the true silhouette, widened by two pixels.

A shift by a pixel alone costs most of the PSNR. So the solid is also moved for the best fit, to a third of a
pixel, and then compared by PSNR, by silhouettes, and by volume, with all hollows filled: that of the field, and
that of the exported mesh if there is one. These three say whether a scene is the solid that its prompt asks for.

How often a judge of pictures names shape and colour, as a share of how often it does so for true renders, is
printed last. It proves no shape: the judge calls a stool a chair in 24 of 24 views. Writes evaluation.json and
evaluation.png into the run.
"""

import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from mesh_voxels import inside, load_mesh
from torch import Tensor
from torchvision.utils import save_image
from yardsticks import (
    BACKGROUND,
    DISTANCE,
    Ellipsoid,
    best_ellipsoid,
    crop_psnrs,
    filled,
    hollow,
    iou,
    matter,
    ring,
    voxels,
)

from scorefield.atomic import whole_file
from sds.field import Field, cone_blob
from sds.scene import Render, Scene, grid_scene, load_scene
from toyworld.captions import Attributes, parse
from toyworld.judge import accuracies, load_judge
from toyworld.render import Rendering, render
from toyworld.scene import Scene as ToyScene
from toyworld.solids import occupancy

Position = tuple[float, float, float]

LARGEST_MOVE = 0.4
"""Farthest that the solid is moved for the best fit."""

NUM_VIEWS = 24
ELEVATION = 30.0
SIZE = 64
TURN = 5
"""Degrees between the rotations that are tried. Every third is that of a view."""

SCALES = [round(0.75 + 0.05 * number, 2) for number in range(11)]
FINER = [round(0.01 * number, 2) for number in range(-4, 5)]
"""Offsets that are added to the best of the first scales."""

MOVES = (0.08, 0.04, 0.02, 0.01)
"""Steps, in world units, by which the solid is moved along each axis as long as that fits better."""

BARS = {"cone": 20.0, "torus": 20.0}
"""PSNR required, in dB; 16 for all other solids."""

LEAST_SILHOUETTE, LEAST_VOLUME, LEAST_PSNR = 0.85, {"chair": 0.5}, 14.0
"""What a scene must have to be the solid it should be, with the position fitted: IoU of silhouettes, IoU of
volumes (0.65 for all other solids), and PSNR in dB."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure scenes that `scorefield sds` made with the toy world's pipeline."""

    runs: list[Path] = field(default_factory=list)
    """Folders of finished runs, with a grid as their field."""


@dataclass(frozen=True, eq=False)
class Truth:
    """Pictures of the true solid from all angles that are tried, at one scale."""

    rgb: Tensor
    mask: Tensor


def true_views(
    shape: str, colour: str, scale: float, *, position: Position = (0.0, 0.0, 0.0), turn: int = TURN,
    first: int = 0,
) -> Truth:  # fmt: skip
    """Return the solid from every ``turn`` degrees. Scaling it equals looking at it from nearer by.

    Args:
        shape: Name of the solid.
        colour: Name of its colour.
        scale: Size of the solid; the camera is at ``DISTANCE`` / scale.
        position: Of the solid, in units of itself.
        turn: Degrees between two views.
        first: Azimuth of the first view, in degrees.
    """
    scenes = [
        ToyScene(
            shape=shape, colour=colour, background="white", azimuth=float(azimuth), elevation=ELEVATION,
            distance=DISTANCE / scale, position=position,
        )
        for azimuth in range(first, first + 360, turn)
    ]  # fmt: skip
    rendering: Rendering = render(scenes, size=SIZE)
    return Truth(rendering.rgb, rendering.mask)


def turned(truth: Truth, degrees: int) -> Truth:
    """Return the 24 views of the turntable, of a solid turned by a multiple of ``TURN``."""
    step = 360 // TURN // NUM_VIEWS
    chosen = (torch.arange(NUM_VIEWS) * step + degrees // TURN) % len(truth.rgb)
    return Truth(truth.rgb[chosen], truth.mask[chosen])


@dataclass(frozen=True, eq=False)
class Fit:
    """Turn and scale at which the solid looks most like some pictures."""

    psnr: float
    degrees: int
    scale: float
    truth: Truth


def best_fit(rgb: Tensor, shape: str, colour: str, scales: list[float]) -> Fit:
    """Return the best of all turns at these scales, by mean PSNR on the crop."""
    fits = []
    for scale in scales:
        truth = true_views(shape, colour, scale)
        for degrees in range(0, 360, TURN):
            there = turned(truth, degrees)
            psnr = float(crop_psnrs(rgb, there.rgb, there.mask).mean())
            fits.append(Fit(psnr, degrees, scale, there))
    return max(fits, key=lambda fit: fit.psnr)


def best_position(rgb: Tensor, shape: str, colour: str, fit: Fit) -> tuple[Position, float, Truth]:
    """Return where the turned and scaled solid fits best, its PSNR there, and its 24 views.

    The search goes along one axis at a time, in the solid's own frame, as long as the PSNR rises.
    """

    def at(position: Position) -> tuple[float, Truth]:
        truth = true_views(shape, colour, fit.scale, position=position, turn=360 // NUM_VIEWS, first=fit.degrees)
        return float(crop_psnrs(rgb, truth.rgb, truth.mask).mean()), truth

    position: Position = (0.0, 0.0, 0.0)
    psnr, truth = at(position)
    for step in MOVES:
        improved = True
        while improved:
            improved = False
            for axis, sign in itertools.product(range(3), (1, -1)):
                x, y, z = (value + sign * step * (number == axis) for number, value in enumerate(position))
                new, there = at((x, y, z))
                if new > psnr and x * x + y * y + z * z <= LARGEST_MOVE**2:
                    position, psnr, truth, improved = (x, y, z), new, there, True
    return position, psnr, truth


def true_voxels(shape: str, fit: Fit, position: Position) -> np.ndarray:
    """Return which voxels of the scene's space lie in the solid, turned, scaled and moved as it fits."""
    angle = math.radians(fit.degrees)
    (x, y, z), cos, sin = voxels().unbind(-1), math.cos(angle), math.sin(angle)
    own = torch.stack([cos * x - sin * y, sin * x + cos * y, z], dim=-1)
    return occupancy(shape, own / fit.scale, position).numpy()


def solid_figures(folder: Path, scene: Scene, pictures: Render, asked: Attributes, fit: Fit) -> dict[str, Any]:
    """Return the figures with the position fitted, too: PSNR, silhouettes and volumes."""
    position, psnr, truth = best_position(pictures.rgb, asked.shape, asked.colour, fit)
    ours, true = pictures.opacity > 0.5, truth.mask
    solid = true_voxels(asked.shape, fit, position)
    figures = {
        **dict(zip(("moved_x", "moved_y", "moved_z"), position, strict=True)),
        "psnr_moved": psnr,
        "silhouette_iou": float((ours & true).sum() / (ours | true).sum()),
        "volume_iou": iou(filled(matter(scene, voxels())), filled(solid)),
    }
    if (folder / "export" / "scene.glb").is_file():
        mesh = inside(load_mesh(folder / "export" / "scene.glb"))
        figures["mesh_volume_iou"] = iou(filled(mesh), filled(solid))
        figures["mesh_hollow"] = hollow(mesh)
    return figures


@torch.no_grad()
def turntable(scene: Scene) -> Render:
    """Return renders of 24 views over white."""
    views = ring(torch.arange(NUM_VIEWS) * 360.0 / NUM_VIEWS, torch.full((NUM_VIEWS,), ELEVATION))
    return scene(views, height=SIZE, width=SIZE, background=BACKGROUND)


def ellipsoid_scene(shape: str, truth: Truth, half_size: float) -> Scene:
    """Return the ellipsoid that fits the true solid best, in the mean colour of its pixels."""
    points = voxels()
    centre, radii, _ = best_ellipsoid(filled(occupancy(shape, points).numpy()), points, sphere=False)
    colour = (truth.rgb.transpose(0, 1)[:, truth.mask[:, 0]].mean(1) + 1) / 2
    network = Ellipsoid(centre, radii, colour, half_size)
    return Scene(
        Field(network, half_size=half_size, activation=lambda raw: 300 * (raw > 0).to(raw)), num_samples=256
    )


def outside(opacity: Tensor, mask: Tensor, pixels: int = 2) -> float:
    """Return the mean opacity of the pixels more than ``pixels`` away from the silhouette."""
    near = torch.nn.functional.max_pool2d(mask.float(), 2 * pixels + 1, 1, pixels)
    return float((opacity * (1 - near)).sum() / (1 - near).sum())


def load_run(folder: Path) -> tuple[Scene, Attributes]:
    """Return the scene of a finished run and its prompt's attributes. Raises ``ValueError`` for other runs."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"--runs {folder} is not a run of `scorefield sds`: it holds no config.json.")
    config = json.loads(path.read_text())
    if missing := {"prompt", "field", "backdrops", "half_size", "num_samples", "initial", "blob"} - config.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; expected what `scorefield sds` writes.")
    if config["field"] != "grid" or config.get("canvas") or not config["backdrops"]:
        raise ValueError(f"--runs {folder} was not made by the toyworld preset: a grid before named backdrops.")
    scene = grid_scene(
        half_size=config["half_size"], num_samples=config["num_samples"], initial=config["initial"],
        blob=cone_blob(*config["blob"]),
    )  # fmt: skip
    load_scene(scene, folder / "scene.safetensors")
    return scene, parse(config["prompt"])


def evaluate(folder: Path) -> dict[str, Any]:
    """Return all figures of a run, and write them into it."""
    scene, asked = load_run(folder)
    pictures = turntable(scene)
    coarse = best_fit(pictures.rgb, asked.shape, asked.colour, SCALES)
    fit = best_fit(pictures.rgb, asked.shape, asked.colour, [round(coarse.scale + more, 2) for more in FINER])
    judge, said = load_judge(), [Attributes(asked.shape, asked.colour)] * NUM_VIEWS
    ours, true = accuracies(judge, pictures.rgb, said), accuracies(judge, fit.truth.rgb, said)
    white = BACKGROUND.view(3, 1, 1).expand_as(fit.truth.rgb)
    at_scale_1 = turned(true_views(asked.shape, asked.colour, 1.0), 0)
    ellipsoid = turntable(ellipsoid_scene(asked.shape, at_scale_1, scene.field.half_size)).rgb
    solid = solid_figures(folder, scene, pictures, asked, fit)
    figures = {
        "is_the_solid": is_the_solid(solid, asked.shape),
        "shape": ours["shape"],
        "shape_of_true_renders": true["shape"],
        "colour": ours["colour"],
        "colour_of_true_renders": true["colour"],
        "psnr": fit.psnr,
        "psnr_bar": BARS.get(asked.shape, 16.0),
        "psnr_all_background": float(crop_psnrs(white, fit.truth.rgb, fit.truth.mask).mean()),
        "psnr_best_ellipsoid": float(crop_psnrs(ellipsoid, at_scale_1.rgb, at_scale_1.mask).mean()),
        "opacity_outside": outside(pictures.opacity, fit.truth.mask),
        "degrees": fit.degrees,
        "scale": fit.scale,
        **solid,
    }
    with whole_file(folder / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
    rows = [pictures.rgb, fit.truth.rgb, pictures.opacity.expand(-1, 3, -1, -1) * 2 - 1]
    shown = torch.cat([row[:: NUM_VIEWS // 8] for row in rows])
    save_image(shown.clamp(-1, 1) / 2 + 0.5, folder / "evaluation.png", nrow=8)
    return figures


def reached(figures: dict[str, Any]) -> bool:
    """Return whether a scene reaches every bar."""
    return bool(
        figures["shape"] >= 0.85 * figures["shape_of_true_renders"]
        and figures["colour"] >= 0.9 * figures["colour_of_true_renders"]
        and figures["psnr"] >= figures["psnr_bar"]
        and figures["opacity_outside"] <= 0.03
    )


def is_the_solid(figures: dict[str, Any], shape: str) -> bool:
    """Return whether a scene is the solid that was asked for, whatever a judge of its pictures says."""
    return bool(
        figures["silhouette_iou"] >= LEAST_SILHOUETTE
        and figures["volume_iou"] >= LEAST_VOLUME.get(shape, 0.65)
        and figures["psnr_moved"] >= LEAST_PSNR
    )


def main(config: Config) -> None:
    """Measure and print a table. Raises ``ValueError`` for runs that cannot be measured."""
    if not config.runs:
        raise ValueError("--runs is empty; pass the folders of finished runs of `scorefield sds`.")
    print("| run | the solid | silhouettes | volume | mesh | PSNR moved, dB | PSNR, dB | bar | ellipsoid | "
          "white | opacity outside | judge: shape | colour | all bars |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for folder in config.runs:
        f = evaluate(folder)
        print(
            f"| {folder.name} | {'yes' if f['is_the_solid'] else 'no'} | {f['silhouette_iou']:.2f} | "
            f"{f['volume_iou']:.2f} | {f.get('mesh_volume_iou', math.nan):.2f} | {f['psnr_moved']:.1f} | "
            f"{f['psnr']:.1f} | {f['psnr_bar']:.0f} | {f['psnr_best_ellipsoid']:.1f} | "
            f"{f['psnr_all_background']:.1f} | {f['opacity_outside']:.3f} | {f['shape']:.2f} of "
            f"{f['shape_of_true_renders']:.2f} | {f['colour']:.2f} of {f['colour_of_true_renders']:.2f} | "
            f"{'yes' if reached(f) else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
