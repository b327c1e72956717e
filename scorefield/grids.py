"""Sampling grids: at which times a sampler calls the denoiser, on any schedule."""

import math
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from scorefield.choices import Spacing as Spacing
from scorefield.schedule import Schedule

DEFAULT: Spacing = "trailing"
"""The spacing where none is asked for, on every schedule; measured in docs/solvers.md."""

LEVELS = (0.01, 30.0)
"""Noise levels sigma / alpha between which karras and log-snr are even. Little happens beyond, for data of unit
scale: a grid that spends its calls on EDM's 0.002 to 80 is worse; measured in docs/solvers.md."""


def grid(
    schedule: Schedule,
    num_steps: int,
    low: float = 0.0,
    high: float = 1.0,
    *,
    shift: float = 1.0,
    spacing: Spacing = DEFAULT,
) -> Float[Tensor, " n"]:
    """``num_steps`` decreasing times at which to call the denoiser, float64; the clean image follows the last.

    Args:
        schedule: its integer timesteps, if it has them, are kept; where two would be the same, neighbours serve.
        num_steps: at least 1.
        low: fraction of the schedule's customary spacing where the times end. At low = 0 a call changes next to
            nothing: all spacings but ``uniform`` leave it out, and so does ``uniform`` where sigma is 0.
        high: fraction where they start: 1 is pure noise.
        shift: factor of the noise levels sigma / alpha: 1 is none, SD3 uses 3 (arXiv 2403.03206, Eq. 23).
        spacing: :data:`Spacing`.

    Raises:
        ValueError: fewer distinct times than steps (integer timesteps), or numbers out of range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}.")
    if not shift > 0:
        raise ValueError(f"shift must be above 0; got {shift}. 1 means none.")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low and high must satisfy 0 <= low <= high <= 1; got low={low}, high={high}.")
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing must be one of {', '.join(get_args(Spacing))}; got {spacing!r}.")
    if spacing in ("uniform", "trailing"):
        times = _even_times(schedule, num_steps, low, high, trailing=spacing == "trailing")
    else:
        times = _even_levels(schedule, num_steps, low, high, rho=7.0 if spacing == "karras" else None)
    if shift != 1:
        times = schedule.snap(schedule.time(shift * schedule.ratio(times)).clamp(schedule.t_min, schedule.t_max))
    return _distinct(schedule, times)


def _even_times(schedule: Schedule, num_steps: int, low: float, high: float, *, trailing: bool) -> Tensor:
    if not (trailing and low == 0) and schedule.sigma(schedule.at(torch.tensor(low))) != 0:
        return schedule.at(_even(high, low, num_steps, with_end=True))
    fractions = _even(high, low, num_steps, with_end=False)
    if trailing and schedule.cell:
        # Timesteps 0 to T - 1 are noised 1 to T times: the clean image lies at timestep -1.
        num_times = 1 + 1 / schedule.cell
        fractions = ((num_times * fractions).round() - 1).clamp(min=0) * schedule.cell
    return schedule.at(fractions)


def _even_levels(schedule: Schedule, num_steps: int, low: float, high: float, *, rho: float | None) -> Tensor:
    start, end = schedule.at(torch.tensor([high, low], dtype=torch.float64))
    first, last = schedule.ratio(torch.stack([start, end])).clamp(*LEVELS).tolist()
    if rho is None:
        levels = _even(math.log(first), math.log(last), num_steps, with_end=low > 0).exp()
    else:
        levels = _even(first ** (1 / rho), last ** (1 / rho), num_steps, with_end=low > 0) ** rho
    times = schedule.snap(schedule.time(levels).clamp(end, start))
    # More noise than LEVELS, up to the infinite level of pure noise, takes the place of the first.
    times[0] = start
    return times


def _even(first: float, last: float, num_steps: int, *, with_end: bool) -> Tensor:
    points = torch.linspace(first, last, num_steps if with_end else num_steps + 1, dtype=torch.float64)
    return points[:num_steps]


def _distinct(schedule: Schedule, times: Tensor) -> Tensor:
    # Integers fall strictly where integer + position falls: move later ones down, then the last ones up.
    spread = times
    if schedule.cell:
        position = torch.arange(len(times), dtype=torch.float64)
        spread = (times + position).cummin(0).values.clamp(min=len(times) - 1 + schedule.t_min) - position
    if spread[0] > times[0] or not bool((spread.diff() < 0).all()):
        raise ValueError(f"{schedule} has fewer than {len(times)} distinct times to step through; ask for fewer.")
    return spread
