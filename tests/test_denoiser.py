"""Networks as denoisers: kinds, times, conditions, EDM's preconditioning, another schedule."""

from copy import deepcopy

import pytest
import torch
from refusals import refused
from torch import nn

from scorefield.denoiser import (
    Conditioned,
    KarrasPreconditioning,
    NetworkDenoiser,
    expand_cond,
    freeze,
    karras_denoiser,
    rescheduled,
)
from scorefield.exact import GaussianMixture
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
SD = VariancePreserving.scaled_linear()


class Recorder(nn.Module):
    """Returns ``answer(x)`` and keeps what it was called with."""

    def __init__(self, answer=lambda x: x):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, x, t, **cond):
        self.calls.append((x, t, cond))
        return self.answer(x)


class Output(dict):
    """Indexed by position as well as by name, as the outputs of diffusers are."""

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def noisy(schedule, ratios, generator):
    return schedule.time(ratios), torch.randn(len(ratios), 2, generator=generator, dtype=torch.float64)


def test_network_of_any_kind_denoises(mixture, schedule, kind, ratios, generator, exact_network):
    t, x_t = noisy(schedule, ratios, generator)
    cond = {"class_labels": torch.arange(len(t)) % 3}
    denoiser = NetworkDenoiser(exact_network(mixture, kind), schedule, kind)
    close(denoiser(x_t, t, cond), mixture(x_t, t, cond), rtol=1e-9, atol=1e-9)


def test_network_is_called_with_named_conditions_and_scaled_time_in_float32():
    """bfloat16 would round timestep 997 to 996."""
    network, text = Recorder(), torch.randn(3, 4)
    t = torch.tensor([0.25, 0.5, 1.0])
    NetworkDenoiser(network, RectifiedFlow(), "flow", time_scale=1000)(torch.zeros(3, 2), t, {"text": text})
    (_, called_with, cond), = network.calls  # fmt: skip
    assert called_with.tolist() == [250, 500, 1000]
    assert list(cond) == ["text"]
    assert cond["text"] is text
    NetworkDenoiser(network, SD)(torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([997.0]), {})
    assert (network.calls[1][1].dtype, network.calls[1][1].item()) == (torch.float32, 997)


@pytest.mark.parametrize("wrap", [
    lambda x: x, lambda x: (x, "logits", 3), lambda x: [x, "logits", 3],
    lambda x: Output(sample=x, logits="logits", more=3),
])  # fmt: skip
def test_first_item_of_an_output_is_the_prediction_and_the_rest_come_with_the_same_pass(wrap):
    x_t, t, network = torch.randn(2, 3), torch.ones(2), Recorder(lambda x: wrap(2 * x))
    denoiser = NetworkDenoiser(network, Karras(), "x0")
    x0, extras = denoiser.with_extras(x_t, t, {})
    assert len(network.calls) == 1
    assert torch.equal(x0, 2 * x_t)
    assert torch.equal(denoiser(x_t, t, {}), 2 * x_t)
    if isinstance(wrap(1), int | tuple):
        assert extras == (("logits", 3) if isinstance(wrap(1), tuple) else ())


def test_other_shapes_and_kinds_are_refused(schedule):
    denoiser = NetworkDenoiser(Recorder(lambda x: torch.cat([x, x], 1)), schedule)
    with refused(r"shape of x_t \(2, 3\); got \(2, 6\)\. Split off a variance head"):
        denoiser(torch.zeros(2, 3), torch.full((2,), 0.5), {})
    network = Recorder()
    for t in (torch.tensor(0.5), torch.full((1,), 0.5)):
        with refused(r"t must have shape \(2,\) to match x_t \(2, 3\); got"):
            NetworkDenoiser(network, schedule)(torch.zeros(2, 3), t, {})
    assert network.calls == []
    with refused("unknown prediction kind 'v_prediction'; expected one of x0, eps, v, flow"):
        NetworkDenoiser(network, schedule, "v_prediction")


def test_karras_preconditioning_of_a_silent_network_is_the_wiener_filter(generator):
    """With F = 0, c_skip x_t is E[x0 | x_t] of data N(0, sigma_data^2)."""
    schedule, std = Karras(), 0.7
    data = GaussianMixture(torch.zeros(1, 2).double(), torch.tensor([std]), torch.ones(1), schedule)
    t, x_t = noisy(schedule, torch.tensor([0.01, 0.5, 3.0, 80.0]), generator)
    silent = karras_denoiser(Recorder(torch.zeros_like), schedule, sigma_data=std)
    close(silent(x_t, t, {}), data(x_t, t, {}))


@pytest.mark.parametrize("sigma", [0.02, 0.5, 10.0])
def test_karras_preconditioning_gives_the_network_unit_inputs_and_targets(generator, sigma):
    """EDM's design (arXiv 2206.00364, appendix B.6): both variances are 1 at every sigma, as measured here."""
    std, n = 0.5, 100_000
    x0 = std * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x_t, t = x0 + sigma * torch.randn(n, 1, generator=generator, dtype=torch.float64), torch.full((n,), sigma)
    network = Recorder(torch.zeros_like)
    precondition = KarrasPreconditioning(network, std)
    skip = precondition(x_t, t)
    precondition.network = Recorder(torch.ones_like)
    c_out = precondition(x_t, t) - skip
    assert (c_out > 0).all()
    assert network.calls[0][0].var().item() == pytest.approx(1, abs=0.02)
    assert ((x0 - skip) / c_out).var().item() == pytest.approx(1, abs=0.02)
    close(network.calls[0][1], (t.log() / 4))


