import math

import pytest
import torch

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


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def distance_to(cdf_values):
    """Kolmogorov-Smirnov distance of values that are uniform if the draws follow their distribution."""
    ordered = cdf_values.double().sort().values
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    return torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())


def normal_cdf(x):
    return torch.special.ndtr(x.double())


ALL = {
    "uniform": uniform(),
    "log_normal": log_normal(),
    "logit_normal": logit_normal(),
    "shifted": shifted(uniform(), 3.0),
    "annealed": annealed(0.5),
    "sqrt_annealed": sqrt_annealed(0.37),
    "between_ratios": between_ratios(0.15, 5.0),
    "log_uniform": log_uniform(0.15, 5.0),
    "constant": constant(0.5),
}


@pytest.mark.parametrize("times", list(ALL.values()), ids=list(ALL))
def test_draws_are_times_of_the_schedule_and_of_the_generator(schedule, times):
    t = times(1000, schedule, seeded())
    assert (t.shape, t.dtype) == ((1000,), torch.float32)
    assert schedule.t_min * (1 - 1e-6) <= t.min() <= t.max() <= schedule.t_max
    torch.manual_seed(1)
    assert torch.equal(times(1000, schedule, seeded()), t)


@pytest.mark.parametrize(
    "times", [v for k, v in ALL.items() if k != "constant"], ids=[k for k in ALL if k != "constant"]
)
def test_integer_teachers_are_asked_for_integers_and_others_are_not(schedule, times):
    t = times(1000, schedule, seeded())
    assert torch.equal(t, t.round()) is isinstance(schedule, VariancePreserving)
    continuous = VariancePreserving(VariancePreserving.linear().alphas_cumprod, integer=False)
    assert not torch.equal(times(1000, continuous, seeded()), times(1000, continuous, seeded()).round())


def test_uniform_is_uniform_in_flow_time():
    t = uniform(0.1, 0.7)(N, RectifiedFlow(), seeded())
    assert distance_to((t - 0.1) / 0.6) < TOLERANCE


def test_uniform_is_uniform_in_the_index_of_karras_grid():
    t, karras = uniform(0.1, 0.7)(N, Karras(), seeded()), Karras()
    low, high = karras.t_min ** (1 / 7), karras.t_max ** (1 / 7)
    assert distance_to(((t ** (1 / 7) - low) / (high - low) - 0.1) / 0.6) < TOLERANCE


def test_uniform_is_uniform_over_integer_timesteps():
    vp = VariancePreserving(torch.linspace(0.9, 0.1, 11, dtype=torch.float64))
    counts = torch.bincount(uniform(0.2, 0.8)(N, vp, seeded()).long(), minlength=11)
    assert (counts[:2] == 0).all()
    assert (counts[9:] == 0).all()
    close(counts[2:9] / N, torch.full((7,), 1 / 7), rtol=0, atol=0.012)


def test_uniform_draws_the_first_and_last_timestep_as_often_as_the_others():
    vp = VariancePreserving(torch.linspace(0.9, 0.1, 5, dtype=torch.float64))
    counts = torch.bincount(uniform(0.0, 1.0)(N, vp, seeded()).long(), minlength=5)
    close(counts / N, torch.full((5,), 0.2), rtol=0, atol=0.012)


def test_uniform_defaults_to_the_range_of_dmd_and_sds():
    t = uniform()(N, VariancePreserving.scaled_linear(), seeded())
    assert (t.min(), t.max()) == (20, 979)


def test_log_normal_is_normal_in_the_log_of_the_noise_level():
    t = log_normal(-1.2, 1.2)(N, Karras(), seeded())
    assert distance_to(normal_cdf((t.double().log() + 1.2) / 1.2)) < TOLERANCE
    flow = log_normal(-0.5, 0.8)(N, RectifiedFlow(), seeded())
    assert distance_to(normal_cdf((torch.logit(flow.double()) + 0.5) / 0.8)) < TOLERANCE


def test_log_normal_means_the_same_noise_on_every_schedule(schedule):
    ratio = schedule.ratio(log_normal(-0.3, 0.5)(N, schedule, seeded()))
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    expected = (-0.3 + 0.5 * torch.special.ndtri(quantiles)).exp()
    close(ratio.quantile(quantiles), expected, rtol=0.03, atol=0)


def test_log_normal_is_clamped_to_the_schedule():
    t = log_normal(0.0, 50.0)(1000, Karras(), seeded()).double()
    close(t.min(), torch.tensor(0.002).double(), rtol=1e-6, atol=0)
    assert t.max() == 80


