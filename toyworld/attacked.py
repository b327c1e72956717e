"""The toy world as something to attack: the judge's shapes, and renders that it was not trained on."""

from collections.abc import Callable

import torch
from torch import Tensor

from scorefield.data.images import Labelled
from toyworld.data import HELD_OUT
from toyworld.judge import ANSWERS, as_pictures, labels_of, load_judge, render_pictures


def shape_names() -> tuple[str, ...]:
    """Return the names of the classes, in the order of their numbers."""
    return tuple(ANSWERS["shape"])


def shape_classifier(device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Return the shape head of the judge: images (b, 3, 64, 64) in [0, 1] to logits (b, 9)."""
    judge = load_judge(device=device)

    def logits(images: Tensor) -> Tensor:
        return judge(2 * images - 1)["shape"]

    return logits


def shape_images(num_images: int, seed: int) -> Labelled:
    """Return renders (n, 3, 64, 64) in [-1, 1] of scenes that nothing was trained on, and their shapes."""
    images, attributes = render_pictures(range(HELD_OUT, HELD_OUT + num_images), seed)
    return Labelled(as_pictures(images), labels_of(attributes)["shape"])
