"""Prompts to distil with, and the real images that belong to them: what ``--prompts`` names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Subset

from scorefield.cache import content_key
from scorefield.data.rows import Picture, Row, keep_good
from scorefield.data.sources import read_rows
from scorefield.shipped import shipped, ships


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
        """Return a hash of the prompts."""
        return content_key(*self.prompts)[:16]

    def some(self, numbers: Sequence[int]) -> "Texts":
        """Those with these numbers."""
        images: Any = Subset(self.images, numbers) if len(self.images) else ()  # type: ignore[arg-type]
        return Texts(tuple(self.prompts[number] for number in numbers), images)


def read_texts(source: str, num: int = 0, seed: int = 0, on_bad_data: str = "stop") -> Texts:
    """Return the prompts that ``--prompts`` names, the first ``num`` or all. No image is opened.

    Raises ``ValueError`` for a source that is not there, holds too few prompts, or samples that cannot be used.
    """
    if ships("prompts", source):
        texts: Texts = shipped(f"prompts {source}")(num, seed)
        return texts
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
