"""Training images from wherever they are: folders, npz and idx files, Hugging Face datasets, the digits.

All images are decoded once, to ``--resolution``, and kept as bytes in memory: 60,000 of 32 x 32 take 61 MB, a
million of 64 x 64 in colour 12 GB. What cannot be used is named with its path and, with ``--on-bad-data skip``,
left out.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from arrays import check_values, is_idx, number_classes, read_idx, read_npz, resized, square, stored_size
from digits import Labelled, load_digits
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

from scorefield.data.pictures import open_image
from scorefield.files import printable, read_text

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
Item = tuple[str, Any, Any]
"""Name to complain with, something that opens as an image, and a class (number, name or None)."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
FILES = {*SUFFIXES, ".npz", ".npy", ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".gz", ".zip", ".tar", ".tgz"}


@dataclass(frozen=True)
class Source:
    """Items one by one, and the names of their class numbers where the source has them."""

    items: Iterable[Item]
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the training images come from and how they are cut."""

    data: str | None = None
    """Folder of images (class subfolders, metadata.jsonl with file_name and label, or neither), npz file with
    images and labels, idx file or folder of them (MNIST family), Hugging Face dataset. None: the digits. Class
    subfolders that are all numbers keep them, other names are numbered in alphabetical order."""
    resolution: int | None = None
    """Height and width to train at. None: that of the first image."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """Of the images; auto takes those of the first one."""
    crop: Literal["center", "random"] = "center"
    """The square taken of each image: its centre, or a random one of 8/9 of the shorter side each time."""
    flip: bool = False
    """Mirror every image with probability one half."""
    on_bad_data: Literal["stop", "skip"] = "stop"
    """What to do about images that are corrupt, smaller than half the resolution, or have no label (-1)."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory and how a batch is made of them.

    Attributes:
        images: (n, c, size, size), uint8 or floats in [-1, 1].
        labels: (n,) class numbers; all 0 if there is one class.
        class_names: one per class.
        resolution: of a batch; below ``size`` where crops are random.
        flip: mirror with probability one half.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    resolution: int
    flip: bool = False

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a batch's images."""
        return (self.images.shape[1], self.resolution, self.resolution)

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 means unlabelled."""
        return len(self.class_names)

    def some(self, most: int) -> Tensor:
        """Numbers of all images in order, or, if there are more than ``most``, of that many, always the same.

        The first ones would not do: sources are sorted by class.
        """
        if len(self) <= most:
            return torch.arange(len(self))
        return torch.randperm(len(self), generator=Generator().manual_seed(0))[:most]

    def batch(self, chosen: Tensor, generator: Generator, device: torch.device | str = "cpu") -> Labelled:
        """The chosen images, cropped, mirrored, in [-1, 1], and their labels."""
        images = as_floats(self.images[chosen])
        room = images.shape[-1] - self.resolution
        if room:
            corners = torch.randint(0, room + 1, (len(chosen), 2), generator=generator)
            rows, columns = (corners[:, axis, None] + torch.arange(self.resolution) for axis in (0, 1))
            every = torch.arange(len(chosen))[:, None, None]
            images = images[every, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
        if self.flip:
            mirrored = torch.rand(len(chosen), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return Labelled(images.to(device), self.labels[chosen].to(device))


def as_floats(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]; floats as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def load_images(options: DataOptions) -> ImageSet:
    """The images that ``options`` name.

    Raises ``ValueError`` for a source that is not there or not understood, for unusable images unless they are to
    be skipped, and if none is left.
    """
    check_options(options)
    if options.data is None:
        part = load_digits()[0]
        return _from_arrays(check_values(part.images.numpy(), "digits"), part.labels.numpy(), options)
    path = Path(options.data)
    if path.suffix == ".npz":
        return _from_arrays(*read_npz(path), options)
    if is_idx(path):
        return _from_arrays(*read_idx(path), options)
    return _from_items(_source(path, options), options)


def check_options(options: DataOptions) -> None:
    """Raise ``ValueError`` for a resolution that no image has, or no name at all."""
    if options.resolution is not None and not 1 <= options.resolution <= 4096:
        raise ValueError(f"--resolution must lie in [1, 4096]; got {options.resolution}.")
    if options.data == "":
        raise ValueError("--data must be the name of a folder, file or dataset; got an empty one.")


def _source(path: Path, options: DataOptions) -> Source:
    if not path.exists():
        check_hub_name(options.data or "")
        return _from_hub(options.data or "")
    if path.is_file():
        raise ValueError(f"--data {path} is a file but neither .npz nor idx; pass a folder of images for others.")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_hub(str(path))
    if (path / "metadata.jsonl").is_file():
        return Source(_from_metadata(path))
    return Source(_from_folder(path))


def check_hub_name(name: str) -> None:
    """Raise ``ValueError`` for a path that is not there; asking the Hub for it would take half a minute."""
    owner = Path(name).parent
    file = Path(name).suffix.lower() in FILES or name.endswith("-ubyte")
    if file or not HUB_NAME.fullmatch(name) or (owner != Path(".") and owner.exists()):
        raise ValueError(
            f"--data {name} is no folder here, and no dataset: those of the Hugging Face Hub are called name or "
            f"owner/name, where owner is no folder here. Correct the path."
        )


def _from_folder(path: Path) -> Iterator[Item]:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES and not _is_hidden(file.relative_to(path)) and file.is_file()
    )
    if not files:
        raise ValueError(f"--data {path} holds no images ({', '.join(sorted(SUFFIXES))}), metadata.jsonl or idx.")
    stray = next((file for file in files if file.parent == path), None)
    classes = {file.relative_to(path).parts[0] for file in files if file.parent != path}
    if stray and classes:
        raise ValueError(
            f"--data {path} holds images beside class subfolders such as {min(classes)}: {stray.name}, for one. "
            f"Move them into their classes, or elsewhere."
        )
    # As strings they would sort 0, 1, 10, 2; and a class that is not there would shift those behind it.
    numbered = all(name.isascii() and name.isdigit() for name in classes)
    for file in files:
        name = file.relative_to(path).parts[0]
        yield str(file), file, (int(name) if numbered else name) if classes else None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _from_metadata(path: Path) -> Iterator[Item]:
    # splitlines would also split at characters that a name may hold, such as U+2028.
    for number, line in enumerate(read_text(path / "metadata.jsonl").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["file_name"]
            yield str(path / name), path / name, row.get("label")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path / "metadata.jsonl"}, line {number}: expected {{"file_name": ..., "label": ...}}; got '
                f"{line[:80]!r} ({error!r})."
            ) from error


def _from_hub(name: str) -> Source:
    import datasets

    try:
        local = Path(name).exists()
        data = datasets.load_from_disk(name) if local else datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises a dozen kinds, its own among them
        raise ValueError(
            f"--data {name} is no folder here, and no dataset that can be loaded: {type(error).__name__}: {error}"
        ) from error
    data = data["train"] if isinstance(data, datasets.DatasetDict) else data
    column = next((key for key, kind in data.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"--data {name} has no column of images; its columns are {list(data.features)}.")
    names = getattr(data.features.get("label"), "names", None)
    rows = data.cast_column(column, datasets.Image(decode=False))
    return Source(_from_rows(name, rows, column), names and tuple(names))


def _from_rows(name: str, rows: Iterable[dict[str, Any]], column: str) -> Iterator[Item]:
    for number, row in enumerate(rows):
        picture = row[column] or {"bytes": b"", "path": None}
        source = picture["path"] if picture["bytes"] is None else picture["bytes"]
        yield f"{name}[{number}]", source, row.get("label")


def _from_items(source: Source, options: DataOptions) -> ImageSet:
    images: list[np.ndarray] = []
    kept: list[Any] = []
    bad: list[str] = []
    size = mode = None
    items = list(source.items)
    for name, file, label in tqdm(items, desc="images", disable=None, leave=False):
        try:
            if source.class_names and not (label is not None and 0 <= label < len(source.class_names)):
                raise ValueError(f"has label {label}, none of its {len(source.class_names)} classes.")
            image = open_image(file)
            if size is None:
                resolution = options.resolution or min(image.size)
                size = stored_size(resolution, options.crop)
                mode = {"grey": "L", "rgb": "RGB", "auto": image.mode}[options.channels]
            images.append(square(image.convert(mode), size, resolution))
            kept.append(label)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{name}: {error}")
            if options.on_bad_data == "stop":
                raise ValueError(
                    f"unusable image {name}: {error} Repair it, or pass --on-bad-data skip."
                ) from error
    if bad:
        print(f"left out {len(bad)} unusable images, the first: {printable(bad[0])}")
    if not images:
        raise ValueError(f"no usable image among {len(items)} of --data {options.data}.")
    labels, names = number_classes(kept, source.class_names)
    stack = np.stack(images)
    stack = stack[:, None] if stack.ndim == 3 else stack.transpose(0, 3, 1, 2)
    return ImageSet(torch.from_numpy(np.ascontiguousarray(stack)), labels, names, resolution, options.flip)


def _from_arrays(images: np.ndarray, labels: np.ndarray, options: DataOptions) -> ImageSet:
    stack = torch.tensor(images)
    mode = options.channels
    if mode == "grey" and stack.shape[1] == 3:
        raise ValueError(
            f"--channels grey, but the images of --data {options.data} are in colour; pass auto or rgb."
        )
    stack = stack.expand(-1, 3, -1, -1) if mode == "rgb" else stack
    side = min(stack.shape[2:])
    resolution = options.resolution or side
    if side * 2 < resolution:
        raise ValueError(
            f"the images of --data {options.data} are {side} high or wide; less than half of --resolution "
            f"{resolution} shows nothing."
        )
    top, left = ((length - side) // 2 for length in stack.shape[2:])
    stack = stack[:, :, top : top + side, left : left + side]
    if (size := stored_size(resolution, options.crop)) != side:
        stack = torch.cat([resized(part, size) for part in stack.split(4096)])
    names = tuple(str(number) for number in range(int(labels.max()) + 1))
    return ImageSet(stack, torch.from_numpy(labels), names, resolution, options.flip)
