"""What differs between the pipelines of diffusers that can teach: a module for each, called after its class.

``StableDiffusionXLPipeline`` is read as ``stable_diffusion_xl.FAMILY`` says; underscores do not count. To add a
family, add its module here: nothing else has to be told.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scorefield.guidance import Norm
from scorefield.models.controls import Control
from scorefield.models.networks import Call, plain_call
from scorefield.models.preflight import flow_shift
from scorefield.models.prompts import Encode

Parts = Mapping[str, Any]
"""Text encoders and tokenizers by the names of their folders."""

Encoder = Callable[[Parts, nn.Module, torch.device], Encode]
"""(text parts, network, device) -> the prompt encoding of diffusers."""

Surplus = Callable[[Parts, bool], Callable[[str], int]]
"""(tokenizers, whether prompts are negative ones) -> (prompt -> tokens at its end that are not read).

Text encoders are not needed for it: a prompt that is too long is met before they are loaded."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Layers of attention in transformers, without and with a stream of texts."""


@dataclass(frozen=True)
class Family:
    """One kind of pipeline.

    Attributes:
        pipeline: its class, as ``model_index.json`` names it.
        part: folder of the network.
        network: class of the network.
        texts: folders and classes of the text encoders; ``tokenizer_2`` belongs to ``text_encoder_2``.
        optional: text encoders that a model may come without.
        encoder: of prompts; None if there are none.
        negative: of negative prompts, where they are encoded otherwise.
        surplus: how many tokens of a prompt are not read; None if there are no prompts.
        flow: trained on straight paths with t in [0, 1000].
        zero_negative: an empty negative prompt is zeros, unless the model's index says otherwise.
        upcast: the autoencoder overflows in float16, if its config says so.
        call: how its network is asked.
        latent: it works on the latents of an autoencoder.
        packing: pixels of a latent along a side that the network takes as one token, where its config counts
            packed channels; 1: it counts those of the latents.
        patch: latents along a side of a token, where the network's config does not say.
        fps: frames a second of its videos; 0: it draws images alone.
        other: entries of an index of models under the same name that need another call.
        variance: the network may predict a variance in further channels, which its call leaves out.
        size: (height, width) in pixels of the images, where the network's config does not say.
        classes: entry of the network's config that counts its classes; the label behind them means none.
        bounded: the tokenizers say how many tokens a text encoder reads; else the encoder does.
        lora: names, or ends of names, of the layers that LoRAs change; none: those of UNets, ``lora.LAYERS``.
        blocks: name of the list of a transformer's blocks, of which a critic reads the middle one; empty where
            the tokens of an image cannot be told in them.
        image_first: the tokens of the image come before those of the text where a block joins both.
        text_mask: the condition that marks the tokens of a text, where those of the image follow right behind.
        norm: how guidance keeps the length of predictions.
        embedded: the scale of guidance that a network is told whose config has guidance_embeds.
        shift: (scheduler settings, number of image tokens) -> shift of the noise levels of a sampling grid.
        control: its ControlNet, where it is a transformer and diffusers has one.
        kohya: names of layers in diffusers -> those of kohya's scripts, each with the layers that are one there;
            None where there are none that diffusers reads.
    """

    pipeline: str
    part: str
    network: type
    texts: Mapping[str, type]
    optional: tuple[str, ...] = ()
    encoder: Encoder | None = None
    negative: Encoder | None = None
    surplus: Surplus | None = None
    flow: bool = False
    zero_negative: bool = False
    upcast: bool = False
    call: Call = plain_call
    latent: bool = True
    packing: int = 1
    patch: int = 1
    variance: bool = False
    size: tuple[int, int] | None = None
    fps: int = 0
    other: tuple[str, ...] = ()
    classes: str = ""
    bounded: bool = True
    lora: tuple[str, ...] = ()
    blocks: str = ""
    image_first: bool = False
    text_mask: str = ""
    norm: Norm = "none"
    embedded: float = 3.5
    shift: Callable[[Mapping[str, Any], int], float] = flow_shift
    control: Control | None = None
    kohya: Callable[[Sequence[str]], dict[str, list[str]]] | None = None

    def token_side(self, config: Mapping[str, Any]) -> int:
        """Return how many latents along a side the network takes as one token, by its config."""
        patch = config.get("patch_size") or self.patch
        return max(self.packing, patch[-1] if isinstance(patch, list | tuple) else patch)


