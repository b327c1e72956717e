"""Signs that a scene is, or will be, another than its prompt says: sentences for the user, which stop no run.

The figure that tells a wrong scene from a right one is the probe's residual at a high noise level. There the
teacher answers from the prompt, hardly from the picture, so a scene that it agrees with is near its answer.
"""

from collections.abc import Sequence

from torch import nn

from sds.options import Config
from sds.recovery import EMPTY, FULL, opacity_all_round
from sds.scene import Scene
from sds.words import doubts_of_words

NOISY = "probe/residual/t_0.9"
"""Figure of :class:`sds.probe.Probe` at its highest noise level."""

RISE = 0.05
"""Share by which that figure may rise in a run. It rose by 7 % for a chair that became a stool, by 4 % for a
mug, and fell for a cylinder."""


def doubts(config: Config, network: nn.Module) -> list[str]:
    """Return what looks wrong before the first step.

    Args:
        config: Options of the run.
        network: What is trained, as it starts.
    """
    found = doubts_of_words(config)
    if isinstance(network, Scene):
        opacity = opacity_all_round(network)
        if not EMPTY <= opacity <= FULL:
            kind, change = ("empty", "stronger --blob") if opacity < EMPTY else ("full", "weaker --blob")
            found.append(
                f"the scene starts {kind}: its mean opacity is {opacity:.4f}. It may not learn; try a {change}, "
                "or another --initial."
            )
    return found


def unsettled(noisy: Sequence[float]) -> list[str]:
    """Return a warning if the residual at a high noise level is higher at the end by more than ``RISE``.

    Args:
        noisy: Values of :data:`NOISY` in this process, in order of steps.
    """
    if len(noisy) < 2 or noisy[-1] <= (1 + RISE) * noisy[0]:
        return []
    return [
        f"the residual at high noise rose from {noisy[0]:.2f} to {noisy[-1]:.2f}: the teacher does not see the "
        "prompt in this scene. Look at it, and try another --seed."
    ]
