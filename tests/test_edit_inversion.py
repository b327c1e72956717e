"""Inversion: DDIM backwards and its refinement, the ways back to the image under guidance, white noise."""

import dataclasses

import pytest
import torch
from denoisers import Counting, Eps, normal, seeded
from diffusers import DDIMInverseScheduler
from refusals import refused

from edit.ddpm_inversion import NoiseMaps, invert_ddpm, noise_step
from edit.inversion import Path, invert, negative_prompt, pinned, whiteness
from edit.null_text import EMBEDDING, Fit, global_null_text, null_text, with_scale
from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.guidance import guided
from scorefield.sampling import ddim, ddim_moments, grid, posterior_variance, sample
from scorefield.schedule import Karras, VariancePreserving

close = torch.testing.assert_close
SD = VariancePreserving.scaled_linear()


def leading(num_steps):
    """diffusers' grid for Stable Diffusion: leading spacing, offset 1."""
    return (torch.arange(num_steps, dtype=torch.float64) * (1000 // num_steps) + 1).flip(0)


def three_modes(schedule):
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.6]], dtype=torch.float64)
    return GaussianMixture(means, torch.full((3,), 0.15), torch.tensor([0.3, 0.4, 0.3]), schedule)


def labels(number, batch=1):
    return {"class_labels": torch.full((batch,), number)}


def test_what_inversion_costs_and_refuses(mixture, schedule):
    times = grid(schedule, 6, low=0.2, high=0.8)
    for iterations in (0, 3):
        counting = Counting(mixture)
        invert(counting, normal(2, 2), {}, times=times, iterations=iterations)
        assert len(counting.calls) == 6 * (1 + iterations)
    with refused("times must be a strictly decreasing vector, noisiest first; got"):
        invert(mixture, normal(2, 2), {}, times=torch.tensor([0.1, 0.9]))
    with refused("iterations must be at least 0; got -1"):
        invert(mixture, normal(2, 2), {}, times=times, iterations=-1)


def round_trip(num_steps, iterations):
    """Relative RMSE of sampling from the inversion of 512 data points, the error of each, and the inversion."""
    mixture, times = three_modes(SD), leading(num_steps)
    x0 = mixture.sample(512, seeded(0))
    inversion = invert(mixture, x0, {}, times=times, iterations=iterations)
    back = sample(mixture, inversion.x_t, {}, times=times)
    return ((back - x0).square().sum() / x0.square().sum()).sqrt().item(), (back - x0).norm(dim=1), inversion


