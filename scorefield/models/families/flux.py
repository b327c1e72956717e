"""FLUX.1 (flow, embedded guidance): dev, schnell and models of their kind."""

from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from scorefield.denoiser import Cond
from scorefield.models.controls import HINT, RESIDUAL, SINGLE, Control, copy_blocks, numbered, take_numbered
from scorefield.models.families import JOINT, Family, Parts, beyond
from scorefield.models.lora_keys import fused
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
    """Ask the transformer about packed latents, at t in [0, 1]; those of a hint are further channels."""
    height, width = x_t.shape[2:]
    tokens = [pack(x_t), *([pack(given.pop(HINT))] if HINT in given else [])]
    double, single = take_numbered(given, RESIDUAL), take_numbered(given, SINGLE)
    if double or single:
        given["controlnet_block_samples"] = list(double.values()) or None
        given["controlnet_single_block_samples"] = list(single.values()) or None
    prediction: Tensor = model(torch.cat(tokens, 2), **_told(x_t, t, given))[0]
    return unpack(prediction, height, width)


def _told(x_t: Tensor, t: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Return the conditions with time and positions, as transformer and ControlNet take them."""
    height, width = x_t.shape[2:]
    texts = x_t.new_zeros(given["encoder_hidden_states"].shape[1], 3)
    images = positions(height // 2, width // 2, x_t)
    time = (t / 1000).to(x_t.dtype)
    return {**given, "timestep": time, "img_ids": images, "txt_ids": texts, "return_dict": False}


def make_control(transformer: Any) -> Any:
    """Return a ControlNet of the first blocks, 4 of two streams and 10 of one at most, as diffusers has it."""
    double, single = (
        len(blocks) for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks)
    )
    return copy_blocks(
        FluxControlNetModel, transformer, num_layers=min(4, double), num_single_layers=min(10, single)
    )


def call_control(
    model: Any, transformer: Any, x_t: Tensor, t: Tensor, hint: Tensor, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Ask the ControlNet about packed latents."""
    del transformer
    double, single = model(pack(x_t), controlnet_cond=pack(hint), **_told(x_t, t, given))
    return numbered(RESIDUAL, double) | numbered(SINGLE, single)


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of T5, and the pooled ones of CLIP."""
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

DOUBLE, ONE = "transformer_blocks", "single_transformer_blocks"

KOHYA = {
    **{f"{DOUBLE}.attn.to_{one}": "double_blocks.img_attn_qkv" for one in "qkv"},
    **{f"{DOUBLE}.attn.add_{one}_proj": "double_blocks.txt_attn_qkv" for one in "qkv"},
    f"{DOUBLE}.attn.to_out.0": "double_blocks.img_attn_proj",
    f"{DOUBLE}.attn.to_add_out": "double_blocks.txt_attn_proj",
    **{f"{DOUBLE}.{own}.net.{end}": f"double_blocks.{theirs}_mlp_{end[0]}"
       for own, theirs in (("ff", "img"), ("ff_context", "txt")) for end in ("0.proj", "2")},
    **{f"{ONE}.attn.to_{one}": "single_blocks.linear1" for one in "qkv"},
    f"{ONE}.proj_mlp": "single_blocks.linear1",
    f"{ONE}.proj_out": "single_blocks.linear2",
    "proj_out": "final_layer_linear",
}  # fmt: skip
"""Names of its layers to those of its makers."""

FAMILY = Family(
    "FluxPipeline", "transformer", FluxTransformer2DModel,
    {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel},
    encoder=encoder, flow=True, blocks="transformer_blocks", call=call, lora=LAYERS, packing=2, size=(1024, 1024),
    surplus=beyond(tokenizer_2=T5_LENGTH), kohya=lambda layers: fused(layers, KOHYA),
    control=Control(
        FluxControlNetModel, "FluxControlNetPipeline", make_control, call_control, prompt_only=True,
        widened="x_embedder", lora_pipeline="FluxControlPipeline",
    ),
)  # fmt: skip
