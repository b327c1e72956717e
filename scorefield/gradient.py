"""One gradient for score distillation: ``weight * (baseline - target)`` in x0 space.

The target is the (guided) frozen teacher. SDS takes x0 itself as the baseline, VSD and DMD a fake score that
follows the student, CSD the unconditional teacher. What remains is the weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from scorefield.denoiser import Cond, Conditioned, Denoiser, under_each
from scorefield.randomness import normal_like
from scorefield.schedule import Images, Kind, PerSample, Schedule, check_kind, per_sample
from scorefield.times import TimeSampler

Weight = Callable[[Tensor, Tensor, Tensor, Schedule], Tensor]
"""(x0, target, t, schedule) -> a tensor that broadcasts against x0; detached inputs."""

TimeWeight = Callable[[Tensor, Schedule], Tensor]
"""(t, schedule) -> (b,) float64."""

NoiseSampler = Callable[[Tensor, Cond, Tensor, Generator], Tensor]
"""(x0, cond, t, generator) -> noise of the shape of x0."""


TIME_NOT_FINITE = "t_not_finite_max"
"""Name of the metric that :func:`time_not_finite` gives."""


def standard_normal(x0: Tensor, cond: Cond, t: Tensor, generator: Generator) -> Tensor:
    """Gaussian noise, the same for a seed on every device."""
    del cond, t
    return normal_like(x0, generator)


def ratio_weight(power: float) -> Weight:
    """Return (alpha / sigma)^power. With power 2 the DMD gradient is the gradient of KL(p_fake || p_real) at t."""

    def weight(x0: Tensor, target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        del target
        return per_sample(schedule.ratio(t) ** -power, x0)

    return weight


def noise_weight(w: TimeWeight) -> Weight:
    """w(t) alpha / sigma: the published w(t) (eps_hat - eps) of SDS, VSD and CSD, stated in x0.

    eps_hat - eps = (alpha / sigma) (x0 - x0_hat), with the alpha of dx_t/dx0 taken into w(t) as DreamFusion does
    (arXiv 2209.14988, Eq. 3).
    """

    def weight(x0: Tensor, target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        del target
        return per_sample(w(t, schedule) / schedule.ratio(t), x0)

    return weight


@dataclass(frozen=True)
class ScoreGradient:
    """A gradient with respect to x0, and what to log about it.

    Attributes:
        value: the shape of x0; descend along it.
        metrics: scalar tensors, never read on the way (no host sync).
    """

    value: Images
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreDistillation:
    """weight * (baseline - target), the common form of SDS, VSD, CSD, SDI and DMD.

    Args:
        teacher: the frozen, usually guided, denoiser.
        baseline: a denoiser on the same schedule, or None for x0 itself (SDS).
        times: how t is drawn.
        weight: of the difference; see :func:`ratio_weight`, :func:`noise_weight`, ``distill.dmd.dmd_weight``.
        noise: how the noise is drawn; SDI replaces this one by inversion.
    """

    teacher: Denoiser
    baseline: Denoiser | None
    times: TimeSampler
    weight: Weight
    noise: NoiseSampler = standard_normal

    def __post_init__(self) -> None:
        if self.baseline is not None and not _same_schedule(self.teacher.schedule, self.baseline.schedule):
            raise ValueError(
                f"teacher and baseline must share a schedule; got {self.teacher.schedule} and "
                f"{self.baseline.schedule}. Wrap one in scorefield.denoiser.rescheduled."
            )

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return the gradient at one draw of t and noise per sample; no gradient reaches any network.

        Raises ``ValueError`` where teacher or baseline change the shape of x0.
        """
        schedule = self.teacher.schedule
        t = self.times(len(x0), schedule, generator).to(x0.device)
        x_t = schedule.diffuse(x0, self.noise(x0, cond, t, generator), t)
        baseline, target = self._ends(x0, x_t, t, cond)
        check_shapes(x0, {"teacher": target, "baseline": baseline})
        return weighted_gap(self.weight(x0, target, t, schedule), baseline - target, t)

    def _ends(self, x0: Images, x_t: Images, t: PerSample, cond: Cond) -> tuple[Tensor, Tensor]:
        one = self.baseline
        if isinstance(one, Conditioned) and one.denoiser is self.teacher and one.cond.keys() <= cond.keys():
            # One network at both ends, as in CSD: one call on 2b, which costs less than two on b.
            baseline, target = under_each(self.teacher, x_t, t, ({**cond, **one.cond}, cond))
            return baseline, target
        return x0 if one is None else one(x_t, t, cond), self.teacher(x_t, t, cond)


def check_shapes(x0: Images, answers: Mapping[str, Images]) -> None:
    """Raise ``ValueError`` naming the denoiser whose answer has not the shape of x0."""
    for name, image in answers.items():
        if image.shape != x0.shape:
            raise ValueError(f"{name} must return the shape of x0 {tuple(x0.shape)}; got {tuple(image.shape)}.")


def weighted_gap(weight: Tensor, gap: Images, t: PerSample) -> ScoreGradient:
    """Return the gradient ``weight * gap`` and its figures for the log; ``weight`` broadcasts against the gap."""
    return described(weight * gap, gap, t)


