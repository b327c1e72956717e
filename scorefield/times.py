"""How training times are drawn. Each function returns a sampler ``(n, schedule, generator) -> t``."""

from collections.abc import Callable
from functools import lru_cache
from math import inf

import torch
from torch import Generator, Tensor

from scorefield.schedule import Schedule

TimeSampler = Callable[[int, Schedule, Generator], Tensor]
"""(n, schedule, generator) -> t: (n,) float32 times on the generator's device."""


def uniform(low: float = 0.02, high: float = 0.98) -> TimeSampler:
    """Uniform in the schedule's customary spacing, ``schedule.at``; 0.02 to 0.98 is DMD's and SDS's range.

    For variance-preserving schedules that is a uniform integer timestep, for flows a uniform t, for EDM a
    uniform index into the rho = 7 grid. Raises ``ValueError`` unless 0 <= low <= high <= 1.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"uniform times need fractions 0 <= low <= high <= 1; got low={low}, high={high}.")

    def draw(n: int, schedule: Schedule, generator: Generator) -> Tensor:
        start, width, cell = low, high - low, schedule.cell
        if cell:  # rounding would give the first and last integer half the share of the others
            start = (round(low / cell) - 0.5) * cell
            width = (round(high / cell) + 0.5) * cell - start
        return schedule.at((start + width * _rand(n, generator)).clamp(0, 1)).float()

    return draw


def between_ratios(low: float, high: float) -> TimeSampler:
    """Uniform in the schedule's customary spacing, as :func:`uniform`, where sigma / alpha lies in [low, high].

    A range of noise levels means the same for every schedule, a range of timesteps does not: 0.15 to 20 is t = 42
    to 768 of DDPM's linear betas, 24 to the end, where sigma / alpha is 14.6, of Stable Diffusion's. Integer
    timesteps stay integers, each drawn as often as the others.

    Raises:
        ValueError: not 0 <= low < high; or, when times are drawn, a range that holds no time of the schedule.
    """
    _check_ratios(low, high)

    def draw(n: int, schedule: Schedule, generator: Generator) -> Tensor:
        first, last = _fractions(schedule, low, high)
        return schedule.at((first + (last - first) * _rand(n, generator)).clamp(0, 1)).float()

    return draw


def log_uniform(low: float, high: float) -> TimeSampler:
    """log(sigma / alpha) uniform between log(low) and log(high): as many times in each octave of noise.

    The same distribution on every schedule, but for rounding to integer timesteps. Levels that the schedule does
    not reach are left out. Errors as of :func:`between_ratios`; low must be above 0 and high finite.
    """
    _check_ratios(low, high)
    if low == 0 or high == inf:
        raise ValueError(f"log-uniform times need 0 < low < high < inf; got low={low}, high={high}.")

    def draw(n: int, schedule: Schedule, generator: Generator) -> Tensor:
        ends = schedule.at(torch.tensor(_fractions(schedule, low, high), dtype=torch.float64).clamp(0, 1))
        start, stop = schedule.ratio(ends).clamp(low, high).log().tolist()
        t = _time(schedule, (start + (stop - start) * _rand(n, generator)).exp())
        return t.clamp(*ends.float().tolist())  # the nearest integer of a level near an end may lie outside

    return draw


def constant(t: float) -> TimeSampler:
    """Return the same time always, in the schedule's own units."""

    def draw(n: int, schedule: Schedule, generator: Generator) -> Tensor:
        del schedule
        return torch.full((n,), t, device=generator.device)

    return draw


def log_normal(mean: float = -1.2, std: float = 1.2) -> TimeSampler:
    """log(sigma / alpha) ~ N(mean, std^2), clamped to the schedule (EDM's training, arXiv 2206.00364, Table 1)."""

    def draw(n: int, schedule: Schedule, generator: Generator) -> Tensor:
        return _time(schedule, (mean + std * _randn(n, generator)).exp())

    return draw


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """Logit of the flow time ~ N(mean, std^2) (SD3, arXiv 2403.03206, Eq. 19).

    A flow's logit t is log(sigma / alpha), so on any schedule this is :func:`log_normal` with SD3's defaults.
    """
    return log_normal(mean, std)


