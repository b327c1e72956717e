"""The bound, learned variances and flow likelihoods: entropies, weights and densities that are known."""

import math

import pytest
import torch
from denoisers import normal, seeded
from refusals import refused
from torch import nn

from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.importance import LossHistory
from scorefield.likelihood import bits_per_dim, dequantised, flow_log_density
from scorefield.sampling import grid
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.variational import (
    Chain,
    SplitVariance,
    discretised_nll,
    gaussian_nll,
    hybrid_loss,
    learned_range,
    prior_term,
    variational_bound,
    vlb_term,
)

close = torch.testing.assert_close
LINEAR = VariancePreserving.linear()
STD = 0.5


def whole_chain(schedule=LINEAR, n=1000):
    return Chain(schedule, schedule.at(torch.linspace(1, 0, n, dtype=torch.float64)))


def gaussian(schedule=LINEAR):
    return GaussianMixture(torch.zeros(1, 1).double(), torch.tensor([STD]), torch.ones(1), schedule)


def bound_of_a_gaussian(chain, log_variance):
    """The terms are squares of (x0, noise): four points with their moments give the expectation exactly."""
    teacher, signs = gaussian(chain.schedule), torch.tensor([-1.0, 1.0], dtype=torch.float64)
    corners = torch.cartesian_prod(signs, signs)
    index = torch.arange(len(chain)).repeat_interleave(4)
    x0, noise = (corners[:, column].repeat(len(chain))[:, None] for column in (0, 1))
    x0 = STD * x0
    x_t = chain.schedule.diffuse(x0, noise, chain.t(index))
    x0_hat = teacher(x_t, chain.t(index), {})
    terms = vlb_term(chain, index, x0, x_t, x0_hat, log_variance(index, x_t)).view(-1, 4).mean(1)
    return float(terms.sum() + prior_term(chain, x0[:4]).mean())


ENTROPY = 0.5 * math.log(2 * math.pi * math.e * STD**2)


def true_log_variance(chain, index):
    """Of x_s given x_t, for Gaussian data: precisions add up."""
    alpha, sigma = chain.schedule.alpha(chain.times), chain.schedule.sigma(chain.times)
    alpha_s, sigma_s = torch.cat([alpha[1:], alpha.new_ones(1)]), torch.cat([sigma[1:], sigma.new_zeros(1)])
    forward = sigma**2 - (alpha / alpha_s * sigma_s) ** 2
    precision = (alpha / alpha_s) ** 2 / forward + 1 / ((alpha_s * STD) ** 2 + sigma_s**2)
    return -precision.log()[index][:, None]


def test_the_bound_of_an_exact_gaussian_denoiser_is_its_entropy():
    chain = whole_chain()
    large = bound_of_a_gaussian(chain, lambda index, x: chain.log_variance(index, "large", x))
    small = bound_of_a_gaussian(chain, lambda index, x: chain.log_variance(index, "small", x))
    true = bound_of_a_gaussian(chain, lambda index, x: true_log_variance(chain, index))
    assert large == pytest.approx(ENTROPY, rel=0.01)
    assert true == pytest.approx(ENTROPY, abs=1e-4)
    assert true < large < small, "the variance of a single image is the wrong one for a wide Gaussian"

    def learned(index, x):
        small, large = (chain.log_variance(index, which, x) for which in ("small", "large"))
        return learned_range(chain, index, 2 * (true_log_variance(chain, index) - small) / (large - small) - 1)

    assert bound_of_a_gaussian(chain, learned) == pytest.approx(true, abs=1e-9)


def test_the_bound_step_by_step_is_the_sum_of_its_terms_and_above_the_entropy():
    chain = Chain(Karras(t_min=0.02), Karras(t_min=0.02).at(torch.linspace(1, 0, 60, dtype=torch.float64)))
    x0 = STD * normal(400, 1)
    bound = variational_bound(gaussian(chain.schedule), x0, {}, chain=chain, generator=seeded(1))
    assert bound.terms.shape == (60, 400)
    expected = bound_of_a_gaussian(chain, lambda index, x: chain.log_variance(index, "large", x))
    assert float(bound.nats.mean()) == pytest.approx(expected, abs=0.15)
    assert expected > ENTROPY
    close(bound.bits_per_dim, bound.nats / math.log(2))


