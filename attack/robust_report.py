"""How robust a classifier is on held-out images: accuracy under PGD, its curve over radii, pictures, AutoAttack.

Robust accuracy is the share of images that are right when clean and after every restart of the attack.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attack.autoattack import autoattack
from attack.networks import Facts, save_classifier
from attack.pgd import PGD, logits_of
from attack.recipe import MAGNIFIED, picture
from attack.report import flags
from attack.robust_options import Robust
from attack.threat import Norm, Threat
from scorefield.atomic import whole_file
from scorefield.progress import progress
from scorefield.randomness import derived_generator

REPORT, PICTURE = "report.json", "images.png"


def pgd_of(config: Robust, epsilon: float, steps: int, *, restarts: int = 1, step: float = 0.0) -> PGD | None:
    """Return PGD at a radius in grey values, or None for a radius of 0; steps of 2.5 radii in all by default."""
    if not epsilon:
        return None
    return PGD(
        threat=Threat(epsilon / 255, config.norm), step_size=(step or 2.5 * epsilon / steps) / 255,
        num_steps=steps, num_restarts=restarts,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Judge:
    """A network and the images that it is measured with.

    Attributes:
        network: in eval mode, frozen.
        images: in [0, 1].
        labels: the true ones.
        norm: of the ball.
        seed: of the attacks; each image has draws of its own.
        batch_size: images at a time; results do not depend on it, but for rounding.
    """

    network: nn.Module
    images: Tensor
    labels: Tensor
    norm: Norm
    seed: int
    batch_size: int

    @torch.no_grad()
    def right(self, images: Tensor) -> Tensor:
        """Return where the answers are the labels, (n,)."""
        parts = zip(images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        return torch.cat([logits_of(self.network, part).argmax(1) == labels for part, labels in parts])

    def attacked(self, attack: PGD | None) -> Tensor:
        """Return the images after an attack."""
        if attack is None:
            return self.images
        made = list[Tensor]()
        for start in range(0, len(self.images), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.images)))
            own = [derived_generator(self.seed, "robust", row) for row in rows]
            part = slice(rows.start, rows.stop)
            made.append(attack(self.network, self.images[part], self.labels[part], generator=own))
        return torch.cat(made)

    def accuracy(self, attack: PGD | None) -> float:
        """Return the share of images that are right when clean and after the attack."""
        right = self.right(self.images)
        if attack is not None:
            right &= self.right(self.attacked(attack))
        return float(right.double().mean())

    @torch.no_grad()
    def entropy(self) -> float:
        """Return the mean cross-entropy of the clean images, in nats."""
        parts = zip(self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True)
        losses = [functional.cross_entropy(logits_of(self.network, a), b, reduction="none") for a, b in parts]
        return float(torch.cat(losses).double().mean())


def radii(config: Robust) -> list[float]:
    """Return the radii of the curve in grey values, ascending, that of the training among them."""
    further = config.test_epsilon or tuple(config.epsilon * part for part in (0.5, 1.5, 2.0))
    return sorted({value for value in (*further, config.epsilon) if value})


def measure(config: Robust, judge: Judge) -> tuple[dict[str, Any], Tensor]:
    """Return the figures of the report, and the images attacked at --epsilon, or at the largest radius for 0."""
    clean = judge.right(judge.images)
    curve, shown = [{"epsilon": 0.0, "accuracy": float(clean.double().mean())}], judge.images
    for epsilon in progress(radii(config), "radii", unit="radius"):
        attack = pgd_of(config, epsilon, config.test_steps, restarts=config.test_restarts)
        made = judge.attacked(attack)
        curve.append({"epsilon": epsilon, "accuracy": float((clean & judge.right(made)).double().mean())})
        if epsilon == config.epsilon or not config.epsilon:
            shown = made
    at = {point["epsilon"]: point["accuracy"] for point in curve}
    figures: dict[str, Any] = {
        "accuracy": curve[0]["accuracy"], "robust_accuracy": at[config.epsilon] if config.epsilon else None,
        "cross_entropy": judge.entropy(), "epsilon": config.epsilon, "norm": config.norm, "curve": curve,
        "attack": f"PGD-{config.test_steps} x {config.test_restarts}", "num_images": len(judge.images),
        "flags": flags(judge.network, judge.images, judge.labels, judge.batch_size),
    }  # fmt: skip
    if config.autoattack:
        figures["autoattack"] = _autoattack(config, judge, clean)
    return figures, shown


def _autoattack(config: Robust, judge: Judge, clean: Tensor) -> dict[str, Any]:
    found = autoattack(
        judge.network, judge.images, judge.labels, threat=Threat(config.epsilon / 255, config.norm),
        seed=config.seed, batch_size=judge.batch_size,
    )  # fmt: skip
    right = clean & judge.right(found.images)
    return {"accuracy": float(right.double().mean()), "package": found.package}


def write_results(config: Robust, facts: Facts, judge: Judge) -> None:
    """Measure, print the figures, and write classifier/, report.json and images.png."""
    save_classifier(judge.network, facts, config.out / "classifier")  # first: measuring may take long, or fail
    figures, made = measure(config, judge)
    with whole_file(config.out / PICTURE) as temporary:
        picture(judge.images.cpu(), {"attacked": made.cpu()}).save(temporary, format="PNG")
    with whole_file(config.out / REPORT) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
    print(summary(figures))


def summary(figures: dict[str, Any]) -> str:
    """Return the figures in a line."""
    points: Sequence[dict[str, float]] = figures["curve"][1:]
    attacked = ", ".join(f"{point['accuracy']:.3f} at {point['epsilon']:g}" for point in points)
    said = f"accuracy on {figures['num_images']:,} held-out images: {figures['accuracy']:.3f}"
    said += f"; under {figures['attack']}, by radius of 255: {attacked}" if attacked else ""
    beside = figures.get("autoattack")
    return said if beside is None else f"{said}; AutoAttack of {beside['package']}: {beside['accuracy']:.3f}"


def changed(images: Tensor, made: Tensor) -> Tensor:
    """Return what an attack changed, magnified, round grey."""
    return (0.5 + MAGNIFIED * (made - images)).clamp(0, 1)
