"""Guidance: a denoiser made from a denoiser."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scorefield.denoiser import Cond, Denoiser, expand_cond, under_each
from scorefield.schedule import Images, PerSample, Schedule, per_sample

Norm = Literal["none", "token", "row"]
"""How guidance keeps lengths: parts of the flow eps - x0 that it makes get the length of the positive ones.

token: in patches of 2 x 2 with all channels (Qwen-Image). row: in rows of one channel (Lumina 2).
"""


@dataclass(frozen=True, eq=False)
class Guided:
    """Classifier-free guidance of a denoiser; see :func:`guided`."""

    denoiser: Denoiser
    scale: float
    negative: Cond
    rescale: float = 0.0
    norm: Norm = "none"

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the guided clean image, from one call on a batch of 2b: negatives first."""
        neg, pos = under_each(self.denoiser, x_t, t, (self.negative, cond))
        x0 = neg + self.scale * (pos - neg)
        if self.norm != "none":
            wanted, mixed = (self.schedule.from_x0(image, x_t, t, "flow") for image in (pos, x0))
            longer = mixed * (_lengths(wanted, self.norm) / _lengths(mixed, self.norm))
            x0 = self.schedule.to_x0(longer, x_t, t, "flow")
        return x0 * _toward_spread_of(pos, x0, self.rescale) if self.rescale else x0


def guided(
    denoiser: Denoiser, scale: float, negative: Cond, *, rescale: float = 0.0, norm: Norm = "none"
) -> Denoiser:
    """Classifier-free guidance: x0 = neg + scale (pos - neg) (Ho and Salimans 2022, arXiv 2207.12598, Eq. 6).

    In x0 it is the same guidance as in eps, v or flow, which are affine in x0.

    Args:
        denoiser: a conditional denoiser.
        scale: 1 means none and costs one network call on b samples; any other scale is one call on 2b. A
            paper that writes ``cond + s (cond - uncond)`` means ``scale = 1 + s``.
        negative: the condition to move away from, batch 1 or b: the null label, an empty or negative prompt.
        rescale: in [0, 1], how far each image's standard deviation, which guidance inflates, is brought back to
            that of the positive image (arXiv 2305.08891, Eq. 15 and 16, applied to x0 as MVDream does with 0.5,
            arXiv 2308.16512).
        norm: :data:`Norm`.

    Returns:
        ``denoiser`` itself at scale 1.

    Raises:
        ValueError: rescale outside [0, 1].
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1]; got {rescale}. 0 means none, MVDream uses 0.5.")
    return denoiser if scale == 1 else Guided(denoiser, scale, negative, rescale, norm)


@dataclass(frozen=True, eq=False)
class Perpendicular:
    """Guidance away from what conditions do not share with the wanted one; see :func:`perpendicular`."""

    denoiser: Denoiser
    scale: float
    null: Cond
    negatives: Sequence[Cond]
    weights: Tensor

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the guided clean image, from one call on (2 + n) b samples: null, negatives, positive."""
        null, *negatives, pos = under_each(self.denoiser, x_t, t, (self.null, *self.negatives, cond))
        wanted = direction = pos - null
        weights = expand_cond({"weights": self.weights}, len(x_t))["weights"].to(x_t.device)
        for negative, weight in zip(negatives, weights.unbind(1), strict=True):
            direction = direction - per_sample(weight, x_t) * _perpendicular_part(negative - null, wanted)
        return null + self.scale * direction


def perpendicular(
    denoiser: Denoiser, scale: float, null: Cond, negatives: Sequence[Cond], weights: Tensor | Sequence[float]
) -> Denoiser:
    """Perp-Neg: null + scale (d - sum of w_i d_i') with d = pos - null (Armandpour et al. 2023, arXiv 2304.04968).

    d_i' is the part of neg_i - null that is perpendicular to d. A negative prompt that shares words with the
    prompt ("a mug, front view" against "a mug, side view") so takes away the view alone, not the mug.

    Args:
        denoiser: a conditional denoiser.
        scale: of the whole direction; without negatives that of :func:`guided`.
        null: the empty prompt or null label, batch 1 or b.
        negatives: n conditions to move away from, each of batch 1 or b.
        weights: n numbers, or (b, n) where they depend on the view; 0 switches a negative off. Code that adds the
            perpendicular parts writes them with a minus.

    Raises:
        ValueError: not one weight for each negative.
    """
    table = torch.as_tensor(weights, dtype=torch.float64)
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or table.shape[1] != len(negatives):
        raise ValueError(
            f"weights must be ({len(negatives)},) or (b, {len(negatives)}), one per negative; got "
            f"{tuple(torch.as_tensor(weights).shape)}."
        )
    return Perpendicular(denoiser, scale, null, tuple(negatives), table)