def shifted(times: TimeSampler, shift: float) -> TimeSampler:
    """Multiply the noise level sigma / alpha of another sampler's times by ``shift``.

    On a flow that is SD3's t' = shift t / (1 + (shift - 1) t) (arXiv 2403.03206, Eq. 23).
    """
    if not shift > 0:
        raise ValueError(f"shift must be above 0; got {shift}. 1 means none, SD3 uses 3.")

    def draw(n: int, schedule: Schedule, generator: Generator) -> Tensor:
        return _time(schedule, shift * schedule.ratio(times(n, schedule, generator).double()))

    return draw


def annealed(progress: float, low: float = 0.02, high: tuple[float, float] = (0.98, 0.5)) -> TimeSampler:
    """Uniform times whose upper end falls linearly from high[0] to high[1] as progress goes 0 to 1.

    ProlificDreamer's two stages and DreamFusion follow-ups anneal so (arXiv 2305.16213, section 3.4).
    """
    _check_progress(progress)
    return uniform(low, high[0] + progress * (high[1] - high[0]))


def sqrt_annealed(progress: float, low: float = 0.02, high: float = 0.98) -> TimeSampler:
    """One time for all samples, which falls from high to low with the root of progress: fast at first.

    t = high - (high - low) sqrt(progress): HiFA's annealing (Zhu et al. 2023, arXiv 2305.18766).
    """
    _check_progress(progress)
    fraction = high - (high - low) * progress**0.5
    return uniform(fraction, fraction)


def ramp(step: float, start: float, first: float, last: float, end: float) -> float:
    """``first`` until step ``start``, then linear, ``last`` from step ``end``: threestudio's (start, v0, v1, end).

    For either end of :func:`uniform`, and for the weights of regularisers:
    ``uniform(0.02, ramp(step, 5_000, 0.98, 0.5, 10_000))``. Raises ``ValueError`` unless start <= end.
    """
    if not start <= end:
        raise ValueError(
            f"a ramp needs start <= end; got {start} and {end}. The order is start, first, last, end."
        )
    if step >= end:
        return last
    return first if step <= start else first + (last - first) * (step - start) / (end - start)


def _check_ratios(low: float, high: float) -> None:
    if not 0 <= low < high:
        raise ValueError(f"noise levels sigma / alpha need 0 <= low < high; got low={low}, high={high}.")


@lru_cache(maxsize=64)
def _fractions(schedule: Schedule, low: float, high: float) -> tuple[float, float]:
    # The first and last fraction of the customary spacing with a noise level in [low, high]. For integer timesteps
    # these are the edges of whole cells, so that each has the same share, those at the ends of time included.
    def ratio(fraction: float) -> float:
        return float(schedule.ratio(schedule.at(torch.tensor(fraction, dtype=torch.float64).clamp(0, 1))))

    start, stop = -schedule.cell / 2, 1 + schedule.cell / 2
    first = _bisect(lambda fraction: ratio(fraction) >= low, start, stop)[1]
    last = _bisect(lambda fraction: ratio(fraction) > high, start, stop)[0]
    if not (low <= ratio(first) <= high and first < last):
        raise ValueError(
            f"{schedule} has no time with sigma / alpha in [{low:g}, {high:g}]; it reaches {ratio(0):g} to "
            f"{ratio(1):g}. Choose a range that overlaps it, wider than one timestep."
        )
    return first, last


def _bisect(beyond: Callable[[float], bool], start: float, stop: float) -> tuple[float, float]:
    # Neighbours between which a monotone condition becomes true; start or stop twice if it always or never is.
    if beyond(start):
        return start, start
    if not beyond(stop):
        return stop, stop
    for _ in range(60):
        middle = (start + stop) / 2
        start, stop = (start, middle) if beyond(middle) else (middle, stop)
    return start, stop


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must lie in [0, 1]; got {progress}. Pass step / num_steps.")


def _rand(n: int, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)


def _randn(n: int, generator: Generator) -> Tensor:
    return torch.randn(n, generator=generator, device=generator.device, dtype=torch.float64)


def _time(schedule: Schedule, ratio: Tensor) -> Tensor:
    return schedule.snap(schedule.time(ratio).clamp(schedule.t_min, schedule.t_max)).float()
