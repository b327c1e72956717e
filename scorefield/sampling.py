"""Sampling, and SDEdit, with any Denoiser; every loop is differentiable.

A step takes ``x_t`` from time t to a less noisy time s, where s = None means the clean image. The loops are
generic over the step; none of them disables gradients, so wrap them in ``torch.no_grad()`` for plain sampling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint as recompute

from scorefield.denoiser import Cond, Denoiser
from scorefield.grids import grid as grid  # where a sampler is, its grid is looked for
from scorefield.randomness import Generators, normal_like
from scorefield.schedule import Images, PerSample, Schedule, per_sample

Step = Callable[[Denoiser, Tensor, Tensor, Tensor | None, Cond, Generators | None], Tensor]
"""(denoiser, x_t, t, s, cond, generator) -> x_s; t and s are (b,), s = None is the clean image."""


@dataclass(frozen=True)
class Point:
    """A point of a sampling trajectory where the denoiser has been called: ``x0`` is its answer."""

    t: PerSample
    x_t: Images
    x0: Images


Move = Callable[[Schedule, Point, Tensor, Cond, Generators | None], Tensor]
"""(schedule, point, s, cond, generator) -> x_s; see :func:`asking_once`."""


@dataclass(frozen=True)
class Multistep:
    """A solver that remembers earlier answers of the denoiser: one call a step; see ``scorefield.solvers``.

    Each step is DDIM's with another x0, a combination of answers. Points come oldest first.

    Attributes:
        predict: (schedule, points, s) -> the x0 to step towards from ``points[-1]`` to time s.
        correct: (schedule, points) -> the x0 to have stepped towards from ``points[-2]`` to ``points[-1]``, now
            that the answer there is known; None: that step stays as it is.
        memory: earlier points that are kept for the next step.
    """

    predict: Callable[[Schedule, tuple[Point, ...], Tensor], Tensor]
    correct: Callable[[Schedule, tuple[Point, ...]], Tensor] | None = None
    memory: int = 1

    def advance(
        self, denoiser: Denoiser, points: tuple[Point, ...], x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond
    ) -> tuple[Tensor, tuple[Point, ...]]:
        """x_s and the points to remember; the state is passed on, never held. s = None is the clean image."""
        points = (*points, Point(t, x_t, denoiser(x_t, t, cond).to(x_t.dtype)))
        if s is None:
            return points[-1].x0, points
        if self.correct is not None and len(points) > 1:
            corrected = towards(denoiser.schedule, points[-2], self.correct(denoiser.schedule, points), t)
            points = (*points[:-1], replace(points[-1], x_t=corrected))
        x_s = towards(denoiser.schedule, points[-1], self.predict(denoiser.schedule, points, s), s)
        return x_s, points[-self.memory :]


def towards(schedule: Schedule, point: Point, x0: Images, s: PerSample) -> Images:
    """Return ``point`` moved to time s on the line on which the clean image is ``x0``: DDIM with eta = 0."""
    keep = schedule.sigma(s) / schedule.sigma(point.t)
    return mix(point.x_t, keep, x0, schedule.alpha(s) - schedule.alpha(point.t) * keep)


def initial_noise(schedule: Schedule, noise: Images, t: Tensor | float) -> Tensor:
    """Standard normal ``noise`` scaled to what a sampler starts from at time t (``init_noise_sigma``)."""
    t = torch.as_tensor(t, dtype=torch.float64, device=noise.device).expand(len(noise))
    return per_sample(schedule.initial_std(t), noise) * noise


def sample(
    denoiser: Denoiser,
    x_t: Images,
    cond: Cond,
    *,
    times: Float[Tensor, " n"],
    step: Step | Multistep | None = None,
    generator: Generators | None = None,
    checkpoint: bool = False,
) -> Images:
    """Denoise ``x_t`` from times[0] through times[-1] to the clean image.

    Args:
        denoiser: the (guided) teacher or student.
        x_t: noisy images at times[0]; pure noise from :func:`initial_noise`, or a diffused image.
        cond: conditioning, batch b.
        times: (n,) strictly decreasing; :func:`grid`. Heun costs at most 2n - 1 network calls, all others n.
        step: :func:`ddim` () by default; a :class:`Multistep` remembers.
        generator: for steps that add noise.
        checkpoint: recompute each step in the backward pass, so that memory does not grow with n.
    """
    step = ddim() if step is None else step
    check_decreasing(times)
    batch = [t.to(x_t.device).expand(len(x_t)) for t in times]
    points: tuple[Point, ...] = ()
    for t, s in zip(batch, [*batch[1:], None], strict=True):
        if isinstance(step, Multistep):
            x_t, points = _call(checkpoint, step.advance, denoiser, points, x_t, t, s, cond)
        else:
            x_t = _call(checkpoint, step, denoiser, x_t, t, s, cond, generator)
    return x_t


def _call(checkpoint: bool, function: Callable[..., Any], *args: Any) -> Any:
    if not checkpoint:
        return function(*args)
    rows = [one for arg in args for one in (arg if isinstance(arg, Sequence) else (arg,))]
    generators = [one for one in rows if isinstance(one, Generator)]
    before, called = [one.get_state() for one in generators], list[bool]()

    def again(*args: Any) -> Any:
        # torch puts its own generator back. These, too, must draw again what they drew for the first call.
        if not called:
            called.append(True)
            return function(*args)
        after = [one.get_state() for one in generators]
        _set_states(generators, before)
        try:
            return function(*args)
        finally:
            _set_states(generators, after)

    return recompute(again, *args, use_reentrant=False)


def _set_states(generators: Sequence[Generator], states: Sequence[Tensor]) -> None:
    for one, state in zip(generators, states, strict=True):
        one.set_state(state)


def asking_once(move: Move) -> Step:
    """Return a step that asks the denoiser once, and then moves, or, last of all, takes its answer."""

    def step(
        denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond, generator: Generators | None
    ) -> Tensor:
        point = Point(t, x_t, denoiser(x_t, t, cond).to(x_t.dtype))
        return point.x0 if s is None else move(denoiser.schedule, point, s, cond, generator)

    return step


def ddim(eta: float = 0.0) -> Step:
    """DDIM (Song et al. 2020, arXiv 2010.02502, Eq. 12): variance eta^2 times the DDPM posterior's (Eq. 16).

    eta = 0 is deterministic and, in x / alpha against sigma / alpha, the Euler method; eta = 1 is :func:`ddpm`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got {eta}. 0 is deterministic, 1 is DDPM.")

    def move(schedule: Schedule, point: Point, s: Tensor, cond: Cond, generator: Generators | None) -> Tensor:
        del cond
        x_s, std = ddim_moments(schedule, point.x_t, point.x0, point.t, s, eta)
        return x_s if eta == 0 else x_s + per_sample(std, x_s) * normal_like(x_s, generator)

    return asking_once(move)


