"""Contenders of one text-to-3D step: this library, and the practice of two other trainers.

Each of the three makes a :data:`Loss` of the same mathematics: SDS with w = sigma^2, divided by the number of
views. All else, from the cameras to Adam, is this library's. They draw the same numbers and encode to the mean of
the encoder's Gaussian, so that their gradients can be compared.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Generator, Tensor
from torch.nn.functional import mse_loss

from scorefield.denoiser import Cond
from scorefield.gradient import standard_normal
from scorefield.guidance import guided
from scorefield.models.codec import Codec
from scorefield.models.teacher import Teacher
from scorefield.randomness import Rng
from scorefield.schedule import per_sample
from sds.cameras import CameraDistribution, view_conditions, view_prompts, word_bins
from sds.losses import TIMES, distillation_loss, sds, sigma_squared
from sds.scene import Scene, grid_scene
from sds.training import encoded

Loss = Callable[[Tensor, Cond, Generator], Tensor]
"""(images (b, 3, h, w) in [-1, 1], conditions of batch b, generator) -> a scalar to call ``backward`` on."""

LEARNING_RATE = 0.05
CAMERAS = CameraDistribution()
BACKGROUND = torch.ones(3)


@dataclass(frozen=True, kw_only=True, eq=False)
class Guide:
    """The guided teacher that all contenders call.

    Attributes:
        teacher: Frozen.
        negative: Condition that guidance moves away from, batch 1.
        scale: Scale of guidance; 1 means none.
    """

    teacher: Teacher
    negative: Cond
    scale: float

    def encode(self, images: Tensor) -> Tensor:
        """Return the teacher's x0 of images."""
        return encoded(images, self.teacher.encode, self.teacher.size)

    def draws(self, x0: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return t, noise and x_t, with random numbers in the library's order."""
        schedule = self.teacher.denoiser.schedule
        t = TIMES(len(x0), schedule, generator).to(x0.device)
        noise = standard_normal(x0, {}, t, generator)
        return t, noise, schedule.diffuse(x0, noise, t)

    def residual(self, eps: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return w(t) (eps - noise)."""
        return per_sample(sigma_squared(t, self.teacher.denoiser.schedule), noise) * (eps - noise)

    def both(self, x_t: Tensor, t: Tensor, cond: Cond, *, two_calls: bool = False) -> tuple[Tensor, Tensor]:
        """Return the noise predicted without and with the prompt, from one call on 2b samples or two on b."""
        empty = {name: self.negative[name].expand_as(value) for name, value in cond.items()}
        if two_calls:
            return self.eps(x_t, t, empty), self.eps(x_t, t, cond)
        joined = {name: torch.cat([empty[name], value]) for name, value in cond.items()}
        without, given = self.eps(torch.cat([x_t, x_t]), torch.cat([t, t]), joined).chunk(2)
        return without, given

    def eps(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the noise predicted without guidance."""
        denoiser = self.teacher.denoiser
        return denoiser.schedule.from_x0(denoiser(x_t, t, cond), x_t, t, "eps")


def ours(guide: Guide, num_draws: int = 1) -> Loss:
    """Return this library's loss: a pass of a frozen encoder, and a guided call without graph for all draws."""
    method = sds(guided(guide.teacher.denoiser, guide.scale, guide.negative))

    def loss(images: Tensor, cond: Cond, generator: Generator) -> Tensor:
        x0 = guide.encode(images)
        return distillation_loss(method, x0, cond, num_draws=num_draws, generator=generator)["loss"]

    return loss


def threestudio(guide: Guide) -> Loss:
    """Return threestudio's loss: every step decodes the image that the teacher expects, for a loss that is off."""
    schedule = guide.teacher.denoiser.schedule

    def loss(images: Tensor, cond: Cond, generator: Generator) -> Tensor:
        latents = guide.encode(images)
        with torch.no_grad():
            t, noise, x_t = guide.draws(latents, generator)
            empty, text = guide.both(x_t, t, cond)
        eps = text + (guide.scale - 1) * (text - empty)
        guide.teacher.decode(schedule.to_x0(eps, x_t, t, "eps"))
        return toward(latents, guide.residual(eps, noise, t))

    return loss


def generfacto(guide: Guide, *, two_calls: bool = False) -> Loss:
    """Return the loss of nerfstudio's generfacto: an encoder that is not frozen, with gradients never cleared.

    generfacto itself guides in one call, and renders one view per step. ``two_calls`` guides in two, as others do.
    Raises ``ValueError`` for a teacher of pixels.
    """
    codec = guide.teacher.codec
    if not isinstance(codec, Codec):
        raise ValueError("the teacher works on pixels and has no encoder to train; pass a latent diffusion model.")
    learning = copy.deepcopy(codec.vae).requires_grad_(True)
    guide = replace(guide, teacher=replace(guide.teacher, codec=replace(codec, vae=learning)))

    def loss(images: Tensor, cond: Cond, generator: Generator) -> Tensor:
        latents = guide.encode(images)
        with torch.no_grad():
            t, noise, x_t = guide.draws(latents, generator)
            empty, text = guide.both(x_t, t, cond, two_calls=two_calls)
        eps = text + (guide.scale - 1) * (text - empty)
        return toward(latents, guide.residual(eps, noise, t))

    return loss


def toward(latents: Tensor, gradient: Tensor) -> Tensor:
    """Return the loss that both use: half the squared distance to where the gradient points."""
    target = (latents - gradient).detach()
    return 0.5 * mse_loss(latents, target, reduction="sum") / len(latents)


def training(loss: Loss, scene: Scene, prompts: Cond, *, num_views: int, size: int) -> Iterator[None]:
    """Run a training; each ``next`` is an iteration: cameras, renders, loss, backward, Adam."""
    optimizer = torch.optim.Adam(scene.parameters(), LEARNING_RATE)
    for step in count():
        rng = Rng(0, step)
        optimizer.zero_grad()
        loss(*observe(scene, prompts, rng, num_views=num_views, size=size), rng("score")).backward()
        optimizer.step()
        yield


def scoring(loss: Loss, images: Tensor, cond: Cond) -> Iterator[None]:
    """Compute gradients with respect to the same renders; each ``next`` is one."""
    for step in count():
        leaf = images.detach().requires_grad_()
        loss(leaf, cond, Rng(0, step)("score")).backward()
        yield


def observe(scene: Scene, prompts: Cond, rng: Rng, *, num_views: int, size: int) -> tuple[Tensor, Cond]:
    """Return renders from the cameras of this step, and the condition of each."""
    views = CAMERAS.draw(num_views, rng("views"))
    images = scene(views, height=size, width=size, background=BACKGROUND, generator=rng("points")).rgb
    return images, view_conditions(prompts, word_bins(views))


def conditions(teacher: Teacher, prompt: str) -> Cond:
    """Return the conditions of the prompt with the four view words."""
    return teacher.prompts(view_prompts(prompt))


def new_scene(dtype: torch.dtype = torch.float32) -> Scene:
    """Return the same scene at each call."""
    return grid_scene().to(dtype)
