"""FLUX.2 klein (flow, latents of 2 x 2 patches under batch norm)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from scorefield.denoiser import Cond
from scorefield.models.families import JOINT, Family, Parts, in_chat
from scorefield.models.preflight import flow_shift
from scorefield.models.prompts import Encode

LENGTH = 512
"""Tokens of a prompt, with its chat template, that its Qwen3 reads; padding is attended to."""

HIDDEN = (9, 18, 27)
"""Layers of Qwen3 whose hidden states are joined."""

STEPS = 50
"""Steps of the grid that the shift is for: it depends on their number, a little."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer about one token a latent, at t in [0, 1]; positions are (time, row, column, word)."""
    height, width = x_t.shape[2:]
    length = given["encoder_hidden_states"].shape[1]
    none = torch.arange(1, device=x_t.device)
    rows, columns, words = (torch.arange(number, device=x_t.device) for number in (height, width, length))
    prediction: Tensor = model(
        x_t.flatten(2).transpose(1, 2), timestep=(t / 1000).to(x_t.dtype), return_dict=False,
        img_ids=torch.cartesian_prod(none, rows, columns, none),
        txt_ids=torch.cartesian_prod(none, none, none, words), **given,
    )[0]  # fmt: skip
    return prediction[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def shift(settings: Mapping[str, Any], num_tokens: int) -> float:
    """Return exp(mu), mu fitted by the makers to tokens and steps (diffusers' ``compute_empirical_mu``).

    mu(200 steps) = 1.6927e-4 tokens + 0.45666666, which large images have at any number of steps; mu(10 steps) =
    8.73809524e-5 tokens + 1.89833333; between them a straight line.
    """
    if not settings.get("use_dynamic_shifting"):
        return flow_shift(settings, num_tokens)
    many, few = 1.6927e-4 * num_tokens + 0.45666666, 8.73809524e-5 * num_tokens + 1.89833333
    return math.exp(many if num_tokens > 4300 else many + (few - many) * (200 - STEPS) / 190)


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of Qwen3 behind three of its layers."""
    del network
    unused = dict.fromkeys(("vae", "transformer", "scheduler"))
    pipeline: Any = Flux2KleinPipeline(**unused, **parts)
    depth = parts["text_encoder"].config.num_hidden_layers
    layers = HIDDEN if depth >= max(HIDDEN) else tuple(min(layer, depth) for layer in HIDDEN)

    def encode(prompts: list[str]) -> Cond:
        embeds, _ = pipeline.encode_prompt(
            list(prompts), device=device, max_sequence_length=LENGTH, text_encoder_out_layers=layers
        )
        return {"encoder_hidden_states": embeds}

    return encode


LAYERS = (*JOINT, "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out")
"""Layers that its LoRAs change."""

FAMILY = Family(
    "Flux2KleinPipeline", "transformer", Flux2Transformer2DModel, {"text_encoder": Qwen3ForCausalLM},
    encoder=encoder, surplus=in_chat(LENGTH, enable_thinking=False), flow=True, blocks="transformer_blocks",
    call=call, lora=LAYERS, shift=shift,
    size=(1024, 1024), bounded=False,
)  # fmt: skip
