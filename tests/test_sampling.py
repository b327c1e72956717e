"""Steps, loops and SDEdit: Bayes' rule, orders of convergence, exact mixtures, diffusers' numbers."""

import math

import pytest
import torch
from denoisers import Counting, Eps, normal, seeded
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from refusals import refused
from torch import nn

from scorefield.denoiser import NetworkDenoiser, karras_denoiser
from scorefield.exact import GaussianMixture
from scorefield.langevin import corrected
from scorefield.metrics import mode_shares
from scorefield.randomness import normal_like
from scorefield.sampling import (
    ddim,
    ddpm,
    grid,
    heun,
    initial_noise,
    posterior_variance,
    sample,
    sdedit,
    transition_variance,
)
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
SD, FLOW = VariancePreserving.scaled_linear(), RectifiedFlow()
STEPS = {"ddim": ddim(), "ddim_half": ddim(0.5), "ddpm": ddpm(), "heun": heun()}
each_step = pytest.mark.parametrize("step", [ddim(), ddpm(), heun()], ids=["ddim", "ddpm", "heun"])


def leading(num_steps):
    """diffusers' grid for Stable Diffusion: leading spacing, offset 1."""
    return (torch.arange(num_steps, dtype=torch.float64) * (1000 // num_steps) + 1).flip(0)


def three_modes(schedule):
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.6]], dtype=torch.float64)
    return GaussianMixture(means, torch.full((3,), 0.15), torch.tensor([0.3, 0.4, 0.3]), schedule)


# Steps ----------------------------------------------------------------------------------------------------------


def bayes_posterior(schedule, x_t, x0, t, s):
    """Mean and variance of q(x_s | x_t, x0): two Gaussian observations of x_s combined by precision."""
    a_t, a_s, v_t, v_s = (f[:, None] for f in (schedule.alpha(t), schedule.alpha(s), schedule.sigma(t) ** 2,
                                               schedule.sigma(s) ** 2))  # fmt: skip
    step = a_t / a_s
    forward = v_t - step**2 * v_s
    variance = 1 / (1 / v_s + step**2 / forward)
    return variance * (a_s * x0 / v_s + step * x_t / forward), variance


@pytest.fixture
def transition(schedule, ratios):
    """x_t, t and a less noisy s, at several noise levels in one batch."""
    return normal(len(ratios) - 1, 2), schedule.time(ratios[1:]), schedule.time(ratios[:-1])


def test_ddpm_samples_the_bayes_posterior_and_so_does_ddim_with_eta_one(mixture, schedule, transition):
    x_t, t, s = transition
    mean, variance = bayes_posterior(schedule, x_t, mixture(x_t, t, {}), t, s)
    noise = normal(*x_t.shape, seed=5)
    for step in (ddpm(), ddim(1.0)):
        found = step(mixture, x_t, t, s, {}, seeded(5))
        close(found, mean + variance.sqrt() * noise, rtol=1e-9, atol=1e-9)
    close(posterior_variance(schedule, t, s)[:, None], variance, rtol=1e-9, atol=1e-12)
    large = ddpm(large_variance=True)(mixture, x_t, t, s, {}, seeded(5))
    forward = transition_variance(schedule, t, s)[:, None]
    close(large, mean + forward.sqrt() * noise, rtol=1e-9, atol=1e-9)
    ratio = schedule.alpha(t) / schedule.alpha(s)
    close(forward, (schedule.sigma(t) ** 2 - (ratio * schedule.sigma(s)) ** 2)[:, None])


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0])
def test_ddim_keeps_the_marginal_with_eta_squared_times_the_posterior_variance(schedule, transition, eta):
    """With x0 known, alpha_s x0 + noise of total variance sigma_s^2 at any eta (arXiv 2010.02502, Eq. 7).

    eta itself in the place of eta^2 is a slip found in public code: it agrees only at 0 and 1.
    """
    x_t, t, s = transition
    x0, noise = normal(*x_t.shape, seed=9), normal(*x_t.shape, seed=7)
    oracle = Counting(lambda x_t, t, cond: x0, schedule)
    x_t = schedule.diffuse(x0, noise, t)
    _, variance = bayes_posterior(schedule, x_t, x0, t, s)
    kept = (schedule.sigma(s)[:, None] ** 2 - eta**2 * variance).sqrt()
    expected = schedule.alpha(s)[:, None] * x0 + kept * noise + eta * variance.sqrt() * normal(*x_t.shape, seed=5)
    close(ddim(eta)(oracle, x_t, t, s, {}, seeded(5)), expected, rtol=1e-8, atol=1e-8)


