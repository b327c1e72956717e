"""Distances between sets of images: closed forms, scipy's matrix root, double loops, bias."""

import math

import pytest
import torch
from denoisers import normal
from refusals import refused
from scipy.linalg import sqrtm
from torch import nn

from scorefield.exact import GaussianMixture
from scorefield.metrics import (
    agreement,
    extract_features,
    frechet_distance,
    kernel_distance,
    mode_shares,
    sliced_wasserstein,
)
from scorefield.schedule import Karras

close = torch.testing.assert_close


def with_moments(mean, covariance, n, seed):
    """n samples whose sample mean and unbiased covariance are exactly those asked for."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def random_covariance(d, seed):
    a = normal(d, d, seed=seed)
    return a @ a.T + 0.1 * torch.eye(d, dtype=torch.float64)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    """With commuting covariances, |m - n|^2 + sum (sqrt(u) - sqrt(v))^2."""
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    var_a, var_b = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([9.0, 1.0, 0.25]).double()
    rotation = torch.linalg.qr(normal(3, 3)).Q
    a, b = (
        with_moments(m, rotation @ v.diag() @ rotation.T, n, seed)
        for m, v, n, seed in ((mean_a, var_a, 50, 1), (mean_b, var_b, 80, 2))
    )
    expected = (mean_a - mean_b).square().sum() + (var_a.sqrt() - var_b.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(200, 12), (10, 30), (50, 1)], ids=["full_rank", "rank_deficient", "one"])
def test_frechet_distance_is_that_of_scipys_matrix_root(n, d):
    a = normal(n, d, seed=4) @ random_covariance(d, 3)
    b = 0.5 + normal(n + 7, d, seed=5) @ random_covariance(d, 6)
    covariance_a, covariance_b = (torch.cov(x.T).reshape(d, d).numpy() for x in (a, b))
    root = sqrtm(covariance_a @ covariance_b).real
    mean = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = mean + covariance_a.trace() + covariance_b.trace() - 2 * root.trace()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_computed_in_float64():
    """Features far from the origin lose their covariance in float32."""
    a = normal(200, 16) @ random_covariance(16, 1)
    for order in (torch.arange(200), torch.randperm(200, generator=torch.Generator().manual_seed(0))):
        assert abs(frechet_distance(a, a[order])) < 1e-6
    a, b = ((1000 * x).round() / 1024 + 1024 for x in (normal(500, 4), 2 * normal(500, 4, seed=1)))
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_kernel_distance_is_the_double_loop():
    a, b = normal(9, 3), 0.5 + normal(7, 3, seed=1)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    within_a = [kernel(a[i], a[j]) for i in range(9) for j in range(9) if i != j]
    within_b = [kernel(b[i], b[j]) for i in range(7) for j in range(7) if i != j]
    across = [kernel(x, y) for x in a for y in b]
    expected = sum(within_a) / 72 + sum(within_b) / 42 - 2 * sum(across) / 63
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_is_unbiased_for_few_samples_and_grows_with_a_shift():
    pairs = [(normal(20, 4, seed=2 * i), normal(30, 4, seed=2 * i + 1)) for i in range(400)]
    values = torch.tensor([kernel_distance(a, b) for a, b in pairs])
    error = values.std().item() / math.sqrt(len(values))
    assert abs(values.mean().item()) < 4 * error
    assert values.min() < 0
    # Negative control: with the diagonal (the biased estimate) the mean would be far above zero.
    diagonal = (normal(1000, 4).square().sum(1) / 4 + 1).pow(3).mean().item() - 1
    assert diagonal / 20 > 10 * error
    values = [kernel_distance(normal(200, 4), normal(200, 4, seed=1) + shift) for shift in (0.0, 0.5, 1.0)]
    assert values[0] < values[1] < values[2]


def wasserstein(a, b, num_projections=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sliced_wasserstein(a, b, generator=generator, num_projections=num_projections)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    """|shift| on a line; E|<shift, direction>| is 2 / pi |shift| in the plane and |shift| / 2 in space."""
    a = normal(100, 1)
    assert wasserstein(a, a + 0.7) == pytest.approx(0.7, abs=1e-12)
    for d, factor in ((2, 2 / math.pi), (3, 0.5)):
        a, shift = normal(50, d), normal(d, seed=3)
        expected = factor * shift.norm().item()
        assert wasserstein(a, a + shift, num_projections=20_000) == pytest.approx(expected, rel=0.02)


def test_sliced_wasserstein_compares_sets_not_rows():
    a = normal(64, 3)
    assert wasserstein(a, a.flip(0)) == pytest.approx(0, abs=1e-12)
    assert wasserstein(a, 2 * a) > 0.1
    assert wasserstein(a, 2 * a) == wasserstein(2 * a, a)
    assert wasserstein(a, 2 * a) != wasserstein(a, 2 * a, seed=1)


def test_mode_shares_are_the_weights_of_the_modes_present(generator):
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    mixture = GaussianMixture(means, torch.full((3,), 0.3), torch.tensor([0.5, 0.3, 0.2]), Karras())
    shares = mode_shares(mixture.sample(20_000, generator), mixture)
    close(shares.double(), mixture.weights.double(), rtol=0, atol=0.015)
    assert mode_shares(mixture.means[[0, 0, 0, 1]], mixture).tolist() == [0.75, 0.25, 0.0]


def test_agreement_is_the_share_of_right_answers_and_features_do_not_depend_on_the_batch():
    logits = torch.tensor([[3.0, 1.0], [0.0, 1.0], [2.0, 1.0], [5.0, 1.0]])
    assert agreement(logits, torch.tensor([0, 1, 1, 0])) == 0.75
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double(), normal(10, 3, 2, 2)
    features = extract_features(network, images, batch=3)
    close(features, network(images).detach())
    assert not features.requires_grad
    images[2, 0], images[5, 1, 0, 0] = math.nan, math.inf
    with refused("images must be finite to be measured; 2 of 10 hold nan or inf"):
        extract_features(nn.Flatten(), images)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(("a", "b"), [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5,), (5,)),
                                      ((5, 3, 2), (5, 3, 2))])  # fmt: skip
def test_features_of_other_shapes_raise(distance, a, b):
    with refused(r"features must be \(n, d\) and \(m, d\) with n, m >= 2; got \(\d") as error:
        distance(torch.zeros(a), torch.zeros(b))
    assert str(a) in str(error.value)
    assert str(b) in str(error.value)
    with refused(r"two sets of one shape; got \(5, 3\), \(6, 3\)"):
        wasserstein(torch.zeros(5, 3), torch.zeros(6, 3))
