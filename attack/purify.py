"""Purification: noise an image and denoise it again, as a function that an attacker differentiates.

SDEdit (arXiv 2108.01073) as a defence is DiffPure (Nie et al. 2022, arXiv 2205.07460). It is random: measure it
with :mod:`attack.report`, over several draws, under an attack that goes through it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from attack.pgd import Transform
from attack.threat import Mask
from scorefield.denoiser import Cond, Denoiser, expand_cond
from scorefield.randomness import Generators, normal_like
from scorefield.sampling import Step, sdedit
from scorefield.schedule import Images, PerSample

Gradient = Literal["full", "straight-through"]
"""full: through every step, recomputed in the backward pass. straight-through: as if purification were the
identity, which is cheap, and was measured to fail with latent teachers."""


def _same(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True, eq=False)
class Purifier:
    """SDEdit on images in [0, 1], of a teacher of pixels or latents.

    Exactly ``len(times)`` denoising steps are made; none return the codec's round trip, or the image itself.

    Attributes:
        denoiser: the teacher, guided or not.
        times: (n,) strictly decreasing: ``grid(schedule, n, high=strength)``.
        cond: conditioning, of batch 1.
        encode: images in [-1, 1] to x0; the identity for a teacher of pixels.
        decode: the way back.
        step: ``ddim()`` by default; ``ddpm()`` is DiffPure's reverse SDE.
        gradient: :data:`Gradient`.
    """

    denoiser: Denoiser
    times: Float[Tensor, " n"]
    cond: Cond
    encode: Callable[[Tensor], Tensor] = _same
    decode: Callable[[Tensor], Tensor] = _same
    step: Step | None = None
    gradient: Gradient = "full"

    def __post_init__(self) -> None:
        if self.gradient not in ("full", "straight-through"):
            raise ValueError(f"gradient must be full or straight-through; got {self.gradient!r}.")

    def __call__(self, images: Images, generator: Generators) -> Tensor:
        """Return purified images in [0, 1], differentiable in ``images``."""
        if self.gradient == "full":
            return self._purified(images, generator)
        with torch.no_grad():
            purified = self._purified(images, generator)
        return images + (purified - images).detach()

    def _purified(self, images: Tensor, generator: Generators) -> Tensor:
        x0 = self.encode(2 * images - 1)
        cond = expand_cond(self.cond, len(images))
        # Checkpoints pay only where there is a graph to keep.
        recompute = torch.is_grad_enabled() and x0.requires_grad and len(self.times) > 1
        cleaned = sdedit(
            self.denoiser, x0, cond, times=self.times, generator=generator, step=self.step, checkpoint=recompute
        )
        return ((self.decode(cleaned).to(images.dtype) + 1) / 2).clamp(0, 1)

    def off_manifold(self, images: Images, generator: Generators, *, t: float, num_draws: int = 4) -> PerSample:
        """Return the mean squared error of the teacher's x0 at time t, (b,): larger further off its data.

        Measured in the teacher's own space (latents), over ``num_draws`` of the noise. Compare with that of clean
        images: it is no distance on a scale of its own.
        """
        with torch.no_grad():
            x0, total = self.encode(2 * images - 1), images.new_zeros(len(images))
            cond, time = expand_cond(self.cond, len(images)), torch.full((len(images),), t, device=images.device)
            for _ in range(num_draws):
                x_t = self.denoiser.schedule.diffuse(x0, normal_like(x0, generator), time)
                error = (self.denoiser(x_t, time, cond).to(x0.dtype) - x0).square().flatten(1).mean(1)
                total = total + error.to(total) / num_draws
        return total


def straight_through(purifier: Purifier) -> Purifier:
    """Return the same purifier whose gradient is that of the identity; see :data:`Gradient`."""
    return replace(purifier, gradient="straight-through")


def within(mask: Mask, transform: Transform, images: Images) -> Transform:
    """Return ``transform`` whose result is taken inside the mask only; outside it is ``images``, bit by bit.

    Composed in pixels: a mask on latents leaks through the decoder.
    """

    def masked(x: Tensor, generator: Generators) -> Tensor:
        return torch.where(mask, transform(x, generator), images)

    return masked