def test_ddim_is_euler_in_sigma_over_alpha(schedule, ratios, make_mixture):
    """So every schedule samples the trajectory of Karras et al.'s ODE, rescaled."""
    times = schedule.time(ratios.flip(0))
    u, levels, edm = 10 * normal(5, 2), ratios.flip(0), make_mixture(Karras())
    x_t = schedule.alpha(times[:1])[0] * u
    for sigma, below in zip(levels, [*levels[1:], torch.zeros(())], strict=True):
        u = u + (below - sigma) * (u - edm(u, sigma.expand(5), {})) / sigma
    close(sample(make_mixture(schedule), x_t, {}, times=times), u, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("step", "order"), [(ddim(), 1), (heun(), 2)], ids=["ddim", "heun"])
def test_order_of_convergence_on_a_gaussian(schedule, step, order):
    """The probability-flow ODE of N(m, s^2) is u(r) = m + (u(R) - m) sqrt((s^2 + r^2) / (s^2 + R^2))."""
    mean, std, high, low = 0.7, 0.5, 10.0, 0.1
    gaussian = GaussianMixture(torch.full((1, 1), mean).double(), torch.tensor([std]), torch.ones(1), schedule)
    u = torch.tensor([[-8.0], [5.0], [12.0]], dtype=torch.float64)
    at_low = mean + (u - mean) * math.sqrt((std**2 + low**2) / (std**2 + high**2))
    exact = mean + std**2 / (std**2 + low**2) * (at_low - mean)
    errors = []
    for num_steps in (20, 40, 80):
        times = schedule.time(torch.logspace(math.log10(high), math.log10(low), num_steps + 1).double())
        found = sample(gaussian, schedule.alpha(times[0]) * u, {}, times=times, step=step)
        errors.append((found - exact).abs().max())
    assert torch.stack(errors).log2().diff()[-1].item() == pytest.approx(-order, abs=0.15)


def test_steps_at_the_ends_of_time(make_mixture, mixture, transition):
    """Heun is Euler where there is no slope: from pure noise of a flow (alpha = 0), and to its clean end."""
    flow, x_t, ends = make_mixture(FLOW), normal(3, 2), torch.tensor([1.0, 0.5, 0.0]).double()
    for t, s in ((ends[0], ends[1]), (ends[1], ends[2])):
        close(*(step(flow, x_t, t.expand(3), s.expand(3), {}, None) for step in (heun(), ddim())))
    x_t, t, _ = transition
    for step in STEPS.values():
        assert torch.equal(step(mixture, x_t, t, None, {}, None), mixture(x_t, t, {}))
    for eta in (-0.1, 1.1):
        with refused(rf"eta must lie in \[0, 1\]; got {eta}"):
            ddim(eta)


# Loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_samples_of_pure_noise_are_the_data(schedule, step, generator):
    mixture, times = three_modes(schedule), grid(schedule, 40)
    noise = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    x_t = initial_noise(schedule, noise, times[0])
    close(x_t, (schedule.t_max if isinstance(schedule, Karras) else 1.0) * noise)
    x0 = sample(mixture, x_t, {}, times=times, step=step, generator=generator)
    close(mode_shares(x0, mixture), mixture.weights, rtol=0, atol=0.05)
    nearest = mixture.means[mixture.component(x0)]
    assert ((x0 - nearest).std(0) < 0.2).all()
    assert ((x0 - nearest).mean(0).abs() < 0.03).all()


