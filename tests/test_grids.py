"""Sampling grids on every schedule: where they start, how they are spaced, that no call is wasted at the end."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from schedules import ZERO_SNR

from scorefield.grids import LEVELS, grid
from scorefield.sampling import grid as grid_of_sampling
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
SD = VariancePreserving.scaled_linear()
CONTINUOUS = VariancePreserving(VariancePreserving.linear().alphas_cumprod, integer=False)
SPACINGS = ("uniform", "trailing", "karras", "log-snr")


def test_trailing_timesteps_are_diffusers():
    """Rounding included: 16 steps of 62.5 round half of them up and half of them down."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", steps_offset=0)
    for num_steps in (1, 2, 3, 4, 7, 16, 50, 999, 1000):
        scheduler.set_timesteps(num_steps)
        assert grid(SD, num_steps).tolist() == scheduler.timesteps.tolist()
    assert grid(SD, 4).tolist() == [999, 749, 499, 249]
    assert grid(SD, 1).tolist() == [999]


def test_karras_timesteps_are_diffusers_but_for_the_last():
    """Theirs spend the last of five on the clean end, timestep 0; between they agree to the rounding."""
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


@pytest.mark.parametrize("schedule", [Karras(), RectifiedFlow(), CONTINUOUS], ids=repr)
def test_log_snr_multiplies_the_noise_level_by_the_same_factor(schedule):
    """From the largest useful level, whose place pure noise takes, towards the smallest, which is left out."""
    lowest = max(float(schedule.ratio(torch.tensor(schedule.t_min))), LEVELS[0])
    highest = min(float(schedule.ratio(torch.tensor(schedule.t_max))), LEVELS[1])
    times = grid(schedule, 7, spacing="log-snr")
    assert times[0] == schedule.t_max
    powers = torch.arange(1, 7, dtype=torch.float64) / 7
    close(schedule.ratio(times[1:]), highest * (lowest / highest) ** powers)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "schedule", [SD, ZERO_SNR, VariancePreserving.cosine(), Karras(), RectifiedFlow()], ids=repr
)
def test_every_grid_falls_from_pure_noise_in_as_many_times_as_asked(schedule, spacing):
    for num_steps in (1, 2, 3, 10, 50, 400):
        times = grid(schedule, num_steps, spacing=spacing)
        assert times.shape == (num_steps,)
        assert times.dtype == torch.float64
        assert times[0] == pytest.approx(schedule.t_max)
        assert times[-1] >= schedule.t_min
        assert (times.diff() < 0).all()
        assert not schedule.cell or torch.equal(times, times.round())
        assert schedule.sigma(times[-1]) > 0
        if spacing != "uniform" and 1 < num_steps < 50:
            assert times[-1] > schedule.t_min, "a call at the clean end changes next to nothing"


def test_pure_noise_has_an_infinite_level_and_takes_the_place_of_the_largest():
    for schedule in (ZERO_SNR, RectifiedFlow()):
        times = grid(schedule, 4, spacing="log-snr")
        assert schedule.alpha(times[0]) == 0
        lowest = max(float(schedule.ratio(torch.tensor(schedule.t_min))), LEVELS[0])
        second = LEVELS[1] * (lowest / LEVELS[1]) ** 0.25
        close(times[1], schedule.snap(schedule.time(torch.tensor(second, dtype=torch.float64))))


def test_times_that_round_to_the_same_integer_are_spread_to_their_neighbours():
    """Low noise levels of log-snr lie closer together than timesteps."""
    times = grid(SD, 60, spacing="log-snr")
    wanted = VariancePreserving(SD.alphas_cumprod, integer=False)
    exact = grid(wanted, 60, spacing="log-snr")
    assert len(exact.round().unique()) < 60
    assert (times.diff() <= -1).all()
    clear = exact > 60
    close(times[clear], exact[clear].round())


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_part_of_the_range_has_both_its_ends(schedule, spacing):
    times = grid(schedule, 3, low=0.2, high=0.6, spacing=spacing)
    close(times[[0, -1]], schedule.at(torch.tensor([0.6, 0.2], dtype=torch.float64)))
    if spacing in ("uniform", "trailing") and not schedule.cell:
        close(times[1], schedule.at(torch.tensor(0.4)))


def test_no_call_of_a_flow_is_spent_at_its_clean_end():
    """At sigma = 0 a denoiser returns what it is given."""
    for spacing in ("uniform", "trailing"):
        close(grid(RectifiedFlow(), 4, spacing=spacing), torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
    close(grid(RectifiedFlow(), 2, high=0.5), torch.tensor([0.5, 0.25], dtype=torch.float64))
    close(grid(RectifiedFlow(), 2, low=0.1), torch.tensor([1.0, 0.1], dtype=torch.float64))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_shifted_grid_has_its_noise_levels_multiplied(schedule, spacing):
    plain, shifted = (grid(schedule, 6, high=0.8, shift=shift, spacing=spacing) for shift in (1.0, 3.0))
    if schedule.cell:
        assert torch.equal(shifted, shifted.round())
        close(shifted, schedule.time(3 * schedule.ratio(plain)), atol=0.5, rtol=0)
    else:
        close(schedule.ratio(shifted), 3 * schedule.ratio(plain))


def test_sd3s_shift_is_its_formula():
    """arXiv 2403.03206, Eq. 23; pure noise stays pure noise."""
    t = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    close(grid(RectifiedFlow(), 4, shift=3.0), 3 * t / (1 + 2 * t))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_grid_of_more_steps_than_times_raises(spacing):
    assert grid(SD, 1000, spacing=spacing).tolist() == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="fewer than 1001 distinct times"):
        grid(SD, 1001, spacing=spacing)
    with pytest.raises(ValueError, match="fewer than 30 distinct times"):
        grid(SD, 30, high=0.02, spacing=spacing)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_steps": 0}, "num_steps must be at least 1; got 0"), ({"shift": 0.0}, "shift must be above 0; got 0"),
    ({"low": 0.5, "high": 0.4}, "0 <= low <= high <= 1; got low=0.5, high=0.4"),
    ({"high": 1.5}, "got low=0.0, high=1.5"),
    ({"low": math.nan}, "got low=nan"),
    ({"spacing": "leading"}, "spacing must be one of uniform, .*; got 'leading'"),
])  # fmt: skip
def test_numbers_out_of_range_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        grid(**{"schedule": SD, "num_steps": 4, **changes})


def test_where_the_samplers_are_the_grid_is():
    assert grid_of_sampling is grid
