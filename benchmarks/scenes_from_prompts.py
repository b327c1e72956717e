"""Quality of scenes made from prompts of the toy world, measured against the true solids, beside baselines.

    python benchmarks/scenes_from_prompts.py --runs runs/demo-3d/red-mug-0 runs/demo-3d/red-mug-1

Measured for each run of ``scorefield sds``, from 24 views of a turntable: how often the judge names shape and
colour, as a share of how often it does so for true renders from the same views; PSNR on the object's crop against
the true solid, turned and scaled for the best fit (nothing else is adjusted), next to a white picture and the best
ellipsoid; the mean opacity outside the true silhouette, widened by two pixels. Writes evaluation.json and
evaluation.png into the run.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torchvision.utils import save_image
from yardsticks import BACKGROUND, DISTANCE, Ellipsoid, best_ellipsoid, crop_psnrs, filled, ring, voxels

from scorefield.atomic import whole_file
from sds.field import Field, cone_blob
from sds.scene import Render, Scene, grid_scene, load_scene
from toyworld.captions import Attributes, parse
from toyworld.judge import accuracies, load_judge
from toyworld.render import Rendering, render
from toyworld.scene import Scene as ToyScene
from toyworld.solids import occupancy

NUM_VIEWS = 24
ELEVATION = 30.0
SIZE = 64
TURN = 5
"""Degrees between the rotations that are tried. Every third is that of a view."""

SCALES = [round(0.75 + 0.05 * number, 2) for number in range(11)]
FINER = [round(0.01 * number, 2) for number in range(-4, 5)]
"""Offsets that are added to the best of the first scales."""

BARS = {"cone": 20.0, "torus": 20.0}
"""PSNR required, in dB; 16 for all other solids."""


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


def true_views(shape: str, colour: str, scale: float) -> Truth:
    """Return the solid from every ``TURN`` degrees. Scaling it equals looking at it from nearer by."""
    scenes = [
        ToyScene(
            shape=shape, colour=colour, background="white", azimuth=float(azimuth), elevation=ELEVATION,
            distance=DISTANCE / scale,
        )
        for azimuth in range(0, 360, TURN)
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
    figures = {
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


def main(config: Config) -> None:
    """Measure and print a table. Raises ``ValueError`` for runs that cannot be measured."""
    if not config.runs:
        raise ValueError("--runs is empty; pass the folders of finished runs of `scorefield sds`.")
    print("| run | shape | colour | PSNR dB | bar | white | ellipsoid | opacity outside | all bars |")
    print("|---|---|---|---|---|---|---|---|---|")
    for folder in config.runs:
        f = evaluate(folder)
        print(
            f"| {folder.name} | {f['shape']:.2f} of {f['shape_of_true_renders']:.2f} | {f['colour']:.2f} of "
            f"{f['colour_of_true_renders']:.2f} | {f['psnr']:.1f} | {f['psnr_bar']:.0f} | "
            f"{f['psnr_all_background']:.1f} | {f['psnr_best_ellipsoid']:.1f} | {f['opacity_outside']:.3f} | "
            f"{'yes' if reached(f) else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
