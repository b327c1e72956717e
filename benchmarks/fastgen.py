"""The cycle with the habits of NVIDIA's FastGen, written from a description of it.

Same mathematics, same draws as ours, and

- AdamW with ``fused=False``, which also rules out foreach: one tensor at a time
- three moving averages of the student in every iteration, also where it did not move, one tensor at a time
- classifier-free guidance as two calls

FastGen's turns, student or fake score but not both, and its critic, on features of the teacher, are other
mathematics: the turns are ours here, and there is no GAN term.
"""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import count

import torch
from contenders import LEARNING_RATE, Roles, trained, update
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW

from scorefield.denoiser import expand_cond
from scorefield.gradient import prediction_weight
from scorefield.randomness import Rng
from scorefield.schedule import per_sample

DECAYS = (0.999, 0.9999, 0.99995)


def fastgen(roles: Roles) -> Iterator[None]:
    """As FastGen does; see the top of this file."""
    optimizer = partial(AdamW, lr=LEARNING_RATE, fused=False, foreach=False)
    student, fake = (optimizer(role.network.parameters()) for role in trained(roles))
    averages = [copy.deepcopy(roles.student.network).requires_grad_(False) for _ in range(3)]
    for step in count():
        rng, learns = Rng(0, step), (step + 1) % roles.student_every == 0
        noise, t = roles.noise(rng)
        with roles.autocast(), torch.set_grad_enabled(learns):
            x0 = roles.student(noise, t, roles.batch["cond"])
        if learns:
            fastgen_student_loss(roles, x0, rng).backward()
            update(student)
        fastgen_fake_loss(roles, x0.detach(), rng).backward()
        update(fake)
        for average, decay in zip(averages, DECAYS, strict=True):
            follow(average, roles.student.network, decay)
        yield


def fastgen_student_loss(roles: Roles, x0: Tensor, rng: Rng) -> Tensor:
    """Distribution matching with the guided teacher asked twice."""
    cond, negative = roles.batch["cond"], expand_cond(roles.null, len(x0))
    with roles.autocast(), torch.no_grad():
        x_t, t, _ = roles.noisy(x0, 0.02, 0.98, rng("gradient"))
        pred_fake, pred_real = roles.fake(x_t, t, cond), roles.teacher(x_t, t, cond)
        if roles.guidance != 1:
            pred_real = pred_real + (roles.guidance - 1) * (pred_real - roles.teacher(x_t, t, negative))
        distance = (x0 - pred_real).abs().flatten(1).mean(1).clamp(min=1e-6)
        gradient = (pred_fake - pred_real) / per_sample(distance, x0)
    return 0.5 * mse_loss(x0, (x0 - gradient).detach())


def fastgen_fake_loss(roles: Roles, x0: Tensor, rng: Rng) -> Tensor:
    """The fake score's error on the student's images."""
    x_t, t, _ = roles.noisy(x0, 0.0, 1.0, rng("fake"))
    with roles.autocast():
        prediction = roles.fake(x_t, t, roles.batch["cond"])
    weight = per_sample(prediction_weight("eps")(t, roles.fake.schedule), x0)
    return (weight * (prediction - x0).square()).mean()


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move an average, one tensor at a time."""
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
