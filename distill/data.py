"""The images that a distillation needs, and its batches: with real images, or with conditions alone."""

from collections.abc import Callable
from typing import Any

import torch

from distill.options import Config
from scorefield.cache import fingerprint
from scorefield.data.images import DIGITS, ImageSet, load_images
from scorefield.models.teacher import Teacher
from scorefield.randomness import Rng, shuffled


def student_data(config: Config, teacher: Teacher) -> ImageSet | None:
    """The images of ``--data``; None if none are named and nothing uses them.

    The GAN term and ``--features`` need images. The digits that ship stand in for a teacher of digits alone.

    Raises:
        ValueError: images that are needed and not named, or that the teacher does not make.
    """
    listens = config.reals == "data" and config.gan_weight != 0
    users = ["the GAN term"] if listens and config.gan_weight else []
    users += ["--features"] if config.features is not None else []
    digits = (teacher.shape, teacher.num_classes) == DIGITS
    if config.data is None and not users and not (digits and listens):
        return None
    if config.data is None and not digits:
        raise ValueError(
            f"{' and '.join(users)} need{'s' if len(users) == 1 else ''} images such as the teacher was trained "
            "on, and --data names none. Pass --data, or do without: --gan-weight 0, no --features."
        )
    data = load_images(config)
    check_data(data, teacher)
    return data


def check_data(data: ImageSet, teacher: Teacher) -> None:
    """Raise ``ValueError`` for images of another shape, or of more classes than a teacher of classes knows.

    The labels of images are ignored by a teacher without classes.
    """
    if data.shape != teacher.shape or 0 < teacher.num_classes < data.num_classes:
        raise ValueError(
            f"the teacher makes images {teacher.shape} of {teacher.num_classes} classes; --data holds "
            f"{data.shape} of {data.num_classes}. Use the teacher's own data, and its --resolution."
        )


def student_batches(
    config: Config, teacher: Teacher, data: ImageSet | None, device: torch.device
) -> Callable[[Rng], dict[str, Any]]:
    """What makes a batch from an ``Rng``: real images and their conditions; without images, classes at random."""

    def real(rng: Rng) -> dict[str, Any]:
        assert data is not None
        batch = data.batch(shuffled(len(data), config.batch_size, rng), rng("augment"), device)
        return {"cond": teacher.cond(batch.labels), "real": batch.images, "size": len(batch.labels)}

    def conditions(rng: Rng) -> dict[str, Any]:
        labels = torch.randint(max(1, teacher.num_classes), (config.batch_size,), generator=rng("labels"))
        # Real images come with the teacher pairs, which are not made yet when the shapes are tried.
        real = {"real": torch.zeros(config.batch_size, *teacher.shape, device=device)} if config.gan_weight else {}
        return {"cond": teacher.cond(labels.to(device)), "size": config.batch_size, **real}

    return conditions if data is None or config.reals == "teacher" else real


def data_identity(data: ImageSet | None) -> str:
    """A hash of the images and their labels, or that there are none."""
    return "none" if data is None else fingerprint([data.images, data.labels])
