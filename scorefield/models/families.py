"""What differs between the pipelines of diffusers that can teach: parts, prompts, the call of the network."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from scorefield.denoiser import Cond
from scorefield.models.prompts import CUT, Encode


class DiffusersNetwork(nn.Module):
    """A model of diffusers called as ``network(x_t, t, **cond)``, computed in the precision of its weights.

    ``cond`` is flat, so that guidance can join conditions; :func:`model_arguments` gives it diffusers' form. Times
    stay float32, since bf16 cannot tell timestep 998 from 1000.

    Attributes:
        model: a UNet2DModel, UNet2DConditionModel or SD3Transformer2DModel.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """The prediction, shape of x_t. Raises ``TypeError`` for a condition that the model does not know."""
        dtype = next(self.model.parameters()).dtype
        given = model_arguments(cond, dtype)
        prediction: Tensor = self.model(x_t.to(dtype), timestep=t, return_dict=False, **given)[0]
        return prediction


def model_arguments(cond: Cond, dtype: torch.dtype) -> dict[str, Any]:
    """Flat conditions as keywords of a diffusers model, floats in ``dtype``.

    SDXL's ``text_embeds`` and ``time_ids`` go into ``added_cond_kwargs``. ``mid_residual`` and
    ``down_residual_0`` to n, finest first, are what a ControlNet adds to middle block and skip connections.
    """
    given: dict[str, Any] = {
        name: value.to(dtype) if value.is_floating_point() and name != "time_ids" else value
        for name, value in cond.items()
    }
    if added := {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}:
        given["added_cond_kwargs"] = added
    if "mid_residual" in given:
        given["mid_block_additional_residual"] = given.pop("mid_residual")
        names = itertools.takewhile(given.__contains__, map("down_residual_{}".format, itertools.count()))
        given["down_block_additional_residuals"] = tuple(map(given.pop, list(names)))
    return given


Parts = Mapping[str, Any]
"""Text encoders and tokenizers by the names of their folders."""


@dataclass(frozen=True)
class Family:
    """One kind of pipeline.

    Attributes:
        part: folder of the network.
        network: its class.
        texts: folders and classes of the text encoders; ``tokenizer_2`` belongs to ``text_encoder_2``.
        optional: text encoders that a model may come without.
        encoder: (text parts, network, device) -> the prompt encoding of diffusers; None if there are no prompts.
        flow: trained on straight paths with t in [0, 1000].
        zero_negative: an empty negative prompt is zeros, unless the model's index says otherwise.
        upcast: the autoencoder overflows in float16, if its config says so.
    """

    part: str
    network: type
    texts: Mapping[str, type]
    optional: tuple[str, ...] = ()
    encoder: Callable[[Parts, nn.Module, torch.device], Encode] | None = None
    flow: bool = False
    zero_negative: bool = False
    upcast: bool = False


T5_LENGTH = 256
"""Tokens that SD3's T5 reads."""


def _num_cut(prompts: list[str], *tokenizers: tuple[Any, int | None]) -> Tensor:
    """(n,) tokens that are cut, counted where most are; a limit of None is the tokenizer's own."""
    cut = torch.zeros(len(prompts), dtype=torch.long)
    for tokenizer, limit in tokenizers:
        lengths = torch.tensor([len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts])
        cut = cut.maximum(lengths - (limit or tokenizer.model_max_length))
    return cut


def _sd_encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    del network
    unused = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipeline: Any = StableDiffusionPipeline(**unused, **parts, requires_safety_checker=False)

    def encode(prompts: list[str]) -> Cond:
        embeds, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds, CUT: _num_cut(prompts, (parts["tokenizer"], None))}

    return encode


def _sdxl_encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    del network
    unused = dict.fromkeys(("vae", "unet", "scheduler"))
    pipeline: Any = StableDiffusionXLPipeline(**unused, **parts, add_watermarker=False)

    def encode(prompts: list[str]) -> Cond:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        cut = _num_cut(prompts, *((parts[name], None) for name in ("tokenizer", "tokenizer_2")))
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, CUT: cut}

    return encode


def _sd3_encoder(parts: Parts, network: nn.Module, device: torch.device) -> Encode:
    unused = dict.fromkeys({"vae", "scheduler", "text_encoder_3", "tokenizer_3"} - parts.keys())
    # The transformer is asked for the width of the zeros that stand in for a missing T5.
    pipeline: Any = StableDiffusion3Pipeline(**unused, **parts, transformer=network)

    def encode(prompts: list[str]) -> Cond:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
        limits = {"tokenizer": None, "tokenizer_2": None, "tokenizer_3": T5_LENGTH}
        cut = _num_cut(prompts, *((parts[name], limit) for name, limit in limits.items() if name in parts))
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled, CUT: cut}

    return encode


def has_part(index: Mapping[str, Any], part: str) -> bool:
    """Whether a ``model_index.json`` names a class for ``part``; one that is left out is [null, null] there."""
    value = index.get(part)
    return isinstance(value, list) and bool(value) and value[0] is not None


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """Folders that a pipeline of this ``model_index.json`` is made of, text encoders only as far as it has them.

    Raises ``ValueError`` as :func:`family_of` does.
    """
    family = family_of(index)
    texts = [part for part in family.texts if has_part(index, part)]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in texts]
    return [family.part, "scheduler", *texts, *tokenizers, *(["vae"] if family.texts else [])]


_SD = Family("unet", UNet2DConditionModel, {"text_encoder": CLIPTextModel}, encoder=_sd_encoder)
_SDXL = Family(
    "unet", UNet2DConditionModel, {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
    encoder=_sdxl_encoder, zero_negative=True, upcast=True,
)  # fmt: skip
_SD3_TEXTS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
_SD3 = Family("transformer", SD3Transformer2DModel, _SD3_TEXTS, ("text_encoder_3",), _sd3_encoder, flow=True)
_PIXELS = Family("unet", UNet2DModel, {})

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
    "DDPMPipeline": _PIXELS,
    "DDIMPipeline": _PIXELS,
}


def family_of(index: Mapping[str, Any]) -> Family:
    """The family that a ``model_index.json`` names. Raises ``ValueError`` for any other class.

    A pair of names stands for a class in a Python file of the model's own, which is never run.
    """
    name = index.get("_class_name")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(f"unsupported pipeline class {name!r}; expected one of {', '.join(FAMILIES)}.")
    return family
