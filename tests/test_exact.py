"""Exact denoisers: scores by autograd, Bayes' rule by quadrature, Tweedie's formula, the ends of time."""

import math

import pytest
import torch
from denoisers import normal
from refusals import refused
from torch.utils._python_dispatch import TorchDispatchMode

from scorefield.exact import EmpiricalDistribution, GaussianMixture
from scorefield.schedule import Karras, RectifiedFlow

close = torch.testing.assert_close


@pytest.fixture
def points(schedule, ratios, generator):
    t = schedule.time(ratios)
    return torch.randn(len(t), 2, generator=generator, dtype=torch.float64), t


def labels_of(number, t):
    return {"class_labels": torch.full((len(t),), number)}


@pytest.mark.parametrize("label", [None, 0, 1, 2], ids=["no_cond", "class0", "class1", "null"])
@pytest.mark.parametrize("labelled", [True, False])
def test_score_and_denoised_image_are_the_gradient_of_log_density(make_mixture, schedule, points, label, labelled):
    """The image by Tweedie's formula: (x_t + sigma^2 score) / alpha."""
    x_t, t = points
    cond = {} if label is None or not labelled else labels_of(label, t)
    mixture, x_t = make_mixture(schedule, labelled=labelled), x_t.requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x_t, t, cond).sum(), x_t)
    close(mixture.score(x_t.detach(), t, cond), score, rtol=1e-10, atol=1e-10)
    expected = (x_t + schedule.sigma(t)[:, None] ** 2 * score) / schedule.alpha(t)[:, None]
    close(mixture(x_t.detach(), t, cond), expected.detach(), rtol=1e-9, atol=1e-9)


