"""Teach a frozen text-to-image model to follow hints such as edges, by an adapter beside it (ControlNet).

    scorefield control toyworld-canny --out runs/control
    accelerate launch -m scorefield control --teacher <pipeline> --data images/ --hint canny

The adapter is a copy of the encoder behind convolutions that start at zero. Held-out hints are judged while it
learns: "control learned at step n" is printed when it has. The result, in --out/controlnet, loads in stock
diffusers. Stopped runs resume: run the same command again.
"""

import copy
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.utils import save_image

from controlnet.adapter import ControlledDenoiser, EncoderCopy, calibrate, copy_encoder, unet_of
from controlnet.batches import first_hints, foresee, make_batches, settle_passes
from controlnet.evidence import Validation
from controlnet.evidence_log import Evidence, EvidenceLog, likely_causes
from controlnet.export import contact_sheet, model_card, save_adapter, usage_of
from controlnet.initial import start_from
from controlnet.options import Config, check
from controlnet.passes import predicted_passes, shape_of
from controlnet.tasks import Task, load_task
from controlnet.training import ALL_TIMES, adamw, compile_lightly, control_phase, lighten, unlock, with_weights
from controlnet.transformers import (
    ControlLoRA,
    TransformerCopy,
    control_lora,
    copy_transformer,
    has_control,
    is_of_tokens,
)
from controlnet.watch import ControlWatch, fingerprint_of, make_report, make_validation
from scorefield.atomic import whole_file
from scorefield.cache import fingerprint
from scorefield.data.buckets import Shape, bucket_shapes
from scorefield.denoiser import NetworkDenoiser, freeze, unwrap
from scorefield.gradient import min_snr_weight
from scorefield.models.codec import Codec
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.prompts import PromptEncoder, default_cache_folder, share_prompts
from scorefield.models.quantize import count_weights, stored_weights
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.progress import working
from scorefield.randomness import derived_generator
from scorefield.report.write import add_page
from scorefield.times import TimeSampler, logit_normal, shifted
from scorefield.training.identity import check_options, identity
from scorefield.training.launcher import has_gpu
from scorefield.training.loop import EMA, Phase
from scorefield.training.micro_batch import best_device, room_for
from scorefield.training.run import cosine, cut, fit, resume, roles_of, show_plan, start
from scorefield.training.sharding import sharding_of, whole

Adapter = EncoderCopy | TransformerCopy | ControlLoRA


def main(config: Config) -> Path:
    """Train, judge, and return the folder of the finished adapter."""
    check(config)
    log = EvidenceLog(config.out / "evidence.jsonl")
    log.read()  # of a run that is resumed: better refused now than at the first look
    began = time.perf_counter()
    torch.manual_seed(config.seed)
    config = replace(config, cache=config.cache or default_cache_folder().parent)
    if config.dry_run:
        return plan(config)
    accelerator = start(config)
    teacher, task = load(config, accelerator)
    adapter = make_adapter(config, teacher, task)
    begun_from = start_from(config, teacher, adapter)
    inputs = checked_inputs(config, task, begun_from, accelerator)
    teacher = with_idle_codec(config, adapter, encode_captions(teacher, task, accelerator))
    if config.calibrate and begun_from is None and isinstance(adapter, EncoderCopy):
        calibrate(adapter, first_hints(config, teacher, task, accelerator))
    inputs["base"] = frozen_base(config, teacher)
    denoiser = make_denoiser(config, teacher, adapter, accelerator)
    phase = make_phase(config, denoiser, training_times(teacher))
    assert phase.ema is not None
    config = settle_passes(config, teacher, task, phase, accelerator)
    batches, held_out = make_batches(config, teacher, task, accelerator)
    own = identity(config, accelerator, inputs)
    averaged = with_weights(denoiser.unwrapped(), phase.ema.network)
    untouched = untrained(denoiser.unwrapped(), phase.network)
    looked, tested = range(config.eval_samples), range(config.eval_samples, len(task.held_out))
    log = EvidenceLog(config.out / "evidence.jsonl", fingerprint_of(config, task, looked))
    validation = make_validation(config, teacher, task, held_out, looked, accelerator)
    first = resume(config, [phase], accelerator, own)
    if first == 0 and accelerator.is_main_process:
        log.path.unlink(missing_ok=True)  # of a run that left no checkpoint
    images_per_step = config.batch_size * config.accumulate * accelerator.num_processes
    watch = ControlWatch(
        config=config, validation=validation, denoiser=averaged, accelerator=accelerator, log=log,
        images_per_step=images_per_step, first=first,
    )  # fmt: skip

    def report_and_export() -> None:
        indices = tested or looked
        final = make_validation(config, teacher, task, held_out, indices, accelerator) if tested else validation
        report, look, images = make_report(
            task, final, averaged, at(untouched, accelerator.device), log, indices, config.steps, accelerator
        )
        report |= {"seed": config.seed, "resumed": first > 0}
        if first == 0:  # what an earlier process took is not known
            report["seconds"] = round(time.perf_counter() - began, 1)
            report["cpu_seconds"] = round(time.process_time(), 1)
        learned = replace(averaged, adapter=whole(averaged.adapter))  # of all ranks
        if accelerator.is_main_process:
            with working("saving the adapter"):
                export(config, teacher, task, report, look, learned, final, images, images_per_step)

    fit(
        config, [phase], batches.ahead(accelerator.num_processes), accelerator, own=own, first=first,
        watch=watch, all_watch=True, at_end=report_and_export,
    )  # fmt: skip
    return with_page(config.out, accelerator)


