"""A small pixel-space model, the painter, that draws the circles of ``controlnet.circles`` from their captions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from controlnet.circles import COLOURS
from scorefield import Cond, NetworkDenoiser, VariancePreserving
from scorefield.atomic import whole_folder
from scorefield.files import read_json
from scorefield.models.codec import Patches
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.pretrained import PartReader
from scorefield.models.teacher import Teacher

FACTS = "circles.json"
"""File that marks a folder as written by train_circles.py."""

PATCHES = Patches(2)

PALETTE = ("red", "lime", "blue", "yellow", "magenta", "cyan", "white", "black")
"""Colours of the small circles: the corners of the colour cube, which cannot be confused."""


def make_circles_unet(size: int) -> UNet2DConditionModel:
    """Return a small v-prediction network for patches of ``size`` pixel pictures, conditioned on two colours."""
    channels = 3 * PATCHES.factor**2
    return UNet2DConditionModel(
        sample_size=size // PATCHES.factor, in_channels=channels, out_channels=channels,
        block_out_channels=(48, 64, 96), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * len(COLOURS),
    )  # fmt: skip


def encode_captions(captions: Sequence[str]) -> Cond:
    """Return captions such as "red circle with blue background" as two tokens, one per colour; zeros if empty.

    Raises ``ValueError`` for any other caption.
    """
    states = torch.zeros(len(captions), 2, 2 * len(COLOURS))
    for row, caption in enumerate(captions):
        if not caption:
            continue
        colours = caption.removesuffix(" background").split(" circle with ")
        if len(colours) != 2 or not set(colours) <= set(COLOURS):
            raise ValueError(f'expected a caption such as "red circle with blue background"; got {caption!r}.')
        for token, colour in enumerate(colours):
            states[row, token, token * len(COLOURS) + COLOURS.index(colour)] = 1
    return {"encoder_hidden_states": states}


def painter(network: nn.Module, size: int, source: Path | None = None) -> Teacher:
    """Return the network as a teacher, on Stable Diffusion's noise levels."""
    denoiser, side = NetworkDenoiser(network, VariancePreserving.scaled_linear(), "v"), size // PATCHES.factor
    shape = (3 * PATCHES.factor**2, side, side)
    return Teacher(denoiser, shape, codec=PATCHES, texts=encode_captions, source=source)


def save_circles(folder: Path, unet: Any, size: int, card: str) -> Path:
    """Write the painter into a folder that :func:`load_circles` reads."""
    with whole_folder(folder) as temporary:
        unet.save_pretrained(temporary, safe_serialization=True)
        (temporary / FACTS).write_text(json.dumps({"size": size}))
        (temporary / "README.md").write_text(card)
    return folder


def load_circles(folder: Path) -> Teacher:
    """Return the painter in a folder of :func:`save_circles`. Raises ``ValueError`` for a damaged folder."""
    unet = PartReader(torch.float32, torch.device("cpu")).read(UNet2DConditionModel, folder)
    size = read_json(folder / FACTS).get("size")
    if not isinstance(size, int) or not 0 < size < 2**16 or size % PATCHES.factor:
        raise ValueError(
            f"{folder / FACTS}: size must be the width of the pictures in pixels, a multiple of {PATCHES.factor}; "
            f"got {str(size)[:40]}. If the file was edited, restore it."
        )
    return painter(DiffusersNetwork(unet), size, folder)
