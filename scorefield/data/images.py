"""Training images in memory: decoded once to ``--resolution``, as bytes, from whatever ``--data`` names.

60,000 of 32 x 32 take 61 MB, a million of 64 x 64 in colour 12 GB.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from scorefield.data.arrays import check_class_numbers, check_values
from scorefield.data.options import DataOptions
from scorefield.data.pictures import ROOM, as_floats, central, open_image, resized
from scorefield.data.rows import Columns, Listing, Row, keep_good
from scorefield.data.sources import read_rows
from scorefield.files import warn
from scorefield.progress import progress
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


def load_images(options: DataOptions, option: str = "--data") -> ImageSet:
    """The images that ``options`` name; ``option`` is what named them, for messages.

    Raises ``ValueError`` for a source that is not there or not understood, for unusable images unless they are to
    be skipped, and if none is left.
    """
    if options.resolution is not None and not 1 <= options.resolution <= 4096:
        raise ValueError(f"--resolution must lie in [1, 4096]; got {options.resolution}.")
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


def _from_rows(listing: Listing, options: DataOptions) -> ImageSet:
    images, faults = list[Tensor](), label_faults(listing)
    resolution, mode = options.resolution or 0, {"grey": "L", "rgb": "RGB", "auto": ""}[options.channels]
    for number, row in enumerate(progress(listing.rows, "images read")):
        try:
            if faults[number] or row.image is None:
                raise ValueError(faults[number] or "names no picture.")
            image = open_image(row.image.read())
            mode, resolution = mode or image.mode, resolution or min(image.size)
            side = stored_size(resolution, options.crop)
            images.append(central(image.convert(mode), (side, side), (resolution, resolution)))
        except (OSError, ValueError) as error:
            faults[number] = f"{row.name} {error}"
    good = keep_good(listing, faults, options.on_bad_data)
    labels, names = number_classes([listing.rows[number].label for number in good], listing.class_names)
    return ImageSet(torch.stack(images), labels, names, resolution, options.flip)


def label_faults(listing: Listing) -> list[str]:
    """For each row what is wrong with it or its label; labels may be missing where all are."""
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
    resolution = options.resolution or side
    if side * 2 < resolution:
        raise ValueError(
            f"the images of {options.data or 'the digits'} are {side} high or wide; less than half of "
            f"--resolution {resolution} shows nothing."
        )
    top, left = ((length - side) // 2 for length in stack.shape[2:])
    stack = stack[:, :, top : top + side, left : left + side]
    size = stored_size(resolution, options.crop)
    if size != side:
        stack = torch.cat([resized(part, "image", (size, size)) for part in stack.split(4096)])
    names = tuple(str(number) for number in range(int(labels.max()) + 1))
    return ImageSet(stack, torch.from_numpy(labels), names, resolution, options.flip)
