"""The gradient that every method injects: against its formula, a closed-form KL, and in any units."""

import math
from copy import deepcopy

import pytest
import torch
from refusals import refused

from scorefield.denoiser import Conditioned, NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.gradient import (
    ScoreDistillation,
    denoising_loss,
    inject,
    karras_weight,
    min_snr_weight,
    noise_weight,
    prediction_weight,
    ratio_weight,
    standard_normal,
)
from scorefield.guidance import guided
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.times import constant, uniform

close = torch.testing.assert_close
NULL = {"class_labels": torch.tensor([2])}


def at_ratios(ratios):
    """A time sampler that asks every schedule for the same noise levels, unrounded."""
    return lambda n, schedule, generator: schedule.time(ratios)


def fixed_noise(noise):
    return lambda x0, cond, t, generator: noise


def dmd_weight(x0, target, t, schedule):
    """Per sample 1 / mean |x0 - target| (arXiv 2311.18828, Eq. 8)."""
    return 1 / (x0 - target).abs().mean(1, keepdim=True)


WEIGHTS = {"sds": ratio_weight(1), "csd": ratio_weight(0.5), "vsd": ratio_weight(1), "dmd": dmd_weight}


def method(name, teacher, fake, times, noise):
    """SDS and VSD at guidance 7.5, CSD between class and null class, DMD without guidance."""
    baseline = {"sds": None, "csd": Conditioned(teacher, NULL), "vsd": fake, "dmd": fake}[name]
    target = guided(teacher, 7.5, NULL) if name in ("sds", "vsd") else teacher
    return ScoreDistillation(
        teacher=target, baseline=baseline, times=times, weight=WEIGHTS[name], noise=fixed_noise(noise)
    )


@pytest.fixture
def problem(ratios, generator):
    x0, noise = torch.randn(2, len(ratios), 2, generator=generator, dtype=torch.float64)
    return x0, {"class_labels": torch.arange(len(ratios)) % 2}, noise


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_does_not_depend_on_schedule_or_prediction_kind(
    name, schedule, kind, ratios, problem, generator, make_mixture, exact_network
):
    """E[x0 | x_t] is a function of x_t / alpha and sigma / alpha, so nothing else may enter the gradient."""
    x0, cond, noise = problem

    def gradient(teacher, fake):
        return method(name, teacher, fake, at_ratios(ratios), noise).gradient(x0, cond, generator=generator).value

    networks = [
        NetworkDenoiser(exact_network(make_mixture(schedule, shift), kind), schedule, kind) for shift in (0.0, 0.3)
    ]
    expected = gradient(make_mixture(Karras()), make_mixture(Karras(), 0.3))
    assert expected.abs().max() > 0.1
    close(gradient(*networks), expected, rtol=1e-9, atol=1e-9)