def test_a_term_has_the_weight_of_the_corrected_lectures():
    """(1 - a)^2 / (2 var a (1 - abar)) of eps, and (1 - a)^2 abar_s / (2 var (1 - abar)^2) of x0."""
    chain, index = whole_chain(), torch.tensor([0, 500, 900, 998])
    abar = LINEAR.alphas_cumprod.flip(0)
    a, before = abar[index] / abar[index + 1], abar[index + 1]
    x0, noise, other = normal(4, 1), normal(4, 1, seed=1), normal(4, 1, seed=2)
    x_t = LINEAR.diffuse(x0, noise, chain.t(index))
    x0_hat = LINEAR.to_x0(other, x_t, chain.t(index), "eps")
    log_small = chain.log_variance(index, "small", x0)
    found = vlb_term(chain, index, x0, x_t, x0_hat, log_small)
    var = log_small.exp()[:, 0]
    close(found, (1 - a) ** 2 / (2 * var * a * (1 - abar[index])) * (noise - other)[:, 0] ** 2, rtol=1e-9, atol=0)
    of_image = (1 - a) ** 2 * before / (2 * var * (1 - abar[index]) ** 2) * (x0 - x0_hat)[:, 0] ** 2
    close(found, of_image, rtol=1e-9, atol=0)


def test_learned_variances_are_those_of_ddpm_at_both_ends():
    chain, index = whole_chain(), torch.tensor([0, 400, 998, 999])
    beta = 1 - LINEAR.alphas_cumprod / torch.cat([torch.ones(1).double(), LINEAR.alphas_cumprod[:-1]])
    abar = LINEAR.alphas_cumprod
    tilde = beta[1:] * (1 - abar[:-1]) / (1 - abar[1:])
    tilde = torch.cat([tilde[:1], tilde])  # the first one is zero: the next stands in its place
    one = torch.ones(4, 1, 2, 2, dtype=torch.float64)
    ends = chain.log_variance(index, "large", one), chain.log_variance(index, "small", one)
    assert torch.equal(learned_range(chain, index, one), ends[0].expand_as(one)), "exact"
    assert torch.equal(learned_range(chain, index, -one), ends[1].expand_as(one)), "exact"
    close(ends[0].flatten(), beta.flip(0)[index].log(), rtol=1e-9, atol=0)
    close(ends[1].flatten(), tilde.flip(0)[index].log(), rtol=1e-9, atol=0)
    close(learned_range(chain, index, 0 * one), (ends[0] + ends[1]).expand_as(one) / 2)


