"""Images as a latent model's x0: each is encoded when it is first drawn, and kept in memory and on disk.

So a training begins at once, and what it never draws is never encoded. An entry's name holds all that its tensors
depend on: an edited image is another entry, and nothing else is made again.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from scorefield.cache import Content, Entry, TensorCache
from scorefield.data.pictures import as_floats

Key = TypeVar("Key", bound=Hashable)

IN_MEMORY = 2**29
"""Bytes of latents, or of samples that were read, up to which they are kept in memory."""


class Memory(Generic[Key]):
    """Tensors kept in memory while they fit: first come, first kept.

    An epoch visits all samples alike, so whatever is pushed out for a newcomer would be missed just as soon.

    Args:
        limit: in bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int = IN_MEMORY) -> None:
        self.limit, self.used = limit, 0
        self._kept: dict[Key, Entry] = {}
        self._lock = threading.Lock()

    def get(self, key: Key) -> Entry | None:
        """Return the tensors of ``key``, or None."""
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
    """What an autoencoder makes of images: encoded once each.

        Latents(lambda images: {"latents": codec.encode(images)}, TensorCache(folder, codec.identity()))

    Attributes:
        encode: (b, 3, h, w) images in [-1, 1] to named tensors of batch b.
        cache: of these tensors, its identity that of the encoder; None encodes every time.
        memory: in front of the cache.
        batch_size: most images encoded at a time.
    """

    encode: Callable[[Tensor], Mapping[str, Tensor]]
    cache: TensorCache | None = None
    memory: Memory[str] = field(default_factory=lambda: Memory(0))
    batch_size: int = 16

    def __call__(
        self, names: Sequence[str], pixels: Callable[[list[int]], Tensor], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Return the tensors of some images, batch b, on ``device``; encoded and stored if they are not there.

        Args:
            names: what identifies each image, whatever made it.
            pixels: positions in ``names`` -> those images, uint8; asked of what nobody has encoded yet.
            device: of the encoder.
        """
        if self.cache is None:
            parts = [self._encode(part, device) for part in pixels(list(range(len(names)))).split(self.batch_size)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        known = {name: entry for name in names if (entry := self.memory.get(name)) is not None}
        missing = [name for name in dict.fromkeys(names) if name not in known]
        places: dict[Content, int] = {name: place for place, name in enumerate(names)}

        def make(some: list[Content]) -> list[Entry]:
            made = self._encode(pixels([places[name] for name in some]), device)
            return [{name: rows[i] for name, rows in made.items()} for i in range(len(some))]

        for name, entry in zip(missing, self.cache.fetch(missing, make, self.batch_size), strict=True):
            self.memory.keep(name, entry)
            known[name] = entry
        rows = [known[name] for name in names]
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}

    @torch.no_grad()
    def _encode(self, pixels: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        # In the encoder's own precision, whatever the step that asks computes in: what is stored stays.
        with torch.autocast(torch.device(device).type, enabled=False):
            return dict(self.encode(as_floats(pixels.to(device))))
