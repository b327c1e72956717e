"""DPM-Solver++ and UniPC: order, diffusers' numbers, ends of time, gradients."""

import math
from itertools import pairwise

import pytest
import torch
from denoisers import Counting, Eps, normal, seeded
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from refusals import refused
from schedules import ZERO_SNR

from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.grids import grid
from scorefield.sampling import ddim, heun, sample, sdedit
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.solvers import dpm_solver, unipc

close = torch.testing.assert_close
SOLVERS = {"ddim": ddim(), "heun": heun(), "dpm++": dpm_solver(), "unipc": unipc()}
multistep = pytest.mark.parametrize("solver", [SOLVERS["dpm++"], SOLVERS["unipc"]], ids=["dpm++", "unipc"])


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++", 2), ("unipc", 3)])
def test_order_of_convergence_on_a_gaussian(schedule, solver, order):
    """UniC of order p raises the order to p + 1 (arXiv 2302.04867, Theorem 3.1).

    The x0 that a sampler returns is one call without a step after it, so that the corrected state is read off it.
    The ODE's solution in u = x / alpha between two levels r, R is m + (u - m) sqrt((s^2 + r^2) / (s^2 + R^2)).
    """
    mean, std, high, low, u = 0.7, 0.5, 10.0, 0.1, torch.tensor([[-8.0], [5.0], [12.0]], dtype=torch.float64)
    gaussian = GaussianMixture(torch.full((1, 1), mean).double(), torch.tensor([std]), torch.ones(1), schedule)
    exact = mean + (u - mean) * math.sqrt((std**2 + low**2) / (std**2 + high**2))
    errors = []
    for num_steps in (40, 80, 160):
        levels = torch.logspace(math.log10(high), math.log10(low), num_steps + 1, dtype=torch.float64)
        times = schedule.time(levels)
        states = states_of(SOLVERS[solver], gaussian, schedule.alpha(times[0]) * u, times)
        errors.append((states[-1] / schedule.alpha(times[-1]) - exact).abs().max())
    assert torch.stack(errors).log2().diff()[-1].item() == pytest.approx(-order, abs=0.2)


def states_of(solver, denoiser, x_t, times):
    """Every x_t of a run, the corrected ones where there are such."""
    if not hasattr(solver, "advance"):
        states = [x_t]
        for t, s in pairwise(t.expand(len(x_t)) for t in times):
            states.append(solver(denoiser, states[-1], t, s, {}, None))
        return states
    points, states = (), []
    for t, s in zip(times, [*times[1:], times[-1] * 0.99], strict=True):
        x_t, points = solver.advance(denoiser, points, x_t, t.expand(len(x_t)), s.expand(len(x_t)), {})
        states.append(points[-1].x_t)
    return states


def test_a_step_of_dpm_solver_is_its_formula(schedule, mixture):
    """arXiv 2211.01095, Algorithm 2: D = (1 + 1/2r) x0 - 1/2r x0_before, r = h_before / h, and Eq. 15's step."""
    times = schedule.time(torch.tensor([5.0, 2.0, 0.7], dtype=torch.float64))
    (t0, t1, t2), x0 = (t.expand(3) for t in times), normal(3, 2)
    x1 = ddim()(mixture, x0, t0, t1, {}, None)
    h_before, h = math.log(5 / 2), math.log(2 / 0.7)
    r = h_before / h
    d = (1 + 1 / (2 * r)) * mixture(x1, t1, {}) - 1 / (2 * r) * mixture(x0, t0, {})
    a1, a2, s1, s2 = schedule.alpha(t1)[0], schedule.alpha(t2)[0], schedule.sigma(t1)[0], schedule.sigma(t2)[0]
    x2 = s2 / s1 * x1 - a2 * math.expm1(-h) * d
    close(a1 / s1 * math.exp(h), a2 / s2)
    close(sample(mixture, x0, {}, times=times, step=dpm_solver()), mixture(x2, t2, {}))


