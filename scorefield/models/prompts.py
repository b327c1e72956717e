"""Prompts as conditions: each is encoded once, kept on disk, and needs no text encoder afterwards."""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from scorefield.cache import Content, Entry, TensorCache
from scorefield.choices import LongPrompts as LongPrompts
from scorefield.denoiser import Cond
from scorefield.files import warn
from scorefield.progress import Progress

Encode = Callable[[list[str]], Cond]
"""n prompts -> conditions of batch n, on any device."""

CUT = "num_tokens_cut"
"""Name, in entries of the cache, of the number of tokens at the end of a prompt that were not read."""

BATCH = 16
"""Prompts that are encoded at a time."""


def default_cache_folder() -> Path:
    """Where prompts are kept unless a folder is named: ``~/.cache/scorefield/prompts``, or in $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scorefield" / "prompts"


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
        told: prompts that are cut and of which the user knows.
        kept: what the folder could not take, such as of a home that is read-only; it outlives the text encoders.
    """

    folder: Path
    identify: Callable[[], str]
    load: Callable[[], Encode] | None
    load_surplus: Callable[[], Callable[[str], int]] = lambda: lambda prompt: 0
    told: set[str] = field(default_factory=set, repr=False, compare=False)
    kept: dict[Path, Entry] = field(default_factory=dict, repr=False, compare=False)
    _loaded: list[Encode] = field(default_factory=list, init=False, repr=False, compare=False)

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """The conditions of n prompts, batch n, on the CPU.

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
        """How many tokens at the end of each prompt the text encoders do not read; none of them is loaded."""
        surplus = self.load_surplus()
        cuts = {prompt: surplus(prompt) for prompt in dict.fromkeys(prompts)}
        return [cuts[prompt] for prompt in prompts]

    def encode(self, prompts: Sequence[str]) -> None:
        """Put prompts into the cache, a few at a time: the conditions of a long list need not fit into memory."""
        cache, unique = TensorCache(self.folder, self.identify()), list(dict.fromkeys(prompts))
        with Progress("prompts encoded", len(unique), unit="prompt") as bar:
            for start in range(0, len(unique), BATCH):
                part = unique[start : start + BATCH]
                cache.fetch(part, self._encode, BATCH, self.kept)
                bar.update(len(part))

    def fitting(self, prompts: Sequence[str], long_prompts: LongPrompts, source: str) -> list[int]:
        """Numbers of the prompts to use; none is encoded. One line on stderr names what is skipped or cut.

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
        """The same without text encoders: it knows the prompts in the cache only."""
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