def test_one_network_at_both_ends_is_one_call(schedule, ratios, problem, generator, make_mixture, exact_network):
    x0, cond, noise = problem
    mixture = make_mixture(schedule)
    denoiser = NetworkDenoiser(exact_network(mixture, "eps"), schedule)
    joined = method("csd", denoiser, None, at_ratios(ratios), noise).gradient(x0, cond, generator=generator)
    assert [len(x) for x, _, _ in denoiser.network.calls] == [2 * len(x0)]
    apart = ScoreDistillation(
        teacher=denoiser, baseline=Conditioned(make_mixture(schedule), NULL), times=at_ratios(ratios),
        weight=WEIGHTS["csd"], noise=fixed_noise(noise),
    )  # fmt: skip
    close(joined.value, apart.gradient(x0, cond, generator=generator).value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_is_the_weighted_gap_from_baseline_to_target(
    name, schedule, ratios, problem, generator, make_mixture
):
    x0, cond, noise = problem
    teacher, fake = make_mixture(schedule), make_mixture(schedule, 0.3)
    t = schedule.time(ratios)
    x_t = schedule.diffuse(x0, noise, t)
    null = {"class_labels": torch.full((len(x0),), 2)}
    positive, negative = teacher(x_t, t, cond), teacher(x_t, t, null)
    strong = negative + 7.5 * (positive - negative)
    weight = (1 / ratios)[:, None]
    expected = {
        "sds": weight * (x0 - strong),
        "csd": weight**0.5 * (negative - positive),
        "vsd": weight * (fake(x_t, t, cond) - strong),
        "dmd": (fake(x_t, t, cond) - positive) / (x0 - positive).abs().mean(1, keepdim=True),
    }
    value = method(name, teacher, fake, at_ratios(ratios), noise).gradient(x0, cond, generator=generator).value
    close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_noise_weight_gives_the_published_residual_of_sds(schedule, ratios, problem, generator, mixture):
    """w(t) (eps_hat - eps) (arXiv 2209.14988, Eq. 3)."""
    x0, cond, noise = problem
    t = schedule.time(ratios)
    x_t = schedule.diffuse(x0, noise, t)
    sds = ScoreDistillation(
        teacher=mixture, baseline=None, times=at_ratios(ratios), noise=fixed_noise(noise),
        weight=noise_weight(lambda t, schedule: 3 * schedule.sigma(t) ** 2),
    )  # fmt: skip
    residual = schedule.from_x0(mixture(x_t, t, cond), x_t, t, "eps") - noise
    expected = 3 * schedule.sigma(t)[:, None] ** 2 * residual
    close(sds.gradient(x0, cond, generator=generator).value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_ratio_weight_is_alpha_over_sigma_to_a_power(schedule, ratios, power):
    t, x = schedule.time(ratios), torch.zeros(len(ratios), 3, 4, 4, dtype=torch.float64)
    expected = (schedule.alpha(t) / schedule.sigma(t)) ** power
    close(ratio_weight(power)(x, x, t, schedule), expected.reshape(-1, 1, 1, 1))


# The affine student G(z) = a z + b on data N(m, s^2). At time t the student is N(alpha b, v_q) and the data
# N(alpha m, v_p) with v_q = alpha^2 a^2 + sigma^2, v_p = alpha^2 s^2 + sigma^2, so that
#   KL = (v_q / v_p - 1 - log(v_q / v_p) + alpha^2 (b - m)^2 / v_p) / 2.
STUDENT_A, STUDENT_B, DATA_MEAN, DATA_STD = 0.6, -0.5, 1.0, 1.5


def analytic_kl_gradient(alpha, sigma):
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (STUDENT_A, STUDENT_B))
    v_q, v_p = alpha**2 * a**2 + sigma**2, alpha**2 * DATA_STD**2 + sigma**2
    kl = (v_q / v_p - 1 - (v_q / v_p).log() + alpha**2 * (b - DATA_MEAN) ** 2 / v_p) / 2
    by_autograd = torch.stack(torch.autograd.grad(kl, (a, b)))
    by_hand = [alpha**2 * STUDENT_A * (1 / v_p - 1 / v_q), alpha**2 * (STUDENT_B - DATA_MEAN) / v_p]
    close(by_autograd, torch.stack(by_hand).detach())
    return by_autograd


def gaussian(mean, std, schedule):
    return GaussianMixture(torch.tensor([[mean]]).double(), torch.tensor([std]), torch.ones(1), schedule)


def distillation_gradient(schedule, t, n, generator):
    """Mean over n samples of the injected gradient with respect to (a, b), and its standard error."""
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (STUDENT_A, STUDENT_B))
    z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    x0 = a * z + b
    data, fake = gaussian(DATA_MEAN, DATA_STD, schedule), gaussian(STUDENT_B, STUDENT_A, schedule)
    dmd = ScoreDistillation(teacher=data, baseline=fake, times=constant(t), weight=ratio_weight(2))
    value = dmd.gradient(x0, {}, generator=generator).value
    (inject(x0, value) / n).backward()
    error = torch.stack([(value * z).std(), value.std()]) / math.sqrt(n)
    return torch.stack([a.grad, b.grad]), error


