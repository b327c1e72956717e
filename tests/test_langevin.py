"""Langevin dynamics: the bias of a step, a score by Tweedie's formula, weights of modes, a corrector's step."""

import pytest
import torch
from denoisers import normal, seeded
from refusals import refused

from scorefield.exact import GaussianMixture
from scorefield.langevin import annealed_langevin, correct, corrected, corrector_step, denoiser_score, langevin
from scorefield.metrics import mode_shares
from scorefield.sampling import ddim, grid, initial_noise, sample
from scorefield.schedule import Karras, VariancePreserving
from scorefield.solvers import dpm_solver

close = torch.testing.assert_close


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_the_variance_of_a_normal_is_that_of_the_theory(step):
    """x' = (1 - step / 2) x + sqrt(step) z has the stationary variance 1 / (1 - step / 4)."""
    chains = langevin(
        lambda x: -x, torch.zeros(150_000, 1), step=step, num_steps=int(6 / step), generator=seeded()
    )
    close(float(chains.var()), 1 / (1 - step / 4), rtol=0.01, atol=0)


def test_the_score_of_a_denoiser_is_the_gradient_of_the_log_density(mixture, schedule, ratios):
    t, x = schedule.time(ratios), normal(9, 2).requires_grad_()
    (wanted,) = torch.autograd.grad(mixture.log_density(x, t).sum(), x)
    close(denoiser_score(mixture, x.detach(), t, {}), wanted, rtol=1e-9, atol=1e-9)


def test_the_step_of_the_corrector_is_twice_the_square_of_the_ratio_of_norms():
    score, noise = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 8.0]])
    assert float(corrector_step(score, noise, 0.1)) == pytest.approx(2 * (0.1 * 5.0 / 2.5) ** 2)


def test_correcting_brings_a_wrong_spread_to_that_of_the_noise_level():
    """At any level a long chain of correctors has the variance that the schedule gives the data."""
    schedule = VariancePreserving.linear()
    teacher = GaussianMixture(torch.zeros(1, 8).double(), torch.full((1,), 0.5), torch.ones(1), schedule)
    t = schedule.time(torch.tensor(0.7)).expand(3000)
    wanted = float((0.5 * schedule.alpha(t[0])) ** 2 + schedule.sigma(t[0]) ** 2)
    for start in (0.3, 0.8):
        x = correct(teacher, start * normal(3000, 8), t, {}, snr=0.1, num_steps=120, generator=seeded(1))
        # e = 2 (0.1 |z| / |s|)^2 is 0.02 of the variance: a bias of 1 / (1 - e / 2), one percent.
        close(float(x.var()), wanted * 1.01, rtol=0.04, atol=0)


def two_modes(schedule):
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    return GaussianMixture(means, torch.full((2,), 0.15), torch.tensor([0.25, 0.75]), schedule)


def test_annealing_finds_the_weights_of_the_modes_and_their_spread():
    teacher = two_modes(Karras(t_min=0.02, t_max=10.0))
    times = grid(teacher.schedule, 40)
    x_t = initial_noise(teacher.schedule, normal(1500, 2), times[0])
    made = annealed_langevin(teacher, x_t, {}, times=times, snr=0.3, num_steps=10, generator=seeded(1))
    close(
        mode_shares(made, teacher), teacher.weights / teacher.weights.sum(), rtol=0, atol=0.04, check_dtype=False
    )
    near = made[teacher.component(made) == 1] - teacher.means[1]
    assert 0.12 < float(near.std()) < 0.2


def test_the_corrector_widens_what_few_steps_have_narrowed():
    """Of modes of .15, ten steps of DDIM leave .094, and two corrector steps after each bring back .13."""
    teacher = two_modes(VariancePreserving.scaled_linear())
    times = grid(teacher.schedule, 10, spacing="uniform")
    x_t = initial_noise(teacher.schedule, normal(2000, 2), times[0])

    def spread(step):
        made = sample(teacher, x_t, {}, times=times, step=step, generator=seeded(1))
        return float((made - teacher.means[teacher.component(made)]).std())

    plain, both = spread(ddim()), spread(corrected(ddim(), snr=0.2, num_steps=2))
    assert plain < 0.11
    assert plain + 0.02 < both < 0.16
    close(spread(corrected(ddim(), num_steps=0)), plain, rtol=0, atol=0)


def test_what_cannot_work_is_refused():
    with refused("step > 0 and num_steps >= 0; got step=0"):
        langevin(lambda x: x, torch.zeros(1, 1), step=0, num_steps=1)
    with refused("sampler without memory"):
        corrected(dpm_solver())
    with refused("snr > 0"):
        corrected(ddim(), snr=0)
