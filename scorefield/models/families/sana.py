"""Sana (flow, latents of 1/32 of a side)."""

import inspect
from typing import Any

import torch
from diffusers import SanaControlNetModel, SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Model

from scorefield.denoiser import Cond
from scorefield.models.controls import RESIDUAL, Control, copy_blocks, numbered, take_numbered
from scorefield.models.families import ATTENTION, Encoder, Family, Parts, beyond
from scorefield.models.prompts import Encode

LENGTH = 300
"""Tokens of a prompt that its Gemma reads, behind the instruction."""

_OPTIONS = inspect.signature(SanaPipeline.__call__).parameters

INSTRUCTION: tuple[str, ...] = tuple(_OPTIONS["complex_human_instruction"].default)
"""What its pipeline puts before a prompt, and not before a negative one."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer in its own unit of time."""
    scale = model.config.timestep_scale
    if residuals := take_numbered(given, RESIDUAL):
        given["controlnet_block_samples"] = tuple(residuals.values())
    prediction: Tensor = model(x_t, timestep=t * scale, return_dict=False, **given)[0]
    return prediction[:, : x_t.shape[1]]


def make_control(transformer: Any) -> Any:
    """Return a ControlNet of the first blocks, 7 at most, as diffusers has it, for those from the second."""
    blocks = min(7, len(transformer.transformer_blocks) - 1)
    return copy_blocks(SanaControlNetModel, transformer, num_layers=blocks)


def call_control(
    model: Any, transformer: Any, x_t: Tensor, t: Tensor, hint: Tensor, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Ask the ControlNet in the transformer's own unit of time."""
    scale = transformer.config.timestep_scale
    values = model(x_t, timestep=t * scale, controlnet_cond=hint, return_dict=False, **given)[0]
    return numbered(RESIDUAL, values)


def encoder_with(instruction: tuple[str, ...]) -> Encoder:
    """Return the encoder of prompts behind an instruction."""

    def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
        del network
        unused = dict.fromkeys(("vae", "transformer", "scheduler"))
        pipeline: Any = SanaPipeline(**unused, **parts)

        def encode(prompts: list[str]) -> Cond:
            embeds, mask, _, _ = pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, device=device, max_sequence_length=LENGTH,
                complex_human_instruction=list(instruction),
            )  # fmt: skip
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

        return encode

    return encoder


LAYERS = (*ATTENTION, "conv_inverted", "conv_point")
"""Layers that its LoRAs change."""

FAMILY = Family(
    "SanaPipeline", "transformer", SanaTransformer2DModel, {"text_encoder": Gemma2Model},
    encoder=encoder_with(INSTRUCTION), negative=encoder_with(()), surplus=beyond(tokenizer=LENGTH), flow=True,
    blocks="transformer_blocks", call=call, lora=LAYERS, variance=True, bounded=False,
    control=Control(SanaControlNetModel, "SanaControlNetPipeline", make_control, call_control),
)  # fmt: skip
