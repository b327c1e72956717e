"""The parts of a distillation, built from the options of ``scorefield distill``."""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from distill.adversarial import Critic, discriminator_head, find_bottleneck, probe_bottleneck
from distill.consistency import Consistency, ContinuousConsistency, path_times
from distill.decoupled import SeparateGuidance
from distill.diff_instruct import integral_kl
from distill.dmd import DMD, GAN, dmd_weight
from distill.export import lcm_times
from distill.f_distill import FDistill
from distill.guard import middle_layer
from distill.options import ALONG_PATHS, Config
from distill.pair_store import PairsOf, stored_in_step, stored_pairs
from distill.progressive import Progressive, StageTeacher, angle_times, rate_of_stages
from distill.regression import Distance, Pairs, absolute_error, make_pairs, pseudo_huber, squared_error
from distill.sid import SiD
from distill.student import Student, even_times, times_by_ratio
from scorefield import Denoiser, NetworkDenoiser, freeze
from scorefield.cache import Content
from scorefield.denoiser import unwrap
from scorefield.gradient import karras_weight
from scorefield.models.lora import LAYERS, shared_backbone
from scorefield.models.networks import build_network
from scorefield.models.teacher import Teacher
from scorefield.progress import Progress
from scorefield.randomness import derived_generator
from scorefield.schedule import Schedule
from scorefield.solvers import plan
from scorefield.times import between_ratios, uniform
from scorefield.training import checkpoint
from scorefield.training.loop import EMA, Phase
from scorefield.training.offload import offload_state
from scorefield.training.options import images_per_pass
from scorefield.training.run import adamw, cosine

Method = DMD | Consistency
"""What a student learns from."""

MOST_ROUNDING = 20.0
"""Largest sigma / alpha at which an eps network may be asked for an image in bf16."""

MOST_PAIRS = 256
"""Pairs that are made at a time at most."""

WARMUP_SHARE = 4
"""Warm-up updates for each iteration of the matching, by default: regression is the main stage."""

PAIR_USES = 20
"""How often the warm-up reads a pair by default: a small network learns fewer pairs by heart (LOG.md)."""


SETTLED: Mapping[str, Any] = {"gan_weight": None, "bottleneck": None, "warmup_steps": None, "num_pairs": 0}
"""Options whose defaults depend on others, with the value that stands for the default."""


def folders_of(config: Config) -> tuple[Path, Path]:
    """Return the folders of the checkpoints of a run: of its main stage, and of its warm-up."""
    return config.out / "checkpoints", config.out / "warm-up" / "checkpoints"


def as_begun(config: Config) -> Config:
    """Keep the defaults that the run in ``--out`` began with, since --steps may have changed."""
    saved = next(filter(None, map(checkpoint.described, folders_of(config))), {})
    return replace(config, **{
        name: saved[name] for name, unset in SETTLED.items() if name in saved and getattr(config, name) == unset
    })  # fmt: skip