def with_page(out: Path, accelerator: Accelerator) -> Path:
    """Write the page of a run, whose log is closed, and return the folder of the adapter."""
    if accelerator.is_main_process:
        add_page(out)
    return out / "controlnet"


def plan(config: Config) -> Path:
    """Print what a run would hold and do; nothing stays on disk."""
    with tempfile.TemporaryDirectory() as nowhere:
        teacher, task = load(replace(config, cache=Path(nowhere), quantize="no"), None)
        cond = {name: value.cpu() for name, value in teacher.prompts([""]).items()}
    plain, shape, rounded = replace(config, quantize="no"), shape_of(teacher), {"teacher": config.quantize}
    network, adapter = teacher.denoiser.network, make_adapter(plain, teacher, task)
    start_from(config, teacher, adapter)
    freeze_base(plain, network)
    learning = unlock(ControlledDenoiser(teacher.denoiser, adapter)) if config.unlocked else adapter
    networks = {"teacher": network, "adapter": adapter, "average": freeze(copy.deepcopy(learning))}
    if isinstance(teacher.codec, Codec) and not waits(config, adapter):
        networks["autoencoder"] = teacher.codec.vae
    before = f"{len(task.training):,} samples checked, {len(task.held_out):,} held out"
    config, passes, said = foresee(
        config, lambda one: predicted_passes(one, shape, make_adapter(plain, shape, task), cond, gpu=has_gpu()),
        roles_of(config, networks, rounded), room_for(best_device(), networks), best_device(),
    )  # fmt: skip
    show_plan(config, networks, {"adapter": config.steps}, before, passes=passes, rounded=rounded, said=said)
    return config.out


def with_idle_codec(config: Config, adapter: Adapter, teacher: Teacher) -> Teacher:
    """Return the teacher with its autoencoder on the CPU between calls, where it :func:`waits`."""
    if waits(config, adapter) and isinstance(teacher.codec, Codec):
        return replace(teacher, codec=teacher.codec.waiting())
    return teacher


def waits(config: Config, adapter: Adapter) -> bool:
    """Return whether the autoencoder waits on the CPU: where memory is short, and it is not asked in each step.

    Adapters of transformers encode the hints of each step.
    """
    return config.quantize != "no" and isinstance(adapter, EncoderCopy)


