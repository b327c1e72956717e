"""LoRA files in the keys of kohya's scripts, and files in any keys that diffusers converts.

A kohya file names a layer by its place in the makers' own network, with underscores for dots. Where that network
has one layer for several of diffusers' (queries, keys and values), their changes go into one of as many times the
rank, whose second matrix is block-diagonal: the same function.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError
from torch import Tensor

from scorefield.files import check_regular
from scorefield.models.lora import LoRA, adapter_weights
from scorefield.models.weights import check_finite

KOHYA = "kohya.safetensors"
"""Name of the file that is written beside diffusers' own."""

PREFIX = "lora_unet_"
"""How the names of its layers begin, also of transformers."""


def underscored(layers: Sequence[str]) -> dict[str, list[str]]:
    """Return diffusers' own names of layers, with underscores: UNets, Qwen-Image."""
    return {layer.replace(".", "_"): [layer] for layer in layers}


def fused(layers: Sequence[str], names: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the layers by the makers' names; several of one name are one layer there, in the order of ``names``.

    Args:
        layers: diffusers' names, such as "transformer_blocks.3.attn.to_q".
        names: ends of diffusers' names to ends of the makers', both behind the number of the block, with the name
            of the list in front, such as "transformer_blocks.attn.to_q": "double_blocks.img_attn_qkv".

    Raises:
        ValueError: a layer that ``names`` does not have.
    """
    order = {name: number for number, name in enumerate(names)}
    found: dict[str, list[str]] = {}
    for layer in sorted(layers, key=lambda layer: order.get(_plain(layer), -1)):
        if (theirs := names.get(_plain(layer))) is None:
            raise ValueError(f"kohya's keys have no name for the layer {layer}.")
        first, _, rest = theirs.partition(".")
        number = [part for part in layer.split(".")[1:2] if part.isdecimal()]
        found.setdefault("_".join([first, *number, *rest.split(".")] if rest else [first]), []).append(layer)
    return found


def _plain(layer: str) -> str:
    parts = layer.split(".")
    return ".".join(parts[:1] + parts[2:]) if parts[1:2] and parts[1].isdecimal() else layer


def kohya_weights(adapted: LoRA, named: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return the changes by kohya's keys, each with its alpha: changes are scaled by alpha / rank.

    Args:
        adapted: whose changes they are.
        named: a family's names of its layers, :func:`underscored` or :func:`fused`.
    """
    # The scale is in these already, so that alpha is the rank, also for readers that take no notice of it.
    weights = adapter_weights(adapted)
    made = {}
    for name, layers in named.items():
        down = torch.cat([weights[f"{layer}.lora_A.weight"] for layer in layers])
        ups = [weights[f"{layer}.lora_B.weight"] for layer in layers]
        up = ups[0] if len(ups) == 1 else torch.block_diag(*ups)
        made[f"{PREFIX}{name}.lora_down.weight"] = down
        made[f"{PREFIX}{name}.lora_up.weight"] = up.contiguous()
        made[f"{PREFIX}{name}.alpha"] = torch.tensor(float(len(down)))
    return made


def layers_of(adapted: LoRA) -> list[str]:
    """Return the names of the layers that a LoRA changes, without that of its wrapper."""
    return [
        name.removesuffix(".lora_A.weight") for name in adapter_weights(adapted) if name.endswith("lora_A.weight")
    ]


def read_lora(file: Path, pipeline: str, part: str) -> dict[str, Tensor]:
    """Return the changes in a file of any keys that diffusers converts, by the names of ``lora.adapter_weights``.

    Args:
        file: a .safetensors file: diffusers', peft's, or kohya's keys.
        pipeline: name of the class of diffusers whose LoRAs it is one of.
        part: name of the network in it, "unet" or "transformer".

    Raises:
        ValueError: a file that cannot be read, of keys that are not known, or with weights that are not finite.
    """
    try:
        check_regular(file)
        found = getattr(diffusers, pipeline).lora_state_dict(
            str(file.parent), weight_name=file.name, local_files_only=True
        )
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as a LoRA of {pipeline}: {error}") from error
    state, alphas = found if isinstance(found, tuple) else (found, None)
    state = _scaled({name: value for name, value in state.items() if isinstance(value, Tensor)}, alphas or {})
    own = {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
    if part == "unet" and not any(".lora_A." in name for name in own):
        own = {name.replace(".processor.", "."): value for name, value in own.items()}
        own = convert_unet_state_dict_to_peft(own)
    if not own:
        raise ValueError(f"{file} holds no LoRA of a {part}: its keys begin {', '.join(sorted(state)[:3])}.")
    check_finite(own, file)
    return {name: value.float() for name, value in own.items()}


def _scaled(state: Mapping[str, Tensor], alphas: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return LoRA weights with alpha / rank multiplied into the second matrices."""
    ends = ((".lora_B.weight", ".lora_A.weight"), (".up.weight", ".down.weight"))
    made = {}
    for name, value in state.items():
        made[name] = value
        for second, first in ends:
            if name.endswith(second):
                down = name.removesuffix(second) + first
                keys = (f"{down.split('.lora.')[0]}.alpha", f"{down.split('.lora_A.')[0]}.alpha")
                alpha = next((alphas[key] for key in keys if key in alphas), None)
                if alpha is not None:
                    made[name] = value * (float(alpha) / len(state[down]))
    return made
