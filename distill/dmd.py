"""Distribution matching distillation: DMD (Yin et al. 2023, arXiv 2311.18828) and DMD2 (arXiv 2405.14867).

A student G maps noise to an image. Its images, noised to any t, are pushed along the difference of two scores:
the frozen teacher's of real images, and a fake score that is trained on the student's own images all along. That
is the gradient of KL(p_fake || p_real).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill.adversarial import critic_accuracy, critic_loss, generator_loss, logits_alone
from distill.decoupled import SeparateGuidance, decoupled_gradient
from distill.regression import Regression
from distill.student import Student
from scorefield.denoiser import Cond, Conditioned, Denoiser, NetworkDenoiser
from scorefield.gradient import (
    TIME_NOT_FINITE,
    ScoreDistillation,
    ScoreGradient,
    TimeWeight,
    Weight,
    inject,
    prediction_weight,
    standard_normal,
    time_not_finite,
    weighted_error,
)
from scorefield.guidance import Guided, Perpendicular
from scorefield.randomness import Rng
from scorefield.schedule import Images, PerSample, Schedule, per_sample
from scorefield.times import TimeSampler, uniform
from scorefield.training.loop import EMA, Phase


def dmd_weight(alpha_in_gradient: bool = False, eps: float = 1e-6) -> Weight:
    """1 / mean |x0 - target| of each sample (arXiv 2311.18828, Eq. 8, after the weight cancels sigma^2 / alpha).

    Args:
        alpha_in_gradient: keep the factor alpha(t) of the paper's Eq. 7, which the official code drops. They
            agree for EDM, where alpha is 1.
        eps: smallest divisor, in image units.
    """

    def weight(x0: Tensor, target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        distance = (x0 - target).abs().flatten(1).mean(1).clamp(min=eps)
        scale = schedule.alpha(t) if alpha_in_gradient else torch.ones_like(t)
        return per_sample(scale.to(distance) / distance, x0)

    return weight


@dataclass(frozen=True, kw_only=True)
class GAN:
    """DMD2's adversarial term; the batch then needs real images under "real", with the batch's conditions.

    Attributes:
        generator_weight: of the student's term (3e-3 on ImageNet-64, 1e-3 on SD 1.5, 5e-3 on SDXL). Tied to
            resolution and channels, since the DMD term is a mean over pixels. 0 trains the critic alone.
        critic_weight: of the critic's loss beside the fake score's (1e-2).
        times: of the noise the student's images are shown with, within ``DMD.fake_times``: the critic's.
    """

    generator_weight: float = 3e-3
    critic_weight: float = 1e-2
    times: TimeSampler = uniform(0.0, 1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class DMD:
    """DMD2 with every part a switch.

    A batch is {"cond": Cond}, with "size" if there are no conditions, and with "real" images for the GAN.

    Cost of one cycle of ``student_every`` = 5 iterations in network forwards F (a backward is 2F): student 4 + 3,
    fake score 5 x 3, one teacher and one fake call for the gradient (two F for a guided teacher): 24 F. The GAN
    term adds 5 x 3 + 2 passes that end at the bottleneck: 8.5 F if that is half-way.

    Args:
        teacher: frozen, guided as wished; only the target is guided, never the fake score.
        student: initialised from the teacher.
        fake: initialised from the teacher; with ``gan`` its network is a :class:`distill.adversarial.Critic`.
        shape: of one image.
        times: of the student's gradient; DMD draws 0.02 to 0.98 of the timesteps.
        fake_times: of the fake score's training; the full range.
        fake_weight: of the fake score's loss, by default that of its prediction kind.
        step_key: keyword by which the fake network is told which step of a few-step student made an image, counted
            from 0. Without it, as in DMD2, only the average over the steps is matched to the teacher: the steps
            drift apart and the last one, which people look at, loses modes (measured in LOG.md).
        student_every: fake-score updates per student update: the fake score learns in every iteration, the
            student in every fifth from the same sample (two-time-scale update, arXiv 2405.14867, section 4.2).
        weight: of the gradient; :func:`dmd_weight`.
        gradient_weight: of the distribution matching term.
        gan: the adversarial term, or None.
        regression: teacher pairs (DMD's own term), or None.
        guidance: noise levels of the guidance term, ``times`` being then those of matching (arXiv 2511.22677), or
            None: one draw for both. No effect, and no call, where the teacher is not guided.
    """

    teacher: Denoiser
    student: Student
    fake: NetworkDenoiser
    shape: tuple[int, ...]
    times: TimeSampler = uniform(0.02, 0.98)
    fake_times: TimeSampler = uniform(0.0, 1.0)
    fake_weight: TimeWeight | None = None
    step_key: str | None = None
    student_every: int = 5
    weight: Weight = dmd_weight()
    gradient_weight: float = 1.0
    gan: GAN | None = None
    regression: Regression | None = None
    guidance: SeparateGuidance | None = None

    def __post_init__(self) -> None:
        if self.student_every < 1:
            raise ValueError(
                f"student_every must be at least 1; got {self.student_every}. 5 means five fake-score updates for "
                "each student update."
            )
        self._difference(self.fake)  # or it says why not
        if self.guidance is not None:
            self._check_guidance(self.guidance)

    def _check_guidance(self, guidance: SeparateGuidance) -> None:
        if type(self).gradient is not DMD.gradient:
            raise ValueError(f"the gradient of {type(self).__name__} has no guidance term: guidance must be None.")
        if isinstance(self.teacher, Perpendicular) or (isinstance(self.teacher, Guided) and self.teacher.rescale):
            raise ValueError(
                "guidance at noise levels of its own needs a teacher of guidance.guided with rescale 0; "
                f"{type(self.teacher).__name__} does not split into two terms. Set guidance to None."
            )
        guidance.check(self.student)

    def gradient(self, x0: Images, cond: Cond, fake_cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return weight * (fake - teacher) at one draw of t and noise; ``fake_cond`` adds to or overrides
        ``cond``.
        """
        baseline = Conditioned(self.fake.unwrapped(), fake_cond)
        return self._difference(baseline).gradient(x0, cond, generator=generator)

    def _gradient(self, batch: Mapping[str, Any], generator: Generator) -> ScoreGradient:
        x0, cond, fake_cond = batch["x0"], batch["cond"], batch["fake_cond"]
        if self.guidance is None or not isinstance(self.teacher, Guided):
            return self.gradient(x0, cond, fake_cond, generator=generator)
        x0, times = x0.detach(), self.guidance.times(self.student, batch.get("step", 0))
        return decoupled_gradient(
            self.teacher, Conditioned(self.fake.unwrapped(), fake_cond), x0, cond, weight=self.weight,
            matching=self.noisy(x0, cond, self.times, generator),
            guidance=self.noisy(x0, cond, times, generator),
        )  # fmt: skip

    def _difference(self, baseline: Denoiser) -> ScoreDistillation:
        """Raises ``ValueError`` for a teacher on another schedule."""
        return ScoreDistillation(teacher=self.teacher, baseline=baseline, times=self.times, weight=self.weight)

    @torch.no_grad()
    def check(self, batch: Mapping[str, Any]) -> None:
        """Try every network and every loss on one batch, before any work starts; nothing is learned.

        Raises:
            ValueError: teacher, student and fake score do not agree on shapes, schedules or conditions; the GAN
                term lacks real images or a critic; pairs without states for regression of a few-step student.
        """
        rng = Rng(0, 0)
        batch = self.rollout(batch, (), rng)
        if tuple(batch["x0"].shape[1:]) != self.shape:
            raise ValueError(
                f"the student must return images of shape {self.shape}; got {tuple(batch['x0'].shape[1:])}."
            )
        if self.gan is not None:
            real = batch.get("real")
            if real is None or real.shape != batch["x0"].shape:
                got = "none" if real is None else tuple(real.shape)
                raise ValueError(
                    f'the GAN term needs "real" images {tuple(batch["x0"].shape)} in the batch; got {got}.'
                )
        self.student_loss(batch, rng)
        self.fake_loss(batch, rng)

    def rollout(self, batch: Mapping[str, Any], due: tuple[str, ...], rng: Rng) -> dict[str, Any]:
        """Add the student's images "x0", with gradient if the student is due, their "step" and "fake_cond".

        A few-step student stops at a step drawn in common by all ranks, so that none waits for another.
        """
        learns = "student" in due
        student = self.student if learns else self.student.unwrapped()
        size = _batch_size(batch)
        device = next(student.denoiser.network.parameters()).device
        noise = torch.randn(size, *self.shape, generator=rng("noise")).to(device)
        steps = int(torch.randint(1, student.num_steps + 1, (1,), generator=rng.shared("steps")))
        with torch.set_grad_enabled(learns):
            x0 = student.simulate(noise, batch["cond"], steps=steps, generator=rng("simulation"))
        step = torch.full((size,), steps - 1, device=device)
        told = {self.step_key: step} if self.step_key else {}
        return {**batch, "x0": x0, "step": steps - 1, "fake_cond": told}

    def student_loss(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        """Distribution matching, and the adversarial and regression terms that are switched on."""
        x0, cond = batch["x0"], batch["cond"]
        gradient = self._gradient(batch, rng("gradient"))
        loss = self.gradient_weight * inject(x0, gradient.value) / x0.numel()
        metrics = {**gradient.metrics, "x0_mean": x0.mean(), "x0_std": x0.std()}
        if self.gan is not None and self.gan.generator_weight:
            fake_cond = {**cond, **batch["fake_cond"]}
            t, x_t = self.noisy(x0, fake_cond, self.gan.times, rng("adversarial"))
            metrics["adversarial"] = generator_loss(logits_alone(self.fake.unwrapped(), x_t, t, fake_cond))
            loss = loss + self.gan.generator_weight * metrics["adversarial"]
        if self.regression is not None:
            metrics["regression"] = self.regression.loss(self.student, rng)
            loss = loss + self.regression.weight * metrics["regression"]
        return {"loss": loss, **metrics}

    def fake_loss(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        """Denoising of the student's images; the critic's loss from the same pass and one of the real images."""
        x0, cond = batch["x0"].detach(), {**batch["cond"], **batch["fake_cond"]}
        images = x0 if self.gan is None else torch.cat([x0, batch["real"]])
        t, x_t = self.noisy(images, cond, self.fake_times, rng("fake"))
        n = len(x0)
        prediction, extras = self.fake.with_extras(x_t[:n], t[:n], cond)
        weight = self.fake_weight or prediction_weight(self.fake.kind)
        errors = weighted_error(prediction, x0, t[:n], self.fake.schedule, weight)
        denoising = errors.mean()
        metrics = {"denoising": denoising, TIME_NOT_FINITE: time_not_finite(errors, t[:n])}
        if self.gan is None:
            return {"loss": denoising, **metrics}
        # Past DDP, whose reducer expects every weight to be used; it still averages the sum of both gradients.
        fake_logits, real_logits = extras[0], logits_alone(self.fake.unwrapped(), x_t[n:], t[n:], cond)
        critic = critic_loss(real_logits, fake_logits)
        accuracy = critic_accuracy(real_logits, fake_logits)
        loss = denoising + self.gan.critic_weight * critic
        return {"loss": loss, **metrics, "critic": critic, "critic_accuracy": accuracy}

    def phases(
        self, student_optimizer: Optimizer, fake_optimizer: Optimizer, *, student_ema: EMA | None = None,
        student_lr: LRScheduler | None = None, fake_lr: LRScheduler | None = None,
    ) -> list[Phase]:  # fmt: skip
        """Return the two phases in DMD2's order for :func:`loop.train`, beside ``rollout=dmd.rollout``.

        The student first, then the fake score on the same images of the old student.
        """
        student = Phase(
            name="student", network=self.student.denoiser.network, optimizer=student_optimizer,
            loss=self.student_loss, every=self.student_every, ema=student_ema, lr_schedule=student_lr,
        )  # fmt: skip
        fake = Phase(
            name="fake", network=self.fake.network, optimizer=fake_optimizer,
            loss=self.fake_loss, lr_schedule=fake_lr,
        )  # fmt: skip
        return [student, fake]

    def noisy(self, x0: Images, cond: Cond, times: TimeSampler, generator: Generator) -> tuple[PerSample, Images]:
        """Return the times, drawn first, and x0 noised to them."""
        schedule = self.fake.schedule
        t = times(len(x0), schedule, generator).to(x0.device)
        return t, schedule.diffuse(x0, standard_normal(x0, cond, t, generator), t)


def _batch_size(batch: Mapping[str, Any]) -> int:
    # Unconditional batches have no condition to count; they say their size.
    if "size" not in batch and not batch["cond"]:
        raise ValueError('a batch without conditions must say its "size"; got {"cond": {}}.')
    return int(batch["size"]) if "size" in batch else len(next(iter(batch["cond"].values())))
