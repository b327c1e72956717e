"""Which words of two prompts belong together, and what that means for their tokens.

Words that the prompts share map to each other. Where a run of words took the place of one of the same length, they
map word by word ("an orange mug" -> "a red mug"); words that were added keep their own attention. Together this is
what the paper calls swap and refinement (Hertz et al. 2022, arXiv 2208.01626).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from jaxtyping import Float
from torch import Tensor

from scorefield.models.prompts import Words


@dataclass(frozen=True, eq=False)
class Alignment:
    """Attention of a target's tokens, by those of the source: M = (M_source mapper + M_target keep) weight.

    Attributes:
        mapper: (source tokens, target tokens).
        keep: (target tokens,) 1 where a token keeps its own attention.
        weight: (target tokens,) factors of re-weighting; 1 is none.
        same: whether both prompts are the same words.
    """

    mapper: Float[Tensor, "keys keys"]
    keep: Float[Tensor, " keys"]
    weight: Float[Tensor, " keys"]
    same: bool = False

    @property
    def is_identity(self) -> bool:
        """Return whether the target is the source, so that nothing has to be done to it."""
        return self.same and bool((self.weight == 1).all())


def pairs_of(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Return the numbers of words that belong together.

    >>> pairs_of("an orange mug".split(), "a red mug".split())
    [(0, 0), (1, 1), (2, 2)]
    >>> pairs_of("a red mug".split(), "a red mug on ice".split())
    [(0, 0), (1, 1), (2, 2)]
    """
    matcher = SequenceMatcher(None, source, target, autojunk=False)
    return [
        (i, j)
        for _, i1, i2, j1, j2 in matcher.get_opcodes()
        if i2 - i1 == j2 - j1
        for i, j in zip(range(i1, i2), range(j1, j2), strict=True)
    ]


def align(source: Words, target: Words, weights: Mapping[str, float] | None = None) -> Alignment:
    """Return how a target's attention follows from a source's.

    Words of several tokens share their attention: each of a target's n tokens takes 1 / n of the sum over the
    source's, as in google/prompt-to-prompt. Start and end map to each other, padding to itself.

    Args:
        source: words and tokens of the source prompt.
        target: those of the target prompt.
        weights: factors of words of the target, such as {"red": 2.0}; in the paper they lie in [-2, 2].

    Raises:
        ValueError: a word that the target does not have.
    """
    mapper = torch.zeros(source.length, target.length)
    for i, j in pairs_of(source.words, target.words):
        ours, theirs = source.tokens[i], target.tokens[j]
        if len(ours) == len(theirs):
            mapper[list(ours), list(theirs)] = 1.0
        else:
            mapper[torch.tensor(ours)[:, None], torch.tensor(theirs)] = 1 / len(theirs)
    mapper[0, 0] = 1.0 if 0 not in sum(target.tokens, ()) else mapper[0, 0]
    if source.end is not None and target.end is not None:
        mapper[source.end, target.end] = 1.0
        for padding in range(max(source.end, target.end) + 1, min(source.length, target.length)):
            mapper[padding, padding] = 1.0
    weight = torch.ones(target.length)
    for word, factor in (weights or {}).items():
        weight[tokens_of(target, word)] = factor
    return Alignment(mapper, (mapper.sum(0) == 0).float(), weight, source == target)


def tokens_of(words: Words, word: str) -> list[int]:
    """Return the tokens of a word, or of a phrase, wherever the prompt has it.

    "t-shirt" is a phrase, too: a tokenizer reads it as three words.

    Raises ``ValueError`` for what the prompt does not have.
    """
    phrase = "".join(word.lower().split())
    found = [run for start in range(len(words.words)) if phrase and (run := _run(words.words, start, phrase))]
    if not found:
        raise ValueError(f"the prompt has no word {word!r}; it has {', '.join(words.words)}.")
    return sorted({token for run in found for at in run for token in words.tokens[at]})


def _run(words: Sequence[str], start: int, phrase: str) -> range:
    """Return the numbers of the words from ``start`` on that spell the phrase; none if they do not."""
    spelt = ""
    for stop, word in enumerate(words[start:], start + 1):
        spelt += word
        if spelt == phrase:
            return range(start, stop)
        if not phrase.startswith(spelt):
            break
    return range(0)
