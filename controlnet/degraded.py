"""What is left of an image as a hint: less resolution, less sharpness, fewer colours, a part painted over."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, interpolate, one_hot

from controlnet.hints import (
    Hints,
    Images,
    Range,
    blurred,
    check_generators,
    check_range,
    drawn,
    draws,
    in_pixels,
    unit,
)


@dataclass(frozen=True)
class Tile:
    """Square tiles of the image's mean colour: layout without detail, which the model has to make up.

    Attributes:
        factor: pixels of the image per tile along a side, a whole number; 1 is the image itself.
        channels: of the image.
    """

    factor: tuple[int, int] = (2, 8)
    channels: int = 3
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_range("factor", self.factor, least=1)

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, channels, h, w). A side that the factor does not divide ends in a smaller tile."""
        return _by_factor(_tiles, unit(x), self.factor, generators)


@dataclass(frozen=True)
class LowResolution:
    """The image made small and large again, bicubic and without aliasing: the hint of a super-resolution model.

    Attributes:
        factor: of the sides, a whole number; 1 is the image itself.
        channels: of the image.
    """

    factor: tuple[int, int] = (2, 8)
    channels: int = 3
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_range("factor", self.factor, least=1)

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, channels, h, w)."""
        return _by_factor(_small_and_large, unit(x), self.factor, generators)


def _by_factor(
    make: Callable[[Tensor, int], Tensor], x: Images, factor: tuple[int, int], generators: Sequence[Generator]
) -> Hints:
    check_generators(x, generators)
    low, high = factor
    factors = [min(high, int(value)) for value in draws((low, high + 1), generators)]
    result = torch.empty_like(x)
    for each in sorted(set(factors)):  # samples of one factor together: sizes differ
        chosen = torch.tensor([i for i, own in enumerate(factors) if own == each], device=x.device)
        result[chosen] = make(x[chosen], each).clamp(0, 1)
    return result


def _tiles(x: Tensor, factor: int) -> Tensor:
    small = avg_pool2d(x, factor, ceil_mode=True)
    large = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return large[:, :, : x.shape[2], : x.shape[3]]


def _small_and_large(x: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return x
    sides = [max(1, round(side / factor)) for side in x.shape[2:]]
    small = interpolate(x, sides, mode="bicubic", antialias=True)
    return interpolate(small, x.shape[2:], mode="bicubic")


@dataclass(frozen=True)
class Blur:
    """The image through a Gaussian blur.

    Attributes:
        sigma: standard deviation, a length of ``controlnet.hints``.
        channels: of the image.
    """

    sigma: Range = (4.0, 24.0)
    channels: int = 3
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_range("sigma", self.sigma)

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, channels, h, w)."""
        scale = in_pixels(1.0, x)
        sigma = scale * drawn(self.sigma, generators, x)
        return blurred(unit(x), sigma, scale * self.sigma[1]).clamp(0, 1)