@pytest.mark.parametrize(("iterations", "low", "high"), [
    (0, 1e-2, 1e-1), (1, 1e-3, 5e-3), (3, 2e-5, 5e-4), (10, 0, 1e-5),
])  # fmt: skip
def test_refinement_closes_the_round_trip_of_inversion(iterations, low, high):
    """Measured medians over 5 seeds: 5.7e-2, 2.2e-3, 1.5e-4 and 8.7e-7. The noise is nearly standard normal: a
    hundred steps of DDIM do not map the normal exactly to the data either."""
    error, _, inversion = round_trip(100, iterations)
    assert low <= error < high
    if iterations:
        close(inversion.x_t.std(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=0.15)
        close(inversion.x_t.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=0.15)


def test_damping_keeps_refinement_from_diverging_at_few_steps():
    """Undamped, ten refinements at ten steps are worse than none (.19 against .095). And in one step of
    x_t = x_s - 3 x_t, whose plain iteration triples its error, refinement is undone, then damped, to x_s / 4."""
    plain, refined = (round_trip(10, n)[0] for n in (0, 10))
    assert refined < 3e-2 < 5e-2 < plain
    denoiser, x_s = NetworkDenoiser(lambda x_t, t: -3 * x_t, Karras()), normal(4, 2)
    found = [invert(denoiser, x_s, {}, times=torch.ones(1), iterations=n) for n in (0, 1, 3)]
    close(found[0].x_t, -2 * x_s)
    close(found[1].x_t, -2 * x_s)
    close(found[1].residual, torch.full((4,), 3.0, dtype=torch.float64))
    close(found[2].x_t, x_s / 4)
    close(found[2].residual, torch.zeros(4, dtype=torch.float64))


def test_residual_falls_with_refinement_and_foretells_the_round_trip():
    trips = [round_trip(50, n) for n in (1, 3, 10)]
    residuals = torch.stack([inversion.residual for _, _, inversion in trips])
    assert residuals.shape == (3, 512)
    assert (residuals.mean(1).diff() < 0).all()
    assert residuals[-1].mean() < 1e-2 * residuals[0].mean()
    for (_, error, _), residual in zip(trips[1:], residuals[1:], strict=True):
        assert (error < 3 * residual + 1e-9).all()
        assert torch.corrcoef(torch.stack([error.log(), residual.log()]))[0, 1] > 0.9


def test_sampling_from_any_point_of_the_trajectory_returns_to_the_image_and_each_is_refined_for_itself():
    mixture, times = three_modes(SD), leading(50)
    x0 = mixture.sample(32, seeded(0))
    inversion = invert(mixture, x0, {}, times=times, iterations=10)
    assert len(inversion.path.points) == len(times) + 1
    assert inversion.path.points[-1] is x0
    for i in (0, 10, 30, 49):
        close(sample(mixture, inversion.path.points[i], {}, times=times[i:]), x0, rtol=0, atol=2e-3)
    together = invert(mixture, x0[:6], {}, times=leading(10), iterations=5)
    alone = [invert(mixture, x, {}, times=leading(10), iterations=5) for x in x0[:6].split(1)]
    close(together.x_t, torch.cat([a.x_t for a in alone]))
    close(together.residual, torch.cat([a.residual for a in alone]))


def test_inversion_round_trips_on_every_schedule(schedule):
    mixture = three_modes(schedule)
    x0, times = mixture.sample(64, seeded(0)), grid(schedule, 40, low=0.1, high=0.8)
    inversion = invert(mixture, x0, {}, times=times, iterations=8)
    error = (sample(mixture, inversion.x_t, {}, times=times) - x0).norm(dim=1)
    assert (error < 3 * inversion.residual + 1e-9).all()
    assert error.median() < 5e-2


def test_inversion_is_diffusers_ddim_inverse():
    """With its target labels: the network is asked about x_s at the time of x_t."""
    scheduler = DDIMInverseScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading",
        steps_offset=1, clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    noise = normal(2, 3, 4, 4, dtype=torch.float32)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(Eps()(x, t.expand(len(x))), t, x).prev_sample
    assert scheduler.timesteps.tolist() == leading(20).flip(0).tolist()
    close(invert(NetworkDenoiser(Eps(), SD), noise, {}, times=leading(20)).x_t, x, rtol=1e-5, atol=1e-5)


# Ways back to the image under guidance -------------------------------------------------------------------------


class Affine:
    """x0 = x_t / 2 + the mean of a prompt's tokens: all of null-text inversion by hand."""

    schedule = SD

    def __call__(self, x_t, t, cond):
        return x_t / 2 + cond[EMBEDDING].mean(1)


def prompts(batch=3, seed=0):
    return {EMBEDDING: normal(batch, 4, 2, seed=seed)}


def best_negative(x_t, t, s, wanted, cond, scale):
    """Mean of the tokens for which the guided step lands on ``wanted``: solved for, not fitted."""
    a_t, a_s, sigma_t, sigma_s = SD.alpha(t), SD.alpha(s), SD.sigma(t), SD.sigma(s)
    x0 = (wanted - sigma_s / sigma_t * x_t) / (a_s - a_t * sigma_s / sigma_t)
    return (x0 - x_t / 2 - scale * cond[EMBEDDING].mean(1)) / (1 - scale)


@pytest.mark.parametrize("scale", [3.0])
def test_null_text_finds_the_negative_that_leads_to_the_pivot(scale):
    denoiser, cond, start, times = Affine(), prompts(), prompts(1, seed=1), leading(10)
    image = normal(3, 2, seed=2)
    pivot = invert(denoiser, image, cond, times=times, iterations=3)
    fit = Fit(scale=scale, num_inner=200, learning_rate=0.1, tolerance=1e-16, slack=0)
    null = null_text(denoiser, pivot, cond, start, fit)
    close(sample(null.guided(denoiser), pivot.x_t, cond, times=times), image, rtol=0, atol=1e-3)
    wanted = best_negative(pivot.x_t, times[0], times[1], pivot.path.points[1], cond, scale)
    close(null.negatives[0][EMBEDDING].mean(1), wanted, rtol=0, atol=1e-3)
    assert null.losses.shape == (10, 3)
    assert null.losses.max() < 1e-6
    plain = null_text(denoiser, pivot, cond, start, Fit(scale=scale, num_inner=0))
    guide = guided(denoiser, scale, start)
    back = sample(guide, pivot.x_t, cond, times=times)
    close(sample(plain.guided(denoiser), pivot.x_t, cond, times=times), back, rtol=0, atol=0)
    close(plain.losses[-1], (back - image).square().mean(1))
    assert (plain.losses > null.losses).all(), "at every step"
    other = with_scale(null, 1.0)
    assert torch.equal(
        sample(other.guided(denoiser), pivot.x_t, cond, times=times),
        sample(denoiser, pivot.x_t, cond, times=times),
    )


def test_each_image_is_fitted_alone_and_stops_alone():
    denoiser, cond, start, times, image = (
        Affine(),
        prompts(),
        prompts(1, seed=1),
        leading(10),
        normal(3, 2, seed=2),
    )
    fit = Fit(scale=3.0, num_inner=30, learning_rate=0.05, tolerance=3e-5)
    pivot = invert(denoiser, image, cond, times=times)
    together = null_text(denoiser, pivot, cond, start, fit)
    for row in range(3):
        own = {EMBEDDING: cond[EMBEDDING][row : row + 1]}
        alone = null_text(denoiser, invert(denoiser, image[row : row + 1], own, times=times), own, start, fit)
        for one, all_ in zip(alone.negatives, together.negatives, strict=True):
            close(one[EMBEDDING][0], all_[EMBEDDING][row])
    counting = Counting(denoiser)
    null_text(counting, pivot, cond, start, dataclasses.replace(fit, tolerance=1e9))
    assert len(counting.calls) == 3 * 10, "positive, one look at the loss, and the step"


def test_without_guidance_nothing_is_fitted_and_one_negative_for_all_times_fits_worse():
    denoiser, cond, start, times, image = (
        Affine(),
        prompts(),
        prompts(1, seed=1),
        leading(10),
        normal(3, 2, seed=2),
    )
    pivot = invert(denoiser, image, cond, times=times, iterations=3)
    for method in (null_text, global_null_text):
        null = method(denoiser, pivot, cond, start, Fit(scale=1.0))
        assert torch.equal(null.negatives[-1][EMBEDDING], start[EMBEDDING].expand(3, 4, 2))
    settings = Fit(scale=3.0, num_inner=90, learning_rate=0.1, tolerance=0, slack=0)
    each, one = (method(denoiser, pivot, cond, start, settings) for method in (null_text, global_null_text))
    before = global_null_text(denoiser, pivot, cond, start, Fit(scale=3.0, num_inner=0))
    assert len(one.negatives) == 1
    assert each.losses.mean() < one.losses.mean() < before.losses.mean()
    sample(one.guided(denoiser), pivot.x_t, cond, times=times)
    with refused("fits the entry 'encoder_hidden_states' of the negative condition; got"):
        null_text(denoiser, pivot, cond, {"class_labels": torch.zeros(1, dtype=torch.int64)})
    with refused("sampling must be at one of the inversion's times; got t ="):
        each.guided(denoiser)(image, torch.full((3,), 500.0), cond)


def test_the_prompt_as_negative_leaves_guidance_nothing_to_do(make_mixture):
    mixture, times = make_mixture(SD), grid(SD, 10)
    x_t, source = normal(6, 2), labels(0, 6)
    back = sample(negative_prompt(mixture, 7.5, labels(0)), x_t, source, times=times)
    close(back, sample(mixture, x_t, source, times=times))
    assert (sample(guided(mixture, 7.5, labels(2)), x_t, source, times=times) - back).abs().max() > 0.1
    # A target is guided as the model's family has it, here with the length of its positive prediction.
    t, target = times[:1].expand(6), labels(1, 6)
    answers = [guide(x_t, t, target) for guide in (
        negative_prompt(mixture, 7.5, labels(0), norm="row"), guided(mixture, 7.5, labels(0)), mixture,
    )]  # fmt: skip
    normed, plain, positive = (SD.from_x0(x0, x_t, t, "flow") for x0 in answers)
    close(normed.norm(dim=1), positive.norm(dim=1))
    close(normed, plain / plain.norm(dim=1, keepdim=True) * positive.norm(dim=1, keepdim=True))


def test_pinned_rows_pass_the_path_and_the_others_do_not_notice(make_mixture):
    mixture, times = make_mixture(SD), grid(SD, 10)
    image = mixture.sample(4, seeded(0))
    path = invert(mixture, image, labels(0, 4), times=times).path
    both, x_t = {"class_labels": torch.tensor([0] * 4 + [1] * 4)}, path.points[0].repeat(2, 1)
    guide, watching = guided(mixture, 5.0, labels(2)), Counting(guided(mixture, 5.0, labels(2)))
    made = sample(watching, x_t, both, times=times, step=pinned(ddim(), path))
    assert torch.equal(made[:4], image)
    assert torch.equal(made[4:], sample(guide, x_t, both, times=times)[4:])
    assert all(torch.equal(x[:4], point) for (x, _, _), point in zip(watching.calls, path.points, strict=False))
    with refused("a path has a point for each of 10 times and the image; got 10"):
        Path(times, path.points[1:])


# The stochastic sampler ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_noise_maps_rebuild_the_image_exactly(mixture, schedule, eta):
    times, image = grid(schedule, 12, low=0.1, high=0.8), normal(5, 2)
    noise = invert_ddpm(mixture, image, {}, times=times, generator=seeded(1), eta=eta)
    start = noise.path.points[0]
    close(sample(mixture, start, {}, times=times, step=noise_step(noise)), image, rtol=0, atol=1e-9)
    late = noise.since(5)
    assert len(late.maps) == len(late.path.times) - 1 == 6
    made = sample(mixture, late.path.points[0], {}, times=late.path.times, step=noise_step(late))
    close(made, image, rtol=0, atol=1e-9)
    twice = sample(mixture, start.repeat(2, 1), {}, times=times, step=noise_step(noise))
    close(twice, image.repeat(2, 1), rtol=0, atol=1e-9)
    t, s = (times[i].expand(5) for i in (3, 4))
    mean, std = ddim_moments(schedule, noise.path.points[3], mixture(noise.path.points[3], t, {}), t, s, eta)
    close(std, eta * posterior_variance(schedule, t, s).sqrt(), rtol=1e-12, atol=0)
    close(mean + std[:, None] * noise.maps[3], noise.path.points[4], rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_white_maps_are_the_noise_of_the_sampler(eta):
    denoiser = GaussianMixture(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0.5]), torch.ones(1), SD)
    times, x_t = leading(10), normal(4000, 1)
    generator = seeded(3)
    maps = tuple(torch.randn(4000, 1, generator=generator, dtype=torch.float64) for _ in times[1:])
    path = Path(times, (x_t,) * 11)
    made = sample(denoiser, x_t, {}, times=times, step=noise_step(NoiseMaps(path, maps, torch.zeros(1, 1), eta)))
    assert torch.equal(made, sample(denoiser, x_t, {}, times=times, step=ddim(eta), generator=seeded(3)))


@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_an_eta_without_noise_is_refused(mixture, schedule, eta):
    with refused(r"eta must lie in \(0, 1\]; got"):
        invert_ddpm(mixture, normal(2, 2), {}, times=grid(schedule, 4), generator=seeded(), eta=eta)


# White noise ---------------------------------------------------------------------------------------------------


def test_whiteness_tells_white_noise_from_faint_and_from_smooth_noise():
    white = normal(16, 4, 16, 16)
    figures = whiteness(white, SD, 999.0)
    assert abs(figures.std - 1) < 0.02
    assert abs(figures.mean) < 0.03
    assert abs(figures.correlation) < 0.02
    assert abs(whiteness(0.56 * white, SD, 999.0).std - 0.56) < 0.01
    smooth = (white + white.roll(1, 3)) / 2**0.5  # neighbours along one side of two have 1 / 2
    assert abs(whiteness(smooth, SD, 999.0).correlation - 0.25) < 0.02
    assert abs(whiteness(80 * white, Karras(), 80.0).std - 1) < 0.02, "in units of a sampler's start"