def load(config: Config, accelerator: Accelerator | None) -> tuple[Teacher, Task]:
    """Teacher, in float32 unless it is rounded, and samples, on the device of the ranks.

    The ranks share the check of the files.
    """
    rank, num_ranks, device = 0, 1, torch.device("cpu")
    if accelerator is not None:
        rank, num_ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    assert config.cache is not None
    with working("loading the teacher"):
        teacher = load_teacher(
            config.teacher, size=config.size or None, device=device, cache=config.cache / "prompts",
            allow_pickle=config.allow_pickle, variant=config.variant or None, rounding=config.quantize,
            dtype=torch.bfloat16 if is_rounded_in_half(config, device) else torch.float32, vae_dtype=torch.float32,
        )  # fmt: skip
    if teacher.codec is None or teacher.texts is None:
        raise ValueError(f"--teacher {config.teacher} takes no prompts; pass a text-to-image pipeline.")
    task = load_task(
        config, teacher.size, config.eval_samples + config.test_samples, rank=rank, num_ranks=num_ranks,
        buckets=shapes_for(teacher) if config.buckets else (),
        usable=lambda captions: teacher.usable(captions, config.long_prompts, config.data),
    )  # fmt: skip
    return teacher, task


def is_rounded_in_half(config: Config, device: torch.device) -> bool:
    """Return whether the teacher is read in bf16 before it is rounded: on a GPU that computes in bf16."""
    return config.quantize != "no" and config.precision == "bf16" and device.type != "cpu"


def shapes_for(teacher: Teacher) -> list[Shape]:
    """Return the shapes of ``--buckets``: sides of whole tokens, or ones that a UNet can halve.

    From 512 pixels on they are multiples of 64. Raises ``ValueError`` for a teacher whose images are not square.
    """
    assert teacher.codec is not None
    height, width = teacher.size
    network = teacher.denoiser.network
    if is_of_tokens(teacher.denoiser):
        unit = network.tokens.side if isinstance(network, DiffusersNetwork) and network.tokens else 1
    else:
        unit = 2 ** (len(unet_of(teacher.denoiser).config.down_block_types) - 1)
    multiple = teacher.codec.factor * unit
    multiple = math.lcm(multiple, 64) if height >= 512 else multiple
    if height != width or height % multiple:
        raise ValueError(f"--buckets needs a square --size, a multiple of {multiple}; got {height} x {width}.")
    return bucket_shapes(height, multiple)


def checked_inputs(
    config: Config, task: Task, begun_from: str | None, accelerator: Accelerator
) -> dict[str, str | None]:
    """Return fingerprints of what is read. Raises ``ValueError`` where --out is of another run."""
    inputs = {"data": task.identity(), "init_from": begun_from}
    check_options(config.out, identity(config, accelerator, {**inputs, "base": ""}), ("base",))
    return inputs


def encode_captions(teacher: Teacher, task: Task, accelerator: Accelerator) -> Teacher:
    """Return the teacher for the captions of these samples, which all ranks encode together, without text
    encoders.
    """
    if isinstance(teacher.texts, PromptEncoder):
        captions, rank = [*task.captions(), ""], accelerator.process_index
        share_prompts(teacher.texts, captions, rank=rank, num_ranks=accelerator.num_processes)
        if isinstance(teacher.negatives, PromptEncoder):  # of families that encode negative prompts otherwise
            share_prompts(teacher.negatives, [""], rank=rank, num_ranks=accelerator.num_processes)
    return teacher.without_text_encoders()


def make_adapter(config: Config, teacher: Teacher, task: Task) -> Adapter:
    """Return a fresh adapter for the hints of the task.

    Raises ``ValueError`` for options that do not fit its teacher.
    """
    assert teacher.codec is not None
    is_transformer = is_of_tokens(teacher.denoiser)
    if is_transformer and config.unlocked:
        raise ValueError(f"--unlocked is for UNets; --teacher {config.teacher} has no decoder of its own.")
    if is_transformer and task.hint.channels not in (1, 3):
        raise ValueError(
            f"--hint {config.hint} has {task.hint.channels} channels; adapters of --teacher {config.teacher} take "
            "pictures of 1 or 3."
        )
    if config.adapter == "lora":
        rank, generator = config.lora_rank, derived_generator("control lora", config.seed)
        return control_lora(teacher, rank=rank, generator=generator)
    if is_transformer and config.shard > 1:
        raise ValueError(
            f"--shard is for adapters of UNets; that of --teacher {config.teacher} reads layers of its teacher. "
            "Leave out --shard."
        )
    source = teacher.denoiser if config.quantize == "no" else unrounded(config)
    if is_transformer:
        return copy_transformer(teacher, source)
    return copy_encoder(source, hint_channels=task.hint.channels, factor=teacher.codec.factor)


