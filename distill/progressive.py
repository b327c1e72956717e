"""Progressive distillation: a student that does in one step what its teacher does in two, again and again.

With N steps of the teacher, the first student needs N / 2, and is the teacher of the next one (Salimans and Ho
2022, arXiv 2202.00512, Algorithm 2); log2(N) stages end in one step. A guided teacher is absorbed in the first
stage, at one scale of guidance (Meng et al. 2023, arXiv 2210.03142, section 3.1, where that is a stage of its
own). All stages are one run: the student of the stage before is a copy of the network that stands still, and a
checkpoint holds both.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distill.consistency import Consistency
from distill.regression import squared_error
from scorefield.denoiser import Cond
from scorefield.randomness import Rng, normal_like
from scorefield.sampling import mix
from scorefield.schedule import Images, PerSample, Schedule
from scorefield.training.loop import EMA

WARMUP = 20
"""Updates over which the learning rate rises in each stage, at most a tenth of the stage."""


def angle_times(schedule: Schedule, number: int, highest: float) -> Float[Tensor, " n"]:
    """Return ``number`` falling times from ``highest``, even in arctan(sigma / alpha), without the end; float64.

    On the paper's cosine schedule, alpha = cos(pi t / 2), these are even times.

    Args:
        schedule: of teacher and student.
        number: of the teacher's steps.
        highest: first time.

    Raises:
        ValueError: a number that is no power of two above 1, or more than the schedule has timesteps for.
    """
    if number < 2 or number & (number - 1):
        raise ValueError(f"progressive distillation halves a number of steps: 2, 4, 8, 16, ...; got {number}.")
    first = schedule.ratio(torch.tensor(highest, dtype=torch.float64)).atan()  # pi / 2 of pure noise
    levels = (first * torch.linspace(1, 0, number + 1, dtype=torch.float64)[1:-1]).tan()
    inner = schedule.snap(schedule.time(levels).clamp(schedule.t_min, schedule.t_max))
    times = torch.cat([torch.tensor([highest], dtype=torch.float64), inner])
    if not bool((times.diff() < 0).all()):
        raise ValueError(f"{schedule} has no {number} distinct times below {highest:g}. Start with fewer steps.")
    return times


@dataclass(frozen=True, kw_only=True, eq=False)
class Progressive(Consistency):
    """Progressive distillation to one step.

    ``path`` holds the times of the first teacher, and ``average`` is the student of the stage before.
    Cost of an iteration in network forwards (a backward is two): teacher 2, student 3.

    Args:
        stage_steps: iterations of a stage; the last one goes on from there.
    """

    stage_steps: int = 1

    @property
    def num_stages(self) -> int:
        """Number of halvings."""
        return int(math.log2(len(self.path)))

    def stage(self, step: int) -> int:
        """Return the stage, from 0, of an iteration, from 0."""
        return min(step // self.stage_steps, self.num_stages - 1)

    def _disagreement(self, x0: Images, cond: Cond, rng: Rng) -> tuple[Tensor, PerSample, PerSample]:
        stage = self.stage(rng.step)
        stride, schedule = 2**stage, self.teacher.schedule
        place = torch.randint(len(self.path) // (2 * stride), (len(x0),), generator=rng("points")) * 2 * stride
        path = torch.cat([self.path, self.path.new_zeros(1)]).to(x0.device)  # its last entry is not asked for
        last = len(self.path)
        t, mid, s = (path[(place + skip).to(x0.device)].float() for skip in (0, stride, 2 * stride))
        clean = (place + 2 * stride == last).to(x0.device)
        x_t = schedule.diffuse(x0, normal_like(x0, rng("noise")), t)
        target = self.two_steps(x_t, (t, mid, s), clean, cond, stage)
        made = self.student.denoiser(x_t, t, cond)
        # Truncated signal-to-noise, Eq. 9: an error of the first step, from pure noise, counts as well.
        weight = (schedule.alpha(t) / schedule.sigma(t)).square().clamp(min=1)
        errors = squared_error(made, target)
        return (weight.to(errors) * errors).mean(), errors.detach(), t

    @torch.no_grad()
    def two_steps(
        self, x_t: Images, times: tuple[PerSample, PerSample, PerSample], clean: Tensor, cond: Cond, stage: int
    ) -> Images:
        """Return the image with which one DDIM step leads where two of the stage's teacher lead.

        Args:
            x_t: noisy images.
            times: of x_t, half-way, and of the end.
            clean: (b,) True where the end is the clean image, whatever its time.
            cond: of the teacher.
            stage: 0 asks ``teacher``, others ask ``average``.
        """
        denoiser, schedule = self.teacher if stage == 0 else self.average, self.teacher.schedule
        if denoiser is None:
            raise ValueError("progressive distillation needs the student of the stage before, as average.")
        t, mid, s = times
        start, half = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, mid))
        end = (schedule.alpha(s).where(~clean, 1.0), schedule.sigma(s).where(~clean, 0.0))
        x_mid = moved(x_t, denoiser(x_t, t, cond).to(x_t.dtype), start, half)
        x_s = moved(x_mid, denoiser(x_mid, mid, cond).to(x_t.dtype), half, end)
        keep = end[1] / start[1]  # DDIM's step, solved for the image
        share = end[0] - keep * start[0]
        return mix(x_s, 1 / share, x_t, -keep / share)


Level = tuple[PerSample, PerSample]
"""(alpha, sigma) of each sample."""


def moved(x_t: Images, x0: Images, start: Level, end: Level) -> Images:
    """Return DDIM's deterministic step from one noise level to another (arXiv 2202.00512, Eq. 8)."""
    keep = end[1] / start[1]
    return mix(x_t, keep, x0, end[0] - keep * start[0])


class StageTeacher(EMA):
    """The student of the stage before: it stands still, and follows the network at the end of each stage.

    Args:
        network: the student's.
        stage_steps: updates of a stage.
        num_stages: of them.
        steps: updates in all, after which it follows, too.
    """

    def __init__(self, network: nn.Module, stage_steps: int, num_stages: int, steps: int) -> None:
        super().__init__(network, 0.0)
        self.ends = {*(stage_steps * stage for stage in range(1, num_stages)), steps}

    @torch.no_grad()
    def update(self) -> None:
        """Count an update, and follow at the end of a stage."""
        self.num_updates += 1
        if self.num_updates in self.ends:
            count = self.num_updates
            self.reset()
            self.num_updates = count


def rate_of_stages(optimizer: Optimizer, method: Progressive, steps: int, constant: bool) -> LambdaLR:
    """Return a rate that falls to zero in each stage and starts again, as the paper's; or one that stays."""

    def factor(update: int) -> float:
        stage = method.stage(update)
        begin = stage * method.stage_steps
        length = (steps if stage == method.num_stages - 1 else begin + method.stage_steps) - begin
        rise = min(1.0, (update - begin + 1) / max(1, min(WARMUP, length // 10)))
        return rise * (1.0 if constant else max(0.0, 1 - (update - begin) / max(1, length)))

    return LambdaLR(optimizer, factor)
