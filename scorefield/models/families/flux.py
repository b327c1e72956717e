"""FLUX.1 (flow, embedded guidance): dev, schnell and models of their kind."""

from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from scorefield.denoiser import Cond
from scorefield.models.families import JOINT, Family, Parts, beyond
from scorefield.models.prompts import Encode

T5_LENGTH = 512
"""Tokens that its T5 reads; all of them are attended to, padding too."""


def pack(x: Tensor) -> Tensor:
    """Return (b, c, h, w) as tokens (b, h / 2 w / 2, 4 c), channels before the pixels of a patch."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return what :func:`pack` packed; height and width are those of the latents."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return nn.functional.pixel_shuffle(grid, 2)


def positions(height: int, width: int, like: Tensor) -> Tensor:
    """Return (h w, 3) positions of image tokens: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(like)


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer about packed latents, at t in [0, 1]."""
    height, width = x_t.shape[2:]
    texts = x_t.new_zeros(given["encoder_hidden_states"].shape[1], 3)
    prediction: Tensor = model(
        pack(x_t), timestep=(t / 1000).to(x_t.dtype), txt_ids=texts, return_dict=False,
        img_ids=positions(height // 2, width // 2, x_t), **given,
    )[0]  # fmt: skip
    return unpack(prediction, height, width)


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """The hidden states of T5, and the pooled ones of CLIP."""
    del network
    unused = dict.fromkeys(("vae", "transformer", "scheduler"))
    pipeline: Any = FluxPipeline(**unused, **parts)

    def encode(prompts: list[str]) -> Cond:
        embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=device, max_sequence_length=T5_LENGTH)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    return encode


MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

LAYERS = (*JOINT, *MLP, "proj_mlp", "proj_out")
"""Layers that its LoRAs change."""

FAMILY = Family(
    "FluxPipeline", "transformer", FluxTransformer2DModel,
    {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel},
    encoder=encoder, flow=True, blocks="transformer_blocks", call=call, lora=LAYERS, packing=2, size=(1024, 1024),
    surplus=beyond(tokenizer_2=T5_LENGTH),
)  # fmt: skip