LogProbability = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x_t, t, cond) -> (b,) log p(y | x_t) of what ``cond`` asks for, differentiable in x_t."""


@dataclass(frozen=True, eq=False)
class ClassifierGuided:
    """Guidance by the gradient of a classifier of noisy images; see :func:`classifier_guided`."""

    denoiser: Denoiser
    classifier: LogProbability
    scale: float

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the guided clean image, from one call of the denoiser and one gradient of the classifier."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        if bool((alpha == 0).any()):
            raise ValueError(
                "classifier guidance is undefined where alpha(t) = 0: pure noise has no gradient towards a class. "
                "Start the grid below it, with grid(schedule, num_steps, high=0.99)."
            )
        x0 = self.denoiser(x_t, t, cond)
        differentiable = torch.is_grad_enabled() and x_t.requires_grad
        with torch.enable_grad():
            x = x_t if differentiable else x_t.detach().requires_grad_()
            log_probability = self.classifier(x, t, cond)
            if log_probability.shape != t.shape:
                raise ValueError(
                    f"the classifier must return log p(y | x_t) of each sample, ({len(x)},); got "
                    f"{tuple(log_probability.shape)}. Pick the wanted class, as class_log_probability does."
                )
            (gradient,) = torch.autograd.grad(log_probability.sum(), x, create_graph=differentiable)
        return x0 + per_sample(self.scale * sigma**2 / alpha, x0) * gradient.to(x0.dtype)


def classifier_guided(denoiser: Denoiser, classifier: LogProbability, scale: float) -> Denoiser:
    """Classifier guidance: x0 + scale (sigma^2 / alpha) grad log p(y | x_t).

    It is Dhariwal and Nichol's eps - scale sigma grad log p (arXiv 2105.05233, Algorithm 2) in x0, on any
    schedule. With an unconditional denoiser and the true p(y | x_t), scale 1 is E[x0 | x_t, y] by Bayes' rule.
    A strong scale attacks the classifier as much as it draws the class: read the accuracy of another classifier.

    Args:
        denoiser: unconditional, or of other conditions; it is called with the whole ``cond``, in which
            ``Conditioned`` can fix the null label.
        classifier: of noisy images at time t; one that was trained on clean images misleads.
        scale: 0 means none, and costs no gradient; 1 is Bayes' rule.

    Returns:
        ``denoiser`` itself at scale 0.
    """
    return denoiser if scale == 0 else ClassifierGuided(denoiser, classifier, scale)


def class_log_probability(
    network: Callable[[Tensor, Tensor], Tensor], key: str = "class_labels"
) -> LogProbability:
    """Return log p(y | x_t) of the labels in ``cond[key]``, from a network (x_t, t) -> logits (b, classes)."""

    def log_probability(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        labels = expand_cond({key: cond[key]}, len(x_t))[key].to(x_t.device)
        return network(x_t, t).log_softmax(1).gather(1, labels[:, None])[:, 0]

    return log_probability


def _lengths(flow: Images, norm: Norm) -> Tensor:
    """Return the length of each part of a flow (b, c, h, w), repeated over the part."""
    if norm == "row":
        return flow.norm(dim=-1, keepdim=True)
    b, c, h, w = flow.shape
    tokens = flow.reshape(b, c, h // 2, 2, w // 2, 2)
    length = tokens.square().sum(dim=(1, 3, 5), keepdim=True).sqrt()
    return length.expand(b, 1, h // 2, 2, w // 2, 2).reshape(b, 1, h, w)


def _perpendicular_part(x: Images, to: Images) -> Tensor:
    # Of each sample. Where ``to`` vanishes nothing is parallel to it: x stays whole.
    a, b = x.flatten(1), to.flatten(1)
    square = b.square().sum(1, keepdim=True)
    share = (a * b).sum(1, keepdim=True) / torch.where(square > 0, square, 1.0)
    return (a - share * b).view_as(x)


def _toward_spread_of(wanted: Images, x: Images, strength: float) -> Tensor:
    # A factor per sample; the spread of a constant image cannot be changed.
    target, spread = (image.flatten(1).std(1, correction=0) for image in (wanted, x))
    ratio = torch.where(spread > 0, target / torch.where(spread > 0, spread, 1.0), 1.0)
    return per_sample(strength * ratio + (1 - strength), x)
