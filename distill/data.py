"""The images that a distillation needs, and its batches: with real images, or with conditions alone."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from distill.options import ALONG_PATHS, Config
from scorefield.cache import TensorCache, cache_folder, content_key, fingerprint
from scorefield.data.images import DIGITS, ImageSet, load_images
from scorefield.data.pictures import read_central
from scorefield.data.rows import in_shares
from scorefield.data.texts import Pictures
from scorefield.data.threads import in_threads
from scorefield.models.codec import Codec
from scorefield.models.teacher import Teacher
from scorefield.randomness import Rng
from scorefield.training.latents import Latents, Memory
from scorefield.training.options import images_per_pass

PIXELS = 2**20
"""Encoded at a time: one image of 1024 x 1024, or 256 of 64 x 64."""


def student_data(config: Config, teacher: Teacher) -> ImageSet | None:
    """Return the images of ``--data``; None if none are named and nothing uses them.

    The GAN term, consistency and ``--features`` need images. The digits that ship stand in for a teacher of digits
    alone.

    Raises:
        ValueError: images that are needed and not named, or that the teacher does not make.
    """
    along_paths, from_data = config.method in ALONG_PATHS, config.reals == "data"
    listens = from_data and (along_paths or config.gan_weight != 0)
    user = f"--method {config.method}" if along_paths else "the GAN term"
    users = [user] if from_data and config.needs_images else []
    users += ["--features"] if config.features is not None else []
    digits = (teacher.shape, teacher.num_classes) == DIGITS
    if config.data is None and not users and not (digits and listens):
        return None
    if config.data is None and not digits:
        without = "--reals teacher" if along_paths else "--gan-weight 0"
        raise ValueError(
            f"{' and '.join(users)} need{'s' if len(users) == 1 else ''} images such as the teacher was trained "
            f"on, and --data names none. Pass --data, or do without: {without}, no --features."
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
            f"{data.shape} of {data.num_classes}. Use the teacher's own data, and its --size."
        )


def student_batches(
    config: Config, teacher: Teacher, data: ImageSet | None, device: torch.device, num_ranks: int = 1
) -> Callable[[Rng], dict[str, Any]]:
    """Return a function that makes a batch: real images and their conditions, or without images random classes."""
    number = images_per_pass(config)

    def conditions(rng: Rng) -> dict[str, Any]:
        labels = torch.randint(max(1, teacher.num_classes), (number,), generator=rng("labels"))
        # Real images come with the teacher pairs, which are not made yet when the shapes are tried.
        shape = (number, *teacher.shape)
        real = {"real": torch.zeros(shape, device=device)} if config.needs_images else {}
        return {"cond": teacher.cond(labels.to(device)), "size": number, **real}

    if data is None or config.reals == "teacher":
        return conditions
    images = data.batches(number, device, num_ranks)

    def real(rng: Rng) -> dict[str, Any]:
        batch = images(rng)
        return {"cond": teacher.cond(batch.labels), "real": batch.images, "size": len(batch.labels)}

    return real


@dataclass(frozen=True, eq=False)
class RealLatents:
    """x0 of the images that belong to prompts.

    Attributes:
        images: read only where they were not encoded yet, or an entry of the cache was lost.
        size: height and width that they are cut and resized to.
        latents: an entry for each image, under the hash of its file.
        device: of the encoder.
        digests: those hashes, in the images' order.
    """

    images: Pictures
    size: tuple[int, int]
    latents: Latents
    device: torch.device
    digests: Sequence[str] = ()

    def __call__(self, chosen: Tensor) -> Tensor:
        """Return (b, c, h, w) of the images with these numbers, float32.

        Raises ``ValueError`` naming a bad image.
        """
        numbers = chosen.tolist()

        def pixels(places: list[int]) -> Tensor:
            return torch.stack(list(in_threads(self.pixels, [numbers[place] for place in places])))

        return self.latents([self.digests[number] for number in numbers], pixels, self.device)["latents"]

    def pixels(self, number: int) -> Tensor:
        """Return the bytes (3, h, w) of an image: its central part in the teacher's proportions, resized."""
        image = self.images[number]
        if isinstance(image, Tensor):
            if tuple(image.shape[1:]) != self.size:
                raise ValueError(f"are {tuple(image.shape[1:])}, the teacher's {self.size}.")
            return image
        return read_central(image.read(), "RGB", self.size)

    def judge(self, number: int) -> tuple[str, str]:
        """Hash of an image's file, and what is wrong with it; decoded only if it is not in the cache."""
        image = self.images[number]
        try:
            digest = content_key(image if isinstance(image, Tensor) else image.read())
            if self.latents.cache is None or not self.latents.cache.path(digest).exists():
                self.pixels(number)
        except (OSError, ValueError) as error:  # a path with a null byte is no path
            return "", f"{'the images' if isinstance(image, Tensor) else image.name} {error}"
        return digest, ""

    def some(self, numbers: Sequence[int]) -> "RealLatents":
        """Return the latents of the images with these numbers."""
        images: Any = Subset(self.images, numbers)  # type: ignore[arg-type]
        return replace(self, images=images, digests=[self.digests[number] for number in numbers])

    def identity(self) -> str:
        """Return a hash of all images and of what encodes them."""
        assert self.latents.cache is not None
        return hashlib.sha256("\n".join([self.latents.cache.identity, *self.digests]).encode()).hexdigest()[:16]


def check_images(
    images: Pictures, teacher: Teacher, *, rank: int = 0, num_ranks: int = 1,
    gather: Callable[[list[Any]], list[Any]] = list,
) -> tuple[RealLatents, list[str]]:  # fmt: skip
    """Return the images as latents, and what is wrong with each of them; the ranks share the work."""
    codec = teacher.codec
    assert isinstance(codec, Codec)
    facts = torch.cat([codec.numbers, torch.tensor(teacher.size, dtype=torch.float32)])
    if len(set(teacher.size)) > 1:  # entries of an earlier version were square
        facts = torch.cat([facts, torch.ones(1)])
    identity = fingerprint([*codec.vae.state_dict().values(), facts])
    cache = TensorCache(cache_folder() / "latents", identity)
    batch_size = max(1, PIXELS // (teacher.size[0] * teacher.size[1]))
    # Of the teacher only its codec is held: its text encoders are freed before training.
    latents = Latents(lambda x: {"latents": codec.encode(x).float()}, cache, Memory(), batch_size)
    real = RealLatents(images, teacher.size, latents, teacher.device)
    checked = in_shares(real.judge, len(images), rank=rank, num_ranks=num_ranks, gather=gather)
    return replace(real, digests=[digest for digest, _ in checked]), [fault for _, fault in checked]
