"""The distillation of a text-to-image teacher, from its prompts to a folder that diffusers loads."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from distill.adversarial import probe_bottleneck
from distill.checks import smallest_pass
from distill.data import RealLatents, check_images
from distill.export import copied_parts, export_student, scheduler_for
from distill.initial import Initial, initial_weights
from distill.options import ALONG_PATHS, Config
from distill.parts import (
    Method,
    build_method,
    build_text_networks,
    check_rounding,
    critic_of,
    folders_of,
    plan_of_pairs,
    planned_networks,
    planned_updates,
    settled,
    student_times,
)
from distill.passes import predicted_passes
from distill.stages import Stages, distil
from distill.student import Student
from distill.trial import settle_passes
from scorefield import Cond
from scorefield.data.rows import Listing, keep_good
from scorefield.data.texts import Texts, read_texts
from scorefield.diagnosis.check import Diagnosis
from scorefield.files import read_json, warn
from scorefield.models.codec import Codec
from scorefield.models.families import family_of
from scorefield.models.lora import recompute_activations
from scorefield.models.pretrained import INDEX
from scorefield.models.quantize import outlined
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.progress import working
from scorefield.randomness import Rng, shuffled
from scorefield.report.write import add_page
from scorefield.shipped import shipped, ships
from scorefield.training import checkpoint
from scorefield.training.compiling import compile_network
from scorefield.training.identity import check_options, identity
from scorefield.training.memory import Activations, most_bytes
from scorefield.training.micro_batch import foreseen, room_for
from scorefield.training.options import images_per_pass
from scorefield.training.report import strips
from scorefield.training.run import check_identity, cut, prepare, roles_of, show_plan, start
from scorefield.training.teacher_check import PICTURE, check_teacher, draw_check, num_checked

INPUTS = ("teacher", "prompts", "data", "init_from")
"""What a run reads, in its identity as fingerprints."""

JUDGED = (64, 64)
"""Height and width of the pictures that the judge of --eval-every sees."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a run reads.

    Attributes:
        config: settled, since its defaults depend on teacher and prompts.
        teacher: its classes are the prompts; its text encoders are gone.
        texts: the prompts.
        latents: of their images, or None without a GAN term.
        shown: conditions of the prompts that are drawn on the way.
        found: by the check of the teacher, if there was one.
        initial: weights that the student starts from, if they are not the teacher's.
    """

    config: Config
    teacher: Teacher
    texts: Texts
    latents: RealLatents | None
    shown: Cond
    found: Diagnosis | None = None
    initial: Initial | None = None


def distil_texts(config: Config) -> Path:
    """Distil and return the folder of the finished student."""
    accelerator = start(config)
    inputs = load_inputs(config, accelerator)
    config = inputs.config
    teacher = inputs.teacher
    torch.manual_seed(config.seed)
    critic = critic_of(config, teacher)
    if config.dry_run:
        show(config, inputs, critic, accelerator.device)
        return config.out
    known = hashes_of(inputs)  # of whole weights
    if config.shard > 1:
        teacher.denoiser.network.cpu()  # no device would hold three networks whole
    networks = build_text_networks(config, teacher, critic)
    if inputs.initial is not None:
        inputs.initial.give(networks[0])
    student, *rest = (place(network, config, accelerator) for network in networks)
    if config.shard > 1:
        cut(teacher.denoiser.network, config, accelerator)
    method = build_method(config, teacher, student, *rest)
    config = settle_passes(config, method, teacher, accelerator, partial(make_batches, inputs))
    batches = make_batches(inputs, config)
    with accelerator.autocast():
        method.check(batches(Rng(config.seed, 0)))
    if (found := inputs.found) is not None and found.samples and accelerator.is_main_process:
        config.out.mkdir(parents=True, exist_ok=True)
        draw_check(teacher, found, config.out / PICTURE)
    own = identity(config, accelerator, known)
    average = learn(config, inputs, method, batches, accelerator, own)
    out = config.out / "student"
    if accelerator.is_main_process:
        with working("saving the student"):
            save(config, average, teacher, out, accelerator.num_processes)
        print(f"student: {out}")
        add_page(config.out)
    return out


def make_batches(inputs: Inputs, config: Config) -> Callable[[Rng], dict[str, Any]]:
    """Return a function that makes a batch: prompts, and the latents of their images where anything reads them."""
    teacher, latents, number = inputs.teacher, inputs.latents, images_per_pass(config)

    def batches(rng: Rng) -> dict[str, Any]:
        chosen = shuffled(len(inputs.texts.prompts), number, rng)
        real = {} if latents is None else {"real": latents(chosen)}
        if config.needs_images and latents is None:  # those of the teacher pairs, which are not made yet
            real = {"real": torch.zeros(len(chosen), *teacher.shape, device=teacher.device)}
        return {"cond": teacher.cond(chosen), "size": len(chosen), **real}

    return batches


def ask_teacher(config: Config, source: Teacher, texts: Texts, latents: RealLatents | None) -> Diagnosis:
    """Check the teacher on a few prompts and the latents of their images, or on its own; only these are encoded.

    Raises ``ValueError`` for a teacher that fails.
    """
    count = num_checked(source.shape)
    chosen = torch.randperm(len(texts.prompts), generator=torch.Generator().manual_seed(0))[:count]
    teacher = source.asked(texts.some(chosen.tolist()).prompts, config.negative_prompt)
    x0 = None if latents is None else latents(chosen)
    source.free_text_encoders()  # while the network is asked
    labels = torch.arange(count) % len(chosen)
    assert teacher.listed is not None
    null = teacher.listed.negative if config.guidance != 1 else None
    return check_teacher(
        teacher, None if x0 is None else x0[labels], labels, null=null, bounded=False,
        batch_size=images_per_pass(config),
    )  # fmt: skip


def load_inputs(config: Config, accelerator: Accelerator) -> Inputs:
    """Everything that a run reads, refused or encoded; of a dry run only as much as shows the plan.

    The text encoders are freed on return, since nothing that is returned holds them.
    """
    texts = read_texts(config.prompts, config.num_prompts, on_bad_data=config.on_bad_data)
    with tempfile.TemporaryDirectory() as nowhere:
        source = load_source(config, accelerator.device, Path(nowhere) if config.dry_run else None)
        latents = None
        anything = source.asked([config.negative_prompt])  # whatever the prompt
        config = settled(config, anything, bool(len(texts.images)))
        check_inputs(config, texts, source)
        check_rounding(config, source.denoiser)
        initial = initial_weights(config, source)
        if not config.dry_run:
            check_options(config.out, identity(config, accelerator, dict.fromkeys(INPUTS, "")), INPUTS)
        texts = texts.some(source.usable(texts.prompts, config.long_prompts, config.prompts))
        made_here = ships("prompts", config.prompts)
        if not (config.needs_images and config.reals == "data"):
            if len(texts.images) and not made_here:
                fix = "the GAN term alone would read them: --gan-weight 0.03 --reals data"
                if config.method in ALONG_PATHS:
                    fix = "to learn from them: --reals data"
                if config.num_frames > 1:
                    fix = "videos are learned from prompts alone"
                warn(f"{config.prompts}: passed over: {len(texts.images)} pictures beside the prompts; {fix}")
        elif not (config.dry_run and made_here):
            latents, faults = check_images(
                texts.images, source, rank=accelerator.process_index, num_ranks=accelerator.num_processes,
                gather=gather_object,
            )  # fmt: skip
            good = keep_good(Listing(config.prompts, ()), faults, config.on_bad_data)
            texts, latents = texts.some(good), latents.some(good)
        found = None
        if not config.dry_run and (accelerator.num_processes > 1 or config.out.exists()):
            known = source.asked([config.negative_prompt], config.negative_prompt)  # any one prompt would do
            early = Inputs(config, known, texts, latents, {}, initial=initial)
            check_identity(config, identity(config, accelerator, hashes_of(early)), accelerator)
        if config.dry_run:
            texts, latents = Texts(texts.prompts[:1]), None
        elif not config.skip_teacher_check and checkpoint.newest(config.out / "checkpoints") is None:
            found = ask_teacher(config, source, texts, latents)
        shown = source.prompts(config.validation_prompts or texts.prompts[:8])
        teacher = source.asked(texts.prompts, config.negative_prompt)
    return Inputs(config, teacher, texts, latents, shown, found, initial)


def check_inputs(config: Config, texts: Texts, source: Teacher) -> None:
    """Raise ``ValueError`` for what teacher and prompts cannot do, before the long work of encoding them."""
    folder = pipeline_of(source)
    copied_parts(folder, config.variant or None)
    times = student_times(config, source.denoiser.schedule)
    scheduler_for(Student(source.denoiser, times), read_json(folder / "scheduler" / "scheduler_config.json"))
    if config.kohya_keys and family_of(read_json(folder / INDEX)).kohya is None:
        raise ValueError(
            f"--kohya-keys: diffusers reads no such keys for LoRAs of --teacher {config.teacher}. Leave it out."
        )
    if config.eval_every and source.size != JUDGED:
        raise ValueError(
            f"--eval-every asks the toy world's judge, who sees pictures of {JUDGED}; --teacher {config.teacher} "
            f"draws {source.size}. Pass --eval-every 0 and look at the pictures in --out/samples."
        )
    if config.needs_images:
        along_paths = config.method in ALONG_PATHS
        user, fix = ("--method", "--reals teacher") if along_paths else ("the GAN term", "--gan-weight 0")
        if not len(texts.images) and config.reals == "data":
            raise ValueError(
                f"--prompts {config.prompts} holds no images, which {user} needs beside the prompts. Add them, or "
                f"pass {fix}."
            )
        size = getattr(texts.images, "size", source.size)
        if config.reals == "data" and size != source.size:
            raise ValueError(
                f"the images of --prompts {config.prompts} are {size}, the teacher's {source.size}. Pass {fix}."
            )
    if config.gan_weight:
        negative = source.negative(config.negative_prompt)  # any one prompt would do
        probe_bottleneck(source.denoiser, source.shape, negative, config.bottleneck)


def learn(
    config: Config, inputs: Inputs, method: Method, batches: Any, accelerator: Accelerator, own: dict[str, Any]
) -> Student:  # fmt: skip
    """Train to the end; the student's moving average, or the student itself at --ema-decay 0."""
    teacher = inputs.teacher
    stages = Stages(
        config=config, method=method, teacher=teacher, accelerator=accelerator, batches=batches, own=own
    )
    return distil(
        stages, columns=4, preview=lambda student: draw(student, teacher, inputs.shown),
        watch=lambda student: shipped("judge toyworld")(config, student, teacher),
    )  # fmt: skip


