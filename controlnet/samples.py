"""Samples: an image, its caption and maps that go with it; from own files, all checked before training.

    {"file_name": "0001.png", "text": "a red mug", "depth_file_name": "0001_depth.png"}

is a line of a folder's ``metadata.jsonl``; ``scorefield.data.sources`` says what else is read. Every file is read
once before training, since a run that dies of a cut file at night costs more than minutes. What cannot be used is
named, and stops the run or is left out.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from scorefield.cache import TensorCache, content_key
from scorefield.data.buckets import Shape, filled, nearest_shape
from scorefield.data.pictures import (
    ROOM,
    Kind,
    check_kind,
    covering,
    in_few_threads,
    is_turned,
    read_picture,
    resized,
    size_of,
)
from scorefield.data.rows import Columns, OnBadData, Row, in_shares, keep_good
from scorefield.data.sources import read_rows
from scorefield.files import warn


class Samples(Protocol):
    """What an adapter is trained on: own files, ``controlnet.circles``, anything of this form."""

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """The kind of every picture of a sample: "image", and maps by name."""
        ...

    def __len__(self) -> int: ...

    def caption(self, index: int) -> str:
        """Return the prompt of a sample."""
        ...

    def identity(self, index: int) -> str:
        """Return the names the image of a sample: the latents kept under it are valid as long as it stays."""
        ...

    def load(self, index: int) -> dict[str, Tensor]:
        """Pictures (c, h, w) of one size: uint8, but float32 for depth and int64 for labels."""
        ...


@dataclass(frozen=True, eq=False)
class Pictures:
    """Samples that were checked, read when they are needed; made by :func:`load_pictures`.

    Attributes:
        rows: those that can be used.
        digests: hash of each row's image file, by which its latents are kept.
        size: height and width that views of them have.
        kinds: of "image" and of every map.
        channels: of the image, 1 or 3.
        room: factor by which stored pictures are larger than ``size``, for random crops.
        convert: unusual modes are converted.
        shapes: height and width of views of each row, in place of ``size``; empty without buckets.
    """

    rows: Sequence[Row]
    digests: Sequence[str]
    size: tuple[int, int]
    kinds: Mapping[str, Kind]
    channels: int = 3
    room: float = 1.0
    convert: bool = False
    shapes: Sequence[Shape] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int) -> str:
        """Return the sample's prompt."""
        text: str = self.rows[index].caption or ""
        return text

    def identity(self, index: int) -> str:
        """Return what the image of :meth:`load` follows from."""
        height, width = self._stored(index)
        return f"{self.digests[index]} {height}x{width} {self.channels} {self.convert}"

    def load(self, index: int) -> dict[str, Tensor]:
        """Return image and maps, (c, h, w) each, of one size that covers that of its views.

        Raises ``ValueError`` for a file that has changed into something unusable.
        """
        contents = _contents(self.rows[index], self.kinds)
        return in_few_threads(lambda: self._fitted(index, contents), *contents.values())

    def _fitted(self, index: int, contents: Mapping[str, bytes]) -> dict[str, Tensor]:
        pictures = _decoded(self.rows[index], contents, self.kinds, self.channels, self.convert)
        height, width = pictures["image"].shape[1:]
        usable = covering(height, width, self._stored(index))
        return {key: resized(picture, self.kinds[key], usable) for key, picture in pictures.items()}

    def some(self, numbers: Sequence[int]) -> "Pictures":
        """Those with these numbers."""
        return replace(
            self, rows=[self.rows[n] for n in numbers], digests=[self.digests[n] for n in numbers],
            shapes=[self.shapes[n] for n in numbers if self.shapes],
        )  # fmt: skip

    def in_full_buckets(self, batch_size: int) -> "Pictures":
        """Return the same with the pictures of a shape that has no batch in the nearest one that has."""
        return replace(self, shapes=filled(self.shapes, batch_size))

    def in_one_shape(self) -> "Pictures":
        """Return the same without buckets."""
        return replace(self, shapes=())

    def _stored(self, index: int) -> tuple[int, int]:
        height, width = self.shapes[index] if self.shapes else self.size
        return round(height * self.room), round(width * self.room)


