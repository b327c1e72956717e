"""Solvers of the probability-flow ODE beyond DDIM, and which one to take for how many network calls.

DPM-Solver++ and UniPC integrate x0 against lambda = log(alpha / sigma) exactly where x0 is a line or a parabola in
lambda. In x0 prediction that is DDIM's step towards another x0: they are :class:`scorefield.sampling.Multistep`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from scorefield.choices import Solver as Solver
from scorefield.choices import Spacing
from scorefield.grids import LEVELS, grid
from scorefield.sampling import Multistep, Point, Step, ddim, ddpm, heun
from scorefield.schedule import RectifiedFlow, Schedule, VariancePreserving, per_sample

HEUN_CALLS = 15
"""Calls below which Heun is clearly worse than DDIM."""
UNIFORM_CALLS = 50
"""Calls from which other solvers are as good as DDIM on the uniform grid of a variance-preserving schedule."""
SMALL_ALPHA = 1 / LEVELS[1]
"""An alpha(t_max) below it starts beyond all useful noise levels: plain DDPM has 0.006, Stable Diffusion 0.07."""


@dataclass(frozen=True)
class Plan:
    """A solver and its times: ``sample(denoiser, x_t, cond, times=plan.times, step=plan.step)``.

    Attributes:
        solver: its name.
        spacing: of its grid.
        times: (n,) where the steps start.
        step: what :func:`scorefield.sampling.sample` takes.
        num_calls: network calls an image.
    """

    solver: Solver
    spacing: Spacing
    times: Float[Tensor, " n"]
    step: Step | Multistep
    num_calls: int


def plan(
    schedule: Schedule,
    num_calls: int,
    solver: Solver | Literal["auto"] = "auto",
    spacing: Spacing | Literal["auto"] = "auto",
    *,
    shift: float = 1.0,
) -> Plan:
    """Return how to sample with at most ``num_calls`` network calls an image, in one place for all who sample.

    Args:
        schedule: of the teacher.
        num_calls: Heun pays two a step, except for its last step and one from pure noise: 9 steps cost 17 calls.
        solver: by name; "auto" is :func:`auto_solver`.
        spacing: of the grid; "auto" is :func:`auto_spacing`.
        shift: of the noise levels; see :func:`scorefield.grids.grid`.

    Raises:
        ValueError: an unknown name, or more calls than the schedule has timesteps.
    """
    chosen = auto_solver(schedule, num_calls) if solver == "auto" else solver
    if chosen not in get_args(Solver):
        raise ValueError(f"solver must be auto or one of {', '.join(get_args(Solver))}; got {solver!r}.")
    spaced = auto_spacing(schedule, chosen, num_calls, shift) if spacing == "auto" else spacing
    free = int(bool(schedule.alpha(torch.tensor(schedule.t_max)) == 0))  # Heun is Euler from alpha = 0
    num_steps = (num_calls + 1 + free) // 2 if chosen == "heun" else num_calls
    times = grid(schedule, num_steps, spacing=spaced, shift=shift)
    steps: dict[str, Callable[[], Step | Multistep]] = {
        "ddim": ddim, "ddpm": ddpm, "heun": heun, "dpm++": dpm_solver, "unipc": unipc
    }  # fmt: skip
    paid = max(1, 2 * num_steps - 1 - free) if chosen == "heun" else num_steps
    return Plan(chosen, spaced, times, steps[chosen](), paid)


def auto_solver(schedule: Schedule, num_calls: int) -> Solver:
    """UniPC, or DDIM in up to four calls from a start where 1 / alpha multiplies an eps network's errors."""
    fragile = 0 < _last_alpha(schedule) < SMALL_ALPHA
    return "ddim" if fragile and num_calls < 5 else "unipc"


def auto_spacing(schedule: Schedule, solver: Solver, num_calls: int, shift: float = 1.0) -> Spacing:
    """Return the grid that was best with a solver on such a schedule: docs/solvers.md has the figures.

    A schedule that begins beyond all useful noise levels is sampled from its own first time on: trained
    networks, unlike exact ones, do not survive the long first step of the other grids.

    A flow is sampled as it is customary unless a solver with memory has six calls or more; a ``shift`` belongs to
    the customary times.
    """
    multistep = solver in ("dpm++", "unipc")
    if isinstance(schedule, RectifiedFlow):
        return "log-snr" if multistep and num_calls >= 6 and shift == 1 else "trailing"
    if solver == "ddpm" or _last_alpha(schedule) < SMALL_ALPHA:
        return "trailing"
    return "log-snr" if multistep else "karras"


def caution(schedule: Schedule, chosen: Plan) -> str:
    """Say where DDIM is clearly better in as many calls, or nothing; docs/solvers.md has the figures."""
    if chosen.solver in ("ddim", "ddpm") or chosen.num_calls == 1:
        return ""
    few = HEUN_CALLS if chosen.solver == "heun" and _starts_beyond_levels(schedule) else 0
    if chosen.spacing == "uniform" and isinstance(schedule, VariancePreserving):
        few = UNIFORM_CALLS
    if chosen.num_calls >= few:
        return ""
    return (
        f"{chosen.solver} on the {chosen.spacing} grid draws worse than ddim below {few} network calls; this is "
        f"{chosen.num_calls}. Leave sampler and grid to auto, or allow more calls."
    )


def _starts_beyond_levels(schedule: Schedule) -> bool:
    # A flow's customary grid leaves the infinite level at its first step; else Heun's first step is lost there.
    noisiest = schedule.ratio(torch.tensor(schedule.t_max, dtype=torch.float64))
    return not isinstance(schedule, RectifiedFlow) and bool(noisiest > LEVELS[1])


def _last_alpha(schedule: Schedule) -> float:
    return float(schedule.alpha(torch.tensor(schedule.t_max, dtype=torch.float64)))


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
    # x0 half way to s on the line through the last two answers: (1 + 1/2r) x0 - 1/2r x0_before, r = h_before / h.
    now = points[-1]
    if len(points) == 1:
        return now.x0
    h, h_before = _length(schedule, now.t, s), _length(schedule, points[-2].t, now.t)
    return now.x0 + _times(_finite(h / (2 * h_before), h), now.x0 - points[-2].x0)


def _interpolated(schedule: Schedule, points: tuple[Point, ...]) -> Tensor:
    # UniC (Eq. 5): integrate the parabola through the last three answers, at r < 0, 0 and 1 along the step, under
    # the weight exp(lambda): match the step's mean and mean square. With two answers the paper takes their mean.
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