def test_denoiser_and_density_agree_with_quadrature_of_bayes_rule(schedule):
    means, stds, weights = (torch.tensor(v).double() for v in ([[-1.0], [2.0]], [0.3, 0.5], [1.0, 3.0]))
    mixture, x0 = GaussianMixture(means, stds, weights, schedule), torch.linspace(-4, 6, 20_001).double()
    bells = torch.exp(-0.5 * ((x0 - means) / stds[:, None]) ** 2) / (stds[:, None] * math.sqrt(2 * math.pi))
    t = schedule.time(torch.tensor([0.05, 0.5, 2.0, 10.0]))
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x_t = alpha * torch.tensor([[-0.7], [0.4], [0.1], [6.0]], dtype=torch.float64)
    likelihood = torch.exp(-0.5 * ((x_t - alpha * x0) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    joint = likelihood * (torch.tensor([0.25, 0.75]).double() @ bells)
    close(mixture(x_t, t, {})[:, 0], torch.trapezoid(joint * x0, x0) / torch.trapezoid(joint, x0))
    close(mixture.log_density(x_t, t), torch.trapezoid(joint, x0).log(), rtol=1e-6, atol=1e-6)


def test_labels_restrict_the_mixture_to_their_class(mixture, make_mixture, schedule, points):
    x_t, t = points
    full = make_mixture(schedule, labelled=False)
    parts = [GaussianMixture(full.means[rows], full.stds[rows], full.weights[rows], schedule)
             for rows in (torch.tensor([0, 2]), torch.tensor([1, 3]))]  # fmt: skip
    for label, part in enumerate([*parts, full]):  # the last is the null class
        close(mixture(x_t, t, labels_of(label, t)), part(x_t, t, {}))
        close(mixture.log_density(x_t, t, labels_of(label, t)), part.log_density(x_t, t))


@pytest.mark.parametrize("distance", [1e3, 1e6])
def test_far_points_stay_finite(mixture, schedule, ratios, distance):
    """Every component underflows there; the nearest must still win."""
    t = schedule.time(ratios)
    x_t = torch.full((len(t), 2), distance, dtype=torch.float64)
    for cond in ({}, labels_of(0, t)):
        for answer in (mixture(x_t, t, cond), mixture.log_density(x_t, t, cond), mixture.score(x_t, t, cond)):
            assert torch.isfinite(answer).all()
        assert (answer < 0).all()


def test_samples_have_the_moments_classes_and_noise_of_the_mixture(mixture, schedule, generator):
    """E[score] = 0 and Stein's E[score (x_t - mean)^T] = -I: both fail if sample and density disagree."""
    n, weights, one = 50_000, mixture.weights, torch.eye(2, dtype=torch.float64)
    x0 = mixture.sample(n, generator)
    mean = weights @ mixture.means
    scatter = (weights[:, None, None] * (mixture.means[:, :, None] * mixture.means[:, None])).sum(0)
    covariance = scatter - mean[:, None] * mean + (weights @ mixture.stds**2) * one
    close(x0.mean(0), mean, rtol=0, atol=4 * covariance.diagonal().max().sqrt().item() / math.sqrt(n))
    close(torch.cov(x0.T), covariance, rtol=0, atol=0.05)
    close(torch.bincount(mixture.component(x0), minlength=4) / n, weights.float(), rtol=0, atol=0.03)
    assert mixture.component(mixture.means + 0.05).tolist() == [0, 1, 2, 3]
    labels = torch.tensor([0, 1]).repeat(500)
    drawn = mixture.sample(1000, generator, {"class_labels": labels})
    assert (mixture.labels[mixture.component(drawn)] == labels).double().mean() > 0.97
    t = schedule.time(torch.tensor([0.5])).expand(n)
    x_t = schedule.diffuse(x0, torch.randn(n, 2, generator=generator, dtype=torch.float64), t)
    score = mixture.score(x_t, t, {})
    assert (score.mean(0).abs() < 4 * score.std(0) / math.sqrt(n)).all()
    close((score[:, :, None] * (x_t - x_t.mean(0))[:, None]).mean(0), -one, rtol=0, atol=0.05)


def test_mixture_keeps_shape_and_dtype_of_images(schedule):
    mixture = GaussianMixture(torch.randn(2, 3, 4, 4), torch.ones(2), torch.ones(2), schedule)
    x, t = torch.randn(5, 3, 4, 4), torch.full((5,), 0.5)
    assert (mixture(x, t, {}).shape, mixture(x, t, {}).dtype) == (x.shape, torch.float32)
    assert mixture.score(x, t, {}).shape == x.shape
    assert mixture.sample(6, torch.Generator()).shape == (6, 3, 4, 4)


@pytest.mark.parametrize(("stds", "weights", "message"), [
    ([1.0, 0.0], [1.0, 1.0], "stds must be 2"), ([1.0], [1.0, 1.0], "stds must be 2"),
    ([1.0, 1.0], [1.0, -1.0], "weights must be 2"), ([1.0, 1.0], [1.0, 1.0, 1.0], "weights must be 2"),
])  # fmt: skip
def test_impossible_mixtures_raise(stds, weights, message):
    with refused(message + " values above 0, one per mean; got tensor"):
        GaussianMixture(torch.zeros(2, 2), torch.tensor(stds), torch.tensor(weights), Karras())


@pytest.fixture
def images(generator):
    return torch.randn(100, 1, 3, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def image_labels(generator):
    return torch.randint(0, 3, (100,), generator=generator)


def brute_force(images, x_t, t, schedule):
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    difference = x_t.flatten(1)[:, None] - alpha[..., None] * images.flatten(1)
    share = (-difference.square().sum(-1) / (2 * sigma**2)).softmax(1)
    return (share @ images.flatten(1)).view_as(x_t)


@pytest.mark.parametrize("chunk", [1, 7, 50, 100, 4096])
def test_empirical_denoiser_is_a_softmax_average_for_any_chunk_and_label(
    images, image_labels, schedule, ratios, chunk
):
    """Chunks in which a sample's class does not occur at all must not disturb the running maximum."""
    t = schedule.time(ratios)
    x_t = normal(len(t), 1, 3, 3, seed=4)
    denoiser = EmpiricalDistribution(images, schedule, chunk=chunk)
    close(denoiser(x_t, t, {}), brute_force(images, x_t, t, schedule), rtol=1e-10, atol=1e-10)
    narrow = GaussianMixture(images, torch.full((100,), 1e-7), torch.ones(100), schedule)
    close(denoiser(x_t, t, {}), narrow(x_t, t, {}), rtol=1e-8, atol=1e-8)
    order = image_labels.argsort()
    images, image_labels, wanted = images[order], image_labels[order], torch.arange(len(t)) % 4
    x0 = EmpiricalDistribution(images, schedule, image_labels, chunk)(x_t, t, {"class_labels": wanted})
    for i, label in enumerate(wanted):
        kept = images if label == 3 else images[image_labels == label]
        close(x0[i : i + 1], brute_force(kept, x_t[i : i + 1], t[i : i + 1], schedule), rtol=1e-10, atol=1e-10)


def test_barely_noisy_images_return_to_themselves(images, generator):
    """At sigma = 0.002 exponents reach 1e6."""
    t = torch.full((100,), 0.002)
    x_t = Karras().diffuse(images, torch.randn(images.shape, generator=generator, dtype=torch.float64), t)
    close(EmpiricalDistribution(images, Karras(), chunk=16)(x_t, t, {}), images, rtol=0, atol=1e-12)
    assert torch.isfinite(EmpiricalDistribution(images, Karras())(x_t + 1e4, t, {})).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not torch._C._is_alias_of(result, args[0]):
            self.numel = max(self.numel, result.numel())
        return result


def test_memory_does_not_grow_with_the_number_of_images(generator):
    images = torch.rand(60_000, 64, generator=generator)
    denoiser = EmpiricalDistribution(images, Karras(), chunk=1000)
    x_t, t = images[:4] + 0.01, torch.full((4,), 0.05)
    with LargestTensor() as seen:
        x0 = denoiser(x_t, t, {})
    assert seen.numel == 1000 * 64
    assert (x0 - images[:4]).abs().max() < 1e-3


def test_bad_images_labels_and_times_are_named(images, image_labels, mixture, make_mixture, schedule):
    with refused(r"labels must be \(100,\), one per image; got \(99,\)"):
        EmpiricalDistribution(images, Karras(), torch.zeros(99, dtype=torch.long))
    for label in (-1, 4):
        t, labels = torch.ones(2), {"class_labels": torch.tensor([0, label])}
        with refused(rf"\[0, 2\], or be 3 for the null class; got .*{label}"):
            EmpiricalDistribution(images, Karras(), image_labels)(images[:2], t, labels)
        with refused(rf"\[0, 1\], or be 2 for the null class; got .*{label}"):
            make_mixture(Karras())(torch.zeros(2, 2), t, labels)
    for denoiser, x in ((mixture, torch.zeros(2, 2)), (EmpiricalDistribution(images, schedule), images[:2])):
        for t in (torch.tensor(0.5), torch.full((3,), 0.5)):
            with refused(r"t must have shape \(2,\) to match x_t"):
                denoiser(x, t, {})
    images[17, 0, 1, 1], images[40, 0, 0, 0] = torch.nan, torch.inf
    with refused("images must be finite; image 17 holds nan or inf"):
        EmpiricalDistribution(images, Karras())


def test_both_ends_of_a_flow_are_the_mean_of_the_data_and_the_image(make_mixture, images):
    mixture, empirical = make_mixture(RectifiedFlow()), EmpiricalDistribution(images, RectifiedFlow())
    x, clean, noise = normal(2, 2), torch.zeros(2), torch.ones(2)
    close(mixture(x, noise, {}), (mixture.weights @ mixture.means).expand(2, 2))
    close(empirical(images[:2], noise, {}), images.mean(0).expand(2, 1, 3, 3))
    close(mixture(x, clean, {}), x)
    close(empirical(images[:2], clean, {}), images[:2])
