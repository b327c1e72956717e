"""Rendered training data with captions, rendered once and kept in files."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from scorefield.cache import Content, TensorCache, content_key
from scorefield.data.texts import Texts
from scorefield.models.prompts import default_cache_folder
from scorefield.progress import progress
from scorefield.randomness import Rng, derived_generator
from toyworld.captions import Attributes, caption, describe
from toyworld.data import draw_scenes
from toyworld.parts import make_tokenizer, tokens_of
from toyworld.render import render


@dataclass(frozen=True, eq=False)
class World:
    """Training data of the pipeline's stages.

    Attributes:
        images: (n, 3, 64, 64) bytes.
        tokens: (n, 4, length) tokens of the full captions, those without view, without background, and without
            both.
        empty: (length,) tokens of the empty caption.
    """

    images: Tensor
    tokens: Tensor
    empty: Tensor


def make_world(out: Path, num_images: int, seed: int) -> World:
    """Render the scenes, or read them if they were rendered before, and return them with their captions."""
    starts = progress(range(0, num_images, 1000), "renders, in thousands")
    images = torch.cat([rendered(out, start, min(start + 1000, num_images), seed) for start in starts])
    described = [describe(scene) for scene in draw_scenes(range(num_images), seed)]
    tokenizer = make_tokenizer()
    lacks: list[dict[str, Any]] = [{}, {"view": None}, {"background": None}, {"view": None, "background": None}]
    tokens = [tokens_of([caption(replace(one, **lack)) for one in described], tokenizer) for lack in lacks]
    return World(images, torch.stack(tokens, 1), tokens_of([""], tokenizer)[0])


def rendered(out: Path, start: int, end: int, seed: int) -> Tensor:
    """Return images ``start`` to ``end`` as bytes, kept in ``out/renders`` until the renderer changes."""

    def make(_: Sequence[Content]) -> list[dict[str, Tensor]]:
        parts = [_drawn(range(first, min(first + 100, end)), seed) for first in range(start, end, 100)]
        return [{"rgb": torch.cat(parts)}]

    cache = TensorCache(out / "renders", f"renders {_renderer()}")
    return cache.fetch([f"seed {seed}, {start} to {end}"], make)[0]["rgb"]


def _drawn(numbers: Sequence[int], seed: int) -> Tensor:
    return ((render(draw_scenes(numbers, seed)).rgb + 1) * 127.5).round().to(torch.uint8)


@functools.lru_cache(maxsize=1)
def _renderer() -> str:
    # The hash of a few renders identifies the renderer's version.
    return content_key(_drawn(range(8), 0))


def draw_captions(world: World, chosen: Tensor, part_dropout: float, caption_dropout: float, rng: Rng) -> Tensor:
    """Return tokens (b, length) of images ``chosen``: some captions lack view, background, both, or everything."""
    drawn = torch.rand(3, len(chosen), generator=rng("captions"))
    without_view, without_background = (drawn[:2] < part_dropout).long()
    tokens = world.tokens[chosen, without_view + 2 * without_background]
    tokens[drawn[2] < caption_dropout] = world.empty
    return tokens


WORLD_SIZE = 4000
"""Default number of captions."""

PART_DROPOUT = 0.2
"""Share of captions without view, and of captions without background, in the training of the shipped pipeline."""


@dataclass(frozen=True)
class Renders:
    """The first ``num`` renders of the toy world, rendered, or read from a file, a thousand at a time."""

    num: int
    size: ClassVar[tuple[int, int]] = (64, 64)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, number: int, /) -> Tensor:
        start = number // 1000 * 1000
        folder = default_cache_folder().parent / "toyworld"
        return _renders(folder, start, min(start + 1000, self.num))[number - start]


@functools.lru_cache(maxsize=1)
def _renders(folder: Path, start: int, end: int) -> Tensor:
    return rendered(folder, start, end, 0)


def world_texts(num: int = 0, seed: int = 0) -> Texts:
    """Return captions of the toy world's training scenes, some without view or background, and their renders."""
    num = num or WORLD_SIZE
    described = [describe(scene) for scene in draw_scenes(range(num))]
    prompts = tuple(caption(thinned(one, number, seed)) for number, one in enumerate(described))
    return Texts(prompts, Renders(num))


def thinned(attributes: Attributes, number: int, seed: int) -> Attributes:
    """Return a caption's attributes, at random without view or background."""
    view, background = (
        torch.rand(2, generator=derived_generator(seed, "caption", number)) < PART_DROPOUT
    ).tolist()
    return Attributes(
        attributes.shape, attributes.colour, None if background else attributes.background,
        None if view else attributes.view,
    )  # fmt: skip
