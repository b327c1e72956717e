"""Stable Diffusion 1.x (eps) and 2.x (v)."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from scorefield.denoiser import Cond
from scorefield.models.families import Family, Parts, beyond
from scorefield.models.lora_keys import underscored
from scorefield.models.prompts import Encode


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of CLIP."""
    del network
    unused = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipeline: Any = StableDiffusionPipeline(**unused, **parts, requires_safety_checker=False)

    def encode(prompts: list[str]) -> Cond:
        embeds, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    return encode


FAMILY = Family(
    "StableDiffusionPipeline", "unet", UNet2DConditionModel, {"text_encoder": CLIPTextModel}, encoder=encoder,
    surplus=beyond(tokenizer=None), kohya=underscored,
)  # fmt: skip
