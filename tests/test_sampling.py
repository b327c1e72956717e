import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from torch import nn

from scorefield.denoiser import NetworkDenoiser, karras_denoiser
from scorefield.exact import GaussianMixture
from scorefield.metrics import mode_shares
from scorefield.sampling import (
    ddim,
    ddpm,
    grid,
    heun,
    initial_noise,
    invert,
    posterior_variance,
    sample,
    sdedit,
    transition_variance,
)
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
SD = VariancePreserving.scaled_linear()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def leading(num_steps):
    """diffusers' grid for Stable Diffusion: leading spacing, offset 1."""
    return (torch.arange(num_steps, dtype=torch.float64) * (1000 // num_steps) + 1).flip(0)


@pytest.fixture
def three_modes():
    """The mixture that research/seed_systems.md section 9 measured inversion and SDEdit on."""

    def make(schedule):
        means = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.6]], dtype=torch.float64)
        return GaussianMixture(means, torch.full((3,), 0.15), torch.tensor([0.3, 0.4, 0.3]), schedule)

    return make


@pytest.fixture
def descending(schedule, ratios):
    return schedule.time(ratios.flip(0))


class Counting:
    """Counts the calls of a denoiser."""

    def __init__(self, denoiser):
        self.denoiser, self.schedule, self.num_calls = denoiser, denoiser.schedule, 0

    def __call__(self, x_t, t, cond):
        self.num_calls += 1
        return self.denoiser(x_t, t, cond)


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


def test_ddpm_samples_the_bayes_posterior(mixture, schedule, transition):
    x_t, t, s = transition
    mean, variance = bayes_posterior(schedule, x_t, mixture(x_t, t, {}), t, s)
    noise = normal(*x_t.shape, seed=5)
    x_s = ddpm()(mixture, x_t, t, s, {}, torch.Generator().manual_seed(5))
    close(x_s, mean + variance.sqrt() * noise, rtol=1e-9, atol=1e-9)
    close(posterior_variance(schedule, t, s)[:, None], variance, rtol=1e-9, atol=1e-12)
    large = ddpm(large_variance=True)(mixture, x_t, t, s, {}, torch.Generator().manual_seed(5))
    forward = transition_variance(schedule, t, s)[:, None]
    close(large, mean + forward.sqrt() * noise, rtol=1e-9, atol=1e-9)
    close(forward, schedule.sigma(t)[:, None] ** 2
          - (schedule.alpha(t) / schedule.alpha(s) * schedule.sigma(s))[:, None] ** 2)  # fmt: skip


