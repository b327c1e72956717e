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
from typing import Any

import torch
from accelerate import Accelerator
from command import RunOptions, check_numbers, check_run, fingerprint, identity, run, show_plan
from fitting import adamw, cosine, fit, prepare, progress, resume, start
from images import DataOptions, load_images
from monitoring import EvalOptions, check_evaluation, watcher
from networks import Teacher, build_network, load_teacher, probe_bottleneck
from torch import nn

from distill.adversarial import Critic, discriminator_head
from distill.dmd import DMD, GAN, dmd_weight
from distill.regression import Regression, make_pairs
from distill.student import Student, even_times, save_student
from score import Denoiser, freeze, guided
from score.gradient import karras_weight
from score.randomness import Rng, shuffled
from score.sampling import grid
from score.training import EMA, Phase, train


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, DataOptions, EvalOptions):
    """Distil a diffusion teacher into a one-step or few-step generator (DMD, DMD2)."""

    teacher: str = "runs/teacher/teacher"
    """Folder that train_teacher.py wrote, folder of a diffusers UNet2DModel pipeline, or module:function."""
    out: Path = Path("runs/student")
    """Folder for checkpoints, TensorBoard logs and the finished student."""
    steps: int = 2000
    """Iterations: updates of the fake score. The student takes one in --student-every."""
    student_every: int = 2
    """Fake-score updates per student update (DMD2: 5). The smallest that stays stable learns fastest."""
    num_steps: int = 1
    """Steps of the student: 1, or a few with backward simulation."""
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
    """Teacher pairs for the regressions."""
    pair_steps: int = 50
    """DDIM steps of each pair."""
    ema_decay: float = 0.99
    """Of the student's moving average, ticked on student updates; it is what is saved."""
    bottleneck: str | None = None
    """Submodule whose output the critic reads. None: the network's own choice, or its mid_block."""


