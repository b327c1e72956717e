"""Teacher pairs on disk: made once for all runs and ranks, and continued where a killed run stopped."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from distill.regression import Pairs
from scorefield.cache import Content, Entry, TensorCache, content_key
from scorefield.denoiser import Cond
from scorefield.models.prompts import default_cache_folder
from scorefield.progress import Progress, working

MakeShard = Callable[[int, int], Pairs]
"""(shard, num_shards) -> items shard, shard + num_shards, ... of the set, as :func:`distill.regression.make_pairs`
makes them with these as ``rank`` and ``num_ranks``."""


def default_pairs_folder() -> Path:
    """Return where pairs are kept unless a folder is named: ``pairs`` beside the cache of the prompts."""
    return default_cache_folder().parent / "pairs"


@dataclass(frozen=True, kw_only=True)
class PairsOf:
    """Everything that determines a set of pairs: two sets with one :meth:`key` hold the same pairs.

    Attributes:
        teacher: hash of its weights and their meaning.
        cond: conditions of the whole set, batch n; their content counts, so that prompts need no names.
        times: the sampling grid.
        num: pairs in all.
        shape: of one image.
        seed: of the noise.
        guidance: scale of the teacher's guidance.
        negative: what guidance moves away from.
        solver: name of the step.
        precision: of the network's arithmetic.
        keep: times at which noisy images are kept, for students of several steps.
    """

    teacher: str
    cond: Cond
    times: Tensor
    num: int
    shape: Sequence[int]
    seed: int
    guidance: float = 1.0
    negative: str = ""
    solver: str = "ddim"
    precision: str = "no"
    keep: tuple[float, ...] = ()

    def key(self) -> str:
        """sha256 of all of it, 64 hexadecimal digits."""
        words = [self.num, *self.shape, self.seed, float(self.guidance), self.solver, self.precision, *self.keep]
        conditions = [part for name in sorted(self.cond) for part in (name, self.cond[name])]
        contents = ["teacher pairs 1", self.teacher, self.negative, repr(words), self.times.double(), *conditions]
        return content_key(*contents)


def stored_pairs(
    make: MakeShard, key: str, num: int, folder: Path | None = None, *, shard_size: int = 512, rank: int = 0,
    num_ranks: int = 1, wait: Callable[[], object] = lambda: None, bar: Progress | None = None,
) -> Pairs:  # fmt: skip
    """Return the pairs of ``key``, in the order of their items; those that are not in ``folder`` are made and kept
    there.

    The set is cut into shards, whose number depends on neither ranks nor runs. Every rank makes its share of the
    missing ones, waits for the others, and reads all. A damaged shard counts as missing; so does one that another
    rank wrote where this rank cannot see it. What a killed run has finished stays.

    Args:
        make: makes one shard.
        key: :meth:`PairsOf.key` of what ``make`` makes.
        num: pairs of the whole set.
        folder: :func:`default_pairs_folder` if None. It may be shared by runs and by machines.
        shard_size: pairs a shard: what a kill loses at most.
        rank: of this process.
        num_ranks: processes that call this together.
        wait: returns when all ranks have called it, as ``accelerator.wait_for_everyone`` does.
        bar: which ``make`` tells how many pairs are done; it is given the number of those that are missing.

    Raises:
        ValueError: no pairs asked for, or images that are not finite, which are not kept.
    """
    if num < 1 or shard_size < 1:
        raise ValueError(f"teacher pairs need num and shard_size of at least 1; got {num}, {shard_size}.")
    count = -(-num // shard_size)
    cache = TensorCache(folder or default_pairs_folder(), key)
    names: list[Content] = [f"shard {number} of {count}" for number in range(count)]
    bar = bar or Progress("teacher pairs")
    own = _fetch(cache, names[rank::num_ranks], make, num, bar)
    with working("waiting for the teacher pairs of other ranks"):
        wait()
    entries: dict[Content, Entry] = dict(zip(names[rank::num_ranks], own, strict=True))
    others = [name for name in names if name not in entries]
    entries.update(zip(others, _fetch(cache, others, make, num, bar), strict=True))
    return _interleaved([entries[name] for name in names], num)


def stored_in_step(
    make: MakeShard, key: str, num: int, folder: Path | None = None, *, shard_size: int = 512,
    joined: Callable[[list[Content]], list[Content]], bar: Progress | None = None,
) -> Pairs:  # fmt: skip
    """Return what :func:`stored_pairs` does, where all ranks have to make each shard together.

    A shard that one of them lacks is made by all, also where each machine has a folder of its own.

    Args:
        make: makes one shard on all ranks, each of which gets all of it.
        key: as there.
        num: as there.
        folder: as there.
        shard_size: as there.
        joined: names that this rank lacks to those that any rank lacks, in one order on all of them.
        bar: as there.
    """
    count = -(-num // shard_size)
    cache = TensorCache(folder or default_pairs_folder(), key)
    names: list[Content] = [f"shard {number} of {count}" for number in range(count)]
    held = {name: cache.load(name) for name in names}
    missing = joined([name for name in names if held[name] is None])
    bar = bar or Progress("teacher pairs")
    bar.total = sum(len(range(number, num, count)) for number, count in map(_place, missing))
    with bar:
        for name in missing:
            made = [_entry(make(*_place(name)))]
            lacking = held[name] is None
            held[name] = cache.fetch([name], partial(_given, made), 1)[0] if lacking else made[0]
    return _interleaved([entry for entry in held.values() if entry is not None], num)


def _given(entries: list[Entry], names: list[Content]) -> list[Entry]:
    return entries


def _fetch(cache: TensorCache, names: list[Content], make: MakeShard, num: int, bar: Progress) -> list[Entry]:
    if not names:
        return []
    made = 0

    def make_all(contents: list[Content]) -> list[Entry]:
        nonlocal made
        made += len(contents)
        return [_entry(make(*_place(content))) for content in contents]

    missing = [_place(name) for name in names if not cache.path(name).is_file()]
    bar.total = sum(len(range(number, num, count)) for number, count in missing)
    with bar:
        found = cache.fetch(names, make_all, 1)
    if not made:
        print(f"{len(names)} shards of teacher pairs read from {cache.folder}", file=sys.stderr)
    return found


def _place(name: Content) -> tuple[int, int]:
    _, number, _, count = str(name).split()
    return int(number), int(count)


def _entry(pairs: Pairs) -> Entry:
    if not bool(pairs.x0.isfinite().all()):
        raise ValueError(
            "the teacher made images with nan or inf, which are no targets. Pass --precision no, or more "
            "--pair-steps."
        )
    cond = {f"cond.{name}": value for name, value in pairs.cond.items()}
    states = {f"state.{time!r}": value for time, value in pairs.states.items()}
    return {"noise": pairs.noise, "x0": pairs.x0, **cond, **states}


def _interleaved(entries: list[Entry], num: int) -> Pairs:
    # Shard s holds items s, s + count, ...: back in their order the pairs do not depend on the shards.
    joined = {name: value.new_empty(num, *value.shape[1:]) for name, value in entries[0].items()}
    for number, entry in enumerate(entries):
        for name, value in joined.items():
            value[number :: len(entries)] = entry[name]
    cond = {name.removeprefix("cond."): value for name, value in joined.items() if name.startswith("cond.")}
    states = {float(name[6:]): value for name, value in joined.items() if name.startswith("state.")}
    return Pairs(joined["noise"], joined["x0"], cond, states)
