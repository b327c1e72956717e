"""A scene that learns from a teacher, as phases of :func:`scorefield.training.loop.train`.

    task = SceneDistillation(subject=SceneLooks(...), method=lambda step: sds(teacher, times=...))
    phases = task.phases(optimizer)
    for report in train(phases, task.batches, accelerator, rollout=task.rollout, steps=10_000): ...

The subject is looked at, and its look encoded, once an iteration; a phi of VSD learns from the same renders. The
teacher is part of no phase: it is in no checkpoint and is not wrapped for several processes, whose gradients with
respect to the scene are averaged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scorefield.randomness import Rng
from scorefield.training.loop import Phase
from sds.looks import Subject
from sds.losses import Distillation
from sds.renders import distillation_loss
from sds.vsd import VSD


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneDistillation:
    """What learns, and by which loss.

    Attributes:
        subject: a scene or a canvas with its looks.
        method: step -> loss of that step, as times and guidance may change on the way.
        num_draws: noises and times per render, all through one pass of the encoder.
    """

    subject: Subject
    method: Callable[[int], Distillation]
    num_draws: int = 1

    def batches(self, rng: Rng) -> dict[str, Any]:
        """Nothing: all data is drawn from the scene."""
        del rng
        return {}

    def rollout(self, batch: Mapping[str, Any], phases: tuple[str, ...], rng: Rng) -> dict[str, Any]:
        """The look of this step, with its graph, for all phases."""
        del batch, phases
        look = self.subject.look(rng)
        return {"x0": look.x0, "cond": look.cond, "look": look}

    def loss(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        """The score's gradient and the penalty; see :func:`sds.renders.distillation_loss` for the reduction."""
        look = batch["look"]
        values = distillation_loss(
            self.method(rng.step), look.x0, look.cond, num_draws=self.num_draws, generator=rng("gradient")
        )
        loss = values.pop("loss") + look.penalty
        return {"loss": loss, "penalty": look.penalty, **values, **look.metrics}

    def phases(
        self, optimizer: Optimizer, *, lr_schedule: LRScheduler | None = None, phi: Optimizer | None = None,
    ) -> list[Phase]:  # fmt: skip
        """The scene's phase and, for VSD, its phi's, which follows on the same renders.

        Raises ``ValueError`` for a phi's optimizer where the loss has none, and the other way round.
        """
        method = self.method(0)
        if isinstance(method, VSD) != (phi is not None):
            raise ValueError("VSD, and no other loss, needs an optimizer for its phi.")
        scene = Phase(
            name="scene", network=self.subject.network, optimizer=optimizer, loss=self.loss,
            lr_schedule=lr_schedule,
        )  # fmt: skip
        return [scene, method.phase(phi)] if isinstance(method, VSD) and phi is not None else [scene]
