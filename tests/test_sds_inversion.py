"""Losses along inverted paths against closed form: the probability flow of a Gaussian is a straight map."""

import pytest
import torch
from torch import nn

from scorefield.denoiser import Conditioned, NetworkDenoiser, freeze
from scorefield.exact import GaussianMixture
from scorefield.guidance import guided
from scorefield.schedule import RectifiedFlow, VariancePreserving
from scorefield.times import constant
from sds.inversion import earlier, inverted, ism, sdi
from sds.losses import distillation_loss, noise_to_signal, sigma_squared, unit

close = torch.testing.assert_close
PROMPT, NULL = 0, 1
MEANS = torch.tensor([[1.0, -0.5, 0.3], [-0.7, 0.4, -0.2]], dtype=torch.float64)
STDS = torch.tensor([0.4, 0.6], dtype=torch.float64)
X = torch.tensor([[1.6, 1.9, -2.1], [0.3, -1.0, 1.2]], dtype=torch.float64)
COND = {"class_labels": torch.tensor([PROMPT, PROMPT])}
NEGATIVE = {"class_labels": torch.tensor([NULL])}
FINE = 1e-3
"""A stride so small that DDIM follows the flow."""


@pytest.fixture
def teacher(schedule):
    return GaussianMixture(MEANS, STDS, torch.ones(2), schedule, torch.arange(2))


def seeded():
    return torch.Generator().manual_seed(0)


def at(schedule, *fractions):
    return schedule.at(torch.tensor(fractions, dtype=torch.float64))


def flowed(schedule, x0, t, k):
    """Where the flow takes x0: the same number of standard deviations from the mean, whatever the noise."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    return alpha * MEANS[k] + (alpha**2 * STDS[k] ** 2 + sigma**2).sqrt() / STDS[k] * (x0 - MEANS[k])


def expected_image(schedule, x_t, t, k):
    """E[x0 | x_t] of one Gaussian."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    return MEANS[k] + alpha * STDS[k] ** 2 / (alpha**2 * STDS[k] ** 2 + sigma**2) * (x_t - alpha * MEANS[k])


def expected_noise(schedule, x_t, t, k):
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    return (x_t - alpha * expected_image(schedule, x_t, t, k)) / sigma


def mixed(function, scale):
    """Guidance of anything that is affine in the image: null + scale (prompt - null)."""
    return (1 - scale) * function(NULL) + scale * function(PROMPT)


# Where paths lead.


def test_inversion_in_small_steps_is_the_probability_flow(teacher, schedule):
    t = at(schedule, 0.3, 0.8)
    truth = flowed(schedule, X, t, PROMPT)

    def errors(stride):
        off = (inverted(teacher, X, t, COND, stride=stride) - truth).abs().amax(1)
        return off / truth.abs().amax(1)

    # Of first order: 0.1 to 0.7 % at a noise level of 0.3, up to 2.8 % behind the long way to 0.8 of EDM.
    assert (errors(FINE) < torch.tensor([0.01, 0.03])).all()
    assert (errors(0.25) > 10 * errors(FINE)).all()


def test_a_path_of_one_step_is_ddims(teacher, schedule):
    t = at(schedule, 0.1, 0.1)
    noise = expected_noise(schedule, X, t, PROMPT)
    expected = schedule.alpha(t)[:, None] * X + schedule.sigma(t)[:, None] * noise
    close(inverted(teacher, X, t, COND, stride=1.0), expected, rtol=1e-9, atol=1e-9)


def test_a_path_does_not_depend_on_the_others_of_its_batch(teacher, schedule):
    t = at(schedule, 0.2, 0.9)
    both = inverted(teacher, X, t, COND)
    for row in (slice(0, 1), slice(1, 2)):
        alone = inverted(teacher, X[row], t[row], {"class_labels": COND["class_labels"][row]})
        close(both[row], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [0.0, 1.5, -0.1])
def test_a_stride_outside_its_range_is_refused(teacher, schedule, stride):
    with pytest.raises(ValueError, match=r"stride must lie in \(0, 1\]"):
        inverted(teacher, X, at(schedule, 0.5, 0.5), COND, stride=stride)


def test_the_earlier_time_is_an_interval_before_and_never_without_noise(schedule):
    close(earlier(schedule, at(schedule, 0.5, 0.9), 0.05), at(schedule, 0.45, 0.85), rtol=1e-9, atol=1e-9)
    first = earlier(schedule, at(schedule, 0.02, 0.06), 0.05)
    close(first, at(schedule, 0.01, 0.03), rtol=1e-9, atol=1e-9)
    assert (schedule.sigma(first) > 0).all()


def test_timesteps_of_a_teacher_that_knows_integers_stay_integers():
    schedule = VariancePreserving.scaled_linear()
    t = torch.arange(20.0, 999)
    s = earlier(schedule, t, 50 / 999)
    assert torch.equal(s, s.round())
    assert torch.equal((t - s)[80:], torch.full((899,), 50.0, dtype=torch.float64))


# The losses.

WEIGHTS = {
    "sigma^2": (sigma_squared, lambda alpha, sigma: sigma**2), "1": (unit, lambda alpha, sigma: 1.0),
    "sigma / alpha": (noise_to_signal, lambda alpha, sigma: sigma / alpha),
}  # fmt: skip


