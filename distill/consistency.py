"""Consistency distillation: the student gives the same image for every point of a path of the teacher.

The probability-flow path of the teacher through a noisy image ends in a clean one. A consistency function maps all
points of a path to that end (Song et al. 2023, arXiv 2303.01469, Definition 1). No fake score and no pairs are
needed: two neighbours on a path, one step of the teacher apart, are asked to agree, and at the end of time, where
little noise is left, the teacher itself says what the image is. With a guided teacher this is latent consistency
distillation at one scale of guidance (LCM, arXiv 2310.04378); more than one step is sampled as
:class:`scorefield.models.student.Student` does, by noising again (Algorithm 1 of 2303.01469).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill.regression import Distance, Regression, pseudo_huber, squared_error
from distill.student import Student
from scorefield.denoiser import Cond, Denoiser, NetworkDenoiser
from scorefield.gradient import TIME_NOT_FINITE, inject, time_not_finite
from scorefield.randomness import Rng, normal_like
from scorefield.sampling import Step, ddim
from scorefield.schedule import Images, PerSample, Schedule, per_sample
from scorefield.times import TimeSampler, log_normal
from scorefield.training.loop import EMA, Phase

LOWEST, HIGHEST = 0.02, 80.0
"""Noise levels sigma / alpha of a path's last point, since less is not seen in an image of unit scale, and of its
second one at most, EDM's: what is noisier is next to pure noise (a flow begins at infinity)."""

RHO = 7.0
"""Exponent of the spacing of noise levels (arXiv 2206.00364, Eq. 5)."""


def path_times(schedule: Schedule, number: int, highest: float) -> Float[Tensor, " n"]:
    """Return up to ``number`` times of falling noise, spaced as EDM's, from time ``highest``; float64.

    Integer timesteps that would be the same are left out, so there may be fewer. Raises ``ValueError`` for less
    than two.
    """
    first = float(schedule.ratio(torch.tensor(highest, dtype=torch.float64)).clamp(max=HIGHEST))
    ends = first ** (1 / RHO), min(LOWEST, first / 2) ** (1 / RHO)
    levels = torch.linspace(*ends, max(1, number), dtype=torch.float64) ** RHO
    times = schedule.snap(schedule.time(levels).clamp(schedule.t_min, schedule.t_max))
    times = torch.cat([torch.tensor([highest], dtype=torch.float64), times[1:]])
    kept = torch.cat([torch.ones(1, dtype=torch.bool), times[1:] < torch.cummin(times, 0).values[:-1]])
    if number < 2 or int(kept.sum()) < 2:
        raise ValueError(f"a path needs at least 2 times; got {number} on {schedule}. 18 to 50 are usual.")
    return times[kept]


