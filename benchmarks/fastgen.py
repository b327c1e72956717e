"""DMD2 cycle with the practice of NVIDIA's FastGen, written from a description of it.

Mathematics and random draws are ours. FastGen's practice is

- AdamW with ``fused=False``, which also rules out foreach: one tensor at a time
- three moving averages of the student in every iteration, even if it was not updated, one tensor at a time
- classifier-free guidance as two calls

FastGen updates student or fake score in turn but never both, and its critic sees features of the teacher. That is
other mathematics, so the turns here are ours, and there is no GAN term.
"""

import copy
from collections.abc import Iterator
from functools import partial
from itertools import count

import torch
from contenders import LEARNING_RATE, Setup, trained, update
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW

from scorefield.denoiser import expand_cond
from scorefield.gradient import prediction_weight
from scorefield.randomness import Rng
from scorefield.schedule import per_sample

DECAYS = (0.999, 0.9999, 0.99995)


def fastgen(setup: Setup) -> Iterator[None]:
    """Run iterations as FastGen does; see the top of this file."""
    optimizer = partial(AdamW, lr=LEARNING_RATE, fused=False, foreach=False)
    student, fake = (optimizer(one.network.parameters()) for one in trained(setup))
    averages = [copy.deepcopy(setup.student.network).requires_grad_(False) for _ in range(3)]
    for step in count():
        rng, learns = Rng(0, step), (step + 1) % setup.student_every == 0
        noise, t = setup.noise(rng)
        with setup.autocast(), torch.set_grad_enabled(learns):
            x0 = setup.student(noise, t, setup.batch["cond"])
        if learns:
            fastgen_student_loss(setup, x0, rng).backward()
            update(student)
        fastgen_fake_loss(setup, x0.detach(), rng).backward()
        update(fake)
        for average, decay in zip(averages, DECAYS, strict=True):
            follow(average, setup.student.network, decay)
        yield


def fastgen_student_loss(setup: Setup, x0: Tensor, rng: Rng) -> Tensor:
    """Return the distribution matching loss, for which the guided teacher is called twice."""
    cond, negative = setup.batch["cond"], expand_cond(setup.null, len(x0))
    with setup.autocast(), torch.no_grad():
        x_t, t, _ = setup.noisy(x0, 0.02, 0.98, rng("gradient"))
        pred_fake, pred_real = setup.fake(x_t, t, cond), setup.teacher(x_t, t, cond)
        if setup.guidance != 1:
            pred_real = pred_real + (setup.guidance - 1) * (pred_real - setup.teacher(x_t, t, negative))
        distance = (x0 - pred_real).abs().flatten(1).mean(1).clamp(min=1e-6)
        gradient = (pred_fake - pred_real) / per_sample(distance, x0)
    return 0.5 * mse_loss(x0, (x0 - gradient).detach())


def fastgen_fake_loss(setup: Setup, x0: Tensor, rng: Rng) -> Tensor:
    """Return the fake score's error on the student's images."""
    x_t, t, _ = setup.noisy(x0, 0.0, 1.0, rng("fake"))
    with setup.autocast():
        prediction = setup.fake(x_t, t, setup.batch["cond"])
    weight = per_sample(prediction_weight("eps")(t, setup.fake.schedule), x0)
    return (weight * (prediction - x0).square()).mean()


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move an average, one tensor at a time."""
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
