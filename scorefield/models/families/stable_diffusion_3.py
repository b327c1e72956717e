"""Stable Diffusion 3 and 3.5 (flow), with or without their T5."""

from typing import Any

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from scorefield.denoiser import Cond
from scorefield.models.controls import RESIDUAL, Control, copy_blocks, numbered, take_numbered
from scorefield.models.families import Family, Parts, beyond
from scorefield.models.networks import plain_call
from scorefield.models.prompts import Encode

T5_LENGTH = 256
"""Tokens that its T5 reads."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer, with what a ControlNet adds to its blocks."""
    if residuals := take_numbered(given, RESIDUAL):
        given["block_controlnet_hidden_states"] = list(residuals.values())
    return plain_call(model, x_t, t, given)


def make_control(transformer: Any) -> Any:
    """Return a ControlNet of the first blocks, 12 at most, as diffusers has it; the last one differs.

    Its config lets the pipeline hand the pooled texts on, and encode hints as images are.
    """
    blocks = min(12, len(transformer.transformer_blocks) - 1)
    return copy_blocks(SD3ControlNetModel, transformer, num_layers=blocks, force_zeros_for_pooled_projection=False)


def call_control(
    model: Any, transformer: Any, x_t: Tensor, t: Tensor, hint: Tensor, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Ask the ControlNet; an official one of another maker may want no pooled texts."""
    del transformer
    if model.config.force_zeros_for_pooled_projection:
        given["pooled_projections"] = torch.zeros_like(given["pooled_projections"])
    return numbered(RESIDUAL, model(x_t, timestep=t, controlnet_cond=hint, return_dict=False, **given)[0])


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of two CLIPs and T5, and the pooled ones of both CLIPs."""
    unused = dict.fromkeys({"vae", "scheduler", "text_encoder_3", "tokenizer_3"} - parts.keys())
    # The transformer is asked for the width of the zeros that stand in for a missing T5.
    pipeline: Any = StableDiffusion3Pipeline(**unused, **parts, transformer=network)

    def encode(prompts: list[str]) -> Cond:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    return encode


FAMILY = Family(
    "StableDiffusion3Pipeline", "transformer", SD3Transformer2DModel,
    {
        "text_encoder": CLIPTextModelWithProjection, "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    },
    optional=("text_encoder_3",), encoder=encoder, flow=True, blocks="transformer_blocks",
    surplus=beyond(tokenizer=None, tokenizer_2=None, tokenizer_3=T5_LENGTH), call=call,
    control=Control(SD3ControlNetModel, "StableDiffusion3ControlNetPipeline", make_control, call_control),
)  # fmt: skip