class Heads(nn.Module):
    """A prediction and a variance with a weight of its own each, as two halves of the channels."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread = (nn.Parameter(torch.tensor(value).double()) for value in (0.3, 0.2))

    def forward(self, x_t, t):
        return torch.cat([self.mean * x_t, self.spread * torch.ones_like(x_t)], 1)


class Narrow(nn.Module):
    def forward(self, x_t, t):
        return x_t


def test_the_gradient_of_the_bound_reaches_the_variance_and_never_the_mean():
    chain, x0, index = whole_chain(), normal(6, 2, 2, 2), torch.tensor([0, 200, 500, 900, 998, 999])

    def gradients(weight):
        network = Heads()
        denoiser = NetworkDenoiser(SplitVariance(network), LINEAR, "eps")
        how = {"chain": chain, "index": index, "generator": seeded(), "weight": weight}
        loss = hybrid_loss(denoiser, x0, {}, **how)
        assert loss.shape == (6,)
        loss.sum().backward()
        return network.mean.grad, network.spread.grad

    (mean, spread), (with_bound, spread_with_bound) = gradients(0.0), gradients(1e-3)
    assert torch.equal(mean, with_bound)
    assert float(spread) == 0
    assert float(spread_with_bound.abs()) > 0
    with refused("must return 4 channels, twice those of x_t; got 2"):
        SplitVariance(Narrow())(torch.zeros(1, 2, 1, 1), torch.zeros(1))


def test_learned_variances_of_a_network_are_asked_for_in_the_bound():
    chain, x0 = Chain(LINEAR, grid(LINEAR, 4)), normal(2, 2, 2, 2)
    denoiser = NetworkDenoiser(SplitVariance(Heads()), LINEAR, "eps")
    bounds = [
        variational_bound(denoiser, x0, {}, chain=chain, generator=seeded(), variance=which).nats
        for which in ("small", "learned", "large")
    ]
    assert bounds[1].isfinite().all()
    assert not torch.equal(bounds[1], bounds[0])
    assert not torch.equal(bounds[1], bounds[2])
    with refused("needs a NetworkDenoiser"):
        variational_bound(gaussian(), x0, {}, chain=chain, generator=seeded(), variance="learned")
    with refused("at least 2 strictly decreasing"):
        Chain(LINEAR, torch.tensor([0.0, 1.0]))
    with refused("alpha > 0"):
        Chain(RectifiedFlow(), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("mean", [0.0, 0.99, -1.5])
def test_the_probabilities_of_all_levels_add_up_to_one(mean):
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for log_variance in (-12.0, -6.0, 0.0):
        nll = discretised_nll(levels, torch.tensor(mean).double(), torch.tensor(log_variance).double())
        assert float(nll.neg().exp().sum()) == pytest.approx(1, abs=1e-8)


def test_of_narrow_levels_the_probability_is_the_density_times_the_width():
    levels, zero = torch.linspace(-1, 1, 256, dtype=torch.float64), torch.zeros(()).double()
    found, density = discretised_nll(levels, zero, zero), gaussian_nll(levels, zero, zero)
    close(found[1:-1], density[1:-1] - math.log(2 / 255), rtol=0, atol=1e-4)


def centred_mixture(schedule):
    means = torch.tensor([[-1.5, 0.5], [1.5, -0.5], [0.5, 1.5], [-0.5, -1.5]], dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.3, 0.3, 0.4, 0.4]), torch.ones(4), schedule)


@pytest.mark.parametrize("schedule", [LINEAR, Karras(t_min=0.02, t_max=150.0)], ids=["vp", "karras"])
def test_the_flow_gives_the_density_of_a_mixture_to_a_thousandth_of_a_bit(schedule):
    teacher = centred_mixture(schedule)
    x = teacher.sample(6, seeded())
    low = torch.full((6,), schedule.t_min, dtype=torch.float64)
    found = flow_log_density(teacher, x, {}, num_steps=80)
    close(found / math.log(2), teacher.log_density(x, low) / math.log(2), rtol=0, atol=1e-3)


def test_random_signs_estimate_the_divergence_without_bias():
    teacher, x = centred_mixture(LINEAR), normal(2, 2).repeat(100, 1)
    exact = flow_log_density(teacher, x[:2], {}, num_steps=20)
    found = flow_log_density(teacher, x, {}, num_steps=20, num_probes=1, generator=seeded(3)).view(100, 2)
    assert (found.std(0) > 0.01).all(), "one sign is an estimate"
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / 10).all()
    round_one = GaussianMixture(torch.zeros(1, 3).double(), torch.tensor([0.7]), torch.ones(1), LINEAR)
    points = normal(4, 3)
    signs = flow_log_density(round_one, points, {}, num_steps=20, num_probes=1, generator=seeded())
    close(signs, flow_log_density(round_one, points, {}, num_steps=20))  # every direction is the same
    with refused("0 < lowest < highest"):
        flow_log_density(teacher, x, {}, ratios=(1.0, 0.5))


def test_bits_of_levels_come_from_the_density_of_what_was_spread_over_their_cells():
    images = torch.linspace(-1, 1, 256, dtype=torch.float64).repeat(50, 1)
    spread = dequantised(images, seeded())
    assert spread.min() >= -1
    assert spread.max() <= 1
    close(((spread + 1) * 128).floor(), ((images + 1) * 127.5).round())
    close((spread[:, 1:] - spread[:, :-1]).mean(), torch.tensor(2 / 256).double(), rtol=0.01, atol=0)
    uniform = torch.full((50,), -256 * math.log(2.0), dtype=torch.float64)  # density 1/2 on [-1, 1]
    close(bits_per_dim(uniform, images), torch.full((50,), 8.0).double())


def test_drawing_large_losses_more_often_keeps_the_mean_and_lowers_the_variance():
    history, losses = LossHistory(4, length=2), torch.tensor([1.0, 2.0, 10.0, 0.0]).double()
    index, weights = history.draw(1000, seeded())
    close(weights, torch.ones(1000).double())
    assert torch.bincount(index).min() > 200, "uniform before every timestep has its losses"
    history.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.tensor([9.0, 1.0, 2.0, 2.0, 10.0, 10.0, 0.0]))
    close(history.probabilities, torch.full((4,), 0.25).double())
    history.update(torch.tensor([0, 3]), torch.tensor([1.0, 0.0]))  # the oldest, 9, is forgotten
    shares = history.probabilities
    close(shares, 0.999 * losses / losses.sum() + 0.001 / 4)
    index, weights = history.draw(2000, seeded())
    close(weights, 1 / (4 * shares[index]))
    close((shares * losses / (4 * shares)).sum(), losses.mean())  # whatever is drawn, on average
    assert float((weights * losses[index]).std()) < 0.2 * float(losses.std())
    with refused("must be finite"):
        history.update(torch.tensor([0]), torch.tensor([math.nan]))
    with refused("num_steps >= 1"):
        LossHistory(0)