def ism_by_hand(schedule, t, s, w, scale):
    """Along the exact flow to s, then by one DDIM step to t."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x_s = flowed(schedule, X, s, NULL)
    before = expected_noise(schedule, x_s, s, NULL)
    x_t = alpha * expected_image(schedule, x_s, s, NULL) + sigma * before
    return w(alpha, sigma) * (mixed(lambda k: expected_noise(schedule, x_t, t, k), scale) - before)


@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_interval_score_matching_is_the_closed_form(teacher, schedule, weight):
    w, by_hand = WEIGHTS[weight]
    fraction, interval, scale = 0.6, 0.1, 7.5
    t = at(schedule, fraction, fraction)
    method = ism(
        guided(teacher, scale, NEGATIVE), Conditioned(teacher, NEGATIVE), interval=interval, stride=FINE,
        times=constant(float(t[0])), w=w,
    )  # fmt: skip
    value = method.gradient(X, COND, generator=seeded()).value
    truth = ism_by_hand(schedule, t, at(schedule, 0.5, 0.5), by_hand, scale)
    error = (value - truth).abs().max()
    assert error < 5e-3 * truth.abs().max()
    other = next(one for name, (_, one) in WEIGHTS.items() if name != weight)
    for wrong in (
        -truth, ism_by_hand(schedule, t, at(schedule, 0.5, 0.5), by_hand, scale - 1),
        ism_by_hand(schedule, t, at(schedule, 0.4, 0.4), by_hand, scale),
        ism_by_hand(schedule, t, at(schedule, 0.5, 0.5), other, scale),
        ism_by_hand(schedule, t, t, by_hand, scale),
    ):  # fmt: skip
        assert (value - wrong).abs().max() > 3 * error


def sdi_by_hand(schedule, x_t, t, scale):
    return X - mixed(lambda k: expected_image(schedule, x_t, t, k), scale)


@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_score_distillation_via_inversion_is_the_closed_form(teacher, schedule, weight):
    """One step of inversion, guided by -7.5, is known exactly; so is the teacher's answer there."""
    w, by_hand = WEIGHTS[weight]
    t = at(schedule, 0.6, 0.6)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]

    def there(scale):
        return alpha * X + sigma * mixed(lambda k: expected_noise(schedule, X, t, k), scale)

    method = sdi(
        guided(teacher, 7.5, NEGATIVE), guided(teacher, -7.5, NEGATIVE), stride=1.0, times=constant(float(t[0])),
        w=w,
    )  # fmt: skip
    value = method.gradient(X, COND, generator=seeded()).value
    truth = by_hand(alpha, sigma) * sdi_by_hand(schedule, there(-7.5), t, 7.5)
    close(value, truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))  # times are float32
    for wrong in (
        -truth, by_hand(alpha, sigma) * sdi_by_hand(schedule, there(7.5), t, 7.5),
        by_hand(alpha, sigma) * sdi_by_hand(schedule, there(-7.5), t, 6.5),
        2.0 * truth,
    ):  # fmt: skip
        assert (value - wrong).abs().max() > 1e-2 * truth.abs().max()


def test_without_randomness_two_seeds_have_one_gradient(teacher):
    null = Conditioned(teacher, NEGATIVE)
    fixed = constant(float(at(teacher.schedule, 0.5)[0]))
    for method in (ism(teacher, null, times=fixed), sdi(teacher, guided(teacher, -7.5, NEGATIVE), times=fixed)):
        one, other = (
            method.gradient(X, COND, generator=torch.Generator().manual_seed(seed)).value for seed in (0, 1)
        )
        assert torch.equal(one, other)


def test_a_render_that_the_flow_leads_back_to_has_no_gradient():
    """Inverted and sampled by one denoiser in one small step, the image is the teacher's answer."""
    teacher = GaussianMixture(MEANS, STDS * 1e-6, torch.ones(2), RectifiedFlow(), torch.arange(2))
    there = MEANS[[PROMPT, PROMPT]]
    value = sdi(teacher, teacher, stride=0.01).gradient(there, COND, generator=seeded()).value
    assert value.abs().max() < 1e-6


class Watched(nn.Module):
    """A frozen network that notes how it is called."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.graphs, self.times = [], []

    def forward(self, x_t, t, **cond):
        self.graphs.append(torch.is_grad_enabled() or x_t.requires_grad)
        self.times.append(t)
        return 0.5 * x_t * self.scale


@pytest.mark.parametrize("name", ["ISM", "SDI"])
def test_no_network_is_run_with_a_graph_and_timesteps_are_whole(name):
    denoiser = NetworkDenoiser(freeze(Watched()), VariancePreserving.scaled_linear())
    method = {
        "ISM": lambda: ism(guided(denoiser, 7.5, NEGATIVE), Conditioned(denoiser, NEGATIVE)),
        "SDI": lambda: sdi(guided(denoiser, 7.5, NEGATIVE), guided(denoiser, -7.5, NEGATIVE)),
    }[name]()
    x0 = torch.randn(2, 3, generator=seeded()).requires_grad_()
    distillation_loss(method, x0, COND, num_draws=2, generator=seeded())["loss"].backward()
    assert denoiser.network.graphs
    assert not any(denoiser.network.graphs)
    assert x0.grad.abs().sum() > 0
    t = torch.cat(denoiser.network.times)
    assert torch.equal(t, t.round())


@pytest.mark.parametrize("interval", [0.0, 1.0])
def test_an_interval_outside_its_range_is_refused(teacher, interval):
    with pytest.raises(ValueError, match=r"interval must lie in \(0, 1\)"):
        ism(teacher, teacher, interval=interval)


def test_a_bad_sample_is_named_by_its_time(schedule):
    class Broken:
        def __call__(self, x_t, t, cond):
            return torch.where(t[:, None] == t.max(), torch.nan, x_t)

    broken = Broken()
    broken.schedule = schedule
    t = at(schedule, 0.4, 0.7)
    for method in (ism(broken, broken, times=lambda *_: t), sdi(broken, broken, times=lambda *_: t)):
        terms = distillation_loss(method, X, COND, generator=seeded())
        assert not terms["loss"].isfinite()
        assert terms["t_not_finite_max"] == t.max()
