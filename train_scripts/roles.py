"""The parts of a distillation, built from the options of ``train_dmd.py``."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from distill_options import Config
from fitting import adamw, cosine, progress
from networks import Teacher, another_network, probe_bottleneck
from prompted import PromptedTeacher
from torch import nn

from distill.adversarial import Critic, discriminator_head
from distill.backbone import offload_state, shared_backbone
from distill.dmd import DMD, GAN, dmd_weight
from distill.export import lcm_times
from distill.regression import Regression, make_pairs
from distill.student import Student, even_times
from score import Denoiser, freeze
from score.gradient import karras_weight
from score.randomness import derived_generator
from score.ranks import unwrap
from score.sampling import grid
from score.schedule import Schedule
from score.training import EMA, Phase, train


def plan_of_pairs(config: Config) -> str:
    """What ``--dry-run`` says about regression."""
    if not config.warmup_steps and not config.regression_weight:
        return ""
    pairs = f"{config.num_pairs:,} teacher pairs of {config.pair_steps} network calls each"
    return f"{pairs}, {config.warmup_steps:,} warm-up updates of the student" if config.warmup_steps else pairs


def build_roles(config: Config, teacher: Teacher) -> tuple[nn.Module, nn.Module]:
    """Student and fake score as copies of the teacher, dropout off.

    The fake score of an MLP also learns to tell a few-step student's steps apart; the GAN term adds a head.
    """
    student = copy.deepcopy(teacher.denoiser.network).eval()
    fake = another_network(teacher, num_steps=fake_steps(config, teacher.facts)).eval()
    lacking, unknown = fake.load_state_dict(teacher.denoiser.network.state_dict(), strict=False)
    if unknown or not set(lacking) <= {"step.weight", "network.step.weight"}:
        raise ValueError(f"the fake score is not the teacher's network: {lacking} missing, {unknown} unknown.")
    if config.gan_weight > 0:
        name, channels, size = probe_bottleneck(teacher, config.bottleneck)
        fake = Critic(fake, name, discriminator_head(channels, size))
    return student.requires_grad_(True), fake.requires_grad_(True)


def build_text_roles(config: Config, teacher: PromptedTeacher) -> tuple[nn.Module, nn.Module]:
    """Student and fake score of a text-to-image teacher: copies of it, or LoRAs on its own weights."""
    network, device = teacher.denoiser.network, teacher.source.device
    name, head = None, None
    if config.gan_weight > 0:
        name, channels, size = probe_bottleneck(teacher, config.bottleneck)
        head = discriminator_head(channels, size).to(device)
    if config.lora:
        student, fake = shared_backbone(
            teacher.denoiser, rank=config.lora_rank, alpha=config.lora_alpha or None, bottleneck=name, head=head,
            checkpointing=config.gradient_checkpointing, generator=derived_generator("lora", config.seed),
        )  # fmt: skip
        return student.network, fake.network
    # Weights that learn are float32, whatever the teacher's precision.
    copies = [copy.deepcopy(network).float().requires_grad_(True) for _ in range(2)]
    return copies[0], copies[1] if name is None or head is None else Critic(copies[1], name, head)


def fake_steps(config: Config, facts: Mapping[str, Any]) -> int:
    """Steps that the fake score can be told, 0 where its network cannot be told."""
    return config.num_steps if config.num_steps > 1 and facts.get("network") == "mlp" else 0


def planned_roles(config: Config, teacher: nn.Module, student: nn.Module, fake: nn.Module) -> dict[str, nn.Module]:
    """The networks that a run holds, for ``--dry-run``."""
    followed = {"its average": freeze(copy.deepcopy(student))} if config.ema_decay else {}
    return {"teacher": teacher, "student": student, **followed, "fake": fake}


def build_method(config: Config, teacher: Teacher | PromptedTeacher, student: nn.Module, fake: nn.Module) -> DMD:
    """The recipe of this script as a :class:`distill.dmd.DMD`."""
    target = teacher.guided(config.guidance)
    gan = GAN(generator_weight=config.gan_weight, critic_weight=config.critic_weight)
    facts = teacher.facts if isinstance(teacher, Teacher) else {}
    sigma_data, schedule = facts.get("sigma_data"), teacher.denoiser.schedule
    return DMD(
        teacher=target,
        student=Student(replace(teacher.denoiser, network=student), student_times(config, schedule)),
        fake=replace(teacher.denoiser, network=fake),
        shape=teacher.shape,
        fake_weight=karras_weight(sigma_data) if sigma_data else None,
        step_key="step" if fake_steps(config, facts) else None,
        student_every=config.student_every,
        weight=dmd_weight(config.alpha_in_gradient),
        gan=gan if config.gan_weight > 0 else None,
    )


def with_pairs(config: Config, method: DMD, teacher: Teacher | PromptedTeacher) -> DMD:
    """The method with DMD's regression where it is asked for: long work, for which all else is checked first."""
    if not config.regression_weight:
        return method
    return replace(method, regression=teacher_pairs(config, method.teacher, teacher))


