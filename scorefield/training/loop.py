"""One training loop for every method: phases of one network, one optimiser, one loss each.

The loop is a generator, so that the caller logs, samples, evaluates, saves and stops in a plain ``for`` body.
Randomness is derived from (seed, step, micro-batch, rank, purpose), never stored: a resumed run draws the same
numbers, and a checkpoint is weights, optimisers and a step. Only this file and ``ranks`` import Accelerate.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scorefield.denoiser import unwrap
from scorefield.randomness import Rng
from scorefield.training.ranks import (
    average_gradients,
    broadcast_weights,
    check_launch,
    sync_only_if,
    verify_weights,
    without_others,
)
from scorefield.training.sharding import clip_gradients, duplicate, local

Batch = Any
"""Whatever ``batches`` returns and the losses read; usually a mapping of tensors."""


class EMA:
    """An exponential moving average of a network's weights; tick it on that network's own updates only.

    The decay of update n is ``min(decay, (1 + n) / (10 + n))``, so that a short run is not an average of its
    initialisation.

    Args:
        network: the network to follow; ``ema.network`` is its frozen average, sharded as it is.
        decay: of the average, in [0, 1).
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must lie in [0, 1); got {decay}. 0.999 averages about 1,000 updates.")
        self.source = unwrap(network)
        self.network = duplicate(self.source).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    def reset(self) -> None:
        """Start again from the network as it is now."""
        self.network.load_state_dict(self.source.state_dict())
        self.num_updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages: list[Tensor] = [local(p) for p in self.network.parameters()]
        values: list[Tensor] = [local(p) for p in self.source.parameters()]
        torch._foreach_lerp_(averages, values, 1 - decay)
        for average, value in zip(self.network.buffers(), self.source.buffers(), strict=True):
            average.copy_(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
    """One network that learns: what it minimises and when.

    Attributes:
        name: prefix of its metrics and of its files in a checkpoint.
        network: trained by ``optimizer``; every other phase's network is frozen meanwhile.
        optimizer: over the network's parameters, not prepared by Accelerate.
        loss: (batch, rng) -> {"loss": scalar, further metrics: scalars}, averaged over micro-batches, or their
            largest where the name ends in "_max".
        every: it steps in each every-th iteration, at each ``Report.step`` that it divides.
        ema: ticked after each of its steps.
        lr_schedule: stepped after each of its steps; not prepared by Accelerate.
        lr_options: the command's options that its learning rates are made from; a checkpoint of other values goes
            on at the rates of this run.
        given_rates: learning rate of each group of the optimizer, as it was built.
    """

    name: str
    network: nn.Module
    optimizer: Optimizer
    loss: Callable[[Batch, Rng], Mapping[str, Tensor]]
    every: int = 1
    ema: EMA | None = None
    lr_schedule: LRScheduler | None = None
    lr_options: tuple[str, ...] = ()
    given_rates: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        rates = (float(group.get("initial_lr", group["lr"])) for group in self.optimizer.param_groups)
        object.__setattr__(self, "given_rates", tuple(rates))

    def learning_rates(self) -> dict[str, float]:
        """Return the rate of each group of its optimizer now, by name; see :class:`Report`."""
        groups = enumerate(self.optimizer.param_groups, 1)
        return {
            f"{self.name}/learning_rate{'' if number == 1 else f'_{number}'}": float(group["lr"])
            for number, group in groups
        }

    def networks(self) -> dict[str, nn.Module]:
        """Return what a checkpoint holds, by file name: the network without its wrapper, and its average."""
        networks = {self.name: unwrap(self.network)}
        return networks if self.ema is None else {**networks, f"{self.name}.ema": self.ema.network}


Rollout = Callable[[Batch, tuple[str, ...], Rng], Batch]
"""(batch, names of due phases, rng) -> batch."""


@dataclass(frozen=True)
class Report:
    """What one iteration did.

    Attributes:
        step: iterations done, from 1: the number to log under and to resume from.
        phases: names of the phases that stepped.
        metrics: "phase/name" -> scalar tensor of this rank, averaged over micro-batches, on the device.
        learning_rates: "phase/learning_rate" -> rate of the step; of the optimizer's second group
            "phase/learning_rate_2", and so on.
    """

    step: int
    phases: tuple[str, ...]
    metrics: Mapping[str, Tensor]
    learning_rates: Mapping[str, float] = field(default_factory=dict)

    def read(self) -> dict[str, float]:
        """Return the metrics as numbers; waits for the device once, so not every step on a GPU."""
        values = torch.stack([value.float() for value in self.metrics.values()]).tolist()
        return dict(zip(self.metrics, values, strict=True))


def train(
    phases: Sequence[Phase],
    batches: Callable[[Rng], Batch],
    accelerator: Accelerator,
    *,
    steps: int,
    start: int = 0,
    rollout: Rollout | None = None,
    accumulate: int = 1,
    clip_norm: float = math.inf,
    seed: int = 0,
    verify_every: int = 500,
    split: bool = False,
) -> Iterator[Report]:
    """Run iterations ``start`` to ``steps`` and report each.

    Every due phase sees the same micro-batches in the order of ``phases``; all optimisers step at the end, so a
    sample made by the old student weights serves every phase (DMD2).

    Args:
        phases: trained together.
        batches: rng -> batch; see :func:`scorefield.randomness.shuffled`.
        accelerator: device, ranks, autocast. Networks that neither it wrapped in DDP nor ``sharding`` cut get one
            flat all-reduce a step.
        steps: iterations in all, counted from 0 also when resuming.
        start: first iteration, from :func:`scorefield.training.checkpoint.load`.
        rollout: once a micro-batch: what the phases share.
        accumulate: micro-batches an iteration.
        clip_norm: largest gradient norm of each phase.
        seed: of every random draw; torch's global generator, which dropout uses, is seeded at each micro-batch.
        verify_every: iterations between checks that all ranks hold the same weights.
        split: each micro-batch is drawn as by one process with those of all ranks, which so take its steps.

    Raises:
        ValueError: unusable phases or counts, or a launcher that started separate runs.
        FloatingPointError: loss or gradient not finite; on a CPU before any update, on a GPU within 50 steps.
        RuntimeError: weights differ between ranks.
    """
    _check(phases, accelerator, steps, accumulate)
    watch = _FiniteWatch(1 if accelerator.device.type == "cpu" else 50, accelerator)  # a GPU would wait each time
    for phase in phases:
        phase.optimizer.zero_grad(set_to_none=True)  # an earlier run may have stopped between backward and step
        broadcast_weights(phase.networks().values(), accelerator)
    for step in range(start, steps):
        due = [phase for phase in phases if (step + 1) % phase.every == 0]
        metrics: dict[str, Tensor] = {}
        for micro in range(accumulate):
            rng = _seeded(seed, step, micro, accumulate, accelerator, split)
            with sync_only_if(micro == accumulate - 1, [phase.network for phase in due], accelerator):
                for name, value in _micro_batch(due, phases, batches, rollout, rng, accelerator, 1 / accumulate):
                    metrics[name] = _joined(name, metrics.get(name), value, accumulate)
        for phase in due:
            average_gradients(phase.network, accelerator)
            norm = clip_gradients(list(phase.network.parameters()), clip_norm)
            metrics[f"{phase.name}/grad_norm"] = norm.detach()
            watch(step, phase.name, metrics)
        watch.check_if_due(step, last=step == steps - 1)
        rates = dict(item for phase in due for item in _update(phase).items())
        _verify(phases, accelerator, due=(step + 1) % verify_every == 0)
        yield Report(step + 1, tuple(phase.name for phase in due), metrics, rates)


def rehearse(
    phases: Sequence[Phase], batches: Callable[[Rng], Batch], accelerator: Accelerator, *,
    rollout: Rollout | None = None, accumulate: int = 1, seed: int = 0,
) -> None:  # fmt: skip
    """Compute what an iteration of :func:`train` does in which all phases are due, and leave no trace of it.

    No optimiser steps, there are no gradients afterwards, random numbers are drawn on as before, and ranks do not
    wait for each other. After two micro-batches it ends: those that follow hold no more memory.
    """
    networks = [phase.network for phase in phases]
    buffers = [(buffer, buffer.clone()) for network in networks for buffer in network.buffers()]
    device = accelerator.device
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            for micro in range(min(accumulate, 2)):
                rng = _seeded(seed, 0, micro, accumulate, accelerator)
                with without_others(networks, accelerator):
                    for _ in _micro_batch(phases, phases, batches, rollout, rng, accelerator, 1 / accumulate):
                        pass
    finally:
        for phase in phases:
            phase.optimizer.zero_grad(set_to_none=True)
        for buffer, before in buffers:
            buffer.copy_(before)


def _check(phases: Sequence[Phase], accelerator: Accelerator, steps: int, accumulate: int) -> None:
    names = [phase.name for phase in phases]
    if not phases or len(set(names)) != len(names):
        raise ValueError(f"phases need distinct names; got {names}.")
    for phase in phases:
        if phase.every < 1:
            raise ValueError(f"phase {phase.name!r} needs every >= 1; got {phase.every}. 1 means each iteration.")
    if steps < 1 or accumulate < 1:
        raise ValueError(f"steps and accumulate must be at least 1; got {steps} and {accumulate}.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"Accelerator(gradient_accumulation_steps={accelerator.gradient_accumulation_steps}) counts blocks, "
            "not phases; leave it at 1 and pass accumulate= to train."
        )
    check_launch(accelerator)


def _verify(phases: Sequence[Phase], accelerator: Accelerator, due: bool) -> None:
    if due and accelerator.num_processes > 1:
        for name, network in (item for phase in phases for item in phase.networks().items()):
            verify_weights(name, network, accelerator)


def _joined(name: str, before: Tensor | None, value: Tensor, accumulate: int) -> Tensor:
    if name.endswith("_max"):
        return value if before is None else torch.maximum(before, value)
    return value / accumulate if before is None else before + value / accumulate


def _seeded(
    seed: int, step: int, micro: int, accumulate: int, accelerator: Accelerator, split: bool = False
) -> Rng:
    ranks, rank = accelerator.num_processes, accelerator.process_index
    index = (step * accumulate + micro) * ranks + rank
    rng = Rng(seed, step, micro * ranks + rank, 0, index) if split else Rng(seed, step, micro, rank, index)
    torch.manual_seed(rng("global").initial_seed())  # dropout draws from torch's global generator
    return rng


def _micro_batch(
    due: Sequence[Phase], phases: Sequence[Phase], batches: Callable[[Rng], Batch], rollout: Rollout | None,
    rng: Rng, accelerator: Accelerator, scale: float,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    batch = batches(rng)
    if rollout is not None:
        with accelerator.autocast():
            batch = rollout(batch, tuple(phase.name for phase in due), rng)
    for phase in due:
        with _frozen([other.network for other in phases if other is not phase]):
            with accelerator.autocast():
                losses = phase.loss(batch, rng)
            accelerator.backward(losses["loss"] * scale)
        yield from ((f"{phase.name}/{name}", value.detach()) for name, value in losses.items())


@contextmanager
def _frozen(networks: Sequence[nn.Module]) -> Iterator[None]:
    # Gradients pass through these networks to their input but not into their weights.
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _update(phase: Phase) -> dict[str, float]:
    # Returns the rates of this step.
    rates = phase.learning_rates()
    phase.optimizer.step()
    phase.optimizer.zero_grad(set_to_none=True)
    if phase.lr_schedule is not None:
        phase.lr_schedule.step()
    if phase.ema is not None:
        phase.ema.update()
    return rates


class _FiniteWatch:
    # Collects losses and norms as tensors and reads them together: no host sync on the steps between.
    def __init__(self, every: int, accelerator: Accelerator) -> None:
        self.every, self.accelerator = every, accelerator
        self.pending: list[tuple[int, str, dict[str, Tensor]]] = []

    def __call__(self, step: int, phase: str, metrics: Mapping[str, Tensor]) -> None:
        own = {name: value for name, value in metrics.items() if name.startswith(f"{phase}/")}
        self.pending.append((step, phase, own))

    def check_if_due(self, step: int, last: bool) -> None:
        if last or (step + 1) % self.every == 0:
            self.check()

    def check(self) -> None:
        pending, self.pending = self.pending, []
        if not pending:
            return
        sizes = [torch.stack([own[f"{phase}/loss"], own[f"{phase}/grad_norm"]]) for _, phase, own in pending]
        finite = torch.stack(sizes).isfinite().all(1)
        # Of several ranks one may have met the bad sample: all of them stop, and in the same step.
        everywhere = self.accelerator.gather(finite[None]).all(0).tolist()
        for (step, phase, own), good in zip(pending, everywhere, strict=True):
            if not good:
                raise FloatingPointError(self._explain(step, phase, own))

    def _explain(self, step: int, phase: str, own: dict[str, Tensor]) -> str:
        values = ", ".join(
            f"{name} = {float(value):g}" for name, value in own.items() if not name.endswith("_max")
        )
        times = own.get(f"{phase}/t_not_finite_max")  # scorefield.gradient.TIME_NOT_FINITE
        where = ""
        if times is not None:
            t = float(self.accelerator.gather(times.reshape(1)).max())
            where = f"The largest t of the samples to blame is {t:g}. " if t >= 0 else "No sample is to blame. "
        return (
            f"loss or gradient of phase {phase!r} is not finite in step {step + 1}: {values}. {where}Resume from "
            "the last checkpoint with a lower learning rate, a lower clip_norm or narrower times."
        )
