"""Training images from wherever they are: folders, npz and idx files, Hugging Face datasets, the digits.

All images are decoded once, to ``--resolution``, and kept as bytes in memory: 60,000 of 32 x 32 take 61 MB, a
million of 64 x 64 in colour 12 GB. What cannot be used is named with its path and, with ``--on-bad-data skip``,
left out.
"""

import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from arrays import check_values, is_idx, read_idx, read_npz
from digits import Labelled, load_digits
from PIL import Image, ImageOps
from torch import Generator, Tensor
from tqdm import tqdm

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
Item = tuple[str, Any, Any]
"""Name to complain with, something that opens as an image, and a class (number, name or None)."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the training images come from and how they are cut."""

    data: str | None = None
    """Folder of images (class subfolders, metadata.jsonl with file_name and label, or neither), npz file with
    images and labels, idx file or folder of them (MNIST family), Hugging Face dataset. None: the digits."""
    resolution: int | None = None
    """Height and width to train at. None: that of the first image."""
    channels: Literal["auto", "grey", "rgb"] = "auto"
    """Of the images; auto takes those of the first one."""
    crop: Literal["center", "random"] = "center"
    """The square taken of each image: its centre, or a random one of 8/9 of the shorter side each time."""
    flip: bool = False
    """Mirror every image with probability one half."""
    on_bad_data: Literal["stop", "skip"] = "stop"
    """What to do about images that are corrupt, or smaller than half the resolution."""


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
    return _from_items(list(_items(path, options)), options)


def check_options(options: DataOptions) -> None:
    """Raise ``ValueError`` for a resolution that no image has."""
    if options.resolution is not None and not 1 <= options.resolution <= 4096:
        raise ValueError(f"--resolution must lie in [1, 4096]; got {options.resolution}.")


def _items(path: Path, options: DataOptions) -> Iterable[Item]:
    if not path.exists():
        return _from_hub(options.data or "")
    if path.is_file():
        raise ValueError(f"--data {path} is a file but neither .npz nor idx; pass a folder of images for others.")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_hub(str(path))
    if (path / "metadata.jsonl").is_file():
        return _from_metadata(path)
    return _from_folder(path)


def _from_folder(path: Path) -> Iterator[Item]:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"--data {path} holds no images ({', '.join(sorted(SUFFIXES))}), metadata.jsonl or idx.")
    in_classes = all(len(file.relative_to(path).parts) > 1 for file in files)
    for file in files:
        yield str(file), file, file.relative_to(path).parts[0] if in_classes else None


def _from_metadata(path: Path) -> Iterator[Item]:
    for number, line in enumerate((path / "metadata.jsonl").read_text().splitlines(), 1):
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


def _from_hub(name: str) -> Iterator[Item]:
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
    data = data.cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(data):
        label = row.get("label")
        source = row[column]["path"] if row[column]["bytes"] is None else row[column]["bytes"]
        yield f"{name}[{number}]", source, names[label] if names and label is not None else label


def _from_items(items: list[Item], options: DataOptions) -> ImageSet:
    images: list[np.ndarray] = []
    kept: list[Any] = []
    bad: list[str] = []
    size = mode = None
    for name, source, label in tqdm(items, desc="images", disable=None, leave=False):
        try:
            image = open_image(source)
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
        print(f"left out {len(bad)} unusable images, the first: {bad[0]}")
    if not images:
        raise ValueError(f"no usable image among {len(items)} of --data {options.data}.")
    labels, names = number_classes(kept)
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
        stack = torch.cat([_resized(part, size) for part in stack.split(4096)])
    names = tuple(str(number) for number in range(int(labels.max()) + 1))
    return ImageSet(stack, torch.from_numpy(labels), names, resolution, options.flip)


def _resized(images: Tensor, size: int) -> Tensor:
    large = torch.nn.functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    if images.dtype == torch.uint8:
        return large.round().clamp(0, 255).to(torch.uint8)
    return large.clamp(-1, 1)


def open_image(source: Any) -> Image.Image:
    """A path or bytes as an upright image of mode L or RGB; transparency is laid on white, 16 bits become 8."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        image = ImageOps.exif_transpose(file)
        image.load()
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode == "F" and not np.isfinite(values).all():
            raise ValueError("holds nan or inf.")
        top = 255 if values.max(initial=0) <= 255 and image.mode != "I;16" else 65535
        return Image.fromarray(np.round(values.clip(0, top) * (255 / top)).astype(np.uint8), "L")
    if image.mode in ("1", "L"):
        return image.convert("L")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def stored_size(resolution: int, crop: str) -> int:
    """Side to keep in memory: an eighth more than the resolution where crops are random."""
    return resolution if crop == "center" else math.ceil(resolution * 9 / 8)


def square(image: Image.Image, size: int, resolution: int) -> np.ndarray:
    """The central square, resized to ``size``. Raises ``ValueError`` below half the resolution."""
    if min(image.size) * 2 < resolution:
        raise ValueError(f"is {image.width} x {image.height}, smaller than half of --resolution {resolution}.")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Resizing with box= would let the filter see beyond the square.
    cut = image.crop((left, top, left + side, top + side))
    return np.asarray(cut if side == size else cut.resize((size, size), Image.Resampling.LANCZOS))


def number_classes(labels: list[Any]) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers and names; numbers stay, names are sorted. Raises ``ValueError`` for a mixture of both."""
    if all(label is None for label in labels):
        return torch.zeros(len(labels), dtype=torch.long), ("image",)
    if all(type(label) is int and label >= 0 for label in labels):
        if max(labels) >= max(len(labels), 10):
            raise ValueError(
                f"class numbers must be fewer than there are images, {len(labels)}; got {max(labels)}."
            )
        return torch.tensor(labels), tuple(str(number) for number in range(max(labels) + 1))
    if all(isinstance(label, str) for label in labels):
        names = sorted(set(labels))
        return torch.tensor([names.index(label) for label in labels]), tuple(names)
    odd = next(label for label in labels if not isinstance(label, str))
    raise ValueError(f"labels must be all class numbers from 0, or all names; got {odd!r} beside {labels[0]!r}.")
