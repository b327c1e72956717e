"""Does score distillation find geometry? The teacher is exact, so all errors are those of the scene.

    python benchmarks/geometry.py --out runs/geometry

A scene learns a solid of the toy world from scores alone: those of a narrow Gaussian around the true picture from
the same camera, a new camera each time. Printed next to baselines that learn nothing, and written to the scene's
folder as ``measures.json``: PSNR on the object's crop over 12 held-out views, IoU of interior-filled voxels, of
the field and of the exported mesh, the share of that mesh that had to be filled, and its PSNR against the scene's
own pictures. Needs the extras ``nerf`` and ``dev``.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from mesh_voxels import inside, load_mesh
from torch import Tensor
from yardsticks import (
    BACKGROUND,
    DISTANCE,
    FOCAL,
    HALF_SIZE,
    Measures,
    baselines,
    ceiling,
    filled,
    hollow,
    iou,
    measured,
    truth,
    voxels,
)

from scorefield.denoiser import Cond, Denoiser
from scorefield.randomness import Rng
from scorefield.schedule import Schedule, VariancePreserving, per_sample
from scorefield.times import TimeSampler
from sds.cameras import CameraDistribution, Views
from sds.export import export
from sds.export_options import Export
from sds.losses import TIMES, distillation_loss, sds
from sds.penalties import entropy_loss
from sds.radiance import radiance_field
from sds.scene import Scene, grid_scene, save_scene
from toyworld.camera import FIELD_OF_VIEW
from toyworld.solids import occupancy

CAMERAS = CameraDistribution(
    distance=(2.6, 3.1), elevation=(0.0, 80.0), focal=(FOCAL, FOCAL),
    position_jitter=0, target_jitter=0, up_jitter=0,
)  # fmt: skip

STD = 0.1
"""Standard deviation of the teachers' Gaussians around true pictures in [-1, 1]."""

Draw = Callable[[Rng], tuple[Views, Cond]]
"""Draws the views of a step, and the teacher's conditions for them."""


@dataclass(frozen=True)
class Config:
    """Scenes to learn, and for how long."""

    out: Path = Path("runs/geometry")
    """Folder; each scene and its export go to ``shape-seed`` in it."""
    shapes: tuple[str, ...] = ("mug", "chair", "letter L")
    """Solids of the toy world."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; one scene is learned for each seed and shape."""
    steps: int = 200
    """Steps per scene, each of four views of 32 x 32 pixels."""


@dataclass(frozen=True, eq=False)
class GaussianTeacher:
    """The exact denoiser of N(mean, std^2), with a mean per sample in ``cond``."""

    schedule: Schedule
    std: float = STD

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return E[x0 | x_t] of that Gaussian."""
        alpha, sigma = (per_sample(f(t), x_t) for f in (self.schedule.alpha, self.schedule.sigma))
        total = (alpha * self.std) ** 2 + sigma**2
        return (alpha * self.std**2 * x_t + sigma**2 * cond["mean"]) / total


def learn(
    teacher: Denoiser, draw: Draw, *, seed: int, steps: int, size: int = 32, times: TimeSampler = TIMES,
    scene: Scene | None = None,
) -> Scene:  # fmt: skip
    """Return a scene that has seen no picture: it learns from the score and the entropy of its opacity alone."""
    scene, method = scene or grid_scene(half_size=HALF_SIZE), sds(teacher, times=times)
    optimizer = torch.optim.Adam(scene.parameters(), lr=0.05, betas=(0.9, 0.99), eps=1e-15)
    for step in range(steps):
        rng = Rng(seed, step)
        views, cond = draw(rng)
        rendering = scene(views, height=size, width=size, background=BACKGROUND, generator=rng("points"))
        score = distillation_loss(method, rendering.rgb, cond, generator=rng("gradient"))["loss"]
        loss = score + 10 * entropy_loss(rendering.opacity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scene


def learn_solid(shape: str, *, seed: int, steps: int, size: int = 32, num_views: int = 4) -> Scene:
    """Return a scene of one solid, learned from the teacher that knows every view exactly."""

    def draw(rng: Rng) -> tuple[Views, Cond]:
        views = CAMERAS.draw(num_views, rng("views"))
        return views, {"mean": truth(shape, views, size).rgb}

    teacher = GaussianTeacher(VariancePreserving.scaled_linear())
    return learn(teacher, draw, seed=seed, steps=steps, size=size)


def exported(scene: Scene, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Export the scene and return the PSNR, in dB, of its mesh against its pictures: whole, and on the crop."""
    finished = radiance_field(scene, distance=DISTANCE, field_of_view=FIELD_OF_VIEW)
    compared = export(finished, folder, Export(num_frames=24), facts=facts)["mesh_versus_render"]
    return {name: compared[name] for name in ("psnr", "psnr_crop", "psnr_crop_without_mesh", "rasteriser")}


def run(shape: str, seed: int, config: Config) -> dict[str, Any]:
    """Learn, export and measure one scene, and write everything to its folder."""
    folder = config.out / f"{shape.replace(' ', '-')}-{seed}"
    start = time.process_time()
    scene = learn_solid(shape, seed=seed, steps=config.steps)
    seconds = time.process_time() - start
    folder.mkdir(parents=True, exist_ok=True)
    save_scene(scene, folder / "scene.safetensors")
    facts = {"shape": shape, "seed": seed, "steps": config.steps}
    found = {**facts, "cpu_seconds": seconds, **asdict(measured(shape, scene))}
    found["mesh_versus_render"] = exported(scene, folder / "export", facts)
    meshed = inside(load_mesh(folder / "export" / "scene.glb"))
    found["mesh_iou"] = iou(filled(meshed), filled(occupancy(shape, voxels()).numpy()))
    found["mesh_hollow"] = hollow(meshed)
    (folder / "measures.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def row(name: str, measures: Measures) -> str:
    """Return a line of the table."""
    psnr = "     " if measures.psnr is None else f"{measures.psnr:5.2f}"
    return f"{name:20} {psnr} dB  IoU {measures.iou:.3f}"


def main(config: Config) -> list[dict[str, Any]]:
    """Print baselines and ceiling, then learn all scenes, seed by seed."""
    for shape in config.shapes:
        print(shape)
        lines = baselines(shape) | {"hull of 24 masks": ceiling(shape)}
        print(*(row(name, measures) for name, measures in lines.items()), sep="\n", flush=True)
    results = []
    for seed in config.seeds:
        for shape in config.shapes:
            found = run(shape, seed, config)
            mesh = found["mesh_versus_render"]
            line = row(f"{shape}, seed {seed}", Measures(found["psnr"], found["iou"]))
            meshed = (
                f"mesh {mesh['psnr']:.2f} dB, on its crop {mesh['psnr_crop']:.2f} dB, IoU {found['mesh_iou']:.3f}"
            )
            print(f"{line}  {meshed}  {found['cpu_seconds']:.0f} s of CPU", flush=True)
            results.append(found)
    return results


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