def pipeline_of(teacher: Teacher) -> Path:
    """Return the folder of its pipeline, whose parts its student needs.

    Raises ``ValueError`` for a teacher without.
    """
    if teacher.source is None or not (teacher.source / INDEX).is_file():
        raise ValueError("--teacher must be a pipeline of diffusers to be distilled with --prompts.")
    return teacher.source


def load_source(config: Config, device: torch.device, cache: Path | None = None) -> Teacher:
    """Return the teacher on its device, in bf16 where the run is and there is a GPU; prompts are kept in
    ``cache``.

    Its autoencoder is float32: what it makes of real images once is learned from all along.

    Raises ``ValueError`` for what ``load_teacher`` refuses, a model without prompts, and a student.
    """
    half = config.precision == "bf16" and device.type != "cpu"
    with working("loading the teacher"):
        source = load_teacher(
            config.teacher, dtype=torch.bfloat16 if half else torch.float32, device=device, cache=cache,
            size=config.size or None, num_frames=config.num_frames, vae_dtype=torch.float32,
            allow_pickle=config.allow_pickle, variant=config.variant or None,
            rounding="no" if is_only_counted(config, device) else config.quantize,
        )  # fmt: skip
    if source.texts is None:
        raise ValueError(f"--teacher {config.teacher} takes no prompts; leave out --prompts.")
    if config.quantize != "no" and isinstance(source.codec, Codec):  # memory is short
        return replace(source, codec=source.codec.waiting())
    return source


