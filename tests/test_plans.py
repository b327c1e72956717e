"""Which solver on which grid: errors that fall with the calls, auto against DDIM, warnings that are right."""

import pytest
import torch
from schedules import ZERO_SNR

from scorefield.exact import GaussianMixture
from scorefield.grids import grid
from scorefield.sampling import heun, initial_noise, sample
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.solvers import caution, plan

close = torch.testing.assert_close
ALL = {
    "ddpm": VariancePreserving.linear(), "sd": VariancePreserving.scaled_linear(), "zero-snr": ZERO_SNR,
    "edm": Karras(), "flow": RectifiedFlow(),
}  # fmt: skip


@pytest.fixture(scope="module")
def references():
    """For each schedule a mixture and the end of its ODE: Heun on a far finer grid than any plan here."""
    found = {}
    for name, schedule in ALL.items():
        mixture = three_modes(schedule)
        times = fine_times(schedule)
        noise = torch.randn(60, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        x_t = initial_noise(schedule, noise, times[0])
        if isinstance(schedule, VariancePreserving):
            mixture_of_fine = three_modes(VariancePreserving(schedule.alphas_cumprod, integer=False))
        else:
            mixture_of_fine = mixture
        found[name] = (mixture, noise, sample(mixture_of_fine, x_t, {}, times=times, step=heun()))
    return found


def three_modes(schedule):
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.4], [0.0, 1.1]], dtype=torch.float64)
    return GaussianMixture(means, torch.full((3,), 0.15), torch.tensor([0.3, 0.4, 0.3]), schedule)


def fine_times(schedule):
    if isinstance(schedule, VariancePreserving):
        schedule = VariancePreserving(schedule.alphas_cumprod, integer=False)
    return grid(schedule, 100, spacing="log-snr")


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm++", "unipc"])
def test_the_error_falls_with_the_calls(references, name, solver):
    mixture, noise, exact = references[name]
    errors = [error_of(mixture, noise, exact, plan(ALL[name], n, solver)) for n in (6, 15, 40)]
    # Heun's three steps on a flow are as good as its next five: the last of them is the largest error of both.
    factor = 1.0 if (solver, name) == ("heun", "flow") else 1.3
    assert errors[0] > factor * errors[1] > factor**2 * errors[2]


def error_of(mixture, noise, exact, chosen):
    x_t = initial_noise(mixture.schedule, noise, chosen.times[0])
    x0 = sample(mixture, x_t, {}, times=chosen.times, step=chosen.step)
    return float((x0 - exact).square().mean().sqrt())


@pytest.mark.parametrize("name", list(ALL))
def test_auto_is_no_worse_than_ddim_and_better_from_ten_calls(references, name):
    """Beside DDIM on the grid that diffusers uses: even timesteps, trailing."""
    mixture, noise, exact = references[name]
    for calls in (2, 4, 6, 10, 20):
        plans = plan(ALL[name], calls), plan(ALL[name], calls, "ddim", "trailing")
        ours, theirs = (error_of(mixture, noise, exact, chosen) for chosen in plans)
        # On the trailing grid, where trained networks need it, a good solver gains less.
        gain = 1.1 if plans[0].spacing == "trailing" else 0.8
        assert ours < (1.3 if calls < 10 else gain) * theirs, calls


@pytest.mark.parametrize("name", list(ALL))
def test_a_warning_is_right_and_so_is_none(references, name):
    """Where there is a warning DDIM is better on that grid, and auto is never warned of."""
    mixture, noise, exact = references[name]
    schedule = ALL[name]
    for calls in (2, 4, 8, 12, 20, 30, 60):
        assert caution(schedule, plan(schedule, calls)) == ""
    for solver, spacing, calls in (("heun", "auto", 8), ("dpm++", "uniform", 10), ("unipc", "uniform", 10)):
        chosen = plan(schedule, calls, solver, spacing)
        warning = caution(schedule, chosen)
        vp = isinstance(schedule, VariancePreserving)
        expected = name in ("ddpm", "zero-snr", "edm") if solver == "heun" else vp
        assert bool(warning) == expected
        if expected:
            assert f"{solver} on the {chosen.spacing} grid draws worse than ddim below" in warning
            better = error_of(mixture, noise, exact, plan(schedule, chosen.num_calls, "ddim"))
            assert error_of(mixture, noise, exact, chosen) > better


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), Karras()], ids=["flow", "edm"])
def test_a_plan_makes_the_calls_it_says_and_no_more_than_allowed(schedule, solver, make_mixture):
    mixture, calls = make_mixture(schedule), []

    class Counting:
        def __call__(self, x_t, t, cond):
            calls.append(t)
            return mixture(x_t, t, cond)

    counting = Counting()
    counting.schedule = schedule
    for allowed in (1, 2, 3, 6, 7):
        calls.clear()
        chosen = plan(schedule, allowed, solver)
        sample(
            counting,
            torch.zeros(2, 2, dtype=torch.float64),
            {},
            times=chosen.times,
            step=chosen.step,
            generator=torch.Generator(),
        )
        assert len(calls) == chosen.num_calls
        assert allowed - 1 <= chosen.num_calls <= allowed


def test_auto_takes_what_was_best():
    names = {name: (plan(schedule, 10).solver, plan(schedule, 10).spacing) for name, schedule in ALL.items()}
    beyond = {"ddpm", "zero-snr"}
    assert {names[name] for name in beyond} == {("unipc", "trailing")}
    assert {names[name] for name in names.keys() - beyond} == {("unipc", "log-snr")}
    few = {name: (plan(schedule, 4).solver, plan(schedule, 4).spacing) for name, schedule in ALL.items()}
    assert few["ddpm"] == ("ddim", "trailing")
    assert few["flow"] == ("unipc", "trailing")
    assert few["edm"] == few["sd"] == ("unipc", "log-snr")
    assert few["zero-snr"] == ("unipc", "trailing")
    assert plan(RectifiedFlow(), 10, shift=3.0).spacing == "trailing"
    close(plan(RectifiedFlow(), 10, shift=3.0).times, grid(RectifiedFlow(), 10, shift=3.0))
    assert [plan(ALL[name], 10, "heun").spacing for name in ("ddpm", "sd", "edm", "flow")] == [
        "trailing", "karras", "karras", "trailing",
    ]  # fmt: skip


def test_unknown_names_raise():
    with pytest.raises(ValueError, match=r"solver must be auto or one of ddim, .*; got 'euler'"):
        plan(Karras(), 4, "euler")
    with pytest.raises(ValueError, match=r"spacing must be one of .*; got 'leading'"):
        plan(Karras(), 4, "ddim", "leading")
