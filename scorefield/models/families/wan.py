"""Wan 2.1 (flow): videos, and images as videos of one frame."""

from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from scorefield.denoiser import Cond
from scorefield.models.families import ATTENTION, Family, Parts, beyond
from scorefield.models.prompts import Encode

LENGTH = 512
"""Tokens that its UMT5 reads; the rest are zeros."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer about videos (b, c, f, h, w), or about images as videos of one frame."""
    video = x_t if x_t.ndim == 5 else x_t[:, :, None]
    prediction: Tensor = model(video, timestep=t, return_dict=False, **given)[0]
    return prediction.view_as(x_t)


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of UMT5."""
    del network
    unused = dict.fromkeys(("vae", "scheduler"))
    pipeline: Any = WanPipeline(**unused, **parts)

    def encode(prompts: list[str]) -> Cond:
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, max_sequence_length=LENGTH
        )
        return {"encoder_hidden_states": embeds}

    return encode


LAYERS = (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")
"""Layers that its LoRAs change."""

FAMILY = Family(
    "WanPipeline", "transformer", WanTransformer3DModel, {"text_encoder": UMT5EncoderModel}, encoder=encoder,
    flow=True, blocks="blocks", call=call, lora=LAYERS, size=(480, 832), bounded=False,
    fps=16, other=("transformer_2", "boundary_ratio", "expand_timesteps"),
    surplus=beyond(tokenizer=LENGTH),
)  # fmt: skip
