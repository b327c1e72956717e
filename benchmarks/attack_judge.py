"""Attacks on the shape head of the toy world's judge: the figures of docs/attack.md.

    python benchmarks/attack_judge.py

measures FGSM and PGD at 2, 4, 8 and 16 of 255. ``--diff-pgd --epsilon 8`` measures Diff-PGD beside them, all after
purification; ``--torchattacks`` compares PGD with torchattacks, where it is installed, step for step.
"""

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor

from attack.diff_pgd import diff_pgd
from attack.options import Attack
from attack.pgd import PGD, Classifier, fgsm
from attack.purify import Purifier
from attack.recipe import make_purifier
from attack.report import Measured, attack_figures, clean_figures
from attack.threat import Threat
from scorefield.models.teacher import load_teacher
from scorefield.randomness import derived_generator
from toyworld.attacked import shape_classifier, shape_images


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    epsilon: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0)
    """Radii in grey values of 255, L-infinity."""
    num_images: int = 32
    """Renders that the judge was not trained on."""
    seed: int = 0
    """Seed of scenes and draws."""
    steps: int = 10
    """Steps of PGD, each of 2 / 255."""
    diff_pgd: bool = False
    """Measure Diff-PGD, too, and everything after purification."""
    strength: float = 0.1
    """Of the purification."""
    purify_steps: int = 2
    """Denoising steps of the purification."""
    draws: int = 5
    """Draws of the purification for each gradient, and on each finished image."""
    torchattacks: bool = False
    """Compare PGD step for step with torchattacks' PGD, without a random start."""


def main(config: Config) -> None:
    """Print one line of JSON for each attack, as soon as it is there."""
    found = shape_images(config.num_images, config.seed)
    images, labels, classifier = (found.images + 1) / 2, found.labels, shape_classifier()
    if config.torchattacks:
        say("torchattacks", largest_difference=compared(config, classifier, images, labels))
        return
    purifier: Purifier | None = None
    if config.diff_pgd:
        options = Attack(teacher="toyworld", strength=config.strength, purify_steps=config.purify_steps)
        purifier = make_purifier(options, load_teacher("toyworld"))
    measured = Measured(
        classifier=classifier, images=images, labels=labels, purifier=purifier, num_draws=max(2, config.draws),
        time=None if purifier is None else float(purifier.times[0]), batch_size=16,
    )  # fmt: skip
    say("clean", **clean_figures(measured, draws(config)))
    for epsilon in config.epsilon:
        threat = Threat(epsilon / 255)
        attack = PGD(threat=threat, step_size=2 / 255, num_steps=config.steps, num_draws=config.draws)
        made = fgsm(classifier, images, labels, threat=threat, generator=draws(config))
        say(f"fgsm {epsilon:g}", **attack_figures(measured, made, draws(config), threat))
        made = attack(classifier, images, labels, generator=draws(config))
        say(f"pgd {epsilon:g}", **attack_figures(measured, made, draws(config), threat))
        if purifier is not None:
            start = time.process_time()
            both = diff_pgd(attack, classifier, images, labels, purifier=purifier, generator=draws(config))
            spent = time.process_time() - start
            say(f"diff-pgd {epsilon:g}", cpu_seconds=spent,
                **attack_figures(measured, both.iterate, draws(config), threat))  # fmt: skip
            say(f"diff-pgd {epsilon:g} realistic", **attack_figures(measured, both.realistic, draws(config)))


def draws(config: Config) -> list[torch.Generator]:
    """Return a generator for each image."""
    return [derived_generator(config.seed, "attack", row) for row in range(config.num_images)]


def compared(config: Config, classifier: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the largest difference of a pixel after 1 to ``steps`` steps, at each radius."""
    try:
        import torchattacks
    except ImportError as error:
        sys.exit(f"--torchattacks needs: pip install torchattacks ({error})")

    class Network(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return classifier(x)

    network = Network()
    network.register_parameter("device_of", torch.nn.Parameter(torch.zeros(1)))  # they ask one for its device
    worst = {}
    for epsilon in config.epsilon:
        gaps = []
        for steps in range(1, config.steps + 1):
            ours = PGD(threat=Threat(epsilon / 255), step_size=2 / 255, num_steps=steps, random_start=False)
            theirs = torchattacks.PGD(network, eps=epsilon / 255, alpha=2 / 255, steps=steps, random_start=False)
            made = ours(classifier, images, labels, generator=torch.Generator())
            gaps.append(float((made - theirs(images, labels)).abs().max()))
        worst[f"{epsilon:g}"] = max(gaps)
    return worst


def say(name: str, **figures: Any) -> None:
    """Print one line."""
    print(json.dumps({"attack": name, **figures}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config))