def test_a_range_of_noise_levels_is_uniform_in_the_customary_spacing(schedule):
    """Each schedule's own closed form: t on a flow, t^(1/7) for EDM, integers for variance-preserving ones."""
    t = between_ratios(0.25, 4.0)(N, schedule, seeded()).double()
    if isinstance(schedule, RectifiedFlow):
        assert distance_to((t - 0.2) / 0.6) < TOLERANCE  # ratio / (1 + ratio)
    elif isinstance(schedule, Karras):
        low, high = 0.25 ** (1 / 7), 4 ** (1 / 7)
        assert distance_to((t ** (1 / 7) - low) / (high - low)) < TOLERANCE
    else:
        bar = schedule.alphas_cumprod
        allowed = (((1 - bar) / bar).sqrt() >= 0.25) & (((1 - bar) / bar).sqrt() <= 4)
        counts = torch.bincount(t.long(), minlength=1000)
        assert (counts[~allowed] == 0).all()
        share = allowed.sum().item()
        close(counts[allowed] / N, torch.full((share,), 1 / share), rtol=0, atol=5 * (share * N) ** -0.5)


@pytest.mark.parametrize("times", [between_ratios, log_uniform])
def test_a_range_beyond_the_schedule_ends_with_it(schedule, times):
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    ratio = schedule.ratio(times(1e-4, 1e4)(N, schedule, seeded()).double())
    low, high = (float(end) for end in ends.clamp(1e-4, 1e4))
    assert low * (1 - 1e-6) <= ratio.min() < low * 1.2 + 1e-3
    assert high * 0.5 < ratio.max() <= high * (1 + 1e-3)  # float32 near a flow's t = 1


def test_the_ends_of_integer_time_have_the_share_of_the_others_in_a_range():
    vp = VariancePreserving(torch.linspace(0.9, 0.1, 5, dtype=torch.float64))
    for sampler, first in ((between_ratios(0, math.inf), 0), (between_ratios(0.5, 100), 1)):  # ratios 1/3 to 3
        counts = torch.bincount(sampler(N, vp, seeded()).long(), minlength=5)
        assert (counts[:first] == 0).all()
        close(counts[first:] / N, torch.full((5 - first,), 1 / (5 - first)), rtol=0, atol=0.012)


def test_a_terminal_timestep_without_signal_is_drawn_only_where_it_is_meant():
    vp = VariancePreserving(torch.linspace(0.9, 0.0, 5, dtype=torch.float64))
    assert between_ratios(0.5, 1e9)(N, vp, seeded()).max() == 3
    assert log_uniform(0.5, 1e9)(N, vp, seeded()).max() == 3
    assert between_ratios(0.5, math.inf)(N, vp, seeded()).max() == 4


def test_log_uniform_is_uniform_in_the_log_of_the_noise_level(schedule):
    ratio = schedule.ratio(log_uniform(0.15, 10.0)(N, schedule, seeded()).double())
    values = (ratio / 0.15).log() / math.log(10 / 0.15)
    assert distance_to(values) < TOLERANCE + (0.02 if isinstance(schedule, VariancePreserving) else 0)
    assert 0.15 * (1 - 1e-6) <= ratio.min() <= ratio.max() <= 10 * (1 + 1e-6)


@pytest.mark.parametrize("times", [between_ratios, log_uniform])
def test_a_range_that_holds_no_time_is_refused(times):
    vp = VariancePreserving(torch.linspace(0.9, 0.1, 5, dtype=torch.float64))
    for schedule, low, high in ((Karras(), 90, 100), (Karras(), 1e-5, 1e-4), (vp, 3.1, 4), (vp, 1.05, 1.1)):
        with pytest.raises(ValueError, match=rf"no time with sigma / alpha in \[{low:g}, {high:g}\]; it reaches"):
            times(low, high)(5, schedule, seeded())


def test_logit_normal_is_normal_in_the_logit_of_flow_time():
    t = logit_normal()(N, RectifiedFlow(), seeded())
    assert distance_to(normal_cdf(torch.logit(t.double()))) < TOLERANCE
    t = logit_normal(0.4, 0.6)(N, RectifiedFlow(), seeded())
    assert distance_to(normal_cdf((torch.logit(t.double()) - 0.4) / 0.6)) < TOLERANCE


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_is_that_of_sd3_on_a_flow(shift):
    """t' = shift t / (1 + (shift - 1) t) (arXiv 2403.03206, Eq. 23)."""
    t = uniform(0, 1)(1000, RectifiedFlow(), seeded()).double()
    expected = shift * t / (1 + (shift - 1) * t)
    close(shifted(uniform(0, 1), shift)(1000, RectifiedFlow(), seeded()).double(), expected, rtol=0, atol=1e-6)


