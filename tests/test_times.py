"""Random times: their distributions by Kolmogorov-Smirnov, the same noise on every schedule, ends and rounding."""

import math

import pytest
import torch
from denoisers import seeded
from refusals import refused

from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.times import (
    annealed,
    between_ratios,
    constant,
    log_normal,
    log_uniform,
    logit_normal,
    ramp,
    shifted,
    sqrt_annealed,
    uniform,
)

close = torch.testing.assert_close
N = 20_000
TOLERANCE = 1.95 / math.sqrt(N)  # Kolmogorov-Smirnov: a right distribution exceeds it once in a thousand seeds
ALL = {
    "uniform": uniform(), "log_normal": log_normal(), "logit_normal": logit_normal(),
    "shifted": shifted(uniform(), 3.0), "annealed": annealed(0.5), "sqrt_annealed": sqrt_annealed(0.37),
    "between_ratios": between_ratios(0.15, 5.0), "log_uniform": log_uniform(0.15, 5.0), "constant": constant(0.5),
}  # fmt: skip


def distance_to(cdf_values):
    """Kolmogorov-Smirnov distance of values that are uniform if the draws follow their distribution."""
    ordered = cdf_values.double().sort().values
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    return torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())


def normal_cdf(x):
    return torch.special.ndtr(x.double())


def integers(length, end=0.1):
    """A variance-preserving schedule of a few integer timesteps."""
    return VariancePreserving(torch.linspace(0.9, end, length, dtype=torch.float64))


@pytest.mark.parametrize("name", ALL)
def test_draws_are_times_of_the_schedule_and_of_the_generator(schedule, name):
    times = ALL[name]
    t = times(1000, schedule, seeded())
    assert (t.shape, t.dtype) == ((1000,), torch.float32)
    assert schedule.t_min * (1 - 1e-6) <= t.min() <= t.max() <= schedule.t_max
    torch.manual_seed(1)
    assert torch.equal(times(1000, schedule, seeded()), t)
    if name != "constant":  # integer teachers are asked for integers, and others are not
        assert torch.equal(t, t.round()) is isinstance(schedule, VariancePreserving)
        continuous = VariancePreserving(VariancePreserving.linear().alphas_cumprod, integer=False)
        assert not torch.equal(times(1000, continuous, seeded()), times(1000, continuous, seeded()).round())


def edm_index(t, low, high):
    """Where in [0, 1] a time lies between two, in the power by which EDM spaces its grid."""
    return (t ** (1 / 7) - low ** (1 / 7)) / (high ** (1 / 7) - low ** (1 / 7))


def test_uniform_is_uniform_in_each_familys_customary_spacing():
    assert distance_to((uniform(0.1, 0.7)(N, RectifiedFlow(), seeded()) - 0.1) / 0.6) < TOLERANCE
    t, karras = uniform(0.1, 0.7)(N, Karras(), seeded()), Karras()
    assert distance_to((edm_index(t, karras.t_min, karras.t_max) - 0.1) / 0.6) < TOLERANCE
    counts = torch.bincount(uniform(0.2, 0.8)(N, integers(11), seeded()).long(), minlength=11)
    assert (counts[[0, 1, 9, 10]] == 0).all()
    close(counts[2:9] / N, torch.full((7,), 1 / 7), rtol=0, atol=0.012)
    counts = torch.bincount(uniform(0.0, 1.0)(N, integers(5), seeded()).long(), minlength=5)
    close(counts / N, torch.full((5,), 0.2), rtol=0, atol=0.012)  # the first and last as often as the others
    t = uniform()(N, VariancePreserving.scaled_linear(), seeded())
    assert (t.min(), t.max()) == (20, 979), "the range of DMD and SDS"


def test_log_normal_is_normal_in_the_log_of_the_noise_level_and_clamped_to_the_schedule(schedule):
    t = log_normal(-1.2, 1.2)(N, Karras(), seeded())
    assert distance_to(normal_cdf((t.double().log() + 1.2) / 1.2)) < TOLERANCE
    flow = log_normal(-0.5, 0.8)(N, RectifiedFlow(), seeded())
    assert distance_to(normal_cdf((torch.logit(flow.double()) + 0.5) / 0.8)) < TOLERANCE
    ratio = schedule.ratio(log_normal(-0.3, 0.5)(N, schedule, seeded()))
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    close(ratio.quantile(quantiles), (-0.3 + 0.5 * torch.special.ndtri(quantiles)).exp(), rtol=0.03, atol=0)
    t = log_normal(0.0, 50.0)(1000, Karras(), seeded()).double()
    close(t.min(), torch.tensor(0.002).double(), rtol=1e-6, atol=0)
    assert t.max() == 80


