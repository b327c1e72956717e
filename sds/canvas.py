"""Images, or latents, as parameters: the simplest thing a loss can be applied to."""

from typing import Self

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from scorefield.schedule import Images


class Canvas(nn.Module):
    """A batch of images whose pixels are the parameters; several images are the particles of VSD.

    Args:
        start: Initial values (num_particles, *shape), which are copied. Images in [-1, 1] if ``bounded``; any
            values otherwise, such as latents or points.
        bounded: Make each image the tanh of its parameters, so that it stays in (-1, 1). At -1 and 1 tanh has no
            gradient, so ``start`` is first scaled by 0.99.

    Raises ``ValueError`` for a start without particles or, if ``bounded``, with values outside [-1, 1].
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
        """Return a canvas of normal noise; with ``bounded`` the noise is clipped to [-1, 1].

        Args:
            shape: Shape of one particle.
            num_particles: Number of images.
            std: Standard deviation of the noise.
            bounded: Keep the images in (-1, 1), as in the constructor.
            generator: Draws the noise, on its own device.
        """
        start = std * torch.randn(num_particles, *shape, generator=generator, device=generator.device)
        return cls(start.clamp(-1, 1) if bounded else start, bounded=bounded)

    @property
    def num_particles(self) -> int:
        """Number of images."""
        return len(self.pixels)

    def forward(self) -> Images:
        """Return the images (num_particles, *shape)."""
        return self.pixels.tanh() if self.bounded else self.pixels
