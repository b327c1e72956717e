"""Sampling grids on every schedule, and which solver takes which: no call is wasted, warnings are right."""

import math

import pytest
import torch
from denoisers import Counting, normal
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from refusals import refused
from schedules import ZERO_SNR

from scorefield.exact import GaussianMixture
from scorefield.grids import LEVELS, grid
from scorefield.sampling import grid as grid_of_sampling
from scorefield.sampling import heun, initial_noise, sample
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.solvers import caution, plan

close = torch.testing.assert_close
SD, FLOW = VariancePreserving.scaled_linear(), RectifiedFlow()
CONTINUOUS = VariancePreserving(VariancePreserving.linear().alphas_cumprod, integer=False)
SPACINGS = ("uniform", "trailing", "karras", "log-snr")


def test_timesteps_are_diffusers():
    """Rounding included: 16 steps of 62.5 round half of them up and half of them down. Theirs in karras spend the
    last of five on the clean end, timestep 0; between they agree to the rounding."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", steps_offset=0)
    for num_steps in (1, 2, 3, 4, 7, 16, 50, 999, 1000):
        scheduler.set_timesteps(num_steps)
        assert grid(SD, num_steps).tolist() == scheduler.timesteps.tolist()
    assert (grid(SD, 4).tolist(), grid(SD, 1).tolist()) == ([999, 749, 499, 249], [999])
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=True
    )
    for num_steps in (4, 10, 20):
        scheduler.set_timesteps(num_steps + 1)
        theirs = scheduler.timesteps.double()
        assert theirs[-1] == 0
        close(grid(SD, num_steps, spacing="karras"), theirs[:-1], rtol=0, atol=1)


def test_edm_grids_are_the_papers():
    """Eq. 5 with its end; left out, the end is where the clean image comes instead."""
    levels = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)]
    close(grid(Karras(), 5, spacing="uniform"), torch.tensor(levels, dtype=torch.float64))
    close(grid(Karras(), 4, spacing="trailing"), torch.tensor(levels[:-1], dtype=torch.float64))
    within = Karras(*LEVELS)
    close(grid(within, 4, spacing="karras"), grid(within, 4, spacing="trailing"))
    close(grid(Karras(), 4, spacing="karras")[1:], grid(within, 4, spacing="karras")[1:])


@pytest.mark.parametrize("schedule", [Karras(), FLOW, CONTINUOUS, ZERO_SNR], ids=repr)
def test_log_snr_multiplies_the_noise_level_by_the_same_factor(schedule):
    """From the largest useful level, whose place pure noise takes, towards the smallest, which is left out."""
    lowest = max(float(schedule.ratio(torch.tensor(schedule.t_min))), LEVELS[0])
    highest = min(float(schedule.ratio(torch.tensor(schedule.t_max))), LEVELS[1])
    times = grid(schedule, 7, spacing="log-snr")
    assert times[0] == schedule.t_max
    powers = torch.arange(1, 7, dtype=torch.float64) / 7
    wanted = highest * (lowest / highest) ** powers
    close(times[1:], schedule.snap(schedule.time(wanted)))
    if not schedule.cell:
        close(schedule.ratio(times[1:]), wanted)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", [SD, ZERO_SNR, VariancePreserving.cosine(), Karras(), FLOW], ids=repr)
def test_every_grid_falls_from_pure_noise_in_as_many_times_as_asked(schedule, spacing):
    for num_steps in (1, 2, 3, 10, 50, 400):
        times = grid(schedule, num_steps, spacing=spacing)
        assert (times.shape, times.dtype) == ((num_steps,), torch.float64)
        assert times[0] == pytest.approx(schedule.t_max)
        assert times[-1] >= schedule.t_min
        assert (times.diff() < 0).all()
        assert not schedule.cell or torch.equal(times, times.round())
        assert schedule.sigma(times[-1]) > 0
        if spacing != "uniform" and 1 < num_steps < 50:
            assert times[-1] > schedule.t_min, "a call at the clean end changes next to nothing"


def test_times_that_round_to_the_same_integer_are_spread_to_their_neighbours():
    """Low noise levels of log-snr lie closer together than timesteps."""
    times = grid(SD, 60, spacing="log-snr")
    exact = grid(VariancePreserving(SD.alphas_cumprod, integer=False), 60, spacing="log-snr")
    assert len(exact.round().unique()) < 60
    assert (times.diff() <= -1).all()
    clear = exact > 60
    close(times[clear], exact[clear].round())


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_part_of_the_range_has_both_its_ends_and_a_shift_multiplies_levels(schedule, spacing):
    times = grid(schedule, 3, low=0.2, high=0.6, spacing=spacing)
    close(times[[0, -1]], schedule.at(torch.tensor([0.6, 0.2], dtype=torch.float64)))
    if spacing in ("uniform", "trailing") and not schedule.cell:
        close(times[1], schedule.at(torch.tensor(0.4)))
    plain, shifted = (grid(schedule, 6, high=0.8, shift=shift, spacing=spacing) for shift in (1.0, 3.0))
    if schedule.cell:
        assert torch.equal(shifted, shifted.round())
        close(shifted, schedule.time(3 * schedule.ratio(plain)), atol=0.5, rtol=0)
    else:
        close(schedule.ratio(shifted), 3 * schedule.ratio(plain))


def test_no_call_of_a_flow_is_spent_at_its_clean_end_and_its_shift_is_sd3s():
    """At sigma = 0 a denoiser returns what it is given. arXiv 2403.03206, Eq. 23; pure noise stays pure noise."""
    t = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    for spacing in ("uniform", "trailing"):
        close(grid(FLOW, 4, spacing=spacing), t)
    close(grid(FLOW, 4, shift=3.0), 3 * t / (1 + 2 * t))
    close(grid(FLOW, 2, high=0.5), torch.tensor([0.5, 0.25], dtype=torch.float64))
    close(grid(FLOW, 2, low=0.1), torch.tensor([1.0, 0.1], dtype=torch.float64))
    assert grid_of_sampling is grid


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_grid_of_more_steps_than_times_raises(spacing):
    assert grid(SD, 1000, spacing=spacing).tolist() == list(range(999, -1, -1))
    with refused("fewer than 1001 distinct times"):
        grid(SD, 1001, spacing=spacing)
    with refused("fewer than 30 distinct times"):
        grid(SD, 30, high=0.02, spacing=spacing)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_steps": 0}, "num_steps must be at least 1; got 0"), ({"shift": 0.0}, "shift must be above 0; got 0"),
    ({"low": 0.5, "high": 0.4}, "0 <= low <= high <= 1; got low=0.5, high=0.4"),
    ({"high": 1.5}, "got low=0.0, high=1.5"), ({"low": math.nan}, "got low=nan"),
    ({"spacing": "leading"}, "spacing must be one of uniform, .*; got 'leading'"),
])  # fmt: skip
def test_numbers_out_of_range_raise(changes, message):
    with refused(message):
        grid(**{"schedule": SD, "num_steps": 4, **changes})


# Which solver on which grid.

ALL = {"ddpm": VariancePreserving.linear(), "sd": SD, "zero-snr": ZERO_SNR, "edm": Karras(), "flow": FLOW}


def three_modes(schedule):
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.4], [0.0, 1.1]], dtype=torch.float64)
    return GaussianMixture(means, torch.full((3,), 0.15), torch.tensor([0.3, 0.4, 0.3]), schedule)


@pytest.fixture(scope="module")
def error_of():
    """The error of a plan on a mixture, against the end of its ODE: Heun on a far finer grid than any plan."""
    references, noise = {}, normal(60, 2, seed=4)
    for name, schedule in ALL.items():
        fine = schedule
        if isinstance(schedule, VariancePreserving):
            fine = VariancePreserving(schedule.alphas_cumprod, integer=False)
        times = grid(fine, 100, spacing="log-snr")
        x_t = initial_noise(schedule, noise, times[0])
        references[name] = sample(three_modes(fine), x_t, {}, times=times, step=heun())

    def error(name, chosen):
        x_t = initial_noise(ALL[name], noise, chosen.times[0])
        x0 = sample(three_modes(ALL[name]), x_t, {}, times=chosen.times, step=chosen.step)
        return float((x0 - references[name]).square().mean().sqrt())

    return error


@pytest.mark.parametrize("name", list(ALL))
def test_the_error_falls_with_the_calls_and_auto_is_better_than_ddim_from_ten_calls(error_of, name):
    """DDIM on the grid that diffusers uses: even timesteps, trailing."""
    for solver in ("ddim", "heun", "dpm++", "unipc"):
        errors = [error_of(name, plan(ALL[name], n, solver)) for n in (6, 15, 40)]
        # Heun's three steps on a flow are as good as its next five: the last is the largest error of both.
        factor = 1.0 if (solver, name) == ("heun", "flow") else 1.3
        assert errors[0] > factor * errors[1] > factor**2 * errors[2], solver
    for calls in (2, 4, 6, 10, 20):
        auto, ddim = plan(ALL[name], calls), plan(ALL[name], calls, "ddim", "trailing")
        # On the trailing grid, where trained networks need it, a good solver gains less.
        gain = 1.1 if auto.spacing == "trailing" else 0.8
        assert error_of(name, auto) < (1.3 if calls < 10 else gain) * error_of(name, ddim), calls


@pytest.mark.parametrize("name", list(ALL))
def test_a_warning_is_right_and_so_is_none(error_of, name):
    """Where there is a warning DDIM is better on that grid, and auto is never warned of."""
    schedule = ALL[name]
    for calls in (2, 4, 8, 12, 20, 30, 60):
        assert caution(schedule, plan(schedule, calls)) == ""
    for solver, spacing, calls in (("heun", "auto", 8), ("dpm++", "uniform", 10), ("unipc", "uniform", 10)):
        chosen = plan(schedule, calls, solver, spacing)
        vp = isinstance(schedule, VariancePreserving)
        expected = name in ("ddpm", "zero-snr", "edm") if solver == "heun" else vp
        assert bool(caution(schedule, chosen)) == expected
        if expected:
            words = f"{solver} on the {chosen.spacing} grid draws worse than ddim below"
            assert words in caution(schedule, chosen)
            assert error_of(name, chosen) > error_of(name, plan(schedule, chosen.num_calls, "ddim"))


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpm++", "unipc"])
@pytest.mark.parametrize("schedule", [FLOW, Karras()], ids=["flow", "edm"])
def test_a_plan_makes_the_calls_it_says_and_no_more_than_allowed(schedule, solver, make_mixture):
    for allowed in (1, 2, 3, 6, 7):
        counting, chosen = Counting(make_mixture(schedule)), plan(schedule, allowed, solver)
        noise, settings = torch.zeros(2, 2, dtype=torch.float64), {"times": chosen.times, "step": chosen.step}
        sample(counting, noise, {}, **settings, generator=torch.Generator())
        assert len(counting.calls) == chosen.num_calls
        assert allowed - 1 <= chosen.num_calls <= allowed


def test_auto_takes_what_was_best():
    def taken(calls, solver="auto", **options):
        plans = {name: plan(schedule, calls, solver, **options) for name, schedule in ALL.items()}
        return {name: (one.solver, one.spacing) for name, one in plans.items()}

    trailing, log_snr = ("unipc", "trailing"), ("unipc", "log-snr")
    assert taken(10) == {**dict.fromkeys(ALL, log_snr), "ddpm": trailing, "zero-snr": trailing}
    assert taken(4) == {
        "ddpm": ("ddim", "trailing"), "sd": log_snr, "zero-snr": trailing, "edm": log_snr, "flow": trailing,
    }  # fmt: skip
    spacings = {name: spacing for name, (_, spacing) in taken(10, "heun").items() if name != "zero-snr"}
    assert spacings == {"ddpm": "trailing", "sd": "karras", "edm": "karras", "flow": "trailing"}
    shifted = plan(FLOW, 10, shift=3.0)
    assert shifted.spacing == "trailing"
    close(shifted.times, grid(FLOW, 10, shift=3.0))
    with refused(r"solver must be auto or one of ddim, .*; got 'euler'"):
        plan(Karras(), 4, "euler")
    with refused(r"spacing must be one of .*; got 'leading'"):
        plan(Karras(), 4, "ddim", "leading")
