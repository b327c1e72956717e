"""Hints of known geometry: distances, surface normals and labels that come with the samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from controlnet.hints import Hints, Images, check_generators


@dataclass(frozen=True)
class Depth:
    """Near is white, far is black, and so is where nothing is met: distance 0, or none that is finite.

    Attributes:
        near: distance shown white; None takes each sample's nearest.
        far: distance shown black; None takes each sample's farthest.
        inverse: linear in 1 / distance, as depth estimators have it.
        source: map of distances, (b, 1, h, w), any unit.
    """

    near: float | None = None
    far: float | None = None
    inverse: bool = False
    source: str = "depth"
    channels: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < (self.near or 1e-30) < (self.far or math.inf):
            raise ValueError(f"need 0 < near < far; got {self.near} and {self.far}.")

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """(b, 1, h, w). A sample of one distance alone is white."""
        check_generators(x, generators)
        met = (x > 0) & x.isfinite()
        near = _filled(torch.where(met, x, math.inf).flatten(1).amin(1), self.near)
        far = _filled(torch.where(met, x, -math.inf).flatten(1).amax(1), self.far)
        distance = torch.where(met, x, 1.0)
        if self.inverse:
            near, far, distance = -1 / near, -1 / far, -1 / distance
        span = far - near
        white = torch.where(span > 0, (far - distance) / span, 1.0)
        return torch.where(met, white.clamp(0, 1), 0.0)


def _filled(values: Tensor, fixed: float | None) -> Tensor:
    return (values if fixed is None else torch.full_like(values, fixed))[:, None, None, None]


@dataclass(frozen=True)
class Normals:
    """Unit normals of the surface that distances describe, in the camera's frame: right, up, towards the camera.

    -1 to 1 is shown as 0 to 1, and 0.5 in all channels where nothing is met. Of neighbouring pixels' points by
    central differences, so they are wrong along outlines.

    Attributes:
        field_of_view: vertical, in degrees; pixels are square and the principal point is the centre.
        along_rays: distances from the camera, not from its plane.
        source: map of distances, (b, 1, h, w), 0 where nothing is met.
    """

    field_of_view: float
    along_rays: bool = True
    source: str = "depth"
    channels: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 0 < self.field_of_view < 180:
            raise ValueError(f"field_of_view must lie in (0, 180) degrees; got {self.field_of_view}.")

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """(b, 3, h, w)."""
        from kornia.geometry.depth import depth_to_normals

        check_generators(x, generators)
        height, width = x.shape[2:]
        focal = height / 2 / math.tan(math.radians(self.field_of_view) / 2)
        camera = torch.tensor(
            [[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], dtype=x.dtype, device=x.device
        )
        away = depth_to_normals(x, camera.expand(len(x), 3, 3), normalize_points=self.along_rays)
        # kornia: right, down, forwards, and pointing away from the camera.
        axes = torch.tensor([-1.0, 1.0, 1.0], dtype=x.dtype, device=x.device)[:, None, None]
        return torch.where(x > 0, (away * axes + 1) / 2, 0.5)


@dataclass(frozen=True)
class Segmentation:
    """Labels as one channel each, or as colours.

    Attributes:
        num_classes: labels 0 to num_classes - 1.
        colours: three channels of the colours of PASCAL VOC, in which 0 is black, in place of one channel a class.
        ignore: label of pixels that have none: 0 in all channels.
        source: map of labels, (b, 1, h, w), whole numbers.
    """

    num_classes: int
    colours: bool = False
    ignore: int = 255
    source: str = "labels"

    def __post_init__(self) -> None:
        if self.num_classes < 1 or 0 <= self.ignore < self.num_classes:
            raise ValueError(
                f"need num_classes >= 1 and ignore outside of them; got {self.num_classes}, {self.ignore}."
            )

    @property
    def channels(self) -> int:
        """3 for colours, else one a class."""
        return 3 if self.colours else self.num_classes

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """(b, channels, h, w). Raises ``ValueError`` for a label that is no class; waits for the device for it."""
        check_generators(x, generators)
        labels = x[:, 0].long()
        known = (labels >= 0) & (labels < self.num_classes)
        if not bool((known | (labels == self.ignore)).all()):
            raise ValueError(
                f"map {self.source!r} has labels from {int(labels.min())} to {int(labels.max())}; expected 0 to "
                f"{self.num_classes - 1}, or {self.ignore} for none. Set num_classes, or map them before."
            )
        table = voc_colours(self.num_classes) if self.colours else torch.eye(self.num_classes)
        rows = table.to(x.device)[torch.where(known, labels, 0)] * known[..., None]
        return rows.permute(0, 3, 1, 2)


def voc_colours(number: int) -> Tensor:
    """(number, 3) colours in [0, 1], all different up to 256: the bits of the label, dealt to red, green and blue.

    The palette of PASCAL VOC's segmentations: 0 is black, 1 is (128, 0, 0) / 255.
    """
    labels = torch.arange(number)
    channels = [
        sum(((labels >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)
    ]
    return torch.stack([torch.as_tensor(channel) for channel in channels], 1).float() / 255