def test_unipc_corrects_by_the_parabola_through_its_answers(schedule):
    """x0 that is a parabola in lambda is integrated exactly, whatever state it is asked at."""

    def parabola(lam):
        return 1 - 0.3 * lam + 0.2 * lam**2

    levels = torch.tensor([5.0, 2.0, 0.7, 0.3], dtype=torch.float64)
    times = schedule.time(levels)
    asked = Counting(lambda x_t, t, cond: parabola(-schedule.ratio(t).log()[:, None]).expand_as(x_t), schedule)
    states = states_of(unipc(), asked, normal(2, 1), times)
    for index in (2, 3):
        lam = torch.linspace(-math.log(levels[index - 1]), -math.log(levels[index]), 200001, dtype=torch.float64)
        integral = torch.trapezoid(lam.exp() * parabola(lam), lam)
        before, after = schedule.sigma(times[index - 1]), schedule.sigma(times[index])
        close(states[index], after / before * states[index - 1] + after * integral, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_steps", [2, 5, 20])
@pytest.mark.parametrize(("kind", "solver"), [
    (DPMSolverMultistepScheduler, "dpm++"), (UniPCMultistepScheduler, "unipc"),
], ids=["dpm++", "unipc"])  # fmt: skip
def test_solvers_are_diffusers(kind, solver, num_steps):
    schedule, x = VariancePreserving.scaled_linear(), normal(2, 3, 4, 4)
    scheduler = kind(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(num_steps)
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(Eps()(theirs, t.expand(2)), t, theirs).prev_sample
    times = scheduler.timesteps.double()
    ours = sample(NetworkDenoiser(Eps(), schedule), x, {}, times=times, step=SOLVERS[solver])
    close(ours, theirs.double(), rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@multistep
@pytest.mark.parametrize("schedule", [RectifiedFlow(), ZERO_SNR], ids=["flow", "zero-snr"])
def test_the_first_step_from_pure_noise_is_first_order(schedule, solver, make_mixture):
    """lambda is minus infinity there, so no line leads from it; three calls leave one second-order step.

    At the last time of a flow's whole range, where lambda is infinite, the call returns what it is given.
    """
    mixture, x_t = make_mixture(schedule), normal(5, 2)
    for num_steps in (1, 2):
        times = grid(schedule, num_steps)
        close(sample(mixture, x_t, {}, times=times, step=solver), sample(mixture, x_t, {}, times=times))
    runs = [sample(mixture, x_t, {}, times=grid(schedule, 4), step=step) for step in (solver, ddim())]
    assert all(bool(run.isfinite().all()) for run in runs)
    assert (runs[0] - runs[1]).abs().max() > 1e-3
    if isinstance(schedule, RectifiedFlow):
        times = torch.tensor([0.9, 0.6, 0.3, 0.0]).double()
        with_end, without = (sample(mixture, x_t, {}, times=one, step=solver) for one in (times, times[:-1]))
        close(with_end, without, rtol=1e-6, atol=1e-6)


@multistep
def test_each_step_costs_one_call_and_every_schedule_samples_one_trajectory(
    mixture, schedule, solver, make_mixture, ratios
):
    """x0 depends on x / alpha and sigma / alpha alone, and so must every step."""
    counting, times = Counting(mixture), grid(schedule, 6)
    sample(counting, normal(2, 2), {}, times=times, step=solver)
    assert [float(t[0]) for _, t, _ in counting.calls] == times.tolist()
    levels, u = ratios.flip(0), 10 * normal(5, 2)
    ours, theirs = (
        sample(make_mixture(one), one.alpha(one.time(levels[:1]))[0] * u, {}, times=one.time(levels), step=solver)
        for one in (schedule, Karras())
    )
    close(ours, theirs, rtol=1e-9, atol=1e-9)


@multistep
def test_solvers_are_differentiable_and_checkpointing_changes_no_gradient(
    mixture, schedule, solver, random_network
):
    times = grid(schedule, 4, low=0.2, high=0.7)

    def run(x_t):
        return sample(mixture, x_t, {}, times=times, step=solver)

    assert torch.autograd.gradcheck(run, normal(2, 2).requires_grad_(), eps=1e-6, atol=1e-5)
    gradients = []
    for checkpoint in (False, True):
        network, x_t = random_network(dtype=torch.float64), normal(4, 2).requires_grad_()
        denoiser, cond = NetworkDenoiser(network, schedule, "x0"), {"class_labels": torch.arange(4) % 2}
        x0 = sample(denoiser, x_t, cond, times=times, step=solver, checkpoint=checkpoint)
        x0.square().sum().backward()
        gradients.append([x_t.grad, *(p.grad for p in network.parameters())])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


@multistep
def test_solvers_edit_images_but_not_under_a_mask(mixture, schedule, solver, generator):
    image, times = mixture.sample(4, generator), grid(schedule, 5, high=0.6)
    edited = sdedit(mixture, image, {}, times=times, generator=seeded(1), step=solver)
    x_t = schedule.diffuse(image, normal(4, 2, seed=1), times[0].expand(4))
    close(edited, sample(mixture, x_t, {}, times=times, step=solver))
    with refused("a mask needs a sampler without memory"):
        sdedit(mixture, image, {}, times=times, generator=generator, step=solver, mask=image > 0)
