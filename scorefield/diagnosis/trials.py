"""The same noisy images put to several readings of a network, so that their errors are paired image by image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from scorefield.denoiser import Cond
from scorefield.diagnosis.readings import Output, Reading
from scorefield.randomness import normal_like
from scorefield.schedule import Images, Schedule

Errors = Float[Tensor, "levels n"]
"""Mean squared error of x0 for each noise level and image."""

SIGNIFICANT = 4.0
"""Standard errors of paired differences beyond which a difference is believed."""

FLOOR = 1e-4
"""Share of the data's variance below which all errors are alike: nothing is left to denoise."""

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError, ArithmeticError)
"""What networks raise that cannot be asked as a mistake would have it."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Noisy images at several levels.

    Attributes:
        x0: (n, *shape) clean images.
        cond: of batch n.
        ratios: (levels,) noise levels sigma / alpha, float64.
        noise: (levels, n, *shape).
        batch_size: of the network's calls.
    """

    x0: Images
    cond: Cond
    ratios: Tensor
    noise: Tensor
    batch_size: int = 64

    def part(self, images: int, levels: list[int]) -> "Trial":
        """Return the first images at some of the levels, with the same noise."""
        cond = {name: value[:images] for name, value in self.cond.items()}
        noise = self.noise[levels, :images]
        return Trial(self.x0[:images], cond, self.ratios[levels], noise, self.batch_size)

    def under(self, cond: Cond) -> "Trial":
        """Return the same under other conditions of batch n."""
        return Trial(self.x0, cond, self.ratios, self.noise, self.batch_size)

    @property
    def floor(self) -> float:
        """Error below which all are alike."""
        return FLOOR * float(self.x0.double().var()) + 1e-12


def make_trial(x0: Images, cond: Cond, ratios: Tensor, generator: Generator, batch_size: int) -> Trial:
    """Return a trial with fresh noise."""
    noise = normal_like(x0.new_empty(len(ratios), *x0.shape), generator)
    return Trial(x0, cond, ratios.double().to(x0.device), noise, batch_size)


def levels_of(schedule: Schedule, levels: tuple[float, ...], std: float) -> Tensor:
    """Noise levels near ``levels`` times ``std`` that belong to times the teacher was trained on, float64."""
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    wanted = (torch.tensor(levels, dtype=torch.float64) * std).clamp(float(ends[0]), float(ends[1]))
    t = schedule.snap(schedule.time(wanted).clamp(schedule.t_min, schedule.t_max))
    return schedule.ratio(t).unique()


def answers(reading: Reading, trial: Trial) -> dict[Output, Tensor]:
    """x0 under every meaning of the output, (levels, n, *shape) each."""
    levels, n = trial.noise.shape[:2]
    index = torch.arange(levels * n, device=trial.x0.device)
    found: dict[Output, list[Tensor]] = {}
    for part in index.split(trial.batch_size):
        level, image = part // n, part % n
        ratio = trial.ratios[level]
        scale = ratio.to(trial.x0).reshape(-1, *[1] * (trial.x0.ndim - 1))
        noisy = trial.x0[image] + scale * trial.noise[level, image]
        cond = {name: value[image.to(value.device)] for name, value in trial.cond.items()}
        for output, x0 in reading.x0(noisy, ratio, cond).items():
            found.setdefault(output, []).append(x0)
    return {output: torch.cat(parts).view(levels, n, *trial.x0.shape[1:]) for output, parts in found.items()}


def errors(reading: Reading, trial: Trial) -> dict[Output, Errors]:
    """Errors under every meaning of the output; infinite where it is not finite or the level is unknown."""
    known = reading.knows(trial.ratios)[:, None]
    found = {}
    for output, x0 in answers(reading, trial).items():
        error = (x0 - trial.x0).double().flatten(2).square().mean(2)
        found[output] = torch.where(known & error.isfinite(), error, torch.inf)
    return found


def tried(reading: Reading, trial: Trial) -> dict[Output, Errors]:
    """:func:`errors`, or nothing where the network refuses to be asked so."""
    if not bool(reading.knows(trial.ratios).any()):
        return {}
    try:
        return errors(reading, trial)
    except torch.OutOfMemoryError:
        raise
    except FAILURES:
        return {}


@dataclass(frozen=True)
class Difference:
    """A mean log ratio of errors, and its standard error over images: -0.7 halves the error."""

    mean: float
    error: float

    @property
    def better(self) -> bool:
        """Significantly below 0."""
        return self.mean < 0 and self.mean < -SIGNIFICANT * self.error

    @property
    def worse(self) -> bool:
        """Significantly above 0."""
        return self.mean > 0 and self.mean > SIGNIFICANT * self.error


def difference(a: Errors, b: Errors, floor: float) -> Difference:
    """Log of the ratio of mean errors ``a`` to ``b``, averaged over the levels at which both are finite.

    The mean over images comes before the log: a denoiser is the best in mean squared error, while one that guesses
    a single image does better by the mean of logs. The standard error is that of each image's influence on it.
    """
    usable = (a.isfinite() & b.isfinite()).all(1)
    if not bool(usable.any()):
        return Difference(math.inf, 0.0)
    a, b = a[usable] + floor, b[usable] + floor
    mean_a, mean_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    influence = (a / mean_a - b / mean_b).mean(0)
    error = float(influence.std()) / math.sqrt(len(influence)) if len(influence) > 1 else math.inf
    return Difference(float((mean_a / mean_b).log().mean()), error)


def best_of(found: Mapping[Output, Errors], base: Errors, floor: float) -> list[tuple[Output, Difference]]:
    """Return all meanings of an output, the best against ``base`` first."""
    compared = [(output, difference(error, base, floor)) for output, error in found.items()]
    return sorted(compared, key=lambda pair: pair[1].mean)
