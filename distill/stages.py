"""The stages of a distillation: teacher pairs, a warm-up on them, distribution matching under a guard."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from distill.consistency import Consistency
from distill.guard import Guard, middle_layer
from distill.guarding import Guarded, SetbackError, set_rate
from distill.options import ALONG_PATHS, Config
from distill.outcome import draw_beside, outcome, write_outcome
from distill.parts import DISTANCES, Method, average_of, averaged, build_phases, teacher_pairs, uses_pairs
from distill.rates import Rates, range_test
from distill.regression import Pairs, Regression, teacher_batch
from distill.student import Student
from scorefield.models.teacher import Teacher
from scorefield.progress import progress
from scorefield.randomness import Rng
from scorefield.training import checkpoint
from scorefield.training.evaluate import Watch
from scorefield.training.loop import Phase, train
from scorefield.training.options import images_per_pass, passes_per_iteration
from scorefield.training.ranks import check_same
from scorefield.training.run import adamw, check_identity, cosine, fit, resume, save
from scorefield.training.sharding import whole_denoiser


@dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """What all stages of one run share.

    Attributes:
        config: settled; see ``parts.settled``.
        method: what the student learns from, without its regression.
        teacher: of the pairs.
        accelerator: of all stages.
        batches: of the method.
        own: identity of the run, which its checkpoints belong to.
    """

    config: Config
    method: Method
    teacher: Teacher
    accelerator: Accelerator
    batches: Callable[[Rng], Any]
    own: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints."""
        return self.config.out / "checkpoints"

    def pairs(self, number: int, purpose: str) -> Pairs:
        """Return pairs of the teacher, made or found on disk."""
        return teacher_pairs(
            self.config, self.method.teacher, self.teacher, self.accelerator, number=number,
            identity=self.own["teacher"], purpose=purpose, keep=self.method.student.times[1:],
        )  # fmt: skip


def distil(
    stages: Stages, *, columns: int, preview: Callable[[Student], Tensor], watch: Callable[[Student], Watch]
) -> Student:
    """Run all stages, or what is left of them, and return the weights to save: the best where there is a guard.

    Those of networks in pieces are whole on the first rank, which saves them.
    """
    config, method = stages.config, stages.method
    check_identity(config, stages.own, stages.accelerator)  # before the long work of making pairs
    regression = make_regression(stages)
    if config.needs_images and config.reals == "teacher" and regression is not None:
        pairs, device, number = regression.pairs, stages.accelerator.device, images_per_pass(config)
        stages = replace(stages, batches=lambda rng: teacher_batch(pairs, number, rng, device))
    if config.regression_weight:
        stages = replace(stages, method=replace(method, regression=regression))
    phases = build_phases(config, stages.method)
    average = Student(replace(stages.teacher.denoiser, network=averaged(phases[0])), method.student.times)
    guard = make_guard(stages)
    evaluation = watch(average)  # or it says why not, before anything is written
    guarded = None
    if guard is not None:
        guarded = Guarded(
            guard=guard, student=average, phases=phases, accelerator=stages.accelerator, every=config.guard_every,
            steps=config.steps, max_setbacks=config.max_setbacks, goes_back=config.method not in ALONG_PATHS,
        )  # fmt: skip
    begun = checkpoint.newest(stages.folder) is not None
    # All of them, before the first one saves anything: who came late would find its checkpoint and not take part.
    fix = "Let --out be a folder that all machines share."
    check_same("whether there is a checkpoint", int(begun), fix, stages.accelerator)
    if not begun:
        begin(stages, regression, phases, guarded)
    first = resume(config, phases, stages.accelerator, stages.own)
    if guarded is not None and guarded.best is not None and not first:
        guarded.log(*guarded.best)  # the log was not open when it looked
    if guarded is None:
        match(stages, phases, first, columns, lambda: preview(average), evaluation)
    else:
        match_guarded(stages, phases, first, columns, lambda: preview(average), evaluation, guarded)
    gathered = replace(average, denoiser=whole_denoiser(average.denoiser))
    report = outcome(config, gathered, guarded)
    stages.accelerator.end_training()
    if stages.accelerator.is_main_process:
        write_outcome(report, config.out)
        if guarded is not None:
            with stages.accelerator.autocast():
                draw_beside(guarded.guard, gathered, stages.teacher, config.out)
    return gathered


