"""Prompts as conditions: each is encoded once, kept on disk, and needs no text encoder afterwards."""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from scorefield.cache import Content, Entry, TensorCache, cache_folder
from scorefield.choices import LongPrompts as LongPrompts
from scorefield.denoiser import Cond
from scorefield.files import warn
from scorefield.progress import Progress
from scorefield.randomness import derived_generator

Item = TypeVar("Item")

Encode = Callable[[list[str]], Cond]
"""n prompts -> conditions of batch n, on any device."""

CUT = "num_tokens_cut"
"""Name, in entries of the cache, of the number of tokens at the end of a prompt that were not read."""

BATCH = 16
"""Prompts that are encoded at a time."""


def default_cache_folder() -> Path:
    """Return where prompts are kept unless a folder is named: ``~/.cache/scorefield/prompts``, or in
    $XDG_CACHE_HOME.
    """
    return cache_folder() / "prompts"


@dataclass(frozen=True)
class Words:
    """The words of a prompt, and which of the text encoder's tokens are theirs.

    Attributes:
        words: in lower case; punctuation marks are words of their own.
        tokens: of each word, numbers of tokens.
        end: number of the end token; None where the tokenizer has none, or cut it off.
        length: of a prompt in tokens, padding included.
    """

    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    end: int | None
    length: int


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """Text encoders behind a cache on disk.

    All functions are called when they are first needed: a run whose prompts are all in the cache never loads a
    text encoder. ``identify`` and ``load_surplus`` should remember their results.

    Attributes:
        folder: of the cache.
        identify: fingerprint of everything that turns a prompt into its condition.
        load: the text encoders; None once they were dropped.
        load_surplus: the tokenizers, which say how many tokens at the end of a prompt are not read.
        load_words: the first tokenizer, which says which tokens belong to which word.
        told: prompts that are cut and of which the user knows.
        kept: what the folder could not take, such as of a home that is read-only; it outlives the text encoders.
    """

    folder: Path
    identify: Callable[[], str]
    load: Callable[[], Encode] | None
    load_surplus: Callable[[], Callable[[str], int]] = lambda: lambda prompt: 0
    load_words: Callable[[], Callable[[str], Words]] | None = None
    told: set[str] = field(default_factory=set, repr=False, compare=False)
    kept: dict[Path, Entry] = field(default_factory=dict, repr=False, compare=False)
    _loaded: list[Encode] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Return the conditions of n prompts, batch n, on the CPU.

        Warns in one line of prompts that are longer than what the text encoders read, of each once. Raises
        ``ValueError`` for anything but a non-empty list of strings, for a prompt that is not in the cache after
        the text encoders were dropped, and for embeddings that are not finite.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a non-empty list of strings; got {prompts!r}.")
        entries = TensorCache(self.folder, self.identify()).fetch(prompts, self._encode, BATCH, self.kept)
        known = dict(zip(prompts, entries, strict=True))
        cut = {prompt: int(entry.get(CUT, 0)) for prompt, entry in known.items() if prompt not in self.told}
        if long := [prompt for prompt, number in cut.items() if number]:
            warnings.warn(
                f"{len(long)} of {len(known)} prompts are too long and cut, such as {long[0][:80]!r} by its last "
                f"{cut[long[0]]} tokens.", stacklevel=2,
            )  # fmt: skip
        self.told.update(long)
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0] if name != CUT}

    def num_cut(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens at the end of each prompt the text encoders do not read, without loading them."""
        surplus = self.load_surplus()
        cuts = {prompt: surplus(prompt) for prompt in dict.fromkeys(prompts)}
        return [cuts[prompt] for prompt in prompts]

    def words(self, prompt: str) -> Words:
        """Return the words of a prompt with their tokens.

        Raises ``ValueError`` for an encoder that cannot tell.
        """
        if self.load_words is None:
            raise ValueError("this text encoder does not say which tokens belong to which word of a prompt.")
        return self.load_words()(prompt)

    def encode(self, prompts: Sequence[str]) -> None:
        """Put prompts into the cache, a few at a time: the conditions of a long list need not fit into memory."""
        cache, unique = TensorCache(self.folder, self.identify()), list(dict.fromkeys(prompts))
        with Progress("prompts encoded", len(unique), unit="prompt") as bar:
            for start in range(0, len(unique), BATCH):
                part = unique[start : start + BATCH]
                cache.fetch(part, self._encode, BATCH, self.kept)
                bar.update(len(part))

    def usable(self, prompts: Sequence[str], long_prompts: LongPrompts, source: str) -> list[int]:
        """Return numbers of the prompts to use; none is encoded. One line on stderr names what is skipped or cut.

        Args:
            prompts: as they were read.
            long_prompts: what to do about those that the text encoders cannot read whole.
            source: of the prompts, for messages.

        Raises:
            ValueError: under "stop", and where none is left.
        """
        cut = self.num_cut(prompts)
        long = [number for number, tokens in enumerate(cut) if tokens]
        if not long:
            return list(range(len(cut)))
        first = (
            f"{len(long)} of {len(cut)} prompts of {source} are longer than the text encoders read, such as "
            f"{prompts[long[0]][:80]!r} by {cut[long[0]]} tokens"
        )
        kept = (
            list(range(len(cut))) if long_prompts == "cut" else [i for i, tokens in enumerate(cut) if not tokens]
        )
        if long_prompts == "stop" or not kept:
            fix = "Shorten them, or pass --long-prompts cut" + (" or skip." if kept else "; none is left to use.")
            raise ValueError(f"{first}. {fix}")
        self.told.update(prompts[number] for number in long)
        warn(f"{first}: {'cut' if long_prompts == 'cut' else 'skipped'}")
        return kept

    def free(self) -> None:
        """Let go of the text encoders until a prompt has to be encoded again."""
        self._loaded.clear()

    def dropped(self) -> "PromptEncoder":
        """Return the same without text encoders: it knows the prompts in the cache only."""
        return replace(self, load=None)

    @torch.no_grad()
    def _encode(self, contents: list[Content]) -> list[dict[str, Tensor]]:
        prompts = cast(list[str], contents)
        if self.load is None:
            raise ValueError(
                f"the text encoders were dropped, and the cache {self.folder} lacks {len(prompts)} of the "
                f"prompts, such as {prompts[0]!r}. Encode all prompts, the negative one too, before dropping them."
            )
        if not self._loaded:
            self._loaded.append(self.load())
        encode, disabled = self._loaded[0], logging.root.manager.disable
        logging.disable(logging.WARNING)  # what is cut is told in one line, not by every library for every batch
        try:
            cond = encode(prompts)
        finally:
            logging.disable(disabled)
        for name, value in cond.items():
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"the text encoders returned NaN or infinity ({name} in {value.dtype}) for a prompt of "
                    f"{prompts}; expected finite numbers. Load the model with dtype torch.bfloat16 or float32."
                )
        surplus = self.load_surplus()
        cuts = [{CUT: torch.tensor(surplus(prompt))} for prompt in prompts]
        return [{**{name: value[row] for name, value in cond.items()}, **cuts[row]} for row in range(len(prompts))]


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


def share_prompts(texts: PromptEncoder, prompts: Sequence[str], *, rank: int = 0, num_ranks: int = 1) -> int:
    """Encode all prompts that are not in the cache, with the other ranks; the number that this one encoded.

    No text encoder is needed afterwards: ``Teacher.without_text_encoders`` frees them.
    """
    cache = TensorCache(texts.folder, texts.identify())
    return share_work(
        sorted(set(prompts)), done=cache.holds, do=texts, rank=rank,
        num_ranks=num_ranks, name="prompts encoded",
    )  # fmt: skip


def told_size(cond: Cond, size: tuple[int, int]) -> Cond:
    """Return the conditions for pictures of another height and width; the same where a model is not told of it."""
    if "time_ids" not in cond:
        return cond
    return {**cond, "time_ids": size_ids(size).to(cond["time_ids"]).expand_as(cond["time_ids"])}


def size_ids(size: tuple[int, int]) -> Tensor:
    """Return (1, 6): original size, crop offset and target size, as SDXL is told them (arXiv 2307.01952, 2.2)."""
    return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
