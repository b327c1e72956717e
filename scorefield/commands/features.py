"""Train a small classifier on your own classes; `scorefield evaluate` measures distances in its features.

    scorefield features --data images/ --size 32 --out runs/features

Distances in these features mean something beside each other, and nothing beside published FIDs. Keep the folder:
figures are comparable only under the same features.
"""

from pathlib import Path

from scorefield.commands.options import TrainFeatures, check_features
from scorefield.data.images import load_images
from scorefield.training.features import save_classifier, train_classifier
from scorefield.training.options import check_device


def main(config: TrainFeatures) -> Path:
    """Train and return the folder of the classifier."""
    check_features(config)
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
