"""Diff-PGD: images whose purified version is adversarial, and realistic (Xue et al. 2023, arXiv 2305.16494).

The attack differentiates through SDEdit: x <- project(x + step sign(grad loss(f(SDEdit(x))))). Its second result,
SDEdit(x), lies on the data's manifold, and outside the ball: report its distance by itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attack.pgd import PGD, Classifier, Labels, Transform
from attack.purify import within
from attack.style import Features, stylised
from attack.threat import Mask, inside
from scorefield.randomness import Generators
from scorefield.schedule import Images


@dataclass(frozen=True)
class Adversarial:
    """What Diff-PGD returns.

    Attributes:
        iterate: (b, c, h, w) in [0, 1], within the ball round the image.
        realistic: the purified iterate: on the manifold, not within the ball.
    """

    iterate: Tensor
    realistic: Tensor


def diff_pgd(
    attack: PGD, classifier: Classifier, images: Images, labels: Labels, *, purifier: Transform,
    generator: Generators, mask: Mask | None = None, center: Images | None = None,
) -> Adversarial:  # fmt: skip
    """Return PGD through a purifier, and the purified result: global Diff-PGD, or, with a mask, the region's.

    Under a mask both results equal ``images`` bit by bit outside: the purifier's answer is composed in pixels, in
    every step, so that the classifier is attacked by what it will see. (The paper replaces latents along SDEdit,
    which is exact for pixels and leaks through a decoder.)

    Args:
        attack: its ``num_draws`` are of the purifier.
        classifier: to be fooled.
        images: in [0, 1].
        labels: the true ones, or, if the attack is targeted, the wanted ones.
        purifier: such as :class:`attack.purify.Purifier`.
        generator: of start, purifier and draws.
        mask: where images may change.
        center: of the ball; by default ``images``.
    """
    seen = purifier if mask is None else within(mask, purifier, images)
    iterate = attack(classifier, images, labels, generator=generator, transform=seen, mask=mask, center=center)
    with torch.no_grad():
        return Adversarial(iterate, seen(iterate, generator))


def style_diff_pgd(
    attack: PGD, classifier: Classifier, images: Images, labels: Labels, *, purifier: Transform, style: Images,
    features: Features, generator: Generators, mask: Mask | None = None, num_steps: int = 200,
    learning_rate: float = 0.02, style_weight: float = 4000.0,
) -> tuple[Tensor, Adversarial]:  # fmt: skip
    """Return the stylised images, and Diff-PGD in the ball round them: a change that looks like a choice of style.

    The ball lies round the stylised image, in the mask, and not round the original; its radius may be large.

    Args:
        attack: as of :func:`diff_pgd`; the paper's radius is 64 / 255.
        classifier: to be fooled.
        images: in [0, 1].
        labels: as of :func:`diff_pgd`.
        purifier: as of :func:`diff_pgd`.
        style: (1 or b, c, h, w) whose texture is taken.
        features: of the Gram matrices.
        generator: as of :func:`diff_pgd`.
        mask: where images may change.
        num_steps: of the style transfer.
        learning_rate: of its Adam.
        style_weight: of the Gram loss, beside a content loss of weight 1.
    """
    center = stylised(
        images,
        style,
        features,
        mask=mask,
        num_steps=num_steps,
        learning_rate=learning_rate,
        style_weight=style_weight,
    )
    found = diff_pgd(
        attack, classifier, images, labels, purifier=purifier, generator=generator, mask=mask, center=center
    )
    return center, found


def physical_patch(
    classifier: Classifier, images: Images, target: Labels, *, mask: Mask, view: Transform, generator: Generators,
    purifier: Transform | None = None, num_steps: int = 200, learning_rate: float = 0.01, num_draws: int = 4,
) -> Adversarial:  # fmt: skip
    """Return images with a patch that fools the classifier under random views: Diff-Phys.

    The patch is unbounded within [0, 1] and the mask, purified as a whole, and seen through ``view``: the loss is
    the mean over views of that of the classifier, the expectation outside the softmax. Without a purifier it is
    the adversarial patch (arXiv 1712.09665).

    Args:
        classifier: to be fooled.
        images: in [0, 1].
        target: what it shall answer.
        mask: where the patch is.
        view: a random view, such as :func:`attack.views.camera`; the success is to be measured on new draws.
        generator: of purifier and views.
        purifier: for realism.
        num_steps: of Adam.
        learning_rate: of Adam.
        num_draws: views of each step.
    """
    patch = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([patch], learning_rate)
    for _ in range(num_steps):
        with torch.enable_grad():
            worn = inside(mask, patch.clamp(0, 1), images)
            seen = worn if purifier is None else within(mask, purifier, images)(worn, generator)
            # A sum over images, each of which has a patch of its own, whoever shares its batch.
            losses = [
                functional.cross_entropy(classifier(view(seen, generator)), target, reduction="sum")
                for _ in range(num_draws)
            ]
            loss = torch.stack(losses).mean()
            (patch.grad,) = torch.autograd.grad(loss, patch)
        optimizer.step()
        patch.data.clamp_(0, 1)
    iterate = inside(mask, patch.detach(), images)
    with torch.no_grad():
        realistic = iterate if purifier is None else within(mask, purifier, images)(iterate, generator)
    return Adversarial(iterate, realistic)
