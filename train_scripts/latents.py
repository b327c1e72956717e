"""Real images as a latent teacher's x0: each is encoded once, kept on disk, and read when its turn comes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from command import fingerprint
from PIL import Image
from texts import Pictures
from torch import Tensor
from tqdm import tqdm

from scorefield.cache import Content, TensorCache, content_key
from scorefield.data.pictures import open_image
from scorefield.files import read_regular
from scorefield.models import hub
from scorefield.models.prompts import default_cache_folder

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
    teacher: hub.Teacher
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
                x0 = self.teacher.encode(pixels.to(self.teacher.device).float() / 127.5 - 1)
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
                raise ValueError(f"the images are {tuple(image.shape[1:])}, the teacher's {size}.")
            return image
        try:
            cut = central(open_image(image).convert("RGB"), size)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{named(image, number)} cannot be used: {error}") from error
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1)

    def digest(self, number: int) -> str:
        """Hash of an image's file, which is not decoded."""
        image = self.images[number]
        try:
            return content_key(read_regular(image) if isinstance(image, Path) else image)
        except (OSError, ValueError) as error:  # a path with a null byte is no path
            raise ValueError(f"{named(image, number)} cannot be used: {error}") from error

    def identity(self) -> str:
        """A hash of all images and of what encodes them."""
        return hashlib.sha256("\n".join([self.cache.identity, *self.digests]).encode()).hexdigest()[:16]


def central(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The central part of an image in the proportions of ``size``, (height, width), resized to it.

    Raises ``ValueError`` for an image below half of that size.
    """
    scale = min(image.height / size[0], image.width / size[1])
    if 2 * scale < 1:
        raise ValueError(f"is {image.width} x {image.height}, smaller than half of {size[1]} x {size[0]}.")
    height, width = (round(side * scale) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    # Resizing with box= would let the filter see beyond the part.
    return image.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.LANCZOS)


def named(image: Path | bytes | Tensor, number: int) -> str:
    """An image, to complain of."""
    return f"the image {image}" if isinstance(image, Path) else f"the image of prompt {number + 1}"


def encode_images(images: Pictures, teacher: hub.Teacher, accelerator: Accelerator) -> Latents:
    """The images as latents; what is not in the cache is encoded, each rank an equal share.

    Raises ``ValueError`` naming an image that cannot be read or is smaller than half of the teacher's size.
    """
    assert teacher.codec is not None
    facts = torch.tensor([teacher.codec.scaling, teacher.codec.shift, *teacher.size])
    if len(set(teacher.size)) > 1:  # entries of an earlier version were square
        facts = torch.cat([facts, torch.ones(1)])
    identity = fingerprint([*teacher.codec.vae.state_dict().values(), facts])
    latents = Latents(images, teacher, TensorCache(default_cache_folder().parent / "latents", identity))
    share = -(-len(images) // accelerator.num_processes)
    first = accelerator.process_index * share
    numbers = range(first, max(first, min(first + share, len(images))))
    digests: list[str] = []
    for start in tqdm(range(0, len(numbers), latents.batch_size), "latents", disable=None):
        part = numbers[start : start + latents.batch_size]
        own = [latents.digest(number) for number in part]
        latents.fetch(part, own)
        digests += own
    latents = replace(latents, digests=gather_object(digests))  # in the ranks' order, which is the images'
    if 4 * len(images) * torch.Size(teacher.shape).numel() > IN_MEMORY:
        return latents
    return replace(latents, kept=latents.fetch(range(len(images)), latents.digests))
