"""Turn a prompt into a 3D scene by score distillation.

    scorefield sds toyworld "a red mug" --out runs/mug
    accelerate launch -m scorefield sds dreamfusion "a corgi" --out runs/corgi

Renders of the scene from random cameras are shown to a frozen text-to-image model, which predicts what it expects
in their place, and the scene is moved towards that. At the end --out/export holds scene.glb, scene.obj,
points.ply, turntable.mp4, contact.png and report.json. With --canvas images are optimised instead of a scene. A
run that was stopped resumes when the same command is given again.
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
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from scorefield.atomic import whole_file
from scorefield.models.teacher import Teacher
from scorefield.progress import working
from scorefield.report.write import add_page
from scorefield.training import checkpoint
from scorefield.training.identity import identity
from scorefield.training.loop import Phase
from scorefield.training.ranks import check_same
from scorefield.training.report import close_log, open_log
from scorefield.training.run import fit, resume, show_plan, start
from sds.canvas import Canvas
from sds.doubts import NOISY, doubts, unsettled
from sds.export import export, needed
from sds.formats import check_encoder, check_installed
from sds.options import Config, check
from sds.parts import (
    build_canvas,
    build_method,
    build_probe,
    build_subject,
    cameras_at,
    canvas_subject,
    colour_of,
    fingerprints,
    frozen_teacher,
    optimizers,
    read_prompts,
)
from sds.probe import Probe
from sds.recovery import check_opacity, num_rollbacks, opacity_all_round, roll_back, seed_after
from sds.runs import build_scene, export_choices, facts_of, field_of, tell, tell_all
from sds.scene import Scene, check_nerfstudio, save_scene
from sds.training import SceneDistillation

RATES = {"scene": ("learning_rate", "background_lr"), "phi": ("phi_lr",)}
"""Options that set the learning rates of each phase."""

CHECK_EVERY = 10
"""Steps between checks of the opacity. Every step that is about to be saved is checked, too."""


def main(config: Config) -> Path:
    """Train and export; return the folder of the export, or the picture of a canvas."""
    check_scene(config)
    accelerator = start(config)
    with working("loading the teacher"):
        teacher = frozen_teacher(config, accelerator.device)
        inputs = fingerprints(teacher, read_prompts(config, teacher))
    teacher = teacher.without_text_encoders()  # before anything else keeps a reference to them
    task = build_task(config, teacher, accelerator)
    optimizer, lr_schedule, phi = optimizers(config, task)
    phases = [
        replace(phase, lr_options=RATES[phase.name])
        for phase in task.phases(optimizer, lr_schedule=lr_schedule, phi=phi)
    ]
    if accelerator.is_main_process:
        tell_all(doubts(config, task.subject.network))
    if config.dry_run:
        networks = {"teacher": teacher.denoiser.network, **{phase.name: phase.network for phase in phases}}
        show_plan(config, networks, {phase.name: config.steps for phase in phases})
        return config.out
    own = identity(config, accelerator, inputs)
    first = resume(config, phases, accelerator, own)
    if first == 0 and accelerator.is_main_process:
        checkpoint.save(config.out / "checkpoints", 0, phases, own)  # the first state to go back to
    accelerator.wait_for_everyone()
    learn(config, task, phases, build_probe(config, task, teacher), accelerator, own, first)
    if not accelerator.is_main_process:
        return config.out
    made = write_results(config, task, teacher, optimizer)
    add_page(config.out)
    return made


def check_scene(config: Config) -> None:
    """Raise ``ValueError`` for options that cannot work, or that need a library which is not installed."""
    check(config)
    if config.canvas:
        return
    try:
        check_nerfstudio()
    except ImportError as error:
        raise ValueError(str(error)) from error
    cameras_at(config, 0)  # raises for cameras that are out of range
    for name in config.backdrops:
        colour_of(name)
    check_installed(*needed(export_choices(config)))
    with TemporaryDirectory() as folder:
        check_encoder(Path(folder))


def build_task(config: Config, teacher: Teacher, accelerator: Accelerator) -> SceneDistillation:
    """Return the scene or canvas, on its device, and the loss that trains it."""
    method = build_method(config, teacher)
    if config.canvas:
        canvas = build_canvas(config, teacher).to(accelerator.device)
        return SceneDistillation(
            subject=canvas_subject(config, canvas, teacher), method=method, num_draws=config.draws
        )
    scene = build_scene(config).to(accelerator.device)
    subject = build_subject(config, scene, teacher, accelerator.num_processes)
    return SceneDistillation(subject=subject, method=method, num_draws=config.draws)


def learn(
    config: Config, task: SceneDistillation, phases: Sequence[Phase], probe: Probe, accelerator: Accelerator,
    own: Mapping[str, Any], first: int,
) -> None:  # fmt: skip
    """Train to the end. A scene that is lost goes back to a checkpoint, at most --max-rollbacks times."""
    watcher = Watcher(config, task, probe, phases[0].optimizer)

    def check(step: int, saving: bool) -> None:
        scene = task.subject.network
        if isinstance(scene, Scene) and (saving or step % CHECK_EVERY == 0):
            check_opacity(opacity_all_round(scene), step)

    while True:
        rollbacks = num_rollbacks(phases[0].optimizer)
        try:
            fit(
                replace(config, seed=seed_after(config.seed, rollbacks)), phases, task.batches, accelerator,
                own=own, first=first, rollout=task.rollout, watch=watcher.figures, check=check,
                preview=watcher.pictures if config.probe_every else None,
                columns=config.batch_size if config.canvas else len(probe.views),
            )  # fmt: skip
            return
        except FloatingPointError as error:
            if rollbacks >= config.max_rollbacks:
                raise
            first = go_back(config, phases, accelerator, own)
            if accelerator.is_main_process:
                tqdm.write(
                    f"{error}\nrolled back to step {first}, and halved the learning rate (rollback "
                    f"{rollbacks + 1} of at most {config.max_rollbacks}).", file=sys.stderr,
                )  # fmt: skip


def go_back(config: Config, phases: Sequence[Phase], accelerator: Accelerator, own: Mapping[str, Any]) -> int:
    """Roll back on all ranks, reopen the logs at that step, and return the step to go on from."""
    first = roll_back(
        config.out / "checkpoints", phases, own, write=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )  # fmt: skip
    fix = "Let --out be a folder that all machines share."
    check_same("the step to go back to", first, fix, accelerator)
    check_same("the number of rollbacks", num_rollbacks(phases[0].optimizer), fix, accelerator)
    close_log(accelerator)
    open_log(accelerator, first)
    return first


class Watcher:
    """Figures and pictures of a step; if both are due, they are computed together."""

    def __init__(
        self, config: Config, task: SceneDistillation, probe: Probe, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config, self.task, self.probe, self.optimizer = config, task, probe, optimizer
        self.step, self.shown, self.noisy = 0, torch.empty(0), list[float]()

    def figures(self, step: int) -> Mapping[str, float]:
        """Return what is logged of this step besides the loss."""
        self.step, self.shown = step, torch.empty(0)
        figures: dict[str, float] = {}
        if self._due(step, self.config.log_every):
            figures = {"scene/rollbacks": num_rollbacks(self.optimizer)}
        if self.config.probe_every and self._due(step, self.config.probe_every):
            with working("probe of the scene"):
                probed, self.shown = self.probe(step - 1, self.task.method(step - 1))
            figures |= probed
            self.noisy += [probed[NOISY]] if NOISY in probed else []
            if step == self.config.steps and not self.config.canvas:
                tell_all(unsettled(self.noisy))
        return figures

    def pictures(self) -> Tensor:
        """Return the pictures of the step for which :meth:`figures` was last called."""
        return self.shown if len(self.shown) else self.probe.pictures(self.step - 1)

    def _due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.config.steps


def write_results(
    config: Config, task: SceneDistillation, teacher: Teacher, optimizer: torch.optim.Optimizer
) -> Path:
    """Write the weights, then the export of a scene or the picture of a canvas, and return its path."""
    network = task.subject.network
    save_scene(network, config.out / "scene.safetensors")
    if isinstance(network, Canvas):
        return write_canvas(config, network, teacher)
    assert isinstance(network, Scene)
    facts = {**facts_of(config), "rollbacks": num_rollbacks(optimizer)}
    report = export(field_of(config, network), config.out / "export", export_choices(config), facts=facts)
    tell(report, config.out / "export")
    return config.out / "export"


@torch.no_grad()
def write_canvas(config: Config, canvas: Canvas, teacher: Teacher) -> Path:
    """Write all particles into one picture and return its path."""
    images: Tensor = teacher.decode(canvas().detach()).float().clamp(-1, 1)
    path = config.out / "canvas.png"
    with whole_file(path) as temporary:
        save_image(images / 2 + 0.5, temporary, nrow=math.ceil(len(images) ** 0.5))
    print(f"canvas: {path}")
    return path
