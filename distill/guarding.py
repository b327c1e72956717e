"""A distillation under a guard: the best weights are kept, and a student that drifts goes back to them.

What the guard has seen is written into the first group of the student's optimizer, so that checkpoints hold it and
a run that is killed after a setback resumes as if it had not been.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from distill.guard import Guard, Look, as_record, difference, from_record, is_worse
from distill.student import Student
from scorefield.training import checkpoint
from scorefield.training.loop import Phase
from scorefield.training.report import log
from scorefield.training.run import in_pieces, save

BEST, SETBACKS, ENDED = "best", "setbacks", "ended"


class SetbackError(Exception):
    """The student is further from its teacher than it was."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True, kw_only=True, eq=False)
class Guarded:
    """What a run does at every ``every``-th step: look, remember the best, raise where the student drifts.

    Attributes:
        guard: of the teacher.
        student: the weights that will be saved.
        phases: the student's first.
        accelerator: the first rank looks, all of them learn what it saw.
        every: iterations between two looks.
        steps: the last iteration, at which there is a look in any case.
        max_setbacks: after so many the next one ends the run.
        goes_back: False for a student that gets worse on its way to being better: its best weights are kept all
            the same.
    """

    guard: Guard
    student: Student
    phases: Sequence[Phase]
    accelerator: Accelerator
    every: int
    steps: int
    max_setbacks: int
    goes_back: bool = True

    def __call__(self, step: int) -> tuple[int, ...]:
        """Steps whose checkpoints must stay: the best one. Raises :class:`SetbackError`."""
        best = self.best
        if step % self.every and step != self.steps:
            return () if best is None else (best[0],)
        look = self.look()
        self.log(step, look)
        if best is None or look.distance < best[1].distance:
            self._notes[BEST] = as_record(look, step)
            return (step,)
        if self.goes_back and is_worse(look, best[1]):
            gap, error = difference(look, best[1])
            raise SetbackError(
                step,
                f"step {step}: the student is {look.distance:.4g} from its teacher, {gap:.2g} (+- {error:.1g}) "
                f"more than at step {best[0]}",
            )
        return (best[0],)

    def look(self) -> Look:
        """Return the student as it is now, seen by the first rank; networks in pieces need all of them."""
        seen: list[Any] = [None]
        if self.accelerator.is_main_process or in_pieces(self.phases):
            with self.accelerator.autocast():
                seen = [as_record(self.guard.look(self.student), 0)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(seen)
        return from_record(seen[0])

    def log(self, step: int, look: Look) -> None:
        """Curves of the guard, for TensorBoard."""
        log(self.accelerator, step, look.figures() | {"guard/setbacks": self.setbacks})

    @property
    def best(self) -> tuple[int, Look] | None:
        """Step and look of the best weights so far."""
        record = self._notes.get(BEST)
        return None if record is None else (int(record["step"]), from_record(record))

    @property
    def setbacks(self) -> int:
        """Return how often the run went back, this and all earlier times it was started."""
        return int(self._notes.get(SETBACKS, 0))

    @property
    def ended(self) -> bool:
        """Return True for a run that gave up before its last step, unless --max-setbacks is larger now."""
        return bool(self._notes.get(ENDED, False)) and self.setbacks >= self.max_setbacks

    @property
    def _notes(self) -> dict[str, Any]:
        return self.phases[0].optimizer.param_groups[0]

    def go_back(self, folder: Path, own: Any, error: SetbackError) -> None:
        """Restore the best weights and go on from this step with half the rates. Says so."""
        self.restore(folder, own)
        self._notes[SETBACKS] = self.setbacks + 1
        for phase in self.phases:
            _halve(phase)
        self._say(f"{error}; back to the weights of step {self._best_step} at half the learning rates")

    def end(self, folder: Path, own: Any, step: int, error: SetbackError) -> None:
        """Restore the best weights and note that the run is over. Says so."""
        self.restore(folder, own)
        self._notes[ENDED] = True
        save(folder, step, self.phases, own, self.accelerator, also=(self._best_step,))
        self.accelerator.wait_for_everyone()
        self._say(f"{error}; after {self.setbacks} setbacks before it, the run ends here")

    def restore(self, folder: Path, own: Any) -> None:
        """Load the weights and optimizers of the best step; rates, and what the guard has seen, stay.

        Raises ``ValueError`` where its checkpoint is gone.
        """
        notes = {name: self._notes[name] for name in (BEST, SETBACKS, ENDED) if name in self._notes}
        rates = [_rates(phase) for phase in self.phases]
        self.accelerator.wait_for_everyone()  # until the first rank has written what all of them read
        step = checkpoint.load(folder, self.phases, own, before=self._best_step + 1)
        if step != self._best_step:
            raise ValueError(
                f"{folder} holds no checkpoint of step {self._best_step}, the best one; someone removed or "
                "changed it. Start again with another --out."
            )
        self._notes.update(notes)
        for phase, (groups, schedule) in zip(self.phases, rates, strict=True):
            for group, own_rates in zip(phase.optimizer.param_groups, groups, strict=True):
                group.update(own_rates)
            if phase.lr_schedule is not None:
                phase.lr_schedule.load_state_dict(schedule)

    @property
    def _best_step(self) -> int:
        return int(self._notes[BEST]["step"])

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)


def _rates(phase: Phase) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    names = ("lr", "initial_lr")
    groups = [{name: group[name] for name in names if name in group} for group in phase.optimizer.param_groups]
    return groups, {} if phase.lr_schedule is None else dict(phase.lr_schedule.state_dict())


def _halve(phase: Phase) -> None:
    for group in phase.optimizer.param_groups:
        group.update({name: group[name] / 2 for name in ("lr", "initial_lr") if name in group})
    if phase.lr_schedule is not None:
        phase.lr_schedule.base_lrs = [rate / 2 for rate in phase.lr_schedule.base_lrs]


def set_rate(phase: Phase, rate: float) -> None:
    """Let the phase's schedule peak at ``rate``; before its first update only."""
    for group in phase.optimizer.param_groups:
        group["initial_lr"] = rate
    if phase.lr_schedule is not None:
        factor = phase.lr_schedule.lr_lambdas[0](0)  # type: ignore[attr-defined]
        phase.lr_schedule.base_lrs = [rate for _ in phase.lr_schedule.base_lrs]
        phase.optimizer.param_groups[0]["lr"] = rate * factor
