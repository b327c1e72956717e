"""How a transformer is controlled: the ControlNet that diffusers has for it, made of the frozen transformer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESIDUAL, SINGLE = "residual_", "single_residual_"
"""Flat names, with a number behind them, of what a ControlNet adds to the blocks of a transformer."""

HINT = "hint_latents"
"""Condition of a transformer widened for control: latents of the hint, as further channels."""

ControlCall = Callable[[Any, Any, Tensor, Tensor, Tensor, dict[str, Any]], dict[str, Tensor]]
"""(ControlNet, transformer, x_t, t, latents of the hint, conditions) -> what is added to the transformer's blocks.

x_t and the hint's latents are (b, c, h, w), t (b,) in timesteps up to 1,000; names are :data:`RESIDUAL` and
:data:`SINGLE` with a number.
"""


@dataclass(frozen=True)
class Control:
    """The ControlNet of a family of transformers. Its hints are latents, encoded as images are.

    Attributes:
        model: class of diffusers.
        pipeline: class of diffusers that draws with it.
        make: a transformer -> a fresh ControlNet that leaves it unchanged.
        call: how the ControlNet is asked.
        borrowed: modules and parameters of the transformer that the ControlNet uses and does not keep.
        prompt_only: under classifier-free guidance the pipeline asks it for the prompt alone, and adds the same
            for the negative prompt.
        widened: name of the transformer's first layer, which a control LoRA widens to take the hint's latents as
            further channels; empty where no pipeline of diffusers does so.
        lora_pipeline: class of diffusers that draws with a control LoRA.
    """

    model: type
    pipeline: str
    make: Callable[[Any], Any]
    call: ControlCall
    borrowed: tuple[str, ...] = ()
    prompt_only: bool = False
    widened: str = ""
    lora_pipeline: str = ""


def copy_blocks(kind: type, transformer: Any, **changes: Any) -> Any:
    """Return a fresh ``kind`` with the settings of ``transformer``, and its weights where names are the same.

    What only ``kind`` has stays as it is made: zero, where it leads into the transformer. float32, on the device
    of the transformer.

    Args:
        kind: class of the ControlNet.
        transformer: whose first blocks are copied.
        changes: settings that differ, such as ``num_layers``.

    Raises:
        ValueError: a block of the transformer has weights that those of ``kind`` lack, so that a copy would
            compute something else.
    """
    names = inspect.signature(kind).parameters
    settings = {name: value for name, value in transformer.config.items() if name in names}
    weight = next(transformer.parameters())
    with torch.device(weight.device):
        model: Any = kind(**{**settings, **changes})
    own, given = model.state_dict(), transformer.state_dict()
    shared = {".".join(name.split(".")[:2]) for name in own}
    lacking = [name for name in given if name not in own and ".".join(name.split(".")[:2]) in shared]
    if lacking:
        raise ValueError(f"diffusers' {kind.__name__} cannot copy this transformer: it has no {lacking[0]}.")
    if not weight.is_meta:
        model.load_state_dict({name: given[name] for name in own if name in given}, strict=False)
    return model.float()


def numbered(prefix: str, values: Any) -> dict[str, Tensor]:
    """Return a list of tensors, or None, or tensors by number, under flat names."""
    items = values.items() if isinstance(values, dict) else enumerate(values or ())
    return {f"{prefix}{number}": value for number, value in items}


def take_numbered(given: dict[str, Any], prefix: str) -> dict[int, Tensor]:
    """Remove the conditions of :func:`numbered` from ``given``, and return them by number."""
    numbers = [name.removeprefix(prefix) for name in given if name.startswith(prefix)]
    return {number: given.pop(f"{prefix}{number}") for number in sorted(map(int, filter(str.isdigit, numbers)))}
