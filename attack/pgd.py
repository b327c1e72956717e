"""FGSM and projected gradient descent, through whatever the images pass on their way to the classifier.

Against a random defence the gradient is a mean over draws of it (expectation over transformations, Athalye et al.
2018, arXiv 1802.00420 and 1707.07397); the mean is that of the losses, outside the softmax.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from attack.threat import Mask, Threat, check_images, inside
from scorefield.randomness import Generators
from scorefield.schedule import Images, PerSample

Classifier = Callable[[Tensor], Tensor]
"""Images (b, c, h, w) in [0, 1] -> logits (b, classes)."""

Transform = Callable[[Tensor, Generators], Tensor]
"""(images, generator) -> images, differentiable: a purifier, a random view, a printer."""

Labels = Int[Tensor, " b"]

Probabilities = Float[Tensor, "b classes"]


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient descent (Madry et al. 2017, arXiv 1706.06083): sign steps, each projected.

    Attributes:
        threat: ball and norm.
        step_size: of each step; 2 / 255 for a radius of 8 / 255.
        num_steps: of each restart.
        random_start: begin at a random point of the ball instead of the image.
        num_restarts: independent runs; the one whose result is nearest to, or furthest in, a wrong answer is kept.
        num_draws: of the transformation for each gradient, and for choosing the restart.
        targeted: labels are what the classifier shall answer.
    """

    threat: Threat
    step_size: float
    num_steps: int = 10
    random_start: bool = True
    num_restarts: int = 1
    num_draws: int = 1
    targeted: bool = False

    def __post_init__(self) -> None:
        for name in ("step_size", "num_steps", "num_restarts", "num_draws"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of PGD must be above 0; got {getattr(self, name)}.")
        if self.num_restarts > 1 and not self.random_start:
            raise ValueError("restarts without a random start are all the same. Set random_start=True.")

    def __call__(
        self, classifier: Classifier, images: Images, labels: Labels | Probabilities, *, generator: Generators,
        transform: Transform | None = None, mask: Mask | None = None, center: Images | None = None,
    ) -> Tensor:  # fmt: skip
        """Return adversarial images: within the ball, within [0, 1], bit-equal to ``images`` outside the mask.

        Args:
            classifier: to be fooled, its own parameters without gradients.
            images: in [0, 1].
            labels: the true ones, or, if targeted, the wanted ones; or probabilities (b, classes), from which the
                attack leads away (TRADES), with one restart.
            generator: one, or one for each image, whose result then does not depend on its batch.
            transform: what images pass before the classifier; gradients flow through it.
            mask: where images may change.
            center: of the ball; by default ``images``. Style-based attacks start from another image.

        Raises:
            ValueError: images outside [0, 1], logits of another shape, gradients that are not finite, several
                restarts from probabilities, which have no margin to choose by.
        """
        if labels.ndim != 1 and self.num_restarts > 1:
            raise ValueError(f"an attack on probabilities has one restart; got num_restarts={self.num_restarts}.")
        check_images(images)
        check_images(center := images if center is None else center)
        best, furthest = images, torch.full((len(images),), -torch.inf, device=images.device)
        for number in range(self.num_restarts):
            x = self.threat.random(center, generator, mask) if self.random_start else center.clone()
            x = inside(mask, x, images)
            for _ in range(self.num_steps):
                gradient = self.gradient(classifier, x, labels, transform, generator)
                # Before the norm: in l2 what lies outside the mask would take its share of the step.
                gradient = inside(mask, gradient, torch.zeros_like(gradient))
                moved = x + self.step_size * self.threat.steepest(gradient)
                x = inside(mask, self.threat.project(moved, center), images)
            if self.num_restarts == 1:
                return x
            reached = self.progress(classifier, x, labels, transform, generator)
            better = reached > furthest
            best = x if number == 0 else torch.where(better[:, None, None, None], x, best)
            furthest = torch.maximum(furthest, reached)
        return best

    def gradient(
        self, classifier: Classifier, x: Images, labels: Labels | Probabilities, transform: Transform | None,
        generator: Generators,
    ) -> Tensor:  # fmt: skip
        """Return the gradient in which the attack climbs: of the loss, or, if targeted, of minus the loss.

        It is the mean over ``num_draws`` of the transformation, drawn one after the other to save memory.
        """
        total = torch.zeros_like(x)
        for _ in range(self.num_draws if transform else 1):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                seen = leaf if transform is None else transform(leaf, generator)
                loss = functional.cross_entropy(logits_of(classifier, seen), labels, reduction="sum")
                (drawn,) = torch.autograd.grad(loss, leaf)
            total = total + drawn / (self.num_draws if transform else 1)
        if not bool(total.isfinite().all()):
            raise ValueError("the gradient of the attack is not finite. Check the classifier, or the purifier.")
        return -total if self.targeted else total

    @torch.no_grad()
    def progress(
        self, classifier: Classifier, x: Images, labels: Labels, transform: Transform | None, generator: Generators
    ) -> PerSample:
        """Return, for each image, the mean margin by which the attack succeeds; below 0 it does not."""
        draws = self.num_draws if transform else 1
        views = (x if transform is None else transform(x, generator) for _ in range(draws))
        margins = torch.stack([margin(logits_of(classifier, view), labels) for view in views]).mean(0)
        return margins if self.targeted else -margins


def fgsm(
    classifier: Classifier, images: Images, labels: Labels, *, threat: Threat, generator: Generators,
    transform: Transform | None = None, mask: Mask | None = None, targeted: bool = False,
) -> Tensor:  # fmt: skip
    """Return images after one step of the whole radius (Goodfellow et al. 2014, arXiv 1412.6572).

    Arguments and errors are those of :class:`PGD`; a radius of 0 returns the images.
    """
    if threat.radius == 0:
        return images
    one = PGD(threat=threat, step_size=threat.radius, num_steps=1, random_start=False, targeted=targeted)
    return one(classifier, images, labels, generator=generator, transform=transform, mask=mask)


def logits_of(classifier: Classifier, images: Images) -> Float[Tensor, "b classes"]:
    """Return the classifier's logits. Raises ``ValueError`` unless they are (b, classes)."""
    logits = classifier(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"a classifier must return logits ({len(images)}, classes), at least two; got {got}.")
    return logits


def margin(logits: Float[Tensor, "b classes"], labels: Labels) -> PerSample:
    """Return the logit of the label minus the largest other one, (b,): above 0 where it is the answer."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
