"""The batches that an adapter is trained and judged on, as the options of ``scorefield control`` say."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from controlnet.data import ControlBatches
from controlnet.options import Config
from controlnet.samples import Pictures
from controlnet.tasks import Task
from scorefield.cache import TensorCache
from scorefield.data.buckets import Buckets
from scorefield.models.codec import Codec
from scorefield.models.places import named_folder
from scorefield.models.teacher import Teacher
from scorefield.training.latents import Latents, Memory
from scorefield.training.loop import Phase
from scorefield.training.memory import Activations, Role, most_bytes
from scorefield.training.micro_batch import Trial, foreseen, settle
from scorefield.training.options import images_per_pass

CALIBRATE_BY = 32
"""Hints of training samples that an embedding is calibrated by."""


def with_eval_batch(config: Config) -> Config:
    """Return the options with a number of images that are drawn at a time, by default those of a pass."""
    return replace(config, eval_batch_size=config.eval_batch_size or images_per_pass(config))


def settle_passes(config: Config, teacher: Teacher, task: Task, phase: Phase, accelerator: Accelerator) -> Config:
    """Return the options with the numbers of images that go through the networks, and that are drawn, at a time.

    Raises ``ValueError`` as :func:`scorefield.training.micro_batch.settle` does.
    """
    others = (teacher.denoiser.network, *([teacher.codec.vae] if isinstance(teacher.codec, Codec) else []))

    def trial(one: Config) -> Trial:
        # Every trial encodes all of its images, as a run may have to: none finds those of the trial before.
        batches, _ = make_batches(replace(one, cache=None), teacher, task, accelerator)
        return Trial([phase], batches, others=others)

    return with_eval_batch(settle(config, accelerator, trial))


def first_hints(config: Config, teacher: Teacher, task: Task, accelerator: Accelerator) -> Tensor:
    """Return the hints of the first few training samples, which an embedding is calibrated by."""
    batches, _ = make_batches(config, teacher, task, accelerator)
    hints: Tensor = batches.examples(batches.alike(CALIBRATE_BY))["hint"]
    return hints


def foresee(
    config: Config, passes_of: Callable[[Config], dict[str, Activations]], held: Mapping[str, Role], room: int,
    device: torch.device,
) -> tuple[Config, dict[str, Activations], str]:  # fmt: skip
    """Return the options as a run would settle them, what its passes hold, and what ``--dry-run`` says of it.

    Args:
        config: of the run.
        passes_of: options -> predicted activations; none where they cannot be predicted.
        held: bytes of each network.
        room: that may be filled; see :func:`scorefield.training.micro_batch.room_for`.
        device: of the run.

    Raises ``ValueError`` as :func:`scorefield.training.micro_batch.foreseen` does.
    """

    def bytes_of(one: Config) -> int | None:
        found = passes_of(with_eval_batch(one))
        return most_bytes(held, found) if found else None

    settled, said = foreseen(config, bytes_of, room, device)
    settled = with_eval_batch(settled)
    return settled, passes_of(settled), said


def make_batches(
    config: Config, teacher: Teacher, task: Task, accelerator: Accelerator
) -> tuple[ControlBatches, ControlBatches]:
    """Those to train on, and those to judge by; their latents are kept."""
    config, number = with_eval_batch(config), images_per_pass(config)
    codec, source = teacher.codec, teacher.source
    assert codec is not None
    on_means = source is not None and source.resolve() == Path(named_folder("toyworld")).resolve()
    sampled = config.latents == "sampled" or (config.latents == "auto" and not on_means)
    cache = None
    if isinstance(codec, Codec) and config.crop == "center" and config.cache:
        cache = TensorCache(config.cache / "latents", codec.identity())
    latents = Latents(
        lambda images: dict(zip(("mean", "std"), codec.posterior(images), strict=True)), cache, Memory(),
        config.eval_batch_size,
    )  # fmt: skip
    samples, buckets = task.training, None
    if config.buckets and isinstance(samples, Pictures):
        samples = samples.in_full_buckets(number)
        buckets = Buckets(samples.shapes, number)
    training, held_out = (
        ControlBatches(
            samples=samples, hints=[task.hint], size=teacher.size, batch_size=batch_size, prompts=teacher.prompts,
            null=teacher.negative(), latents=latents, sampled=sampled, prompt_drop=config.prompt_drop,
            hint_drop=config.hint_drop, flip=config.flip, crop=config.crop, device=accelerator.device,
            buckets=shapes,
        )
        for samples, batch_size, shapes in (
            (samples, number, buckets), (task.held_out, config.eval_batch_size, None)
        )
    )  # fmt: skip
    return training, held_out
