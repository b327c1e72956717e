import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scorefield.exact import EmpiricalDistribution, GaussianMixture
from scorefield.schedule import Karras, RectifiedFlow

close = torch.testing.assert_close


@pytest.fixture
def points(schedule, ratios, generator):
    t = schedule.time(ratios)
    return torch.randn(len(t), 2, generator=generator, dtype=torch.float64), t


@pytest.fixture(params=[None, 0, 1, 2], ids=["no_cond", "class0", "class1", "null"])
def cond(request, ratios):
    return {} if request.param is None else {"class_labels": torch.full((len(ratios),), request.param)}


def test_score_is_the_gradient_of_log_density(mixture, points, cond):
    x_t, t = points
    x_t = x_t.requires_grad_()
    expected = torch.autograd.grad(mixture.log_density(x_t, t, cond).sum(), x_t)[0]
    close(mixture.score(x_t.detach(), t, cond), expected, rtol=1e-10, atol=1e-10)


def test_score_without_labels_is_the_gradient_of_log_density(schedule, points, make_mixture):
    mixture, (x_t, t) = make_mixture(schedule, labelled=False), points
    x_t = x_t.requires_grad_()
    expected = torch.autograd.grad(mixture.log_density(x_t, t).sum(), x_t)[0]
    close(mixture.score(x_t.detach(), t, {}), expected, rtol=1e-10, atol=1e-10)


