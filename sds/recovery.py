"""What to do when a scene goes wrong: say so, go back to the last good state, and go on more carefully.

A score's gradient does not stop a scene from thinning out to nothing, from filling its cube up to the cameras, or
from becoming nan. :func:`check_opacity` of :func:`opacity_all_round` sees the first two, ``loop.train``
and ``checkpoint.check_finite`` the third; asked in every step that is about to be saved, they raise before
the bad state becomes a checkpoint. :func:`roll_back` loads a checkpoint, lowers the learning rates, and writes
that down in the checkpoint: a run that is killed after a rollback resumes as if it had not been.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from scorefield.randomness import derived_generator
from scorefield.training import checkpoint
from scorefield.training.loop import Phase
from sds.cameras import orbit
from sds.scene import Scene

EMPTY, FULL = 0.003, 0.97
"""Mean opacity of all sides of a cube below and above which the scene in it is lost."""

ROLLBACKS, GONE_BACK_TO = "rollbacks", "gone_back_to"
"""Entries of an optimizer's first group: how often the run went back, and to which step the last time. Checkpoints
hold them with the optimizer."""


class LostSceneError(FloatingPointError):
    """A scene that shows nothing, or nothing but itself."""


@torch.no_grad()
def opacity_all_round(scene: Scene, *, size: int = 32, focal: float = 1.37) -> float:
    """Mean opacity in pictures of the four sides of a scene's cube, each of which just fills its picture.

    Random views of a step cannot tell a scene that is lost from one that is looked at from nearby. Nothing is
    drawn here: the same scene has the same opacity on every rank, and a run is the same with and without.

    Args:
        scene: on any device.
        size: of the pictures in pixels.
        focal: of the cameras, over the height of the picture.
    """
    four = torch.ones(4)
    views = orbit(90 * torch.arange(4.0), 0 * four, scene.field.half_size * (1 + 2 * focal) * four, focal * four)
    return float(scene(views, height=size, width=size, background=torch.zeros(3)).opacity.mean())


def check_opacity(opacity: float, step: int) -> None:
    """Raise :class:`LostSceneError` for a mean opacity that no good scene has from all round."""
    if EMPTY <= opacity <= FULL:
        return
    what, weight = "not finite", ""
    if not math.isnan(opacity):
        what, weight = (
            ("empty", "opacity and entropy penalties") if opacity < EMPTY else ("full", "score, by --guidance")
        )
        weight = f", or the weight of the {weight}"
    raise LostSceneError(
        f"the scene is {what} in step {step}: its mean opacity is {opacity:.4f}, expected between {EMPTY} and "
        f"{FULL}. Lower the learning rate{weight}."
    )


def num_rollbacks(optimizer: Optimizer) -> int:
    """How often a run has gone back, this and all earlier times it was started."""
    return int(optimizer.param_groups[0].get(ROLLBACKS, 0))


def roll_back(
    folder: Path, phases: Sequence[Phase], own: Mapping[str, Any], *, factor: float = 0.5, write: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Restore a checkpoint, multiply all learning rates by ``factor``, and return the step to go on from.

    That is the newest checkpoint; if the run has gone back to it before, so that it is lost again without having
    reached another, the one before, if it is still there. Rates are lowered once for each time the run went back.

    Args:
        folder: of the checkpoints; the caller has saved one at step 0.
        phases: as passed to ``train``; the optimizer of the first counts.
        own: the run's config, as for ``checkpoint.load``.
        factor: in (0, 1).
        write: whether this process writes the checkpoint; one of several.
        wait: returns once all processes have called it: ``Accelerator.wait_for_everyone``.

    Raises:
        ValueError: factor outside (0, 1), or no checkpoint to go back to.
    """
    if not 0 < factor < 1:
        raise ValueError(f"factor must lie in (0, 1); got {factor}.")
    if checkpoint.newest(folder) is None:
        raise ValueError(f"{folder} holds no checkpoint to go back to; save one at step 0.")
    step = checkpoint.load(folder, phases, own)
    count = num_rollbacks(phases[0].optimizer) + 1
    gone_back_to = phases[0].optimizer.param_groups[0].get(GONE_BACK_TO)
    if gone_back_to == step and checkpoint.newest(folder, before=step) is not None:
        step = checkpoint.load(folder, phases, own, before=step)
    wait()  # until all have read what one of them replaces
    times = count - num_rollbacks(phases[0].optimizer)
    phases[0].optimizer.param_groups[0].update({ROLLBACKS: count, GONE_BACK_TO: step})
    for phase in phases:
        _lower(phase, factor**times)
    if write:
        checkpoint.save(folder, step, phases, own)
    wait()
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
