"""One sample: where its pictures lie, its caption and its label, or why it cannot be used."""

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from scorefield.choices import OnBadData as OnBadData
from scorefield.data.threads import in_threads
from scorefield.files import open_regular, warn
from scorefield.progress import progress

T = TypeVar("T")

LARGEST_PICTURE = 2**30
"""Bytes of a picture's file."""

IMAGE_COLUMNS, TEXT_COLUMNS = ("file_name", "image"), ("prompt", "text", "caption")


@runtime_checkable
class Picture(Protocol):
    """Where the bytes of a picture's file are."""

    @property
    def name(self) -> str:
        """The name that errors give it."""
        ...

    def read(self) -> bytes:
        """Return the bytes. Raises ``ValueError`` whose message goes behind the name."""
        ...


def _check_size(size: int) -> None:
    if size > LARGEST_PICTURE:
        raise ValueError(f"has {size:,} bytes; expected a picture of at most {LARGEST_PICTURE:,}.")


@dataclass(frozen=True, slots=True)
class File:
    """A file, under its path: a string, since a ``Path`` takes four times the memory."""

    name: str

    def read(self) -> bytes:
        """Raises ``ValueError`` if there is no such file, or it is no regular one, or too large for a picture."""
        try:
            with open_regular(self.name) as file:
                _check_size(os.fstat(file.fileno()).st_size)
                return file.read()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}.") from error