def load_pictures(
    data: Any, size: tuple[int, int], *, text: str | None = "text", image: str | None = None,
    maps: Mapping[str, Kind] | None = None, channels: int = 3, crop: Literal["center", "random"] = "center",
    convert: bool = False, on_bad_data: OnBadData = "stop", cache: Path | None = None,
    buckets: Sequence[Shape] = (), rank: int = 0, num_ranks: int = 1,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> Pictures:  # fmt: skip
    """Samples of a folder or a data set, all of them checked.

    Args:
        data: what ``scorefield.data.sources`` reads, or a data set of ``datasets``.
        size: height and width to train at.
        text: column of captions; None trains without, all captions are then empty.
        image: column of images; None takes ``file_name``, or the first column of images that is no map.
        maps: further columns of pictures and what they mean: hint images, masks, distances, labels. In a folder
            the column of the map ``depth`` is ``depth_file_name``.
        channels: of the images, 1 or 3.
        crop: random crops are taken from pictures an eighth larger.
        convert: take pictures of unusual modes; see :func:`scorefield.data.pictures.read_picture`.
        on_bad_data: stop, or skip unusable samples: pictures missing, damaged, of another mode, smaller than half
            of ``size``, or of another size than their image; captions missing or empty.
        cache: folder in which verdicts are kept, under the hash of a sample's files: a second start decodes none.
        buckets: shapes, each picture being cut to the nearest one in place of ``size``.
        rank: of this process.
        num_ranks: that share the work.
        gather: the lists of all ranks as one.

    Raises:
        ValueError: a source that is not there or not understood, unusable samples unless they are to be skipped,
            or none that is left.
    """
    kinds: dict[str, Kind] = {"image": "image", **(maps or {})}
    _check_options(size, channels, on_bad_data, maps or {})
    listing = read_rows(data, Columns(image or "", text, tuple(maps or {})))
    rows, form = listing.rows, Form(kinds, size, channels, convert, text is not None, tuple(buckets))
    known = None if cache is None else TensorCache(cache / "checked", form.identity())
    found = in_shares(
        lambda number: judge(rows[number], form, known), len(rows), rank=rank, num_ranks=num_ranks,
        gather=gather,
    )  # fmt: skip
    good = keep_good(listing, [checked.fault for checked in found], on_bad_data)
    if apart := [rows[number].name for number in good if found[number].apart]:
        warn(
            f"{len(apart)} of {len(good)} images, such as {apart[0]}, are turned by their Exif tag and their maps "
            "are not, or the other way round. If they lie a quarter turn apart, save them upright, without tags."
        )
    return Pictures(
        [rows[number] for number in good], [found[number].digest for number in good], size, kinds, channels,
        ROOM if crop == "random" else 1.0, convert, [shape for number in good if (shape := found[number].shape)],
    )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What samples have to be: the arguments of :func:`load_pictures`."""

    kinds: Mapping[str, Kind]
    size: Shape
    channels: int
    convert: bool
    has_captions: bool
    buckets: tuple[Shape, ...]

    def identity(self) -> str:
        """Return what the check of a sample's files depends on."""
        shapes = f" {list(self.buckets)}" if self.buckets else ""
        return f"2 {self.size} {self.channels} {self.convert} {sorted(self.kinds.items())}{shapes}"

    def shape(self, shape: Shape) -> Shape:
        """Height and width in which a picture of this height and width is trained on."""
        return nearest_shape(shape, self.buckets) if self.buckets else self.size


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of a sample: the hash of its image's file, or why it cannot be used.

    ``apart``: image and map are turned by their Exif tags, but not alike. ``shape``: of its bucket.
    """

    digest: str = ""
    apart: bool = False
    fault: str = ""
    shape: Shape | None = None


def judge(row: Row, form: Form, known: TensorCache | None) -> Checked:
    """Return what is wrong with a sample, if anything; it is decoded unless its files were checked before."""
    try:
        if row.fault or (form.has_captions and (fault := _caption_fault(row))):
            raise ValueError(f"{row.name} {row.fault or fault}")
        contents = _contents(row, form.kinds)
        make = lambda _: [in_few_threads(lambda: _facts(row, contents, form), *contents.values())]  # noqa: E731
        entry = (known.fetch([content_key(*contents.values())], make) if known else make(None))[0]
        shape = form.shape(size_of(contents["image"])) if form.buckets else None
        return Checked(hashlib.sha256(contents["image"]).hexdigest(), bool(entry["apart"]), shape=shape)
    except ValueError as error:
        return Checked(fault=str(error))


def _check_options(size: tuple[int, int], channels: int, on_bad_data: str, maps: Mapping[str, Kind]) -> None:
    for kind in maps.values():
        check_kind(kind)
    if min(size) < 1 or channels not in (1, 3):
        raise ValueError(f"need a size of at least 1 pixel and 1 or 3 channels; got {size} and {channels}.")
    if "image" in maps:
        raise ValueError("a map cannot be called image: that is the picture to be generated.")
    if on_bad_data not in get_args(OnBadData):
        raise ValueError(f"on_bad_data must be stop or skip; got {on_bad_data!r}.")


def _contents(row: Row, kinds: Mapping[str, Kind]) -> dict[str, bytes]:
    contents = {}
    for key in kinds:
        picture = row.image if key == "image" else row.maps[key]
        if picture is None:
            raise ValueError(f"{row.name} names no picture.")
        try:
            contents[key] = picture.read()
        except ValueError as error:
            raise ValueError(f"{picture.name} {error}") from error
    return contents


def _facts(row: Row, contents: Mapping[str, bytes], form: Form) -> dict[str, Tensor]:
    # What is kept of a sample that can be used.
    height, width = _decoded(row, contents, form.kinds, form.channels, form.convert)["image"].shape[1:]
    size = form.shape((height, width))
    if max(size[0] / height, size[1] / width) > 2:
        raise ValueError(
            f"{row.name} is {width} x {height}, less than half of the {size[1]} x {size[0]} to train at."
        )
    turned = {is_turned(data) for data in contents.values()}
    return {"apart": torch.tensor(len(turned) > 1)}


def _decoded(
    row: Row, contents: Mapping[str, bytes], kinds: Mapping[str, Kind], channels: int, convert: bool
) -> dict[str, Tensor]:
    pictures: dict[str, Tensor] = {}
    names = {"image": row.name, **{key: picture.name for key, picture in row.maps.items()}}
    for key, kind in kinds.items():
        try:
            wanted = channels if key == "image" else 3 if kind == "normals" else None
            pictures[key] = read_picture(contents[key], kind, wanted, convert=convert)
        except ValueError as error:
            raise ValueError(f"{names[key]} {error}") from error
        (height, width), expected = pictures[key].shape[1:], pictures["image"].shape[1:]
        if (height, width) != tuple(expected):
            raise ValueError(
                f"{names[key]} is {width} x {height}, but its image {row.name} is {expected[1]} x {expected[0]}."
            )
    return pictures


def _caption_fault(row: Row) -> str:
    if isinstance(row.caption, str) and row.caption.strip():
        return ""
    what = "an empty caption" if isinstance(row.caption, str) else f"the caption {row.caption!r}, not a text"
    return f"has {'no caption' if row.caption is None else what}."
