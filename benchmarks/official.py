"""DMD2 cycle as in the DMD2 authors' Stable Diffusion training, written from a description of it.

Mathematics and random draws are ours. Kept is what that code does in every cycle:

- no-grad passes of student and fake score outside autocast, at full precision (their teacher is cast to bf16)
- every conversion to x0 in float64, also one of the fake score's prediction that is only logged
- AdamW with neither ``fused`` nor ``foreach`` chosen: one tensor at a time on a CPU, foreach on a GPU
- one ``.item()`` per student update, for the logged norm of the gradient, and ``nan_to_num`` of the gradient
- the loss ``0.5 (x - (x - g).detach())^2``
- with the GAN term three passes of the fake score in each iteration: denoising, logits of the student's images,
  logits of real ones; the latter two end at the bottleneck

It guides in one batched call and keeps no moving average: as cheap as possible, or cheaper than ours. It decodes
images for the log only once in many iterations, which is left out here.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from contenders import CRITIC_WEIGHT, GENERATOR_WEIGHT, LEARNING_RATE, Setup, eps, trained, update
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus
from torch.optim import AdamW

from distill.adversarial import Critic
from scorefield.denoiser import NetworkDenoiser, expand_cond
from scorefield.randomness import Rng
from scorefield.schedule import per_sample


def official(setup: Setup) -> Iterator[None]:
    """Run iterations as the DMD2 authors' Stable Diffusion training does; see the top of this file."""
    networks = [one.network for one in trained(setup)]
    student, fake = (AdamW(network.parameters(), LEARNING_RATE) for network in networks)
    teacher = setup.teacher.network
    if setup.precision == "bf16":
        teacher = copy.deepcopy(teacher).to(torch.bfloat16)
    for step in count():
        rng, learns, cond = Rng(0, step), (step + 1) % setup.student_every == 0, setup.batch["cond"]
        noise, t = setup.noise(rng)
        if learns:
            with setup.autocast():
                prediction = eps(setup.student, noise, t, cond)
        else:
            with torch.no_grad():  # outside autocast
                prediction = eps(setup.student, noise, t, cond)
        x0 = x0_in_double(setup, prediction, noise, t).to(noise.dtype)
        if learns:
            setup.fake.network.requires_grad_(False)
            loss = official_student_loss(setup, teacher, x0, rng)
            setup.fake.network.requires_grad_(True)
            loss.backward()
            update(student)
            fake.zero_grad()
        official_fake_loss(setup, x0.detach(), rng).backward()
        update(fake)
        yield


def official_student_loss(setup: Setup, teacher: nn.Module, x0: Tensor, rng: Rng) -> Tensor:
    """Return distribution matching as a squared error, plus the adversarial term from a pass of its own."""
    cond = setup.batch["cond"]
    with torch.no_grad():
        x_t, t, _ = setup.noisy(x0, 0.02, 0.98, rng("gradient"))
        pred_fake = x0_in_double(setup, eps(setup.fake, x_t, t, cond), x_t, t)  # outside autocast
        dtype = next(teacher.parameters()).dtype
        frozen = NetworkDenoiser(teacher, setup.teacher.schedule, "eps", setup.teacher.time_scale)
        pred_real = x0_in_double(setup, guided_once(setup, frozen, x_t.to(dtype), t), x_t, t)
        distance = (x0 - pred_real).abs().flatten(1).mean(1)
        gradient = torch.nan_to_num((pred_fake - pred_real) / per_sample(distance, x_t.double()))
    loss = 0.5 * mse_loss(x0, (x0 - gradient).detach().to(x0.dtype))
    torch.linalg.vector_norm(gradient).item()  # for the log: the host waits for the device
    if setup.gan:
        x_t, t, _ = setup.noisy(x0, 0.0, 1.0, rng("adversarial"))
        loss = loss + GENERATOR_WEIGHT * softplus(-logits_alone(setup, x_t, t)).mean()
    return loss


def official_fake_loss(setup: Setup, x0: Tensor, rng: Rng) -> Tensor:
    """Return the error of eps and, with a critic, the logits of fake and real images from two more passes."""
    n, cond = len(x0), setup.batch["cond"]
    images = torch.cat([x0, setup.batch["real"]]) if setup.gan else x0
    x_t, t, noise = setup.noisy(images, 0.0, 1.0, rng("fake"))
    with setup.autocast():
        prediction = eps(setup.fake, x_t[:n], t[:n], cond)
    x0_in_double(setup, prediction.detach(), x_t[:n], t[:n]).float()  # only logged
    loss = mse_loss(prediction.to(x0.dtype), noise[:n])
    if setup.gan:
        fake, real = logits_alone(setup, x_t[:n], t[:n]), logits_alone(setup, x_t[n:], t[n:])
        loss = loss + CRITIC_WEIGHT * (softplus(fake).mean() + softplus(-real).mean())
    return loss


def x0_in_double(setup: Setup, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return x0 from eps, computed in float64."""
    return setup.fake.schedule.to_x0(prediction.double(), x_t.double(), t, "eps")


class _Reached(Exception):  # noqa: N818
    """Carries the bottleneck's features out of a network that need not run further."""


def logits_alone(setup: Setup, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the critic's logits from a pass that ends at the bottleneck."""
    critic = setup.fake.network
    assert isinstance(critic, Critic)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Reached(output if isinstance(output, Tensor) else output[0])

    hook = critic.network.get_submodule(critic.bottleneck).register_forward_hook(leave)
    try:
        with setup.autocast():
            eps(replace(setup.fake, network=critic.network), x_t, t, setup.batch["cond"])
    except _Reached as reached:
        features: Tensor = reached.args[0]
        with setup.autocast():
            logits: Tensor = critic.head(features)
        return logits
    finally:
        hook.remove()
    raise AssertionError(f"the pass did not come by {critic.bottleneck!r}")


def guided_once(setup: Setup, teacher: NetworkDenoiser, x_t: Tensor, t: Tensor) -> Tensor:
    """Return guided eps from one batched call."""
    cond, negative = setup.batch["cond"], expand_cond(setup.null, len(x_t))
    if setup.guidance == 1:
        return eps(teacher, x_t, t, cond)
    both = {name: torch.cat([negative[name], value]) for name, value in cond.items()}
    neg, pos = eps(teacher, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return neg + setup.guidance * (pos - neg)
