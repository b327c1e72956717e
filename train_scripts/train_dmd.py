"""Distil a teacher of train_teacher.py into a one-step or few-step generator by distribution matching (DMD2).

    python train_scripts/train_dmd.py --teacher runs/teacher/teacher --out runs/student
    accelerate launch train_scripts/train_dmd.py --teacher ... --out ...    # several GPUs

The student and the fake score start from the teacher. In each step the fake score learns the student's images; in
every --student-every-th the student follows the difference of teacher and fake score first. Stopped runs resume:
run the same command again.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from command import (
    adamw,
    check_numbers,
    check_out,
    cosine,
    fingerprint,
    fit,
    identity,
    make_accelerator,
    progress,
    resume,
    run,
    show_plan,
)
from digits import load_images
from torch import nn
from train_teacher import build_network, load_teacher

from distill.adversarial import Critic, discriminator_head
from distill.dmd import DMD, GAN, dmd_weight
from distill.regression import Regression, make_pairs
from distill.student import Student, even_times, save_student
from score import Denoiser, KarrasPreconditioning, NetworkDenoiser, freeze, guided
from score.gradient import karras_weight
from score.randomness import Rng, shuffled
from score.sampling import grid
from score.training import EMA, Phase, train


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distil a diffusion teacher into a one-step or few-step generator (DMD, DMD2)."""

    teacher: Path = Path("runs/teacher/teacher")
    """Folder that train_teacher.py wrote."""
    out: Path = Path("runs/student")
    """Folder for checkpoints, TensorBoard logs and the finished student."""
    data: Path | None = None
    """npz file with images and labels, for the GAN term and the label frequencies. None: 900 of the digits."""
    steps: int = 2000
    """Iterations: updates of the fake score. The student takes one in --student-every."""
    student_every: int = 2
    """Fake-score updates per student update (DMD2: 5). The smallest that stays stable learns fastest."""
    num_steps: int = 1
    """Steps of the student: 1, or a few with backward simulation."""
    batch_size: int = 256
    """Images per step and process."""
    student_lr: float = 3e-4
    """Peak learning rate of the student: 100 updates of warm-up, then cosine to zero."""
    fake_lr: float = 3e-4
    """Peak learning rate of the fake score, whose cosine ends at a tenth."""
    guidance: float = 1.0
    """Scale of classifier-free guidance of the teacher; 1 means none."""
    alpha_in_gradient: bool = False
    """Keep the factor alpha(t) of the DMD paper's gradient, which its code drops. No difference for EDM."""
    gan_weight: float = 0.01
    """Weight of the student's adversarial term; 0: the student never sees real images."""
    critic_weight: float = 0.01
    """Weight of the critic's loss beside the fake score's."""
    warmup_steps: int = 500
    """Steps of regression on teacher pairs before the distillation; 0 means none. One-step students only."""
    warmup_lr: float = 1e-3
    """Peak learning rate of the warm-up."""
    regression_weight: float = 0.0
    """Weight of DMD's regression on teacher pairs beside the distillation; 0 means none."""
    num_pairs: int = 5000
    """Teacher pairs for the regressions, made in 50 steps each."""
    ema_decay: float = 0.99
    """Of the student's moving average, ticked on student updates; it is what is saved."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision; weights stay float32."""
    seed: int = 0
    """Of every random draw."""
    log_every: int = 50
    """Steps between scalars."""
    save_every: int = 1000
    """Steps between checkpoints and sample grids."""
    dry_run: bool = False
    """Print the resolved config and the bytes per role, and stop."""


def main(config: Config) -> Path:
    """Distil and return the folder of the finished student."""
    check(config)
    check_out(config.out)
    teacher, facts = load_teacher(config.teacher)
    data = load_images(config.data)
    if list(data.images.shape[1:]) != facts["shape"] or int(data.labels.max()) >= facts["num_classes"]:
        raise ValueError(
            f"the teacher makes images {facts['shape']} of {facts['num_classes']} classes; --data holds "
            f"{list(data.images.shape[1:])} and labels to {int(data.labels.max())}. Use the teacher's own data."
        )
    torch.manual_seed(config.seed)
    student_net, fake_net = build_roles(config, teacher, facts)
    freeze(teacher.network)
    if config.dry_run:
        followed = freeze(copy.deepcopy(student_net))
        roles = {"teacher": teacher.network, "student": student_net, "its average": followed, "fake": fake_net}
        show_plan(config, roles)
        return config.out
    accelerator = make_accelerator(config.out, config.precision)
    teacher.network.to(accelerator.device)
    method = build_method(config, teacher, accelerator.prepare(student_net), accelerator.prepare(fake_net), facts)

    def batches(rng: Rng) -> dict[str, Any]:
        chosen = shuffled(len(data.images), config.batch_size, rng)
        labels, real = data.labels[chosen].to(accelerator.device), data.images[chosen].to(accelerator.device)
        return {"cond": {"class_labels": labels}, "real": real}

    method.check(batches(Rng(config.seed, 0)))
    phases = build_phases(config, method)
    ema = phases[0].ema
    assert ema is not None
    inputs = {
        "data": fingerprint([data.images, data.labels]), "teacher": fingerprint(teacher.network.parameters()),
    }  # fmt: skip
    own = identity(config, accelerator, inputs)
    start = resume(config, phases, accelerator, own)
    if start == 0 and config.warmup_steps:
        warm_up(config, method, accelerator, teacher, facts)
        ema.reset()
    average = Student(replace(teacher, network=ema.network), method.student.times)
    fit(
        config, phases, batches, accelerator, own=own, start=start, rollout=method.rollout,
        columns=facts["num_classes"], preview=lambda: preview(average, facts),
    )  # fmt: skip
    folder = config.out / "student"
    if accelerator.is_main_process:
        save_student(average, folder, facts)
    return folder


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range or contradict each other."""
    check_numbers(
        config,
        positive=("steps", "student_every", "num_steps", "batch_size", "student_lr", "fake_lr", "warmup_lr",
                  "num_pairs", "log_every", "save_every"),
        not_negative=("guidance", "gan_weight", "critic_weight", "warmup_steps", "regression_weight"),
        shares=("ema_decay",),
    )  # fmt: skip
    if config.steps < config.student_every:
        raise ValueError(
            f"--steps {config.steps} end before the student's first update, which comes at --student-every "
            f"{config.student_every}."
        )
    if config.num_steps > 1 and (config.warmup_steps or config.regression_weight):
        raise ValueError(
            f"a student of --num-steps {config.num_steps} is no function of its first noise: regression on pairs "
            "needs --num-steps 1. Pass --warmup-steps 0 --regression-weight 0."
        )


def build_roles(config: Config, teacher: NetworkDenoiser, facts: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Student and fake score as copies of the teacher, dropout off.

    The fake score also learns to tell a few-step student's steps apart, and the GAN term adds a critic's head.
    """
    student = copy.deepcopy(teacher.network).eval()
    network = build_network(facts, num_steps=config.num_steps if config.num_steps > 1 else 0)
    fake: nn.Module = KarrasPreconditioning(network).eval()
    lacking, unknown = fake.load_state_dict(teacher.network.state_dict(), strict=False)
    if unknown or not set(lacking) <= {"network.step.weight"}:
        raise ValueError(f"the fake score is not the teacher's network: {lacking} missing, {unknown} unknown.")
    if config.gan_weight > 0:
        fake = Critic(fake, f"network.{network.bottleneck}", discriminator_head(facts["width"]))
    return student.requires_grad_(True), fake.requires_grad_(True)


