"""Hints of known geometry: distances and labels that come with the samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from controlnet.hints import Hints, Images, check_generators


@dataclass(frozen=True)
class Depth:
    """Near is white, far is black, and so is where nothing is met: distance 0, or none that is finite.

    Linear between the nearest and the farthest point of each sample.

    Attributes:
        source: map of distances, (b, 1, h, w), any unit.
    """

    source: str = "depth"
    channels: ClassVar[int] = 1

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, 1, h, w). A sample of one distance alone is white."""
        check_generators(x, generators)
        met = (x > 0) & x.isfinite()
        near = torch.where(met, x, math.inf).amin((1, 2, 3), keepdim=True)
        far = torch.where(met, x, -math.inf).amax((1, 2, 3), keepdim=True)
        white = torch.where(far > near, (far - torch.where(met, x, 1.0)) / (far - near), 1.0)
        return torch.where(met, white.clamp(0, 1), 0.0)


@dataclass(frozen=True)
class Segmentation:
    """Labels as one channel each.

    Attributes:
        num_classes: labels 0 to num_classes - 1.
        ignore: label of pixels that have none: 0 in all channels.
        source: map of labels, (b, 1, h, w), whole numbers.
    """

    num_classes: int
    ignore: int = 255
    source: str = "labels"

    def __post_init__(self) -> None:
        if self.num_classes < 1 or 0 <= self.ignore < self.num_classes:
            raise ValueError(
                f"need num_classes >= 1 and ignore outside of them; got {self.num_classes}, {self.ignore}."
            )

    @property
    def channels(self) -> int:
        """One a class."""
        return self.num_classes

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, channels, h, w).

        Raises ``ValueError`` for a label that is no class; waits for the device for it.
        """
        check_generators(x, generators)
        labels = x[:, 0].long()
        known = (labels >= 0) & (labels < self.num_classes)
        if not bool((known | (labels == self.ignore)).all()):
            raise ValueError(
                f"map {self.source!r} has labels from {int(labels.min())} to {int(labels.max())}; expected 0 to "
                f"{self.num_classes - 1}, or {self.ignore} for none. Set num_classes, or map them before."
            )
        rows = torch.eye(self.num_classes, device=x.device)[torch.where(known, labels, 0)] * known[..., None]
        return rows.permute(0, 3, 1, 2)
