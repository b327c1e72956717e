"""Guidance: a denoiser made from a denoiser."""

from dataclasses import dataclass

import torch
from torch import Tensor

from score.denoiser import Cond, Denoiser, expand_cond
from score.schedule import Images, PerSample, Schedule


@dataclass(frozen=True, eq=False)
class Guided:
    """Classifier-free guidance of a denoiser; see :func:`guided`."""

    denoiser: Denoiser
    scale: float
    negative: Cond

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """The guided clean image, from one call on a batch of 2b: negatives first."""
        if cond.keys() != self.negative.keys():
            raise ValueError(
                f"the negative condition must have the keys of cond {sorted(cond)}; got {sorted(self.negative)}."
            )
        negative = expand_cond(self.negative, len(x_t))
        both = {name: torch.cat([negative[name].to(value), value]) for name, value in cond.items()}
        neg, pos = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return neg + self.scale * (pos - neg)


def guided(denoiser: Denoiser, scale: float, negative: Cond) -> Denoiser:
    """Classifier-free guidance: x0 = neg + scale (pos - neg) (Ho and Salimans 2022, arXiv 2207.12598, Eq. 6).

    In x0 it is the same guidance as in eps, v or flow, which are affine in x0.

    Args:
        denoiser: a conditional denoiser.
        scale: 1 means none and costs one network call on b samples; any other scale is one call on 2b. A
            paper that writes ``cond + s (cond - uncond)`` means ``scale = 1 + s``.
        negative: the condition to move away from, batch 1 or b: the null label, an empty or negative prompt.

    Returns:
        ``denoiser`` itself at scale 1.
    """
    return denoiser if scale == 1 else Guided(denoiser, scale, negative)