def test_loops_cost_what_they_say_and_follow_the_generator(mixture, schedule, generator):
    times = grid(schedule, 6, low=0.1, high=0.9)
    for run, num_calls in (
        *((lambda denoiser, step=step: sample(denoiser, normal(2, 2), {}, times=times, step=step,
                                              generator=generator), calls)
          for step, calls in ((ddim(), 6), (ddpm(), 6), (heun(), 11))),
        (lambda denoiser: sdedit(denoiser, normal(4, 2), {}, times=times, generator=generator), 6),
    ):  # fmt: skip
        counting = Counting(mixture)
        run(counting)
        assert len(counting.calls) == num_calls
    draws = [
        sample(mixture, normal(4, 2), {}, times=times, step=ddpm(), generator=seeded(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@each_step
def test_sampling_is_differentiable_and_checkpointing_changes_no_gradient(mixture, schedule, step, random_network):
    times = grid(schedule, 3, low=0.2, high=0.7)

    def run(x_t):
        return sample(mixture, x_t, {}, times=times, step=step, generator=seeded(3))

    assert torch.autograd.gradcheck(run, normal(2, 2).requires_grad_(), eps=1e-6, atol=1e-5)
    gradients = []
    for checkpoint in (False, True):
        network, x_t = random_network(dtype=torch.float64), normal(4, 2).requires_grad_()
        x0 = sample(
            NetworkDenoiser(network, schedule, "x0"), x_t, {"class_labels": torch.arange(4) % 2},
            times=grid(schedule, 4, low=0.1, high=0.9), step=step, generator=seeded(3), checkpoint=checkpoint,
        )  # fmt: skip
        x0.square().sum().backward()
        gradients.append([x_t.grad, *(p.grad for p in network.parameters())])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


@pytest.mark.parametrize("generators", [seeded, lambda seed: [seeded(seed + row) for row in range(4)]])
def test_noise_within_a_step_is_drawn_again_where_the_step_is_computed_again(mixture, schedule, generators):
    """A corrector's gradient depends on its noise; DDPM's does not, which is added last."""
    found = []
    for checkpoint in (False, True):
        x_t, generator = normal(4, 2).requires_grad_(), generators(3)
        x0 = sample(
            mixture, x_t, {}, times=grid(schedule, 3, low=0.1, high=0.7), step=corrected(ddim(), num_steps=2),
            generator=generator, checkpoint=checkpoint,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(x0.square().sum(), x_t)
        found.append((x0, gradient, normal_like(x_t, generator)))
    assert all(map(torch.equal, *found)), "image, gradient, and what is drawn next"


@pytest.mark.parametrize("times", [torch.tensor([]), torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5]),
                                   torch.ones(1, 1)])  # fmt: skip
def test_times_that_do_not_fall_raise(mixture, times):
    with refused("times must be a strictly decreasing vector, noisiest first; got"):
        sample(mixture, normal(2, 2), {}, times=times)


# SDEdit ---------------------------------------------------------------------------------------------------------


@each_step
def test_sdedit_changes_nothing_outside_the_mask_nor_without_times(mixture, schedule, step, generator):
    image, mask = normal(64, 2), torch.rand(64, 2, generator=generator) < 0.5
    settings = {"generator": generator, "step": step}
    result = sdedit(mixture, image, {}, times=grid(schedule, 10, high=0.7), mask=mask, **settings)
    assert torch.equal(result[~mask], image[~mask])
    assert ((result[mask] - image[mask]).abs() > 1e-9).all()
    assert torch.equal(sdedit(mixture, image, {}, times=torch.tensor([]), **settings), image)


def test_known_part_is_as_noisy_as_the_part_being_made(mixture, schedule, generator):
    """At every call, outside the mask, (x_t - alpha image) / sigma is standard normal and fresh."""
    image, mask, watching = normal(4000, 2), torch.tensor([False, True]).expand(4000, 2), Counting(mixture)
    sdedit(watching, image, {}, times=grid(schedule, 5, low=0.2, high=0.9), generator=generator, mask=mask)
    seen = [
        (x_t - schedule.alpha(t)[:, None] * image) / schedule.sigma(t)[:, None] for x_t, t, _ in watching.calls
    ]
    correlation = torch.cov(torch.stack(seen)[:, :, 0])
    close(correlation, torch.eye(5, dtype=torch.float64), rtol=0, atol=0.12)


def test_stronger_sdedit_is_further_from_the_image_and_nearer_to_the_data(generator):
    """Measured for strengths .05, .2, .5, 1: NLL 10.1, 1.6, .12, -.06 and distance .64, 1.12, 1.67, 2.22."""
    mixture, image = three_modes(SD), 4 * torch.rand(400, 2, generator=generator, dtype=torch.float64) - 2
    distance, nll = [], []
    for strength in (0.05, 0.2, 0.5, 1.0):
        result = sdedit(mixture, image, {}, times=grid(SD, 50, high=strength), generator=seeded(1))
        distance.append((result - image).norm(dim=1).mean())
        nll.append(-mixture.log_density(result, torch.zeros(400)).mean())
    assert (torch.stack(distance).diff() > 0).all()
    assert (torch.stack(nll).diff() < 0).all()
    assert distance[-1] / distance[0] > 2
    assert nll[0] - nll[-1] > 5


@pytest.mark.parametrize("checkpoint", [False, True])
def test_sdedit_is_differentiable_in_the_image(mixture, schedule, checkpoint):
    times, mask = grid(schedule, 3, low=0.2, high=0.6), torch.tensor([[True, False], [True, True]])
    settings = {"times": times, "mask": mask, "checkpoint": checkpoint}

    def run(image):
        return sdedit(mixture, image, {}, generator=seeded(3), **settings)

    assert torch.autograd.gradcheck(run, normal(2, 2).requires_grad_(), eps=1e-6, atol=1e-5)


# Parity with diffusers, in float32 ------------------------------------------------------------------------------

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
NOISE = normal(2, 3, 4, 4, dtype=torch.float32)


def eps_of(x, t):
    return Eps()(x, torch.as_tensor(t, dtype=torch.float32).expand(len(x)))


def alike(ours, theirs):
    close(ours, theirs, rtol=1e-5, atol=1e-5 * max(1, theirs.abs().max().item()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers_ddim(eta, kind):
    scheduler = DDIMScheduler(**BETAS, **LEADING, clip_sample=False, set_alpha_to_one=True, prediction_type=kind)
    scheduler.set_timesteps(20)
    x, generator = NOISE, seeded(2)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_of(x, t), t, x, eta=eta, generator=generator).prev_sample
    ours = NetworkDenoiser(Eps(), SD, {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[kind])
    alike(sample(ours, NOISE, {}, times=leading(20), step=ddim(eta), generator=seeded(2)), x)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_is_diffusers_ddpm(variance):
    scheduler = DDPMScheduler(**BETAS, **LEADING, clip_sample=False, variance_type=variance)
    scheduler.set_timesteps(20)
    ours, step = NetworkDenoiser(Eps(), SD), ddpm(large_variance=variance == "fixed_large")
    for i, t in enumerate(scheduler.timesteps[:-1]):
        theirs = scheduler.step(eps_of(NOISE, t), t, NOISE, generator=seeded(2)).prev_sample
        now, following = (leading(20)[j].expand(2) for j in (i, i + 1))
        alike(step(ours, NOISE, now, following, {}, seeded(2)), theirs)


@pytest.mark.parametrize(("kind", "step"), [(EulerDiscreteScheduler, ddim()), (HeunDiscreteScheduler, heun())])
def test_euler_and_heun_are_diffusers(kind, step):
    """These schedulers hold x / alpha, and scale the network's input back."""
    scheduler = kind(**BETAS, **LEADING)
    scheduler.set_timesteps(20)
    x = NOISE / SD.alpha(leading(20)[:1]).float()
    for t in scheduler.timesteps:
        x = scheduler.step(eps_of(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    alike(sample(NetworkDenoiser(Eps(), SD), NOISE, {}, times=leading(20), step=step), x)


def test_karras_sampling_is_diffusers_edm_euler():
    """Of a smooth raw EDM network F(c_in x, c_noise)."""

    class Raw(nn.Module):
        def forward(self, x, c_noise):
            return torch.sin(2 * x.flip(1) + c_noise.to(x)[:, None, None, None])

    scheduler, schedule, raw = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5), Karras(), Raw()
    scheduler.set_timesteps(20)
    close(grid(schedule, 20, spacing="uniform").float(), scheduler.sigmas[:-1], rtol=1e-5, atol=0)
    x = x_t = initial_noise(schedule, NOISE, 80.0)
    for t in scheduler.timesteps:
        x = scheduler.step(raw(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
    x0 = sample(karras_denoiser(raw, schedule), x_t, {}, times=scheduler.sigmas[:-1].double())
    close(x0, x, rtol=1e-5, atol=1e-5 * 80)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sampling_is_diffusers_flow_match_euler(shift):
    scheduler, x = FlowMatchEulerDiscreteScheduler(shift=shift), NOISE
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_of(x, t), t, x).prev_sample
    ours = NetworkDenoiser(Eps(), FLOW, "flow", time_scale=1000)
    alike(sample(ours, NOISE, {}, times=scheduler.sigmas[:-1].double()), x)
