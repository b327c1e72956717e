"""Inversion: the noise that an image came from, so that sampling again, under another prompt, edits the image.

``invert`` runs DDIM backwards. Under guidance sampling does not return to the image; three ways to make it:

    pinned              Direct Inversion: the source's rows are put back onto the path at every step
    negative_prompt     negative-prompt inversion: the source's own prompt is what guidance moves away from
    edit.null_text      null-text inversion: what guidance moves away from is optimised, for every time

:mod:`edit.ddpm_inversion` inverts the stochastic sampler. PSNR alone hides that the noise of plain inversion is
far from white: read :func:`whiteness` beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from scorefield.denoiser import Cond, Denoiser
from scorefield.guidance import Norm, guided
from scorefield.randomness import Generators
from scorefield.sampling import Step, check_decreasing, mix
from scorefield.schedule import Images, PerSample, Schedule, per_sample


@dataclass(frozen=True, eq=False)
class Path:
    """Points that sampling passes: ``points[i]`` (b, *shape) at ``times[i]``, the last one is the clean image."""

    times: Float[Tensor, " n"]
    points: Sequence[Tensor]

    def __post_init__(self) -> None:
        if len(self.points) != len(self.times) + 1:
            raise ValueError(
                f"a path has a point for each of {len(self.times)} times and the image; got {len(self.points)}."
            )

    def after(self, t: Tensor) -> Tensor:
        """Return the point that follows the one at the time of (b,) equal times.

        Raises ``ValueError`` for a time that is none of the path's.
        """
        return self.points[number_of(self.times, t) + 1]


def number_of(times: Float[Tensor, " n"], t: PerSample) -> int:
    """Return which of ``times`` the batch is at.

    Raises ``ValueError`` where samples are at different times, or at another one.
    """
    found = (times == t[0].to(times)).nonzero()
    if len(found) != 1 or not bool((t == t[0]).all()):
        raise ValueError(f"sampling must be at one of the inversion's times; got t = {t.tolist()}. Use its grid.")
    return int(found)


@dataclass(frozen=True, eq=False)
class Inversion:
    """The noise that an image came from.

    Attributes:
        path: from the noise to the image.
        residual: (b,) the largest relative movement of the last iteration kept on any step; near 0 means that
            sampling returns to the image, large that refinement diverged (few steps, strong guidance).
    """

    path: Path
    residual: PerSample

    @property
    def x_t(self) -> Images:
        """The noise, (b, *shape) at the first of the times."""
        return self.path.points[0]


def invert(
    denoiser: Denoiser, x0: Images, cond: Cond, *, times: Float[Tensor, " n"], iterations: int = 0
) -> Inversion:
    """DDIM inversion: the x_t from which ``sample(..., times=times, step=ddim())`` returns to ``x0``.

    Each step solves x_t = a x_s + b eps(x_t, t), which DDIM inversion approximates by eps(x_s, t) (the target
    label, as ``DDIMInverseScheduler`` does). Refinement iterates the equation, damped where it diverges, which
    fixed points do at few steps or strong guidance; the best iterate of each sample is kept.

    Args:
        denoiser: guide it only if sampling will be guided alike.
        x0: clean images.
        cond: conditioning, batch b.
        times: the sampling grid, (n,) strictly decreasing, alpha(times[0]) > 0.
        iterations: fixed-point refinements a step; each costs one more network call a step.
    """
    if iterations < 0:
        raise ValueError(f"iterations must be at least 0; got {iterations}.")
    check_decreasing(times)
    schedule, x_s, trajectory = denoiser.schedule, x0, []
    alpha_s, sigma_s = torch.ones(len(x0), dtype=torch.float64), torch.zeros(len(x0), dtype=torch.float64)
    worst = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    for time in times.flip(0):
        t = time.to(x0.device).expand(len(x0))
        alpha_t, sigma_t = schedule.alpha(t), schedule.sigma(t)
        keep, push = alpha_t / alpha_s.to(t.device), sigma_t - alpha_t * (sigma_s / alpha_s).to(t.device)

        def implicit(x: Tensor, t=t, keep=keep, push=push, x_s=x_s) -> Tensor:  # type: ignore[no-untyped-def]
            noise = schedule.from_x0(denoiser(x, t, cond).to(x.dtype), x, t, "eps")
            return mix(x_s, keep, noise, push)

        x_s, residual = _fixed_point(implicit, x_s, iterations)
        worst = torch.maximum(worst, residual)
        trajectory.append(x_s)
        alpha_s, sigma_s = alpha_t, sigma_t
    return Inversion(Path(times, (*trajectory[::-1], x0)), worst)


def _fixed_point(function: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    # An iteration that moves further than the best so far is diverging: that sample halves its step from now
    # on and keeps its best iterate.
    x = function(start)
    best, residual = x, _relative(x, start)
    damping = torch.ones_like(residual)
    for _ in range(iterations):
        following = function(x)
        movement = _relative(following, x)
        better = movement < residual
        best = torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), following, best)
        residual = torch.where(better, movement, residual)
        damping = torch.where(better, damping, damping / 2)
        x = x + per_sample(damping, x) * (following - x)
    return best, residual


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=torch.finfo(b.dtype).tiny)


def pinned(step: Step, path: Path) -> Step:
    """Direct Inversion: a step that puts the first rows of the batch, the source's, back onto ``path``.

    Ju et al. 2023 (arXiv 2310.01506, Algorithm 1) add the difference z*_s - z_s to the source's branch alone,
    whatever the guidance. The source is then drawn exactly; the other rows see it through the attention only.

    Args:
        step: of the sampler, such as ``ddim()``.
        path: of b images; the batch has b rows of the source first.
    """

    def pin(
        denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond, generator: Generators | None
    ) -> Tensor:
        known = path.after(t).to(x_t)
        x_s = step(denoiser, x_t, t, s, cond, generator)
        return torch.cat([known, x_s[len(known) :]])

    return pin


def negative_prompt(denoiser: Denoiser, scale: float, source: Cond, norm: Norm = "none") -> Denoiser:
    """Negative-prompt inversion: guidance away from the source's prompt (Miyake et al. 2023, arXiv 2305.16807).

    Under the source's own prompt both branches agree, so that any scale reconstructs what scale 1 does: null-text
    inversion without its optimisation.

    Args:
        denoiser: without guidance.
        scale: of guidance.
        source: condition of the source's prompt, batch 1 or b.
        norm: of the guidance, as the model's family has it; under the source's own prompt it changes nothing.
    """
    return guided(denoiser, scale, source, norm=norm)


@dataclass(frozen=True)
class Whiteness:
    """How near noise is to standard normal numbers.

    Attributes:
        std: of all numbers; 1 for white noise. Plain inversion of a trained network leaves about half.
        mean: of all numbers; 0 for white noise.
        correlation: between neighbours along height and width; 0 for white noise.
    """

    std: float
    mean: float
    correlation: float


def whiteness(x_t: Float[Tensor, "b c h w"], schedule: Schedule, t: float | Tensor) -> Whiteness:
    """Return how white the noise at time t is, in units of the noise that a sampler starts from there.

    Args:
        x_t: (b, c, h, w) result of an inversion at its first time.
        schedule: of the teacher.
        t: the first of the times.
    """
    time = torch.as_tensor(t, dtype=torch.float64).expand(len(x_t))
    noise = (x_t / per_sample(schedule.initial_std(time), x_t)).double()
    centred = noise - noise.mean()
    pairs = ((centred[..., 1:], centred[..., :-1]), (centred[..., 1:, :], centred[..., :-1, :]))
    products = [(a * b).mean() for a, b in pairs if a.numel()]
    covariance = torch.stack(products or [noise.new_zeros(())]).mean()
    return Whiteness(float(noise.std()), float(noise.mean()), float(covariance / centred.square().mean()))