def is_only_counted(config: Config, device: torch.device) -> bool:
    """Return whether the rounded weights are counted alone: ``--dry-run`` on a CPU, where rounding takes long."""
    return config.dry_run and device.type == "cpu"


def place(network: nn.Module, config: Config, accelerator: Accelerator) -> nn.Module:
    """Return a copy of the teacher as ``prepare`` wraps it; a LoRA, which is not wrapped, on its device."""
    if not config.lora:
        return prepare(network, config, accelerator)
    if config.compile:
        compile_network(network)
    return network.to(accelerator.device)


@torch.no_grad()
def draw(student: Student, teacher: Teacher, cond: Cond) -> Tensor:
    """Pictures of some conditions, or a few frames of their videos, always from the same noise."""
    generator = torch.Generator().manual_seed(0)
    number = len(next(iter(cond.values())))
    noise = torch.randn(number, *teacher.shape, generator=generator).to(teacher.device)
    x0 = student.sample(noise, cond, generator=generator)
    # One by one: SDXL's autoencoder needs three GiB for each.
    return torch.cat([strips(teacher.decode(one)).float().cpu() for one in x0.split(1)])


def hashes_of(inputs: Inputs) -> dict[str, str | None]:
    """Return fingerprints of what a run reads, as inputs of :func:`identity`."""
    teacher, latents = inputs.teacher, inputs.latents
    return {
        "teacher": teacher.identity(), "prompts": inputs.texts.identity(),
        "data": "" if latents is None else latents.identity(),
        "init_from": None if inputs.initial is None else inputs.initial.identity(),
    }  # fmt: skip


