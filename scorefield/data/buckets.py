"""Buckets of aspect ratios: pictures sorted into a few shapes of about one area, batches of one shape each."""

import functools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from scorefield.randomness import derived_generator

Shape = tuple[int, int]
"""Height and width, in pixels."""

LONGEST = 2.0
"""Largest ratio of a shape's sides; a longer picture loses its ends."""


def bucket_shapes(size: int, multiple: int) -> list[Shape]:
    """Return the shapes whose area is about that of the square of ``size``, and never larger; the square first.

    For each shorter side the longer one is the longest that the area allows. At 1024 in steps of 64: 1024 x 1024,
    960 x 1088, 896 x 1152, 832 x 1216, 768 x 1344, and these turned.

    Args:
        size: height and width of the square, a multiple itself.
        multiple: that all sides are of: what the network halves without a rest.
    """
    shapes: list[Shape] = []
    for short in range(size, 0, -multiple):
        long = size * size // (short * multiple) * multiple
        if long > LONGEST * short:
            break
        shapes += [(short, long), (long, short)] if long > short else [(short, long)]
    return shapes


def nearest_shape(shape: Shape, shapes: Sequence[Shape]) -> Shape:
    """Return the one of ``shapes`` in which least of a picture is lost: the nearest in the logarithm of h / w."""
    ratio = math.log(shape[0] / shape[1])
    return min(shapes, key=lambda one: abs(math.log(one[0] / one[1]) - ratio))


def filled(shapes: Sequence[Shape], batch_size: int) -> list[Shape]:
    """Return the shapes of pictures once each of them has a batch; a rarer one's pictures take the nearest other.

    A batch of a rare shape would hold the same picture twice. One shape is left where all together have no batch.
    """
    counts, moved = Counter(shapes), dict[Shape, Shape]()
    while len(counts) > 1 and min(counts.values()) < batch_size:
        rarest = min(counts, key=lambda one: (counts[one], one))
        number = counts.pop(rarest)
        moved[rarest] = nearest_shape(rarest, sorted(counts))
        counts[moved[rarest]] += number

    def end(shape: Shape) -> Shape:
        return end(moved[shape]) if shape in moved else shape

    return [end(shape) for shape in shapes]


class Buckets:
    """Batches of one shape: what is drawn follows from the number of a batch and the seed alone.

    Each bucket is gone through in shuffled epochs, end to end: all batches are full, and what an epoch of a bucket
    leaves over comes first in its next batch. So each sample is drawn once in each epoch of its bucket, and the
    buckets' batches come in a shuffled order.

    Args:
        shapes: of each sample.
        batch_size: of every batch.
    """

    def __init__(self, shapes: Sequence[Shape], batch_size: int) -> None:
        self.shapes, self.batch_size = sorted(set(shapes)), batch_size
        numbers = {shape: number for number, shape in enumerate(self.shapes)}
        self.bucket_of = torch.tensor([numbers[shape] for shape in shapes])
        self.members = [(self.bucket_of == number).nonzero()[:, 0] for number in range(len(self.shapes))]
        # Kept are the epochs that a batch is made of, and that the next one may be made of.
        self._order = functools.lru_cache(maxsize=3)(self._shuffled)
        self._plan = functools.lru_cache(maxsize=2)(self._planned)

    def shape(self, index: int) -> Shape:
        """Return the shape of a sample."""
        return self.shapes[int(self.bucket_of[index])]

    def draw(self, number: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the samples of batch ``number`` and how often each was drawn before, (batch_size,) both."""
        most = (number + len(self.shapes)) * self.batch_size // len(self.bucket_of) + 2
        epoch = bisect_right(range(most), number, key=lambda epoch: sum(self._batches(epoch))) - 1
        before = self._batches(epoch)
        buckets, ranks = self._plan(epoch, seed)
        place = number - sum(before)
        bucket = int(buckets[place])
        first = (before[bucket] + int(ranks[place])) * self.batch_size
        positions = first + torch.arange(self.batch_size)
        size = len(self.members[bucket])
        epochs = positions // size
        drawn = [int(self._order(int(e), seed)[bucket][p % size]) for p, e in zip(positions, epochs, strict=True)]
        return torch.tensor(drawn), epochs

    def _batches(self, epoch: int) -> list[int]:
        # Of each bucket, those that were full when an epoch begins.
        return [epoch * len(members) // self.batch_size for members in self.members]

    def _planned(self, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        # The bucket of each batch of an epoch, and how many of that bucket's come before it.
        counts = [end - start for start, end in zip(self._batches(epoch), self._batches(epoch + 1), strict=True)]
        buckets = torch.repeat_interleave(torch.tensor(counts))
        buckets = buckets[torch.randperm(len(buckets), generator=derived_generator(seed, "buckets", epoch))]
        ranks = torch.empty_like(buckets)
        for bucket, count in enumerate(counts):
            ranks[buckets == bucket] = torch.arange(count)
        return buckets, ranks

    def _shuffled(self, epoch: int, seed: int) -> list[Tensor]:
        generators = (derived_generator(seed, "epoch", epoch, bucket) for bucket in range(len(self.members)))
        return [
            members[torch.randperm(len(members), generator=generator)]
            for members, generator in zip(self.members, generators, strict=True)
        ]
