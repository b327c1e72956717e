"""Higher-order solvers of the probability-flow ODE on any schedule, differentiable and without hidden state.

Both integrate x0 against lambda = log(alpha / sigma) exactly where x0 is a line in lambda. In x0 prediction that
is DDIM's step towards another x0, so they are :class:`score.sampling.Multistep`.
"""

import torch
from torch import Tensor

from score.sampling import Multistep, Point
from score.schedule import Schedule, per_sample


def dpm_solver() -> Multistep:
    """DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): second order, one call a step.

    First order where a line through two answers does not exist: on the first step, after pure noise
    (alpha = 0), and to the clean image.
    """
    return Multistep(_extrapolated)


def unipc() -> Multistep:
    """UniPC of order 2 with B_2 (Zhao et al. 2023, arXiv 2302.04867, Algorithms 5 and 6): one call a step.

    Its predictor is DPM-Solver++ 2M; the corrector then repeats each step with the answer at its end. A step from
    pure noise (alpha = 0) is not corrected, since it has no length in lambda.
    """
    return Multistep(_extrapolated, _interpolated, memory=2)


def _extrapolated(schedule: Schedule, points: tuple[Point, ...], s: Tensor) -> Tensor:
    # x0 half way to s on the line through the last two answers: (1 + 1 / 2r) x0 - 1 / 2r x0_before, r = h_before / h.
    now = points[-1]
    if len(points) == 1:
        return now.x0
    h, h_before = _length(schedule, now.t, s), _length(schedule, points[-2].t, now.t)
    return now.x0 + _times(_finite(h / (2 * h_before), h), now.x0 - points[-2].x0)


def _interpolated(schedule: Schedule, points: tuple[Point, ...]) -> Tensor:
    # UniC (Eq. 5): integrate the parabola through the last three answers, at r < 0, 0 and 1 along the step, under the
    # weight exp(lambda): it must have the step's mean and mean square. With two answers the paper takes their mean.
    start, end = points[-2:]
    h = _length(schedule, start.t, end.t)
    if len(points) == 2:
        return start.x0 + _times(_finite(torch.full_like(h, 0.5), h), end.x0 - start.x0)
    before, r = points[-3], -_length(schedule, points[-3].t, start.t) / h
    mean = -1 / torch.expm1(-h) - 1 / h
    mean_square = -1 / torch.expm1(-h) - 2 * mean / h
    share = (mean - mean_square) / (1 - r)
    earlier, later = _finite(share / r, h), _finite(mean - share, h)
    return start.x0 + _times(earlier, before.x0 - start.x0) + _times(later, end.x0 - start.x0)


def _length(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    # Of a step in lambda = log(alpha / sigma); infinite from alpha = 0 and to sigma = 0.
    return schedule.ratio(t).log() - schedule.ratio(s).log()


def _finite(weight: Tensor, h: Tensor) -> Tensor:
    return torch.where(h.isfinite(), weight, 0)


def _times(weight: Tensor, difference: Tensor) -> Tensor:
    return per_sample(weight, difference) * difference
