"""Passes of the training of an adapter, for the bytes that ``--dry-run`` predicts."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from controlnet.adapter import ControlledDenoiser, EncoderCopy
from controlnet.options import Config
from controlnet.training import lighten, unlock
from controlnet.transformers import ControlLoRA, TransformerCopy
from scorefield.denoiser import Cond, freeze
from scorefield.models.codec import Codec
from scorefield.models.quantize import outlined
from scorefield.models.teacher import Teacher
from scorefield.schedule import RectifiedFlow
from scorefield.training.memory import Activations, Pass, predicted
from scorefield.training.options import images_per_pass


def shape_of(teacher: Teacher) -> Teacher:
    """Return the teacher on the meta device, its autoencoder too, for :func:`predicted_passes`."""
    codec = teacher.codec
    if isinstance(codec, Codec):
        codec = replace(codec, vae=outlined(codec.vae))
    denoiser = replace(teacher.denoiser, network=outlined(teacher.denoiser.network))
    return replace(teacher, denoiser=denoiser, codec=codec)


def predicted_passes(
    config: Config,
    teacher: Teacher,
    adapter: EncoderCopy | TransformerCopy | ControlLoRA,
    cond: Cond,
    *,
    gpu: bool,
) -> dict[str, Activations]:
    """Return the activations of what a run does one after the other, by name; none where numbers decide shapes.

    Args:
        config: of the run.
        teacher: of :func:`shape_of`.
        adapter: of that teacher, so on the meta device, too.
        cond: of one prompt, on the CPU.
        gpu: count as a GPU computes.
    """
    base = teacher.denoiser.network
    freeze(base, torch.bfloat16 if config.precision == "bf16" and not config.unlocked else None)
    parts: list[nn.Module] = [base, adapter.backbone if isinstance(adapter, ControlLoRA) else adapter]
    for part in parts:
        lighten(part, recompute=config.gradient_checkpointing, levels=config.recompute_levels)
    # Neither the kind of prediction nor the schedule changes a shape, and these two need no numbers.
    denoiser = ControlledDenoiser(replace(teacher.denoiser, kind="flow", schedule=RectifiedFlow()), adapter)
    if config.unlocked:
        unlock(denoiser)
    networks = [base, adapter]
    number = images_per_pass(config)
    with torch.device("meta"):
        given = {name: torch.cat([value.to("meta")] * number) for name, value in cond.items()}
        x_t = torch.zeros(number, *teacher.shape)
        pictures = torch.zeros(number, adapter.channels, *teacher.size)
        t = torch.full((number,), 0.5)
    held = replace(denoiser, hint=pictures if isinstance(adapter, EncoderCopy) else x_t)
    runs = {"update of the adapter": Pass(lambda: held(x_t, t, given).float())}
    if not isinstance(adapter, EncoderCopy):
        runs["encoding the hints"] = Pass(lambda: adapter.prepare(pictures))
    if isinstance(teacher.codec, Codec):
        networks.append(teacher.codec.vae)
        runs["decoding pictures"] = Pass(lambda: _decoded(teacher, config.eval_batch_size))
    return predicted(runs, networks, precision=config.precision, gpu=gpu)


@torch.no_grad()
def _decoded(teacher: Teacher, number: int) -> Tensor:
    return teacher.decode(torch.zeros(number, *teacher.shape, device="meta"))
