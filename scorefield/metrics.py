"""Distances between sets of samples; every feature network is passed in by the caller.

Fréchet distances depend on the number of samples and on the features: keep both fixed, name the features, show
a real-against-real floor beside the figure, and read KID (unbiased) with it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from scorefield.exact import GaussianMixture


@torch.no_grad()
def extract_features(
    network: Callable[[Tensor], Tensor], images: Float[Tensor, "n *shape"], batch: int = 512
) -> Float[Tensor, "n d"]:
    """Features of all images, in batches. Raises ``ValueError`` for images that are not finite."""
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise ValueError(f"images must be finite to be measured; {bad} of {len(images)} hold nan or inf.")
    return torch.cat([network(part) for part in images.split(batch)])


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """Fréchet distance of the Gaussians fitted to two feature sets (FID in these features), float64.

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, Eq. 6); covariances are
    unbiased. Raises ``ValueError`` for fewer than two samples or different widths.
    """
    a, b = _check_features(a, b)
    covariance_a, covariance_b = (torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1))
    # The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2): real and at least 0.
    values, vectors = torch.linalg.eigh(covariance_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return float(mean + covariance_a.trace() + covariance_b.trace() - 2 * cross)


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """KID: unbiased squared MMD under (x.y / d + 1)^3, over all pairs (arXiv 1801.01401, sec. 4); may be < 0."""
    a, b = _check_features(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def sliced_wasserstein(
    a: Float[Tensor, "n d"], b: Float[Tensor, "n d"], *, generator: Generator, num_projections: int = 100
) -> float:
    """Mean 1-Wasserstein distance of two equally large sets over random directions (Rabin et al. 2011)."""
    if a.shape != b.shape:
        raise ValueError(
            f"sliced Wasserstein needs two sets of one shape; got {tuple(a.shape)}, {tuple(b.shape)}."
        )
    size, device = (a.shape[1], num_projections), generator.device
    directions = torch.randn(size, generator=generator, device=device, dtype=torch.float64).to(a.device)
    directions = directions / directions.norm(dim=0)
    sorted_a, sorted_b = ((x.double() @ directions).sort(0).values for x in (a, b))
    return float((sorted_a - sorted_b).abs().mean())


def mode_shares(x: Float[Tensor, "n *shape"], mixture: GaussianMixture) -> Float[Tensor, " k"]:
    """Share of samples nearest (by posterior) to each component; compare with ``mixture.weights``."""
    return torch.bincount(mixture.component(x), minlength=len(mixture.means)) / len(x)


def agreement(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """Share of samples that a classifier assigns to the label they were asked for."""
    return float((logits.argmax(1) == labels).double().mean())


def _check_features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features must be (n, d) and (m, d) with n, m >= 2; got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    return a.double(), b.double()
