"""Score distillation in one form: a gradient with respect to a rendered image, or to its latent.

    SDS                 w (eps_s - eps)
    CSD                 w scale (eps_c - eps_n)
    VSD                 w (eps_s - eps_phi)
    x0-reconstruction   w (x0 - x0_s), which is SDS with another w

eps_s is the guided teacher and x0_s the image it expects, eps_c and eps_n are its answers with and without the
prompt, eps_phi is the score of the scene's own renders. In x0 all of them are ``weight * (baseline - target)``,
whatever the teacher predicts, so each is a :class:`gradient.ScoreDistillation`. Editing, which compares two
images, is in :mod:`sds.editing`.
"""

from typing import Protocol

import torch
from torch import Generator, Tensor

from scorefield.denoiser import Cond, Conditioned, Denoiser
from scorefield.gradient import (
    NoiseSampler,
    ScoreDistillation,
    ScoreGradient,
    TimeWeight,
    noise_weight,
    standard_normal,
)
from scorefield.schedule import Images, Schedule, per_sample
from scorefield.times import TimeSampler, uniform

TIMES = uniform(0.02, 0.98)
"""DreamFusion's: the ends, where a network is at its worst, are left out."""


class Distillation(Protocol):
    """What all losses of this package are."""

    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """The gradient with respect to x0, at one draw of t and noise per sample; no graph is kept."""


def sigma_squared(t: Tensor, schedule: Schedule) -> Tensor:
    """Sigma^2, DreamFusion's (arXiv 2209.14988, appendix A.2)."""
    return schedule.sigma(t) ** 2


def unit(t: Tensor, schedule: Schedule) -> Tensor:
    """One; DreamFusion found it about as good."""
    return torch.ones_like(schedule.sigma(t))


def alpha_sigma_squared(t: Tensor, schedule: Schedule) -> Tensor:
    """Alpha sigma^2: Fantasia3D's weight for geometry (arXiv 2303.13873), small at both ends of time."""
    return schedule.alpha(t) * schedule.sigma(t) ** 2


def noise_to_signal(t: Tensor, schedule: Schedule) -> Tensor:
    """Sigma / alpha, which turns eps_s - eps into x0 - x0_s; infinite where alpha is 0."""
    return schedule.ratio(t)


def sds(
    teacher: Denoiser, *, times: TimeSampler = TIMES, w: TimeWeight = sigma_squared,
    noise: NoiseSampler = standard_normal,
) -> ScoreDistillation:  # fmt: skip
    """Score distillation sampling: w(t) (eps_s - eps) (Poole et al. 2022, arXiv 2209.14988, Eq. 3).

    Args:
        teacher: guided as wished; DreamFusion's 100 for Stable Diffusion, in its notation, is ``guided`` with 101.
        times: how t is drawn.
        w: weight of the published residual; on EDM's schedule, whose sigma goes to 80, it is not bounded by 1.
        noise: how the noise is drawn.
    """
    return ScoreDistillation(teacher=teacher, baseline=None, times=times, weight=noise_weight(w), noise=noise)


def csd(
    denoiser: Denoiser, negative: Cond, *, scale: float = 1.0, times: TimeSampler = TIMES,
    w: TimeWeight = sigma_squared, noise: NoiseSampler = standard_normal,
) -> ScoreDistillation:  # fmt: skip
    """Classifier score distillation: w(t) scale (eps_c - eps_n) (Yu et al. 2023, arXiv 2310.19415).

    SDS without its generative half: what large guidance scales tend to. One network call on 2b samples.

    Args:
        denoiser: conditional, without guidance.
        negative: the null condition; with a negative prompt it is the direction from there to the wanted one.
        scale: of the gradient, as SDS's guidance scale multiplies this term.
        times: how t is drawn.
        w: weight of the published difference.
        noise: how the noise is drawn.
    """

    def scaled(t: Tensor, schedule: Schedule) -> Tensor:
        return scale * w(t, schedule)

    baseline = Conditioned(denoiser, negative)
    return ScoreDistillation(
        teacher=denoiser, baseline=baseline, times=times, weight=noise_weight(scaled), noise=noise
    )


def vsd(
    teacher: Denoiser, phi: Denoiser, *, times: TimeSampler = TIMES, w: TimeWeight = sigma_squared,
    noise: NoiseSampler = standard_normal,
) -> ScoreDistillation:  # fmt: skip
    """Variational score distillation: w(t) (eps_s - eps_phi) (Wang et al. 2023, arXiv 2305.16213, Eq. 9).

    Args:
        teacher: guided as wished; ProlificDreamer uses 7.5.
        phi: the score of the distribution of the scene's renders; :class:`sds.vsd.VSD` learns it.
        times: how t is drawn.
        w: weight of the published difference.
        noise: how the noise is drawn.
    """
    return ScoreDistillation(teacher=teacher, baseline=phi, times=times, weight=noise_weight(w), noise=noise)


def x0_reconstruction(
    teacher: Denoiser, *, times: TimeSampler = TIMES, w: TimeWeight = unit, noise: NoiseSampler = standard_normal
) -> ScoreDistillation:
    """w(t) (x0 - x0_s): MVDream's loss w / 2 |x0 - x0_s|^2 with x0_s held constant (arXiv 2308.16512).

    With w = 1 it is SDS under :func:`noise_to_signal`. MVDream guides with ``guided(denoiser, 50, negative,
    rescale=0.5)``: at such scales x0_s is over-saturated without ``rescale``.

    Args:
        teacher: guided as wished.
        times: how t is drawn.
        w: weight of the difference of images, not of noises.
        noise: how the noise is drawn.
    """

    def weight(x0: Tensor, target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        del target
        return per_sample(w(t, schedule), x0)

    return ScoreDistillation(teacher=teacher, baseline=None, times=times, weight=weight, noise=noise)
