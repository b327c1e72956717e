"""Captioned renders to train on: made once, kept in files, and read again."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from scorefield.cache import Content, TensorCache, content_key
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
    """Images ``start`` to ``end`` as bytes, kept in ``out/renders`` as long as the renderer draws the same."""

    def make(_: Sequence[Content]) -> list[dict[str, Tensor]]:
        parts = [_drawn(range(first, min(first + 100, end)), seed) for first in range(start, end, 100)]
        return [{"rgb": torch.cat(parts)}]

    cache = TensorCache(out / "renders", f"renders {_renderer()}")
    return cache.fetch([f"seed {seed}, {start} to {end}"], make)[0]["rgb"]


def _drawn(numbers: Sequence[int], seed: int) -> Tensor:
    return ((render(draw_scenes(numbers, seed)).rgb + 1) * 127.5).round().to(torch.uint8)


@functools.lru_cache(maxsize=1)
def _renderer() -> str:
    # The renderer's version: what it draws of a few scenes.
    return content_key(_drawn(range(8), 0))


def draw_captions(world: World, chosen: Tensor, part_dropout: float, caption_dropout: float, rng: Rng) -> Tensor:
    """Tokens (b, length) of images ``chosen``: captions that lack their view, background, both, or everything."""
    drawn = torch.rand(3, len(chosen), generator=rng("captions"))
    without_view, without_background = (drawn[:2] < part_dropout).long()
    tokens = world.tokens[chosen, without_view + 2 * without_background]
    tokens[drawn[2] < caption_dropout] = world.empty
    return tokens
