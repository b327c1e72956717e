"""Z-Image (flow, told 1 - t, texts without padding)."""

from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Model

from scorefield.denoiser import Cond
from scorefield.models.families import ATTENTION, Family, Parts, in_chat
from scorefield.models.prompts import Encode

LENGTH = 512
"""Tokens of a prompt, with its chat template, that its Qwen3 reads."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer, which knows t as 1 - t and predicts x0 - noise, about lists of images and texts.

    Padding would change its answers, so each text is as long as its mask says.
    """
    texts = [text[kept] for text, kept in zip(given["texts"], given["mask"].bool(), strict=True)]
    images = list(x_t[:, :, None].unbind())
    predictions: list[Tensor] = model(images, (1000 - t) / 1000, texts, return_dict=False)[0]
    return -torch.stack(predictions)[:, :, 0]


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """The hidden states of Qwen3 before its last layer, and which of them are text."""
    del network
    unused = dict.fromkeys(("vae", "transformer", "scheduler"))
    pipeline: Any = ZImagePipeline(**unused, **parts)

    def encode(prompts: list[str]) -> Cond:
        # The pipeline rewrites the list that it is given.
        texts, _ = pipeline.encode_prompt(
            list(prompts), device, do_classifier_free_guidance=False, max_sequence_length=LENGTH
        )
        lengths = torch.tensor([len(text) for text in texts], device=device)
        padded = torch.stack([nn.functional.pad(text, (0, 0, 0, LENGTH - len(text))) for text in texts])
        mask = (torch.arange(LENGTH, device=device) < lengths[:, None]).long()
        return {"texts": padded, "mask": mask}

    return encode


LAYERS = (*ATTENTION, "w1", "w2", "w3")
"""Layers that its LoRAs change."""

FAMILY = Family(
    "ZImagePipeline", "transformer", ZImageTransformer2DModel, {"text_encoder": Qwen3Model}, encoder=encoder,
    surplus=in_chat(LENGTH, enable_thinking=True),
    flow=True, blocks="layers", image_first=True, call=call, lora=LAYERS, size=(1024, 1024), patch=2,
    bounded=False,
)  # fmt: skip
