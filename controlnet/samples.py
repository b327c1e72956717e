"""Samples: an image, its caption and maps that go with it; from own files, all checked before training.

A folder holds ``metadata.jsonl`` in the form that ``load_dataset("imagefolder")`` reads, a line per sample:

    {"file_name": "0001.png", "text": "a red mug", "depth_file_name": "0001_depth.png"}

Every file is read once before training, since a run that dies of a cut file at night costs more than minutes.
What cannot be used is named with its path, and stops the run or is left out.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from controlnet.caching import share_work
from scorefield.data.pictures import ROOM, Kind, check_kind, covering, read_picture, resized
from controlnet.rows import Row, read_rows
from scorefield.cache import TensorCache

OnBadData = Literal["stop", "skip"]

THREADS = 8
"""That read files: Pillow decodes outside of Python's lock."""


class Samples(Protocol):
    """What an adapter is trained on: own files, ``controlnet.circles``, anything of this form."""

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """Of every picture of a sample: "image", and maps by name."""
        ...

    def __len__(self) -> int: ...

    def caption(self, index: int) -> str:
        """The prompt of a sample."""
        ...

    def identity(self, index: int) -> str:
        """Names the image of a sample: the latents kept under it are valid as long as it stays."""
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
        bad: what was left out, and why.
    """

    rows: Sequence[Row]
    digests: Sequence[str]
    size: tuple[int, int]
    kinds: Mapping[str, Kind]
    channels: int = 3
    room: float = 1.0
    convert: bool = False
    bad: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, index: int) -> str:
        """The sample's prompt."""
        text: str = self.rows[index].caption
        return text

    def identity(self, index: int) -> str:
        """What the image of :meth:`load` follows from."""
        height, width = self._stored()
        return f"{self.digests[index]} {height}x{width} {self.channels} {self.convert}"

    def load(self, index: int) -> dict[str, Tensor]:
        """Image and maps, (c, h, w) each, of one size that covers ``size``.

        Raises ``ValueError`` for a file that has changed into something unusable.
        """
        pictures = _read(self.rows[index], self.kinds, self.channels, self.convert)
        height, width = pictures["image"].shape[1:]
        fitting = covering(height, width, self._stored())
        return {key: resized(picture, self.kinds[key], fitting) for key, picture in pictures.items()}

    def _stored(self) -> tuple[int, int]:
        return round(self.size[0] * self.room), round(self.size[1] * self.room)


def load_pictures(
    data: Any, size: tuple[int, int], *, text: str | None = "text", image: str | None = None,
    maps: Mapping[str, Kind] | None = None, channels: int = 3, crop: Literal["center", "random"] = "center",
    convert: bool = False, on_bad_data: OnBadData = "stop", cache: Path | None = None, rank: int = 0,
    num_ranks: int = 1,
) -> Pictures:  # fmt: skip
    """Samples of a folder or a data set, all of them checked.

    Args:
        data: folder with metadata.jsonl; a data set of ``datasets``, or the folder or name of one.
        size: height and width to train at.
        text: column of captions; None trains without, all captions are then empty.
        image: column of images; None takes ``file_name``, or the first column of images that is no map.
        maps: further columns of pictures and what they mean: hint images, masks, distances, labels. In a folder
            the column of the map ``depth`` is ``depth_file_name``.
        channels: of the images, 1 or 3.
        crop: random crops are taken from pictures an eighth larger.
        convert: take pictures of unusual modes; see :func:`controlnet.pictures.read_picture`.
        on_bad_data: stop, or skip unusable samples: pictures missing, damaged, of another mode, smaller than half
            of ``size``, or of another size than their image; captions missing or empty.
        cache: folder in which verdicts are kept, by path, size and time of change: ranks then share the work,
            and a second start is fast.
        rank: of this process.
        num_ranks: that share the work.

    Raises:
        ValueError: a source that is not there or not understood, unusable samples unless they are to be skipped,
            or none that is left.
    """
    kinds: dict[str, Kind] = {"image": "image", **(maps or {})}
    _check_options(size, channels, on_bad_data, maps or {})
    rows = read_rows(data, text=text, image=image, maps=tuple(maps or {}))
    if not rows:
        raise ValueError(
            f'{data} holds no samples. Give metadata.jsonl a line {{"file_name": ..., "text": ...}} for each '
            "image, or the data set rows."
        )
    options = f"1 {size} {channels} {convert} {sorted(kinds.items())}"
    outcomes = _outcomes(
        rows, lambda row: _judge(row, kinds, size, channels, convert), cache, options, rank, num_ranks
    )
    faults = (
        fault or (_caption_fault(row) if text else "") for row, (_, fault) in zip(rows, outcomes, strict=True)
    )
    bad = {number: fault for number, fault in enumerate(faults) if fault}
    good = [number for number in range(len(rows)) if number not in bad]
    if (bad and on_bad_data == "stop") or not good:
        some = "".join(f"\n  {bad[number]}" for number in sorted(bad)[:5])
        raise ValueError(
            f"{len(bad)} of {len(rows)} samples of {data} cannot be used:{some}\nRepair them"
            + (", or leave them out: --on-bad-data skip." if good else ".")
        )
    return Pictures(
        [rows[number] for number in good], [outcomes[number][0] for number in good], size, kinds, channels,
        ROOM if crop == "random" else 1.0, convert, tuple(bad[number] for number in sorted(bad)),
    )  # fmt: skip


