"""Without data: under which reading does a network believe the images that it draws itself?

Under the right one it denoises its own samples better than any linear filter; under a wrong one they are noise, or
all alike, or the network does not know them again.
"""

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from scorefield.denoiser import Cond
from scorefield.diagnosis.baselines import best_without_network
from scorefield.diagnosis.mistakes import Mistake
from scorefield.diagnosis.readings import OUTPUTS, Output, Reading
from scorefield.diagnosis.symptoms import unlike_pictures
from scorefield.diagnosis.trials import FAILURES, Difference, difference, levels_of, make_trial, tried
from scorefield.schedule import Images

STEPS = 8
HIGHEST, LOWEST = 20.0, 0.05
"""Noise levels between which samples are drawn."""


def draw(reading: Reading, output: Output, noise: Images, cond: Cond, steps: int = STEPS) -> Tensor:
    """Samples of the reading in ``steps`` DDIM steps, from noise of its highest level or 20."""
    ends = torch.tensor([reading.schedule.t_min, reading.schedule.t_max], dtype=torch.float64)
    unit = float(reading.levels(torch.ones(1)))
    low, high = (reading.schedule.ratio(ends) / unit).tolist()
    low, high = max(low, LOWEST), min(high, HIGHEST)
    levels = torch.logspace(math.log10(high), math.log10(low), steps, dtype=torch.float64)
    noisy = x0 = high * noise
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        x0 = reading.x0(noisy, level.expand(len(noise)).to(noise.device), cond)[output]
        if following is not None:
            noisy = x0 + float(following / level) * (noisy - x0)
    return x0


def consistency(
    reading: Reading, output: Output, noise: Images, cond: Cond, generator: Generator, batch_size: int
) -> Difference | None:
    """Errors on its own samples against those of the best linear filter; None where it draws none."""
    try:
        x0 = draw(reading, output, noise, cond)
    except torch.OutOfMemoryError:
        raise
    except FAILURES:
        return None
    if unlike_pictures(x0, bounded=False):
        return None
    ratios = levels_of(reading.schedule, (0.3, 1.0, 3.0), float(x0.double().std()) + 1e-6)
    trial = make_trial(x0, cond, ratios / float(reading.levels(torch.ones(1))), generator, batch_size)
    error = tried(reading, trial).get(output)
    if error is None:
        return None
    rivals = [best_without_network(x0, eps, float(r)) for eps, r in zip(trial.noise, trial.ratios, strict=True)]
    linear = torch.stack([torch.minimum(rival["linear"], rival["blurred"]).double() for rival in rivals])
    return difference(error, linear, trial.floor)


def most_consistent(
    base: Reading, output: Output, candidates: Iterable[Mistake], noise: Images, cond: Cond, generator: Generator,
    batch_size: int,
) -> tuple[Mistake, Output] | None:  # fmt: skip
    """Return the reading that knows its own samples best, if it does so clearly; every other meaning of ``base``
    counts.

    Args:
        base: as declared.
        output: as declared.
        candidates: other readings, each with the declared meaning of the output.
        noise: (n, *shape), eight are enough.
        cond: batch n.
        generator: for the noise of the test.
        batch_size: of the network's calls.
    """
    kinds = [(Mistake("kind", "", "", base), other) for other in OUTPUTS if other != output]
    others = [(one, output if one.reading.sigma_data is None else ("x0", 1)) for one in candidates]
    found = []
    for mistake, meaning in [*kinds, *others]:
        lead = consistency(mistake.reading, meaning, noise, cond, generator, batch_size)
        if lead is not None and lead.better and lead.mean < -0.4:
            found.append((lead.mean, mistake, meaning))
    if not found:
        return None
    _, mistake, meaning = min(found, key=lambda one: one[0])
    return mistake, meaning
