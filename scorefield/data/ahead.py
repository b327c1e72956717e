"""Batches one ahead of the training: the next one is read from the disk in a thread while one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from scorefield.randomness import Rng

Loaded = TypeVar("Loaded")
Batch = TypeVar("Batch")


def read_ahead(
    load: Callable[[int, int], Loaded], complete: Callable[[Loaded, Rng], Batch], num_ranks: int = 1
) -> Callable[[Rng], Batch]:
    """Return a function of ``Rng`` that makes batches: ``complete`` of what ``load`` reads.

    Args:
        load: number of the batch and seed -> what lies on the disk, and the slow part; runs in a thread.
        complete: the rest, when the batch is asked for.
        num_ranks: a rank asks for each ``num_ranks``-th batch.
    """
    pool = ThreadPoolExecutor(1)
    coming: dict[tuple[int, int], Future[Loaded]] = {}

    def batch(rng: Rng) -> Batch:
        here, following = (rng.index, rng.seed), (rng.index + num_ranks, rng.seed)
        future = coming.pop(here, None)
        coming.clear()
        coming[following] = pool.submit(load, *following)
        return complete(future.result() if future else load(*here), rng)

    return batch
