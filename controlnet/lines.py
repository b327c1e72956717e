"""Edges and strokes as hints: soft edges, line art, scribbles. The sharp ones are in ``canny.py``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator
from torch.nn.functional import max_pool2d, pad

from controlnet.hints import (
    Hint,
    Hints,
    Images,
    Range,
    blurred,
    brightness,
    check_range,
    drawn,
    draws,
    in_pixels,
    kernel_size,
    unit,
)


@dataclass(frozen=True)
class SoftEdge:
    """Strength of edges in few steps: the mean of Sobel magnitudes at several scales, 1 at a step of full height.

    The steps keep grey values of the image from leaking through the hint (ControlNet 1.1's soft edges). One
    scale of 0 is the plain Sobel magnitude.

    Attributes:
        scales: of the blurs before differentiating, as lengths of ``controlnet.hints``.
        gain: factor; natural edges are far weaker than 1.
        levels: number of values, from 0 to 1; 0 leaves them continuous.
    """

    scales: tuple[float, ...] = (0.0, 2.0, 4.0)
    gain: Range = (1.0, 4.0)
    levels: int = 3
    channels: ClassVar[int] = 1
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_range("gain", self.gain)
        if not self.scales or min(self.scales) < 0 or self.levels < 0 or self.levels == 1:
            raise ValueError(f"need scales >= 0, and levels of 0 or at least 2; got {self.scales}, {self.levels}.")

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, 1, h, w)."""
        from kornia.filters import get_gaussian_kernel1d, sobel

        gain, grey = drawn(self.gain, generators, x), brightness(x)
        total = torch.zeros_like(grey)
        for scale in self.scales:
            sigma = in_pixels(scale, x)
            peak = 0.5
            if sigma > 0:
                size = kernel_size(sigma)
                kernel = get_gaussian_kernel1d(size, sigma, dtype=torch.float64)[0]
                peak = 0.5 * float(kernel[size // 2] + kernel[size // 2 + 1])  # what a step of 1 leaves
            total += sobel(blurred(grey, sigma, sigma), eps=1e-12) / peak
        strength = (gain * total / len(self.scales)).clamp(0, 1)
        if not self.levels:
            return strength
        return (strength * self.levels).floor().clamp(max=self.levels - 1) / (self.levels - 1)


@dataclass(frozen=True)
class LineArt:
    """Dark lines on light ground, in white: how much darker a pixel is than its surroundings.

    The surroundings are a Gaussian blur; of the channels the least dark counts. Strengths are divided by twice
    their median among those above 8 / 255, so that faint drawings count as much as bold ones.

    Attributes:
        radius: standard deviation of the blur, a length of ``controlnet.hints``.
    """

    radius: Range = (6.0, 6.0)
    channels: ClassVar[int] = 1
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_range("radius", self.radius)

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, 1, h, w)."""
        scale = in_pixels(1.0, x)
        around = blurred(unit(x), scale * drawn(self.radius, generators, x), scale * self.radius[1])
        darker = (around - unit(x)).amin(1, keepdim=True).clamp(min=0)
        flat = darker.flatten(1)
        typical = torch.where(flat > 8 / 255, flat, math.nan).nanmedian(1).values.nan_to_num(0.0)
        return (0.5 * darker / typical.clamp(min=16 / 255)[:, None, None, None]).clamp(max=1)


@dataclass(frozen=True)
class Scribble:
    """Thick strokes along the strongest edges, as if drawn by hand.

    Attributes:
        edges: what is drawn after: edges of a blurred image, 1 or 0.
        smoothing: standard deviation of that blur, a length of ``controlnet.hints``.
        thickness: of a stroke, a length of ``controlnet.hints``, at least one pixel (ControlNet 1.1: 1 to 24).
    """

    edges: Hint
    smoothing: float = 3.0
    thickness: Range = (1.0, 24.0)
    channels: ClassVar[int] = 1
    source: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        check_range("thickness", self.thickness)
        if self.smoothing < 0 or self.edges.channels != 1:
            raise ValueError(f"need smoothing >= 0 and edges of one channel; got {self.smoothing}, {self.edges}.")

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, 1, h, w), 0 or 1."""
        sigma = in_pixels(self.smoothing, x)
        lines = self.edges(blurred(x, sigma, sigma), generators)
        return thicken(lines, [max(1, round(in_pixels(value, x))) for value in draws(self.thickness, generators)])


def thicken(lines: Hints, widths: Sequence[int]) -> Hints:
    """Dilate each sample so that a line of one pixel becomes ``widths[i]`` pixels wide."""
    limits = torch.tensor(widths, device=lines.device).reshape(-1, 1, 1, 1)
    for width in range(1, max(widths)):
        # One pixel more each time, to the left and above, then to the right and below.
        padding = (1, 0, 1, 0) if width % 2 else (0, 1, 0, 1)
        lines = torch.where(limits > width, max_pool2d(pad(lines, padding), 2, 1), lines)
    return lines
