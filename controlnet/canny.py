"""Canny edges of a batch on its device, thresholds random by sample, few waits for the device.

Two kinds. ``like="opencv"`` is cv2.Canny pixel by pixel, also on colour images and with its default L1 norm: what
the published Canny ControlNets were trained on. ``like="kornia"`` is ``kornia.filters.canny``, bit by bit, which
blurs first and measures in other units. kornia alone takes one pair of thresholds a batch, and waits for the
device at each of some 75 rounds of edge tracking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn.functional import max_pool2d, pad

from controlnet.hints import Hints, Images, Range, brightness, check_range, drawn

ROUNDS = 8
"""Rounds of edge tracking between two looks at whether anything changed: each look waits for the device."""

LARGEST = {"opencv": 2 * 4 * 255.0, "kornia": 4 * 2**0.5}
"""That a gradient can reach: no edge is left above it."""

TAN_22_5 = 13573
"""tan(22.5 degrees) times 2^15, rounded: OpenCV decides directions in whole numbers."""


@dataclass(frozen=True)
class Canny:
    """Edges (Canny 1986), one pixel thin, 0 or 1; ``low`` and ``high`` are drawn for each sample.

    A pixel is an edge if its gradient is largest along its own direction and above the higher threshold, or above
    the lower one and connected to such a pixel. Of the two numbers drawn the smaller is the lower threshold.

    Attributes:
        low: in units of ``like``: 0 to about 1000 for opencv (published maps: 100 and 200), to 5.7 for kornia.
        high: the same.
        like: whose edges.
        l2_gradient: OpenCV's option: the gradient's Euclidean norm in place of the sum of its absolute values.
    """

    low: Range = (50.0, 150.0)
    high: Range = (150.0, 250.0)
    like: Literal["opencv", "kornia"] = "opencv"
    l2_gradient: bool = False
    channels: ClassVar[int] = 1
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        if self.like not in LARGEST:
            raise ValueError(f"like must be one of {', '.join(LARGEST)}; got {self.like!r}.")
        for name in ("low", "high"):
            check_range(f"{name} of Canny(like={self.like!r})", getattr(self, name), most=LARGEST[self.like])

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """(b, 1, h, w) in the dtype of x, of images (b, 1 or 3, h, w) in [-1, 1]."""
        first, second = drawn(self.low, generators, x), drawn(self.high, generators, x)
        return canny(x, torch.minimum(first, second), torch.maximum(first, second), self.like, self.l2_gradient)


@torch.no_grad()
def canny(
    images: Images, low: Tensor, high: Tensor, like: Literal["opencv", "kornia"] = "opencv",
    l2_gradient: bool = False,
) -> Hints:  # fmt: skip
    """Edges of images in [-1, 1] between thresholds (b, 1, 1, 1) or scalars; see :class:`Canny`."""
    ridges = _kornia_ridges(images) if like == "kornia" else opencv_ridges(images, l2_gradient)
    if like == "opencv" and l2_gradient:
        low, high = low**2, high**2
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


def _kornia_ridges(images: Images) -> Tensor:
    from kornia.filters import canny as kornia_canny

    # The magnitude after thinning does not depend on the thresholds. kornia too computes in float32 or better.
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    ridges: Tensor = kornia_canny(brightness(precise), hysteresis=False)[0]
    return ridges


def opencv_ridges(images: Images, l2_gradient: bool = False) -> Tensor:
    """Gradient magnitudes where they are largest along their direction, 0 elsewhere, as OpenCV's Canny has them.

    Whole numbers (b, 1, h, w), squared for the L2 norm, of images in [-1, 1] rounded to 8 bits. Of a colour image
    each pixel takes the gradient of the channel that has the largest, the first if several do.
    """
    dx, dy, size = _gradients(((images.float() + 1) * 127.5).round().clamp(0, 255).int(), l2_gradient)
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


def _gradients(pixels: Tensor, l2_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    # Sobel with the border repeated, in whole numbers: sums of slices, since GPUs convolve floats only.
    grown = torch.cat([pixels[:, :, :1], pixels, pixels[:, :, -1:]], 2)
    grown = torch.cat([grown[..., :1], grown, grown[..., -1:]], 3)
    rows = grown[:, :, :-2] + 2 * grown[:, :, 1:-1] + grown[:, :, 2:]
    columns = grown[..., :-2] + 2 * grown[..., 1:-1] + grown[..., 2:]
    dx, dy = rows[..., 2:] - rows[..., :-2], columns[:, :, 2:] - columns[:, :, :-2]
    size = dx * dx + dy * dy if l2_gradient else dx.abs() + dy.abs()
    best = [part[:, :1] for part in (dx, dy, size)]
    for channel in range(1, pixels.shape[1]):
        other = [part[:, channel : channel + 1] for part in (dx, dy, size)]
        larger = other[2] > best[2]
        best = [torch.where(larger, a, b) for a, b in zip(other, best, strict=True)]
    return best[0], best[1], best[2]
