"""Diff-Instruct (Luo et al. 2023, arXiv 2305.18455): the integral KL divergence, which is DMD without normaliser.

The gradient of the integral over t of w(t) KL(p_fake,t || p_real,t) is E w(t) (s_fake - s_real) dx_t / dx0 (the
paper's Theorem 3.1), and with s = (alpha mu - x_t) / sigma^2 and dx_t / dx0 = alpha

    w(t) (alpha / sigma)^2 (mu_fake - mu_real).

So it is a weight for :class:`distill.dmd.DMD`:

    DMD(teacher=..., student=..., fake=..., shape=..., weight=integral_kl(), student_every=1)
"""

import torch
from torch import Tensor

from scorefield.gradient import TimeWeight, Weight
from scorefield.schedule import Schedule, per_sample


def unit(t: Tensor, schedule: Schedule) -> Tensor:
    """Return the same weight, 1, for the divergence at every t."""
    del schedule
    return torch.ones_like(t, dtype=torch.float64)


def integral_kl(w: TimeWeight = unit) -> Weight:
    """w(t) (alpha / sigma)^2, for ``DMD.weight``; w = (sigma / alpha)^2 weighs all gaps in x0 the same.

    At sigma = 0, where both networks read x0 off the image, it is finite and the gap is 0.
    """

    def weight(x0: Tensor, target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        del target
        return per_sample(w(t, schedule) / schedule.ratio(t).clamp(min=1e-5) ** 2, x0)

    return weight