def test_a_range_of_noise_levels_is_uniform_in_the_customary_spacing(schedule):
    """Each schedule's own closed form: t on a flow, t^(1/7) for EDM, integers for variance-preserving ones."""
    t = between_ratios(0.25, 4.0)(N, schedule, seeded()).double()
    if isinstance(schedule, RectifiedFlow):
        assert distance_to((t - 0.2) / 0.6) < TOLERANCE  # ratio / (1 + ratio)
    elif isinstance(schedule, Karras):
        assert distance_to(edm_index(t, 0.25, 4.0)) < TOLERANCE
    else:
        bar = schedule.alphas_cumprod
        allowed = (((1 - bar) / bar).sqrt() >= 0.25) & (((1 - bar) / bar).sqrt() <= 4)
        counts = torch.bincount(t.long(), minlength=1000)
        assert (counts[~allowed] == 0).all()
        share = allowed.sum().item()
        close(counts[allowed] / N, torch.full((share,), 1 / share), rtol=0, atol=5 * (share * N) ** -0.5)


def test_log_uniform_is_uniform_in_the_log_of_the_noise_level(schedule):
    ratio = schedule.ratio(log_uniform(0.15, 10.0)(N, schedule, seeded()).double())
    values = (ratio / 0.15).log() / math.log(10 / 0.15)
    assert distance_to(values) < TOLERANCE + (0.02 if isinstance(schedule, VariancePreserving) else 0)
    assert 0.15 * (1 - 1e-6) <= ratio.min() <= ratio.max() <= 10 * (1 + 1e-6)


@pytest.mark.parametrize("times", [between_ratios, log_uniform])
def test_a_range_beyond_the_schedule_ends_with_it_and_one_without_times_is_refused(schedule, times):
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    ratio = schedule.ratio(times(1e-4, 1e4)(N, schedule, seeded()).double())
    low, high = (float(end) for end in ends.clamp(1e-4, 1e4))
    assert low * (1 - 1e-6) <= ratio.min() < low * 1.2 + 1e-3
    assert high * 0.5 < ratio.max() <= high * (1 + 1e-3)  # float32 near a flow's t = 1
    for one, low, high in ((Karras(), 90, 100), (Karras(), 1e-5, 1e-4), (integers(5), 3.1, 4),
                           (integers(5), 1.05, 1.1)):  # fmt: skip
        with refused(rf"no time with sigma / alpha in \[{low:g}, {high:g}\]; it reaches"):
            times(low, high)(5, one, seeded())


def test_the_ends_of_integer_time_have_the_share_of_the_others_and_pure_noise_none_unless_meant():
    for sampler, first in ((between_ratios(0, math.inf), 0), (between_ratios(0.5, 100), 1)):  # ratios 1/3 to 3
        counts = torch.bincount(sampler(N, integers(5), seeded()).long(), minlength=5)
        assert (counts[:first] == 0).all()
        close(counts[first:] / N, torch.full((5 - first,), 1 / (5 - first)), rtol=0, atol=0.012)
    for sampler, last in ((between_ratios(0.5, 1e9), 3), (log_uniform(0.5, 1e9), 3),
                          (between_ratios(0.5, math.inf), 4)):  # fmt: skip
        assert sampler(N, integers(5, end=0.0), seeded()).max() == last


def test_logit_normal_is_normal_in_the_logit_of_flow_time():
    for times, mean, std in ((logit_normal(), 0.0, 1.0), (logit_normal(0.4, 0.6), 0.4, 0.6)):
        t = times(N, RectifiedFlow(), seeded())
        assert distance_to(normal_cdf((torch.logit(t.double()) - mean) / std)) < TOLERANCE