def make_regression(stages: Stages) -> Regression | None:
    """Regression on teacher pairs, where the warm-up or the distribution matching uses any."""
    config = stages.config
    if not uses_pairs(config):
        return None
    pairs = stages.pairs(config.num_pairs, "pairs")
    distance = DISTANCES[config.regression_loss]
    number = images_per_pass(config)
    return Regression(pairs=pairs, weight=config.regression_weight, distance=distance, batch=number)


def make_guard(stages: Stages) -> Guard | None:
    """Return a guard with held-out pairs; none at --guard-images 0."""
    config, teacher = stages.config, stages.teacher
    if not config.guard_images:
        return None
    layer = config.bottleneck or middle_layer(teacher.denoiser, teacher.shape, teacher.cond(torch.zeros(1).long()))
    pairs = stages.pairs(config.guard_images, "guard")
    return Guard(
        teacher=teacher.denoiser,
        layer=layer,
        pairs=pairs,
        batch=config.batch_size,
        at_once=images_per_pass(config),
    )


def begin(stages: Stages, regression: Regression | None, phases: list[Phase], guarded: Guarded | None) -> None:
    """Everything before the first iteration, and the checkpoint of step 0."""
    config = stages.config
    rates = measured_rates(stages, regression)
    if regression is not None and config.warmup_steps:
        warm_up(stages, regression, phases[0], rates.warmup, None if guarded is None else guarded.guard)
    given = (config.student_lr or rates.student, config.fake_lr or rates.fake)
    for phase, rate in zip(phases, given, strict=False):
        set_rate(phase, rate)
    for fake in phases[1:]:
        follow_student(stages, fake)
    # A student along paths that has learned nothing is its teacher in one step: it gets worse before it is better.
    untrained = config.method in ALONG_PATHS and not config.warmup_steps and not config.init_from
    kept = () if guarded is None or untrained else guarded(0)
    save(stages.folder, 0, phases, stages.own, stages.accelerator, also=kept)
    stages.accelerator.wait_for_everyone()


def measured_rates(stages: Stages, regression: Regression | None) -> Rates:
    """Return the rates of all stages: given ones, or fractions of what a range test finds. Says what it found."""
    config, method, accelerator = stages.config, stages.method, stages.accelerator
    alone = isinstance(method, Consistency)
    if config.student_lr and (alone or config.fake_lr) and (config.warmup_lr or not config.warmup_steps):
        return Rates(config.warmup_lr, config.student_lr, config.fake_lr)
    warmup = config.warmup_lr
    if not warmup:
        network, loss = tested(stages, regression)
        joined = partial(accelerator.reduce, reduction="mean") if config.shard > 1 else torch.clone
        with accelerator.autocast():
            warmup = range_test(network, loss, clip_norm=config.clip_norm, joined=joined).rate
        warmup = float(accelerator.reduce(torch.tensor(warmup, device=accelerator.device), "mean"))
    rates = Rates.along_paths(warmup) if alone else Rates.from_warmup(warmup)
    if accelerator.is_main_process:
        fake = "" if alone else f", fake score {config.fake_lr or rates.fake:.2g}"
        student = config.student_lr or rates.student
        tqdm.write(f"learning rates: warm-up {warmup:.2g}, student {student:.2g}{fake}", file=sys.stderr)
    return rates