def unrounded(config: Config) -> NetworkDenoiser:
    """Return the teacher's network with its own weights, read again, on the CPU.

    A ControlNet learns all weights of its copy, which so starts from what the teacher was published with.
    """
    with working("reading the weights to copy"):
        return load_teacher(
            config.teacher, size=config.size or None, allow_pickle=config.allow_pickle,
            variant=config.variant or None,
        ).denoiser  # fmt: skip


def freeze_base(config: Config, network: nn.Module) -> None:
    """Freeze the base, in bf16 if that is what is computed in, unless a part of it is to learn.

    One that is rounded stays in the precision that it was read in, which its rounded layers compute in.
    """
    keep = config.unlocked or config.quantize != "no"
    freeze(network, torch.bfloat16 if config.precision == "bf16" and not keep else None)


def frozen_base(config: Config, teacher: Teacher) -> str:
    """Freeze the base, and return a hash of its weights, which are whole until they are cut into pieces."""
    freeze_base(config, teacher.denoiser.network)
    return fingerprint(stored_weights(teacher.denoiser.network))


def at(denoiser: NetworkDenoiser, device: torch.device) -> NetworkDenoiser:
    """Return the denoiser with its network on the device, where one in pieces is already."""
    if sharding_of(denoiser.network) is None:
        denoiser.network.to(device)
    return denoiser


def make_denoiser(
    config: Config, teacher: Teacher, adapter: Adapter, accelerator: Accelerator
) -> ControlledDenoiser:
    """Return the teacher, which is frozen, and the adapter, wrapped for several ranks or in pieces."""
    network = teacher.denoiser.network
    sharded = config.shard > 1
    for part in (network, adapter.backbone if isinstance(adapter, ControlLoRA) else adapter):
        lighten(
            part, recompute=config.gradient_checkpointing, levels=config.recompute_levels,
            channels_last=not sharded,  # pieces are cut along the first dimension, in the usual order of memory
        )  # fmt: skip
        if config.compile:
            compile_lightly(part, config.activation_budget)
    # What is unlocked beside it is no part of a wrapped adapter, and some weights of a transformer's last block,
    # which end in the texts, get no gradients; there the loop averages them.
    wrapped = isinstance(adapter, EncoderCopy) and not config.unlocked
    if sharded:
        cut(network, config, accelerator)
        adapter = accelerator.prepare_model(adapter, device_placement=False, evaluation_mode=True)
        return ControlledDenoiser(teacher.denoiser, cut(adapter, config, accelerator))
    prepared = accelerator.prepare(adapter) if wrapped else adapter.to(accelerator.device)
    return ControlledDenoiser(teacher.denoiser, prepared)


def untrained(denoiser: ControlledDenoiser, network: nn.Module) -> NetworkDenoiser:
    """Return the base as it is before training: itself, or with the decoder that will learn copied to the CPU."""
    if not isinstance(network, nn.ModuleDict):
        return denoiser.base
    decoder = {name: freeze(copy.deepcopy(part)).cpu() for name, part in network.items() if name != "adapter"}
    return with_weights(denoiser, nn.ModuleDict({"adapter": denoiser.adapter, **decoder})).base


def training_times(teacher: Teacher) -> TimeSampler:
    """Return how times are drawn: logit-normal under the teacher's shift for a flow transformer, else uniform.

    So SD3 was trained (arXiv 2403.03206, Eq. 19 and 23), and those that followed it.
    """
    is_flow = has_control(teacher.denoiser) and teacher.denoiser.kind == "flow"
    return shifted(logit_normal(), teacher.shift) if is_flow else ALL_TIMES


