"""Prompts as conditions: each is encoded once, kept on disk, and needs no text encoder afterwards."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from score.cache import Content, TensorCache
from score.denoiser import Cond

Encode = Callable[[list[str]], Cond]
"""n prompts -> conditions of batch n, on any device."""


def default_cache_folder() -> Path:
    """Where prompts are kept unless a folder is named: ``~/.cache/scorefield/prompts``, or in $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scorefield" / "prompts"


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """Text encoders behind a cache on disk.

    Both functions are called when they are first needed, and should remember their result: a run whose prompts are
    all in the cache never loads a text encoder.

    Attributes:
        folder: of the cache.
        identify: fingerprint of everything that turns a prompt into its condition.
        load: the text encoders; None once they were dropped.
    """

    folder: Path
    identify: Callable[[], str]
    load: Callable[[], Encode] | None

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """The conditions of n prompts, batch n, on the CPU.

        Raises ``ValueError`` for anything but a non-empty list of strings, and for a prompt that is not in the
        cache after the text encoders were dropped.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a non-empty list of strings; got {prompts!r}.")
        entries = TensorCache(self.folder, self.identify()).fetch(prompts, self._encode)
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}

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
        cond = self.load()(prompts)
        return [{name: value[row] for name, value in cond.items()} for row in range(len(prompts))]