@dataclass(frozen=True)
class Inpaint:
    """The image with boxes and brush strokes cut out, black there, and in the last channel where: 1 is missing.

    At least one piece is cut; every sample draws how many, and which.

    Attributes:
        num_boxes: most of them, each of up to half of the sides.
        num_strokes: most of them, two straight lines each, a tenth of the shorter side wide.
        image_channels: of the image; the hint has one more.
    """

    num_boxes: int = 3
    num_strokes: int = 3
    image_channels: int = 3
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        if min(self.num_boxes, self.num_strokes) < 0 or not self.num_boxes + self.num_strokes:
            raise ValueError(f"need boxes or strokes; got {self.num_boxes} and {self.num_strokes}.")

    @property
    def channels(self) -> int:
        """The image's and the mask."""
        return self.image_channels + 1

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, image_channels + 1, h, w)."""
        check_generators(x, generators)
        missing = torch.stack([self._mask(x, generator) for generator in generators])[:, None].to(x.dtype)
        return torch.cat([unit(x) * (1 - missing), missing], 1)

    def _mask(self, x: Images, generator: Generator) -> Tensor:
        height, width = x.shape[2:]
        rows = torch.arange(height, device=x.device)[:, None] + 0.5
        columns = torch.arange(width, device=x.device) + 0.5
        most = self.num_boxes + self.num_strokes
        count = 1 + int(torch.randint(most, (), generator=generator))
        pieces = torch.randperm(most, generator=generator)[:count].tolist()
        points = torch.rand(most, 3, 2, generator=generator, dtype=torch.float64) * torch.tensor([height, width])
        mask = torch.zeros(height, width, dtype=torch.bool, device=x.device)
        for piece in pieces:
            first, second, third = points[piece].tolist()
            if piece < self.num_boxes:
                tall, wide = 0.1 * height + 0.4 * second[0], 0.1 * width + 0.4 * second[1]
                mask |= ((rows - first[0]).abs() <= tall / 2) & ((columns - first[1]).abs() <= wide / 2)
            else:
                away = torch.minimum(
                    _distance(rows, columns, first, second), _distance(rows, columns, second, third)
                )
                mask |= away <= 0.05 * min(height, width)
        return mask


def _distance(rows: Tensor, columns: Tensor, start: list[float], end: list[float]) -> Tensor:
    # From each pixel to the straight line between two points.
    down, right = end[0] - start[0], end[1] - start[1]
    squared = max(down**2 + right**2, 1e-12)
    share = (((rows - start[0]) * down + (columns - start[1]) * right) / squared).clamp(0, 1)
    return torch.hypot(rows - start[0] - share * down, columns - start[1] - share * right)


@dataclass(frozen=True)
class Palette:
    """The image in few flat colours: each pixel takes the nearest of its own image's ``num_colours`` main ones.

    The colours are k-means centres of a small version of the image, from starts as far apart as possible, the
    first of them random. An image of no more colours than that comes out unchanged, if its small version has them.

    Attributes:
        num_colours: of an image.
        channels: of the image.
        rounds: of k-means.
    """

    num_colours: int = 8
    channels: int = 3
    rounds: int = 10
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        if self.num_colours < 1 or self.rounds < 0:
            raise ValueError(f"need num_colours >= 1 and rounds >= 0; got {self.num_colours}, {self.rounds}.")

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, channels, h, w)."""
        step = max(1, math.ceil(max(x.shape[2:]) / 64))
        points = unit(x)[:, :, ::step, ::step].flatten(2).transpose(1, 2)
        centres = _spread(points, self.num_colours, drawn((0.0, 1.0), generators, x).flatten())
        for _ in range(self.rounds):
            # Sums as products: scattered additions differ from run to run on a GPU.
            member = one_hot(_nearest(points, centres), self.num_colours).to(x.dtype)
            count = member.sum(1)[:, :, None]
            mean = member.transpose(1, 2) @ points / count.clamp(min=1)
            centres = torch.where(count > 0, mean, centres)
        pixels = unit(x).flatten(2).transpose(1, 2)
        flat = centres.gather(1, _nearest(pixels, centres)[:, :, None].expand(-1, -1, centres.shape[2]))
        return flat.transpose(1, 2).reshape(x.shape).clamp(0, 1)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    # By matrix products the distance of a colour to itself would not be 0.
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)


def _spread(points: Tensor, number: int, first: Tensor) -> Tensor:
    # The farthest from all chosen so far, again and again.
    b, n, _ = points.shape
    rows = torch.arange(b, device=points.device)
    chosen = [points[rows, (first * n).long().clamp(max=n - 1)]]
    distance = torch.full((b, n), math.inf, dtype=points.dtype, device=points.device)
    for _ in range(number - 1):
        distance = torch.minimum(distance, (points - chosen[-1][:, None]).square().sum(2))
        chosen.append(points[rows, distance.argmax(1)])
    return torch.stack(chosen, 1)
