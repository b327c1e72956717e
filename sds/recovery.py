"""Recovery of lost scenes: detect them, go back to the last good checkpoint, and go on at lower learning rates.

The gradient of a score does not keep a scene from thinning out to nothing, from filling its cube up to the
cameras, or from becoming nan. :func:`check_opacity` of :func:`opacity_all_round` detects the first two,
``loop.train`` and ``checkpoint.check_finite`` the third. They are called in every step that is about to be saved,
so they raise before the bad state becomes a checkpoint. :func:`roll_back` loads a checkpoint, lowers the learning
rates, and records that in the checkpoint: a run that is killed after a rollback resumes as if it had not been
killed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scorefield.randomness import derived_generator
from scorefield.training import checkpoint
from scorefield.training.loop import Phase
from sds.cameras import orbit
from sds.scene import Scene

LARGEST_WEIGHT = 1e4
"""A scene is lost if one of its weights is larger. Those of scenes that look like something stay below 100."""

EMPTY, FULL = 0.003, 0.97
"""A scene is lost if its mean opacity from all four sides of the cube is below the first or above the second."""

ROLLBACKS, GONE_BACK_TO = "rollbacks", "gone_back_to"
"""Entries of an optimizer's first parameter group: how often the run went back, and to which step the last time.
Checkpoints hold them with the optimizer."""


class LostSceneError(FloatingPointError):
    """A scene is empty, fills its whole cube, or has weights without measure."""


@torch.no_grad()
def opacity_all_round(scene: Scene, *, size: int = 32, focal: float = 1.37) -> float:
    """Return the mean opacity in pictures of the four sides of a scene's cube; each side just fills its picture.

    The random views of a step cannot tell a lost scene from one that is seen from nearby. Nothing is random here,
    so all ranks agree, and a run is the same with and without this check.

    Args:
        scene: A scene on any device.
        size: Height and width of the pictures in pixels.
        focal: Focal length in picture heights.
    """
    four = torch.ones(4)
    views = orbit(90 * torch.arange(4.0), 0 * four, scene.field.half_size * (1 + 2 * focal) * four, focal * four)
    return float(scene(views, height=size, width=size, background=torch.zeros(3)).opacity.mean())


def check_opacity(opacity: float, step: int) -> None:
    """Raise :class:`LostSceneError` if a mean opacity from :func:`opacity_all_round` is that of a lost scene."""
    if EMPTY <= opacity <= FULL:
        return
    what, weight = "not finite", ""
    if not math.isnan(opacity):
        what, weight = (
            ("empty", "opacity and entropy penalties") if opacity < EMPTY else ("full", "score (--guidance)")
        )
        weight = f", or the weight of the {weight}"
    raise LostSceneError(
        f"the scene is {what} in step {step}: its mean opacity is {opacity:.4f}, expected between {EMPTY} and "
        f"{FULL}. Lower the learning rate{weight}."
    )


@torch.no_grad()
def check_weights(network: nn.Module, step: int) -> None:
    """Raise :class:`LostSceneError` if a weight of a scene or a canvas is beyond ``LARGEST_WEIGHT``, or nan."""
    # Of torch, whose maximum is nan where one of them is; Python's depends on their order.
    largest = float(torch.stack([p.abs().max().float() for p in network.parameters()]).max())
    if not largest <= LARGEST_WEIGHT:
        raise LostSceneError(
            f"the scene has exploded in step {step}: its largest weight is {largest:.3g}, expected at most "
            f"{LARGEST_WEIGHT:,.0f}. Lower the learning rate, or the weight of the score or of a penalty."
        )


def num_rollbacks(optimizer: Optimizer) -> int:
    """Return how often a run has gone back, in this process and in all earlier ones."""
    return int(optimizer.param_groups[0].get(ROLLBACKS, 0))


def roll_back(
    folder: Path, phases: Sequence[Phase], own: Mapping[str, Any], *, factor: float = 0.5, write: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Restore a checkpoint, multiply all learning rates by ``factor``, and return the step to go on from.

    It restores the newest checkpoint. If the run went back to that one before, and was lost again before it
    reached the next, it restores the one before, if that still exists. Rates are lowered once for each time the
    run went back.

    Args:
        folder: Folder of the checkpoints; the caller has saved one at step 0.
        phases: As passed to ``train``; the count is kept in the first phase's optimizer.
        own: The run's config, as for ``checkpoint.load``.
        factor: Factor in (0, 1).
        write: Whether this process writes the checkpoint; of several, one does.
        wait: Returns once all processes have called it: ``Accelerator.wait_for_everyone``.

    Raises:
        ValueError: ``factor`` is outside (0, 1), or there is no checkpoint.
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
    """Return the seed to go on with, so that cameras and noises differ from those before the rollback."""
    return seed if rollbacks == 0 else derived_generator("rollback", seed, rollbacks).initial_seed()


def _lower(phase: Phase, factor: float) -> None:
    for group in phase.optimizer.param_groups:
        group["lr"] *= factor
        if "initial_lr" in group:
            group["initial_lr"] *= factor
    if phase.lr_schedule is not None:
        phase.lr_schedule.base_lrs = [rate * factor for rate in phase.lr_schedule.base_lrs]
