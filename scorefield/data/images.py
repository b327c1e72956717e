"""Training images at ``--size``, from whatever ``--data`` names: in memory, or decoded when they are drawn.

60,000 of 32 x 32 take 61 MB, a million of 64 x 64 in colour 12 GB. ``--memory-limit`` says how much is kept; all
are decoded once before training, to meet what cannot be used.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from scorefield.cache import content_key
from scorefield.data.ahead import read_ahead
from scorefield.data.arrays import check_class_numbers, check_values
from scorefield.data.options import DataOptions
from scorefield.data.pictures import ROOM, as_floats, open_image, read_central, resized
from scorefield.data.rows import Columns, Listing, Picture, Row, keep_good
from scorefield.data.sources import read_rows
from scorefield.data.threads import in_threads
from scorefield.files import warn
from scorefield.progress import progress
from scorefield.randomness import Rng, shuffled
from scorefield.shipped import shipped

DIGITS = ((1, 8, 8), 10)
"""Shape and number of classes of the digits, which stand for ``--data`` where none is named."""


@dataclass(frozen=True)
class Labelled:
    """Images (n, c, h, w) in [-1, 1] and their labels (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, and how a batch is made of them.

    Attributes:
        images: (k, c, size, size), uint8 or floats in [-1, 1]: the first of them, or all.
        labels: (n,) class numbers; all 0 if there is one class.
        class_names: one per class.
        resolution: of a batch; below ``size`` where crops are random.
        flip: mirror with probability one half.
        unread: where the n - k further ones lie, which are decoded when they are drawn.
        pixel_hash: of all n images, as bytes; empty where all are in memory.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    resolution: int
    flip: bool = False
    unread: Sequence[Picture] = ()
    pixel_hash: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a batch's images."""
        return (self.images.shape[1], self.resolution, self.resolution)

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 means unlabelled."""
        return len(self.class_names)

    def identity(self) -> str:
        """Return a hash of images and labels, the same wherever the images are kept."""
        pixels = self.pixel_hash or hash_of_pixels(self.images)
        return content_key(pixels, f"{self.images.dtype} {tuple(self.images.shape[1:])}", self.labels)[:16]

    def some(self, most: int) -> Tensor:
        """Return numbers of all images in order, or, if there are more than ``most``, of that many, always the
        same.

        The first ones would not do: sources are sorted by class.
        """
        if len(self) <= most:
            return torch.arange(len(self))
        return torch.randperm(len(self), generator=Generator().manual_seed(0))[:most]

    def spread(self, most: int = 10_000) -> float:
        """Standard deviation of the pixels of ``most`` images, in [-1, 1]."""
        sums = torch.zeros(3, dtype=torch.float64)
        for part in self.some(most).split(250):
            pixels = as_floats(self.pixels(part)).double()
            sums += torch.stack([torch.tensor(float(pixels.numel())), pixels.sum(), pixels.square().sum()])
        number, total, squares = sums.tolist()
        return math.sqrt(max(0.0, squares - total * total / number) / max(1.0, number - 1))

    def pixels(self, chosen: Tensor) -> Tensor:
        """Return (b, c, size, size) of the images with these numbers. Raises ``ValueError`` for a spoilt file."""
        return torch.stack(list(in_threads(self._one, chosen.tolist()))) if self.unread else self.images[chosen]

    def _one(self, number: int) -> Tensor:
        if number < len(self.images):
            return self.images[number]
        picture = self.unread[number - len(self.images)]
        try:
            return decoded(picture, "L" if self.images.shape[1] == 1 else "RGB", self.images.shape[-1])
        except (OSError, ValueError) as error:
            raise ValueError(f"{picture.name} {error} It has changed since the run began.") from error

    def batch(self, chosen: Tensor, generator: Generator, device: torch.device | str = "cpu") -> Labelled:
        """Return the chosen images, cropped, mirrored, in [-1, 1], and their labels."""
        return self._cut(chosen, self.pixels(chosen), generator, device)

    def batches(
        self, batch_size: int, device: torch.device | str = "cpu", num_ranks: int = 1
    ) -> Callable[[Rng], Labelled]:
        """Return what makes batches of shuffled epochs from an ``Rng``, and reads the next one meanwhile."""

        def load(number: int, seed: int) -> tuple[Tensor, Tensor]:
            chosen = shuffled(len(self), batch_size, Rng(seed, step=0, index=number))
            return chosen, self.pixels(chosen)

        return read_ahead(load, lambda loaded, rng: self._cut(*loaded, rng("augment"), device), num_ranks)

    def _cut(self, chosen: Tensor, pixels: Tensor, generator: Generator, device: torch.device | str) -> Labelled:
        images = as_floats(pixels)
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


def load_images(options: DataOptions, option: str = "--data") -> ImageSet:
    """Return the images that ``options`` name; ``option`` is what named them, for messages.

    Raises ``ValueError`` for a source that is not there or not understood, for unusable images unless they are to
    be skipped, and if none is left.
    """
    if not 0 <= options.size <= 4096:
        raise ValueError(f"--size must lie in [1, 4096], or be 0; got {options.size}.")
    if not 0 <= options.memory_limit < math.inf:
        raise ValueError(f"--memory-limit must be at least 0; got {options.memory_limit}.")
    if options.data is None:
        part: Labelled = shipped("images digits")()
        return _from_arrays(check_values(part.images.numpy(), "digits"), part.labels.numpy(), options)
    listing = read_rows(options.data, Columns(text=None), option)
    if listing.arrays is not None:
        keep_good(listing, [], options.on_bad_data)
        found = _from_arrays(*listing.arrays, options)
    else:
        found = _from_rows(listing, options)
    counts = torch.bincount(found.labels, minlength=found.num_classes).tolist()
    if missing := [name for name, count in zip(found.class_names, counts, strict=True) if not count]:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        warn(f"{listing.source} holds no image of {len(missing)} of its {found.num_classes} classes: {names}")
    return found


def stored_size(resolution: int, crop: str) -> int:
    """Side to keep in memory: an eighth more than the resolution where crops are random."""
    return resolution if crop == "center" else math.ceil(resolution * ROOM)


def decoded(picture: Picture, mode: str, size: int, least: int = 1) -> Tensor:
    """Return the central square of a picture, resized: (c, size, size) of bytes.

    Raises as :func:`read_central` does.
    """
    return read_central(picture.read(), mode, (size, size), (least, least))


def _from_rows(listing: Listing, options: DataOptions) -> ImageSet:
    rows, faults = listing.rows, label_faults(listing)
    mode, resolution = _first_image(listing, faults, options)
    side = stored_size(resolution, options.crop)
    channels = 1 if mode == "L" else 3
    most = int(options.memory_limit * 2**30) // (channels * side * side)
    images = torch.empty(min(most, len(rows)), channels, side, side, dtype=torch.uint8)  # untouched, it takes none

    def read(number: int) -> Tensor | str:
        image = rows[number].image
        try:
            if faults[number] or image is None:
                raise ValueError(faults[number] or "names no picture.")
            return decoded(image, mode, side, resolution)
        except (OSError, ValueError) as error:
            return f"{rows[number].name} {error}"

    num_good, digest = 0, hashlib.sha256()
    found = progress(in_threads(read, range(len(rows))), "images read", len(rows))
    for number, pixels in enumerate(found):
        faults[number] = pixels if isinstance(pixels, str) else ""
        if isinstance(pixels, Tensor):
            if len(images) < len(rows):
                digest.update(pixels.numpy().data)
            if num_good < len(images):
                images[num_good] = pixels
            num_good += 1
    good = keep_good(listing, faults, options.on_bad_data)
    labels, names = number_classes([rows[number].label for number in good], listing.class_names)
    images = images[: len(good)]
    unread = [image for number in good[len(images) :] if (image := rows[number].image)]
    return ImageSet(images, labels, names, resolution, options.flip, unread, digest.hexdigest() if unread else "")


def _first_image(listing: Listing, faults: Sequence[str], options: DataOptions) -> tuple[str, int]:
    # Mode and resolution, of the first image that can be opened where the options leave them open.
    mode, resolution = {"grey": "L", "rgb": "RGB", "auto": ""}[options.channels], options.size
    for row, fault in zip(listing.rows, faults, strict=True):
        if mode and resolution:
            break
        try:
            if row.image and not fault:
                image = open_image(row.image.read())
                mode, resolution = mode or image.mode, resolution or min(image.size)
        except (OSError, ValueError):  # it is met again below
            continue
    return mode or "L", resolution or 1


def hash_of_pixels(images: Tensor) -> str:
    """Return the sha256 of images as bytes, one after the other."""
    digest = hashlib.sha256()
    for part in images.split(4096):
        digest.update(part.contiguous().numpy())
    return digest.hexdigest()


def label_faults(listing: Listing) -> list[str]:
    """Return what is wrong with each row or its label; labels may be missing where all are."""
    labelled = any(row.label is not None for row in listing.rows)
    return [row.fault or (_label_fault(row, listing.class_names) if labelled else "") for row in listing.rows]


def _label_fault(row: Row, names: Sequence[str] | None) -> str:
    label = row.label
    if names and not (isinstance(label, int) and 0 <= label < len(names)):
        return f"has label {label}, none of its {len(names)} classes."
    if label is None:
        return "has no label, and others have one."
    if isinstance(label, bool) or not isinstance(label, int | str):
        return f"has label {label!r}, a {type(label).__name__}; expected a class number such as 0, or a name."
    return (
        f"has label {label}; expected a class number from 0, or a name."
        if isinstance(label, int) and label < 0
        else ""
    )


def number_classes(labels: list[Any], known: tuple[str, ...] | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers and names: numbers stay, ``known`` are their names; names are numbered in order.

    Names that are all numbers, as class folders and csv files have them, are numbers: sorted as names they would
    be 0, 1, 10, 2, and a class that is not there would shift those behind it.

    Raises ``ValueError`` for a mixture of both, and for numbers far above the number of images.
    """
    if known:
        return torch.tensor(labels), known
    if all(label is None for label in labels):
        return torch.zeros(len(labels), dtype=torch.long), ("image",)
    if all(isinstance(label, str) and label.isascii() and label.isdigit() for label in labels):
        spelt = {int(label): label for label in labels}
        if other := next((label for label in labels if spelt[int(label)] != label), None):
            raise ValueError(f"the classes {other} and {spelt[int(other)]} are one number. Rename one of them.")
        labels = [int(label) for label in labels]
    if all(isinstance(label, int) for label in labels):
        check_class_numbers(min(labels), max(labels), len(labels))
        return torch.tensor(labels), tuple(str(number) for number in range(max(labels) + 1))
    if all(isinstance(label, str) for label in labels):
        names = sorted(set(labels))
        numbers = {name: number for number, name in enumerate(names)}
        return torch.tensor([numbers[label] for label in labels]), tuple(names)
    number, name = (next(one for one in labels if isinstance(one, kind)) for kind in (int, str))
    raise ValueError(f"labels must be all class numbers from 0, or all names; got {number!r} beside {name!r}.")


def _from_arrays(images: np.ndarray, labels: np.ndarray, options: DataOptions) -> ImageSet:
    stack = torch.tensor(images)
    mode = options.channels
    if mode == "grey" and stack.shape[1] == 3:
        raise ValueError(
            f"--channels grey, but the images of {options.data or 'the digits'} are in colour; pass auto or rgb."
        )
    stack = stack.expand(-1, 3, -1, -1) if mode == "rgb" else stack
    side = min(stack.shape[2:])
    resolution = options.size or side
    if side * 2 < resolution:
        raise ValueError(
            f"the images of {options.data or 'the digits'} are {side} high or wide; less than half of "
            f"--size {resolution} shows nothing."
        )
    top, left = ((length - side) // 2 for length in stack.shape[2:])
    stack = stack[:, :, top : top + side, left : left + side]
    size = stored_size(resolution, options.crop)
    if size != side:
        stack = torch.cat([resized(part, "image", (size, size)) for part in stack.split(4096)])
    names = tuple(str(number) for number in range(int(labels.max()) + 1))
    return ImageSet(stack, torch.from_numpy(labels), names, resolution, options.flip)
