"""Score distillation losses: each gives a gradient with respect to a rendered image, or to its latent.

    SDS                 w (eps_s - eps)
    CSD                 w scale (eps_c - eps_n)
    VSD                 w (eps_s - eps_phi)
    x0-reconstruction   w (x0 - x0_s), which is SDS with another w

eps_s is the prediction of the guided teacher and x0_s the image it expects. eps_c and eps_n are its predictions
with and without the prompt. eps_phi is the score of the scene's own renders. In terms of x0 all four are
``weight * (baseline - target)``, whatever the teacher predicts, so each is a
:class:`scorefield.gradient.ScoreDistillation`. In :class:`sds.vsd.VSD` phi is trained along with the scene.
"""

from typing import Protocol

import torch
from torch import Generator, Tensor

from scorefield.denoiser import Cond, Conditioned, Denoiser, expand_cond
from scorefield.gradient import (
    NoiseSampler,
    ScoreDistillation,
    ScoreGradient,
    TimeWeight,
    inject,
    noise_weight,
    standard_normal,
)
from scorefield.schedule import Images, Schedule, per_sample
from scorefield.times import TimeSampler, uniform

TIMES = uniform(0.02, 0.98)
"""DreamFusion's times. They leave out both ends of the schedule, where a network is least accurate."""


class Distillation(Protocol):
    """Interface of all losses of this package."""

    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return the gradient with respect to x0, at one draw of t and noise per sample. No graph is kept."""


def sigma_squared(t: Tensor, schedule: Schedule) -> Tensor:
    """Return sigma^2, DreamFusion's weight (arXiv 2209.14988, appendix A.2)."""
    return schedule.sigma(t) ** 2


def unit(t: Tensor, schedule: Schedule) -> Tensor:
    """Return 1, the weight that DreamFusion found about as good."""
    return torch.ones_like(schedule.sigma(t))


def alpha_sigma_squared(t: Tensor, schedule: Schedule) -> Tensor:
    """Return alpha sigma^2, Fantasia3D's weight for geometry (arXiv 2303.13873), small at both ends of time."""
    return schedule.alpha(t) * schedule.sigma(t) ** 2


def noise_to_signal(t: Tensor, schedule: Schedule) -> Tensor:
    """Return sigma / alpha, the weight that turns eps_s - eps into x0 - x0_s. It is infinite where alpha is 0."""
    return schedule.ratio(t)


def sds(
    teacher: Denoiser, *, times: TimeSampler = TIMES, w: TimeWeight = sigma_squared,
    noise: NoiseSampler = standard_normal,
) -> ScoreDistillation:  # fmt: skip
    """Return score distillation sampling: w(t) (eps_s - eps) (Poole et al. 2022, arXiv 2209.14988, Eq. 3).

    Args:
        teacher: The denoiser, with guidance if wanted. DreamFusion's scale of 100 for Stable Diffusion is
            ``guided`` with 101.
        times: How t is drawn.
        w: Weight of the published residual. On EDM's schedule, whose sigma goes to 80, sigma^2 is not bounded by
            1.
        noise: How the noise is drawn.
    """
    return ScoreDistillation(teacher=teacher, baseline=None, times=times, weight=noise_weight(w), noise=noise)


