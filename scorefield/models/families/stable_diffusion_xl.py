"""SDXL (arXiv 2307.01952)."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from scorefield.denoiser import Cond
from scorefield.models.families import Family, Parts, beyond
from scorefield.models.lora_keys import underscored
from scorefield.models.prompts import Encode


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of two CLIPs, and the pooled ones of the second."""
    del network
    unused = dict.fromkeys(("vae", "unet", "scheduler"))
    pipeline: Any = StableDiffusionXLPipeline(**unused, **parts, add_watermarker=False)

    def encode(prompts: list[str]) -> Cond:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    return encode


FAMILY = Family(
    "StableDiffusionXLPipeline", "unet", UNet2DConditionModel,
    {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
    encoder=encoder, surplus=beyond(tokenizer=None, tokenizer_2=None), zero_negative=True, upcast=True,
    kohya=underscored,
)  # fmt: skip
