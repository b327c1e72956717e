"""Score distillation along inverted paths: DDIM inversion of the render takes the place of random noise.

    ISM   w (eps_s(x_t, y) - eps(x_s, null))    x_s and x_t on the unconditional path from the render, s before t
    SDI   w (x0 - x0_s(x_t, y))                 x_t on the path of the negated prompt from the render

eps_s and x0_s are those of the guided teacher. Random noise asks the teacher for another picture in each step,
and a scene becomes their average; along a path it is asked for the same one. A step costs 3 to 12 calls of the
network.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from scorefield.denoiser import Cond, Denoiser
from scorefield.gradient import (
    ScoreDistillation,
    ScoreGradient,
    TimeWeight,
    Weight,
    check_shapes,
    noise_weight,
    weighted_gap,
)
from scorefield.sampling import Point, mix, towards
from scorefield.schedule import Images, PerSample, Schedule
from scorefield.times import TimeSampler
from sds.losses import TIMES, noise_to_signal, unit, x0_reconstruction

HALVINGS = 54
"""Halvings of [0, 1] until it is as narrow as float64 can tell."""


def inverted(denoiser: Denoiser, x0: Images, t: PerSample, cond: Cond, *, stride: float = 0.1) -> Tensor:
    """Return x_t on the path of DDIM inversion from x0, each sample at a time of its own.

    All paths stop at the multiples of ``stride``, and end at their own t. The noise of a step from s to t is
    eps(x_s, t), the label of its end, as in ``DDIMInverseScheduler``; there is no label for a clean image.

    Args:
        denoiser: Guided as the path shall be.
        x0: (b, ...) clean images.
        t: (b,) times at which the paths end, with sigma(t) > 0.
        cond: Conditions of batch b.
        stride: Longest step, as a share of the schedule's customary spacing (``Schedule.at``), in (0, 1].

    Raises:
        ValueError: ``stride`` is outside (0, 1].
    """
    if not 0 < stride <= 1:
        raise ValueError(f"stride must lie in (0, 1]; got {stride}. SDI uses 0.1.")
    schedule, x, t = denoiser.schedule, x0, t.double()
    alpha, sigma = torch.ones_like(t), torch.zeros_like(t)
    reached = torch.full_like(t, -math.inf)
    for number in range(1, math.ceil(1 / stride) + 1):
        stop = schedule.at(torch.tensor(min(1.0, number * stride), dtype=torch.float64)).to(t)
        s = t if number * stride >= 1 else torch.minimum(stop, t)
        alpha_s, sigma_s = schedule.alpha(s), schedule.sigma(s)
        noise = schedule.from_x0(denoiser(x, s, cond), x, s, "eps")
        moved = mix(x, alpha_s / alpha, noise, sigma_s - alpha_s * (sigma / alpha))
        x = torch.where((s > reached).reshape(-1, *[1] * (x.ndim - 1)), moved, x)
        alpha, sigma, reached = alpha_s, sigma_s, s
        if bool((s >= t).all()):
            break
    return x


def earlier(schedule: Schedule, t: PerSample, interval: float) -> Tensor:
    """Return times that are less noisy by ``interval``, a share of the schedule's customary spacing; float64.

    Where t itself is below twice the interval, half of it is taken, so that there is noise at both times.
    """
    fraction = (_edge(schedule, t, torch.ge) + _edge(schedule, t, torch.gt)) / 2  # the middle of a timestep's cell
    return schedule.at(torch.maximum(fraction - interval, fraction / 2)).to(t.device)


def _edge(schedule: Schedule, t: Tensor, beyond: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    # The fraction from which on ``beyond(schedule.at(fraction), t)``. Schedules have no inverse of ``at``.
    t = t.double().cpu()
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = beyond(schedule.at(middle), t)
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return high


@dataclass(frozen=True, kw_only=True, eq=False)
class IntervalScoreMatching:
    """The gradient of :func:`ism`.

    Attributes:
        teacher: The frozen, guided denoiser, which is asked at t.
        null: The unconditional one, whose path through the render it is, and which is asked at s.
        interval: Share of the schedule between s and t.
        stride: Longest step of the path to s.
        times: How t is drawn.
        weight: Of the difference of the two expected images.
    """

    teacher: Denoiser
    null: Denoiser
    interval: float
    stride: float
    times: TimeSampler
    weight: Weight

    def __post_init__(self) -> None:
        if not 0 < self.interval < 1:
            raise ValueError(f"interval must lie in (0, 1); got {self.interval}. ISM uses 0.05.")

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return the gradient with respect to x0 at one draw of t per sample; no gradient reaches any network.

        Raises ``ValueError`` where a denoiser changes the shape of x0.
        """
        schedule = self.teacher.schedule
        t = self.times(len(x0), schedule, generator).to(x0.device)
        s = earlier(schedule, t, self.interval)
        x_s = inverted(self.null, x0, s, cond, stride=self.stride)
        before = self.null(x_s, s, cond)
        # The line from x_s on which the image is ``before`` has the noise eps(x_s, null) all along, at t as well.
        # So alpha / sigma (before - target) at t is eps_s(x_t) - eps(x_s, null).
        target = self.teacher(towards(schedule, Point(s, x_s, before), before, t), t, cond)
        check_shapes(x0, {"teacher": target, "null": before})
        return weighted_gap(self.weight(x0, target, t, schedule), before - target, t)


def ism(
    teacher: Denoiser, null: Denoiser, *, interval: float = 0.05, stride: float = 0.1, times: TimeSampler = TIMES,
    w: TimeWeight = noise_to_signal,
) -> IntervalScoreMatching:  # fmt: skip
    """Return interval score matching: w(t) (eps_s(x_t, y) - eps(x_s, null)) (Liang et al. 2023, arXiv 2311.11284).

    Args:
        teacher: The guided denoiser; LucidDreamer's scale is 7.5.
        null: The denoiser under the null condition, without guidance.
        interval: Share of the schedule between s and t; delta_T = 50 of 1,000 timesteps in the paper.
        stride: Longest step of the inversion; delta_S = 200 of 1,000 in the paper.
        times: How t is drawn; s is earlier.
        w: Weight of the published difference of noises.

    Raises:
        ValueError: ``interval`` is outside (0, 1).
    """
    return IntervalScoreMatching(
        teacher=teacher, null=null, interval=interval, stride=stride, times=times, weight=noise_weight(w)
    )


def sdi(
    teacher: Denoiser, inverter: Denoiser, *, stride: float = 0.1, times: TimeSampler = TIMES,
    w: TimeWeight = unit,
) -> ScoreDistillation:  # fmt: skip
    """Return score distillation via inversion: w(t) (x0 - x0_s(x_t)) (Lukoianov et al. 2024, arXiv 2405.15891).

    It is :func:`sds.losses.x0_reconstruction`, and so SDS, with the noise that inversion reads off the render.

    Args:
        teacher: The guided denoiser; the paper's scale is 7.5.
        inverter: The denoiser whose path is followed: ``guided(denoiser, -7.5, negative)`` in the paper, away from
            the prompt, so that the teacher leads back to it.
        stride: Longest step of the inversion.
        times: How t is drawn. The paper lets one t fall from 0.98 to 0.25 along the run.
        w: Weight of the difference of images, not of noises.
    """

    def noise(x0: Tensor, cond: Cond, t: Tensor, generator: Generator) -> Tensor:
        del generator
        x_t = inverted(inverter, x0, t, cond, stride=stride)
        return inverter.schedule.from_x0(x0, x_t, t, "eps")

    return replace(x0_reconstruction(teacher, times=times, w=w), noise=noise)
