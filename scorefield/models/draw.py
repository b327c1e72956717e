"""Images from a teacher or a student; image i depends on the seed and i alone, whatever the batch and the rank."""

from collections.abc import Iterable

import torch
from torch import Tensor

from scorefield.models.student import Student
from scorefield.models.teacher import Teacher
from scorefield.randomness import derived_generator
from scorefield.sampling import initial_noise, sample
from scorefield.solvers import Plan, plan


@torch.no_grad()
def draw(
    teacher: Teacher, parts: Iterable[Tensor], labels: Tensor, *, seed: int = 0, guidance: float = 1.0,
    chosen: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Return the images of some numbers, (n, c, h, w) in about [-1, 1] on the CPU.

    Args:
        teacher: a teacher, or a student, which knows its own times.
        parts: numbers of images, batch by batch.
        labels: of all images; image i is of ``labels[i]``.
        seed: of all images.
        guidance: scale of a teacher's classifier-free guidance; 1 means none.
        chosen: how a teacher is sampled; None: ``solvers.plan`` in 50 network calls.
    """
    made = [_batch(teacher, part, labels[part], seed, guidance, chosen) for part in parts if len(part)]
    return torch.cat(made) if made else torch.zeros(0, *teacher.image_shape)


def _batch(
    teacher: Teacher, part: Tensor, labels: Tensor, seed: int, guidance: float, chosen: Plan | None
) -> Tensor:
    generators = [derived_generator(seed, "sample", int(number)) for number in part]
    noise = torch.stack([torch.randn(teacher.shape, generator=generator) for generator in generators])
    noise = noise.to(teacher.device)
    cond = teacher.cond(labels.to(teacher.device))
    if teacher.times:
        x0 = Student(teacher.denoiser, teacher.times).sample(noise, cond, generator=generators)
        return teacher.decode(x0).cpu()
    denoiser = teacher.guided(guidance)
    chosen = chosen or plan(denoiser.schedule, 50, shift=teacher.shift)
    x_t = initial_noise(denoiser.schedule, noise, float(chosen.times[0]))
    x0 = sample(denoiser, x_t, cond, times=chosen.times, step=chosen.step, generator=generators)
    return teacher.decode(x0).float().cpu()
