"""PixArt-Sigma (eps, a variance beside it)."""

from typing import Any

import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from scorefield.denoiser import Cond
from scorefield.models.families import ATTENTION, Family, Parts, beyond
from scorefield.models.prompts import Encode

LENGTH = 300
"""Tokens that its T5 reads."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer, and leave out the variance that it predicts in the second half of its channels."""
    if getattr(model, "use_additional_conditions", False):
        size = torch.tensor([x_t.shape[2:]], device=x_t.device) * 8
        ratio = (size[:, :1] / size[:, 1:]).to(x_t.dtype)
        conditions = {"resolution": size.to(x_t.dtype), "aspect_ratio": ratio}
        given["added_cond_kwargs"] = {name: value.repeat(len(x_t), 1) for name, value in conditions.items()}
    else:
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    prediction: Tensor = model(x_t, timestep=t, return_dict=False, **given)[0]
    return prediction[:, : x_t.shape[1]]


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of T5, and which of them are text."""
    del network
    unused = dict.fromkeys(("vae", "transformer", "scheduler"))
    pipeline: Any = PixArtSigmaPipeline(**unused, **parts)

    def encode(prompts: list[str]) -> Cond:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=LENGTH,
            clean_caption=True,
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}

    return encode


LAYERS = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
"""Layers that its LoRAs change."""

FAMILY = Family(
    "PixArtSigmaPipeline", "transformer", PixArtTransformer2DModel, {"text_encoder": T5EncoderModel},
    encoder=encoder, call=call, lora=LAYERS, blocks="transformer_blocks", variance=True,
    surplus=beyond(tokenizer=LENGTH),
)  # fmt: skip
