"""Weights that an adapter starts from in place of a fresh copy of the encoder: --init-from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlnet.adapter import EncoderCopy, unet_of
from controlnet.export import load_adapter
from controlnet.options import Config
from controlnet.training import DECODER
from scorefield.cache import fingerprint
from scorefield.models.pretrained import PartReader
from scorefield.models.teacher import Teacher

FIRST = "model.controlnet_cond_embedding.conv_in.weight"
"""Weights of the hint's first convolution."""


def start_from(config: Config, teacher: Teacher, adapter: EncoderCopy) -> str | None:
    """Give a fresh adapter, and under --unlocked the teacher's decoder, the weights that ``--init-from`` names.

    Returns a hash of the weights, None if none are named. Raises ``ValueError`` for those of another base or of
    other hints, and for an adapter whose decoder was trained without --unlocked here.
    """
    source = config.init_from
    if not source:
        return None
    with_decoder = (Path(source) / "config.json").is_file() and (Path(source) / "unet").is_dir()
    if with_decoder and not config.unlocked:
        raise ValueError(f"--init-from {source} was trained with a decoder of its own. Pass --unlocked, too.")
    try:
        given = load_adapter(source)
    except ValueError as error:
        raise ValueError(f"--init-from: {error}") from error
    weights, hashed = _fitting(source, given, adapter), list[Tensor]()
    adapter.load_state_dict(weights)
    if with_decoder:
        hashed = _give_decoder(Path(source), unet_of(teacher.denoiser))
    return fingerprint([*(weights[name] for name in sorted(weights)), *hashed])


def _fitting(source: str, given: EncoderCopy, adapter: EncoderCopy) -> dict[str, Tensor]:
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
