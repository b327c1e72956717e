"""Weights that an adapter starts from in place of a fresh copy of the encoder: --init-from."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from controlnet.adapter import EncoderCopy, unet_of
from controlnet.export import load_adapter
from controlnet.options import Config
from controlnet.training import DECODER
from controlnet.transformers import ControlLoRA, TransformerCopy
from scorefield.cache import fingerprint
from scorefield.files import check_regular
from scorefield.models.lora import LORA_FILE, load_adapter_weights
from scorefield.models.pretrained import PartReader, find_model
from scorefield.models.teacher import Teacher
from scorefield.models.weights import check_finite

FIRST = "model.controlnet_cond_embedding.conv_in.weight"
"""Weights of the hint's first convolution."""


def start_from(
    config: Config, teacher: Teacher, adapter: EncoderCopy | TransformerCopy | ControlLoRA
) -> str | None:
    """Give a fresh adapter, and under --unlocked the teacher's decoder, the weights that ``--init-from`` names.

    Returns a hash of the weights, None if none are named. Raises ``ValueError`` for those of another base or of
    other hints, and for an adapter whose decoder was trained without --unlocked here.
    """
    source = config.init_from
    if not source:
        return None
    if isinstance(adapter, ControlLoRA):
        return _give_lora(source, adapter)
    if (Path(source) / LORA_FILE).is_file():
        raise ValueError(f"--init-from {source} is a control LoRA. Pass --adapter lora, too.")
    if isinstance(adapter, TransformerCopy):
        return _give_copy(source, adapter)
    with_decoder = (Path(source) / "config.json").is_file() and (Path(source) / "unet").is_dir()
    if with_decoder and not config.unlocked:
        raise ValueError(f"--init-from {source} was trained with a decoder of its own. Pass --unlocked, too.")
    try:
        given = load_adapter(source)
    except ValueError as error:
        raise ValueError(f"--init-from: {error}") from error
    weights, hashed = _usable(source, given, adapter), list[Tensor]()
    adapter.load_state_dict(weights)
    if with_decoder:
        hashed = _give_decoder(Path(source), unet_of(teacher.denoiser))
    return fingerprint([*(weights[name] for name in sorted(weights)), *hashed])


def _give_copy(source: str, adapter: TransformerCopy) -> str:
    try:
        given: Any = PartReader(torch.float32, torch.device("cpu")).read(adapter.control.model, find_model(source))
    except ValueError as error:
        raise ValueError(f"--init-from: {error}") from error
    weights, own = given.state_dict(), adapter.model.state_dict()
    for name in sorted({*own, *weights}):
        there, here = (tuple(some[name].shape) if name in some else "not there" for some in (weights, own))
        if there != here:
            raise ValueError(
                f"--init-from {source} is an adapter of another base: {name} is {there}; here it is {here}."
            )
    adapter.model.load_state_dict(weights)
    return fingerprint(weights[name] for name in sorted(weights))


def _give_lora(source: str, adapter: ControlLoRA) -> str:
    file = Path(source) / LORA_FILE
    if not file.is_file():
        raise ValueError(
            f"--init-from {source} is no control LoRA: it has no {LORA_FILE}. Leave out --adapter lora."
        )
    try:
        check_regular(file)
        weights = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
        check_finite(weights, file)
        load_adapter_weights(adapter.adapted, weights)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"--init-from {source}: {error}") from error
    return fingerprint(weights[name] for name in sorted(weights))


def _usable(source: str, given: EncoderCopy, adapter: EncoderCopy) -> dict[str, Tensor]:
    weights = dict(given.state_dict())
    if adapter.channels == 1 and given.channels == 3:  # saved for three: to a grey hint the same function
        weights[FIRST] = weights[FIRST].sum(1, keepdim=True)
    own = adapter.state_dict()
    for name in sorted({*own, *weights}):
        there, here = (tuple(some[name].shape) if name in some else "not there" for some in (weights, own))
        if there != here:
            what = "hints of other channels" if name == FIRST else "another base"
            raise ValueError(
                f"--init-from {source} is an adapter of {what}: {name} is {there}; here it is {here}."
            )
    return weights


@torch.no_grad()
def _give_decoder(folder: Path, unet: Any) -> list[Tensor]:
    device = next(unet.parameters()).device
    trained: Any = PartReader(torch.float32, device).read(type(unet), folder / "unet")
    given = list[Tensor]()
    for name in DECODER:
        weights = getattr(trained, name).state_dict()
        try:
            getattr(unet, name).load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"--init-from {folder / 'unet'} is no decoder of this teacher: {error}") from error
        given += [weights[key] for key in sorted(weights)]
    return given
