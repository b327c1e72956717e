"""scikit-learn's 1,797 handwritten digits, 8 x 8: the demo's data, and the classifier that scores its samples.

The split is fixed: 900 images train the teacher, 300 the classifier, and 597 are the reference. Nothing is
downloaded.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from scorefield.data.images import Labelled
from scorefield.metrics import agreement, extract_features, frechet_distance, kernel_distance

NUM_CLASSES = 10
SHAPE = (1, 8, 8)
SPLIT = (900, 300, 597)


def load_digits() -> tuple[Labelled, Labelled, Labelled]:
    """Return the three parts: 900 images to train on, 300 for the classifier, 597 to score with.

    Raises ``ValueError`` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn, which is not installed. Install it, with pip install -e "
            '".[demo]", or pass images of your own with --data.'
        ) from error
    data = load()
    order = np.random.RandomState(0).permutation(len(data.target))
    images = torch.tensor(data.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target[order], dtype=torch.long)
    train, features, score = (
        Labelled(i, y) for i, y in zip(images.split(SPLIT), labels.split(SPLIT), strict=True)
    )
    return train, features, score


def training_images() -> Labelled:
    """Return the 900 images to train on."""
    return load_digits()[0]


def held_out_images() -> Labelled:
    """Return the 597 images to measure with."""
    return load_digits()[2]


class DigitClassifier(nn.Module):
    """A small convolutional classifier. Its 64 penultimate activations are the feature space of the figures."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, pool in ((1, 32, False), (32, 64, True), (64, 64, False)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 64), nn.ReLU())
        self.logits = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (b, 10)."""
        logits: Tensor = self.logits(self.features(images))
        return logits


def train_classifier(part: Labelled, seed: int, steps: int = 600) -> DigitClassifier:
    """Train the classifier on its own 300 images, with one-pixel shifts and noise, and return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DigitClassifier()
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = torch.randint(0, len(part.images), (64,), generator=generator)
            images = _shifted(part.images[chosen], generator)
            images = images + 0.1 * torch.randn(images.shape, generator=generator)
            loss = functional.cross_entropy(network(images), part.labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    return network.eval().requires_grad_(False)


def _shifted(images: Tensor, generator: Generator) -> Tensor:
    # Half of the images move by up to one pixel; the frame is background.
    padded = functional.pad(images, (1, 1, 1, 1), value=-1.0)
    corner = torch.randint(0, 3, (len(images), 2), generator=generator)
    corner[torch.rand(len(images), generator=generator) < 0.5] = 1
    rows, columns = (corner[:, axis, None] + torch.arange(8) for axis in (0, 1))
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None]][:, None]


@dataclass(frozen=True)
class Score:
    """Fréchet and kernel distance to the 597 images, and agreement of the classifier with the requested labels."""

    fd: float
    kid: float
    accuracy: float


class Judge:
    """Scores generated digits against the 597 held-out images."""

    def __init__(self, seed: int = 0, num_images: int = 5000) -> None:
        self.train, own, self.held_out = load_digits()
        self.classifier = train_classifier(own, seed)
        self.reference = extract_features(self.classifier.features, self.held_out.images)
        self.labels = proportional_labels(self.held_out.labels, num_images)
        self.accuracy = agreement(self.classifier(self.held_out.images), self.held_out.labels)

    def score(self, images: Tensor, labels: Tensor) -> Score:
        """Return the figures of labelled images, first clamped to [-1, 1] as they would be in a picture."""
        images = images.clamp(-1, 1)
        features = extract_features(self.classifier.features, images)
        logits = self.classifier.logits(features)
        return Score(
            frechet_distance(features, self.reference),
            kernel_distance(features, self.reference),
            agreement(logits, labels),
        )

    def floor(self) -> Score:
        """Return the figures of the teacher's 900 training images: real images against real ones."""
        return self.score(self.train.images, self.train.labels)

    def nearest(self, images: Tensor) -> float:
        """Return the mean pixel distance to the nearest training image.

        A value below that of the held-out images means that images were copied.
        """
        return float(torch.cdist(images.clamp(-1, 1).flatten(1), self.train.images.flatten(1)).amin(1).mean())


def proportional_labels(labels: Tensor, num_images: int) -> Tensor:
    """Return ``num_images`` sorted labels with the frequencies of ``labels``, by the largest-remainder method."""
    share = torch.bincount(labels, minlength=NUM_CLASSES).double() / len(labels) * num_images
    counts = share.floor().long()
    largest = (share - counts).argsort(descending=True)[: num_images - int(counts.sum())]
    counts[largest] += 1
    return torch.repeat_interleave(torch.arange(NUM_CLASSES), counts)
