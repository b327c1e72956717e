"""Denoisers whose score is known in closed form: ground truth for tests, examples and diagnosis."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from scorefield.denoiser import Cond
from scorefield.schedule import Images, PerSample, Schedule, check_time, per_sample

LABELS = "class_labels"
"""The key of class labels in ``cond``, as diffusers names it. The number of classes itself is the null label."""


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Isotropic Gaussians at ``means``: exact E[x0 | x_t], log density and samples at every noise level.

    Args:
        means: (k, *shape).
        stds: (k,) above 0.
        weights: (k,) above 0; normalised.
        schedule: the forward process.
        labels: (k,) the class of each component, or None. ``cond["class_labels"]`` then selects
            components; the number of classes, or no cond at all, selects all.
    """

    means: Float[Tensor, "k *shape"]
    stds: Float[Tensor, " k"]
    weights: Float[Tensor, " k"]
    schedule: Schedule
    labels: Int[Tensor, " k"] | None = None

    def __post_init__(self) -> None:
        k = len(self.means)
        for name, value in (("stds", self.stds), ("weights", self.weights)):
            if value.shape != (k,) or not bool((value > 0).all()):
                raise ValueError(f"{name} must be {k} values above 0, one per mean; got {value}.")

    @property
    def num_classes(self) -> int:
        """Number of classes; also the null label."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def _log_joint(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        # log p(component, x_t), normalised over the components that the class admits: (b, k)
        check_time(t, x_t)
        x, means = x_t.flatten(1), self.means.to(x_t).flatten(1)
        alpha, sigma = self.schedule.alpha(t).to(x)[:, None], self.schedule.sigma(t).to(x)[:, None]
        variance = (alpha * self.stds.to(x)) ** 2 + sigma**2
        squared = (x[:, None] - alpha[..., None] * means).square().sum(-1)
        log_weights = self._log_weights(cond, len(x)).to(x)
        return log_weights - 0.5 * (squared / variance + x.shape[1] * torch.log(2 * torch.pi * variance))

    def _log_weights(self, cond: Cond, batch: int) -> Tensor:
        log_weights = self.weights.double().log().expand(batch, -1)
        if self.labels is not None and LABELS in cond:
            wanted = _check_labels(cond[LABELS], self.labels).to(self.labels.device)[:, None]
            allowed = (self.labels == wanted) | (wanted == self.num_classes)
            log_weights = log_weights.to(allowed.device).masked_fill(~allowed, -torch.inf)
        return log_weights.log_softmax(1)

    def log_density(self, x_t: Images, t: PerSample, cond: Cond | None = None) -> PerSample:
        """Log p_t(x_t | cond), natural units; its gradient is the score."""
        return self._log_joint(x_t, t, cond or {}).logsumexp(1)

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """E[x0 | x_t, cond]: each component's posterior mean, weighted by its responsibility."""
        check_time(t, x_t)
        x, means, stds = x_t.flatten(1), self.means.to(x_t).flatten(1), self.stds.to(x_t)
        alpha, sigma = self.schedule.alpha(t).to(x)[:, None], self.schedule.sigma(t).to(x)[:, None]
        gain = alpha * stds**2 / ((alpha * stds) ** 2 + sigma**2)
        share = self._log_joint(x_t, t, cond).softmax(1)
        posterior = means + gain[..., None] * (x[:, None] - alpha[..., None] * means)
        return (share[..., None] * posterior).sum(1).view_as(x_t)

    def score(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Gradient of :meth:`log_density` for sigma > 0: (alpha E[x0 | x_t] - x_t) / sigma^2 (Tweedie)."""
        alpha, sigma = per_sample(self.schedule.alpha(t), x_t), per_sample(self.schedule.sigma(t), x_t)
        return (alpha * self(x_t, t, cond) - x_t) / sigma**2

    def sample(self, n: int, generator: Generator, cond: Cond | None = None) -> Float[Tensor, "n *shape"]:
        """N independent clean samples, of the classes in ``cond`` if given."""
        device = generator.device
        shares = self._log_weights(cond or {}, n).exp().to(device)
        component = torch.multinomial(shares, 1, generator=generator)[:, 0].to(self.means.device)
        noise = torch.randn(n, *self.means.shape[1:], generator=generator, device=device, dtype=self.means.dtype)
        noise = noise.to(self.means.device)
        return self.means[component] + per_sample(self.stds[component], noise) * noise

    def component(self, x: Images) -> Int[Tensor, " b"]:
        """Return the most probable component of each clean sample: the mode it belongs to."""
        return self._log_joint(x, torch.full((len(x),), self.schedule.t_min), {}).argmax(1)


@dataclass(frozen=True, eq=False)
class EmpiricalDistribution:
    """The exact denoiser of a finite image set: what a perfectly memorising teacher would answer.

    Args:
        images: (n, *shape), finite.
        schedule: the forward process.
        labels: (n,) classes, or None; ``cond["class_labels"]`` selects as in :class:`GaussianMixture`.
        chunk: images visited at a time; memory is batch x chunk numbers, so 60,000 images fit anywhere.
    """

    images: Float[Tensor, "n *shape"]
    schedule: Schedule
    labels: Int[Tensor, " n"] | None = None
    chunk: int = 4096

    def __post_init__(self) -> None:
        if not bool(torch.isfinite(self.images).all()):
            bad = (~torch.isfinite(self.images)).flatten(1).any(1).nonzero()[0].item()
            raise ValueError(f"images must be finite; image {bad} holds nan or inf. Remove or repair it.")
        if self.labels is not None and self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be ({len(self.images)},), one per image; got {tuple(self.labels.shape)}."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes; also the null label."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """E[x0 | x_t, cond]: the images averaged with softmax(-|x_t - alpha x|^2 / 2 sigma^2)."""
        check_time(t, x_t)
        # float64: at small sigma the exponent cancels thousands against thousands.
        x = x_t.flatten(1).double()
        alpha = self.schedule.alpha(t).to(x)[:, None]
        sigma = self.schedule.sigma(t).to(x)[:, None].clamp(min=1e-10)  # at sigma = 0 the image itself, not 0 / 0
        peak = x.new_full((len(x), 1), -torch.inf)
        total, mean = torch.zeros_like(peak), torch.zeros_like(x)
        for images, allowed in self._chunks(x, cond):
            squared = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ images.T)
            logits = -(squared + alpha**2 * images.square().sum(1)) / (2 * sigma**2)
            logits = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
            new_peak = torch.maximum(peak, logits.amax(1, keepdim=True))
            base = new_peak.masked_fill(new_peak == -torch.inf, 0.0)
            weight, decay = (logits - base).exp(), (peak - base).exp()
            total, mean = total * decay + weight.sum(1, keepdim=True), mean * decay + weight @ images
            peak = new_peak
        return (mean / total).to(x_t.dtype).view_as(x_t)

    def _chunks(self, x: Tensor, cond: Cond) -> Iterator[tuple[Tensor, Tensor | None]]:
        wanted = None
        if self.labels is not None and LABELS in cond:
            wanted = _check_labels(cond[LABELS], self.labels).to(x.device)[:, None]
        for start in range(0, len(self.images), self.chunk):
            images = self.images[start : start + self.chunk].flatten(1).to(x)
            if wanted is None or self.labels is None:
                yield images, None
            else:
                labels = self.labels[start : start + self.chunk].to(x.device)
                yield images, (labels == wanted) | (wanted == self.num_classes)


def _check_labels(labels: Tensor, known: Tensor) -> Tensor:
    num_classes = int(known.max()) + 1
    present = torch.cat([known.unique(), known.new_tensor([num_classes])])
    if not bool(torch.isin(labels.to(known.device), present).all()):
        raise ValueError(
            f"class labels must lie in [0, {num_classes - 1}], or be {num_classes} for the null class; got "
            f"[{labels.min()}, {labels.max()}]. Members exist of {present[:-1].tolist()}."
        )
    return labels
