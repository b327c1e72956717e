"""What differs between the pipelines of diffusers that can teach: a module for each, called after its class.

``StableDiffusionXLPipeline`` is read as ``stable_diffusion_xl.FAMILY`` says. To add a family, add its module here:
nothing else has to be told.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scorefield.models.prompts import Encode

Parts = Mapping[str, Any]
"""Text encoders and tokenizers by the names of their folders."""


@dataclass(frozen=True)
class Family:
    """One kind of pipeline.

    Attributes:
        pipeline: its class, as ``model_index.json`` names it.
        part: folder of the network.
        network: class of the network.
        texts: folders and classes of the text encoders; ``tokenizer_2`` belongs to ``text_encoder_2``.
        optional: text encoders that a model may come without.
        encoder: (text parts, network, device) -> the prompt encoding of diffusers; None if there are no prompts.
        flow: trained on straight paths with t in [0, 1000].
        zero_negative: an empty negative prompt is zeros, unless the model's index says otherwise.
        upcast: the autoencoder overflows in float16, if its config says so.
    """

    pipeline: str
    part: str
    network: type
    texts: Mapping[str, type]
    optional: tuple[str, ...] = ()
    encoder: Callable[[Parts, nn.Module, torch.device], Encode] | None = None
    flow: bool = False
    zero_negative: bool = False
    upcast: bool = False


def family_of(index: Mapping[str, Any]) -> Family:
    """The family that a ``model_index.json`` names. Raises ``ValueError`` for any other class.

    A pair of names stands for a class in a Python file of the model's own, which is never run.
    """
    name, known = index.get("_class_name"), [module.name for module in pkgutil.iter_modules(__path__)]
    module = _module_of(name) if isinstance(name, str) else ""
    if module in known and (family := _family(module)).pipeline == name:
        return family
    expected = ", ".join(sorted(_family(module).pipeline for module in known))
    raise ValueError(f"unsupported pipeline class {name!r}; expected one of {expected}.")


def _module_of(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z0-9])", "_", name.removesuffix("Pipeline")).lower()


def _family(module: str) -> Family:
    family: Family = importlib.import_module(f"{__name__}.{module}").FAMILY
    return family


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


def num_cut(prompts: list[str], *tokenizers: tuple[Any, int | None]) -> Tensor:
    """(n,) tokens that are cut, counted where most are; a limit of None is the tokenizer's own."""
    cut = torch.zeros(len(prompts), dtype=torch.long)
    for tokenizer, limit in tokenizers:
        lengths = torch.tensor([len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts])
        cut = cut.maximum(lengths - (limit or tokenizer.model_max_length))
    return cut
