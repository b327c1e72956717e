"""Points of the teacher's trajectory, for the warm-up of students of several steps.

The first step of a student sees pure noise; regression teaches it the image that the teacher makes of that noise.
A later step sees a noisy image. There the teacher's own path from the same noise serves: the point x_t on it is a
noisy image, and where the path ends is known, so no call of the teacher is added. The points of many paths at time
t are distributed as the teacher's images noised to t, which is what a finished student shows its later steps.
(Under guidance this holds only nearly: a guided denoiser is not that of a distribution.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from distill.student import Student
from scorefield.denoiser import Cond, Denoiser
from scorefield.randomness import Rng
from scorefield.sampling import initial_noise
from scorefield.schedule import Images, PerSample, Schedule

States = Mapping[float, Tensor]
"""Time -> (n, *shape): where each path stands at that time."""


def through(times: Float[Tensor, " n"], points: Sequence[float]) -> Float[Tensor, " m"]:
    """Return the sampling grid ``times`` with ``points`` added, so that sampling stops at each of them exactly.

    Raises ``ValueError`` for a point above the grid, where sampling would not have begun.
    """
    if not points:
        return times
    if max(points) > float(times[0]):
        raise ValueError(f"states are kept below the first time {float(times[0]):g}; got {max(points):g}.")
    own = torch.tensor(points, dtype=torch.float64, device=times.device)
    # Times that differ by rounding alone are one, and the point's own is kept.
    far = (times.double()[:, None] - own).abs().amin(1) > 1e-9 * float(times[0])
    return torch.cat([times.double()[far], own]).unique().flip(0)


@dataclass(frozen=True, eq=False)
class Recorded:
    """A denoiser that remembers what it was last asked about at some times.

    Attributes:
        denoiser: asked in its place.
        latest: time -> x_t on the CPU; its keys are the times that are remembered.
    """

    denoiser: Denoiser
    latest: dict[float, Tensor]

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the inner denoiser's answer."""
        if self.latest and (time := float(t[0])) in self.latest:  # a GPU waits for the number
            self.latest[time] = x_t.cpu()
        return self.denoiser(x_t, t, cond)


def step_numbers(shares: Sequence[float], batch: int, rng: Rng) -> Int[Tensor, " batch"]:
    """Return which step each sample of a batch teaches, counted from 0: every step its share, to within one
    sample.
    """
    ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    offset = torch.rand((), generator=rng("trajectory"), dtype=torch.float64)
    places = (torch.arange(batch) + offset) / batch * ends[-1]
    return torch.searchsorted(ends, places, right=True).clamp(max=len(shares) - 1)


def inputs(student: Student, noise: Images, states: States, steps: Int[Tensor, " b"]) -> Images:
    """Return what step ``steps[i]`` of the student sees of path i: noise at the first, later the path's point.

    Raises ``ValueError`` where ``states`` lack a time of the student.
    """
    lacking = [t for t in student.times[1:] if t not in states]
    if lacking:
        raise ValueError(
            f"regression of a student of {student.num_steps} steps needs teacher pairs with states at its later "
            f"times {', '.join(f'{t:g}' for t in student.times[1:])}; {', '.join(f'{t:g}' for t in lacking)} "
            "missing. Make them with make_pairs(..., keep=student.times[1:])."
        )
    first = initial_noise(student.denoiser.schedule, noise, student.times[0])
    points = [first, *(states[t].to(first) for t in student.times[1:])]
    return torch.stack(points)[steps.to(noise.device), torch.arange(len(noise), device=noise.device)]