@dataclass(frozen=True, kw_only=True, eq=False)
class Consistency:
    """Consistency distillation in discrete time (arXiv 2303.01469, Algorithm 2).

    A batch is {"cond": Cond, "real": images}; the images may be the teacher's own. Cost of an iteration with DDIM
    in network forwards (a backward is two): teacher 1, target 1, student 3.

    Args:
        teacher: frozen, guided as wished.
        student: initialised from the teacher; its first time is the first of ``path``.
        shape: of one image.
        path: (n,) falling times of the points that are compared; :func:`path_times`.
        step: of the teacher along its path: :func:`scorefield.sampling.ddim` (), as LCM, or ``heun()`` as the
            paper, which costs one call more.
        distance: between the two images; the paper's best is LPIPS, a pseudo-Huber norm needs no network
            (arXiv 2310.14189, section 3.3).
        regression: teacher pairs beside it, or None.
        average: moving average of the student's network, which gives the target (the paper's theta minus). None:
            the student itself without gradient, as in iCT; on a path of a teacher it drifts (LOG.md).
    """

    teacher: Denoiser
    student: Student
    shape: tuple[int, ...]
    path: Float[Tensor, " n"]
    step: Step = ddim()
    distance: Distance = pseudo_huber()
    regression: Regression | None = None
    average: NetworkDenoiser | None = None

    def rollout(self, batch: Mapping[str, Any], due: tuple[str, ...], rng: Rng) -> dict[str, Any]:
        """Return the batch as it is: no image of the student is needed."""
        del due, rng
        return dict(batch)

    @torch.no_grad()
    def check(self, batch: Mapping[str, Any]) -> None:
        """Try the loss on one batch, before any work starts.

        Raises:
            ValueError: images of another shape, or a student on another schedule than its teacher.
        """
        real = batch.get("real")
        if real is None or tuple(real.shape[1:]) != self.shape:
            got = "none" if real is None else tuple(real.shape[1:])
            raise ValueError(f'consistency needs "real" images of shape {self.shape} in the batch; got {got}.')
        if repr(self.teacher.schedule) != repr(self.student.denoiser.schedule):
            raise ValueError(
                f"teacher and student must be on one schedule; got {self.teacher.schedule} and "
                f"{self.student.denoiser.schedule}."
            )
        self.student_loss(batch, Rng(0, 0))

    def student_loss(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        """Disagreement along the path, and the regression if there is one."""
        x0, cond = batch["real"], batch["cond"]
        loss, errors, t = self._disagreement(x0, cond, rng)
        metrics = {"consistency": errors.mean(), TIME_NOT_FINITE: time_not_finite(errors, t)}
        if self.regression is not None:
            metrics["regression"] = self.regression.loss(self.student, rng)
            loss = loss + self.regression.weight * metrics["regression"]
        return {"loss": loss, **metrics}

    def denoising_loss(self, batch: Mapping[str, Any], rng: Rng) -> Tensor:
        """Squared error of the student's images, for a test of learning rates.

        A student that is the teacher agrees with itself almost everywhere: its disagreement falls at no rate.
        """
        x0, cond = batch["real"], batch["cond"]
        t = self.path.to(x0.device)[torch.randint(len(self.path), (len(x0),), generator=rng("points"))].float()
        x_t = self.teacher.schedule.diffuse(x0, normal_like(x0, rng("noise")), t)
        return squared_error(self.student.denoiser(x_t, t, cond), x0).mean()

    def _disagreement(self, x0: Images, cond: Cond, rng: Rng) -> tuple[Tensor, PerSample, PerSample]:
        path = self.path.to(x0.device)
        place = torch.randint(len(path), (len(x0),), generator=rng("points")).to(x0.device)
        last = place == len(path) - 1
        t, s = path[place].float(), path[torch.where(last, place, place + 1)].float()
        x_t = self.teacher.schedule.diffuse(x0, normal_like(x0, rng("noise")), t)
        target = self.target(x_t, t, s, last, cond)
        errors = self.distance(self.student.denoiser(x_t, t, cond), target)
        return errors.mean(), errors.detach(), t

    @torch.no_grad()
    def target(self, x_t: Images, t: PerSample, s: PerSample, last: Tensor, cond: Cond) -> Images:
        """Return what the student says one step of the teacher further on; where ``last``, what the teacher says.

        So the boundary condition f(x, t_min) = x needs no skip connection (the paper's Eq. 5).
        """
        watched = _Watched(self.teacher)
        x_s = self.step(watched, x_t, t, s, cond, None).to(x_t.dtype)
        further = (self.average or self.student.unwrapped().denoiser)(x_s, s, cond)
        return torch.where(last.reshape(-1, *[1] * (x_t.ndim - 1)), watched.first.to(further), further)

    def phases(
        self, optimizer: Optimizer, *, ema: EMA | None = None, lr_schedule: LRScheduler | None = None
    ) -> list[Phase]:
        """Return the only phase for :func:`loop.train`, the student's."""
        return [
            Phase(
                name="student", network=self.student.denoiser.network, optimizer=optimizer,
                loss=self.student_loss, ema=ema, lr_schedule=lr_schedule,
            )
        ]  # fmt: skip


class _Watched:
    # A denoiser whose first answer is kept: that at the beginning of a step.
    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.first = denoiser, torch.empty(0)

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        answer = self.denoiser(x_t, t, cond)
        self.first = self.first if self.first.numel() else answer
        return answer


@dataclass(frozen=True, kw_only=True, eq=False)
class ContinuousConsistency(Consistency):
    """Consistency distillation in continuous time: no steps, and no error of steps (sCM, arXiv 2410.11081).

    Along a path dx_t / dt the image f(x_t, t) must not change. With f's rate of change by the noise level,
    g = df / dlog(sigma / alpha), the gradient of the squared disagreement of two neighbours, divided by their
    distance, is g itself (2303.01469, Theorem 5), and f is moved against g / (rms(g) + c), each sample by as
    much (2410.11081, section 4.1). g is one forward-mode derivative of the network, for which attention is
    computed without fused kernels.

    Args:
        times: of the points, within those of ``path``; log(sigma / alpha) ~ N(-0.8, 1.6^2), the paper's.
        softening: c, in image units.
    """

    times: TimeSampler = log_normal(-0.8, 1.6)
    softening: float = 0.1

    def _disagreement(self, x0: Images, cond: Cond, rng: Rng) -> tuple[Tensor, PerSample, PerSample]:
        schedule = self.teacher.schedule
        t = self.times(len(x0), schedule, rng("points")).to(x0.device)
        # Pure noise, at which a flow begins and a schedule of zero terminal signal-to-noise, has no z = x / alpha.
        noisiest = self.path[0] if bool(schedule.alpha(self.path[0]) > 0) else self.path[1]
        t = t.clamp(float(self.path[-1]), float(noisiest))
        x_t = schedule.diffuse(x0, normal_like(x0, rng("noise")), t)
        g = rate_of_change(self.student.unwrapped().denoiser, self.teacher, x_t, t, cond)
        size = g.flatten(1).square().mean(1).sqrt()
        gradient = g / per_sample(size + self.softening, g)
        image = self.student.denoiser(x_t, t, cond)
        return inject(image, gradient) / image.numel(), size, t


@torch.no_grad()
def rate_of_change(student: NetworkDenoiser, teacher: Denoiser, x_t: Images, t: PerSample, cond: Cond) -> Images:
    """Return df / dlog(sigma / alpha) of the student's image f along the teacher's probability-flow path.

    In z = x / alpha against r = sigma / alpha the path is dz / dlog r = z - x0_hat, on every schedule.

    Args:
        student: asked with a forward-mode derivative.
        teacher: on the same schedule.
        x_t: noisy images.
        t: (b,) their times, with 0 < sigma / alpha < inf.
        cond: of both.
    """
    schedule, at, ones = teacher.schedule, t.double(), torch.ones_like(t, dtype=torch.float64)
    by_time = torch.func.jvp(lambda u: schedule.ratio(u).log(), (at,), (ones,))[1]
    alpha, alpha_by_time = schedule.alpha(at), torch.func.jvp(schedule.alpha, (at,), (ones,))[1]
    x0_hat = teacher(x_t, t, cond).to(x_t.dtype)
    z = x_t / per_sample(alpha, x_t)
    x_rate = per_sample(alpha, x_t) * (z - x0_hat) + per_sample(alpha_by_time / by_time, x_t) * z
    t_rate = (1 / by_time).to(t.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        rate: Tensor = torch.func.jvp(lambda x, u: student(x, u, cond), (x_t, t), (x_rate, t_rate))[1]
    return rate
