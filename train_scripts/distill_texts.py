"""The distillation of a text-to-image teacher, from its prompts to a folder that diffusers loads."""

import copy
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from command import fingerprint, identity, show_plan
from distill_options import Config
from fitting import fit, prepare, resume, start
from judged import text_watch
from prompted import PromptedTeacher
from roles import build_method, build_phases, build_text_roles, plan_of_pairs, student_times, warm_up
from texts import Texts, encode_images, read_texts
from torch import Tensor, nn

import toyworld
from distill.dmd import DMD
from distill.export import export_lora, export_pipeline, read_student_facts, scheduler_for
from distill.student import Student
from score import Cond, hub
from score.pretrained import read_json
from score.randomness import Rng, shuffled

IN_MEMORY = 2**30
"""Bytes of encoded prompts up to which all of them are kept in memory; more are read from the cache each time."""

WATCHING = ("validation_prompts", "gradient_checkpointing", "offload")
"""Options that change no number of a run."""


@dataclass(frozen=True, eq=False)
class StoredPrompts(PromptedTeacher):
    """A teacher of more prompts than fit into memory: their conditions are read from the cache on disk.

    Attributes:
        prompts: all of them, encoded before.
    """

    prompts: tuple[str, ...] = ()

    def cond(self, labels: Tensor) -> Cond:
        """The conditions of the prompts with these numbers."""
        return self.source.prompts([self.prompts[number] for number in labels.tolist()])


def distil_texts(config: Config) -> Path:
    """Distil and return the folder of the finished student."""
    accelerator = start(config)
    source = load_source(config, accelerator.device)
    texts = fitting_texts(config, read_texts(config.prompts, config.num_prompts), source)
    teacher = prompted(config, texts, source)
    folder = hub.pipeline_folder(teacher_name(config))
    times = student_times(config, teacher)
    scheduler_for(Student(teacher.denoiser, times), read_json(folder / "scheduler" / "scheduler_config.json"))
    latents = encode_images(texts, source) if config.gan_weight > 0 else None
    if config.gan_weight > 0 and latents is None:
        raise ValueError(
            f"--prompts {config.prompts} holds no images, which the GAN term needs beside the prompts. Add them, "
            "or pass --gan-weight 0."
        )
    torch.manual_seed(config.seed)
    networks = build_text_roles(config, teacher)
    if config.dry_run:
        show(config, teacher, networks)
        return config.out
    method = build_method(config, teacher, *(place(network, config, accelerator) for network in networks))

    def batches(rng: Rng) -> dict[str, Any]:
        chosen = shuffled(len(texts.prompts), config.batch_size, rng)
        real = {} if latents is None else {"real": latents[chosen].to(accelerator.device)}
        return {"cond": teacher.cond(chosen), "size": len(chosen), **real}

    with accelerator.autocast():
        method.check(batches(Rng(config.seed, 0)))
    average = learn(config, teacher, method, batches, accelerator, inputs_of(teacher, texts, latents))
    out = config.out / "student"
    if accelerator.is_main_process:
        save(config, average, folder, out)
        print(f"student: {out}")
    return out


def learn(
    config: Config, teacher: PromptedTeacher, method: DMD, batches: Any, accelerator: Accelerator,
    inputs: dict[str, str],
) -> Student:  # fmt: skip
    """Train to the end; the student's moving average."""
    phases = build_phases(config, method)
    ema = phases[0].ema
    assert ema is not None
    own = {name: value for name, value in identity(config, accelerator, inputs).items() if name not in WATCHING}
    first = resume(config, phases, accelerator, own)
    if first == 0 and config.warmup_steps:
        warm_up(config, method, accelerator, teacher)
        ema.reset()
    average = Student(replace(teacher.denoiser, network=ema.network), method.student.times)
    shown = validation(config, teacher)
    fit(
        config, phases, batches, accelerator, own=own, first=first, rollout=method.rollout, columns=4,
        preview=lambda: draw(average, teacher, shown), watch=text_watch(config, average, teacher.source),
    )  # fmt: skip
    return average


def teacher_name(config: Config) -> str | Path:
    """Name or folder of the teacher."""
    return toyworld.pipeline_folder() if config.teacher == "toyworld" else config.teacher


def load_source(config: Config, device: torch.device) -> hub.Teacher:
    """The teacher on its device, in bf16 where the run is and there is a GPU.

    Raises ``ValueError`` for what ``score.hub.load_teacher`` refuses, a model without prompts, and a student.
    """
    name = teacher_name(config)
    half = config.precision == "bf16" and device.type != "cpu"
    source = hub.load_teacher(
        name, dtype=torch.bfloat16 if half else torch.float32, device=device, size=config.teacher_size or None,
        allow_pickle=config.allow_pickle,
    )  # fmt: skip
    if source.texts is None:
        raise ValueError(f"--teacher {config.teacher} takes no prompts; leave out --prompts.")
    if read_student_facts(hub.pipeline_folder(name)):
        raise ValueError(
            f"--teacher {config.teacher} is a student, which knows few noise levels. Pass its teacher."
        )
    return source


