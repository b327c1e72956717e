"""Langevin dynamics: samples from a score alone, at one noise level, down all of them, or after a sampler's steps.

The unadjusted algorithm is x <- x + (step / 2) score(x) + sqrt(step) z. A step that is too long samples something
else: on N(0, 1) the variance is 1 / (1 - step / 4) instead of 1.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from scorefield.denoiser import Cond, Denoiser
from scorefield.randomness import Generators, normal_like
from scorefield.sampling import Multistep, Step, sample
from scorefield.schedule import Images, PerSample, per_sample

Score = Callable[[Tensor], Tensor]
"""x -> the gradient of its log density, of the same shape."""


def langevin(
    score: Score, x: Images, *, step: float, num_steps: int, generator: Generators | None = None
) -> Tensor:
    """Return ``x`` after ``num_steps`` of unadjusted Langevin dynamics: x + (step / 2) score(x) + sqrt(step) z.

    Args:
        score: gradient of the log density to sample.
        x: (b, *shape) where the chains start.
        step: above 0. The stationary distribution is biased by it: N(0, 1) becomes N(0, 1 / (1 - step / 4)).
        num_steps: calls of ``score``.
        generator: for the noise.

    Raises:
        ValueError: a step that is not above 0, or a negative number of steps.
    """
    if not step > 0 or num_steps < 0:
        raise ValueError(f"langevin needs step > 0 and num_steps >= 0; got step={step}, num_steps={num_steps}.")
    for _ in range(num_steps):
        x = x + step / 2 * score(x) + step**0.5 * normal_like(x, generator)
    return x


def denoiser_score(denoiser: Denoiser, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
    """Return grad log p_t(x_t) = (alpha x0 - x_t) / sigma^2 by Tweedie's formula, for sigma(t) > 0."""
    alpha, sigma = (per_sample(value(t), x_t) for value in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    return (alpha * denoiser(x_t, t, cond).to(x_t.dtype) - x_t) / sigma**2


def corrector_step(score: Tensor, noise: Tensor, snr: float) -> Tensor:
    """Return the step 2 (snr |z| / |s|)^2, a scalar (Song et al. 2020, arXiv 2011.13456, Algorithms 4 and 5).

    Norms are means over the batch, as the paper's: a single sample near a mode, whose score vanishes, must not
    leap. So a result depends on who shares its batch. In the notation of :func:`langevin` the step is twice this.
    """
    norms = [x.flatten(1).norm(dim=1).mean() for x in (noise, score)]
    return 2 * (snr * norms[0] / norms[1].clamp(min=torch.finfo(score.dtype).tiny)) ** 2


def correct(
    denoiser: Denoiser, x_t: Images, t: PerSample, cond: Cond, *, snr: float = 0.16, num_steps: int = 1,
    generator: Generators | None = None,
) -> Tensor:  # fmt: skip
    """Return ``x_t`` after Langevin steps at its own noise level: x + e score + sqrt(2 e) z.

    The step e is that of :func:`corrector_step`.

    Args:
        denoiser: the teacher.
        x_t: noisy images at t.
        t: their times, all the same: a batch has one step.
        cond: conditioning, batch b.
        snr: the paper's r, 0.16 for images. Small data need less: 0.5 is too long on a plane.
        num_steps: network calls.
        generator: for the noise.
    """
    for _ in range(num_steps):
        noise = normal_like(x_t, generator)
        score = denoiser_score(denoiser, x_t, t, cond)
        length = corrector_step(score, noise, snr)
        x_t = x_t + length * score + (2 * length).sqrt() * noise
    return x_t


def corrected(step: Step, *, snr: float = 0.16, num_steps: int = 1) -> Step:
    """Return ``step`` followed by ``num_steps`` corrector steps: predictor-corrector sampling (arXiv 2011.13456).

    ``sample(..., step=corrected(ddim()))``. The last step to the clean image is not corrected. Each step costs
    ``num_steps`` more network calls.

    Raises:
        ValueError: a :class:`Multistep`, which would remember what was there before; snr not above 0.
    """
    if isinstance(step, Multistep):
        raise ValueError("a corrector needs a sampler without memory: ddim(), ddpm() or heun(); got a Multistep.")
    if not snr > 0 or num_steps < 0:
        raise ValueError(f"a corrector needs snr > 0 and num_steps >= 0; got snr={snr}, num_steps={num_steps}.")

    def both(
        denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond, generator: Generators | None
    ) -> Tensor:
        x_s = step(denoiser, x_t, t, s, cond, generator)
        if s is None:
            return x_s
        return correct(denoiser, x_s, s, cond, snr=snr, num_steps=num_steps, generator=generator)

    return both


def annealed_langevin(
    denoiser: Denoiser, x_t: Images, cond: Cond, *, times: Float[Tensor, " n"], snr: float = 0.16,
    num_steps: int = 10, generator: Generators | None = None,
) -> Tensor:  # fmt: skip
    """Return clean images from Langevin dynamics at each of ``times`` in turn, and one denoising at the end.

    Between levels x_t / alpha stays as it is (Song and Ermon 2019, arXiv 1907.05600, whose alpha is 1); the final
    denoising takes away the noise of the last level (arXiv 2009.05475). Its step is that of :func:`correct`: the
    original one, proportional to sigma^2, hardly moves where the data are wider than the noise.

    Args:
        denoiser: the teacher.
        x_t: noisy images at times[0].
        cond: conditioning, batch b.
        times: (n,) strictly decreasing.
        snr: as of :func:`correct`.
        num_steps: network calls a level.
        generator: for the noise.
    """
    first = times[0].to(x_t.device).expand(len(x_t))
    x_t = correct(denoiser, x_t, first, cond, snr=snr, num_steps=num_steps, generator=generator)
    still = corrected(_stay, snr=snr, num_steps=num_steps)
    return sample(denoiser, x_t, cond, times=times, step=still, generator=generator)


def _stay(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond, generator: Generators | None
) -> Tensor:
    del generator
    if s is None:
        return denoiser(x_t, t, cond).to(x_t.dtype)
    return per_sample(denoiser.schedule.alpha(s) / denoiser.schedule.alpha(t), x_t) * x_t
