"""Turn a prompt into a 3D scene by score distillation.

    python train_scripts/train_sds.py --prompt "a red mug" --out runs/mug
    accelerate launch train_scripts/train_sds.py --preset dreamfusion --prompt "a corgi" --out runs/corgi

A frozen text-to-image model looks at renders of the scene from random cameras and says what it expects instead;
the scene follows. At the end --out/export holds scene.glb, scene.obj, points.ply, turntable.mp4, contact.png and
report.json. With --canvas images learn in place of a scene. Stopped runs resume: run the same command again.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from command import fingerprint, identity, run, show_plan
from fitting import fit, resume, start
from scene_options import PRESETS, Config
from scenes import (
    build_canvas,
    build_looks,
    build_method,
    build_probe,
    build_scene,
    canvas_looks,
    check_scene,
    load_teacher,
    optimizers,
)
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from score import checkpoint, hub
from score.training import Phase, Report
from sds.canvas import Canvas
from sds.export import Export, export
from sds.finish import exportable, save_scene
from sds.guards import check_opacity, num_rollbacks, roll_back, seed_after
from sds.learning import SceneDistillation
from sds.probe import Probe
from sds.scene import Scene
from sds.video import check_encoder

GUARD_EVERY = 10
"""Steps between looks at the opacity, for which several ranks wait for each other."""


def main(config: Config) -> Path:
    """Learn and export; returns the folder of the export, or the picture of a canvas."""
    check_scene(config)
    if not config.canvas:
        with TemporaryDirectory() as folder:
            check_encoder(Path(folder))
        export_choices(config)
    accelerator = start(config)
    teacher = load_teacher(config, accelerator.device)
    task = build_task(config, teacher, accelerator)
    optimizer, lr_schedule, phi = optimizers(config, task)
    phases = task.phases(optimizer, lr_schedule=lr_schedule, phi=phi)
    if config.dry_run:
        roles = {"teacher": teacher.denoiser.network, **{phase.name: phase.network for phase in phases}}
        show_plan(config, roles, {phase.name: config.steps for phase in phases})
        return config.out
    inputs = {"teacher": fingerprint(teacher.denoiser.network.parameters())}
    own = identity(config, accelerator, inputs)
    teacher = teacher.without_text_encoders()
    first = resume(config, phases, accelerator, own)
    if first == 0 and accelerator.is_main_process:
        checkpoint.save(config.out / "checkpoints", 0, phases, own)  # the first state to go back to
    accelerator.wait_for_everyone()
    learn(config, task, phases, build_probe(config, task, teacher), accelerator, own, first)
    return finish(config, task, teacher, optimizer) if accelerator.is_main_process else config.out


def build_task(config: Config, teacher: hub.Teacher, accelerator: Accelerator) -> SceneDistillation:
    """What learns, on its device, and by which loss."""
    method = build_method(config, teacher)
    if config.canvas:
        canvas = build_canvas(config, teacher).to(accelerator.device)
        return SceneDistillation(
            subject=canvas_looks(config, canvas, teacher), method=method, num_draws=config.draws
        )
    scene = build_scene(config).to(accelerator.device)
    looks = build_looks(config, scene, teacher, accelerator.num_processes)
    return SceneDistillation(subject=looks, method=method, num_draws=config.draws)


def learn(
    config: Config, task: SceneDistillation, phases: Sequence[Phase], probe: Probe, accelerator: Accelerator,
    own: Mapping[str, Any], first: int,
) -> None:  # fmt: skip
    """Train to the end; a scene that is lost goes back to its last checkpoint, up to --max-rollbacks times."""
    guard = Guard(accelerator, watched=not config.canvas)
    columns = len(probe.look(0).x0)

    def watch(step: int) -> Mapping[str, float]:
        if not config.probe_every or (step % config.probe_every and step != config.steps):
            return {}
        return probe(step - 1, task.method(step - 1))[0]

    while True:
        rollbacks = num_rollbacks(phases[0].optimizer)
        try:
            fit(
                replace(config, seed=seed_after(config.seed, rollbacks)), phases, task.batches, accelerator,
                own=own, first=first, rollout=task.rollout, watch=watch, check=guard, columns=columns,
                preview=lambda: probe(config.steps - 1, task.method(config.steps - 1))[1],
            )  # fmt: skip
            return
        except FloatingPointError as error:
            if rollbacks >= config.max_rollbacks:
                raise
            first = roll_back(config.out / "checkpoints", phases, own, write=accelerator.is_main_process)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                tqdm.write(
                    f"{error}\nrolled back to step {first}, from where the learning rate is half of what it was "
                    f"({rollbacks + 1} of at most {config.max_rollbacks} times).", file=sys.stderr,
                )  # fmt: skip


class Guard:
    """Raises, on all ranks at once, when a scene is empty or full."""

    def __init__(self, accelerator: Accelerator, *, watched: bool) -> None:
        self.accelerator, self.watched = accelerator, watched

    def __call__(self, report: Report) -> None:
        """Look at every tenth step."""
        if self.watched and report.step % GUARD_EVERY == 0:
            opacity = self.accelerator.reduce(report.metrics["scene/opacity"].float(), "mean")
            check_opacity(float(opacity), report.step)


def finish(
    config: Config, task: SceneDistillation, teacher: hub.Teacher, optimizer: torch.optim.Optimizer
) -> Path:
    """Write the weights, and what can be looked at."""
    network = task.subject.network
    save_scene(network, config.out / "scene.safetensors")
    if isinstance(network, Canvas):
        return write_canvas(config, network, teacher)
    assert isinstance(network, Scene)
    field_of_view = 2 * math.degrees(math.atan(0.5 / (sum(config.focal) / 2)))
    # Seen from where the whole cube is in the picture.
    distance = max(
        sum(config.distance) / 2, config.half_size * (1 + 1 / math.tan(math.radians(field_of_view) / 2))
    )
    facts = {
        "prompt": config.prompt, "preset": config.preset, "method": config.method, "steps": config.steps,
        "seed": config.seed, "rollbacks": num_rollbacks(optimizer),
    }  # fmt: skip
    scene = exportable(network, distance=distance, field_of_view=field_of_view)
    report = export(scene, config.out / "export", export_choices(config), facts=facts)
    print(f"mesh versus renders: {report['mesh_versus_render']['psnr']:.1f} dB; export: {config.out / 'export'}")
    return config.out / "export"


def export_choices(config: Config) -> Export:
    """How finely, and from how high, the scene is exported."""
    return Export(
        resolution=config.mesh_resolution, size=config.turntable_size, elevation=sum(config.elevation) / 2
    )


@torch.no_grad()
def write_canvas(config: Config, canvas: Canvas, teacher: hub.Teacher) -> Path:
    """All particles in one picture."""
    images: Tensor = teacher.decode(canvas().detach()).float().clamp(-1, 1)
    path = config.out / "canvas.png"
    save_image(images / 2 + 0.5, path, nrow=math.ceil(len(images) ** 0.5))
    print(f"canvas: {path}")
    return path


if __name__ == "__main__":
    run(main, Config, __doc__, presets=PRESETS)