def fitting_texts(config: Config, texts: Texts, source: hub.Teacher) -> Texts:
    """The prompts that the text encoders can read whole, or all of them under ``--long-prompts cut``.

    Encodes all prompts. Raises ``ValueError`` for prompts that are too long, and where none is left.
    """
    assert source.texts is not None
    cut = source.texts.num_cut(texts.prompts)
    long = [number for number, tokens in enumerate(cut) if tokens]
    if not long or config.long_prompts == "cut":
        return texts
    first = f"{texts.prompts[long[0]]!r} by {cut[long[0]]} tokens"
    if config.long_prompts == "stop":
        raise ValueError(
            f"{len(long)} of {len(cut)} prompts are longer than the text encoders of {config.teacher} read, such "
            f"as {first}. Shorten them, or pass --long-prompts skip, or cut."
        )
    kept = [number for number, tokens in enumerate(cut) if not tokens]
    if not kept:
        raise ValueError(f"all prompts of {config.prompts} are too long, such as {first}: none is left.")
    print(f"warning: {len(long)} of {len(cut)} prompts are too long and skipped", file=sys.stderr)
    images = texts.images
    some = images[kept] if isinstance(images, Tensor) else [images[number] for number in kept if images]
    return Texts(tuple(texts.prompts[number] for number in kept), some)


def prompted(config: Config, texts: Texts, source: hub.Teacher) -> PromptedTeacher:
    """The teacher whose classes are the prompts, the shown ones last; its text encoders are freed."""
    shown = config.validation_prompts or texts.prompts[:8]
    if any(not prompt.strip() for prompt in shown):
        raise ValueError(f"--validation-prompts must say something; got {list(shown)}.")
    prompts = (*texts.prompts, *shown)
    negative = source.negative(config.negative)
    source.prompts(shown)
    teacher = source.without_text_encoders()
    size = sum(value.nbytes for value in negative.values()) * len(prompts)
    if size > IN_MEMORY:
        return StoredPrompts(teacher, {}, negative, len(prompts), prompts=prompts)
    return PromptedTeacher(teacher, teacher.prompts(prompts), negative, len(prompts))


def place(network: nn.Module, config: Config, accelerator: Accelerator) -> nn.Module:
    """A copy of the teacher as ``fitting.prepare`` wraps it; a LoRA, which is not wrapped, on its device."""
    if not config.lora:
        return prepare(network, config, accelerator)
    if config.compile:
        raise ValueError("--compile is not for --lora, whose networks listen to one another's weights.")
    return network.to(accelerator.device)


def validation(config: Config, teacher: PromptedTeacher) -> Cond:
    """Conditions of the prompts that are shown: the last ones."""
    count = len(config.validation_prompts) or min(8, teacher.num_classes // 2)
    return teacher.cond(torch.arange(teacher.num_classes - count, teacher.num_classes))


@torch.no_grad()
def draw(student: Student, teacher: PromptedTeacher, cond: Cond) -> Tensor:
    """Pictures of some conditions, always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    number = len(next(iter(cond.values())))
    noise = torch.randn(number, *teacher.shape, generator=generator).to(teacher.source.device)
    return teacher.decode(student.sample(noise, cond, generator=generator)).float().cpu()


def inputs_of(teacher: PromptedTeacher, texts: Texts, latents: Tensor | None) -> dict[str, str]:
    """What a run reads, as inputs of :func:`command.identity`."""
    words = hashlib.sha256("\n".join(texts.prompts).encode()).hexdigest()[:16]
    negative = [] if teacher.negative is None else [teacher.negative[name] for name in sorted(teacher.negative)]
    return {
        "teacher": fingerprint([*teacher.denoiser.network.parameters(), *negative]), "prompts": words,
        "data": fingerprint([] if latents is None else [latents]),
    }  # fmt: skip


def show(config: Config, teacher: PromptedTeacher, networks: tuple[nn.Module, nn.Module]) -> None:
    """The plan of ``--dry-run``."""
    student, fake = networks
    average = copy.deepcopy(student).requires_grad_(False)
    roles = {"teacher": teacher.denoiser.network, "student": student, "its average": average, "fake": fake}
    updates = {"student": config.steps // config.student_every, "fake": config.steps}
    show_plan(config, roles, updates, before=plan_of_pairs(config))


def save(config: Config, student: Student, pipeline: Path, folder: Path) -> Path:
    """Export the student: a pipeline, or a LoRA."""
    card = (
        f"Distilled from {config.teacher} (guidance {config.guidance:g}) by `train_scripts/train_dmd.py`, preset "
        f"{config.preset}: {config.steps:,} iterations of batch {config.batch_size}, "
        f"{config.steps // config.student_every:,} updates of the student, seed {config.seed}."
    )
    export = export_lora if config.lora else export_pipeline
    return export(student, pipeline, folder, card=card)