def test_shift_multiplies_the_noise_level_which_on_a_flow_is_sd3s_formula(schedule):
    """t' = shift t / (1 + (shift - 1) t) (arXiv 2403.03206, Eq. 23)."""
    base = uniform(0.2, 0.6)(1000, schedule, seeded())
    moved = shifted(uniform(0.2, 0.6), 1.5)(1000, schedule, seeded())
    rounding = 0.01 if isinstance(schedule, VariancePreserving) else 1e-5
    close(schedule.ratio(moved), 1.5 * schedule.ratio(base), rtol=rounding, atol=0)
    t = uniform(0, 1)(1000, RectifiedFlow(), seeded()).double()
    for shift in (0.5, 1.0, 3.0):
        found = shifted(uniform(0, 1), shift)(1000, RectifiedFlow(), seeded()).double()
        close(found, shift * t / (1 + (shift - 1) * t), rtol=0, atol=1e-6)
    for end in (0.0, 1.0):
        assert (shifted(constant(end), 3.0)(5, RectifiedFlow(), seeded()) == end).all()


@pytest.mark.parametrize(("progress", "high"), [(0.0, 0.98), (0.5, 0.74), (1.0, 0.5)])
def test_annealing_lowers_the_upper_end(schedule, progress, high):
    close(annealed(progress)(1000, schedule, seeded()), uniform(0.02, high)(1000, schedule, seeded()))
    custom = annealed(progress, low=0.1, high=(0.9, 0.3))(1000, schedule, seeded())
    close(custom, uniform(0.1, 0.9 - 0.6 * progress)(1000, schedule, seeded()))


@pytest.mark.parametrize(("progress", "fraction"), [(0.0, 0.98), (0.25, 0.5), (1.0, 0.02)])
def test_root_annealing_has_one_time_for_all_which_falls_fast_at_first(schedule, progress, fraction):
    """high - (high - low) sqrt(progress): half of the way is gone after a quarter of the run."""
    custom = sqrt_annealed(progress, low=0.1, high=0.7)
    for sampler, place in ((sqrt_annealed(progress), fraction), (custom, 0.7 - 0.6 * progress**0.5)):
        expected = schedule.at(torch.full((5,), place, dtype=torch.float64)).float()
        close(sampler(5, schedule, seeded()), expected)


def test_a_ramp_is_flat_before_and_after_and_constant_is_constant(schedule):
    values = [ramp(step, 100, 0.98, 0.5, 300) for step in (0, 100, 150, 200, 300, 10_000)]
    close(torch.tensor(values), torch.tensor([0.98, 0.98, 0.86, 0.74, 0.5, 0.5]))
    assert (ramp(99, 100, 1.0, 2.0, 100), ramp(100, 100, 1.0, 2.0, 100)) == (1.0, 2.0)
    assert torch.equal(constant(0.25)(3, schedule, seeded()), torch.full((3,), 0.25))


@pytest.mark.parametrize(("build", "message"), [
    (lambda: uniform(0.5, 0.4), "0 <= low <= high <= 1; got low=0.5, high=0.4"),
    (lambda: uniform(-0.1, 0.4), "got low=-0.1"), (lambda: uniform(0.1, 20), "high=20"),
    (lambda: between_ratios(2.0, 1.0), "0 <= low < high; got low=2.0, high=1.0"),
    (lambda: between_ratios(-1.0, 1.0), "got low=-1.0"), (lambda: between_ratios(1.0, math.nan), "high=nan"),
    (lambda: log_uniform(1.0, 1.0), "0 <= low < high"), (lambda: log_uniform(1.0, math.inf), "high=inf"),
    (lambda: log_uniform(0.0, 1.0), "0 < low < high < inf; got low=0.0"),
    (lambda: shifted(uniform(), 0.0), "shift must be above 0; got 0.0"),
    (lambda: shifted(uniform(), -3.0), "shift must be above 0; got -3.0"),
    (lambda: annealed(1.01), r"progress must lie in \[0, 1\]; got 1.01"),
    (lambda: annealed(-1.0), r"progress must lie in \[0, 1\]; got -1.0"),
    (lambda: sqrt_annealed(1.01), r"progress must lie in \[0, 1\]; got 1.01"),
    (lambda: sqrt_annealed(0.0, high=1.5), "got low=1.5, high=1.5"),
    (lambda: ramp(0, 10, 1.0, 2.0, 5), "start <= end; got 10 and 5"),
])  # fmt: skip
def test_impossible_samplers_raise(build, message):
    with refused(message):
        build()
