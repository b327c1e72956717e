"""From figures to an event: control was learned at this step, or it was not, and this is the likely reason."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from controlnet.evidence import BoundedScore, Gap
from scorefield.atomic import whole_file


@dataclass(frozen=True)
class Evidence:
    """One look at a training.

    Attributes:
        step: updates done.
        gap: the paired loss gap.
        standings: scores by name; the first is the one to watch.
    """

    step: int
    gap: Gap
    bounded_scores: Mapping[str, BoundedScore]

    @property
    def relative(self) -> float:
        """The watched score, 0 at its floor and 1 at its ceiling."""
        return next(iter(self.bounded_scores.values())).relative

    def shows(self, threshold: float = 0.5) -> bool:
        """Return whether samples obey, ``threshold`` of the way to the ceiling, and the loss uses the hint."""
        return self.relative >= threshold and self.gap.significant

    def figures(self) -> dict[str, float]:
        """Scalars to log."""
        gap = {"gap": self.gap.value, "gap_error": self.gap.error, "residual_rms": self.gap.residual_rms}
        scores = {
            f"{name}{suffix}": value
            for name, bounded in self.bounded_scores.items()
            for suffix, value in (
                ("", bounded.value), ("_floor", bounded.floor), ("_ceiling", bounded.ceiling),
                ("_relative", bounded.relative),
            )
        }  # fmt: skip
        return {f"control/{name}": value for name, value in {**gap, **scores}.items()}


def learned_at(history: Sequence[Evidence], threshold: float = 0.5, consecutive: int = 2) -> int | None:
    """Return the step at which control was learned, or None: the first of ``consecutive`` looks that show it.

    ``threshold`` is that of :meth:`Evidence.shows`. A function of the record alone, so a resumed
    run finds the same step. Raises ``ValueError`` for a threshold outside (0, 1] or no look at all.
    """
    if not 0 < threshold <= 1 or consecutive < 1:
        raise ValueError(f"need 0 < threshold <= 1 and consecutive >= 1; got {threshold}, {consecutive}.")
    run: list[int] = []
    for look in history:
        run = [*run, look.step] if look.shows(threshold) else []
        if len(run) == consecutive:
            return run[0]
    return None


def told(history: Sequence[Evidence], consecutive: int = 2) -> str:
    """Return the event in words that go on from "control ", with no verdict where too little was seen."""
    learned = learned_at(history, consecutive=consecutive)
    if learned is not None:
        return f"was learned at step {learned:,}"
    if history and math.isnan(history[-1].relative):
        return (
            f"is undecided: {next(iter(history[-1].bounded_scores))} cannot tell: ceiling and floor are too near"
        )
    if len(history) < consecutive or history[-1].shows():
        return f"is undecided: too few looks to tell ({len(history)})"
    return "was not learned by the criterion"


def likely_causes(look: Evidence, hints: Tensor, *, images_seen: int, usual: int = 12_000) -> list[str]:
    """Why control has not been learned, in words, most basic first; never empty.

    Args:
        look: the latest.
        hints: (n, c, h, w), those of the probe.
        images_seen: by the adapter so far: steps times batch, accumulation and ranks.
        usual: images after which it may be expected; ControlNet took 3,000 to 7,000 updates of 4 images.
    """
    name, bounded = next(iter(look.bounded_scores.items()))
    said = []
    if float((hints - hints[:1]).abs().mean()) < 1e-3:
        said.append("the hints of all samples are nearly alike: look at them, the annotator may see nothing.")
    if math.isnan(bounded.relative):
        said.append(
            f"{name} cannot tell: real images reach {bounded.ceiling:.3f}, hints of other samples "
            f"{bounded.floor:.3f}. Judge by another score, tolerance or annotator."
        )
    if look.gap.residual_rms < 1e-4:
        said.append(
            f"the adapter adds almost nothing (rms {look.gap.residual_rms:.1e}): the learning rate is too low, or "
            "the optimiser does not hold its parameters."
        )
    elif look.gap.significant:
        said.append(
            f"the loss does use the hint (gap {look.gap.value:.2g} +- {look.gap.error:.1g}) but samples show it "
            "too little: go on; try a higher learning rate, more prompt dropout, another guidance scale."
        )
    elif images_seen >= usual:
        said.append(
            "the right hint lowers the loss no more than another's: are hints cropped and flipped with their "
            "images, is hint dropout too high, do prompts already say all that the hint says?"
        )
    if images_seen < usual:
        said.append(
            f"it is early: {images_seen:,} images seen, and control comes suddenly, often only after {usual:,}. "
            "Larger batches (accumulate) bring it in fewer updates."
        )
    return said or ["no single cause stands out: raise the learning rate, or train on."]


@dataclass(frozen=True)
class EvidenceLog:
    """All looks at a run, one JSON line each, so that a resumed run knows what came before.

    Attributes:
        path: of the file; created with the first line.
        validation: what identifies samples, judge and sampler. Looks taken otherwise cannot be compared: they are
            not read, and the next ``append`` removes them.
    """

    path: Path
    validation: str = ""

    def append(self, look: Evidence) -> Self:
        """Write a look; a later one of the same or an earlier step replaces what followed."""
        kept = [*self.read(before=look.step), look]
        lines = "".join(json.dumps({**_as_json(one), "validation": self.validation}) + "\n" for one in kept)
        with whole_file(self.path) as temporary:
            temporary.write_text(lines)
        return self

    def read(self, before: float = math.inf) -> list[Evidence]:
        """Return the looks at steps below ``before``.

        Raises ``ValueError`` for a file that holds anything else.
        """
        if not self.path.is_file():
            return []
        try:
            lines = [json.loads(line) for line in self.path.read_text().splitlines()]
            found = [_from_json(line) for line in lines if line.get("validation", "") == self.validation]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.path} is no record of evidence ({error!r}). Move it away.") from error
        return [look for look in found if look.step < before]


def _as_json(look: Evidence) -> dict[str, Any]:
    bounded_scores = {name: asdict(bounded) for name, bounded in look.bounded_scores.items()}
    return {"step": look.step, "gap": asdict(look.gap), "standings": bounded_scores}


def _from_json(line: Mapping[str, Any]) -> Evidence:
    bounded_scores = {name: BoundedScore(**value) for name, value in line["standings"].items()}
    return Evidence(int(line["step"]), Gap(**line["gap"]), bounded_scores)