def tested(stages: Stages, regression: Regression | None) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the network and the loss of one batch that the range test is made with."""
    config, method, fixed = stages.config, stages.method, Rng(stages.config.seed, 0)
    student = method.student.denoiser.network
    if regression is not None and (config.warmup_steps or config.regression_weight):
        return student, lambda: regression.loss(method.student.unwrapped(), fixed)
    batch = method.rollout(stages.batches(fixed), (), fixed)
    if isinstance(method, Consistency):  # each rank stops where its own loss blows up
        own = replace(method, student=method.student.unwrapped())
        return student, lambda: own.denoising_loss(batch, fixed)
    alone = replace(method, fake=method.fake.unwrapped())
    return method.fake.network, lambda: alone.fake_loss(batch, fixed)["loss"]


def warm_up(stages: Stages, regression: Regression, student: Phase, rate: float, guard: Guard | None) -> None:
    """Start the student from regression on teacher pairs: it then only has to be sharpened, not found.

    This is a run of its own in ``--out/warm-up``: it resumes, and its curves lie there.
    """
    config, method, accelerator = stages.config, stages.method, stages.accelerator
    assert config.warmup_steps
    network = student.network
    optimizer = adamw(network, rate)
    phase = Phase(
        name="warm-up", network=network, optimizer=optimizer, ema=average_of(network, config),
        loss=lambda batch, rng: {"loss": regression.loss(method.student, rng)},
        lr_schedule=cosine(optimizer, config.warmup_steps, warmup=20),
    )  # fmt: skip
    average = Student(replace(method.student.denoiser, network=averaged(phase)), method.student.times)
    part = replace(config, out=config.out / "warm-up", steps=config.warmup_steps)
    own = {**stages.own, "stage": "warm-up", "steps": config.warmup_steps}
    first = resume(part, [phase], accelerator, own)
    every = max(1, config.warmup_steps // 8)

    def watch(step: int) -> dict[str, float]:
        due = guard is not None and (step % every == 0 or step == part.steps)
        return guard.look(average).figures() if guard is not None and due else {}

    fit(part, [phase], lambda rng: None, accelerator, own=own, first=first, watch=watch, last=False)
    if phase.ema is not None and student.ema is not None:
        phase.ema.source.load_state_dict(phase.ema.network.state_dict())
        student.ema.reset()


def follow_student(stages: Stages, fake: Phase) -> None:
    """Let the fake score learn the student's images before it is asked about them."""
    config, accelerator = stages.config, stages.accelerator
    if not config.fake_warmup:
        return
    phase = replace(fake, lr_schedule=None)
    for group in fake.optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    reports = train(
        [phase], stages.batches, accelerator, rollout=stages.method.rollout, steps=config.fake_warmup,
        accumulate=passes_per_iteration(config), clip_norm=config.clip_norm, seed=config.seed + 1,
    )  # fmt: skip
    for _ in progress(reports, "steps of the fake score", config.fake_warmup, unit="step"):
        pass
    set_rate(fake, fake.optimizer.param_groups[0]["initial_lr"])


def match(
    stages: Stages, phases: list[Phase], first: int, columns: int, preview: Callable[[], Tensor], watch: Watch,
    keep: Callable[[int], tuple[int, ...]] = lambda step: (),
) -> None:  # fmt: skip
    """Distribution matching from iteration ``first`` to the end."""
    fit(
        stages.config, phases, stages.batches, stages.accelerator, own=stages.own, first=first,
        rollout=stages.method.rollout, columns=columns, preview=preview, watch=watch, keep=keep, last=False,
    )  # fmt: skip


def match_guarded(
    stages: Stages, phases: list[Phase], first: int, columns: int, preview: Callable[[], Tensor], watch: Watch,
    guarded: Guarded,
) -> None:  # fmt: skip
    """Distribution matching that goes back where the student drifts, and ends with its best weights."""
    if guarded.ended and first < stages.config.steps and stages.accelerator.is_main_process:
        tqdm.write(
            f"the run ended at step {first}, after {guarded.setbacks} setbacks; it goes on with --max-setbacks "
            f"above {guarded.setbacks}", file=sys.stderr,
        )  # fmt: skip
    on = not guarded.ended  # at the last step, too: a kill may have come before it was looked at
    while on:
        try:
            match(stages, phases, first, columns, preview, watch, keep=guarded)
            on = False
        except SetbackError as setback:
            first = setback.step
            if guarded.setbacks >= guarded.max_setbacks:
                guarded.end(stages.folder, stages.own, first, setback)
            else:
                guarded.go_back(stages.folder, stages.own, setback)
            on = not guarded.ended and first < stages.config.steps
    guarded.restore(stages.folder, stages.own)
    best = guarded.best
    if best is not None and stages.accelerator.is_main_process:
        print(f"best weights: step {best[0]}, {best[1].distance:.4g} from the teacher in its own features")