def show(
    config: Config, inputs: Inputs, critic: tuple[str, nn.Module | None], device: torch.device
) -> None:  # fmt: skip
    """The plan of ``--dry-run``. Networks that learn are on the meta device: nothing is allocated for them."""
    codec, name, head = inputs.teacher.codec, *critic
    network = inputs.teacher.denoiser.network
    teacher = replace(inputs.teacher, denoiser=replace(inputs.teacher.denoiser, network=outlined(network)))
    if isinstance(codec, Codec):
        teacher = replace(teacher, codec=replace(codec, vae=outlined(codec.vae)))
    networks = build_text_networks(config, teacher, (name, None if head is None else head.to("meta")))
    if inputs.initial is not None and config.lora:
        inputs.initial.give(networks[0])
    for one in networks if config.gradient_checkpointing and not config.lora else ():
        recompute_activations(one)
    held = planned_networks(config, network, *networks)
    if isinstance(codec, Codec) and codec.waits is None:
        held["autoencoder"] = codec.vae
    rounded = {"teacher": config.quantize} if is_only_counted(config, device) else {}

    def passes_of(one: Config) -> dict[str, Activations]:
        return predicted_passes(one, teacher, *networks, gpu=device.type != "cpu")

    def bytes_of(one: Config) -> int | None:
        found = passes_of(one)
        return most_bytes(roles_of(one, held, rounded), found, offload=one.offload) if found else None

    config, said = foreseen(
        config, bytes_of, room_for(device, {"teacher": network}), device, smallest=smallest_pass(config.method),
        folders=folders_of(config),
    )  # fmt: skip
    show_plan(
        config, held, planned_updates(config), before=plan_of_pairs(config), rounded=rounded,
        passes=passes_of(config), said=said,
    )  # fmt: skip


def save(config: Config, student: Student, teacher: Teacher, folder: Path, num_processes: int) -> Path:
    """Export the student: a pipeline, or a LoRA."""
    batch_size = config.batch_size * config.accumulate * num_processes
    card = (
        f"Distilled from {config.teacher} (guidance {config.guidance:g}) by ``scorefield distill``, preset "
        f"{config.preset}: {config.steps:,} iterations of batch {batch_size:,}, "
        f"{planned_updates(config)['student']:,} updates of the student, method {config.method}, seed "
        f"{config.seed}."
    )
    if config.quantize != "no":
        card += f" It learned on the teacher's weights rounded to {config.quantize}."
    base = "toyworld/pipeline" if config.teacher == "toyworld" else config.teacher
    return export_student(
        student, pipeline_of(teacher), folder, card=card, base_model=base, size=teacher.size,
        num_frames=teacher.num_frames if teacher.fps else 0, variant=config.variant or None,
        kohya=config.kohya_keys,
    )  # fmt: skip