def _check_options(size: tuple[int, int], channels: int, on_bad_data: str, maps: Mapping[str, Kind]) -> None:
    for kind in maps.values():
        check_kind(kind)
    if min(size) < 1 or channels not in (1, 3):
        raise ValueError(f"need a size of at least 1 pixel and 1 or 3 channels; got {size} and {channels}.")
    if "image" in maps:
        raise ValueError("a map cannot be called image: that is the picture to be generated.")
    if on_bad_data not in get_args(OnBadData):
        raise ValueError(f"on_bad_data must be stop or skip; got {on_bad_data!r}.")


def _outcomes(
    rows: Sequence[Row], judge: Callable[[Row], str], cache: Path | None, options: str, rank: int, num_ranks: int
) -> list[tuple[str, str]]:
    # (digest, "") of each good row, ("", fault) of each bad one. Only the former are kept on disk: faults are
    # there to be repaired.
    verdicts = None if cache is None else TensorCache(cache / "checked", options)

    def outcome(row: Row) -> tuple[str, str]:
        stamp = row.stamp() if verdicts else ""
        entry = verdicts.load(stamp) if verdicts and stamp else None
        if entry is not None:
            return bytes(entry["digest"].tolist()).hex(), ""
        try:
            digest = judge(row)
        except ValueError as error:
            return "", str(error)
        if verdicts and stamp:
            verdicts.store(stamp, {"digest": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)})
        return digest, ""

    with ThreadPoolExecutor(THREADS) as pool:
        if verdicts:
            share_work(
                rows, done=lambda row: verdicts.path(row.stamp()).exists(),
                do=lambda some: list(pool.map(outcome, some)), rank=rank, num_ranks=num_ranks,
                batch_size=16 * THREADS,
            )  # fmt: skip
        return list(pool.map(outcome, rows))


def _judge(row: Row, kinds: Mapping[str, Kind], size: tuple[int, int], channels: int, convert: bool) -> str:
    pictures = _read(row, kinds, channels, convert)
    height, width = pictures["image"].shape[1:]
    if max(size[0] / height, size[1] / width) > 2:
        raise ValueError(
            f"{row.name('image')} is {width} x {height}, less than half of the {size[1]} x {size[0]} to train at."
        )
    return hashlib.sha256(row.read("image")).hexdigest()


def _read(row: Row, kinds: Mapping[str, Kind], channels: int, convert: bool) -> dict[str, Tensor]:
    pictures: dict[str, Tensor] = {}
    for key, kind in kinds.items():
        try:
            wanted = channels if key == "image" else 3 if kind == "normals" else None
            pictures[key] = read_picture(row.read(key), kind, wanted, convert=convert)
        except ValueError as error:
            raise ValueError(f"{row.name(key)} {error}") from error
        (height, width), expected = pictures[key].shape[1:], pictures["image"].shape[1:]
        if (height, width) != tuple(expected):
            raise ValueError(
                f"{row.name(key)} is {width} x {height}, but its image {row.name('image')} is {expected[1]} x "
                f"{expected[0]}."
            )
    return pictures


def _caption_fault(row: Row) -> str:
    if isinstance(row.caption, str) and row.caption.strip():
        return ""
    what = "an empty caption" if isinstance(row.caption, str) else f"the caption {row.caption!r}, not a text"
    return f"{row.name('image')} has {'no caption' if row.caption is None else what}."
