"""SiD, f-distill and Diff-Instruct against closed forms: Gaussians in one dimension, by quadrature, in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from denoisers import random_denoiser
from refusals import refused
from torch import nn

from distill.diff_instruct import integral_kl
from distill.dmd import DMD, GAN, dmd_weight
from distill.f_distill import DIVERGENCES, FDistill
from distill.sid import SiD
from distill.student import Student, even_times
from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.gradient import inject
from scorefield.guidance import guided
from scorefield.randomness import Rng
from scorefield.schedule import per_sample
from scorefield.times import constant, uniform

close = torch.testing.assert_close
M, S = 0.3, 0.8  # of the real distribution
A, B = 0.9, -0.2  # of the student: x0 = a z + b
TIMES = {"karras": (0.2, 1.5), "flow": (0.3, 0.8), "vp": (150.0, 500.0)}
CASES = [(name, t) for name, times in TIMES.items() for t in times]


class Told(nn.Module):
    """An exact x0 prediction and the exact log ratio of the densities, as a critic would return them."""

    def __init__(self, fake, real):
        super().__init__()
        self.fake, self.real = fake, real

    def forward(self, x_t, t):
        log_ratio = self.real.log_density(x_t, t) - self.fake.log_density(x_t, t)
        return self.fake(x_t, t, {}), log_ratio


def gaussian(mean, std, schedule):
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(mean * one[:, None], std * one, one, schedule)


def exact(kind, schedule, t, **settings):
    """A method whose teacher, fake score and critic are exact, at one time."""
    real, fake = gaussian(M, S, schedule), gaussian(B, A, schedule)
    network = NetworkDenoiser(Told(fake, real), schedule, "x0")
    student = Student(network, even_times(schedule, 1))
    gan = GAN() if kind is FDistill else None
    return kind(teacher=real, student=student, fake=network, shape=(1,), times=constant(t), gan=gan, **settings)


def by_quadrature(method, monkeypatch, nodes):
    """Expected gradient with respect to (a, b), over z and the noise."""
    points, weights = (torch.from_numpy(part) for part in nodes)
    z, noise = (part.flatten() for part in torch.meshgrid(points, points, indexing="ij"))
    share = torch.outer(weights, weights).flatten()
    monkeypatch.setattr("scorefield.gradient.normal_like", lambda x, generator: noise[:, None].to(x))
    gradient = method.gradient((A * z + B)[:, None], {}, {}, generator=torch.Generator()).value[:, 0]
    return torch.stack([(share * gradient * z).sum(), (share * gradient).sum()])


def hermite(n):
    points, weights = np.polynomial.hermite_e.hermegauss(n)
    return points, weights / weights.sum()


def even(n, reach=9.0):
    """The trapezoid rule, which converges faster than any power where the integrand vanishes at the ends."""
    points = np.linspace(-reach, reach, n)
    weights = np.exp(-(points**2) / 2)
    return points, weights / weights.sum()


def gradient_of(divergence, schedule, t):
    """d/d(a, b) of a divergence of (means, variances) of p_real and p_fake at t."""
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (A, B))
    time = torch.tensor(t, dtype=torch.float32)
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    value = divergence(alpha * M, (alpha * S) ** 2 + sigma**2, alpha * b, (alpha * a) ** 2 + sigma**2)
    return torch.stack(torch.autograd.grad(value, (a, b)))


def kl(mean_p, var_p, mean_q, var_q):
    return 0.5 * (var_q / var_p + (mean_q - mean_p) ** 2 / var_p - 1 + (var_p / var_q).log())


def fisher(mean_p, var_p, mean_q, var_q):
    """E_q (s_p - s_q)^2; the difference of the scores at mean_q + sqrt(var_q) u is affine in u."""
    return ((mean_q - mean_p) / var_p) ** 2 + (var_q.rsqrt() - var_q.sqrt() / var_p) ** 2


def score_weight(x0, target, t, schedule):
    return per_sample((schedule.alpha(t) / schedule.sigma(t) ** 2) ** 2, x0)


@pytest.mark.parametrize(("name", "t"), CASES)
def test_sid_at_one_half_is_half_the_gradient_of_the_fisher_divergence(schedules, monkeypatch, name, t):
    expected = gradient_of(fisher, schedules[name], t)
    method = exact(SiD, schedules[name], t, mixture=0.5, weight=score_weight)
    close(by_quadrature(method, monkeypatch, hermite(6)), expected / 2, rtol=1e-9, atol=1e-12)
    if (name, t) == CASES[0]:  # and at another mixture it is not
        method = exact(SiD, schedules[name], t, mixture=1.0, weight=score_weight)
        assert (by_quadrature(method, monkeypatch, hermite(6)) / expected - 0.5).abs().min() > 0.05


@pytest.mark.parametrize(("name", "t"), CASES)
def test_diff_instruct_is_the_gradient_of_the_kl_divergence(schedules, monkeypatch, name, t):
    found = by_quadrature(exact(DMD, schedules[name], t, weight=integral_kl()), monkeypatch, hermite(6))
    close(found, gradient_of(kl, schedules[name], t), rtol=1e-9, atol=1e-12)


def f_divergence(f):
    def divergence(mean_p, var_p, mean_q, var_q):
        x = torch.linspace(-14, 14, 4001, dtype=torch.float64) * max(var_p.sqrt(), var_q.detach().sqrt())
        log_p, log_q = (
            -0.5 * ((x - mean) ** 2 / var + (2 * math.pi * var).log())
            for mean, var in ((mean_p, var_p), (mean_q, var_q))
        )
        return torch.trapezoid(log_q.exp() * f((log_p - log_q).exp()), x)

    return divergence


GENERATORS = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


@pytest.mark.parametrize("name", list(GENERATORS))
@pytest.mark.parametrize(("family", "t"), CASES[1::2])
def test_f_distill_is_the_gradient_of_its_divergence(schedules, monkeypatch, name, family, t):
    method = exact(
        FDistill, schedules[family], t, weight=integral_kl(), divergence=DIVERGENCES[name], normalise=False,
        log_ratio_limit=1e9,
    )  # fmt: skip
    found = by_quadrature(method, monkeypatch, even(161))
    expected = gradient_of(f_divergence(GENERATORS[name]), schedules[family], t)
    close(found, expected, rtol=1e-7, atol=1e-10)
    assert GENERATORS.keys() == DIVERGENCES.keys()


# On networks with weights.

N = 6
LABELS = {"class_labels": torch.arange(N) % 2}
RNG = Rng(seed=3, step=2)


def make(kind, schedule, dtype=torch.float64, **settings):
    parts = {
        "teacher": guided(random_denoiser(schedule, 0, dtype=dtype), 2.0, {"class_labels": torch.tensor([2])}),
        "student": Student(random_denoiser(schedule, 1, dtype=dtype), even_times(schedule, 1)),
        "fake": random_denoiser(schedule, 2, critic=kind is FDistill, dtype=dtype),
        "times": uniform(0.1, 0.7),
        "gan": GAN(generator_weight=0.1, critic_weight=0.1) if kind is FDistill else None,
    }
    return kind(shape=(2,), **{**parts, **settings})


def make_batch(dtype=torch.float64):
    x0 = torch.randn(N, 2, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return {"x0": x0.requires_grad_(), "cond": LABELS, "fake_cond": {}}


def draws(method):
    generator = RNG("gradient")
    t = method.times(N, method.fake.schedule, generator)
    return t, torch.randn(N, 2, generator=generator, dtype=torch.float64)


def test_sid_is_the_gradient_of_its_loss(schedule):
    method = make(SiD, schedule, mixture=1.2)
    batch = make_batch()
    method.student_loss(batch, RNG)["loss"].backward()
    x0 = make_batch()["x0"]
    t, noise = draws(method)
    x_t = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * noise
    real, fake = method.teacher(x_t, t, LABELS), method.fake(x_t, t, LABELS)
    weight = 1 / (x0 - real).detach().abs().mean(1, keepdim=True)
    loss = (weight * (real - fake) * ((real - x0) - 1.2 * (real - fake))).sum() / x0.numel()
    close(batch["x0"].grad, torch.autograd.grad(loss, x0)[0], rtol=1e-10, atol=1e-14)


def test_diff_instruct_is_dmd_without_its_normaliser(schedule):
    """DMD's gradient times mean |x0 - target| is the gap; times w (alpha / sigma)^2 it is Diff-Instruct's."""
    plain, other = (
        make(DMD, schedule, weight=dmd_weight()),
        make(DMD, schedule, weight=integral_kl(lambda t, s: 3 + t.double())),
    )
    x0 = make_batch()["x0"].detach()
    ours, theirs = (m.gradient(x0, LABELS, {}, generator=RNG("gradient")).value for m in (plain, other))
    t, noise = draws(plain)
    with torch.no_grad():
        target = plain.teacher(schedule.diffuse(x0, noise, t), t, LABELS)
    normaliser = (x0 - target).abs().mean(1, keepdim=True)
    factor = (3 + t.double()) / schedule.ratio(t) ** 2
    close(theirs, ours * normaliser * factor[:, None], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("normalise", [False, True])
def test_f_distill_weights_dmd_by_the_critics_ratio(schedule, normalise):
    method = make(FDistill, schedule, divergence=DIVERGENCES["kl"], normalise=normalise)
    plain = make(DMD, schedule, fake=method.fake)
    x0 = make_batch()["x0"].detach()
    weighted, dmd = (m.gradient(x0, LABELS, {}, generator=RNG("gradient")) for m in (method, plain))
    t, noise = draws(method)
    with torch.no_grad():
        logits = method.fake.with_extras(schedule.diffuse(x0, noise, t), t, LABELS)[1][0]
    h = logits.exp()
    assert h.std() > 0.01
    h = h / h.mean() if normalise else h
    close(weighted.value, h[:, None] * dmd.value, rtol=1e-10, atol=1e-14)
    close(weighted.metrics["h_max"], h.max())


def test_a_critic_that_is_too_sure_is_not_believed(schedules):
    method = make(FDistill, schedules["flow"], divergence=DIVERGENCES["kl"], normalise=False, log_ratio_limit=1e-3)
    found = method.gradient(make_batch()["x0"].detach(), LABELS, {}, generator=RNG("gradient"))
    assert found.metrics["h_max"].item() <= math.exp(1e-3) + 1e-12


def test_what_f_distill_cannot_do_is_refused(schedule):
    x0, method = make_batch()["x0"].detach(), make(FDistill, schedule)
    with refused("reads the ratio of densities off a critic"):
        deaf = make(FDistill, schedule, fake=random_denoiser(schedule, 2, dtype=torch.float64))
        deaf.gradient(x0, LABELS, {}, generator=RNG("gradient"))
    for changes, message in (({"gan": None}, "which nothing trains with gan=None"),
                             ({"log_ratio_limit": 0}, "log_ratio_limit must be above 0; got 0")):  # fmt: skip
        with refused(message):
            replace(method, **changes)
    one = {"class_labels": torch.tensor([1])}
    with refused("h divided by the mean of one sample is 1"):
        method.gradient(x0[:1], one, {}, generator=RNG("gradient"))
    found = replace(method, normalise=False).gradient(x0[:1], one, {}, generator=RNG("gradient"))
    assert found.value.isfinite().all()


@pytest.mark.parametrize("role", ["teacher", "fake"])
@pytest.mark.parametrize("kind", [SiD, FDistill])
def test_answers_of_another_shape_are_refused(schedules, kind, role):
    """A flow of (6, 2) would broadcast against one of (6, 1), silently."""

    class Narrow(NetworkDenoiser):
        def with_extras(self, x_t, t, cond):
            x0, extras = super().with_extras(x_t, t, cond)
            return x0[:, :1], extras

        def __call__(self, x_t, t, cond):
            return self.with_extras(x_t, t, cond)[0]

    own = random_denoiser(schedules["flow"], critic=kind is FDistill, dtype=torch.float64)
    narrow = Narrow(own.network, own.schedule, own.kind)
    name = {"teacher": "teacher", "fake": "fake score"}[role]
    method = make(kind, schedules["flow"], **{role: narrow})
    with refused(rf"{name} must return the shape of x0 \(6, 2\); got \(6, 1\)"):
        method.gradient(make_batch()["x0"].detach(), LABELS, {}, generator=RNG("gradient"))


@pytest.mark.parametrize("kind", [SiD, FDistill])
def test_no_weight_of_teacher_or_fake_score_gets_a_gradient(schedule, kind):
    method = make(kind, schedule)
    x0 = make_batch()["x0"]
    inject(x0, method.gradient(x0, LABELS, {}, generator=RNG("gradient")).value).backward()
    assert bool((x0.grad != 0).all())
    networks = (method.teacher.denoiser.network, method.fake.network)
    assert all(p.grad is None for network in networks for p in network.parameters())
