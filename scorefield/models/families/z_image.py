"""Z-Image (flow, told 1 - t, texts without padding)."""

from typing import Any

import torch
from diffusers import ZImageControlNetModel, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Model

from scorefield.denoiser import Cond
from scorefield.models.controls import RESIDUAL, Control, numbered, take_numbered
from scorefield.models.families import ATTENTION, Family, Parts, in_chat
from scorefield.models.lora_keys import fused
from scorefield.models.prompts import Encode

LENGTH = 512
"""Tokens of a prompt, with its chat template, that its Qwen3 reads."""


def call(model: Any, x_t: Tensor, t: Tensor, given: dict[str, Any]) -> Tensor:
    """Ask the transformer, which knows t as 1 - t and predicts x0 - noise, about lists of images and texts.

    Padding would change its answers, so each text is as long as its mask says.
    """
    residuals = take_numbered(given, RESIDUAL)
    predictions: list[Tensor] = model(
        *_lists(x_t, t, given), controlnet_block_samples=residuals or None, return_dict=False
    )[0]
    return -torch.stack(predictions)[:, :, 0]


def _lists(x_t: Tensor, t: Tensor, given: dict[str, Any]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Return images, times and texts as transformer and ControlNet take them."""
    texts = [text[kept] for text, kept in zip(given["texts"], given["mask"].bool(), strict=True)]
    return list(x_t[:, :, None].unbind()), (1000 - t) / 1000, texts


BORROWED = (
    "t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder", "noise_refiner", "context_refiner",
    "x_pad_token", "cap_pad_token",
)  # fmt: skip
"""What ``ZImageControlNetModel.from_transformer`` takes of the transformer."""


def make_control(transformer: Any) -> Any:
    """Return a ControlNet of every fifth layer, with the form of the first published one for Z-Image-Turbo."""
    number = len(transformer.layers)
    places = list(range(0, number, 5))
    config = transformer.config
    same = ("dim", "n_heads", "n_kv_heads", "n_refiner_layers", "norm_eps", "qk_norm", "all_patch_size")
    weight = next(transformer.parameters())
    with torch.device(weight.device):
        model: Any = ZImageControlNetModel(
            control_layers_places=places, control_in_dim=config.in_channels,
            all_f_patch_size=config.all_f_patch_size, **{name: config[name] for name in same},
        )  # fmt: skip
    model.gradient_checkpointing = False  # which its class forgets, and its forward asks for
    if not weight.is_meta:
        pairs = [(model.control_layers[number], transformer.layers[place]) for number, place in enumerate(places)]
        pairs += [
            (model.control_noise_refiner, transformer.noise_refiner),
            (model.control_all_x_embedder, transformer.all_x_embedder),
        ]  # fmt: skip
        for own, given in pairs:
            lacking, unknown = own.load_state_dict(given.state_dict(), strict=False)
            odd = [*unknown, *(name for name in lacking if not name.startswith(("before_proj", "after_proj")))]
            if odd:
                raise ValueError(f"diffusers' ZImageControlNetModel cannot copy this transformer: {odd}.")
    return model.float()


def call_control(
    model: Any, transformer: Any, x_t: Tensor, t: Tensor, hint: Tensor, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Ask the ControlNet about lists; hints fill up to the channels of a ControlNet that inpaints, too."""
    del transformer
    hints = hint[:, :, None]
    room = model.config.control_in_dim - hints.shape[1]
    hints = nn.functional.pad(hints, (0, 0, 0, 0, 0, 0, 0, room))
    return numbered(RESIDUAL, model(*_lists(x_t, t, given), list(hints.unbind())))


def encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    """Return the hidden states of Qwen3 before its last layer, and which of them are text."""
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


BLOCKS = ("layers", "noise_refiner", "context_refiner")

LAYERS = (*ATTENTION, "w1", "w2", "w3")
"""Layers that its LoRAs change."""

ATTENTION_OF_MAKERS = dict.fromkeys(("to_q", "to_k", "to_v"), "qkv") | {"to_out.0": "out"}

KOHYA = {
    **{f"{blocks}.attention.{own}": f"{blocks}.attention.{theirs}" for blocks in BLOCKS
       for own, theirs in ATTENTION_OF_MAKERS.items()},
    **{f"{blocks}.feed_forward.{own}": f"{blocks}.feed_forward.{own}" for blocks in BLOCKS
       for own in ("w1", "w2", "w3")},
}  # fmt: skip
"""Names of its layers to those of its makers."""

FAMILY = Family(
    "ZImagePipeline", "transformer", ZImageTransformer2DModel, {"text_encoder": Qwen3Model}, encoder=encoder,
    surplus=in_chat(LENGTH, enable_thinking=True),
    flow=True, blocks="layers", image_first=True, call=call, lora=LAYERS, size=(1024, 1024), patch=2,
    bounded=False, kohya=lambda layers: fused(layers, KOHYA),
    control=Control(
        ZImageControlNetModel, "ZImageControlNetPipeline", make_control, call_control, borrowed=BORROWED
    ),
)  # fmt: skip
