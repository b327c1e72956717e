"""Qwen-Image (flow, guidance that keeps the length of tokens)."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import QwenImageControlNetModel, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from scorefield.denoiser import Cond
from scorefield.models.controls import RESIDUAL, Control, copy_blocks, numbered, take_numbered
from scorefield.models.families import JOINT, Family, Parts, num_tokens
from scorefield.models.families.flux import pack, unpack
from scorefield.models.lora_keys import underscored
from scorefield.models.prompts import Encode

LENGTH = 512
"""Tokens of a prompt, behind its template, that the transformer reads."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer about packed latents, at t in [0, 1]."""
    height, width = x_t.shape[2:]
    if residuals := take_numbered(given, RESIDUAL):
        given["controlnet_block_samples"] = list(residuals.values())
    prediction: Tensor = model(pack(x_t), **_told(x_t, t, given))[0]
    return unpack(prediction, height, width)


def _told(x_t: Tensor, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Return the conditions with time and shapes, as transformer and ControlNet take them."""
    shapes = [[(1, x_t.shape[2] // 2, x_t.shape[3] // 2)]] * len(x_t)
    return {**given, "timestep": (t / 1000).to(x_t.dtype), "img_shapes": shapes, "return_dict": False}


def make_control(transformer: Any) -> Any:
    """Return a ControlNet of the first blocks, 5 at most, as diffusers has it."""
    blocks = min(5, len(transformer.transformer_blocks))
    return copy_blocks(QwenImageControlNetModel, transformer, num_layers=blocks)


def call_control(
    model: Any, transformer: Any, x_t: Tensor, t: Tensor, hint: Tensor, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Ask the ControlNet about packed latents."""
    del transformer
    return numbered(RESIDUAL, model(pack(x_t), controlnet_cond=pack(hint), **_told(x_t, t, given)))


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the last hidden states of Qwen2.5-VL behind the template, and which of them are text."""
    del network
    unused = dict.fromkeys(("vae", "transformer", "scheduler"))
    pipeline: Any = QwenImagePipeline(**unused, **parts)

    def encode(prompts: list[str]) -> Cond:
        embeds, mask = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=LENGTH)
        if mask is None:  # all are text
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        room = LENGTH - embeds.shape[1]
        return {
            "encoder_hidden_states": nn.functional.pad(embeds, (0, 0, 0, room)),
            "encoder_hidden_states_mask": nn.functional.pad(mask, (0, room)),
        }  # fmt: skip

    return encode


def surplus(parts: Parts, negative: bool) -> Callable[[str], int]:
    """Return the count of tokens behind those of the template that are not read."""
    del negative
    unused = dict.fromkeys(("vae", "transformer", "scheduler", "text_encoder"))
    pipeline: Any = QwenImagePipeline(**unused, tokenizer=parts["tokenizer"])
    template, most = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx + LENGTH
    return lambda prompt: max(0, num_tokens(parts["tokenizer"], template.format(prompt)) - most)


LAYERS = (*JOINT, *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")))
"""Layers that its LoRAs change."""

FAMILY = Family(
    "QwenImagePipeline", "transformer", QwenImageTransformer2DModel,
    {"text_encoder": Qwen2_5_VLForConditionalGeneration}, encoder=encoder, surplus=surplus,
    flow=True,
    blocks="transformer_blocks", call=call, lora=LAYERS, packing=2,
    size=(1024, 1024), norm="token", bounded=False, kohya=underscored,
    control=Control(
        QwenImageControlNetModel, "QwenImageControlNetPipeline", make_control, call_control, prompt_only=True
    ),
)  # fmt: skip