def build_method(
    config: Config, teacher: NetworkDenoiser, student: nn.Module, fake: nn.Module, facts: dict[str, Any]
) -> DMD:
    """The recipe of this script as a :class:`distill.dmd.DMD`."""
    schedule = teacher.schedule
    target = guided(teacher, config.guidance, {"class_labels": torch.tensor([facts["num_classes"]])})
    gan = GAN(generator_weight=config.gan_weight, critic_weight=config.critic_weight)
    return DMD(
        teacher=target,
        student=Student(replace(teacher, network=student), even_times(schedule, config.num_steps)),
        fake=replace(teacher, network=fake),
        shape=tuple(facts["shape"]),
        fake_weight=karras_weight(teacher.network.sigma_data),  # type: ignore[arg-type]
        step_key="step" if config.num_steps > 1 else None,
        student_every=config.student_every,
        weight=dmd_weight(config.alpha_in_gradient),
        gan=gan if config.gan_weight > 0 else None,
        regression=teacher_pairs(config, target, teacher, facts) if config.regression_weight > 0 else None,
    )


def teacher_pairs(config: Config, target: Denoiser, teacher: NetworkDenoiser, facts: dict[str, Any]) -> Regression:
    """Pairs of the guided teacher ``target`` in 50 DDIM steps, all classes alike; made where ``teacher`` is."""
    device = next(teacher.network.parameters()).device
    labels = {"class_labels": torch.arange(config.num_pairs) % facts["num_classes"]}
    times = grid(target.schedule, 50)
    pairs = make_pairs(target, labels, shape=facts["shape"], times=times, seed=config.seed, device=device)
    return Regression(pairs=pairs, weight=config.regression_weight, batch=config.batch_size)


def warm_up(
    config: Config, method: DMD, accelerator: Accelerator, teacher: NetworkDenoiser, facts: dict[str, Any]
) -> None:
    """Start the student from regression on teacher pairs: it then only has to be moved, not found."""
    network = method.student.denoiser.network
    regression = method.regression or teacher_pairs(config, method.teacher, teacher, facts)
    optimizer = adamw(network, config.warmup_lr)
    phase = Phase(
        name="warm-up", network=network, optimizer=optimizer, ema=EMA(network, config.ema_decay),
        loss=lambda batch, rng: {"loss": regression.loss(method.student, rng)},
        lr_schedule=cosine(optimizer, config.warmup_steps, warmup=20),
    )  # fmt: skip
    reports = train([phase], lambda rng: None, accelerator, steps=config.warmup_steps, seed=config.seed)
    for _ in progress(reports, "warm-up", config.warmup_steps, accelerator):
        pass
    assert phase.ema is not None
    phase.ema.source.load_state_dict(phase.ema.network.state_dict())


def build_phases(config: Config, method: DMD) -> list[Phase]:
    """AdamW without first-moment memory (beta1 = 0), as the gradient's direction changes under the student."""
    student = adamw(method.student.denoiser.network, config.student_lr, betas=(0.0, 0.99))
    fake = adamw(method.fake.network, config.fake_lr, betas=(0.0, 0.99))
    updates = max(1, config.steps // config.student_every)
    return method.phases(
        student, fake, student_ema=EMA(method.student.denoiser.network, config.ema_decay),
        student_lr=cosine(student, updates), fake_lr=cosine(fake, config.steps, floor=0.1),
    )  # fmt: skip


def preview(student: Student, facts: dict[str, Any], rows: int = 4) -> torch.Tensor:
    """A few samples of every class, always from the same noise."""
    device = next(student.denoiser.network.parameters()).device
    labels = torch.arange(facts["num_classes"]).repeat(rows).to(device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(labels), *facts["shape"], generator=generator).to(device)
    return student.sample(noise, {"class_labels": labels}, generator=generator)


if __name__ == "__main__":
    run(main, Config, __doc__)
