"""Prompts to distil with, and the real images that belong to them: those of ``--prompts``, or the toy world's."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from captioned import rendered
from torch import Tensor
from torch.utils.data import Subset

from scorefield.cache import content_key
from scorefield.data.rows import Picture, Row, keep_good
from scorefield.data.sources import read_rows
from scorefield.models.prompts import default_cache_folder
from scorefield.randomness import derived_generator
from toyworld.captions import Attributes, caption, describe
from toyworld.data import draw_scenes

WORLD_SIZE = 4000

PART_DROPOUT = 0.2
"""Share of the toy world's captions without view, and of those without background, as its pipeline was trained."""


class Pictures(Protocol):
    """Images that are read when they are asked for: files and the like, or bytes (3, h, w)."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Picture | Tensor: ...


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts, and an image for each of them or for none.

    Attributes:
        prompts: at least one, none of them empty.
        images: as many, or none.
    """

    prompts: tuple[str, ...]
    images: Pictures = ()

    def identity(self) -> str:
        """A hash of the prompts."""
        return content_key(*self.prompts)[:16]

    def some(self, numbers: Sequence[int]) -> "Texts":
        """Those with these numbers."""
        images: Any = Subset(self.images, numbers) if len(self.images) else ()  # type: ignore[arg-type]
        return Texts(tuple(self.prompts[number] for number in numbers), images)


def read_texts(source: str, num: int = 0, seed: int = 0, on_bad_data: str = "stop") -> Texts:
    """What ``--prompts`` names, the first ``num`` of them, or all. No image is opened.

    Raises ``ValueError`` for a source that is not there, holds too few prompts, or samples that cannot be used.
    """
    if source == "toyworld":
        return world_texts(num or WORLD_SIZE, seed)
    listing = read_rows(source, option="--prompts")
    pictured, faults, found = any(row.image is not None for row in listing.rows), list[str](), 0
    for row in listing.rows:
        fault = _fault_of(row, pictured)
        faults.append(f"{row.name} {fault}" if fault else "")
        found += not fault
        if num and found == num:
            break
    rows = [listing.rows[number] for number in keep_good(listing, faults, on_bad_data)]
    if len(rows) < num:
        raise ValueError(f"--prompts {source} holds {len(rows)} prompts; got --num-prompts {num}.")
    images = [row.image for row in rows if row.image is not None]
    return Texts(tuple(row.caption.strip() for row in rows), images)


def _fault_of(row: Row, pictured: bool) -> str:
    if not row.fault and not (isinstance(row.caption, str) and row.caption.strip()):
        return f"has no prompt: expected text under prompt, text or caption; got {row.caption!r}."
    return row.fault or ("has no image, and other prompts have one." if pictured and row.image is None else "")


@dataclass(frozen=True)
class Renders:
    """The toy world's first renders, which are made, or read from a file, a thousand at a time."""

    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, number: int, /) -> Tensor:
        start = number // 1000 * 1000
        folder = default_cache_folder().parent / "toyworld"
        return _renders(folder, start, min(start + 1000, self.num))[number - start]


@functools.lru_cache(maxsize=1)
def _renders(folder: Path, start: int, end: int) -> Tensor:
    return rendered(folder, start, end, 0)


def world_texts(num: int, seed: int) -> Texts:
    """Captions of the toy world's training scenes, some without view or background, and their renders."""
    described = [describe(scene) for scene in draw_scenes(range(num))]
    prompts = tuple(caption(thinned(one, number, seed)) for number, one in enumerate(described))
    return Texts(prompts, Renders(num))


def thinned(attributes: Attributes, number: int, seed: int) -> Attributes:
    """A caption's attributes without some of those that may be left out."""
    view, background = (
        torch.rand(2, generator=derived_generator(seed, "caption", number)) < PART_DROPOUT
    ).tolist()
    return Attributes(
        attributes.shape, attributes.colour, None if background else attributes.background,
        None if view else attributes.view,
    )  # fmt: skip
