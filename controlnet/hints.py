"""Hints: what an adapter looks at, made of a batch of images where they are, random by sample.

    canny = Canny(low=(50, 150), high=(150, 250))
    hint = canny(images, hint_generators(seed, indices, epochs))  # (b, 1, h, w) in [0, 1]

A hint is anything with ``channels``, ``source`` and a call, as :class:`Hint` says. Those of ``canny.py``,
``lines.py``, ``degraded.py`` and ``geometry.py`` need no trained annotator. What a sample draws follows from
(seed, sample, epoch) alone: batch, rank, device and restarts do not matter.

Lengths, such as the width of a blur, are in pixels of a picture whose shorter side is 512, and scale with the
picture; hints of a small picture are then those of the large one, made small.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from scorefield.randomness import derived_generator

Images = Float[Tensor, "b c h w"]
Hints = Float[Tensor, "b k h w"]

Range = tuple[float, float]
"""Smallest and largest value of a parameter that each sample draws uniformly; equal ones fix it."""

REFERENCE_SIDE = 512


class Hint(Protocol):
    """What turns one tensor of a batch into what the adapter is conditioned on."""

    @property
    def channels(self) -> int:
        """The hint's number of channels."""
        ...

    @property
    def source(self) -> str:
        """The tensor of a sample that it is made of: "image", in [-1, 1], or a map such as "depth"."""
        ...

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return (b, c, h, w) to (b, channels, h, w) in [0, 1]; one generator for each sample."""
        ...


def hint_generators(
    seed: int, indices: Iterable[int], epochs: Iterable[int], purpose: str = "hint"
) -> list[Generator]:
    """One generator for each sample: what it draws follows from seed, sample, epoch and purpose alone."""
    return [
        derived_generator(purpose, seed, int(index), int(epoch))
        for index, epoch in zip(indices, epochs, strict=True)
    ]


def annotate(
    hints: Sequence[Hint], maps: Mapping[str, Tensor], generators: Sequence[Sequence[Generator]]
) -> Hints:
    """Several hints of a batch, one above the other in channels.

    Args:
        hints: in the order of the adapter's channels.
        maps: the batch by name, (b, c, h, w) each.
        generators: for each hint one per sample.

    Raises:
        ValueError: a hint whose source the batch lacks, or of another shape than it says.
    """
    parts = []
    for hint, own in zip(hints, generators, strict=True):
        check_source(hint, maps)
        x = maps[hint.source]
        part = hint(x, own)
        if part.shape != (len(x), hint.channels, *x.shape[2:]):
            raise ValueError(
                f"{type(hint).__name__} must give hints ({len(x)}, {hint.channels}, {x.shape[2]}, {x.shape[3]}) "
                f"of {hint.source} {tuple(x.shape)}; got {tuple(part.shape)}."
            )
        parts.append(part)
    return torch.cat(parts, 1)


def check_source(hint: Hint, names: Iterable[str]) -> None:
    """Raise ``ValueError`` unless what the hint is made of is among ``names``."""
    if hint.source not in (names := list(names)):
        raise ValueError(
            f"{type(hint).__name__} is made of {hint.source!r}, but the samples hold {', '.join(names)} only. "
            f"Name a column of that name among the maps, or set the hint's source."
        )


@dataclass(frozen=True)
class Precomputed:
    """A map of the samples as it is: hint images on disk, the outline of a circle.

    Attributes:
        source: name of the map, whose values lie in [0, 1].
        channels: 3 for colour; a grey map fills them all, a colour map becomes grey for 1.
    """

    source: str
    channels: int = 1

    def __call__(self, x: Images, generators: Sequence[Generator]) -> Hints:
        """Return the map. Raises ``ValueError`` if its channels cannot become those asked for."""
        check_generators(x, generators)
        if x.shape[1] == self.channels:
            return x
        if x.shape[1] == 1:
            return x.expand(-1, self.channels, -1, -1)
        if x.shape[1] == 3 and self.channels == 1:
            return brightness(2 * x - 1)
        raise ValueError(f"map {self.source!r} has {x.shape[1]} channels, its hint {self.channels}.")


def draws(bounds: Range, generators: Sequence[Generator]) -> list[float]:
    """Return a number between the bounds for each sample, on the host."""
    low, high = bounds
    return [low + (high - low) * float(torch.rand((), generator=g, dtype=torch.float64)) for g in generators]


def drawn(bounds: Range, generators: Sequence[Generator], x: Images) -> Tensor:
    """Return the same as (b, 1, 1, 1) factors for ``x``, in float32 or better.

    Raises ``ValueError`` unless there is one generator for each sample.
    """
    check_generators(x, generators)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.tensor(draws(bounds, generators), dtype=dtype).to(x.device)[:, None, None, None]


def in_pixels(length: float, x: Images) -> float:
    """Return a length of this module in pixels of ``x``."""
    return length * min(x.shape[-2:]) / REFERENCE_SIDE


def unit(images: Images) -> Images:
    """[-1, 1] to [0, 1]."""
    return (images + 1) / 2


def brightness(images: Images) -> Images:
    """Return images in [-1, 1], grey or colour, to (b, 1, h, w) in [0, 1]."""
    from kornia.color import rgb_to_grayscale

    return unit(images) if images.shape[1] == 1 else rgb_to_grayscale(unit(images))


def blurred(x: Images, sigma: float | Tensor, largest: float) -> Images:
    """Return a Gaussian blur of ``sigma`` pixels, one number or (b, 1, 1, 1) of at most ``largest``; borders go
    on.
    """
    from kornia.filters import gaussian_blur2d

    if largest == 0:
        return x
    # The size follows from the bound, so that a sample does not depend on what its batch drew.
    size = kernel_size(largest)
    widths = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).clamp(min=1e-3).reshape(-1, 1)
    return gaussian_blur2d(x, size, widths.expand(len(x), 2), border_type="replicate")


def kernel_size(sigma: float) -> int:
    """Odd, three standard deviations to each side, at least 3."""
    return 2 * max(1, math.ceil(3 * sigma)) + 1


def check_range(name: str, bounds: Range, least: float = 0.0, most: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``least`` <= bounds[0] <= bounds[1] <= ``most``, both finite."""
    if not least <= bounds[0] <= bounds[1] <= most or math.isinf(bounds[1]):
        within = f"[{least:g}, {most:g}]" if most < math.inf else f"numbers from {least:g}"
        raise ValueError(f"{name} must be (smallest, largest) within {within}; got {bounds}.")


def check_generators(x: Images, generators: Sequence[Generator]) -> None:
    """Raise ``ValueError`` unless there is one generator for each sample."""
    if len(generators) != len(x):
        raise ValueError(f"{len(x)} samples need as many generators (hint_generators); got {len(generators)}.")