def make_phase(config: Config, denoiser: ControlledDenoiser, times: TimeSampler = ALL_TIMES) -> Phase:
    """ControlNet's: AdamW, the base's own loss."""
    network = unlock(denoiser) if config.unlocked else denoiser.adapter
    optimizer = adamw(
        network, config.learning_rate, new_factor=config.new_factor, eight_bit=config.optimizer == "adamw8bit"
    )
    phase = control_phase(
        denoiser, optimizer, network=network, times=times, ema=EMA(network, config.ema_decay),
        weight=min_snr_weight(config.min_snr) if config.min_snr else None,
        lr_schedule=cosine(optimizer, config.steps, config.warmup, config.lr_floor),
    )  # fmt: skip
    return replace(phase, lr_options=("learning_rate",))


def facts(
    config: Config, teacher: Teacher, task: Task, report: dict[str, Any], denoiser: ControlledDenoiser,
    images_per_step: int,
) -> dict[str, Any]:  # fmt: skip
    """Return what a card says of the training."""
    sizes = [count_weights(part)[0] for part in (denoiser.adapter, denoiser.base.network)]
    rounded = {} if config.quantize == "no" else {"weights of the base": f"rounded to {config.quantize}"}
    return {
        "data": f"{task.source}, {len(task.training):,} samples of {teacher.size[1]} x {teacher.size[0]} pixels"
        + (", in buckets of that area" if config.buckets else ""),
        "hints": f"{task.hint}, channels: {task.hint.channels}", "steps": config.steps,
        "batch": f"{images_per_step} images", "learning rate": config.learning_rate,
        "prompts dropped": config.prompt_drop, "hints dropped": config.hint_drop,
        "min-SNR gamma": config.min_snr or "none", "decay of the averaged weights": config.ema_decay,
        "parameters": f"{sizes[0]:,} beside {sizes[1]:,} of the base, its decoder "
        + ("trained too" if config.unlocked else "frozen"),
        **rounded, "seed": config.seed, **{name: report[name] for name in ("seconds",) if name in report},
    }  # fmt: skip


def export(
    config: Config, teacher: Teacher, task: Task, report: dict[str, Any], look: Evidence,
    denoiser: ControlledDenoiser, final: Validation, images: Tensor, images_per_step: int,
) -> None:  # fmt: skip
    """Adapter, card and samples as a folder of diffusers, and report.json beside it and in it."""
    if report["learned_at"] is None:
        seen = config.steps * images_per_step
        report = {**report, "likely_causes": likely_causes(look, final.probe.hint, images_seen=seen)}
    pipeline = isinstance(teacher.codec, Codec)  # diffusers knows none of circles
    asked = (final.judge.__doc__ or "").partition("\n")[0]
    card = model_card(
        base="toyworld/pipeline" if config.teacher == "toyworld" else config.teacher, hint=config.hint, look=look,
        event=report["event"], training=facts(config, teacher, task, report, denoiser, images_per_step),
        licence=config.licence or ("apache-2.0" if config.teacher == "toyworld" or not pipeline else None),
        hint_channels=task.hint.channels, pipeline=pipeline, unlocked=config.unlocked,
        usage=usage_of(unwrap(denoiser.adapter), config.teacher),
        limits=f"Judged on {report['num_samples']} held-out samples of the same data, guidance "
        f"{config.guidance:g}, {config.sampling_steps} DDIM steps. What the judge asks: {asked} Other data may "
        "differ.",
    )  # fmt: skip
    sheet = contact_sheet(final.probe, images)
    folder = config.out / "controlnet"
    unet = unet_of(denoiser.base) if config.unlocked else None
    save_adapter(denoiser.adapter, folder, card, samples=sheet, unet=unet, report=report)
    with whole_file(config.out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2))
    with whole_file(config.out / "samples.png") as temporary:
        save_image(sheet, temporary)
    name, bounded = next(iter(look.bounded_scores.items()))
    print(
        f"{name} {bounded.value:.3f}, floor {bounded.floor:.3f}, ceiling {bounded.ceiling:.3f}\n"
        f"control {report['event']}\nadapter: {folder}"
    )
