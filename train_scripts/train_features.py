"""Train a small classifier on your own classes; its features measure Fréchet distance and KID in evaluate.py.

    python train_scripts/train_features.py --data images/ --resolution 32 --out runs/features

Distances in these features mean something beside each other, and nothing beside published FIDs. Keep the folder:
figures are comparable only under the same features.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from command import check_device, check_numbers, check_out, run
from features import save_classifier, train_classifier
from images import DataOptions, load_images

from scorefield.atomic import check_replaceable


@dataclass(frozen=True, kw_only=True)
class Config(DataOptions):
    """Train the feature network of evaluate.py."""

    out: Path = Path("runs/features")
    """Folder for weights and facts."""
    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak of a one-cycle schedule."""
    seed: int = 0
    """Of the split into nine tenths and one tenth, the weights and the augmentation."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""


def main(config: Config) -> Path:
    """Train and return the folder of the classifier."""
    check_numbers(config, positive=("steps", "batch_size"), rates=("learning_rate",))
    check_out(config.out)
    check_replaceable(config.out)
    check_device(config.device)
    data = load_images(config)
    if data.num_classes < 2 or len(data) < 20:
        raise ValueError(
            f"a classifier needs at least 2 classes and 20 images; --data {config.data} has {data.num_classes} "
            f"and {len(data)}."
        )
    network = train_classifier(
        data, steps=config.steps, batch_size=config.batch_size, learning_rate=config.learning_rate,
        seed=config.seed, device=config.device,
    )  # fmt: skip
    save_classifier(network, config.out)
    print(f"accuracy on the tenth that was held out: {network.facts.accuracy:.3f}; features in {config.out}")
    return config.out


if __name__ == "__main__":
    run(main, Config, __doc__)