@pytest.mark.parametrize(("schedule", "t"), [
    (VariancePreserving.scaled_linear(), 300.0), (VariancePreserving.scaled_linear(), 600.0),
    (RectifiedFlow(), 0.3), (RectifiedFlow(), 0.6), (Karras(), 0.5), (Karras(), 2.0),
])  # fmt: skip
def test_dmd_gradient_of_an_affine_student_is_the_gradient_of_kl(schedule, t, generator):
    alpha, sigma = (f(torch.tensor(t, dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma))
    expected = analytic_kl_gradient(alpha, sigma)
    measured, error = distillation_gradient(schedule, t, 100_000, generator)
    assert ((measured - expected).abs() < 4 * error).all(), (measured, expected, error)
    # Negative controls: the tolerance must reject a flipped sign, a dropped alpha and half a weight.
    wrong = {"sign": -1.0, "weight": 0.5} | ({} if isinstance(schedule, Karras) else {"alpha": 1 / alpha})
    for factor in wrong.values():
        assert ((factor * measured - expected).abs() > 4 * error).all()


def test_gradient_vanishes_exactly_when_student_fake_and_teacher_agree(schedule, random_network):
    """In float32, through an ordinary network: any difference in arithmetic between the two calls would show."""
    teacher = NetworkDenoiser(random_network(), schedule)
    fake = NetworkDenoiser(deepcopy(teacher.network), schedule)
    x0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    cond = {"class_labels": torch.arange(64) % 3}
    for weight in (ratio_weight(2), dmd_weight):
        agree, differ = (
            ScoreDistillation(teacher=guided(teacher, s, NULL), baseline=fake, times=uniform(), weight=weight)
            for s in (1, 2)
        )
        assert not agree.gradient(x0, cond, generator=torch.Generator().manual_seed(0)).value.any()
        assert differ.gradient(x0, cond, generator=torch.Generator().manual_seed(0)).value.any()


def test_each_sample_is_diffused_and_weighted_at_its_own_time(schedule, ratios, problem, generator, mixture):
    x0, cond, noise = problem

    def value(rows):
        sds = method("sds", mixture, None, at_ratios(ratios[rows]), noise[rows])
        labels = {"class_labels": cond["class_labels"][rows]}
        return sds.gradient(x0[rows], labels, generator=generator).value

    alone = torch.cat([value(slice(i, i + 1)) for i in range(len(x0))])
    close(value(slice(None)), alone)


def test_gradient_touches_no_network_and_no_image(schedule, generator, random_network):
    teacher, fake = (NetworkDenoiser(random_network(), schedule) for _ in range(2))
    x0 = torch.randn(8, 2, generator=generator, requires_grad=True)
    dmd = ScoreDistillation(teacher=teacher, baseline=fake, times=uniform(), weight=ratio_weight(1))
    result = dmd.gradient(x0, {"class_labels": torch.zeros(8, dtype=torch.long)}, generator=generator)
    assert not result.value.requires_grad
    inject(x0, result.value).backward()
    assert all(p.grad is None for network in (teacher, fake) for p in network.network.parameters())
    assert torch.equal(x0.grad, result.value)


def test_metrics_are_scalar_tensors_of_their_names(schedule, ratios, problem, generator, mixture):
    x0, cond, noise = problem
    sds = method("sds", mixture, None, at_ratios(ratios), noise)
    result = sds.gradient(x0, cond, generator=generator)
    assert all(isinstance(m, torch.Tensor) and m.shape == () for m in result.metrics.values())
    gap = result.value * ratios[:, None]
    close(result.metrics["gradient_rms"].double(), result.value.square().mean().sqrt(), rtol=1e-6, atol=0)
    close(result.metrics["gap_rms"].double(), gap.square().mean().sqrt(), rtol=1e-6, atol=0)
    close(result.metrics["t_mean"], schedule.time(ratios).mean())


def test_generator_alone_decides_time_and_noise(schedule, problem, mixture):
    x0, cond, _ = problem
    sds = ScoreDistillation(teacher=mixture, baseline=None, times=uniform(), weight=ratio_weight(1))

    def draw(seed):
        return sds.gradient(x0, cond, generator=torch.Generator().manual_seed(seed)).value

    torch.manual_seed(0)
    first = draw(3)
    torch.manual_seed(1)
    assert torch.equal(draw(3), first)
    assert not torch.equal(draw(4), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_injected_gradient_is_exact_in_low_precision_and_a_constant_to_autograd(dtype, generator):
    """A thousandth of x0: what x0 - (x0 - g) rounds away."""
    x0 = torch.randn(64, 3, generator=generator).to(dtype).requires_grad_()
    g = (1e-3 * torch.randn(64, 3, generator=generator)).to(dtype).requires_grad_()
    scalar = inject(x0, g)
    scalar.backward()
    assert scalar.shape == ()
    assert torch.equal(x0.grad, g)
    assert g.grad is None


def test_injected_scalar_of_a_half_precision_image_is_finite():
    """A sum over a large latent overflows float16, though its gradient does not."""
    x0 = torch.full((1, 4, 64, 64), 8.0, dtype=torch.float16, requires_grad=True)
    g = torch.full_like(x0, 2.0)
    scalar = inject(x0, g)
    scalar.backward()
    assert (scalar.dtype, scalar.item()) == (torch.float32, 4 * 64 * 64 * 16)
    assert torch.equal(x0.grad, g)


def loss_of(denoiser, x0, cond, ratios, weight, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return denoising_loss(denoiser, x0, cond, times=at_ratios(ratios), weight=weight, generator=generator)


def test_prediction_weight_makes_the_error_of_the_networks_own_output(
    schedule, kind, ratios, problem, random_network
):
    x0, cond, _ = problem
    network = random_network(dtype=torch.float64)
    loss = loss_of(NetworkDenoiser(network, schedule, kind), x0, cond, ratios, prediction_weight(kind))
    t = schedule.time(ratios)
    noise = standard_normal(x0, cond, t, torch.Generator().manual_seed(0))
    x_t = schedule.diffuse(x0, noise, t)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    answers = {"x0": x0, "eps": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0}
    close(loss, (network(x_t, t, **cond) - answers[kind]).square().mean(1), rtol=1e-9, atol=1e-9)


def test_edm_and_min_snr_weights_are_functions_of_the_noise_level(schedule, ratios):
    t = schedule.time(ratios)
    close(karras_weight(0.7)(t, schedule), (ratios**2 + 0.7**2) / (ratios * 0.7) ** 2, rtol=1e-9, atol=0)
    close(min_snr_weight(2.0)(t, schedule), (ratios**-2).clamp(max=2.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_weight_is_the_papers_for_eps_and_v(kind, ratios):
    """min(SNR, gamma) over SNR, or over SNR + 1, times the network's own loss (arXiv 2303.09556, section 3.4)."""
    schedule = VariancePreserving.scaled_linear()
    t = schedule.time(ratios)
    snr = ratios**-2
    of_the_loss = snr.clamp(max=5.0) / (snr + (1.0 if kind == "v" else 0.0))
    close(min_snr_weight()(t, schedule), of_the_loss * prediction_weight(kind)(t, schedule), rtol=1e-9, atol=0)
    assert bool((snr > 5).any() and (snr < 5).any())


def test_denoising_loss_is_lowest_for_the_true_denoiser(schedule, generator, make_mixture):
    truth = make_mixture(schedule)
    x0 = truth.sample(20_000, generator)

    def mean_loss(denoiser):
        generator = torch.Generator().manual_seed(1)
        return denoising_loss(
            denoiser, x0, {}, times=uniform(0.2, 0.8), weight=prediction_weight("x0"), generator=generator
        ).mean()

    assert mean_loss(truth) < min(mean_loss(make_mixture(schedule, shift)) for shift in (-0.1, 0.1))


def test_denoising_loss_is_per_sample_and_reaches_the_network(schedule, kind, ratios, problem, random_network):
    x0, cond, _ = problem
    network = random_network(dtype=torch.float64)
    denoiser = NetworkDenoiser(network, schedule, kind)
    loss = loss_of(denoiser, x0, cond, ratios, karras_weight())
    assert loss.shape == (len(x0),)
    changed = x0.clone()
    changed[0] += 1
    assert torch.equal(loss_of(denoiser, changed, cond, ratios, karras_weight())[1:], loss[1:])
    loss.mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.net.parameters())


def test_schedules_that_differ_are_refused_and_equal_ones_are_not(make_mixture):
    tables = [VariancePreserving.linear(), VariancePreserving.scaled_linear()]

    def build(one, other):
        ScoreDistillation(
            teacher=make_mixture(one), baseline=make_mixture(other), times=constant(1.0), weight=ratio_weight(1)
        )

    for one, other in (*((Karras(), x) for x in (*tables, RectifiedFlow(), Karras(t_max=70.0))), tables):
        with refused(r"(?s)must share a schedule; got .*\(.*Wrap one in .*rescheduled"):
            build(one, other)
    for family in (Karras, RectifiedFlow, VariancePreserving.linear):
        build(family(), family())


class OneChannel:
    """A denoiser that loses a channel."""

    schedule = Karras()

    def __call__(self, x_t, t, cond):
        return x_t[:, :1]


@pytest.mark.parametrize("role", ["teacher", "baseline"])
def test_denoiser_of_another_shape_raises_naming_its_role(role, make_mixture, generator):
    denoisers = {"teacher": make_mixture(Karras()), "baseline": make_mixture(Karras())} | {role: OneChannel()}
    distillation = ScoreDistillation(**denoisers, times=uniform(), weight=ratio_weight(1))
    with refused(rf"{role} must return the shape of x0 \(3, 2\); got \(3, 1\)"):
        distillation.gradient(torch.zeros(3, 2, dtype=torch.float64), {}, generator=generator)


def test_impossible_weights_are_refused():
    with refused("unknown prediction kind 'velocity'; expected one of x0, eps, v, flow"):
        prediction_weight("velocity")
    for gamma in (0.0, -1.0, math.nan):
        with refused("gamma of min-SNR must be above 0; got"):
            min_snr_weight(gamma)
