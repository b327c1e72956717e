"""What to do when a scene goes wrong: say so, go back to the last good state, and go on more carefully.

A score's gradient does not stop a scene from thinning out to nothing, from filling its cube up to the cameras, or
from becoming nan. :func:`check_opacity` sees the first two, ``score.training.train`` the third; both raise before
the bad state becomes a checkpoint. :func:`roll_back` loads the newest checkpoint, lowers the learning rates, and
writes that down in the checkpoint: a run that is killed after a rollback resumes as if it had not been.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from score import checkpoint
from score.randomness import derived_generator
from score.training import Phase

EMPTY, FULL = 0.003, 0.97
"""Mean opacity of the views of a step below and above which a scene is lost."""

ROLLBACKS = "rollbacks"
"""Entry of an optimizer's first group that counts them; checkpoints hold it with the optimizer."""


class LostSceneError(FloatingPointError):
    """A scene that shows nothing, or nothing but itself."""


def check_opacity(opacity: float, step: int) -> None:
    """Raise :class:`LostSceneError` for a mean opacity, over all pixels of a step, that no good scene has."""
    if not EMPTY <= opacity <= FULL:
        what = "empty" if opacity < EMPTY else "full"
        raise LostSceneError(
            f"the scene is {what} in step {step}: its mean opacity is {opacity:.4f}, expected between {EMPTY} and "
            f"{FULL}. Lower the learning rate, or the weight of the "
            f"{'opacity and entropy penalties' if what == 'empty' else 'score, by --guidance'}."
        )


def num_rollbacks(optimizer: Optimizer) -> int:
    """How often a run has gone back, this and all earlier times it was started."""
    return int(optimizer.param_groups[0].get(ROLLBACKS, 0))


def roll_back(
    folder: Path, phases: Sequence[Phase], own: Mapping[str, Any], *, factor: float = 0.5, write: bool = True
) -> int:
    """Restore the newest checkpoint, multiply all learning rates by ``factor``, and return the step to go on from.

    Args:
        folder: of the checkpoints; the caller has saved one at step 0.
        phases: as passed to ``train``; the optimizer of the first counts.
        own: the run's config, as for ``checkpoint.load``.
        factor: in (0, 1).
        write: whether this process writes the checkpoint; one of several.

    Raises:
        ValueError: factor outside (0, 1), or no checkpoint to go back to.
    """
    if not 0 < factor < 1:
        raise ValueError(f"factor must lie in (0, 1); got {factor}.")
    if not any(folder.glob("step-*")):
        raise ValueError(f"{folder} holds no checkpoint to go back to; save one at step 0.")
    step = checkpoint.load(folder, phases, own)
    phases[0].optimizer.param_groups[0][ROLLBACKS] = num_rollbacks(phases[0].optimizer) + 1
    for phase in phases:
        _lower(phase, factor)
    if write:
        checkpoint.save(folder, step, phases, own)
    return step


def seed_after(seed: int, rollbacks: int) -> int:
    """The seed to go on with: other cameras and noises than those that led astray."""
    return seed if rollbacks == 0 else derived_generator("rollback", seed, rollbacks).initial_seed()


def _lower(phase: Phase, factor: float) -> None:
    for group in phase.optimizer.param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    if phase.lr_schedule is not None:
        phase.lr_schedule.base_lrs = [rate * factor for rate in phase.lr_schedule.base_lrs]