@dataclass(frozen=True, slots=True)
class Member:
    """A picture's file within another one, a tar archive or a table of ``datasets``, read where it lies."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Raises ``ValueError`` for an archive that was cut, and for a file that is too large for a picture."""
        with open_regular(self.archive) as file:
            there = max(0, os.fstat(file.fileno()).st_size - self.offset)
            if there < self.size:
                raise ValueError(f"is cut: {there:,} of {self.size:,} bytes are there.")
            _check_size(self.size)
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, eq=False, slots=True)
class Cell:
    """A picture in a table, which reads it from its files when it is asked for.

    ``folder``: where a path in the table begins.
    """

    table: Any
    number: int
    column: str
    name: str
    folder: Path = Path()

    def read(self) -> bytes:
        """Raises ``ValueError`` for a cell that is no picture, or that the library cannot read."""
        try:
            value = self.table[self.number][self.column]
        except Exception as error:  # of any kind: sounds and films need libraries, and files may have changed
            raise ValueError(f"cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        picture = _picture(value, self.folder)
        try:
            return picture.read()
        except (OSError, ValueError) as error:
            raise ValueError(f"names {picture.name}, which {error}") from error


@dataclass(frozen=True, eq=False, slots=True)
class Pixels:
    """A picture (c, h, w) of an array: bytes, or floats in [-1, 1]."""

    name: str
    pixels: np.ndarray

    def read(self) -> bytes:
        """Return the picture as a PNG file."""
        array = (
            self.pixels if self.pixels.dtype == np.uint8 else np.round((self.pixels + 1) * 127.5).astype(np.uint8)
        )
        content = io.BytesIO()
        Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(content, "png")
        return content.getvalue()


NO_MAPS: Mapping[str, Picture] = {}
"""Of all samples without maps; one object, since there may be millions."""


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One sample.

    Attributes:
        name: of the picture, or of the line or row; to complain with.
        image: None where the row names none.
        caption: a string, or None, unless something is wrong.
        label: a class number, a class name or None, unless something is wrong.
        maps: further pictures that go with the image, by column.
        fault: why the row cannot be used, whatever it is needed for; the message goes behind the name.
    """

    name: str
    image: Picture | None = None
    caption: Any = None
    label: Any = None
    maps: Mapping[str, Picture] = field(default_factory=lambda: NO_MAPS)
    fault: str = ""


@dataclass(frozen=True)
class Columns:
    """What is read of a table or a metadata file.

    Attributes:
        image: column of pictures; empty: file_name, image, or a data set's first column of pictures.
        text: column of captions; empty: prompt, text or caption; None: no captions are read.
        maps: columns of further pictures; that of "depth" may be called depth_file_name.
    """

    image: str = ""
    text: str | None = ""
    maps: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Names that a caption may have, the first of them first."""
        return () if self.text is None else (self.text,) if self.text else TEXT_COLUMNS


@dataclass(frozen=True, eq=False)
class Listing:
    """The rows of a source.

    Attributes:
        source: as the user named it.
        rows: of its samples.
        class_names: of the class numbers, where the source has them.
        note: what was passed over, and which part was taken, in one line; empty where all was used.
        arrays: images (n, c, h, w) and labels (n,), where they are kept as such.
    """

    source: str
    rows: Sequence[Row]
    class_names: tuple[str, ...] | None = None
    note: str = ""
    arrays: tuple[np.ndarray, np.ndarray] | None = None


def row_of(values: Any, columns: Columns, folder: Path, place: str) -> Row:
    """Return the named values of a line or a table's row, read at ``place``; its paths begin in ``folder``."""
    if not isinstance(values, Mapping):
        return Row(place, fault=f'must be an object such as {{"file_name": ...}}; got {str(values)[:80]!r}.')
    try:
        image = _named(values, (columns.image,) if columns.image else IMAGE_COLUMNS, folder)
        found = {name: _named(values, (f"{name}_file_name", name), folder) for name in columns.maps}
    except ValueError as error:
        return Row(place, fault=str(error))
    maps = {name: picture for name, picture in found.items() if picture is not None} or NO_MAPS
    caption, fault = next((values[key] for key in columns.texts if values.get(key) is not None), None), ""
    if missing := [name for name in columns.maps if name not in maps]:
        fault = (
            f'has no {missing[0]}: expected it under "{missing[0]}_file_name"; {place} has {", ".join(values)}.'
        )
    elif isinstance(caption, str):
        fault = half_character(caption)
    label = values.get("label")
    label = sys.intern(label) if type(label) is str else label  # the same few names, over and over
    return Row(place if image is None else image.name, image, caption, label, maps, fault)


def _named(values: Mapping[str, Any], keys: Sequence[str], folder: Path) -> Picture | None:
    value = next((values[key] for key in keys if values.get(key) is not None), None)
    if isinstance(value, Mapping):  # as `datasets` writes them
        value = value.get("path")
    return None if value is None else _picture(value, folder)


def _picture(value: Any, folder: Path) -> Picture:
    if isinstance(value, Picture):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError(f"has no image: expected the path of one; got {value!r}.")
    return File(os.fspath(folder / value))


def half_character(text: str) -> str:
    r"""Return what is wrong with a text that holds half of a character, as JSON's "\ud800"; empty for others."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a character, {text[error.start]!r}, which no file can. Correct the text."
    return ""


def keep_good(listing: Listing, faults: Sequence[str], on_bad_data: str) -> list[int]:
    """Return numbers of the samples that have no fault; one line on stderr says what was left out and passed over.

    Args:
        listing: of the samples.
        faults: of each sample its name and what is wrong with it; empty where nothing is.
        on_bad_data: "stop" raises for any fault, "skip" leaves such samples out.

    Raises:
        ValueError: under "stop", and where no sample is left.
    """
    bad, good = [fault for fault in faults if fault], [number for number, fault in enumerate(faults) if not fault]
    some = "; ".join(fault.rstrip(".") for fault in bad[:5]) + ("; ..." if len(bad) > 5 else "")
    if bad and (on_bad_data == "stop" or not good):
        fix = "Repair them, or leave them out: --on-bad-data skip." if good else "None is left. Repair them."
        raise ValueError(f"{len(bad)} of {len(faults)} samples of {listing.source} cannot be used: {some}. {fix}")
    said = [f"left out {len(bad)} of {len(faults)} samples: {some}"] if bad else []
    if said := [*said, *([listing.note] if listing.note else [])]:
        warn(f"{listing.source}: {'; '.join(said)}")
    return good


def in_shares(
    judge: Callable[[int], T], number: int, *, rank: int = 0, num_ranks: int = 1,
    gather: Callable[[list[T]], list[T]] = list,
) -> list[T]:  # fmt: skip
    """``judge`` of the numbers from 0 on, in order; each rank asks for an equal share of them, in threads.

    Args:
        judge: what is asked of a number.
        number: of items.
        rank: of this process.
        num_ranks: that share the work.
        gather: the lists of all ranks as one, in the order of the ranks.
    """
    share = -(-number // num_ranks)
    own = range(min(rank * share, number), min((rank + 1) * share, number))
    return gather(list(progress(in_threads(judge, own), "samples checked", len(own))))
