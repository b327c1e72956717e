"""Captioned renders to train on: made once, kept in files, and read again."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from scorefield.atomic import whole_file
from scorefield.randomness import Rng
from toyworld.captions import caption, describe
from toyworld.data import draw_scenes
from toyworld.parts import make_tokenizer, tokens_of
from toyworld.render import render


@dataclass(frozen=True, eq=False)
class World:
    """What the stages learn from.

    Attributes:
        images: (n, 3, 64, 64) bytes.
        tokens: (n, 4, length): full captions, without view, without background, without both.
        empty: (length,) tokens of the empty caption.
    """

    images: Tensor
    tokens: Tensor
    empty: Tensor


def make_world(out: Path, num_images: int, seed: int) -> World:
    """Render the scenes, or read what an earlier call rendered, and write their captions."""
    starts = tqdm(range(0, num_images, 1000), "renders")
    images = torch.cat([rendered(out, start, min(start + 1000, num_images), seed) for start in starts])
    described = [describe(scene) for scene in draw_scenes(range(num_images), seed)]
    tokenizer = make_tokenizer()
    lacks: list[dict[str, Any]] = [{}, {"view": None}, {"background": None}, {"view": None, "background": None}]
    tokens = [tokens_of([caption(replace(one, **lack)) for one in described], tokenizer) for lack in lacks]
    return World(images, torch.stack(tokens, 1), tokens_of([""], tokenizer)[0])


def rendered(out: Path, start: int, end: int, seed: int) -> Tensor:
    """Images ``start`` to ``end`` as bytes, kept in a file."""
    path = out / "renders" / f"seed-{seed}-{start:07d}.safetensors"
    kept = read_again(path).get("rgb", torch.empty(0))
    if len(kept) >= end - start:
        return kept[: end - start]
    parts = [
        ((render(draw_scenes(range(first, min(first + 100, end)), seed)).rgb + 1) * 127.5).round()
        for first in range(start, end, 100)
    ]
    images = torch.cat(parts).to(torch.uint8).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file({"rgb": images}, temporary)
    return images


def read_again(path: Path) -> dict[str, Tensor]:
    """What an earlier call wrote; nothing, with a warning, where the file is damaged."""
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        print(f"warning: {path} is damaged ({error}); it is made again", file=sys.stderr)
        return {}


def draw_captions(world: World, chosen: Tensor, part_dropout: float, caption_dropout: float, rng: Rng) -> Tensor:
    """Tokens (b, length) of images ``chosen``: captions that lack their view, background, both, or everything."""
    drawn = torch.rand(3, len(chosen), generator=rng("captions"))
    without_view, without_background = (drawn[:2] < part_dropout).long()
    tokens = world.tokens[chosen, without_view + 2 * without_background]
    tokens[drawn[2] < caption_dropout] = world.empty
    return tokens


def as_floats(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1
