"""Fréchet distance and KID between two sets of images, in the features of a named network.

    python train_scripts/evaluate.py --generated samples.npz --reference images/ --features runs/features

Keep the number of images and the features fixed: distances depend on both. Read the figure beside the floor, the
distance of the reference's two halves from each other.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from command import check_numbers, run
from features import Classifier, inception, load_classifier
from images import DataOptions, ImageSet, load_images
from torch import Tensor

from score.metrics import agreement, extract_features, frechet_distance, kernel_distance


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure the distance between two sets of images."""

    generated: str
    """Folder, npz or idx file, or dataset: whatever --data takes."""
    reference: str
    """The same, of real images that nothing was trained on."""
    features: Path
    """Folder of train_features.py, or the weights file of InceptionV3."""
    num_images: int | None = None
    """Images of each set, the first ones; None: all."""
    batch_size: int = 500
    """Images at a time."""
    out: Path | None = None
    """JSON file for the figures, which are printed anyway."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to compute the features."""


def main(config: Config) -> Path | None:
    """Measure, print and write the figures."""
    check_numbers(config, positive=("batch_size",))
    classifier = load_classifier(config.features) if config.features.is_dir() else None
    network = classifier.to(config.device).features if classifier else inception(config.features)
    generated, reference = (load(name, classifier, config) for name in (config.generated, config.reference))
    figures = measure(network, classifier, generated, reference, config)
    print(json.dumps(figures, indent=2))
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(figures, indent=2))
    return config.out


def load(name: str, classifier: Classifier | None, config: Config) -> ImageSet:
    """A set of images as the feature network wants them."""
    facts = classifier.facts if classifier else None
    channels: Literal["auto", "grey", "rgb"] = "auto"
    if facts:
        channels = "grey" if facts.channels == 1 else "rgb"
    options = DataOptions(data=name, resolution=facts.resolution if facts else None, channels=channels)
    images = load_images(options)
    if config.num_images is not None and len(images) < config.num_images:
        raise ValueError(f"--num-images {config.num_images}, but {name} holds {len(images)}.")
    return images


def measure(
    network: Callable[[Tensor], Tensor], classifier: Classifier | None, generated: ImageSet, reference: ImageSet,
    config: Config,
) -> dict[str, float | int | str]:  # fmt: skip
    """The figures of one comparison."""
    made, real = (features_of(network, images, config) for images in (generated, reference))
    half = len(real) // 2
    figures: dict[str, float | int | str] = {
        "features": str(config.features), "num_generated": len(made), "num_reference": len(real),
        "frechet_distance": frechet_distance(made, real), "kid": kernel_distance(made, real),
    }  # fmt: skip
    if half >= 2:
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        a, b = real[order[:half]], real[order[half : 2 * half]]
        figures |= {"floor_frechet_distance": frechet_distance(a, b), "floor_kid": kernel_distance(a, b)}
        figures["floor_num"] = half
    if classifier is not None and generated.num_classes > 1:
        figures["accuracy"] = agreement(
            classifier.logits(made.to(config.device)).cpu(), generated.labels[: len(made)]
        )
    return figures


def features_of(network: Callable[[Tensor], Tensor], images: ImageSet, config: Config) -> Tensor:
    """Features of the first ``--num-images`` images, on the CPU."""
    chosen = torch.arange(config.num_images or len(images))
    parts = []
    for part in chosen.split(config.batch_size):
        batch = images.batch(part, torch.Generator(), config.device)
        parts.append(extract_features(network, batch.images).cpu())
    return torch.cat(parts)


if __name__ == "__main__":
    run(main, Config, __doc__)
