"""Real images as a latent teacher's x0: each is encoded once, kept on disk, and read when its turn comes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Subset

from scorefield.cache import Content, TensorCache, content_key, fingerprint
from scorefield.data.pictures import as_floats, central, open_image
from scorefield.data.rows import in_shares
from scorefield.data.texts import Pictures
from scorefield.models.codec import Codec
from scorefield.models.prompts import default_cache_folder
from scorefield.models.teacher import Teacher
from scorefield.progress import Progress, working

PIXELS = 2**20
"""Encoded at a time: one image of 1024 x 1024, or 256 of 64 x 64."""

IN_MEMORY = 2**30
"""Bytes of latents, or of encoded prompts, up to which all are kept in memory; more are read from the disk."""


@dataclass(frozen=True, eq=False)
class Latents:
    """x0 of some images.

    Attributes:
        images: read, and encoded again, only where an entry of the cache was lost.
        teacher: whose codec encodes them.
        cache: an entry for each image, under the hash of its file.
        digests: those hashes, in the images' order.
        kept: (n, c, h, w) all of them, or None where they are too many.
    """

    images: Pictures
    teacher: Teacher
    cache: TensorCache
    digests: Sequence[str] = ()
    kept: Tensor | None = None

    def __call__(self, chosen: Tensor) -> Tensor:
        """(b, c, h, w) of the images with these numbers, float32 on the CPU."""
        if self.kept is not None:
            return self.kept[chosen]
        numbers = chosen.tolist()
        return self.fetch(numbers, [self.digests[number] for number in numbers])

    def fetch(self, numbers: Sequence[int], digests: Sequence[str]) -> Tensor:
        """From the cache, of images with these numbers and hashes. Raises ``ValueError`` naming a bad image."""
        places = dict(zip(digests, numbers, strict=True))

        def encode(contents: list[Content]) -> list[dict[str, Tensor]]:
            pixels = torch.stack([self.pixels(places[str(digest)]) for digest in contents])
            with torch.no_grad():
                x0 = self.teacher.encode(as_floats(pixels.to(self.teacher.device)))
            return [{"latents": row} for row in x0.float().cpu()]

        entries = self.cache.fetch(digests, encode, self.batch_size)
        return torch.stack([entry["latents"] for entry in entries])

    @property
    def batch_size(self) -> int:
        """Images that are encoded at a time."""
        height, width = self.teacher.size
        return max(1, PIXELS // (height * width))

    def pixels(self, number: int) -> Tensor:
        """Bytes (3, h, w) of an image: its central part in the teacher's proportions, resized."""
        image, size = self.images[number], self.teacher.size
        if isinstance(image, Tensor):
            if tuple(image.shape[1:]) != size:
                raise ValueError(f"are {tuple(image.shape[1:])}, the teacher's {size}.")
            return image
        return central(open_image(image.read()).convert("RGB"), size)

    def judge(self, number: int) -> tuple[str, str]:
        """Hash of an image's file, and what is wrong with it; decoded only if it is not in the cache."""
        image = self.images[number]
        try:
            digest = content_key(image if isinstance(image, Tensor) else image.read())
            if not self.cache.path(digest).exists():
                self.pixels(number)
        except (OSError, ValueError) as error:  # a path with a null byte is no path
            return "", f"{'the images' if isinstance(image, Tensor) else image.name} {error}"
        return digest, ""

    def some(self, numbers: Sequence[int]) -> "Latents":
        """Of the images with these numbers."""
        images: Any = Subset(self.images, numbers)  # type: ignore[arg-type]
        return replace(self, images=images, digests=[self.digests[number] for number in numbers])

    def encoded(self, accelerator: Accelerator) -> "Latents":
        """The same with all that is not in the cache encoded, each rank an equal share."""
        own = range(accelerator.process_index, len(self.images), accelerator.num_processes)
        with Progress("latents", len(own), unit="image") as bar:
            for start in range(0, len(own), self.batch_size):
                part = own[start : start + self.batch_size]
                self.fetch(part, [self.digests[number] for number in part])
                bar.update(len(part))
        with working("reading the latents"):
            accelerator.wait_for_everyone()
            if 4 * len(self.images) * torch.Size(self.teacher.shape).numel() > IN_MEMORY:
                return self
            return replace(self, kept=self.fetch(range(len(self.images)), self.digests))

    def identity(self) -> str:
        """A hash of all images and of what encodes them."""
        return hashlib.sha256("\n".join([self.cache.identity, *self.digests]).encode()).hexdigest()[:16]


def check_images(images: Pictures, teacher: Teacher, accelerator: Accelerator) -> tuple[Latents, list[str]]:
    """The images as latents to be encoded, and what is wrong with each of them; the ranks share the work."""
    assert isinstance(teacher.codec, Codec)
    facts = torch.cat([teacher.codec.numbers, torch.tensor(teacher.size, dtype=torch.float32)])
    if len(set(teacher.size)) > 1:  # entries of an earlier version were square
        facts = torch.cat([facts, torch.ones(1)])
    identity = fingerprint([*teacher.codec.vae.state_dict().values(), facts])
    latents = Latents(images, teacher, TensorCache(default_cache_folder().parent / "latents", identity))
    judged = in_shares(
        latents.judge, len(images), rank=accelerator.process_index, num_ranks=accelerator.num_processes,
        gather=gather_object,
    )  # fmt: skip
    return replace(latents, digests=[digest for digest, _ in judged]), [fault for _, fault in judged]
