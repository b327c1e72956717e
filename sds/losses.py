"""Score distillation in one form: a gradient with respect to a rendered image, or to its latent.

    SDS                 w (eps_s - eps)
    CSD                 w scale (eps_c - eps_n)
    VSD                 w (eps_s - eps_phi)
    x0-reconstruction   w (x0 - x0_s), which is SDS with another w

eps_s is the guided teacher and x0_s the image it expects, eps_c and eps_n are its answers with and without the
prompt, eps_phi is the score of the scene's own renders. In x0 all of them are ``weight * (baseline - target)``,
whatever the teacher predicts, so each is a :class:`gradient.ScoreDistillation`. :class:`sds.vsd.VSD` is the third
with an eps_phi that learns; :class:`DDS`, which edits, compares two images.
"""

from dataclasses import dataclass
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
    weighted_gap,
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


@dataclass(frozen=True, kw_only=True, eq=False)
class DDS:
    """w(t) (eps_s(x_t, target prompt) - eps_s(source_t, source prompt)) (Hertz et al. 2023, arXiv 2304.07090).

    It is SDS of the edited image less SDS of the source at the same t and noise: what SDS does to an image that
    already fits its prompt (blur, saturation) cancels. The gradient is 0 where image and prompt are the source's.
    One call of the teacher on 2b samples.

    Args:
        teacher: guided as wished; the paper uses 7.5.
        source: x0 of the image to edit, batch 1 or b.
        source_cond: the prompt that describes it, batch 1 or b.
        times: how t is drawn; the paper draws 50 to 950 of 1000.
        w: weight of the published difference; 1 in the paper's code.
        noise: how the noise is drawn.
    """

    teacher: Denoiser
    source: Images
    source_cond: Cond
    times: TimeSampler = uniform(0.05, 0.95)
    w: TimeWeight = unit
    noise: NoiseSampler = standard_normal

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """The gradient at one draw of t and noise per sample; ``cond`` is the target prompt.

        Raises ``ValueError`` where source and x0, or their prompts, do not fit each other.
        """
        source = self._source_for(x0)
        given = expand_cond(self.source_cond, len(x0))
        if given.keys() != cond.keys():
            raise ValueError(f"source_cond must have the keys of cond {sorted(cond)}; got {sorted(given)}.")
        schedule = self.teacher.schedule
        t = self.times(len(x0), schedule, generator).to(x0.device)
        noise = self.noise(x0, cond, t, generator)
        x_t = torch.cat([schedule.diffuse(image, noise, t) for image in (x0, source)])
        both = {name: torch.cat([value, given[name].to(value)]) for name, value in cond.items()}
        x0_hat, source_hat = self.teacher(x_t, t.repeat(2), both).chunk(2)
        gap = (x0 - x0_hat) - (source - source_hat)
        return weighted_gap(noise_weight(self.w)(x0, x0_hat, t, schedule), gap, t)

    def _source_for(self, x0: Images) -> Images:
        if self.source.shape[1:] != x0.shape[1:]:
            raise ValueError(
                f"source must be images like x0 {tuple(x0.shape)}; got {tuple(self.source.shape)}. Encode and "
                "resize it as the scene's renders are."
            )
        return expand_cond({"source": self.source.to(x0)}, len(x0))["source"]


def averaged_gradient(
    method: Distillation, x0: Images, cond: Cond, *, num_draws: int, generator: Generator
) -> ScoreGradient:
    """The method's gradient averaged over ``num_draws`` independent noises and times per sample.

    They are one batch of ``num_draws`` b to the networks: x0 and ``cond`` repeat as wholes.

    Args:
        method: any loss of this package.
        x0: (b, ...) encoded renders; no gradient flows into them here.
        cond: batch 1 or b.
        num_draws: K; the variance of the gradient falls as 1 / K.
        generator: draws all times and noises.

    Raises:
        ValueError: num_draws below 1, conditions of another batch.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1; got {num_draws}.")
    batch = len(x0)
    for name, given in cond.items():  # any divisor of K b would repeat, to the wrong renders
        if len(given) not in (1, batch):
            raise ValueError(f"cond[{name!r}] must have batch 1 or {batch}; got {tuple(given.shape)}.")
    repeated = x0.detach().repeat(num_draws, *[1] * (x0.ndim - 1))
    drawn = method.gradient(repeated, expand_cond(cond, num_draws * batch), generator=generator)
    value = drawn.value.unflatten(0, (num_draws, batch)).mean(0)
    return ScoreGradient(value, {**drawn.metrics, "gradient_rms": value.float().square().mean().sqrt()})


def distillation_loss(
    method: Distillation, x0: Images, cond: Cond, *, num_draws: int = 1, generator: Generator
) -> dict[str, Tensor]:
    """{"loss": scalar, metrics}: a loss whose gradient with respect to x0 is the averaged one over the batch size.

    One backward pass from here goes through the encoder and the scene once, for all draws. The value of the loss
    means nothing and does not fall; "gradient_rms" is the size of the gradient before the division.

    Args:
        method: any loss of this package.
        x0: (b, ...) encoded renders, with their graph.
        cond: batch 1 or b.
        num_draws: noises and times per render.
        generator: draws them.

    Raises:
        ValueError: num_draws below 1, conditions of another batch.
    """
    gradient = averaged_gradient(method, x0, cond, num_draws=num_draws, generator=generator)
    return {"loss": inject(x0, gradient.value) / len(x0), **gradient.metrics}
