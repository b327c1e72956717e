"""The learning rate of a range test, on a linear problem whose best rate is known."""

import math

import pytest
import torch
from torch import nn

from distill.rates import MOST_MOVED, Rates, best_rate, range_test, size_of_weights


def problem(scale):
    """A linear network whose weights have a given size, and its loss on one batch."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Linear(8, 8, bias=False)
    nn.init.normal_(network.weight, std=scale, generator=generator)
    x = torch.randn(64, 8, generator=generator)
    target = x @ (2 * scale * torch.randn(8, 8, generator=generator))
    return network, lambda: ((network(x) - target) / scale).square().mean()


def test_the_rate_follows_the_size_of_the_weights():
    """AdamW moves each weight by about its rate: weights ten times as large want ten times the rate."""
    small, large = (range_test(*problem(scale)).rate for scale in (0.001, 0.01))
    assert 6 < large / small < 16


def test_training_at_the_recommended_rate_works_and_at_a_hundredth_of_it_does_not():
    ends = {}
    for factor in (0.01, 1):
        network, loss = problem(0.1)
        rate = factor * range_test(network, loss).rate
        optimizer = torch.optim.AdamW(network.parameters(), rate)
        for _ in range(200):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        ends[factor] = float(value.detach())
    assert ends[1] < 0.7 * ends[0.01]


def test_the_best_rate_is_a_sixth_of_the_last_that_is_below_the_beginning():
    rates = [10.0**-n for n in range(6, 0, -1)]
    assert best_rate(rates, [1.0, 1.0, 0.8, 0.5, 0.9, 9.0]) == pytest.approx(1e-3 / 6)
    assert best_rate(rates, [1.0, 0.9, 0.5, 0.4, math.nan]) == pytest.approx(1e-4 / 6)


def test_a_first_plateau_at_small_rates_does_not_decide():
    """Seen on a DDPM that is asked for one step: lowest at 7e-5, trainable at 1e-3."""
    rates = [10.0 ** (-6 + n / 2) for n in range(10)]
    losses = [0.41, 0.40, 0.38, 0.31, 0.30, 0.36, 0.31, 0.32, 0.90, 3.0]
    assert best_rate(rates, losses) == pytest.approx(rates[6] / 6)


def test_the_rate_moves_weights_by_a_small_share_even_where_the_loss_never_rises():
    """Seen on a transformer: one batch is learned by heart at any rate, since its layers are normalised."""
    weight = nn.Parameter(torch.full((4, 4), 0.05))
    network = nn.Module()
    network.weight = weight
    test = range_test(network, lambda: torch.sigmoid(50 * (0.05 - weight.mean())))
    assert list(test.losses) == sorted(test.losses, reverse=True)
    assert test.rate == pytest.approx(MOST_MOVED * 0.05)


def test_the_size_of_weights_is_that_of_the_median_matrix():
    sizes = (0.0, 0.01, 0.02, 0.5)  # the first one is about to be learned
    matrices = [torch.full((3, 2), size) * torch.tensor([1.0, -1.0]) for size in sizes]
    assert size_of_weights([*matrices, torch.full((7,), 9.0)]) == pytest.approx(0.02)
    assert size_of_weights([torch.zeros(2, 2), torch.ones(3)]) == math.inf


@pytest.mark.parametrize("losses", [[1.0, 1.1, 1.2], [math.nan], [math.inf, 1.0]])
def test_a_loss_that_does_not_fall_is_refused(losses):
    with pytest.raises(ValueError, match=r"falls at no learning rate|must be finite"):
        best_rate([1e-4, 1e-3, 1e-2][: len(losses)], losses)


def test_a_loss_that_explodes_ends_the_test_early_and_the_network_is_put_back():
    network, loss = problem(0.1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    test = range_test(network, loss, high=100.0, steps=80)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)), "it is put back"
    assert all(parameter.grad is None for parameter in network.parameters())
    assert len(test.losses) < 80
    assert test.losses[-1] > 4 * test.losses[0]


def test_later_stages_take_fractions():
    rates = Rates.from_warmup(1e-3)
    assert (rates.warmup, rates.student, rates.fake) == pytest.approx((1e-3, 4e-5, 4e-4))


def test_weights_are_put_back_also_where_the_loss_fails_and_rates_that_do_not_rise_are_refused():
    network, loss = problem(0.1)
    before, calls = network.weight.detach().clone(), iter(range(5))

    def fails():
        next(calls)
        return loss()

    with pytest.raises(StopIteration):
        range_test(network, fails)
    assert torch.equal(network.weight, before)
    assert network.weight.grad is None
    for bad in ({"steps": 1}, {"low": 0.0}, {"low": 0.1, "high": 0.1}):
        with pytest.raises(ValueError, match=r"0 < low < high and at least 2 steps"):
            range_test(network, loss, **bad)