def csd(
    denoiser: Denoiser, negative: Cond, *, scale: float = 1.0, times: TimeSampler = TIMES,
    w: TimeWeight = sigma_squared, noise: NoiseSampler = standard_normal,
) -> ScoreDistillation:  # fmt: skip
    """Return classifier score distillation: w(t) scale (eps_c - eps_n) (Yu et al. 2023, arXiv 2310.19415).

    It is SDS without the generative part: the limit of large guidance scales. It costs one network call on 2b
    samples.

    Args:
        denoiser: A conditional denoiser without guidance.
        negative: The null condition, or a negative prompt; the gradient points away from it, towards the prompt.
        scale: Scale of the gradient, as SDS's guidance scale multiplies this term.
        times: How t is drawn.
        w: Weight of the published difference.
        noise: How the noise is drawn.
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
    """Return variational score distillation: w(t) (eps_s - eps_phi) (Wang et al. 2023, arXiv 2305.16213, Eq. 9).

    Args:
        teacher: The denoiser, with guidance if wanted; ProlificDreamer uses 7.5.
        phi: Denoiser of the distribution of the scene's renders. :class:`sds.vsd.VSD` trains it.
        times: How t is drawn.
        w: Weight of the published difference.
        noise: How the noise is drawn.
    """
    return ScoreDistillation(teacher=teacher, baseline=phi, times=times, weight=noise_weight(w), noise=noise)


def x0_reconstruction(
    teacher: Denoiser, *, times: TimeSampler = TIMES, w: TimeWeight = unit, noise: NoiseSampler = standard_normal
) -> ScoreDistillation:
    """Return MVDream's x0-reconstruction loss, whose gradient is w(t) (x0 - x0_s) (arXiv 2308.16512).

    The loss is w / 2 |x0 - x0_s|^2 with x0_s held constant. With w = 1 it is SDS under :func:`noise_to_signal`.
    MVDream guides with ``guided(denoiser, 50, negative, rescale=0.5)``: at such scales x0_s is over-saturated
    without ``rescale``.

    Args:
        teacher: The denoiser, with guidance if wanted.
        times: How t is drawn.
        w: Weight of the difference of images, not of noises.
        noise: How the noise is drawn.
    """

    def weight(x0: Tensor, target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        del target
        return per_sample(w(t, schedule), x0)

    return ScoreDistillation(teacher=teacher, baseline=None, times=times, weight=weight, noise=noise)


def averaged_gradient(
    method: Distillation, x0: Images, cond: Cond, *, num_draws: int, generator: Generator
) -> ScoreGradient:
    """Return the loss's gradient averaged over ``num_draws`` independent noises and times per sample.

    The networks see one batch of ``num_draws`` b samples: x0 and ``cond`` are repeated as wholes.

    Args:
        method: Any loss of this package.
        x0: (b, ...) encoded renders; no gradient flows into them here.
        cond: Conditions of batch 1 or b.
        num_draws: K; the variance of the gradient falls as 1 / K.
        generator: Draws all times and noises.

    Raises:
        ValueError: ``num_draws`` is below 1, or the conditions have another batch.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1; got {num_draws}.")
    batch = len(x0)
    for name, given in cond.items():  # other divisors of K b would also repeat, but pair up with the wrong renders
        if len(given) not in (1, batch):
            raise ValueError(f"cond[{name!r}] must have batch 1 or {batch}; got {tuple(given.shape)}.")
    repeated = x0.detach().repeat(num_draws, *[1] * (x0.ndim - 1))
    drawn = method.gradient(repeated, expand_cond(cond, num_draws * batch), generator=generator)
    value = drawn.value.unflatten(0, (num_draws, batch)).mean(0)
    return ScoreGradient(value, {**drawn.metrics, "gradient_rms": value.float().square().mean().sqrt()})


def distillation_loss(
    method: Distillation, x0: Images, cond: Cond, *, num_draws: int = 1, generator: Generator
) -> dict[str, Tensor]:
    """Return {"loss": scalar, metrics}: a loss whose gradient with respect to x0 is the averaged gradient over b.

    One backward pass goes through the encoder and the scene once, for all draws. The value of the loss has no
    meaning and does not fall; "gradient_rms" is the size of the gradient before the division by b.

    Args:
        method: Any loss of this package.
        x0: (b, ...) encoded renders, with their graph.
        cond: Conditions of batch 1 or b.
        num_draws: Noises and times per render.
        generator: Draws them.

    Raises:
        ValueError: ``num_draws`` is below 1, or the conditions have another batch.
    """
    gradient = averaged_gradient(method, x0, cond, num_draws=num_draws, generator=generator)
    return {"loss": inject(x0, gradient.value) / len(x0), **gradient.metrics}
