"""What an attack reached, and how that was measured.

Success is counted among the images that the classifier has right. A random defence is asked several times about
the finished images, never once and never while they are optimised: a draw filtered for success inflates it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional

from attack.pgd import Classifier, Labels, Transform, logits_of
from attack.purify import Purifier
from attack.threat import Threat, size
from scorefield.randomness import Generators
from scorefield.schedule import Images

SLACK, SHARE = 1e-6, 1e-5
"""Rounding allowed to a ball's radius, and as a share of it: a large ball of many pixels is projected into less
exactly."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What images are measured against.

    Attributes:
        classifier: that was attacked.
        images: clean, in [0, 1].
        labels: the true ones.
        targets: what a targeted attack wants; None: any other answer.
        purifier: the defence, or None.
        num_draws: of the purifier on every image; at least 2.
        others: classifiers that were not attacked, by name, for transfer.
        time: of the teacher's error in :meth:`Purifier.off_manifold`; None leaves it out.
        batch_size: images at a time. Results depend on it unless each image has a generator of its own.

    Raises:
        ValueError: one draw of a purifier; a target that is the image's own label.
    """

    classifier: Classifier
    images: Images
    labels: Labels
    targets: Labels | None = None
    purifier: Transform | None = None
    num_draws: int = 5
    others: Mapping[str, Classifier] = field(default_factory=dict)
    time: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.purifier is not None and self.num_draws < 2:
            raise ValueError(
                f"num_draws must be at least 2 for a purifier, which is random; got {self.num_draws}. One draw "
                "says nothing about the next."
            )
        if self.targets is not None and bool((self.targets == self.labels).any()):
            raise ValueError("targets must differ from the labels: a right answer is no success.")

    def fooled(self, classifier: Classifier, images: Images) -> Bool[Tensor, " b"]:
        """Return where the answer is what the attack wants."""
        return self.wanted(self.answers(classifier, images))

    def wanted(self, answers: Tensor) -> Bool[Tensor, "*draws b"]:
        """Return where answers are what the attack wants."""
        return answers != self.labels if self.targets is None else answers == self.targets

    def right(self, classifier: Classifier) -> Bool[Tensor, " b"]:
        """Return where a classifier answers the clean image with its label."""
        return self.answers(classifier, self.images) == self.labels

    @torch.no_grad()
    def answers(self, classifier: Classifier, images: Images) -> Tensor:
        """Return the classifier's answers, (b,)."""
        return torch.cat([logits_of(classifier, part).argmax(1) for part in images.split(self.batch_size)])

    @torch.no_grad()
    def purified_answers(self, images: Images, generator: Generators) -> Tensor:
        """Return the answers (draws, b), each of a new draw of the purifier."""
        assert self.purifier is not None
        draws = []
        for _ in range(self.num_draws):
            parts = parts_of(images, generator, self.batch_size)
            seen = torch.cat([self.purifier(part, own) for part, own in parts])
            draws.append(self.answers(self.classifier, seen))
        return torch.stack(draws)


def parts_of(images: Images, generator: Generators, batch_size: int) -> Iterator[tuple[Tensor, Generators]]:
    """Yield batches with their generators: the one of all, or those of their images."""
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        yield images[rows], generator[rows] if isinstance(generator, Sequence) else generator


def share(fooled: Bool[Tensor, "*draws b"], among: Bool[Tensor, " b"]) -> float | None:
    """Return the share of True among some images, over all draws; None where there is no image."""
    return float(fooled[..., among].double().mean()) if bool(among.any()) else None


def clean_figures(measured: Measured, generator: Generators) -> dict[str, Any]:
    """Return the figures of the clean images: accuracy, also of the purified ones, distance, and flags.

    ``purified_error`` is what the purifier breaks by itself, among the images that are right without it.
    """
    right = measured.right(measured.classifier)
    figures: dict[str, Any] = {"num_images": len(right), "accuracy": float(right.double().mean())}
    if measured.purifier is not None:
        wrong = measured.purified_answers(measured.images, generator) != measured.labels
        figures |= {"purified_accuracy": float((~wrong).double().mean()), "purified_error": share(wrong, right)}
    figures |= _distance_to_data(measured, measured.images, generator)
    figures["flags"] = flags(measured.classifier, measured.images, measured.labels, measured.batch_size)
    return figures


