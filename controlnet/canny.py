"""Canny edges of a batch on its device, thresholds random by sample, few waits for the device.

They are those of cv2.Canny pixel by pixel, also on colour images: what the published Canny ControlNets were
trained on. ``kornia.filters.canny`` measures in other units, takes one pair of thresholds a batch, and waits for
the device at each of some 75 rounds of edge tracking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import max_pool2d, pad

from controlnet.hints import Hints, Images, Range, check_range, drawn

ROUNDS = 8
"""Rounds of edge tracking between two looks at whether anything changed: each look waits for the device."""

LARGEST = 2 * 4 * 255.0
"""That a gradient can reach: no edge is left above it."""

TAN_22_5 = 13573
"""tan(22.5 degrees) times 2^15, rounded: OpenCV decides directions in whole numbers."""


@dataclass(frozen=True)
class Canny:
    """Edges (Canny 1986), one pixel thin, 0 or 1; ``low`` and ``high`` are drawn for each sample.

    A pixel is an edge if its gradient is largest along its own direction and above the higher threshold, or above
    the lower one and connected to such a pixel. Of the two numbers drawn the smaller is the lower threshold.

    Attributes:
        low: of the gradient's absolute values in x and y together: 0 to about 1000 (published maps: 100 and 200).
        high: the same.
    """

    low: Range = (50.0, 150.0)
    high: Range = (150.0, 250.0)
    channels: ClassVar[int] = 1
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            check_range(f"{name} of Canny", getattr(self, name), most=LARGEST)

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, 1, h, w) in the dtype of x, of images (b, 1 or 3, h, w) in [-1, 1]."""
        first, second = drawn(self.low, generators, x), drawn(self.high, generators, x)
        return canny(x, torch.minimum(first, second), torch.maximum(first, second))


@torch.no_grad()
def canny(images: Images, low: Tensor, high: Tensor) -> Hints:
    """Edges of images in [-1, 1] between thresholds (b, 1, 1, 1) or scalars; see :class:`Canny`."""
    ridges = opencv_ridges(images)
    return track(ridges > high, ridges > low).to(images.dtype)


def track(strong: Tensor, candidates: Tensor) -> Tensor:
    """Hysteresis: the candidates that strong ones reach over neighbours in 8 directions, (b, 1, h, w) bools."""
    allowed = candidates.float()
    edges = strong.float() * allowed
    while True:
        grown = edges
        for _ in range(ROUNDS):
            grown = max_pool2d(grown, 3, 1, 1) * allowed
        if torch.equal(grown, edges):
            return edges > 0
        edges = grown


def opencv_ridges(images: Images) -> Tensor:
    """Gradient magnitudes where they are largest along their direction, 0 elsewhere, as OpenCV's Canny has them.

    Whole numbers (b, 1, h, w) of images in [-1, 1] rounded to 8 bits. Of a colour image each pixel takes the
    gradient of the channel that has the largest, the first if several do.
    """
    dx, dy, size = _gradients(((images.float() + 1) * 127.5).round().clamp(0, 255).int())
    padded = pad(size, (1, 1, 1, 1))
    height, width = size.shape[2:]

    def beside(down: int, right: int) -> Tensor:
        return padded[:, :, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    x, y = dx.abs() * TAN_22_5, dy.abs() << 15
    flat, steep = y < x, y > x + (dx.abs() << 16)  # tan(67.5 degrees) = tan(22.5 degrees) + 2
    rising = (dx ^ dy) < 0
    # Of equals the left and upper one stays; along diagonals neither does.
    largest = torch.where(
        flat,
        (size > beside(0, -1)) & (size >= beside(0, 1)),
        torch.where(
            steep,
            (size > beside(-1, 0)) & (size >= beside(1, 0)),
            torch.where(
                rising,
                (size > beside(-1, 1)) & (size > beside(1, -1)),
                (size > beside(-1, -1)) & (size > beside(1, 1)),
            ),
        ),
    )
    return size * largest


def _gradients(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Sobel with the border repeated, in whole numbers: sums of slices, since GPUs convolve floats only.
    grown = torch.cat([pixels[:, :, :1], pixels, pixels[:, :, -1:]], 2)
    grown = torch.cat([grown[..., :1], grown, grown[..., -1:]], 3)
    rows = grown[:, :, :-2] + 2 * grown[:, :, 1:-1] + grown[:, :, 2:]
    columns = grown[..., :-2] + 2 * grown[..., 1:-1] + grown[..., 2:]
    dx, dy = rows[..., 2:] - rows[..., :-2], columns[:, :, 2:] - columns[:, :, :-2]
    size = dx.abs() + dy.abs()
    best = [part[:, :1] for part in (dx, dy, size)]
    for channel in range(1, pixels.shape[1]):
        other = [part[:, channel : channel + 1] for part in (dx, dy, size)]
        larger = other[2] > best[2]
        best = [torch.where(larger, a, b) for a, b in zip(other, best, strict=True)]
    return best[0], best[1], best[2]
