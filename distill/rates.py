"""Learning rates that are measured, not guessed: a range test before the training.

The rate that suits a network depends on its architecture, its scale and on what part of it learns (all weights, or
a LoRA). So :func:`range_test` raises the rate step by step on one batch and reads off where the loss no longer
falls (Smith 2015, arXiv 1506.01186, section 3.3). Which fraction of that rate each stage of a
distillation takes is written in :class:`Rates`.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scorefield.progress import progress
from scorefield.training.sharding import clip_gradients, is_piece, local


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of a distillation.

    Attributes:
        warmup: of the regression on teacher pairs.
        student: of the student in distribution matching.
        fake: of the fake score; above the student's, which it has to follow.
    """

    warmup: float
    student: float
    fake: float

    @classmethod
    def from_warmup(cls, warmup: float) -> "Rates":
        """Fractions of the warm-up's rate: 1 / 25 for the student, 2 / 5 for the fake score, which must not lag.

        A one-step student that has learned its pairs only needs to be sharpened; at the warm-up's rate the noise
        of the gradient moves it further than that (docs/distillation.md has the measurement).
        """
        return cls(warmup, warmup / 25, warmup / 2.5)

    @classmethod
    def along_paths(cls, warmup: float) -> "Rates":
        """A quarter for consistency, whose target moves with the student."""
        return cls(warmup, warmup / 4, 0.0)


@dataclass(frozen=True)
class RangeTest:
    """Losses along a rising learning rate.

    Attributes:
        rates: of each step, rising.
        losses: before each step.
        rate: that the test recommends.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    rate: float


def range_test(
    network: nn.Module, loss: Callable[[], Tensor], *, low: float = 1e-6, high: float = 0.1, steps: int = 50,
    clip_norm: float = math.inf, joined: Callable[[Tensor], Tensor] = lambda value: value,
) -> RangeTest:  # fmt: skip
    """Find the learning rate of AdamW for a network; its weights are put back afterwards.

    Args:
        network: in the state in which the training will begin.
        loss: returns the loss of the network on one batch, the same at each call: otherwise the scatter
            between batches hides what a step changes.
        low: rate of the first step.
        high: rate of the last step.
        steps: network updates; their rates rise by a constant factor.
        clip_norm: largest gradient norm, as in the training.
        joined: the loss of one rank to that of all; where a network is sharded they have to stop together.

    Raises:
        ValueError: the loss does not fall at any rate, or is not finite at the first step; rates that do not rise;
            fewer than two steps.
    """
    if not (0 < low < high and steps > 1):
        raise ValueError(f"a range test needs 0 < low < high and at least 2 steps; got {low}, {high}, {steps}.")
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    before = [local(parameter.detach()).clone() for parameter in learned]
    optimizer = torch.optim.AdamW(learned, low, weight_decay=0.0, fused=True)
    rates: list[float] = []
    losses: list[float] = []
    try:
        for step in progress(range(steps), "range test of learning rates"):
            rate = low * (high / low) ** (step / (steps - 1))
            value = loss()
            rates.append(rate)
            losses.append(float(joined(value.detach())))
            if not math.isfinite(losses[-1]) or losses[-1] > 4 * losses[0]:
                break
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            clip_gradients(learned, clip_norm)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_([local(parameter.detach()) for parameter in learned], before)
    rate = min(best_rate(rates, losses), MOST_MOVED * size_of_weights(learned))
    return RangeTest(tuple(rates), tuple(losses), rate)


MOST_MOVED = 0.02
"""Share of the size of a network's weights by which the recommended rate may move them in a step.

AdamW moves each weight by about its rate. A transformer with normalised layers learned one batch by heart at
rates up to 0.1, and could not be trained at a sixth of that (LOG.md): there one batch does not bound the rate.
"""


def size_of_weights(parameters: Sequence[Tensor]) -> float:
    """Return the median over matrices and kernels of the root mean square of their numbers.

    Those that are all zero are about to be learned and left out; infinity where there are no others.
    """
    squares: list[Any] = [p.detach().float().square().mean() for p in parameters if p.ndim > 1]
    means = [float(mean.full_tensor() if is_piece(mean) else mean) for mean in squares]
    sizes = [math.sqrt(mean) for mean in means if mean > 0]
    return statistics.median(sizes) if sizes else math.inf


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return a sixth of the last rate at which the loss, averaged over three steps, is below where it began.

    There a step undoes what the steps before it gained. Where the loss is lowest says less: a network that is
    asked something new falls to a first plateau at rates far below those that it can be trained at.

    Raises ``ValueError`` where the loss never falls.
    """
    if not losses or not math.isfinite(losses[0]):
        raise ValueError(f"the loss must be finite before the first step; got {list(losses[:1])}.")
    padded = [losses[0], *losses, losses[-1]]
    smooth = [sum(padded[step : step + 3]) / 3 for step in range(len(losses))]
    below = [step for step, loss in enumerate(smooth) if loss < losses[0]]
    if not below:
        raise ValueError(
            f"the loss of {losses[0]:.4g} falls at no learning rate between {rates[0]:.1g} and {rates[-1]:.1g}. "
            "Pass --warmup-lr, --student-lr and --fake-lr."
        )
    return rates[below[-1]] / 6