def settled(config: Config, teacher: Teacher, real: bool) -> Config:
    """Return the options with every default that depends on others or on the teacher filled in.

    A run that goes on keeps those it began with.

    Args:
        config: as the user gave it.
        teacher: whose bottleneck the GAN term would listen to.
        real: whether there are real images.

    Raises:
        ValueError: a --bottleneck that the network lacks.
    """
    config = as_begun(config)
    gan, layer = config.gan_weight, config.bottleneck
    if config.method == "progressive":  # or it is refused
        schedule = teacher.denoiser.schedule
        angle_times(schedule, config.points, student_times(config, schedule, teacher.codec is not None)[0])
    if layer is not None:
        find_bottleneck(teacher.denoiser.network, layer)
    if gan is None and config.method in ALONG_PATHS:
        gan = 0.0
    if gan is None:
        layer = layer or middle_layer(teacher.denoiser, teacher.shape, teacher.cond(torch.zeros(1).long()))
        real = real or config.reals == "teacher"
        gan = 0.03 if real and config.critic_weight and listens(teacher, layer) else 0.0
    if config.method == "f-distill" and not gan:
        raise ValueError("--method f-distill needs a critic, so real images: pass --data, or --reals teacher.")
    usual = 0 if config.init_from else WARMUP_SHARE * config.steps
    steps = usual if config.warmup_steps is None else config.warmup_steps
    reading = steps + (config.steps if config.method in ALONG_PATHS and config.reals == "teacher" else 0)
    read = reading * config.batch_size * config.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    pairs = config.num_pairs or max(2000, -(-read // PAIR_USES))
    return replace(config, gan_weight=gan, bottleneck=layer, warmup_steps=steps, num_pairs=pairs)


def probe(teacher: Teacher, bottleneck: str | None) -> tuple[str, int, int]:
    """Return what a critic would listen to. Raises ``ValueError`` as ``adversarial.probe_bottleneck`` does."""
    return probe_bottleneck(teacher.denoiser, teacher.shape, teacher.cond(torch.zeros(1).long()), bottleneck)


def listens(teacher: Teacher, bottleneck: str | None) -> bool:
    """Return True where a critic finds a bottleneck in the teacher's network."""
    try:
        probe(teacher, bottleneck)
    except ValueError:
        return False
    return True


def plan_of_pairs(config: Config) -> str:
    """Return what ``--dry-run`` says about the work before the first iteration."""
    if not uses_pairs(config):
        return ""
    number = config.num_pairs + config.guard_images
    pairs = f"{number:,} teacher pairs of {config.pair_steps} network calls each"
    return f"{pairs}, {config.warmup_steps:,} warm-up updates of the student" if config.warmup_steps else pairs


def uses_pairs(config: Config) -> bool:
    """Return True if anything learns from the teacher's pairs."""
    of_paths = config.method in ALONG_PATHS and config.reals == "teacher"
    return bool(config.warmup_steps or config.regression_weight or of_paths)


def pairs_at_a_time(config: Config) -> int:
    """Return how many pairs the teacher is asked for at a time: without gradients, eight times those of a pass."""
    return min(MOST_PAIRS, 8 * images_per_pass(config))


def build_networks(config: Config, teacher: Teacher) -> tuple[nn.Module, ...]:
    """Student and, where the method has one, fake score as copies of the teacher, dropout off.

    The fake score of an MLP also learns to tell a few-step student's steps apart; the GAN term adds a head.
    """
    student = copy.deepcopy(teacher.denoiser.network).eval()
    if config.method in ALONG_PATHS:
        return (student.requires_grad_(True),)
    if teacher.facts.get("network") in ("function", None):  # None: a pipeline's own, of classes in latents
        fake = copy.deepcopy(teacher.denoiser.network).eval()
    else:
        fake = build_network(teacher.facts, fake_steps(config, teacher.facts)).eval()
    lacking, unknown = fake.load_state_dict(teacher.denoiser.network.state_dict(), strict=False)
    if unknown or not set(lacking) <= {"step.weight", "network.step.weight"}:
        raise ValueError(f"the fake score is not the teacher's network: {lacking} missing, {unknown} unknown.")
    if config.gan_weight:
        name, channels, size = probe(teacher, config.bottleneck)
        fake = Critic(fake, name, discriminator_head(channels, size))
    return student.requires_grad_(True), fake.requires_grad_(True)


def critic_of(config: Config, teacher: Teacher) -> tuple[str, nn.Module | None]:
    """Return the layer that a critic listens to, and its head; none without a GAN term. The network is asked once.

    Raises ``ValueError`` as ``adversarial.probe_bottleneck`` does.
    """
    if not config.gan_weight:
        return "", None
    name, channels, size = probe(teacher, config.bottleneck)
    return name, discriminator_head(channels, size).to(teacher.device)


def build_text_networks(
    config: Config, teacher: Teacher, critic: tuple[str, nn.Module | None]
) -> tuple[nn.Module, ...]:
    """Student and, where there is one, fake score of a text-to-image teacher: copies, or LoRAs on its weights.

    ``critic`` is of :func:`critic_of`.
    """
    name, head = critic
    if config.lora:
        networks = shared_backbone(
            teacher.denoiser, rank=config.lora_rank, alpha=config.lora_alpha or None,
            targets=getattr(teacher.denoiser.network, "layers", ()) or LAYERS,
            checkpointing=config.gradient_checkpointing, generator=derived_generator("lora", config.seed),
        )  # fmt: skip
        student, fake, name = networks[0].network, networks[1].network, f"backbone.{name}"
    else:  # weights that learn are float32, whatever the teacher's precision
        student, fake = (copy.deepcopy(teacher.denoiser.network).float().requires_grad_(True) for _ in range(2))
    if config.method in ALONG_PATHS:
        return (student,)
    return student, fake if head is None else Critic(fake, name, head)


def fake_steps(config: Config, facts: Mapping[str, Any]) -> int:
    """Steps that the fake score can be told, 0 where its network cannot be told."""
    return config.num_steps if config.num_steps > 1 and facts.get("network") == "mlp" else 0


def planned_networks(
    config: Config, teacher: nn.Module, student: nn.Module, fake: nn.Module | None = None
) -> dict[str, nn.Module]:
    """Return the networks that a run holds, for ``--dry-run``."""
    copied = config.ema_decay or config.method == "progressive"  # whose stage before is a copy, too
    followed = {"its average": freeze(copy.deepcopy(student))} if copied else {}
    return {"teacher": teacher, "student": student, **followed, **({} if fake is None else {"fake": fake})}


def planned_updates(config: Config) -> dict[str, int]:
    """Return how often each network that learns takes a step, for ``--dry-run``."""
    if config.method in ALONG_PATHS:
        return {"student": config.steps}
    return {"student": config.steps // config.student_every, "fake": config.steps}


def build_method(config: Config, teacher: Teacher, student: nn.Module, fake: nn.Module | None = None) -> Method:
    """Return what ``--method`` names, on these networks."""
    target, schedule = teacher.guided(config.guidance), teacher.denoiser.schedule
    latent = teacher.codec is not None
    check_rounding(config, teacher.denoiser, latent)
    times = student_times(config, schedule, latent)
    generator = Student(replace(teacher.denoiser, network=student), times)
    if config.method == "progressive":
        grid = angle_times(schedule, config.points, times[0])
        return Progressive(
            teacher=target, student=generator, shape=teacher.shape, path=grid,
            stage_steps=max(1, config.steps // (len(grid).bit_length() - 1)),
        )  # fmt: skip
    if fake is None:
        kind = ContinuousConsistency if config.method == "scm" else Consistency
        path = path_times(schedule, config.points, times[0])
        return kind(teacher=target, student=generator, shape=teacher.shape, path=path)
    gan = GAN(generator_weight=config.gan_weight or 0.0, critic_weight=config.critic_weight)
    matching = {"sid": SiD, "f-distill": FDistill}.get(config.method, DMD)
    sigma_data = teacher.facts.get("sigma_data")
    return matching(
        teacher=target,
        student=generator,
        fake=replace(teacher.denoiser, network=fake),
        shape=teacher.shape,
        fake_weight=karras_weight(sigma_data) if sigma_data else None,
        guidance=separate_guidance(config),
        step_key="step" if fake_steps(config, teacher.facts) else None,
        student_every=config.student_every,
        times=between_ratios(*config.ratio_range) if any(config.ratio_range) else uniform(0.02, 0.98),
        weight=integral_kl() if config.method == "diff-instruct" else dmd_weight(config.alpha_in_gradient),
        gan=gan if config.gan_weight else None,
    )


def separate_guidance(config: Config) -> SeparateGuidance | None:
    """Noise levels of the guidance term of its own, where they are asked for and there is guidance."""
    if not config.separate_guidance or config.guidance == 1:
        return None
    low, high = config.ratio_range
    return SeparateGuidance(low=low, high=high) if high else SeparateGuidance()


def check_rounding(config: Config, denoiser: NetworkDenoiser, latent: bool = False) -> None:
    """Raise ``ValueError`` where bf16 would round away what an eps network says of the clean image.

    x0 = (x_t - sigma eps) / alpha multiplies the rounding of eps, 2^-9 at most, by sigma / alpha: 0.3 at 157, the
    noisiest time of a plain DDPM, and 0.03 at Stable Diffusion's 14.6.
    """
    first = student_times(config, denoiser.schedule, latent)[0]
    ratio = float(denoiser.schedule.ratio(torch.tensor(first, dtype=torch.float64)))
    if config.precision == "bf16" and denoiser.kind == "eps" and ratio > MOST_ROUNDING:
        raise ValueError(
            f"a student that predicts eps at timestep {first:g} multiplies the rounding of bf16 by sigma / alpha "
            f"= {ratio:.3g}; {MOST_ROUNDING:g} is the most that leaves a picture. Pass --student-ratio 3.5 and no "
            "--times, or --precision no."
        )


def student_times(config: Config, schedule: Schedule, latent: bool = False) -> tuple[float, ...]:
    """Timesteps of the student: those of --times, or by --student-ratio.

    Where there are prompts, or a teacher of classes works on latents, the student is a pipeline of diffusers.
    """
    of_pipeline = latent or bool(config.prompts)
    if config.times:
        return config.times
    if not config.student_ratio:
        return (lcm_times if of_pipeline else even_times)(schedule, config.num_steps)
    if of_pipeline:  # what the schedulers of diffusers can be told
        return lcm_times(schedule, config.num_steps, highest=config.student_ratio)
    return times_by_ratio(schedule, config.num_steps, highest=config.student_ratio)


DISTANCES: dict[str, Distance] = {"l1": absolute_error, "l2": squared_error, "huber": pseudo_huber()}


def teacher_pairs(
    config: Config, target: Denoiser, teacher: Teacher, accelerator: Accelerator, *, number: int,
    identity: str, purpose: str = "pairs", keep: tuple[float, ...] = (),
) -> Pairs:  # fmt: skip
    """Return pairs of the (guided) teacher in --pair-steps network calls, all classes alike.

    They are kept on disk, where other runs find them; ranks share the work.

    Args:
        config: of the run.
        target: the teacher under guidance.
        teacher: whose conditions they have.
        accelerator: of all ranks.
        number: of pairs.
        identity: a hash of the teacher.
        purpose: separates the noise of pairs that are trained on from that of others.
        keep: times at which the noisy image is kept, too.
    """
    count = max(1, teacher.num_classes)
    order = torch.arange(count)
    if number < count:  # not the first ones: prompts are often sorted
        order = torch.randperm(count, generator=derived_generator("classes of pairs", config.seed, purpose))
    numbers = order[torch.arange(number) % count]
    parts = [{name: value.cpu() for name, value in teacher.cond(part).items()} for part in numbers.split(250)]
    cond = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    chosen = (
        plan(target.schedule, config.pair_steps, shift=teacher.shift)
        if config.pair_sampler == "auto"
        else plan(target.schedule, config.pair_steps, "ddim", "uniform")
    )
    device = teacher.device
    seed = config.seed if purpose == "pairs" else derived_generator(purpose, config.seed).initial_seed()
    wanted = PairsOf(
        teacher=identity, cond=cond, times=chosen.times, num=number, shape=teacher.shape, seed=seed,
        guidance=config.guidance, negative=config.negative_prompt, precision=config.precision,
        keep=keep, solver=chosen.solver,
    )  # fmt: skip

    bar = Progress(f"teacher pairs{'' if purpose == 'pairs' else f' of the {purpose}'}", unit="pair")

    def make_items(items: Tensor) -> Pairs:
        with torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
            return make_pairs(
                target, cond, num=number, shape=teacher.shape, times=chosen.times, step=chosen.step, seed=seed,
                items=items, batch=pairs_at_a_time(config), device=device, keep=keep, told=bar.update,
            )  # fmt: skip

    if config.shard > 1:
        return stored_in_step(
            lambda shard, num_shards: in_step(make_items, torch.arange(shard, number, num_shards), accelerator),
            wanted.key(), number, joined=partial(joined, accelerator=accelerator), bar=bar,
        )  # fmt: skip
    return stored_pairs(
        lambda shard, num_shards: make_items(torch.arange(shard, number, num_shards)), wanted.key(), number,
        rank=accelerator.process_index, num_ranks=accelerator.num_processes, wait=accelerator.wait_for_everyone,
        bar=bar,
    )  # fmt: skip


def in_step(make: Callable[[Tensor], Pairs], items: Tensor, accelerator: Accelerator) -> Pairs:
    """Return the pairs of some items on every rank, made by all of them in equal shares.

    A teacher in pieces has to be asked by all ranks equally often.
    """
    share = -(-len(items) // accelerator.num_processes)
    own = make(items[(accelerator.process_index * share + torch.arange(share)) % len(items)])

    def joined(part: Tensor) -> Tensor:
        every: Tensor = accelerator.gather(part.to(accelerator.device).contiguous())
        return every[: len(items)].cpu()

    cond = {name: joined(value) for name, value in own.cond.items()}
    states = {t: joined(value) for t, value in own.states.items()}
    return Pairs(joined(own.noise), joined(own.x0), cond, states)


def joined(names: list[Content], accelerator: Accelerator) -> list[Content]:
    """Return the names that any rank has, sorted."""
    every = [names] if accelerator.num_processes == 1 else gather_object([names])
    return sorted({name for one in every for name in one}, key=str)


def average_of(network: nn.Module, config: Config) -> EMA | None:
    """Return the network's moving average; none at --ema-decay 0, where the network itself is what is saved."""
    return EMA(network, config.ema_decay) if config.ema_decay else None


def averaged(phase: Phase) -> nn.Module:
    """Return the network that is saved of a phase: its average, or where there is none itself."""
    return unwrap(phase.network) if phase.ema is None else phase.ema.network


def build_phases(config: Config, method: Method) -> list[Phase]:
    """Student and, if there is one, fake score under AdamW, the student followed by its average, if it has one."""
    constant = config.lr_schedule == "constant"
    student = optimizer_of(config, method.student.denoiser.network, config.student_lr)
    ema = average_of(method.student.denoiser.network, config)
    if isinstance(method, Progressive):
        network = method.student.denoiser.network
        ema = StageTeacher(network, method.stage_steps, method.num_stages, config.steps)
        method = replace(method, average=replace(method.student.denoiser, network=ema.network))
        phases = method.phases(
            student, ema=ema, lr_schedule=rate_of_stages(student, method, config.steps, constant)
        )
    elif isinstance(method, Consistency):
        if ema is not None:
            method = replace(method, average=replace(method.student.denoiser, network=ema.network))
        rate = cosine(student, config.steps, floor=1.0 if constant else 0.0)
        phases = method.phases(student, ema=ema, lr_schedule=rate)
    else:
        fake = optimizer_of(config, method.fake.network, config.fake_lr)
        updates = max(1, config.steps // config.student_every)
        phases = method.phases(
            student, fake, student_ema=ema,
            student_lr=cosine(student, updates, floor=1.0 if constant else 0.0),
            fake_lr=cosine(fake, config.steps, floor=1.0 if constant else 0.1),
        )  # fmt: skip
    return [replace(phase, lr_options=(f"{phase.name}_lr",)) for phase in phases]


def optimizer_of(config: Config, network: nn.Module, rate: float) -> Optimizer:
    """Return AdamW of a network, whose states lie in CPU memory under ``--offload``."""
    optimizer = adamw(network, rate or 1e-5, betas=config.betas, kind=config.optimizer)
    if config.offload:
        offload_state(optimizer)
    return optimizer