def described(value: Images, gap: Images, t: PerSample) -> ScoreGradient:
    """Return a gradient and what is worth logging of it: its size, that of the gap between two denoisers, the
    times.
    """
    metrics = {"gradient_rms": _rms(value), "gap_rms": _rms(gap), "t_mean": t.mean()}
    return ScoreGradient(value, {**metrics, TIME_NOT_FINITE: time_not_finite(value, t)})


def inject(x0: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return a scalar whose gradient with respect to x0 is exactly ``gradient``; the scalar is float32 or better.

    An inner product: the usual ``0.5 * (x0 - (x0 - gradient).detach())**2`` rounds the gradient away in low
    precision (80 % error in bf16 where it is a thousandth of x0). The value itself means nothing; log the
    gradient's norm. Divide by the batch (SDS) or by numel (DMD) as the published learning rates assume.
    """
    # In half precision the sum itself would overflow to inf, which a watch on losses takes for a failure.
    dtype = torch.promote_types(x0.dtype, torch.float32)
    return (x0.to(dtype) * gradient.detach().to(dtype)).sum()


def prediction_weight(kind: Kind) -> TimeWeight:
    """Return the weight that turns the error of x0 into the squared error of eps, v or flow; 1 for x0.

    At sigma = 0, where only x0 can be read off the image, it is finite and the error of the others is 0.
    """
    check_kind(kind)

    def weight(t: Tensor, schedule: Schedule) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        slope = {"x0": torch.ones_like(sigma), "eps": alpha, "v": alpha**2 + sigma**2, "flow": alpha + sigma}[kind]
        return slope**2 if kind == "x0" else (slope / sigma.clamp(min=1e-5)) ** 2

    return weight


def karras_weight(sigma_data: float = 0.5) -> TimeWeight:
    """Return (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (arXiv 2206.00364, Table 1), in terms of sigma /
    alpha.
    """

    def weight(t: Tensor, schedule: Schedule) -> Tensor:
        ratio = schedule.ratio(t)
        return 1 / ratio**2 + 1 / sigma_data**2

    return weight


def min_snr_weight(gamma: float = 5.0) -> TimeWeight:
    """min(SNR, gamma) with SNR = (alpha / sigma)^2: easy, nearly clean images count no more than gamma.

    In x0 it is the same for every prediction kind: min(SNR, gamma) / SNR times the eps loss, over SNR + 1 for v
    (Hang et al. 2023, arXiv 2303.09556, section 3.4). Raises ``ValueError`` unless gamma is above 0.
    """
    if not gamma > 0:
        raise ValueError(f"gamma of min-SNR must be above 0; got {gamma}. The paper uses 5.")

    def weight(t: Tensor, schedule: Schedule) -> Tensor:
        return (schedule.ratio(t) ** -2).clamp(max=gamma)

    return weight


def denoising_loss(
    denoiser: Denoiser, x0: Images, cond: Cond, *, times: TimeSampler, weight: TimeWeight, generator: Generator
) -> PerSample:
    """weight(t) times the mean squared error of the denoised image, per sample.

    What every network with a score learns by: teachers, fake scores, VSD adapters, ControlNets. With
    ``prediction_weight("eps")`` it is DDPM's L_simple, with :func:`karras_weight` EDM's loss.
    """
    return denoising_errors(denoiser, x0, cond, times=times, weight=weight, generator=generator)[0]


def denoising_errors(
    denoiser: Denoiser, x0: Images, cond: Cond, *, times: TimeSampler, weight: TimeWeight, generator: Generator
) -> tuple[PerSample, PerSample]:
    """:func:`denoising_loss`, and the times it was measured at."""
    schedule = denoiser.schedule
    t = times(len(x0), schedule, generator).to(x0.device)
    x_t = schedule.diffuse(x0, standard_normal(x0, cond, t, generator), t)
    return weighted_error(denoiser(x_t, t, cond), x0, t, schedule, weight), t


def weighted_error(prediction: Images, x0: Images, t: Tensor, schedule: Schedule, weight: TimeWeight) -> PerSample:
    """weight(t) times the mean squared error of ``prediction`` against x0, per sample."""
    error = (prediction - x0).square().flatten(1).mean(1)
    return weight(t, schedule).to(error) * error


def time_not_finite(values: Tensor, t: PerSample) -> Tensor:
    """Return the largest time of the samples whose values are not finite, -1 if all are; a scalar, read only on
    failure.

    A loss returns it under :data:`TIME_NOT_FINITE`, so that a run that stops can say at which noise level.
    """
    bad = ~values.detach().reshape(len(values), -1).isfinite().all(1)
    return torch.where(bad, t.double(), -1.0).max()


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()


def _same_schedule(a: Schedule, b: Schedule) -> bool:
    if a is b:
        return True
    t = torch.linspace(a.t_min, a.t_max, 16, dtype=torch.float64)
    ends_agree = type(a) is type(b) and (a.t_min, a.t_max) == (b.t_min, b.t_max)
    return ends_agree and torch.equal(a.alpha(t), b.alpha(t)) and torch.equal(a.sigma(t), b.sigma(t))
