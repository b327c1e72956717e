"""What an attacker may do: stay within a ball round the image, and within [0, 1]."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from scorefield.randomness import Generators, normal_like
from scorefield.schedule import Images, PerSample, per_sample

Norm = Literal["linf", "l2"]
"""linf: the largest change of a number. l2: the root of the sum of squared changes."""

Mask = Bool[Tensor, "b #c h w"]
"""True where an image may change."""


@dataclass(frozen=True)
class Threat:
    """A ball of a norm, and the box [0, 1].

    Attributes:
        radius: of the ball, for images in [0, 1]: 8 / 255 in linf, 0.5 in l2 are usual for small images.
        norm: :data:`Norm`.
    """

    radius: float
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        if not (0 <= self.radius < torch.inf and self.norm in ("linf", "l2")):
            raise ValueError(
                f"a threat needs a finite radius >= 0 and the norm linf or l2; got {self.radius}, {self.norm!r}. "
                "Images are in [0, 1]: eight grey values are 8 / 255."
            )

    def project(self, x: Images, center: Images) -> Tensor:
        """Return ``x`` moved into the ball round ``center``, then into [0, 1].

        The box cannot leave the ball, since ``center`` is in both. In linf it is the nearest such point; in l2 a
        near one, as everyone's PGD has it.
        """
        return (center + self.limited(x - center)).clamp(0, 1)

    def limited(self, delta: Images) -> Tensor:
        """Return changes cut to the ball."""
        if self.norm == "linf":
            return delta.clamp(-self.radius, self.radius)
        return delta * per_sample((self.radius / size(delta, "l2").clamp(min=1e-12)).clamp(max=1), delta)

    def steepest(self, gradient: Images) -> Tensor:
        """Return the change of norm 1 that rises most: the sign in linf, the direction in l2; 0 for none."""
        if self.norm == "linf":
            return gradient.sign()
        # Where the classifier is sure gradients are tiny, and their squares nothing: the largest number becomes 1.
        tiny = torch.finfo(gradient.dtype).tiny
        scaled = gradient / per_sample(size(gradient, "linf").clamp(min=tiny), gradient)
        return scaled / per_sample(size(scaled, "l2").clamp(min=tiny), scaled)

    def random(self, center: Images, generator: Generators, mask: Mask | None = None) -> Tensor:
        """Return a random start: uniform in the cube in linf, a uniform direction and length in l2; in [0, 1].

        Under a mask the direction is one of those that change nothing outside it.
        """
        normal = normal_like(center, generator)
        uniform = torch.special.ndtr(normal)
        if self.norm == "linf":
            return (center + self.radius * (2 * uniform - 1)).clamp(0, 1)
        # One number of the same draw gives the length: the direction hardly depends on it.
        lengths = self.radius * uniform.flatten(1)[:, 0]
        direction = self.steepest(inside(mask, normal, torch.zeros_like(normal)))
        return (center + per_sample(lengths, center) * direction).clamp(0, 1)


def size(delta: Images, norm: Norm) -> PerSample:
    """Return the norm of each change, (b,)."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def check_images(images: Images) -> None:
    """Raise ``ValueError`` unless images are finite and in [0, 1]: those in [-1, 1] are the usual mistake."""
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"images must be finite and in [0, 1]; got [{low:g}, {high:g}]. Those in [-1, 1] become (x + 1) / 2."
        )


def inside(mask: Mask | None, x: Images, images: Images) -> Tensor:
    """Return ``x`` where the mask is True and ``images``, bit by bit, elsewhere; all of ``x`` without a mask."""
    return x if mask is None else torch.where(mask, x, images)