def ddim_moments(
    schedule: Schedule, x_t: Images, x0: Images, t: PerSample, s: PerSample, eta: float
) -> tuple[Tensor, Tensor]:
    """Mean, shape of x_t, and standard deviation (b,) of DDIM's x_s, where the clean image is ``x0``.

    The variance is eta^2, not eta, times the posterior's; the two agree at eta = 0 and 1 only.
    """
    alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
    variance = eta**2 * posterior_variance(schedule, t, s)
    towards = (sigma_s**2 - variance).clamp(min=0).sqrt() / schedule.sigma(t)
    return mix(x_t, towards, x0, alpha_s - schedule.alpha(t) * towards), variance.sqrt()


def ddpm(large_variance: bool = False) -> Step:
    """Ancestral sampling from q(x_s | x_t, x0) (Ho et al. 2020, arXiv 2006.11239, Eq. 6 and 7).

    Args:
        large_variance: the variance of q(x_t | x_s) (``fixed_large``) instead of the posterior's.
    """

    def move(schedule: Schedule, point: Point, s: Tensor, cond: Cond, generator: Generators | None) -> Tensor:
        del cond
        t, forward = point.t, transition_variance(schedule, point.t, s)
        sigma_t, sigma_s = schedule.sigma(t), schedule.sigma(s)
        keep = schedule.alpha(t) / schedule.alpha(s) * sigma_s**2 / sigma_t**2
        mean = mix(point.x_t, keep, point.x0, schedule.alpha(s) * forward / sigma_t**2)
        variance = forward if large_variance else posterior_variance(schedule, t, s)
        return mean + per_sample(variance.sqrt(), mean) * normal_like(mean, generator)

    return asking_once(move)


