"""A one-step or few-step generator, kept together with the times it must be asked at.

A distilled network sampled at another timestep or by another sampler gives poor images and no error. So a
:class:`Student` is a network *and* its schedule, prediction kind and conditioning times, also on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scorefield.denoiser import Cond, NetworkDenoiser
from scorefield.models.storage import TIMES, load_denoiser, read_facts, save_denoiser
from scorefield.randomness import Generators, normal_like
from scorefield.sampling import initial_noise
from scorefield.schedule import Images


@dataclass(frozen=True, eq=False)
class Student:
    """A generator G: at each time it predicts the clean image, which is noised again to the next time.

    x0 = G(x_t, t), x_s = alpha(s) x0 + sigma(s) eps with fresh eps: DMD2's sampler (arXiv 2405.14867, section
    4.4), which is diffusers' ``LCMScheduler`` without boundary scaling.

    Args:
        denoiser: the network on its schedule.
        times: conditioning times, noisiest first; one per step. See :mod:`distill.student`.
    """

    denoiser: NetworkDenoiser
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        schedule, falling = (self.denoiser.schedule, all(a > b for a, b in pairwise(self.times)))
        if not self.times or not falling:
            raise ValueError(f"times must fall strictly, one per step; got {self.times}.")
        if not schedule.t_min <= self.times[-1] <= self.times[0] <= schedule.t_max * (1 + 1e-6):
            raise ValueError(
                f"times must lie in [{schedule.t_min}, {schedule.t_max}] of {schedule}; got {self.times}."
            )

    @property
    def num_steps(self) -> int:
        """Network calls per image."""
        return len(self.times)

    def simulate(self, noise: Images, cond: Cond, *, steps: int, generator: Generators | None = None) -> Images:
        """Return the clean image after ``steps`` steps from standard normal ``noise``; gradient through the last
        alone.

        DMD2's backward simulation: the input of a training step is the student's own, as at inference.
        """
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"steps must lie in [1, {self.num_steps}]; got {steps}.")
        schedule = self.denoiser.schedule
        x_t = initial_noise(schedule, noise, self.times[0])
        times = [torch.full((len(noise),), t, device=noise.device) for t in self.times[:steps]]
        with torch.no_grad():
            inner = self.unwrapped().denoiser
            for t, s in pairwise(times):
                x_t = schedule.diffuse(inner(x_t, t, cond), normal_like(noise, generator), s).to(noise.dtype)
        return self.denoiser(x_t, times[-1], cond)

    @torch.no_grad()
    def sample(self, noise: Images, cond: Cond, *, generator: Generators | None = None) -> Images:
        """Return images from standard normal ``noise`` in all steps; ``generator`` draws noise between them."""
        return self.unwrapped().simulate(noise, cond, steps=self.num_steps, generator=generator)

    def unwrapped(self) -> "Student":
        """Return the same student without a DDP wrapper, for calls that its reducer must not see."""
        return replace(self, denoiser=self.denoiser.unwrapped())


def save_student(student: Student, folder: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Write weights, schedule, prediction kind and conditioning times; load with :func:`load_student`.

    Args:
        student: its network may be wrapped in DDP.
        folder: replaced as a whole.
        facts: JSON-able facts to keep beside, such as the network's constructor arguments.
    """
    return save_denoiser(student.unwrapped().denoiser, folder, {**(facts or {}), TIMES: list(student.times)})


def load_student(folder: Path, network: nn.Module) -> Student:
    """Return the student in ``folder``, its weights loaded into ``network``.

    Args:
        folder: written by :func:`save_student`.
        network: built like the saved one; :func:`scorefield.models.storage.read_facts` tells how, if it was told.

    Raises:
        ValueError: not a student folder, or weights that do not fit the network.
    """
    times = read_facts(folder).get(TIMES)
    if times is None:
        raise ValueError(f"{folder} holds a denoiser but no {TIMES!r}: a teacher, not a student.")
    return Student(load_denoiser(folder, network), tuple(times))
