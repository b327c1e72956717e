"""Randomness that is derived, not stored: a resumed run draws the same numbers, on any number of restarts."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator]
"""One generator for a batch, or one for each of its samples, whose images then do not depend on the batch."""


@dataclass(frozen=True)
class Rng:
    """Generators derived from what identifies a draw; the same arguments always give the same numbers.

    Attributes:
        seed: of the run.
        step: iteration, from 0.
        micro: micro-batch within the iteration.
        rank: of the process.
        index: number of this micro-batch among those of all ranks since step 0: where data loading stands.
    """

    seed: int
    step: int
    micro: int = 0
    rank: int = 0
    index: int = 0

    def __call__(self, purpose: str) -> Generator:
        """A CPU generator of this rank's own for ``purpose``."""
        return derived_generator(self.seed, self.step, self.micro, purpose, self.rank)

    def shared(self, purpose: str) -> Generator:
        """A CPU generator that all ranks have in common, for choices they must agree on."""
        return derived_generator(self.seed, self.step, self.micro, purpose)


def derived_generator(*identity: int | str) -> Generator:
    """A CPU generator seeded by a hash of ``identity``."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal_like(x: Tensor, generator: Generators | None) -> Tensor:
    """Standard normal numbers of the shape of ``x``, drawn where the generator lives: the same on every device.

    Raises ``ValueError`` for a list of generators of another length than the batch.
    """
    if generator is None or isinstance(generator, Generator):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"a batch of {len(x)} needs one generator, or {len(x)}; got {len(generator)}.")
    rows = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generator]
    return torch.stack(rows).to(x.device)


def shuffled(num_items: int, batch_size: int, rng: Rng) -> Tensor:
    """Return (batch_size,) item numbers of this micro-batch: shuffled epochs, end to end, from ``rng.index``."""
    position = rng.index * batch_size + torch.arange(batch_size)
    chosen = torch.empty_like(position)
    for epoch in range(int(position[0]) // num_items, int(position[-1]) // num_items + 1):
        here = position // num_items == epoch
        chosen[here] = _order(num_items, rng.seed, epoch)[position[here] % num_items]
    return chosen


@functools.lru_cache(maxsize=4)
def _order(num_items: int, seed: int, epoch: int) -> Tensor:
    # Of an epoch, kept: to shuffle a million items for each batch would take longer than to train on it.
    return torch.randperm(num_items, generator=derived_generator(seed, "epoch", epoch))
