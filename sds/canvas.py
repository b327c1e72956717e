"""An image, or a latent, as the scene: the shortest way to see what a loss does."""

from typing import Self

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from scorefield.schedule import Images


class Canvas(nn.Module):
    """Images that are the parameters; several of them are the particles of VSD.

    Args:
        start: (num_particles, *shape), copied. Images in [-1, 1] if ``bounded``, else anything: latents, points.
        bounded: images are the tanh of the parameters and stay in (-1, 1). At its ends tanh has no gradient, so
            ``start`` is moved inside by a hundredth.
    """

    def __init__(self, start: Float[Tensor, "n *shape"], *, bounded: bool = False) -> None:
        super().__init__()
        if start.ndim < 2 or not len(start):
            raise ValueError(f"start must be (num_particles, *shape) with a particle; got {tuple(start.shape)}.")
        if bounded and not bool((start.abs() <= 1).all()):
            raise ValueError(
                f"a bounded canvas starts from images in [-1, 1]; got [{start.min():g}, {start.max():g}]. Scale "
                "them, or pass bounded=False for latents."
            )
        self.bounded = bounded
        start = start.detach()
        self.pixels = nn.Parameter((0.99 * start).atanh() if bounded else start.clone())

    @classmethod
    def noise(
        cls, shape: tuple[int, ...], *, num_particles: int = 1, std: float = 1.0, bounded: bool = False,
        generator: Generator,
    ) -> Self:  # fmt: skip
        """Particles of normal noise, which ``bounded`` clips to [-1, 1]."""
        start = std * torch.randn(num_particles, *shape, generator=generator, device=generator.device)
        return cls(start.clamp(-1, 1) if bounded else start, bounded=bounded)

    @property
    def num_particles(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def forward(self) -> Images:
        """(num_particles, *shape) images."""
        return self.pixels.tanh() if self.bounded else self.pixels
