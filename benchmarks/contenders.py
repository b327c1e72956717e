"""One cycle of a DMD2 training: the passes it cannot do without, and this library.

Each contender is an iterator; every ``next`` is one iteration, and each ``student_every``-th also moves the
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
class Roles:
    """The networks of one training and what they are trained on.

    Attributes:
        teacher: frozen; eps of a variance-preserving schedule, like the other two.
        student: asked at the last time.
        fake: the fake score; a :class:`distill.adversarial.Critic` switches the GAN term on.
        batch: "cond" and "real", the same in each iteration: loading data is not what is compared.
        null: the condition without a condition.
        guidance: scale of the teacher's guidance.
        student_every: iterations per student update.
        precision: of autocast, "no" or "bf16".
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
        """Whether there is a critic to listen to."""
        return isinstance(self.fake.network, Critic)

    def autocast(self) -> torch.autocast:
        """The context for passes in the case's precision."""
        return torch.autocast(self.batch["real"].device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def noise(self, rng: Rng) -> tuple[Tensor, Tensor]:
        """The student's input: pure noise and the last time."""
        real = self.batch["real"]
        noise = torch.randn(real.shape, generator=rng("noise")).to(real.device)
        return noise, torch.full((len(noise),), self.student.schedule.t_max, device=noise.device)

    def noisy(self, x0: Tensor, low: float, high: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x0 noised to times between two fractions of the schedule, with those times and the noise."""
        t = uniform(low, high)(len(x0), self.fake.schedule, generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
        return self.fake.schedule.diffuse(x0, noise, t), t, noise


def eps(denoiser: NetworkDenoiser, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The bare prediction of a network."""
    t = t.to(torch.promote_types(x_t.dtype, torch.float32))
    output = denoiser.network(x_t, denoiser.time_scale * t, **cond)
    prediction: Tensor = output if isinstance(output, Tensor) else output[0]
    return prediction


def bare(roles: Roles, optimise: bool = False) -> Iterator[None]:
    """The passes a cycle cannot do without: nothing is drawn, noised, weighted or logged.

    Student: no-grad passes, and one with backward. Fake score: a pass with backward in each iteration. For the
    gradient one no-grad pass of fake score and teacher. ``optimise`` adds AdamW's updates, in its fused form.
    """
    cond, negative = roles.batch["cond"], expand_cond(roles.null, len(roles.batch["real"]))
    both = {name: torch.cat([negative[name], value]) for name, value in cond.items()}
    x_t, t = roles.noise(Rng(0, 0))
    twice = (x_t, t, cond) if roles.guidance == 1 else (torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    optimizers = {role: AdamW(role.network.parameters(), LEARNING_RATE, fused=True) for role in trained(roles)}
    for step in count(1):
        learns = step % roles.student_every == 0
        with roles.autocast(), torch.set_grad_enabled(learns):
            output = eps(roles.student, x_t, t, cond)
        if learns:
            with roles.autocast(), torch.no_grad():
                eps(roles.teacher, *twice)
                eps(roles.fake, x_t, t, cond)
            output.backward(torch.ones_like(output))
        with roles.autocast():
            output = eps(roles.fake, x_t, t, cond)
        output.backward(torch.ones_like(output))
        for role in trained(roles)[0 if learns else 1 :]:
            if optimise:
                optimizers[role].step()
            optimizers[role].zero_grad(set_to_none=True)
        yield


def trained(roles: Roles) -> list[NetworkDenoiser]:
    """Student and fake score, in the order of their updates."""
    return [roles.student, roles.fake]


def ours(roles: Roles, accelerator: Accelerator) -> Iterator[Any]:
    """The library as its scripts use it: clipping, moving average, metrics and watch over finiteness included."""
    student, fake = (AdamW(role.network.parameters(), LEARNING_RATE, fused=True) for role in trained(roles))
    method = DMD(
        teacher=guided(roles.teacher, roles.guidance, roles.null),
        student=Student(roles.student, (roles.student.schedule.t_max,)),
        fake=roles.fake,
        shape=tuple(roles.batch["real"].shape[1:]),
        student_every=roles.student_every,
        gan=GAN(generator_weight=GENERATOR_WEIGHT, critic_weight=CRITIC_WEIGHT) if roles.gan else None,
    )
    phases = method.phases(student, fake, student_ema=EMA(roles.student.network))
    return train(
        phases, lambda rng: roles.batch, accelerator, rollout=method.rollout, steps=10**9, clip_norm=CLIP_NORM
    )


def update(optimizer: Optimizer) -> None:
    """Clip, step, forget."""
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
