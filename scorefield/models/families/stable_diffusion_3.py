"""Stable Diffusion 3 (flow), with or without its T5."""

from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from scorefield.denoiser import Cond
from scorefield.models.families import Family, Parts, beyond
from scorefield.models.prompts import Encode

T5_LENGTH = 256
"""Tokens that its T5 reads."""


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """The hidden states of two CLIPs and T5, and the pooled ones of both CLIPs."""
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
    surplus=beyond(tokenizer=None, tokenizer_2=None, tokenizer_3=T5_LENGTH),
)  # fmt: skip
