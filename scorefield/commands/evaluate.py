"""Fréchet distance and KID between two sets of images, in the features of a named network.

    scorefield evaluate --generated samples.npz --reference images/ --features runs/features

Keep the number of images and the features fixed: distances depend on both. Read the figure beside the floor, the
distance of the reference's two halves from each other.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from scorefield.atomic import whole_file
from scorefield.commands.options import Evaluate, check_evaluate
from scorefield.data.images import ImageSet, load_images
from scorefield.data.options import DataOptions
from scorefield.metrics import agreement, extract_features, frechet_distance, kernel_distance
from scorefield.report.write import add_page
from scorefield.training.features import Classifier, inception, load_classifier
from scorefield.training.options import check_device

Network = Callable[[Tensor], Tensor]
Channels = Literal["auto", "grey", "rgb"]


def main(config: Evaluate) -> Path | None:
    """Measure, print and write the figures."""
    check_evaluate(config)
    check_device(config.device)
    network, classifier = load_features(config.features, config.device)
    facts = classifier.facts if classifier else None
    channels: Channels = "auto"
    if facts:
        channels = "grey" if facts.channels == 1 else "rgb"
    reference = load(config.reference, facts.resolution if facts else None, channels, config, "--reference")
    # InceptionV3 takes any size, but between two sizes it would measure how sharp the sets are.
    generated = load(config.generated, reference.resolution, channels, config, "--generated")
    figures = measure(network, classifier, generated, reference, config)
    print(json.dumps(figures, indent=2))
    if config.out is not None:
        with whole_file(config.out) as temporary:
            temporary.write_text(json.dumps(figures, indent=2))
        print(f"figures in {config.out}")
        if (page := config.out.with_suffix(".html")) != config.out:
            add_page(config.out.parent, page, file=config.out.name)
    return config.out


def load_features(features: Path, device: str) -> tuple[Network, Classifier | None]:
    """Return a feature network, and the classifier it is part of, if any.

    Raises ``ValueError`` if there is neither.
    """
    if features.is_dir():
        try:
            classifier = load_classifier(features).to(device)
        except ValueError as error:
            raise ValueError(f"--features: {error}") from error
        return classifier.features, classifier
    if not features.is_file():
        raise ValueError(
            f"--features {features} is not there; expected a folder of `scorefield features`, or torch-fidelity's "
            f"file of InceptionV3 weights, weights-inception-2015-12-05."
        )
    return inception(features, device), None


def load(
    name: str, resolution: int | None, channels: Literal["auto", "grey", "rgb"], config: Evaluate, option: str
) -> ImageSet:
    """Return a set of images as the feature network wants them. Raises ``ValueError`` for too few."""
    images = load_images(
        DataOptions(data=name, size=resolution or 0, channels=channels, on_bad_data=config.on_bad_data), option
    )
    if len(images) < (config.num_images or 2):
        raise ValueError(
            f"--num-images {config.num_images or 2} or more are needed, but {name} holds {len(images)}."
        )
    return images


def measure(
    network: Network, classifier: Classifier | None, generated: ImageSet, reference: ImageSet,
    config: Evaluate,
) -> dict[str, float | int | str]:  # fmt: skip
    """Return the figures of one comparison."""
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
        figures |= accuracy(classifier, made, generated, config)
    return figures


def accuracy(
    classifier: Classifier, made: Tensor, generated: ImageSet, config: Evaluate
) -> dict[str, float | str]:
    """Share of images that the classifier takes for what they are meant to be, or why that cannot be said."""
    facts = classifier.facts
    numbers = class_numbers(generated.class_names, facts.class_names or numbered(facts.num_classes))
    if numbers is None:
        return {
            "accuracy_left_out": f"the classes of --generated, {shown(generated.class_names)}, are not those of "
            f"--features, {shown(facts.class_names or numbered(facts.num_classes))}"
        }
    labels = numbers[generated.labels[chosen(generated, config)]]
    return {"accuracy": agreement(classifier.logits(made.to(config.device)).cpu(), labels)}


def class_numbers(names: tuple[str, ...], known: tuple[str, ...]) -> Tensor | None:
    """Return each class's number in a classifier: by name if all are known, or else as it is numbered.

    None where neither can be: a set whose classes have other names, or numbers that the classifier does not have.
    """
    if set(names) <= set(known):
        return torch.tensor([known.index(name) for name in names])
    if names == numbered(len(names)) and len(names) <= len(known):
        return torch.arange(len(names))
    return None


def numbered(num_classes: int) -> tuple[str, ...]:
    """Return the names of classes that have none."""
    return tuple(str(number) for number in range(num_classes))


def shown(names: tuple[str, ...]) -> str:
    """Return a few names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def chosen(images: ImageSet, config: Evaluate) -> Tensor:
    """Return numbers of the images that are measured."""
    return images.some(config.num_images or len(images))


def features_of(network: Network, images: ImageSet, config: Evaluate) -> Tensor:
    """Features of the chosen images, on the CPU."""
    parts = []
    for part in chosen(images, config).split(config.batch_size):
        batch = images.batch(part, torch.Generator(), config.device)
        parts.append(extract_features(network, batch.images).cpu())
    return torch.cat(parts)