def main(config: Config) -> Path:
    """Distil and return the folder of the finished student."""
    check(config)
    teacher, data = load_teacher(config.teacher), load_images(config)
    if teacher.times:
        raise ValueError(
            f"--teacher {config.teacher} is a student, which knows no other noise level. Pass its teacher."
        )
    if data.shape != teacher.shape or data.num_classes > max(1, teacher.num_classes):
        raise ValueError(
            f"the teacher makes images {teacher.shape} of {teacher.num_classes} classes; --data holds "
            f"{data.shape} of {data.num_classes}. Use the teacher's own data, and its --resolution."
        )
    check_evaluation(config, data)
    torch.manual_seed(config.seed)
    student_net, fake_net = build_roles(config, teacher)
    freeze(teacher.denoiser.network)
    if config.dry_run:
        followed, frozen = freeze(copy.deepcopy(student_net)), teacher.denoiser.network
        roles = {"teacher": frozen, "student": student_net, "its average": followed, "fake": fake_net}
        show_plan(config, roles, {"student": config.steps // config.student_every, "fake": config.steps})
        return config.out
    accelerator = start(config)
    teacher.denoiser.network.to(accelerator.device)
    networks = (prepare(network, config, accelerator) for network in (student_net, fake_net))
    method = build_method(config, teacher, *networks)

    def batches(rng: Rng) -> dict[str, Any]:
        batch = data.batch(shuffled(len(data), config.batch_size, rng), rng("augment"), accelerator.device)
        return {"cond": teacher.cond(batch.labels), "real": batch.images, "size": len(batch.labels)}

    method.check(batches(Rng(config.seed, 0)))
    phases = build_phases(config, method)
    ema = phases[0].ema
    assert ema is not None
    weights = fingerprint(teacher.denoiser.network.parameters())
    inputs = {"data": fingerprint([data.images, data.labels]), "teacher": weights}
    own = identity(config, accelerator, inputs)
    first = resume(config, phases, accelerator, own)
    if first == 0 and config.warmup_steps:
        warm_up(config, method, accelerator, teacher)
        ema.reset()
    average = Student(replace(teacher.denoiser, network=ema.network), method.student.times)
    sampled = replace(teacher, denoiser=average.denoiser, times=average.times)
    watch = watcher(
        config, sampled, data, teacher=teacher, save=lambda to: save_student(average, to, teacher.facts)
    )
    fit(
        config, phases, batches, accelerator, own=own, first=first, rollout=method.rollout,
        columns=data.num_classes, preview=lambda: preview(average, teacher),
        watch=watch,
    )  # fmt: skip
    folder = config.out / "student"
    if accelerator.is_main_process:
        save_student(average, folder, teacher.facts)
    return folder


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range or contradict each other."""
    check_run(config)
    check_numbers(
        config,
        positive=("student_every", "num_steps", "student_lr", "fake_lr", "warmup_lr", "num_pairs", "pair_steps"),
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


def build_roles(config: Config, teacher: Teacher) -> tuple[nn.Module, nn.Module]:
    """Student and fake score as copies of the teacher, dropout off.

    The fake score of an MLP also learns to tell a few-step student's steps apart; the GAN term adds a head.
    """
    student = copy.deepcopy(teacher.denoiser.network).eval()
    fake = build_network(teacher.facts, num_steps=fake_steps(config, teacher)).eval()
    lacking, unknown = fake.load_state_dict(teacher.denoiser.network.state_dict(), strict=False)
    if unknown or not set(lacking) <= {"step.weight", "network.step.weight"}:
        raise ValueError(f"the fake score is not the teacher's network: {lacking} missing, {unknown} unknown.")
    if config.gan_weight > 0:
        name, channels, size = probe_bottleneck(teacher, config.bottleneck)
        fake = Critic(fake, name, discriminator_head(channels, size))
    return student.requires_grad_(True), fake.requires_grad_(True)


def fake_steps(config: Config, teacher: Teacher) -> int:
    """Steps that the fake score can be told, 0 where its network cannot be told."""
    return config.num_steps if config.num_steps > 1 and teacher.facts["network"] == "mlp" else 0


def build_method(config: Config, teacher: Teacher, student: nn.Module, fake: nn.Module) -> DMD:
    """The recipe of this script as a :class:`distill.dmd.DMD`."""
    target = guided(teacher.denoiser, config.guidance, teacher.cond(torch.tensor([teacher.num_classes])))
    schedule = teacher.denoiser.schedule
    gan = GAN(generator_weight=config.gan_weight, critic_weight=config.critic_weight)
    sigma_data = teacher.facts.get("sigma_data")
    return DMD(
        teacher=target,
        student=Student(replace(teacher.denoiser, network=student), even_times(schedule, config.num_steps)),
        fake=replace(teacher.denoiser, network=fake),
        shape=teacher.shape,
        fake_weight=karras_weight(sigma_data) if sigma_data else None,
        step_key="step" if fake_steps(config, teacher) else None,
        student_every=config.student_every,
        weight=dmd_weight(config.alpha_in_gradient),
        gan=gan if config.gan_weight > 0 else None,
        regression=teacher_pairs(config, target, teacher) if config.regression_weight > 0 else None,
    )


def teacher_pairs(config: Config, target: Denoiser, teacher: Teacher) -> Regression:
    """Pairs of the (guided) teacher in 50 DDIM steps, all classes alike."""
    labels = teacher.cond(torch.arange(config.num_pairs) % max(1, teacher.num_classes))
    times = grid(target.schedule, config.pair_steps)
    device = next(teacher.denoiser.network.parameters()).device
    pairs = make_pairs(
        target, labels, num=config.num_pairs, shape=teacher.shape, times=times, seed=config.seed, device=device
    )
    return Regression(pairs=pairs, weight=config.regression_weight, batch=config.batch_size)


def warm_up(config: Config, method: DMD, accelerator: Accelerator, teacher: Teacher) -> None:
    """Start the student from regression on teacher pairs: it then only has to be moved, not found."""
    network = method.student.denoiser.network
    regression = method.regression or teacher_pairs(config, method.teacher, teacher)
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
    student = adamw(method.student.denoiser.network, config.student_lr, betas=(0.0, 0.99), kind=config.optimizer)
    fake = adamw(method.fake.network, config.fake_lr, betas=(0.0, 0.99), kind=config.optimizer)
    updates = max(1, config.steps // config.student_every)
    return method.phases(
        student, fake, student_ema=EMA(method.student.denoiser.network, config.ema_decay),
        student_lr=cosine(student, updates), fake_lr=cosine(fake, config.steps, floor=0.1),
    )  # fmt: skip


def preview(student: Student, teacher: Teacher, rows: int = 4) -> torch.Tensor:
    """A few samples of every class, always from the same noise."""
    device = next(student.denoiser.network.parameters()).device
    labels = torch.arange(max(1, teacher.num_classes)).repeat(rows).to(device)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(labels), *teacher.shape, generator=generator).to(device)
    return student.sample(noise, teacher.cond(labels), generator=generator)


if __name__ == "__main__":
    run(main, Config, __doc__)
