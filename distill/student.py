"""A one-step or few-step generator, kept together with the times it must be asked at.

A distilled network sampled at another timestep or by another sampler gives poor images and no error. So a
:class:`Student` is a network *and* its schedule, prediction kind and conditioning times, also on disk.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast, get_args

import torch
from safetensors.torch import load_model, save_model
from torch import Generator, nn

from score.denoiser import Cond, NetworkDenoiser
from score.sampling import initial_noise
from score.schedule import Images, Karras, Kind, RectifiedFlow, Schedule, VariancePreserving

WEIGHTS, DESCRIPTION = "model.safetensors", "student.json"


@dataclass(frozen=True, eq=False)
class Student:
    """A generator G: at each time it predicts the clean image, which is noised again to the next time.

    x0 = G(x_t, t), x_s = alpha(s) x0 + sigma(s) eps with fresh eps: DMD2's sampler (arXiv 2405.14867, section
    4.4), which is diffusers' ``LCMScheduler`` without boundary scaling.

    Args:
        denoiser: the network on its schedule.
        times: conditioning times, noisiest first; one per step. One-step students are usually asked at t_max.

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

    def simulate(self, noise: Images, cond: Cond, *, steps: int, generator: Generator | None = None) -> Images:
        """The clean image after ``steps`` steps from standard normal ``noise``; gradient through the last alone.

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
                device = noise.device if generator is None else generator.device
                fresh = torch.randn(noise.shape, generator=generator, device=device, dtype=noise.dtype)
                x_t = schedule.diffuse(inner(x_t, t, cond), fresh.to(noise.device), s).to(noise.dtype)
        return self.denoiser(x_t, times[-1], cond)

    @torch.no_grad()
    def sample(self, noise: Images, cond: Cond, *, generator: Generator | None = None) -> Images:
        """Images from standard normal ``noise`` in all steps; ``generator`` serves the noise between steps."""
        return self.unwrapped().simulate(noise, cond, steps=self.num_steps, generator=generator)

    def unwrapped(self) -> "Student":
        """The same student without a DDP wrapper, for calls that its reducer must not see."""
        return replace(self, denoiser=self.denoiser.unwrapped())


def even_times(schedule: Schedule, num_steps: int) -> tuple[float, ...]:
    """``num_steps`` times evenly spaced from t_max: 1 -> 999; 4 -> 999, 749, 500, 250 for DDPM's thousand."""
    fractions = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    return tuple(schedule.at(fractions).tolist())


def save_student(student: Student, folder: Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Write weights, schedule, prediction kind and conditioning times; load with :func:`load_student`.

    Args:
        student: its network may be wrapped in DDP.
        folder: replaced as a whole, atomically.
        extra: JSON-able facts to keep beside, such as the network's constructor arguments.

    """
    inner = student.unwrapped().denoiser
    description = {
        "format": "scorefield-student-1",
        "schedule": describe_schedule(inner.schedule),
        "kind": inner.kind,
        "time_scale": inner.time_scale,
        "times": list(student.times),
        "extra": dict(extra or {}),
    }
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_model(inner.network, str(temporary / WEIGHTS))
    (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return folder


def load_student(folder: Path, network: nn.Module) -> Student:
    """The student in ``folder``, its weights loaded into ``network``.

    Args:
        folder: written by :func:`save_student`.
        network: built like the saved one; ``student.json`` holds its arguments under "extra" if they were given.

    Raises:
        ValueError: not a student folder, or weights that do not fit the network.

    """
    description = read_description(folder)
    try:
        load_model(network, str(folder / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} do not fit {type(network).__name__}: {error}") from error
    denoiser = NetworkDenoiser(
        network.eval(), restore_schedule(description["schedule"]), description["kind"], description["time_scale"]
    )
    return Student(denoiser, tuple(description["times"]))


def read_description(folder: Path) -> dict[str, Any]:
    """The checked contents of ``student.json``. Raises ``ValueError`` if there is none or it is not one."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a student folder: no readable {DESCRIPTION} ({error}).") from error
    missing = {"format", "schedule", "kind", "time_scale", "times"} - description.keys()
    if missing or description["kind"] not in get_args(Kind):
        raise ValueError(f"{folder / DESCRIPTION} lacks {sorted(missing)} or names an unknown kind.")
    return cast(dict[str, Any], description)


def describe_schedule(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON; :func:`restore_schedule` is the inverse."""
    if isinstance(schedule, VariancePreserving):
        numbers = schedule.alphas_cumprod.tolist()
        return {"family": "VariancePreserving", "alphas_cumprod": numbers, "integer": schedule.integer}
    if isinstance(schedule, Karras | RectifiedFlow):
        return {"family": type(schedule).__name__, **asdict(schedule)}
    raise ValueError(
        f"cannot store a {type(schedule).__name__}; expected Karras, RectifiedFlow, VariancePreserving."
    )


def restore_schedule(description: Mapping[str, Any]) -> Schedule:
    """The schedule that :func:`describe_schedule` wrote."""
    arguments = {name: value for name, value in description.items() if name != "family"}
    match description["family"]:
        case "Karras":
            return Karras(**arguments)
        case "RectifiedFlow":
            return RectifiedFlow(**arguments)
        case "VariancePreserving":
            table = torch.tensor(arguments["alphas_cumprod"], dtype=torch.float64)
            return VariancePreserving(table, integer=arguments["integer"])
        case family:
            raise ValueError(f"unknown schedule {family!r}; expected Karras, RectifiedFlow or VariancePreserving.")
