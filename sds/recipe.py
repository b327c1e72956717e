"""Turn a prompt into a 3D scene by score distillation.

    scorefield sds toyworld "a red mug" --out runs/mug
    accelerate launch -m scorefield sds dreamfusion "a corgi" --out runs/corgi

Renders of the scene from random cameras are shown to a frozen text-to-image model, which predicts what it expects
in their place, and the scene is moved towards that. At the end --out/export holds scene.glb, scene.obj,
points.ply, turntable.mp4, contact.png and report.json. With --canvas images are optimised instead of a scene, with
--seeds the best of several starts goes on, and with --prompts each line of a file becomes a scene. A run that was
stopped resumes when the same command is given again.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from scorefield.training.identity import identity, note_identity
from scorefield.training.loop import Phase
from scorefield.training.ranks import check_same, first_says
from scorefield.training.report import (
    as_grid,
    close_log,
    forget_samples,
    log,
    open_log,
    save_samples,
    start_logging,
)
from scorefield.training.run import check_identity, fit, resume, show_plan, start
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
    fingerprint_of_words,
    fingerprints,
    frozen_teacher,
    optimizers,
    read_prompts,
)
from sds.probe import Probe
from sds.queue import is_finished, run_all, runs_of
from sds.recovery import check_opacity, check_weights, num_rollbacks, opacity_all_round, roll_back, seed_after
from sds.runs import (
    check_same_kind,
    export_choices,
    facts_of,
    field_of,
    fingerprint_of_scene,
    first_scene,
    tell,
    tell_all,
)
from sds.scene import Scene, check_nerfstudio, save_scene
from sds.starts import Starts, choose, folder_of, plan_of_starts, read_starts, seeds_of, write_starts
from sds.training import SceneDistillation

RATES = {"scene": ("learning_rate", "background_lr"), "phi": ("phi_lr",)}
"""Options that set the learning rates of each phase."""

CHECK_EVERY = 10
"""Steps between checks of the opacity. Every step that is about to be saved is checked, too."""


@dataclass(frozen=True, eq=False)
class Session:
    """What the runs of one command share.

    Attributes:
        teacher: Frozen, without its text encoders; it knows the prompts of all runs.
        inputs: For each run, hashes of what it reads.
    """

    teacher: Teacher
    inputs: Sequence[Mapping[str, str | None]]


def main(config: Config) -> Path:
    """Train and export; return the folder of the export, the picture of a canvas, or the folder of many runs."""
    check_scene(config)
    runs = runs_of(config)
    accelerator = start(config)
    session = open_session(config, runs, accelerator)
    if not config.prompts:
        return run_scene(config, session.teacher, session.inputs[0], accelerator)
    if config.dry_run:
        run_scene(runs[0], session.teacher, session.inputs[0], accelerator)
        if accelerator.is_main_process:
            print("\n".join([f"{len(runs)} prompts, each so many steps:", *(f"  {one.out}" for one in runs)]))
        return config.out
    hashed = {one.out: inputs for one, inputs in zip(runs, session.inputs, strict=True)}

    def run(one: Config) -> None:
        inputs, own = hashed[one.out], start(one)
        if is_finished(one):
            check_identity(one, identity(one, own, inputs), own)
            return
        try:
            run_scene(one, session.teacher, inputs, own, last=False)
        finally:
            close_log(own)

    run_all(runs, run, alone=accelerator.num_processes == 1)
    accelerator.end_training()
    return config.out


def open_session(config: Config, runs: Sequence[Config], accelerator: Accelerator) -> Session:
    """Return the teacher, which has read the prompts of all runs, and the hashes of what each run reads."""
    with working("loading the teacher"):
        teacher = frozen_teacher(config, accelerator.device)
        words = [read_prompts(one, teacher) for one in runs]
        known = {**fingerprints(teacher), "init_from": fingerprint_of_scene(config)}
        inputs = [{**known, **fingerprint_of_words(said)} for said in words]
    # Before anything else keeps a reference to them.
    return Session(teacher.without_text_encoders(), inputs)


def run_scene(
    config: Config, teacher: Teacher, inputs: Mapping[str, str | None], accelerator: Accelerator, *,
    last: bool = True,
) -> Path:  # fmt: skip
    """Train one scene or canvas, export it, and return where the result is; no more than a plan in a dry run.

    Args:
        config: Options of this run.
        teacher: Its teacher.
        inputs: Hashes of what it reads.
        accelerator: Ranks of this run.
        last: No other run follows in this process.
    """
    task, phases = build_run(config, teacher, accelerator)
    if accelerator.is_main_process:
        tell_all(doubts(config, task.subject.network))
    if config.dry_run:
        networks = {"teacher": teacher.denoiser.network, **{phase.name: phase.network for phase in phases}}
        more = (config.seeds - 1) * config.start_steps
        updates = {phase.name: config.steps + more for phase in phases}
        show_plan(config, networks, updates, before=plan_of_starts(config))
        return config.out
    own = identity(config, accelerator, inputs)
    seed = config.seed
    if config.seeds > 1:
        seed = best_start(config, teacher, inputs, own, accelerator)
        task, phases = build_run(replace(config, seed=seed), teacher, accelerator)
    first = resume(config, phases, accelerator, own)
    if first == 0 and accelerator.is_main_process:
        checkpoint.save(config.out / "checkpoints", 0, phases, own)  # the first state to go back to
    accelerator.wait_for_everyone()
    if config.seeds > 1 and first == config.start_steps:
        log_starts(config, accelerator)
    probe = build_probe(config, task, teacher)
    learn(replace(config, seed=seed), task, phases, probe, accelerator, own, first, last=last)
    if not accelerator.is_main_process:
        return config.out
    made = write_results(config, task, teacher, phases[0].optimizer)
    add_page(config.out)
    return made


def build_run(
    config: Config, teacher: Teacher, accelerator: Accelerator
) -> tuple[SceneDistillation, Sequence[Phase]]:
    """Return the task of a run, and its phases."""
    task = build_task(config, teacher, accelerator)
    optimizer, lr_schedule, phi = optimizers(config, task)
    phases = task.phases(optimizer, lr_schedule=lr_schedule, phi=phi)
    return task, [replace(phase, lr_options=RATES[phase.name]) for phase in phases]


def best_start(
    config: Config, teacher: Teacher, inputs: Mapping[str, str | None], own: Mapping[str, Any],
    accelerator: Accelerator,
) -> int:  # fmt: skip
    """Return the seed that goes on, after all starts; its state is a checkpoint of the run in ``--out`` then.

    A run that was killed on the way goes on with the start it was at, since each is a run of its own.
    """
    check_identity(config, own, accelerator)
    known, checkpoints = read_starts(config), config.out / "checkpoints"
    begun = first_says(checkpoint.newest(checkpoints) is not None)
    if begun and first_says(known is not None):
        return first_says(known.chosen if known is not None else config.seed)
    if not begun:  # else the run is further, and only the file of the choice is gone
        if accelerator.is_main_process:
            forget_samples(config.out)
            note_identity(config.out, own)
        start_logging(accelerator, config, config.out, 0)
        close_log(accelerator)
    residuals = {}
    for number, seed in enumerate(seeds_of(config), 1):
        if accelerator.is_main_process:
            print(f"start {number} of {config.seeds}: seed {seed}, {config.start_steps:,} steps", flush=True)
        part = replace(config, seed=seed, seeds=1, out=folder_of(config, seed))
        residuals[seed] = run_start(part, teacher, inputs, accelerator)
    starts = Starts(config.start_steps, residuals, choose(residuals))
    part = replace(config, seed=starts.chosen, seeds=1, out=folder_of(config, starts.chosen))
    _, phases = build_run(part, teacher, accelerator)
    step = checkpoint.load(part.out / "checkpoints", phases, identity(part, accelerator, inputs))
    if accelerator.is_main_process:
        print("\n".join(starts.lines()), flush=True)
        write_starts(config.out, starts)
        if not begun:
            checkpoint.save(checkpoints, step, phases, own)
    accelerator.wait_for_everyone()
    return starts.chosen


def run_start(
    config: Config, teacher: Teacher, inputs: Mapping[str, str | None], accelerator: Accelerator
) -> float:
    """Train the first steps of a scene as a run of its own, and return its residual at a high noise level.

    A scene that was lost more than --max-rollbacks times has an infinite one.
    """
    task, phases = build_run(config, teacher, accelerator)
    own = identity(config, accelerator, inputs)
    first = resume(config, phases, accelerator, own)
    if first == 0 and accelerator.is_main_process:
        checkpoint.save(config.out / "checkpoints", 0, phases, own)
    accelerator.wait_for_everyone()
    probe, end = build_probe(config, task, teacher), config.start_steps
    try:
        if first < end:
            learn(config, task, phases, probe, accelerator, own, first, end=end)
    except FloatingPointError as error:
        if accelerator.is_main_process:
            tell_all([f"the start of seed {config.seed} is given up: {error}"])
        return math.inf
    finally:
        close_log(accelerator)
    residual = math.inf
    if accelerator.is_main_process:
        with working("probe of the scene"), accelerator.autocast():
            figures, shown = probe(end - 1, task.method(end - 1))
        residual = figures[NOISY]
        columns = config.batch_size if config.canvas else len(probe.views)
        save_samples(as_grid(shown, columns), config.out, end)
    return first_says(residual)


def log_starts(config: Config, accelerator: Accelerator) -> None:
    """Log the residuals of all starts at the step at which one of them went on."""
    if (starts := read_starts(config)) is not None:
        figures = {f"starts/residual_of_seed_{seed}": value for seed, value in starts.residuals.items()}
        log(accelerator, starts.steps, {name: x for name, x in figures.items() if math.isfinite(x)})


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
    if config.init_from:
        check_same_kind(config, Path(config.init_from))
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
    scene = first_scene(config).to(accelerator.device)
    subject = build_subject(config, scene, teacher, 1 if config.split_views else accelerator.num_processes)
    return SceneDistillation(subject=subject, method=method, num_draws=config.draws)


def learn(
    config: Config, task: SceneDistillation, phases: Sequence[Phase], probe: Probe, accelerator: Accelerator,
    own: Mapping[str, Any], first: int, *, end: int | None = None, last: bool = True,
) -> None:  # fmt: skip
    """Train to the end. A scene that is lost goes back to a checkpoint, at most --max-rollbacks times.

    With an ``end`` only to that step, of which all schedules stay those of the whole run, and without probes.
    """
    watcher = Watcher(config, task, probe, phases[0].optimizer)
    steps, previewed = (config.steps if end is None else end), bool(config.probe_every) and end is None

    def check(step: int, saving: bool) -> None:
        scene = task.subject.network
        if saving or step % CHECK_EVERY == 0:
            check_weights(scene, step)
            if isinstance(scene, Scene):
                check_opacity(opacity_all_round(scene), step)

    while True:
        rollbacks = num_rollbacks(phases[0].optimizer)
        try:
            fit(
                replace(config, seed=seed_after(config.seed, rollbacks), steps=steps), phases, task.batches,
                accelerator, own=own, first=first, rollout=task.rollout, check=check, last=last and end is None,
                watch=watcher.figures if end is None else lambda step: {},
                preview=watcher.pictures if previewed else None,
                columns=config.batch_size if config.canvas else len(probe.views), split=config.split_views,
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
    open_log(accelerator, first, config.out)
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
    facts = {**facts_of(config, config.out), "rollbacks": num_rollbacks(optimizer)}
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
