"""Prompts as conditions: each is encoded once, kept on disk, and needs no text encoder afterwards."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from scorefield.cache import Content, TensorCache
from scorefield.denoiser import Cond

Encode = Callable[[list[str]], Cond]
"""n prompts -> conditions of batch n, on any device; with CUT among them, prompts that are cut get a warning."""

CUT = "num_tokens_cut"
"""Name of the (n,) integers that say how many tokens at the end of each prompt were not read."""

BATCH = 16
"""Prompts that are encoded at a time."""


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

        Warns of prompts that are longer than what the text encoders read. Raises ``ValueError`` for anything but a
        non-empty list of strings, for a prompt that is not in the cache after the text encoders were dropped, and
        for embeddings that are not finite.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a non-empty list of strings; got {prompts!r}.")
        entries = TensorCache(self.folder, self.identify()).fetch(prompts, self._encode)
        for prompt, entry in dict(zip(prompts, entries, strict=True)).items():
            if cut := int(entry.get(CUT, 0)):
                warnings.warn(f"the prompt {prompt!r} is too long: its last {cut} tokens are cut.", stacklevel=3)
        return {name: torch.stack([entry[name] for entry in entries]) for name in entries[0] if name != CUT}

    def num_cut(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens at the end of each prompt the text encoders do not read; encodes what is new.

        Only the numbers are kept: the conditions of a long list need not fit into memory. Of what is in the cache
        only the numbers are read.
        """
        cache = TensorCache(self.folder, self.identify())
        known = {prompt: cache.load_tensor(prompt, CUT) for prompt in dict.fromkeys(prompts)}
        new = [prompt for prompt, cut in known.items() if cut is None]
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            entries = cache.fetch(part, self._encode, BATCH)
            known |= {prompt: entry.get(CUT) for prompt, entry in zip(part, entries, strict=True)}
        return [max(0, int(known[prompt] or 0)) for prompt in prompts]

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
        for name, value in cond.items():
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"the text encoders returned NaN or infinity ({name} in {value.dtype}) for a prompt of "
                    f"{prompts}; expected finite numbers. Load the model with dtype torch.bfloat16 or float32."
                )
        return [{name: value[row] for name, value in cond.items()} for row in range(len(prompts))]
