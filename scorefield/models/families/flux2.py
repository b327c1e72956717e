"""FLUX.2 dev (flow, embedded guidance): the network of :mod:`flux2_klein`, with the texts of Mistral."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers import Flux2Pipeline
from torch import nn
from transformers import Mistral3ForConditionalGeneration

from scorefield.denoiser import Cond
from scorefield.models.families import Parts, flux2_klein, num_tokens
from scorefield.models.prompts import Encode

LENGTH = 512
"""Tokens that its Mistral reads of a prompt with its chat template and system message."""

UNUSED = dict.fromkeys(("vae", "transformer", "scheduler"))


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of Mistral behind three of its layers."""
    del network
    pipeline: Any = Flux2Pipeline(**UNUSED, **parts)

    def encode(prompts: list[str]) -> Cond:
        embeds, _ = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=LENGTH)
        return {"encoder_hidden_states": embeds}

    return encode


def surplus(parts: Parts, negative: bool) -> Callable[[str], int]:
    """Return the count of tokens, behind those of template and system message, that are not read."""
    del negative
    processor = parts["tokenizer"]
    pipeline: Any = Flux2Pipeline(**UNUSED, text_encoder=None, tokenizer=processor)
    said = pipeline.system_message

    def count(prompt: str) -> int:
        messages = (("system", said), ("user", prompt))
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        return max(0, num_tokens(getattr(processor, "tokenizer", processor), text) - LENGTH)

    return count


FAMILY = replace(
    flux2_klein.FAMILY, pipeline="Flux2Pipeline", texts={"text_encoder": Mistral3ForConditionalGeneration},
    encoder=encoder, surplus=surplus, embedded=4.0,
)  # fmt: skip
