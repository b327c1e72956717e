"""The times that a student is asked at: evenly spaced, or by noise level. The student itself is of scorefield."""

from math import inf

import torch

from scorefield.models.student import Student as Student
from scorefield.models.student import load_student as load_student
from scorefield.models.student import save_student as save_student
from scorefield.schedule import Schedule


def even_times(schedule: Schedule, num_steps: int) -> tuple[float, ...]:
    """``num_steps`` times evenly spaced from t_max: 1 -> 999; 4 -> 999, 749, 500, 250 for DDPM's thousand."""
    fractions = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    return tuple(schedule.at(fractions).tolist())


def times_by_ratio(
    schedule: Schedule, num_steps: int, *, highest: float = 3.5, lowest: float = 0.14
) -> tuple[float, ...]:
    """``num_steps`` times evenly spaced in log(sigma / alpha), from ``highest`` down to, but without, ``lowest``.

    The same noise levels on every schedule and for every prediction kind: 3.5; 3.5 and 0.7; 3.5, 1.57, 0.7, 0.31.
    Asked at t_max, an eps network multiplies its error by 1 / alpha: 157 on DDPM's linear betas, 14.6 on Stable
    Diffusion's; at 3.5 by 3.6.

    The first input is pure noise, without the trace of an image that a teacher sees at that level. Its spread is
    right for data of unit variance on variance-preserving schedules (1), 4 % short for EDM (3.5 in place of 3.64),
    and 24 % large for flows (1 in place of 0.81, what pipelines start from). Regression on pairs mends all three.

    Args:
        schedule: of the student. Levels that it does not reach are cut off: the first time is then t_max.
        num_steps: of the student.
        highest: noise level of the first time.
        lowest: noise level that counts as clean.

    Raises:
        ValueError: not 0 < lowest < highest < inf, no step at all, or fewer distinct integer timesteps than steps.
    """
    if num_steps < 1 or not 0 < lowest < highest < inf:
        raise ValueError(
            f"times by noise level need num_steps >= 1 and 0 < lowest < highest < inf; got num_steps={num_steps}, "
            f"lowest={lowest}, highest={highest}."
        )
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    start, stop = torch.tensor([highest, lowest], dtype=torch.float64).clamp(*ends.tolist()).log().tolist()
    ratios = torch.linspace(start, stop, num_steps + 1, dtype=torch.float64)[:-1].exp()
    times = schedule.snap(schedule.time(ratios).clamp(schedule.t_min, schedule.t_max))
    if not bool((times.diff() < 0).all()):
        raise ValueError(
            f"{schedule} has fewer than {num_steps} distinct times with sigma / alpha in ({lowest:g}, "
            f"{highest:g}]; ask for fewer steps or a wider range."
        )
    return tuple(times.tolist())