def heun() -> Step:
    """Second-order Heun in x / alpha against sigma / alpha (arXiv 2206.00364, Algorithm 1); two calls a step.

    Plain Euler where a slope does not exist: on the last step to the clean image, and from alpha(t) = 0.
    """
    euler = ddim()

    def step(
        denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond, generator: Generators | None
    ) -> Tensor:
        schedule = denoiser.schedule
        if s is None or bool((schedule.alpha(t) == 0).any()):
            return euler(denoiser, x_t, t, s, cond, generator)
        x0 = denoiser(x_t, t, cond).to(x_t.dtype)
        alpha_t, alpha_s, sigma_t, sigma_s = (
            schedule.alpha(t),
            schedule.alpha(s),
            schedule.sigma(t),
            schedule.sigma(s),
        )
        x_s = mix(x_t, sigma_s / sigma_t, x0, alpha_s - alpha_t * sigma_s / sigma_t)
        if bool((sigma_s == 0).any()):
            return x_s
        slope_t = mix(x_t, 1 / sigma_t, x0, -alpha_t / sigma_t)
        slope_s = mix(x_s, 1 / sigma_s, denoiser(x_s, s, cond).to(x_t.dtype), -alpha_s / sigma_s)
        length = alpha_s * (schedule.ratio(s) - schedule.ratio(t)) / 2
        return mix(x_t, alpha_s / alpha_t, slope_t + slope_s, length)

    return step


def transition_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Variance of q(x_t | x_s) for s < t: sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, float64."""
    return schedule.sigma(t) ** 2 - (schedule.alpha(t) / schedule.alpha(s) * schedule.sigma(s)) ** 2


def posterior_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Variance of q(x_s | x_t, x0): beta tilde of DDPM on any schedule, float64 (arXiv 2006.11239, Eq. 7)."""
    return transition_variance(schedule, t, s) * (schedule.sigma(s) / schedule.sigma(t)) ** 2


def sdedit(
    denoiser: Denoiser,
    image: Images,
    cond: Cond,
    *,
    times: Float[Tensor, " n"],
    generator: Generators,
    step: Step | Multistep | None = None,
    mask: Bool[Tensor, "b *shape"] | None = None,
    checkpoint: bool = False,
) -> Images:
    """Noise an image to times[0] and denoise it again (Meng et al. 2021, arXiv 2108.01073).

    Exactly len(times) denoising steps are made; no times at all return the image. More noise moves the result
    further from the image and closer to the data.

    Args:
        denoiser: the teacher.
        image: clean images.
        cond: conditioning, batch b.
        times: (n,) strictly decreasing: ``grid(schedule, n, high=strength)``.
        generator: for the noise.
        step: :func:`ddim` () by default.
        mask: True where the image may change; outside, the result equals ``image`` exactly. Not for a
            :class:`Multistep`, which would remember what was there before.
        checkpoint: recompute each step in the backward pass.

    Raises:
        ValueError: a mask with a :class:`Multistep`.
    """
    if len(times) == 0:
        return image
    schedule = denoiser.schedule
    x_t = schedule.diffuse(image, normal_like(image, generator), times[0].to(image.device).expand(len(image)))
    if mask is not None:
        step = _masked(ddim() if step is None else step, image, mask)
    return sample(denoiser, x_t, cond, times=times, step=step, generator=generator, checkpoint=checkpoint)


def _masked(step: Step | Multistep, image: Tensor, mask: Tensor) -> Step:
    if isinstance(step, Multistep):
        raise ValueError("a mask needs a sampler without memory: ddim(), ddpm() or heun(); got a Multistep.")

    def masked(
        inner: Denoiser, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond, generator: Generators | None
    ) -> Tensor:
        x_s = step(inner, x_t, t, s, cond, generator)
        known = image if s is None else inner.schedule.diffuse(image, normal_like(image, generator), s)
        return torch.where(mask, x_s, known)

    return masked


def mix(a: Images, weight_a: PerSample, b: Images, weight_b: PerSample) -> Images:
    """Return weight_a a + weight_b b, with a weight of each for every sample."""
    return per_sample(weight_a, a) * a + per_sample(weight_b, b) * b


def check_decreasing(times: Tensor) -> None:
    """Raise ``ValueError`` unless ``times`` is a strictly decreasing vector."""
    if times.ndim != 1 or len(times) == 0 or not bool((times.diff() < 0).all()):
        raise ValueError(f"times must be a strictly decreasing vector, noisiest first; got {times}.")