def test_shift_multiplies_the_noise_level(schedule):
    base = uniform(0.2, 0.6)(1000, schedule, seeded())
    moved = shifted(uniform(0.2, 0.6), 1.5)(1000, schedule, seeded())
    rounding = 0.01 if isinstance(schedule, VariancePreserving) else 1e-5
    close(schedule.ratio(moved), 1.5 * schedule.ratio(base), rtol=rounding, atol=0)


def test_shift_of_the_ends_of_a_flow_stays_there():
    for end in (0.0, 1.0):
        assert (shifted(constant(end), 3.0)(5, RectifiedFlow(), seeded()) == end).all()


@pytest.mark.parametrize(("progress", "high"), [(0.0, 0.98), (0.5, 0.74), (1.0, 0.5)])
def test_annealing_lowers_the_upper_end(schedule, progress, high):
    expected = uniform(0.02, high)(1000, schedule, seeded())
    close(annealed(progress)(1000, schedule, seeded()), expected)
    custom = annealed(progress, low=0.1, high=(0.9, 0.3))(1000, schedule, seeded())
    close(custom, uniform(0.1, 0.9 - 0.6 * progress)(1000, schedule, seeded()))


@pytest.mark.parametrize(("progress", "fraction"), [(0.0, 0.98), (0.25, 0.5), (1.0, 0.02)])
def test_root_annealing_has_one_time_for_all_which_falls_fast_at_first(schedule, progress, fraction):
    """high - (high - low) sqrt(progress): half of the way is gone after a quarter of the run."""
    t = sqrt_annealed(progress)(5, schedule, seeded())
    close(t, schedule.at(torch.full((5,), fraction, dtype=torch.float64)).float())
    custom = sqrt_annealed(progress, low=0.1, high=0.7)(5, schedule, seeded())
    expected = schedule.at(torch.full((5,), 0.7 - 0.6 * progress**0.5, dtype=torch.float64)).float()
    close(custom, expected)


def test_a_ramp_is_flat_before_and_after():
    values = [ramp(step, 100, 0.98, 0.5, 300) for step in (0, 100, 150, 200, 300, 10_000)]
    close(torch.tensor(values), torch.tensor([0.98, 0.98, 0.86, 0.74, 0.5, 0.5]))
    assert (ramp(99, 100, 1.0, 2.0, 100), ramp(100, 100, 1.0, 2.0, 100)) == (1.0, 2.0)


def test_constant_is_constant(schedule):
    assert torch.equal(constant(0.25)(3, schedule, seeded()), torch.full((3,), 0.25))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: uniform(0.5, 0.4), "0 <= low <= high <= 1; got low=0.5, high=0.4"),
        (lambda: uniform(-0.1, 0.4), "got low=-0.1"),
        (lambda: uniform(0.1, 20), "high=20"),
        (lambda: between_ratios(2.0, 1.0), "0 <= low < high; got low=2.0, high=1.0"),
        (lambda: between_ratios(-1.0, 1.0), "got low=-1.0"),
        (lambda: between_ratios(1.0, math.nan), "high=nan"),
        (lambda: log_uniform(1.0, 1.0), "0 <= low < high"),
        (lambda: log_uniform(0.0, 1.0), "0 < low < high < inf; got low=0.0"),
        (lambda: log_uniform(1.0, math.inf), "high=inf"),
        (lambda: shifted(uniform(), 0.0), "shift must be above 0; got 0.0"),
        (lambda: shifted(uniform(), -3.0), "shift must be above 0; got -3.0"),
        (lambda: annealed(1.01), r"progress must lie in \[0, 1\]; got 1.01"),
        (lambda: annealed(-1.0), r"progress must lie in \[0, 1\]; got -1.0"),
        (lambda: sqrt_annealed(1.01), r"progress must lie in \[0, 1\]; got 1.01"),
        (lambda: sqrt_annealed(0.0, high=1.5), "got low=1.5, high=1.5"),
        (lambda: ramp(0, 10, 1.0, 2.0, 5), "start <= end; got 10 and 5"),
    ],
)
def test_impossible_samplers_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()
