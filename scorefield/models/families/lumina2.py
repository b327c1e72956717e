"""Lumina Image 2 (flow, told 1 - t, guidance that keeps the length of rows)."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor, nn
from transformers import Gemma2Model

from scorefield.denoiser import Cond
from scorefield.models.families import ATTENTION, Encoder, Family, Parts, num_tokens
from scorefield.models.prompts import Encode

LENGTH = 256
"""Tokens of a prompt, with what the pipeline puts before it, that its Gemma reads."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer, which knows t as 1 - t and predicts x0 - noise."""
    prediction: Tensor = model(x_t, timestep=1 - t / 1000, return_dict=False, **given)[0]
    return -prediction


def encoder_of(negative: bool) -> Encoder:
    """Return the encoder of prompts behind the pipeline's system prompt, or of negative ones without it."""

    def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
        del network
        unused = dict.fromkeys(("vae", "transformer", "scheduler"))
        pipeline: Any = Lumina2Pipeline(**unused, **parts)

        def encode(prompts: list[str]) -> Cond:
            given = [""] * len(prompts) if negative else list(prompts)
            found = pipeline.encode_prompt(
                given, do_classifier_free_guidance=negative, negative_prompt=list(prompts) if negative else None,
                device=device, max_sequence_length=LENGTH,
            )  # fmt: skip
            embeds, mask = found[2:] if negative else found[:2]
            return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

        return encode

    return encoder


def surplus(parts: Parts, negative: bool) -> Callable[[str], int]:
    """Return the count of tokens that are not read: behind the system prompt, but for negative prompts."""
    unused = dict.fromkeys(("vae", "transformer", "scheduler", "text_encoder"))
    pipeline: Any = Lumina2Pipeline(**unused, tokenizer=parts["tokenizer"])
    before = "" if negative else pipeline.system_prompt + " <Prompt Start> "
    return lambda prompt: max(0, num_tokens(parts["tokenizer"], before + prompt) - LENGTH)


LAYERS = (*ATTENTION, "linear_1", "linear_2", "linear_3")
"""Layers that its LoRAs change."""

FAMILY = Family(
    "Lumina2Pipeline", "transformer", Lumina2Transformer2DModel, {"text_encoder": Gemma2Model},
    encoder=encoder_of(negative=False), negative=encoder_of(negative=True), surplus=surplus, flow=True, call=call,
    blocks="layers", text_mask="encoder_attention_mask", lora=LAYERS, norm="row", bounded=False,
)  # fmt: skip
