"""What is made once and kept: latents and prompts on disk, shared by all ranks, and what fits in memory.

Work is shared without ever waiting: each rank makes its share, then whatever others have not come to yet. So all
finish within a batch of each other, and no collective times out while one of them still encodes. An entry's name
holds all that its tensors depend on (``cache``): an edited image or caption is another entry, and nothing
else is made again; a learning rate is in no name.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor

from scorefield.cache import Content, Entry, TensorCache
from scorefield.data.pictures import as_floats
from scorefield.models.prompts import PromptEncoder
from scorefield.progress import Progress
from scorefield.randomness import derived_generator, normal_like

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


def share_work(
    items: Sequence[Item], *, done: Callable[[Item], bool], do: Callable[[list[Item]], object], rank: int = 0,
    num_ranks: int = 1, batch_size: int = 16, name: str = "shared work",
) -> int:  # fmt: skip
    """Do what is not done yet, this rank's share first, then what is left of the others'.

    When it returns, everything is stored. What others hold in their hands meanwhile may be done twice, about a
    batch of each of them.

    Args:
        items: the same on all ranks.
        done: cheap; whether any rank has stored an item.
        do: stores some items; doing one twice must do no harm.
        rank: of this process.
        num_ranks: that share the work.
        batch_size: most items at a time.
        name: of the work, to show how far it is.

    Returns:
        Number of items that this rank did.
    """
    own = list(range(rank, len(items), num_ranks))
    others = [number for number in range(len(items)) if number % num_ranks != rank]
    # In an order of its own, lest two ranks that have finished take the same items at the same time.
    order = torch.randperm(len(others), generator=derived_generator("share", rank)).tolist()
    count = 0
    with Progress(name, len(items)) as bar:
        for part in (own, [others[i] for i in order]):
            batch: list[Item] = []
            for position, number in enumerate(part, 1):
                if not done(items[number]):
                    batch.append(items[number])
                if batch and (len(batch) == batch_size or position == len(part)):
                    do(batch)
                    count, batch = count + len(batch), []
                bar.update()
    return count


class Memory(Generic[Key]):
    """Tensors kept in memory while they fit: first come, first kept.

    An epoch visits all samples alike, so whatever is pushed out for a newcomer would be missed just as soon.

    Args:
        limit: in bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._kept: dict[Key, Entry] = {}
        self._lock = threading.Lock()

    def get(self, key: Key) -> Entry | None:
        """The tensors of ``key``, or None."""
        return self._kept.get(key)

    def keep(self, key: Key, tensors: Mapping[str, Tensor]) -> None:
        """Keep them if there is room."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        with self._lock:
            if key not in self._kept and self.used + size <= self.limit:
                self._kept[key] = dict(tensors)
                self.used += size


@dataclass(frozen=True, eq=False)
class Latents:
    """Images to the x0 of a latent model: encoded once each, drawn anew each time.

        Latents(codec.posterior, TensorCache(folder, codec.identity()))

    The encoder's mean and standard deviation are what is kept, not one sample of its Gaussian.

    Attributes:
        encode: images in [-1, 1] to mean and standard deviation of their latents.
        cache: of both, its identity that of the encoder; None encodes every time.
        memory: in front of the cache.
        batch_size: most images encoded at a time.
        sampled: False for a base that was trained on the means: a weak KL term leaves large deviations in what
            the decoder does not look at, and such a base has never seen them.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    cache: TensorCache | None = None
    memory: Memory[str] = field(default_factory=lambda: Memory(0))
    batch_size: int = 16
    sampled: bool = True

    def __call__(self, names: Sequence[str], images: Tensor, generators: Sequence[Generator]) -> Tensor:
        """(b, c, h, w) latents on the device of ``images``.

        Args:
            names: what identifies each image, whatever made it.
            images: (b, 3, h, w), uint8.
            generators: one a sample, for the noise of the Gaussian.
        """
        mean, std = self.moments(names, images)
        return mean + std * normal_like(mean, generators) if self.sampled else mean

    def moments(self, names: Sequence[str], images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, (b, c, h, w) each; encoded and stored if they are not there."""
        if self.cache is None:
            return self._encode(images)
        known = {name: entry for name in names if (entry := self.memory.get(name)) is not None}
        rows: dict[Content, Tensor] = dict(zip(names, images, strict=True))
        missing = [name for name in dict.fromkeys(names) if name not in known]

        def make(some: list[Content]) -> list[Entry]:
            mean, std = self._encode(torch.stack([rows[name] for name in some]))
            return [{"mean": m, "std": s} for m, s in zip(mean, std, strict=True)]

        for name, entry in zip(missing, self.cache.fetch(missing, make, self.batch_size), strict=True):
            self.memory.keep(name, entry)
            known[name] = entry
        mean, std = (torch.stack([known[name][key] for name in names]) for key in ("mean", "std"))
        return mean.to(images.device), std.to(images.device)

    def has(self, name: str) -> bool:
        """Whether an entry of that name is stored."""
        return self.cache is not None and self.cache.path(name).exists()

    @torch.no_grad()
    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.encode(as_floats(part)) for part in images.split(self.batch_size)]
        mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
        return mean, std


def share_prompts(texts: PromptEncoder, prompts: Sequence[str], *, rank: int = 0, num_ranks: int = 1) -> int:
    """Encode all prompts that are not in the cache, with the other ranks; the number that this one encoded.

    No text encoder is needed afterwards: ``Teacher.without_text_encoders`` frees them.
    """
    cache = TensorCache(texts.folder, texts.identify())
    return share_work(
        sorted(set(prompts)), done=cache.holds, do=texts, rank=rank,
        num_ranks=num_ranks, name="prompts encoded",
    )  # fmt: skip