def test_ddim_with_eta_one_is_ddpm(mixture, transition):
    x_t, t, s = transition
    ours, theirs = (step(mixture, x_t, t, s, {}, torch.Generator().manual_seed(5)) for step in (ddim(1.0), ddpm()))
    close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_ddim_noise_has_eta_squared_times_the_posterior_variance(mixture, schedule, transition, eta):
    """eta itself is a slip found in public code: it agrees only at 0 and 1."""
    x_t, t, s = transition
    first, second = (ddim(eta)(mixture, x_t, t, s, {}, torch.Generator().manual_seed(seed)) for seed in (5, 6))
    noise = normal(*x_t.shape, seed=5) - normal(*x_t.shape, seed=6)
    _, variance = bayes_posterior(schedule, x_t, x_t, t, s)
    close(((first - second) / noise) ** 2, (eta**2 * variance).expand_as(noise), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_marginal_when_the_denoiser_is_right(schedule, transition, eta):
    """With x0 known, alpha_s x0 + noise of total variance sigma_s^2 at any eta (arXiv 2010.02502, Eq. 7)."""
    x_t, t, s = transition
    x0 = normal(*x_t.shape, seed=9)

    class Oracle:
        def __call__(self, x_t, t, cond):
            return x0

    oracle = Oracle()
    oracle.schedule = schedule
    noise = normal(*x_t.shape, seed=7)
    x_t = schedule.diffuse(x0, noise, t)
    x_s = ddim(eta)(oracle, x_t, t, s, {}, torch.Generator().manual_seed(5))
    _, variance = bayes_posterior(schedule, x_t, x0, t, s)
    kept = (schedule.sigma(s)[:, None] ** 2 - eta**2 * variance).sqrt()
    expected = schedule.alpha(s)[:, None] * x0 + kept * noise + eta * variance.sqrt() * normal(*x_t.shape, seed=5)
    close(x_s, expected, rtol=1e-8, atol=1e-8)


def test_ddim_is_euler_in_sigma_over_alpha(schedule, ratios, descending, make_mixture):
    """So every schedule samples the trajectory of Karras et al.'s ODE, rescaled."""
    u, levels, edm = 10 * normal(5, 2), ratios.flip(0), make_mixture(Karras())
    x_t = schedule.alpha(descending[:1])[0] * u
    for sigma, below in zip(levels, [*levels[1:], torch.zeros(())], strict=True):
        u = u + (below - sigma) * (u - edm(u, sigma.expand(5), {})) / sigma
    close(sample(make_mixture(schedule), x_t, {}, times=descending), u, rtol=1e-9, atol=1e-9)


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
        levels = torch.logspace(math.log10(high), math.log10(low), num_steps + 1, dtype=torch.float64)
        times = schedule.time(levels)
        errors.append(
            (sample(gaussian, schedule.alpha(times[0]) * u, {}, times=times, step=step) - exact).abs().max()
        )
    slopes = torch.stack(errors).log2().diff()
    assert slopes[-1].item() == pytest.approx(-order, abs=0.15)


def test_heun_is_euler_where_a_slope_does_not_exist(make_mixture):
    """From pure noise of a flow (alpha = 0), and to its clean end (sigma = 0)."""
    flow, x_t, ends = make_mixture(RectifiedFlow()), normal(3, 2), torch.tensor([1.0, 0.5, 0.0]).double()
    pairs = [(ends[0], ends[1]), (ends[1], ends[2])]
    for t, s in pairs:
        steps = [step(flow, x_t, t.expand(3), s.expand(3), {}, None) for step in (heun(), ddim())]
        close(steps[0], steps[1])


def test_steps_to_the_clean_image_return_the_denoised(mixture, transition):
    x_t, t, _ = transition
    for step in (ddim(), ddim(0.5), ddpm(), heun()):
        assert torch.equal(step(mixture, x_t, t, None, {}, None), mixture(x_t, t, {}))


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_outside_zero_and_one_raises(eta):
    with pytest.raises(ValueError, match=rf"eta must lie in \[0, 1\]; got {eta}"):
        ddim(eta)


# Loops ----------------------------------------------------------------------------------------------------------


def test_initial_noise_is_scaled_to_the_schedule(schedule):
    noise = normal(4, 2)
    factor = schedule.t_max if isinstance(schedule, Karras) else 1.0
    close(initial_noise(schedule, noise, schedule.t_max), factor * noise)


@pytest.mark.parametrize(("step", "num_calls"), [(ddim(), 6), (ddpm(), 6), (heun(), 11)])
def test_number_of_network_calls(mixture, schedule, step, num_calls, generator):
    counting = Counting(mixture)
    times = grid(schedule, 6, low=0.1, high=0.9)
    sample(counting, normal(2, 2), {}, times=times, step=step, generator=generator)
    assert counting.num_calls == num_calls


@pytest.mark.parametrize("step", [ddim(), ddim(0.5), ddpm(), heun()], ids=["ddim", "ddim_half", "ddpm", "heun"])
def test_samples_of_pure_noise_are_the_data(three_modes, schedule, step, generator):
    mixture, times = three_modes(schedule), grid(schedule, 40)
    x_t = initial_noise(schedule, torch.randn(2000, 2, generator=generator, dtype=torch.float64), times[0])
    x0 = sample(mixture, x_t, {}, times=times, step=step, generator=generator)
    close(mode_shares(x0, mixture), mixture.weights, rtol=0, atol=0.05)
    nearest = mixture.means[mixture.component(x0)]
    assert ((x0 - nearest).std(0) < 0.2).all()
    assert ((x0 - nearest).mean(0).abs() < 0.03).all()


def test_stochastic_samples_follow_the_generator(mixture, schedule):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample(mixture, normal(4, 2), {}, times=grid(schedule, 5), step=ddpm(), generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("step", [ddim(), ddpm(), heun()], ids=["ddim", "ddpm", "heun"])
def test_sampling_is_differentiable(mixture, schedule, step):
    times = grid(schedule, 3, low=0.2, high=0.7)

    def run(x_t):
        return sample(mixture, x_t, {}, times=times, step=step, generator=torch.Generator().manual_seed(3))

    assert torch.autograd.gradcheck(run, normal(2, 2).requires_grad_(), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("step", [ddim(), ddpm(), heun()], ids=["ddim", "ddpm", "heun"])
def test_checkpointing_changes_no_gradient(schedule, step, random_network):
    gradients = []
    for checkpoint in (False, True):
        network, x_t = random_network(dtype=torch.float64), normal(4, 2).requires_grad_()
        x0 = sample(
            NetworkDenoiser(network, schedule, "x0"), x_t, {"class_labels": torch.arange(4) % 2},
            times=grid(schedule, 4, low=0.1, high=0.9), step=step, generator=torch.Generator().manual_seed(3),
            checkpoint=checkpoint,
        )  # fmt: skip
        x0.square().sum().backward()
        gradients.append([x_t.grad, *(p.grad for p in network.parameters())])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize(
    "times", [torch.tensor([]), torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.5]), torch.ones(1, 1)]
)
def test_times_that_do_not_fall_raise(mixture, times):
    for loop in (sample, invert):
        with pytest.raises(ValueError, match="times must be a strictly decreasing vector, noisiest first; got"):
            loop(mixture, normal(2, 2), {}, times=times)


# Inversion ------------------------------------------------------------------------------------------------------


def round_trip(mixture, num_steps, iterations):
    """Relative RMSE of sampling from the inversion of 512 data points, the error of each, and the inversion."""
    x0, times = mixture.sample(512, torch.Generator().manual_seed(0)), leading(num_steps)
    inversion = invert(mixture, x0, {}, times=times, iterations=iterations)
    back = sample(mixture, inversion.x_t, {}, times=times)
    return ((back - x0).square().sum() / x0.square().sum()).sqrt().item(), (back - x0).norm(dim=1), inversion


@pytest.mark.parametrize(
    ("iterations", "low", "high"), [(0, 1e-2, 1e-1), (1, 1e-3, 5e-3), (3, 2e-5, 5e-4), (10, 0, 1e-5)]
)
def test_refinement_closes_the_round_trip_of_inversion(three_modes, iterations, low, high):
    """Measured medians over 5 seeds: 5.7e-2, 2.2e-3, 1.5e-4 and 8.7e-7."""
    error, _, _ = round_trip(three_modes(SD), 100, iterations)
    assert low <= error < high


def test_damping_keeps_refinement_from_diverging_at_few_steps(three_modes):
    """Undamped, ten refinements at ten steps are worse than none (.19 against .095)."""
    plain, refined = (round_trip(three_modes(SD), 10, n)[0] for n in (0, 10))
    assert refined < 3e-2 < 5e-2 < plain


def test_diverging_refinement_is_undone_then_damped():
    """One step of x_t = x_s - 3 x_t, whose plain iteration triples its error; the solution is x_s / 4."""

    class Linear(nn.Module):
        def forward(self, x_t, t):
            return -3 * x_t

    denoiser, x_s = NetworkDenoiser(Linear(), Karras()), normal(4, 2)
    found = [invert(denoiser, x_s, {}, times=torch.ones(1), iterations=n) for n in (0, 1, 3)]
    close(found[0].x_t, -2 * x_s)
    close(found[1].x_t, -2 * x_s)
    close(found[1].residual, torch.full((4,), 3.0, dtype=torch.float64))
    close(found[2].x_t, x_s / 4)
    close(found[2].residual, torch.zeros(4, dtype=torch.float64))


def test_residual_falls_with_refinement_and_foretells_the_round_trip(three_modes):
    trips = [round_trip(three_modes(SD), 50, n) for n in (1, 3, 10)]
    residuals = torch.stack([inversion.residual for _, _, inversion in trips])
    assert residuals.shape == (3, 512)
    assert (residuals.mean(1).diff() < 0).all()
    assert residuals[-1].mean() < 1e-2 * residuals[0].mean()
    for (_, error, _), residual in zip(trips[1:], residuals[1:], strict=True):
        assert (error < 3 * residual + 1e-9).all()
        assert torch.corrcoef(torch.stack([error.log(), residual.log()]))[0, 1] > 0.9


def test_inverted_noise_is_nearly_standard_normal(three_modes):
    """Nearly: a hundred steps of DDIM do not map the normal exactly to the data either."""
    x_t = round_trip(three_modes(SD), 100, 1)[2].x_t
    close(x_t.std(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=0.15)
    close(x_t.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=0.15)


def test_sampling_from_any_point_of_the_trajectory_returns_to_the_image(three_modes):
    mixture, times = three_modes(SD), leading(50)
    x0 = mixture.sample(32, torch.Generator().manual_seed(0))
    inversion = invert(mixture, x0, {}, times=times, iterations=10)
    assert len(inversion.trajectory) == len(times)
    assert inversion.trajectory[0] is inversion.x_t
    for i in (0, 10, 30, 49):
        close(sample(mixture, inversion.trajectory[i], {}, times=times[i:]), x0, rtol=0, atol=2e-3)


def test_inversion_round_trips_on_every_schedule(three_modes, schedule):
    mixture = three_modes(schedule)
    x0, times = mixture.sample(64, torch.Generator().manual_seed(0)), grid(schedule, 40, low=0.1, high=0.8)
    inversion = invert(mixture, x0, {}, times=times, iterations=8)
    error = (sample(mixture, inversion.x_t, {}, times=times) - x0).norm(dim=1)
    assert (error < 3 * inversion.residual + 1e-9).all()
    assert error.median() < 5e-2


def test_each_sample_is_refined_for_itself(three_modes):
    mixture = three_modes(SD)
    x0 = mixture.sample(6, torch.Generator().manual_seed(0))
    together = invert(mixture, x0, {}, times=leading(10), iterations=5)
    alone = [invert(mixture, x, {}, times=leading(10), iterations=5) for x in x0.split(1)]
    close(together.x_t, torch.cat([a.x_t for a in alone]))
    close(together.residual, torch.cat([a.residual for a in alone]))


def test_refinement_costs_one_call_a_step(mixture, schedule):
    for iterations in (0, 3):
        counting = Counting(mixture)
        invert(counting, normal(2, 2), {}, times=grid(schedule, 5, low=0.1, high=0.9), iterations=iterations)
        assert counting.num_calls == 5 * (1 + iterations)


def test_negative_refinements_raise(mixture, schedule):
    with pytest.raises(ValueError, match="iterations must be at least 0; got -1"):
        invert(mixture, normal(2, 2), {}, times=grid(schedule, 5), iterations=-1)


# SDEdit ---------------------------------------------------------------------------------------------------------


def test_sdedit_without_times_returns_the_image(mixture, generator):
    image = normal(4, 2)
    assert torch.equal(sdedit(mixture, image, {}, times=torch.tensor([]), generator=generator), image)


def test_sdedit_costs_one_call_a_time(mixture, schedule, generator):
    counting = Counting(mixture)
    sdedit(counting, normal(4, 2), {}, times=grid(schedule, 7, high=0.5), generator=generator)
    assert counting.num_calls == 7


@pytest.mark.parametrize("step", [ddim(), ddpm(), heun()], ids=["ddim", "ddpm", "heun"])
def test_sdedit_changes_nothing_outside_the_mask(mixture, schedule, step, generator):
    image, mask = normal(64, 2), torch.rand(64, 2, generator=generator) < 0.5
    times = grid(schedule, 10, high=0.7)
    result = sdedit(mixture, image, {}, times=times, generator=generator, step=step, mask=mask)
    assert torch.equal(result[~mask], image[~mask])
    assert ((result[mask] - image[mask]).abs() > 1e-9).all()


def test_known_part_is_as_noisy_as_the_part_being_made(mixture, schedule, generator):
    """At every call, outside the mask, (x_t - alpha image) / sigma is standard normal and fresh."""
    image, mask = normal(4000, 2), torch.tensor([False, True]).expand(4000, 2)
    seen = []

    class Watching(Counting):
        def __call__(self, x_t, t, cond):
            noise = (x_t - schedule.alpha(t)[:, None] * image) / schedule.sigma(t)[:, None]
            seen.append(noise[:, 0])
            return super().__call__(x_t, t, cond)

    sdedit(
        Watching(mixture), image, {}, times=grid(schedule, 5, low=0.2, high=0.9), generator=generator, mask=mask
    )
    correlation = torch.cov(torch.stack(seen))
    close(correlation, torch.eye(5, dtype=torch.float64), rtol=0, atol=0.12)


def test_stronger_sdedit_is_further_from_the_image_and_nearer_to_the_data(three_modes, generator):
    """Measured for strengths .05, .2, .5, 1: NLL 10.1, 1.6, .12, -.06 and distance .64, 1.12, 1.67, 2.22."""
    mixture = three_modes(SD)
    image = 4 * torch.rand(400, 2, generator=generator, dtype=torch.float64) - 2
    distance, nll = [], []
    for strength in (0.05, 0.2, 0.5, 1.0):
        times = grid(SD, 50, high=strength)
        result = sdedit(mixture, image, {}, times=times, generator=torch.Generator().manual_seed(1))
        distance.append((result - image).norm(dim=1).mean())
        nll.append(-mixture.log_density(result, torch.zeros(400)).mean())
    assert (torch.stack(distance).diff() > 0).all()
    assert (torch.stack(nll).diff() < 0).all()
    assert distance[-1] / distance[0] > 2
    assert nll[0] - nll[-1] > 5


@pytest.mark.parametrize("checkpoint", [False, True])
def test_sdedit_is_differentiable_in_the_image(mixture, schedule, checkpoint):
    times, mask = grid(schedule, 3, low=0.2, high=0.6), torch.tensor([[True, False], [True, True]])

    def run(image):
        return sdedit(
            mixture, image, {}, times=times, generator=torch.Generator().manual_seed(3), mask=mask,
            checkpoint=checkpoint,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, normal(2, 2).requires_grad_(), eps=1e-6, atol=1e-5)


# Parity with diffusers, in float32 ------------------------------------------------------------------------------

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}


class Eps(nn.Module):
    """A smooth noise prediction that both libraries call, on Stable Diffusion's schedule."""

    def forward(self, x_t, t):
        return torch.tanh(x_t.flip(1) + t[:, None, None, None] / 1000) - 0.3 * x_t


def eps_of(x, t):
    return Eps()(x, torch.as_tensor(t, dtype=torch.float32).expand(len(x)))


@pytest.fixture
def image_noise():
    return normal(2, 3, 4, 4, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers_ddim(image_noise, eta, kind):
    scheduler = DDIMScheduler(**BETAS, **LEADING, clip_sample=False, set_alpha_to_one=True, prediction_type=kind)
    scheduler.set_timesteps(20)
    x, generator = image_noise, torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        x = scheduler.step(eps_of(x, t), t, x, eta=eta, generator=generator).prev_sample
    ours = NetworkDenoiser(Eps(), SD, {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[kind])
    generator = torch.Generator().manual_seed(2)
    x0 = sample(ours, image_noise, {}, times=leading(20), step=ddim(eta), generator=generator)
    close(x0, x, rtol=1e-5, atol=1e-5 * x.abs().max().item())


def test_ddpm_is_diffusers_ddpm(image_noise):
    for variance in ("fixed_small", "fixed_large"):
        scheduler = DDPMScheduler(**BETAS, **LEADING, clip_sample=False, variance_type=variance)
        scheduler.set_timesteps(20)
        ours = NetworkDenoiser(Eps(), SD)
        for i, t in enumerate(scheduler.timesteps[:-1]):
            theirs = scheduler.step(
                eps_of(image_noise, t), t, image_noise, generator=torch.Generator().manual_seed(2)
            ).prev_sample
            now, following = (leading(20)[j].expand(2) for j in (i, i + 1))
            step = ddpm(large_variance=variance == "fixed_large")
            x_s = step(ours, image_noise, now, following, {}, torch.Generator().manual_seed(2))
            close(x_s, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler_class", "step"), [(EulerDiscreteScheduler, ddim()), (HeunDiscreteScheduler, heun())]
)
def test_euler_and_heun_are_diffusers(image_noise, scheduler_class, step):
    """These schedulers hold x / alpha, and scale the network's input back."""
    scheduler = scheduler_class(**BETAS, **LEADING)
    scheduler.set_timesteps(20)
    x = image_noise / SD.alpha(leading(20)[:1]).float()
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(eps_of(model_input, t), t, x).prev_sample
    x0 = sample(NetworkDenoiser(Eps(), SD), image_noise, {}, times=leading(20), step=step)
    close(x0, x, rtol=1e-5, atol=1e-5 * x.abs().max().item())


class Raw(nn.Module):
    """A smooth raw EDM network F(c_in x, c_noise)."""

    def forward(self, x, c_noise):
        return torch.sin(2 * x.flip(1) + c_noise.to(x)[:, None, None, None])


def test_karras_sampling_is_diffusers_edm_euler(image_noise):
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(20)
    schedule, raw = Karras(), Raw()
    close(grid(schedule, 20, spacing="uniform").float(), scheduler.sigmas[:-1], rtol=1e-5, atol=0)
    x = x_t = initial_noise(schedule, image_noise, 80.0)
    for t in scheduler.timesteps:
        x = scheduler.step(raw(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
    x0 = sample(karras_denoiser(raw, schedule), x_t, {}, times=scheduler.sigmas[:-1].double())
    close(x0, x, rtol=1e-5, atol=1e-5 * 80)


def test_flow_sampling_is_diffusers_flow_match_euler(image_noise):
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(20)
        x = image_noise
        for t in scheduler.timesteps:
            x = scheduler.step(eps_of(x, t), t, x).prev_sample
        ours = NetworkDenoiser(Eps(), RectifiedFlow(), "flow", time_scale=1000)
        x0 = sample(ours, image_noise, {}, times=scheduler.sigmas[:-1].double())
        close(x0, x, rtol=1e-5, atol=1e-5)


def test_inversion_is_diffusers_ddim_inverse(image_noise):
    """With its target labels: the network is asked about x_s at the time of x_t."""
    scheduler = DDIMInverseScheduler(**BETAS, **LEADING, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    x = image_noise
    for t in scheduler.timesteps:
        x = scheduler.step(eps_of(x, t), t, x).prev_sample
    inversion = invert(NetworkDenoiser(Eps(), SD), image_noise, {}, times=leading(20))
    assert scheduler.timesteps.tolist() == leading(20).flip(0).tolist()
    close(inversion.x_t, x, rtol=1e-5, atol=1e-5 * x.abs().max().item())