def test_karras_preconditioning_passes_conditions_and_extras_and_saves_sigma_data():
    network, labels = Recorder(lambda x: (x, "logits")), torch.tensor([0, 1])
    x0, extra = KarrasPreconditioning(network)(torch.randn(2, 3), torch.ones(2), class_labels=labels)
    assert (x0.shape, extra) == ((2, 3), "logits")
    assert network.calls[0][2]["class_labels"] is labels
    loaded = KarrasPreconditioning(nn.Linear(2, 2))
    loaded.load_state_dict(KarrasPreconditioning(nn.Linear(2, 2), sigma_data=0.7).state_dict())
    assert loaded.sigma_data == 0.7


@pytest.mark.parametrize("inner", ["karras", "flow", "vp"])
def test_rescheduling_is_exact_between_all_schedules(inner, schedules, schedule, ratios, generator, make_mixture):
    t, x_t = noisy(schedule, ratios, generator)
    cond = {"class_labels": torch.arange(len(t)) % 3}
    moved = rescheduled(make_mixture(schedules[inner]), schedule)
    assert moved.schedule is schedule
    close(moved(x_t, t, cond), make_mixture(schedule)(x_t, t, cond), rtol=1e-9, atol=1e-9)


def test_rescheduling_is_exact_at_both_ends_of_a_flow(make_mixture):
    """Both alpha and sigma vanish somewhere, so a naive quotient is 0 / 0 at one end."""
    terminal = VariancePreserving(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64))
    x = torch.randn(2, 2, dtype=torch.float64)
    same = rescheduled(make_mixture(RectifiedFlow()), RectifiedFlow())
    prior_mean = make_mixture(terminal)(x[:1], torch.tensor([2.0]), {})
    close(same(x, torch.tensor([0.0, 1.0]), {}), torch.cat([x[:1], prior_mean]))
    close(rescheduled(make_mixture(RectifiedFlow()), terminal)(x[:1], torch.tensor([2.0]), {}), prior_mean)


@pytest.mark.parametrize(("inner", "outer", "t"), [
    (SD, Karras(), 80.0), (SD, Karras(), 0.002), (Karras(), RectifiedFlow(), 1.0),
    (Karras(), RectifiedFlow(), 0.0),
])  # fmt: skip
def test_rescheduling_raises_outside_the_known_noise_levels(inner, outer, t, make_mixture):
    moved, x_t = rescheduled(make_mixture(inner), outer), torch.zeros(2, 2, dtype=torch.float64)
    with refused(r"noise level sigma / alpha must lie in \[0.0\d+, \d+.*\].*got \["):
        moved(x_t, torch.tensor([0.5, t], dtype=torch.float64), {})
    moved(x_t, torch.tensor([0.5, 0.6], dtype=torch.float64), {})


def test_fixed_conditions_replace_the_callers_and_leave_it_the_others(mixture, schedule, ratios, generator):
    t, x_t = noisy(schedule, ratios, generator)
    unconditional = Conditioned(mixture, {"class_labels": torch.tensor([2])})
    assert unconditional.schedule is schedule
    asked_for_zero = {"class_labels": torch.zeros(len(t), dtype=torch.long)}
    close(unconditional(x_t, t, asked_for_zero), mixture(x_t, t, {}))
    assert not torch.allclose(unconditional(x_t, t, asked_for_zero), mixture(x_t, t, asked_for_zero))
    network, text = Recorder(), torch.randn(3, 4)
    fixed = Conditioned(NetworkDenoiser(network, Karras()), {"class_labels": torch.tensor([7])})
    fixed(torch.zeros(3, 2), torch.ones(3), {"text": text, "class_labels": torch.zeros(3, dtype=torch.long)})
    assert network.calls[0][2]["text"] is text
    assert network.calls[0][2]["class_labels"].tolist() == [7, 7, 7]


def test_conditions_of_batch_one_expand_and_others_raise():
    cond = expand_cond({"text": torch.randn(1, 3, 4), "class_labels": torch.arange(5)}, 5)
    assert {name: value.shape for name, value in cond.items()} == {"text": (5, 3, 4), "class_labels": (5,)}
    assert torch.equal(cond["text"][0], cond["text"][4])
    repeated = expand_cond({"class_labels": torch.arange(3)}, 6)["class_labels"]
    assert torch.equal(repeated, torch.tensor([0, 1, 2, 0, 1, 2]))
    with refused(r"cond\['text'\] must have batch 1 or 5; got \(2, 4\)"):
        expand_cond({"text": torch.zeros(2, 4)}, 5)


def test_frozen_network_is_in_eval_mode_without_gradients():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    before = deepcopy(network)
    assert freeze(network) is network
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    close(network[0].weight.data, before[0].weight.data)
    assert freeze(network, torch.bfloat16)[0].weight.dtype == torch.bfloat16