def student_times(config: Config, schedule: Schedule) -> tuple[float, ...]:
    """When the student is asked: as it is told, or evenly, as its kind is sampled."""
    spread = lcm_times if config.prompts else even_times
    return config.times or spread(schedule, config.num_steps)


def teacher_pairs(config: Config, target: Denoiser, teacher: Teacher | PromptedTeacher) -> Regression:
    """Pairs of the (guided) teacher in --pair-steps DDIM steps, all classes alike; every rank makes all of them.

    Without gradients there is room for eight times the batch of the training.
    """
    numbers = torch.arange(config.num_pairs) % max(1, teacher.num_classes)
    parts = [{name: value.cpu() for name, value in teacher.cond(part).items()} for part in numbers.split(250)]
    labels = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    times = grid(target.schedule, config.pair_steps)
    device = next(teacher.denoiser.network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
        pairs = make_pairs(
            target, labels, num=config.num_pairs, shape=teacher.shape, times=times, seed=config.seed,
            batch=min(256, 8 * config.batch_size), device=device,
        )  # fmt: skip
    return Regression(pairs=pairs, weight=config.regression_weight, batch=config.batch_size)


def warm_up(
    config: Config, method: DMD, student: Phase, accelerator: Accelerator, teacher: Teacher | PromptedTeacher
) -> None:
    """Start the student from regression on teacher pairs: it then only has to be moved, not found."""
    network = student.network
    regression = method.regression or teacher_pairs(config, method.teacher, teacher)
    optimizer = adamw(network, config.warmup_lr)
    phase = Phase(
        name="warm-up", network=network, optimizer=optimizer, ema=average_of(network, config),
        loss=lambda batch, rng: {"loss": regression.loss(method.student, rng)},
        lr_schedule=cosine(optimizer, config.warmup_steps, warmup=20),
    )  # fmt: skip
    reports = train([phase], lambda rng: None, accelerator, steps=config.warmup_steps, seed=config.seed)
    for _ in progress(reports, "warm-up", config.warmup_steps, accelerator):
        pass
    if phase.ema is not None and student.ema is not None:
        phase.ema.source.load_state_dict(phase.ema.network.state_dict())
        student.ema.reset()


def average_of(network: nn.Module, config: Config) -> EMA | None:
    """The network's moving average; none at --ema-decay 0, where the network itself is what is saved."""
    return EMA(network, config.ema_decay) if config.ema_decay else None


def averaged(phase: Phase) -> nn.Module:
    """What is saved of a phase: the average of its network, or where there is none the network itself."""
    return unwrap(phase.network) if phase.ema is None else phase.ema.network


def build_phases(config: Config, method: DMD) -> list[Phase]:
    """Student and fake score under AdamW, the student followed by its average, if it has one."""
    student, fake = (
        adamw(network, rate, betas=config.betas, kind=config.optimizer)
        for network, rate in (
            (method.student.denoiser.network, config.student_lr), (method.fake.network, config.fake_lr),
        )
    )  # fmt: skip
    for optimizer in (student, fake) if config.offload else ():
        offload_state(optimizer)
    updates, constant = max(1, config.steps // config.student_every), config.lr_schedule == "constant"
    return method.phases(
        student, fake, student_ema=average_of(method.student.denoiser.network, config),
        student_lr=cosine(student, updates, floor=1.0 if constant else 0.0),
        fake_lr=cosine(fake, config.steps, floor=1.0 if constant else 0.1),
    )  # fmt: skip
