"""Which mistake would explain a teacher's errors: its declared reading against all others, on the same noise."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from scorefield.denoiser import Cond, Denoiser, NetworkDenoiser
from scorefield.diagnosis.baselines import best_without_network
from scorefield.diagnosis.mistakes import Mistake, mistakes, more_scales
from scorefield.diagnosis.own_samples import most_consistent
from scorefield.diagnosis.readings import Output, Reading, declared
from scorefield.diagnosis.symptoms import Finding
from scorefield.diagnosis.trials import (
    Difference,
    Errors,
    Trial,
    answers,
    best_of,
    difference,
    errors,
    levels_of,
    make_trial,
    tried,
)
from scorefield.schedule import Images

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Noise levels sigma / alpha, in standard deviations of the data."""

SCREEN = 4
"""Every mistake is tried on a fourth of the images first."""

GROSS, SMALL = 0.7, 0.1
"""Differences of log error: a factor of two stops a run, a tenth is worth a warning."""

SILENCE = 1.5
"""Times the error of an output of zeros that no trained network's own output has on its own samples."""

TWO_MISTAKES = 0.2
"""What a second mistake must explain on top of the first."""

MEANINGS = {
    "x0": "x0", "eps": "eps", "v": "v = alpha eps - sigma x0", "flow": "the flow eps - x0",
    "score": "the score -eps / sigma",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One noise level: mean squared errors of x0, and what the teacher's x0 look like."""

    ratio: float
    t: float
    teacher: float
    constant: float
    linear: float
    blurred: float
    mean: float
    std: float
    low: float
    high: float


class Counted:
    """A network whose calls are counted."""

    def __init__(self, network: Callable[..., Any]) -> None:
        self.network = network
        self.calls = 0

    def __call__(self, *args: Any, **cond: Tensor) -> Any:
        """Return the network's answer."""
        self.calls += 1
        return self.network(*args, **cond)


@dataclass(frozen=True, eq=False)
class _Explanation:
    mistake: Mistake
    output: Output
    gain: Difference  # against the declared reading
    lead: Difference  # against the best linear denoiser
    score: float  # of the gain, less what a second mistake costs

    @property
    def holds(self) -> bool:
        """Clearly better than the declared reading, and than any linear filter."""
        return self.gain.mean < -SMALL and self.gain.better and self.lead.mean < -0.02


@dataclass(frozen=True, eq=False)
class Asked:
    """The declared reading with its errors, and those of the denoisers that need no network."""

    base: Reading
    output: Output
    time_scale: float
    trial: Trial
    x0: Tensor
    errors: Errors
    rivals: tuple[Mapping[str, Tensor], ...]
    silent: Errors | None
    own: bool
    counted: Counted
    generator: Generator

    @classmethod
    def about(
        cls, denoiser: Denoiser, images: Images, cond: Cond, generator: Generator, batch_size: int, *, own: bool
    ) -> "Asked":
        """Ask ``denoiser`` about ``images`` under its declared reading, at five noise levels."""
        base, output = declared(denoiser)
        counted = Counted(base.network)
        base = replace(base, network=counted)
        ratios = levels_of(base.schedule, LEVELS, float(images.double().std()) + 1e-6)
        trial = make_trial(images, cond, ratios, generator, batch_size)
        x0 = answers(base, trial)[output]
        error = (x0 - images).double().flatten(2).square().mean(2)
        rivals = tuple(
            best_without_network(images, noise, float(r)) for noise, r in zip(trial.noise, ratios, strict=True)
        )
        known = isinstance(denoiser, NetworkDenoiser)
        scale = denoiser.time_scale if isinstance(denoiser, NetworkDenoiser) else 1.0
        # What an output of zeros costs says nothing where x0 is all that is known of a denoiser.
        silent = errors(replace(base, network=_silence), trial)[output] if own and known else None
        error = torch.where(error.isfinite(), error, torch.inf)
        return cls(base, output, scale, trial, x0, error, rivals, silent, own, counted, generator)

    @property
    def middle(self) -> list[int]:
        """The levels at which a teacher earns its keep: lower ones any filter solves, higher ones nobody."""
        std = float(self.trial.x0.double().std()) + 1e-12
        found = [i for i, ratio in enumerate(self.trial.ratios.tolist()) if 0.2 < ratio / std < 5]
        return found or list(range(len(self.trial.ratios)))

    @property
    def middle_trial(self) -> Trial:
        """All images at those levels."""
        return self.trial.part(len(self.trial.x0), self.middle)

    @property
    def linear(self) -> Errors:
        """Return the errors of the better of the linear filter and a blur."""
        return torch.stack([torch.minimum(r["linear"], r["blurred"]).double() for r in self.rivals])

    @property
    def useless(self) -> bool:
        """Worse than the best filter at every middle level."""
        leads = [difference(self.errors[[i]], self.linear[[i]], self.trial.floor) for i in self.middle]
        return all(lead.mean > 0.02 and (lead.worse or lead.mean > 0.3) for lead in leads)

    @property
    def worse_than_silence(self) -> list[int]:
        """The levels at which an output of zeros would do far better on own samples.

        A wrong reading draws images that it knows at some level, often so alike that a filter is no better there.
        At others it misses the target of its own output by more than the target's size. No trained network does,
        however vague: an eps network's x0 at high noise, say, is far off when its eps is nearly right.
        """
        if self.silent is None:
            return []
        excess = [difference(self.errors[[i]], SILENCE * self.silent[[i]], 1e-12) for i in range(len(self.silent))]
        return [i for i, one in enumerate(excess) if one.worse or one.mean == math.inf]

    def named(self) -> list[Finding]:
        """Return the mistake that explains the errors best, or that this teacher does not denoise, or nothing."""
        own_kind = Mistake("kind", "", "", self.base)
        found = self._tried([own_kind, *mistakes(self.base, self.trial.x0, self.time_scale)])
        useless = self.useless or bool(self.worse_than_silence)
        if useless and not any(one.holds for one in found):
            found += self._tried(more_scales(self.base, self.trial.x0))
        good = sorted((one for one in found if one.holds), key=lambda one: one.score)
        if good:
            severity = "error" if useless or good[0].gain.mean < -GROSS else "warning"
            return [Finding(good[0].mistake.name, severity, self._message(good[0]))]  # type: ignore[arg-type]
        return self._useless() if useless else []

    def _useless(self) -> list[Finding]:
        found = self.from_samples() if self.own else []
        return found or [Finding("does_not_denoise", "error", self._useless_message())]

    def from_samples(self) -> list[Finding]:
        """Return the reading that knows its own samples best, if one does: all that there is to go by without
        data.
        """
        few = self.trial.part(8, self.middle)
        candidates = mistakes(self.base, few.noise[0] / 2, self.time_scale)
        found = most_consistent(
            self.base, self.output, candidates, few.noise[0], few.cond, self.generator, few.batch_size
        )
        if found is None:
            return []
        what, fix = self._correction(*found)
        message = f"it draws no pictures that it knows, but may if {what}. {fix} Only data would tell for certain."
        return [Finding(found[0].name, "error", message)]

    def _tried(self, candidates: Iterable[Mistake]) -> list[_Explanation]:
        # Screened on a few images first; the best few are asked about all of them.
        few = max(min(4, len(self.trial.x0)), len(self.trial.x0) // SCREEN)
        part, own = self.trial.part(few, self.middle), self.errors[self.middle, :few]
        kept: list[tuple[float, Mistake, Output]] = []
        for mistake in candidates:
            for output, gain in best_of(tried(mistake.reading, part), own, part.floor)[:2]:
                kept.append((gain.mean + self._cost(mistake, output), mistake, output))
        kept = sorted((one for one in kept if one[0] < -SMALL / 2), key=lambda one: one[0])
        return [self._confirmed(mistake, output) for _, mistake, output in kept[:4]]

    def _cost(self, mistake: Mistake, output: Output) -> float:
        return TWO_MISTAKES if self._is_double(mistake, output) else 0.0

    def _is_double(self, mistake: Mistake, output: Output) -> bool:
        other = mistake.reading is not self.base and output != self.output
        return other and mistake.reading.sigma_data is None

    def _confirmed(self, mistake: Mistake, output: Output) -> _Explanation:
        error = tried(mistake.reading, self.middle_trial)[output]
        gain = difference(error, self.errors[self.middle], self.trial.floor)
        lead = difference(error, self.linear[self.middle], self.trial.floor)
        return _Explanation(mistake, output, gain, lead, gain.mean + self._cost(mistake, output))

    def _message(self, one: _Explanation) -> str:
        what, fix = self._correction(one.mistake, one.output)
        on = "its own samples" if self.own else "the data"
        return f"its error of x0 on {on} is {math.exp(-one.gain.mean):.3g} times smaller if {what}. {fix}"

    def _correction(self, mistake: Mistake, output: Output) -> tuple[str, str]:
        kind, sign = output
        read = f"its output is read as {'minus ' if sign < 0 else ''}{MEANINGS[kind]}"
        if mistake.reading is self.base:
            return read, _kind_fix(output)
        if self._is_double(mistake, output):
            return f"{mistake.words}, and {read}", f"{mistake.fix} {_kind_fix(output)}"
        return mistake.words, mistake.fix

    def _useless_message(self) -> str:
        if not self.useless:
            return self._silence_message()
        rows = [row for i, row in enumerate(self.rows()) if i in self.middle]
        table = "; ".join(
            f"{row.teacher:.3g} / {min(row.linear, row.blurred):.3g} at {row.ratio:.2g}" for row in rows
        )
        on = "its own samples" if self.own else "the data"
        return (
            f"this teacher does not denoise. Its error of x0 on {on} / that of the best linear filter, by sigma / "
            f"alpha: {table}; expected less than the filter's. Are its weights loaded, and does it know such data?"
        )

    def _silence_message(self) -> str:
        assert self.silent is not None
        levels = self.worse_than_silence
        times = (self.errors[levels].mean(1) / self.silent[levels].mean(1)).tolist()
        table = "; ".join(
            f"{times:.3g} at {float(self.trial.ratios[i]):.2g}" for times, i in zip(times, levels, strict=True)
        )
        return (
            "this teacher does not denoise its own samples. Its error of x0 / that of an output of zeros, by "
            f"sigma / alpha: {table}; expected below 1. Are kind and schedule those of its training?"
        )

    def rows(self) -> tuple[Row, ...]:
        """Return the table."""
        found = []
        for i, ratio in enumerate(self.trial.ratios):
            x0, rivals = self.x0[i], {name: float(error.mean()) for name, error in self.rivals[i].items()}
            look = (float(x0.mean()), float(x0.std()), float(x0.min()), float(x0.max()))
            t, error = float(self.base.schedule.time(ratio)), float(self.errors[i].mean())
            found.append(
                Row(float(ratio), t, error, rivals["constant"], rivals["linear"], rivals["blurred"], *look)
            )
        return tuple(found)


def _silence(x: Tensor, *args: Any, **cond: Tensor) -> Tensor:
    return torch.zeros_like(x)


def _kind_fix(output: Output) -> str:
    kind, sign = output
    if kind == "score":
        return f'Return {"-" if sign > 0 else ""}sigma times its output from the wrapper, with kind="eps".'
    return f'Pass kind="{kind}"{" and turn the sign of its output" if sign < 0 else ""}.'
