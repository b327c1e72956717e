"""Contenders of one DMD2 cycle: this library, and the network passes that no trainer can do without.

Each contender is an iterator. Every ``next`` is one iteration, and each ``student_every``-th also updates the
student. All draw the same numbers, so that their first gradients can be compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from distill.adversarial import Critic
from distill.dmd import DMD, GAN
from distill.student import Student
from scorefield.denoiser import NetworkDenoiser, expand_cond
from scorefield.guidance import guided
from scorefield.randomness import Rng
from scorefield.times import uniform
from scorefield.training.loop import EMA, train

CLIP_NORM, LEARNING_RATE = 10.0, 1e-5
GENERATOR_WEIGHT, CRITIC_WEIGHT = 3e-3, 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class Setup:
    """Networks and data of one training.

    Attributes:
        teacher: Frozen network that predicts eps on a variance-preserving schedule, as the other two do.
        student: One-step student, called at the last time.
        fake: Fake score. If it is a :class:`distill.adversarial.Critic`, the GAN term is on.
        batch: "cond" and "real", the same in each iteration: loading data is not compared.
        null: Condition for the unconditional prediction.
        guidance: Scale of the teacher's guidance.
        student_every: Iterations per student update.
        precision: Autocast precision, "no" or "bf16".
    """

    teacher: NetworkDenoiser
    student: NetworkDenoiser
    fake: NetworkDenoiser
    batch: dict[str, Any]
    null: dict[str, Tensor]
    guidance: float
    student_every: int
    precision: str

    @property
    def gan(self) -> bool:
        """Return whether there is a critic, and so a GAN term."""
        return isinstance(self.fake.network, Critic)

    def autocast(self) -> torch.autocast:
        """Context for passes in the setup's precision."""
        return torch.autocast(self.batch["real"].device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def noise(self, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return the student's input: pure noise and the last time."""
        real = self.batch["real"]
        noise = torch.randn(real.shape, generator=rng("noise")).to(real.device)
        return noise, torch.full((len(noise),), self.student.schedule.t_max, device=noise.device)

    def noisy(self, x0: Tensor, low: float, high: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return x0 noised to times between two fractions of the schedule, with those times and the noise."""
        t = uniform(low, high)(len(x0), self.fake.schedule, generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
        return self.fake.schedule.diffuse(x0, noise, t), t, noise


def eps(denoiser: NetworkDenoiser, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Return the plain prediction of a network."""
    t = t.to(torch.promote_types(x_t.dtype, torch.float32))
    output = denoiser.network(x_t, denoiser.time_scale * t, **cond)
    prediction: Tensor = output if isinstance(output, Tensor) else output[0]
    return prediction


def bare(setup: Setup, optimise: bool = False) -> Iterator[None]:
    """Run the passes a cycle cannot do without: nothing is drawn, noised, weighted or logged.

    The student has no-grad passes, and one with backward. The fake score has a pass with backward in each
    iteration. The gradient takes one no-grad pass each of fake score and teacher. ``optimise`` adds updates by
    fused AdamW.
    """
    cond, negative = setup.batch["cond"], expand_cond(setup.null, len(setup.batch["real"]))
    both = {name: torch.cat([negative[name], value]) for name, value in cond.items()}
    x_t, t = setup.noise(Rng(0, 0))
    twice = (x_t, t, cond) if setup.guidance == 1 else (torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    optimizers = {one: AdamW(one.network.parameters(), LEARNING_RATE, fused=True) for one in trained(setup)}
    for step in count(1):
        learns = step % setup.student_every == 0
        with setup.autocast(), torch.set_grad_enabled(learns):
            output = eps(setup.student, x_t, t, cond)
        if learns:
            with setup.autocast(), torch.no_grad():
                eps(setup.teacher, *twice)
                eps(setup.fake, x_t, t, cond)
            output.backward(torch.ones_like(output))
        with setup.autocast():
            output = eps(setup.fake, x_t, t, cond)
        output.backward(torch.ones_like(output))
        for one in trained(setup)[0 if learns else 1 :]:
            if optimise:
                optimizers[one].step()
            optimizers[one].zero_grad(set_to_none=True)
        yield


def trained(setup: Setup) -> list[NetworkDenoiser]:
    """Return student and fake score, in the order of their updates."""
    return [setup.student, setup.fake]


def ours(setup: Setup, accelerator: Accelerator) -> Iterator[Any]:
    """Run this library as its scripts do, with clipping, moving average, metrics and checks for finite values."""
    student, fake = (AdamW(one.network.parameters(), LEARNING_RATE, fused=True) for one in trained(setup))
    method = DMD(
        teacher=guided(setup.teacher, setup.guidance, setup.null),
        student=Student(setup.student, (setup.student.schedule.t_max,)),
        fake=setup.fake,
        shape=tuple(setup.batch["real"].shape[1:]),
        student_every=setup.student_every,
        gan=GAN(generator_weight=GENERATOR_WEIGHT, critic_weight=CRITIC_WEIGHT) if setup.gan else None,
    )
    phases = method.phases(student, fake, student_ema=EMA(setup.student.network))
    return train(
        phases, lambda rng: setup.batch, accelerator, rollout=method.rollout, steps=10**9, clip_norm=CLIP_NORM
    )


def update(optimizer: Optimizer) -> None:
    """Clip the gradients, make a step, and clear the gradients."""
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