def test_denoised_image_is_tweedies(mixture, schedule, points, cond):
    """(x_t + sigma^2 score) / alpha, with the score by autograd."""
    x_t, t = points
    x_t = x_t.requires_grad_()
    score = torch.autograd.grad(mixture.log_density(x_t, t, cond).sum(), x_t)[0]
    expected = (x_t + schedule.sigma(t)[:, None] ** 2 * score) / schedule.alpha(t)[:, None]
    close(mixture(x_t.detach(), t, cond), expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.fixture
def line(schedule):
    """A mixture in one dimension, a grid to integrate over, and its density of clean images there."""
    means, stds, weights = (
        torch.tensor(v, dtype=torch.float64) for v in ([[-1.0], [2.0]], [0.3, 0.5], [1.0, 3.0])
    )
    x0 = torch.linspace(-4, 6, 20_001, dtype=torch.float64)
    normal = torch.exp(-0.5 * ((x0 - means) / stds[:, None]) ** 2) / (stds[:, None] * math.sqrt(2 * math.pi))
    return GaussianMixture(means, stds, weights, schedule), x0, torch.tensor([0.25, 0.75]).double() @ normal


def test_denoiser_and_density_agree_with_quadrature_of_bayes_rule(line, schedule):
    mixture, x0, density = line
    t = schedule.time(torch.tensor([0.05, 0.5, 2.0, 10.0]))
    x_t = schedule.alpha(t)[:, None] * torch.tensor([[-0.7], [0.4], [0.1], [6.0]], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    likelihood = torch.exp(-0.5 * ((x_t - alpha * x0) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    joint = likelihood * density
    close(mixture(x_t, t, {})[:, 0], torch.trapezoid(joint * x0, x0) / torch.trapezoid(joint, x0))
    close(mixture.log_density(x_t, t), torch.trapezoid(joint, x0).log(), rtol=1e-6, atol=1e-6)


def test_labels_restrict_the_mixture_to_their_class(mixture, make_mixture, schedule, points):
    x_t, t = points
    full = make_mixture(schedule, labelled=False)
    for label in (0, 1):
        rows = torch.tensor([label, label + 2])
        part = GaussianMixture(full.means[rows], full.stds[rows], full.weights[rows], schedule)
        cond = {"class_labels": torch.full((len(t),), label)}
        close(mixture(x_t, t, cond), part(x_t, t, {}))
        close(mixture.log_density(x_t, t, cond), part.log_density(x_t, t))
    null = {"class_labels": torch.full((len(t),), 2)}
    close(mixture(x_t, t, null), full(x_t, t, {}))
    close(mixture.log_density(x_t, t, null), full.log_density(x_t, t))


@pytest.mark.parametrize("distance", [1e3, 1e6])
def test_far_points_stay_finite(mixture, schedule, ratios, distance):
    """Every component underflows there; the nearest must still win."""
    t = schedule.time(ratios)
    x_t = torch.full((len(t), 2), distance, dtype=torch.float64)
    for cond in ({}, {"class_labels": torch.zeros(len(t), dtype=torch.long)}):
        assert torch.isfinite(mixture(x_t, t, cond)).all()
        assert torch.isfinite(mixture.score(x_t, t, cond)).all()
        assert torch.isfinite(mixture.log_density(x_t, t, cond)).all()
        assert (mixture.score(x_t, t, cond) < 0).all()


def test_mixture_keeps_shape_and_dtype_of_images(schedule):
    mixture = GaussianMixture(torch.randn(2, 3, 4, 4), torch.ones(2), torch.ones(2), schedule)
    x, t = torch.randn(5, 3, 4, 4), torch.full((5,), 0.5)
    assert (mixture(x, t, {}).shape, mixture(x, t, {}).dtype) == (x.shape, torch.float32)
    assert mixture.score(x, t, {}).shape == x.shape
    assert mixture.sample(6, torch.Generator()).shape == (6, 3, 4, 4)


def test_samples_have_the_moments_of_the_mixture(mixture, generator):
    x, n = mixture.sample(50_000, generator), 50_000
    weights = mixture.weights
    mean = weights @ mixture.means
    scatter = (weights[:, None, None] * (mixture.means[:, :, None] * mixture.means[:, None])).sum(0)
    covariance = scatter - mean[:, None] * mean + (weights @ mixture.stds**2) * torch.eye(2, dtype=torch.float64)
    close(x.mean(0), mean, rtol=0, atol=4 * covariance.diagonal().max().sqrt().item() / math.sqrt(n))
    close(torch.cov(x.T), covariance, rtol=0, atol=0.05)
    shares = torch.bincount(mixture.component(x), minlength=4) / n
    close(shares.double(), weights, rtol=0, atol=0.03)


def test_samples_of_a_class_come_from_its_components(mixture, generator):
    labels = torch.tensor([0, 1]).repeat(500)
    x = mixture.sample(1000, generator, {"class_labels": labels})
    assert (mixture.labels[mixture.component(x)] == labels).double().mean() > 0.97


def test_noisy_samples_have_the_density_of_their_time(mixture, schedule, generator):
    """E[score] = 0 and E[-log p] is the entropy: both fail if sample and density disagree."""
    n, t = 50_000, schedule.time(torch.tensor([0.5]))
    x0 = mixture.sample(n, generator)
    x_t = schedule.diffuse(x0, torch.randn(n, 2, generator=generator, dtype=torch.float64), t.expand(n))
    score = mixture.score(x_t, t.expand(n), {})
    assert (score.mean(0).abs() < 4 * score.std(0) / math.sqrt(n)).all()
    # Stein's identity: E[score (x_t - mean)^T] = -I
    stein = (score[:, :, None] * (x_t - x_t.mean(0))[:, None]).mean(0)
    close(stein, -torch.eye(2, dtype=torch.float64), rtol=0, atol=0.05)


def test_component_is_the_mode_a_clean_sample_belongs_to(mixture):
    assert mixture.component(mixture.means + 0.05).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("stds", "weights", "message"),
    [
        ([1.0, 0.0], [1.0, 1.0], "stds must be 2 values above 0"),
        ([1.0], [1.0, 1.0], "stds must be 2 values above 0"),
        ([1.0, 1.0], [1.0, -1.0], "weights must be 2 values above 0"),
        ([1.0, 1.0], [1.0, 1.0, 1.0], "weights must be 2 values above 0"),
    ],
)
def test_impossible_mixtures_raise(stds, weights, message):
    with pytest.raises(ValueError, match=message + ", one per mean; got tensor"):
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
def test_empirical_denoiser_is_a_softmax_average_for_any_chunk(images, schedule, ratios, generator, chunk):
    t = schedule.time(ratios)
    x_t = torch.randn(len(t), 1, 3, 3, generator=generator, dtype=torch.float64)
    denoiser = EmpiricalDistribution(images, schedule, chunk=chunk)
    close(denoiser(x_t, t, {}), brute_force(images, x_t, t, schedule), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_empirical_labels_select_images(images, image_labels, schedule, ratios, generator, chunk):
    """Chunks in which a sample's class does not occur at all must not disturb the running maximum."""
    order = image_labels.argsort()
    images, image_labels = images[order], image_labels[order]
    t = schedule.time(ratios)
    x_t = torch.randn(len(t), 1, 3, 3, generator=generator, dtype=torch.float64)
    wanted = torch.arange(len(t)) % 4
    x0 = EmpiricalDistribution(images, schedule, image_labels, chunk)(x_t, t, {"class_labels": wanted})
    for i, label in enumerate(wanted):
        kept = images if label == 3 else images[image_labels == label]
        close(x0[i : i + 1], brute_force(kept, x_t[i : i + 1], t[i : i + 1], schedule), rtol=1e-10, atol=1e-10)


def test_empirical_denoiser_is_the_limit_of_narrow_gaussians(images, schedule, ratios, generator):
    t = schedule.time(ratios)
    x_t = torch.randn(len(t), 1, 3, 3, generator=generator, dtype=torch.float64)
    narrow = GaussianMixture(images, torch.full((100,), 1e-7), torch.ones(100), schedule)
    close(EmpiricalDistribution(images, schedule)(x_t, t, {}), narrow(x_t, t, {}), rtol=1e-8, atol=1e-8)


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


def test_unfinite_images_raise_naming_the_first(images):
    images[17, 0, 1, 1], images[40, 0, 0, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="images must be finite; image 17 holds nan or inf"):
        EmpiricalDistribution(images, Karras())


def test_labels_of_another_length_raise(images):
    with pytest.raises(ValueError, match=r"labels must be \(100,\), one per image; got \(99,\)"):
        EmpiricalDistribution(images, Karras(), torch.zeros(99, dtype=torch.long))


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_raise(images, image_labels, make_mixture, label):
    t, labels = torch.ones(2), {"class_labels": torch.tensor([0, label])}
    with pytest.raises(ValueError, match=rf"\[0, 2\], or be 3 for the null class; got .*{label}"):
        EmpiricalDistribution(images, Karras(), image_labels)(images[:2], t, labels)
    with pytest.raises(ValueError, match=rf"\[0, 1\], or be 2 for the null class; got .*{label}"):
        make_mixture(Karras())(torch.zeros(2, 2), t, labels)


def test_time_of_another_shape_raises(images, mixture, schedule):
    for denoiser, x in ((mixture, torch.zeros(2, 2)), (EmpiricalDistribution(images, schedule), images[:2])):
        for t in (torch.tensor(0.5), torch.full((3,), 0.5)):
            with pytest.raises(ValueError, match=r"t must have shape \(2,\) to match x_t"):
                denoiser(x, t, {})


def test_exact_denoisers_hold_at_the_pure_noise_end_of_a_flow(make_mixture, images):
    """At alpha = 0 nothing is known, so the answer is the mean of the data."""
    t = torch.ones(2)
    mixture = make_mixture(RectifiedFlow())
    close(mixture(torch.randn(2, 2).double(), t, {}), (mixture.weights @ mixture.means).expand(2, 2))
    empirical = EmpiricalDistribution(images, RectifiedFlow())
    close(empirical(images[:2], t, {}), images.mean(0).expand(2, 1, 3, 3))


def test_exact_denoisers_return_clean_images_at_the_clean_end_of_a_flow(make_mixture, images):
    t = torch.zeros(2)
    x = torch.randn(2, 2).double()
    close(make_mixture(RectifiedFlow())(x, t, {}), x)
    close(EmpiricalDistribution(images, RectifiedFlow())(images[:2], t, {}), images[:2])