def family_of(index: Mapping[str, Any]) -> Family:
    """Return the family that a ``model_index.json`` names. Raises ``ValueError`` for any other class.

    A pair of names stands for a class in a Python file of the model's own, which is never run.
    """
    name, modules = index.get("_class_name"), [module.name for module in pkgutil.iter_modules(__path__)]
    plain = name.removesuffix("Pipeline").lower() if isinstance(name, str) else ""
    for module in modules:
        if module.replace("_", "") == plain and (family := _family(module)).pipeline == name:
            return family
    families = sorted(map(_family, modules), key=lambda family: family.pipeline)
    raise ValueError(
        f"unsupported pipeline class {name!r}; expected one of {', '.join(one.pipeline for one in families)}. "
        f"Nearest is {nearest(index, families).pipeline}. docs/families.md says how to add a family."
    )


def nearest(index: Mapping[str, Any], families: Sequence[Family]) -> Family:
    """Return the family that is most like an index of another pipeline.

    Classes of networks count most, then whether it is a flow, has texts, and a UNet or a transformer; then names.
    """
    classes = [value[1] for value in index.values() if isinstance(value, list) and len(value) == 2]
    flow = any(str(kind).startswith("FlowMatch") for kind in classes)
    texts = has_part(index, "text_encoder")

    def likeness(family: Family) -> float:
        shared = sum(kind.__name__ in classes for kind in {family.network, *family.texts.values()})
        names = difflib.SequenceMatcher(a=str(index.get("_class_name")), b=family.pipeline)
        kin = (family.flow == flow) + (bool(family.texts) == texts) + has_part(index, family.part)
        return 3 * shared + kin + names.ratio()

    return max(families, key=likeness)


def _family(module: str) -> Family:
    family: Family = importlib.import_module(f"{__name__}.{module}").FAMILY
    return family


def has_part(index: Mapping[str, Any], part: str) -> bool:
    """Return whether a ``model_index.json`` names a class for ``part``; one that is left out is [null, null]
    there.
    """
    value = index.get(part)
    return isinstance(value, list) and bool(value) and value[0] is not None


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """Folders that a pipeline of this ``model_index.json`` is made of, text encoders only as far as it has them.

    Raises ``ValueError`` as :func:`family_of` does.
    """
    family = family_of(index)
    texts = [part for part in family.texts if has_part(index, part)]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in texts]
    return [family.part, "scheduler", *texts, *tokenizers, *(["vae"] if family.latent else [])]


def beyond(**limits: int | None) -> Surplus:
    """Return the count of tokens beyond the limit of each tokenizer, where most are; None is a tokenizer's own."""

    def surplus(parts: Parts, negative: bool) -> Callable[[str], int]:
        del negative
        given = [(parts[name], limit) for name, limit in limits.items() if name in parts]
        known = [(tokenizer, limit or tokenizer.model_max_length) for tokenizer, limit in given]
        return lambda prompt: max([0, *(num_tokens(tokenizer, prompt) - most for tokenizer, most in known)])

    return surplus


def num_tokens(tokenizer: Any, text: str) -> int:
    """Return the length of a text in tokens, start and end among them."""
    return len(tokenizer(text, verbose=False).input_ids)


def in_chat(most: int, **template: bool) -> Surplus:
    """Return the count of tokens beyond ``most`` of a prompt in the chat template of the one tokenizer."""

    def surplus(parts: Parts, negative: bool) -> Callable[[str], int]:
        del negative
        tokenizer = parts["tokenizer"]

        def count(prompt: str) -> int:
            said = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **template)
            return max(0, num_tokens(tokenizer, text) - most)

        return count

    return surplus


def _control(family: Family) -> str:
    """Return how models of a family are controlled, in words."""
    if family.control is None:
        return "ControlNetModel" if family.network.__name__ == "UNet2DConditionModel" else "none"
    lora = f", LoRA for {family.control.lora_pipeline}" if family.control.widened else ""
    return family.control.model.__name__ + lora


def table() -> str:
    """Return all families as a table in Markdown: docs/families.md holds it."""
    head = [
        "pipeline",
        "network",
        "predicts",
        "texts",
        "guidance",
        "critic and guard read",
        "control",
        "default size",
    ]
    rows = [head, ["---"] * len(head)]
    for module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        family = _family(module)
        guidance = {"none": "classifier-free", "token": "keeps tokens' length", "row": "keeps rows' length"}
        texts = ", ".join(kind.__name__ for kind in family.texts.values())
        read = f"`{family.blocks}`, the middle one" if family.blocks else "nothing"
        rows.append([
            f"`{family.pipeline}`", family.network.__name__, "flow" if family.flow else "as its scheduler says",
            texts or ("classes" if family.classes else "none"), guidance[family.norm],
            "its middle block" if "UNet" in family.network.__name__ else read,
            _control(family), "{} x {}".format(*family.size) if family.size else "its config's",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
