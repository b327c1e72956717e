"""Randomness that is derived, not stored: a resumed run draws the same numbers, on any number of restarts."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


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


def shuffled(num_items: int, batch_size: int, rng: Rng) -> Tensor:
    """(batch_size,) item numbers of this micro-batch: shuffled epochs, end to end, from ``rng.index``."""
    position = rng.index * batch_size + torch.arange(batch_size)
    chosen = torch.empty_like(position)
    for epoch in range(int(position[0]) // num_items, int(position[-1]) // num_items + 1):
        order = torch.randperm(num_items, generator=derived_generator(rng.seed, "epoch", epoch))
        here = position // num_items == epoch
        chosen[here] = order[position[here] % num_items]
    return chosen