def attack_figures(
    measured: Measured, adversarial: Images, generator: Generators, threat: Threat | None = None
) -> dict[str, Any]:
    """Return the figures of one set of adversarial images.

    Args:
        measured: against what.
        adversarial: finished images, in the order of the clean ones.
        generator: of the purifier, and of the noise of the distance.
        threat: the ball that they shall be in; None: no ball was promised.

    ``purified_success`` is the mean over all draws, ``purified_success_any`` the share of images that some draw
    lets through, ``purified_success_all`` of those that every draw does.
    """
    right = measured.right(measured.classifier)
    figures: dict[str, Any] = {"success": share(measured.fooled(measured.classifier, adversarial), right)}
    if measured.purifier is not None:
        fooled = measured.wanted(measured.purified_answers(adversarial, generator))
        figures |= {
            "purified_success": share(fooled, right), "purified_success_any": share(fooled.any(0), right),
            "purified_success_all": share(fooled.all(0), right), "num_draws": measured.num_draws,
        }  # fmt: skip
    if measured.others:
        figures["transfer"] = {
            name: share(measured.fooled(other, adversarial), measured.right(other))
            for name, other in measured.others.items()
        }
    delta = adversarial - measured.images
    figures |= {"linf_max": float(size(delta, "linf").max()), "l2_mean": float(size(delta, "l2").mean())}
    figures["psnr"] = psnr(adversarial, measured.images)
    if threat is not None:
        most = threat.radius * (1 + SHARE) + SLACK
        figures["within_ball"] = bool((size(delta.double(), threat.norm) <= most).all())
    return figures | _distance_to_data(measured, adversarial, generator)


def psnr(made: Images, wanted: Images) -> float | None:
    """Return the peak signal-to-noise ratio in dB of images in [0, 1]; None for equal ones."""
    error = float((made - wanted).double().square().mean())
    return None if error == 0 else float(-10 * torch.tensor(error, dtype=torch.float64).log10())


def flags(classifier: Classifier, images: Images, labels: Labels, batch_size: int = 64) -> list[str]:
    """Return what makes an attack's success say little of a classifier's robustness, as AutoAttack warns of it.

    random: two calls differ, so that gradients and answers need several draws. probabilities: the outputs are no
    logits, and gradients vanish where it is sure. zero gradient: of some images. few classes: fewer than 4, too
    few for the targeted losses of AutoAttack.
    """
    pairs = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    # Twice in the same way: without a graph modules may take another path, and round otherwise.
    logits, again = (torch.cat([_logits(classifier, part) for part, _ in pairs]) for _ in range(2))
    found = [] if torch.equal(logits, again) else ["random"]
    if bool((logits >= 0).all()) and bool(((logits.double().sum(1) - 1).abs() < 1e-3).all()):
        found.append("probabilities")
    if any(bool((size(_slope(classifier, *pair), "linf") == 0).any()) for pair in pairs):
        found.append("zero gradient")
    if logits.shape[1] < 4:
        found.append("few classes")
    return found


@torch.no_grad()
def _logits(classifier: Classifier, images: Images) -> Tensor:
    return logits_of(classifier, images)


def _slope(classifier: Classifier, images: Images, labels: Labels) -> Tensor:
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = functional.cross_entropy(logits_of(classifier, leaf), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def _distance_to_data(measured: Measured, images: Images, generator: Generators) -> dict[str, float]:
    if measured.time is None or not isinstance(measured.purifier, Purifier):
        return {}
    parts = parts_of(images, generator, measured.batch_size)
    errors = [measured.purifier.off_manifold(part, own, t=measured.time) for part, own in parts]
    return {"off_manifold": float(torch.cat(errors).mean())}
