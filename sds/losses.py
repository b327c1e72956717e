"""Score distillation in one form: a gradient with respect to a rendered image, or to its latent.

    SDS                 w (eps_s - eps)
    CSD                 w scale (eps_c - eps_n)
    VSD                 w (eps_s - eps_phi)
    x0-reconstruction   w (x0 - x0_s), which is SDS with another w

eps_s is the guided teacher and x0_s the image it expects, eps_c and eps_n are its answers with and without the
prompt, eps_phi is the score of the scene's own renders. In x0 all of them are ``weight * (baseline - target)``,
whatever the teacher predicts, so each is a :class:`gradient.ScoreDistillation`. :class:`VSD` is the third with an
eps_phi that learns; :class:`DDS`, which edits, compares two images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scorefield.denoiser import Cond, Conditioned, Denoiser, NetworkDenoiser, expand_cond
from scorefield.gradient import (
    TIME_NOT_FINITE,
    NoiseSampler,
    ScoreDistillation,
    ScoreGradient,
    TimeWeight,
    denoising_errors,
    noise_weight,
    prediction_weight,
    standard_normal,
    time_not_finite,
    weighted_gap,
)
from scorefield.randomness import Rng
from scorefield.schedule import Images, PerSample, Schedule, per_sample
from scorefield.times import TimeSampler, uniform
from scorefield.training.loop import Phase

TIMES = uniform(0.02, 0.98)
"""DreamFusion's: the ends, where a network is at its worst, are left out."""

CAMERA = "camera"
"""The key of the camera in ``cond``: camera-to-world matrices, zeros are "no camera in particular"."""


class Distillation(Protocol):
    """What all losses of this package are."""

    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """The gradient with respect to x0, at one draw of t and noise per sample; no graph is kept."""


def sigma_squared(t: Tensor, schedule: Schedule) -> Tensor:
    """Sigma^2, DreamFusion's (arXiv 2209.14988, appendix A.2)."""
    return schedule.sigma(t) ** 2


def unit(t: Tensor, schedule: Schedule) -> Tensor:
    """One; DreamFusion found it about as good."""
    return torch.ones_like(schedule.sigma(t))


def alpha_sigma_squared(t: Tensor, schedule: Schedule) -> Tensor:
    """Alpha sigma^2: Fantasia3D's weight for geometry (arXiv 2303.13873), small at both ends of time."""
    return schedule.alpha(t) * schedule.sigma(t) ** 2


def noise_to_signal(t: Tensor, schedule: Schedule) -> Tensor:
    """Sigma / alpha, which turns eps_s - eps into x0 - x0_s; infinite where alpha is 0."""
    return schedule.ratio(t)


def sds(
    teacher: Denoiser, *, times: TimeSampler = TIMES, w: TimeWeight = sigma_squared,
    noise: NoiseSampler = standard_normal,
) -> ScoreDistillation:  # fmt: skip
    """Score distillation sampling: w(t) (eps_s - eps) (Poole et al. 2022, arXiv 2209.14988, Eq. 3).

    Args:
        teacher: guided as wished; DreamFusion's 100 for Stable Diffusion, in its notation, is ``guided`` with 101.
        times: how t is drawn.
        w: weight of the published residual; on EDM's schedule, whose sigma goes to 80, it is not bounded by 1.
        noise: how the noise is drawn.
    """
    return ScoreDistillation(teacher=teacher, baseline=None, times=times, weight=noise_weight(w), noise=noise)


def csd(
    denoiser: Denoiser, negative: Cond, *, scale: float = 1.0, times: TimeSampler = TIMES,
    w: TimeWeight = sigma_squared, noise: NoiseSampler = standard_normal,
) -> ScoreDistillation:  # fmt: skip
    """Classifier score distillation: w(t) scale (eps_c - eps_n) (Yu et al. 2023, arXiv 2310.19415).

    SDS without its generative half: what large guidance scales tend to. One network call on 2b samples.

    Args:
        denoiser: conditional, without guidance.
        negative: the null condition; with a negative prompt it is the direction from there to the wanted one.
        scale: of the gradient, as SDS's guidance scale multiplies this term.
        times: how t is drawn.
        w: weight of the published difference.
        noise: how the noise is drawn.
    """

    def scaled(t: Tensor, schedule: Schedule) -> Tensor:
        return scale * w(t, schedule)

    baseline = Conditioned(denoiser, negative)
    return ScoreDistillation(
        teacher=denoiser, baseline=baseline, times=times, weight=noise_weight(scaled), noise=noise
    )


def vsd(
    teacher: Denoiser, phi: Denoiser, *, times: TimeSampler = TIMES, w: TimeWeight = sigma_squared,
    noise: NoiseSampler = standard_normal,
) -> ScoreDistillation:  # fmt: skip
    """Variational score distillation: w(t) (eps_s - eps_phi) (Wang et al. 2023, arXiv 2305.16213, Eq. 9).

    Args:
        teacher: guided as wished; ProlificDreamer uses 7.5.
        phi: the score of the distribution of the scene's renders; :class:`sds.losses.VSD` learns it.
        times: how t is drawn.
        w: weight of the published difference.
        noise: how the noise is drawn.
    """
    return ScoreDistillation(teacher=teacher, baseline=phi, times=times, weight=noise_weight(w), noise=noise)


def x0_reconstruction(
    teacher: Denoiser, *, times: TimeSampler = TIMES, w: TimeWeight = unit, noise: NoiseSampler = standard_normal
) -> ScoreDistillation:
    """w(t) (x0 - x0_s): MVDream's loss w / 2 |x0 - x0_s|^2 with x0_s held constant (arXiv 2308.16512).

    With w = 1 it is SDS under :func:`noise_to_signal`. MVDream guides with ``guided(denoiser, 50, negative,
    rescale=0.5)``: at such scales x0_s is over-saturated without ``rescale``.

    Args:
        teacher: guided as wished.
        times: how t is drawn.
        w: weight of the difference of images, not of noises.
        noise: how the noise is drawn.
    """

    def weight(x0: Tensor, target: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
        del target
        return per_sample(w(t, schedule), x0)

    return ScoreDistillation(teacher=teacher, baseline=None, times=times, weight=weight, noise=noise)


@dataclass(frozen=True, kw_only=True, eq=False)
class DDS:
    """w(t) (eps_s(x_t, target prompt) - eps_s(source_t, source prompt)) (Hertz et al. 2023, arXiv 2304.07090).

    It is SDS of the edited image less SDS of the source at the same t and noise: what SDS does to an image that
    already fits its prompt (blur, saturation) cancels. The gradient is 0 where image and prompt are the source's.
    One call of the teacher on 2b samples.

    Args:
        teacher: guided as wished; the paper uses 7.5.
        source: x0 of the image to edit, batch 1 or b.
        source_cond: the prompt that describes it, batch 1 or b.
        times: how t is drawn; the paper draws 50 to 950 of 1000.
        w: weight of the published difference; 1 in the paper's code.
        noise: how the noise is drawn.
    """

    teacher: Denoiser
    source: Images
    source_cond: Cond
    times: TimeSampler = uniform(0.05, 0.95)
    w: TimeWeight = unit
    noise: NoiseSampler = standard_normal

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """The gradient at one draw of t and noise per sample; ``cond`` is the target prompt.

        Raises ``ValueError`` where source and x0, or their prompts, do not fit each other.
        """
        source = self._source_for(x0)
        given = expand_cond(self.source_cond, len(x0))
        if given.keys() != cond.keys():
            raise ValueError(f"source_cond must have the keys of cond {sorted(cond)}; got {sorted(given)}.")
        schedule = self.teacher.schedule
        t = self.times(len(x0), schedule, generator).to(x0.device)
        noise = self.noise(x0, cond, t, generator)
        x_t = torch.cat([schedule.diffuse(image, noise, t) for image in (x0, source)])
        both = {name: torch.cat([value, given[name].to(value)]) for name, value in cond.items()}
        x0_hat, source_hat = self.teacher(x_t, t.repeat(2), both).chunk(2)
        gap = (x0 - x0_hat) - (source - source_hat)
        return weighted_gap(noise_weight(self.w)(x0, x0_hat, t, schedule), gap, t)

    def _source_for(self, x0: Images) -> Images:
        if self.source.shape[1:] != x0.shape[1:]:
            raise ValueError(
                f"source must be images like x0 {tuple(x0.shape)}; got {tuple(self.source.shape)}. Encode and "
                "resize it as the scene's renders are."
            )
        return expand_cond({"source": self.source.to(x0)}, len(x0))["source"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VSD:
    """The gradient of :func:`vsd`, and the loss by which its phi learns (arXiv 2305.16213, Algorithm 1).

    The scene descends along eps_s - eps_phi, teacher and phi; phi, most often a
    :class:`scorefield.models.lora.Twin` of the teacher, learns to denoise the scene's renders, from every camera:

        phi = low_rank_denoiser(teacher.denoiser, generator=generator)
        method = VSD(teacher=guided(teacher.denoiser, 7.5, negative), phi=phi)
        phases = [scene_phase, method.phase(torch.optim.AdamW(phi.network.parameters(), 1e-4))]

    A batch is {"x0": encoded renders, "cond": Cond}; ``cond["camera"]`` goes to phi alone.

    Args:
        teacher: frozen, guided; 7.5 in the paper.
        phi: without guidance, on the teacher's schedule.
        times: of the scene's gradient.
        w: weight of the scene's gradient.
        noise: of the scene's gradient.
        phi_times: of phi's training; the full range.
        phi_weight: of phi's loss, by default that of its prediction kind.
        phi_only: entries of ``cond`` that the teacher is not told; empty for a teacher that knows cameras itself.
        camera_dropout: share of phi's training samples whose camera is zeros.
    """

    teacher: Denoiser
    phi: NetworkDenoiser
    times: TimeSampler = uniform()
    w: TimeWeight = sigma_squared
    noise: NoiseSampler = standard_normal
    phi_times: TimeSampler = uniform(0.0, 1.0)
    phi_weight: TimeWeight | None = None
    phi_only: tuple[str, ...] = (CAMERA,)
    camera_dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.camera_dropout <= 1:
            raise ValueError(f"camera_dropout must lie in [0, 1]; got {self.camera_dropout}.")

    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """w(t) (eps_s - eps_phi) at one draw of t and noise per sample; no gradient reaches any network."""
        known = {name: value for name, value in cond.items() if name not in self.phi_only}
        phi = Conditioned(self.phi.unwrapped(), {name: cond[name] for name in self.phi_only if name in cond})
        method = vsd(self.teacher, phi, times=self.times, w=self.w, noise=self.noise)
        return method.gradient(x0, known, generator=generator)

    def phi_loss(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        """Denoising of the renders, which are constants here (Eq. 8)."""
        x0, cond = batch["x0"].detach(), dict(batch["cond"])
        if CAMERA in cond:
            cond[CAMERA] = _dropped(cond[CAMERA], self.camera_dropout, rng("camera dropout"))
        weight = self.phi_weight or prediction_weight(self.phi.kind)
        losses, t = denoising_errors(self.phi, x0, cond, times=self.phi_times, weight=weight, generator=rng("phi"))
        return {"loss": losses.mean(), TIME_NOT_FINITE: time_not_finite(losses, t)}

    def phase(self, optimizer: Optimizer, *, every: int = 1, lr_schedule: LRScheduler | None = None) -> Phase:
        """Phi's phase for :func:`loop.train`; ``optimizer`` is over ``phi.network.parameters()``."""
        return Phase(
            name="phi", network=self.phi.network, optimizer=optimizer, loss=self.phi_loss, every=every,
            lr_schedule=lr_schedule,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class WithoutConditions:
    """A denoiser that is not told some conditions: the teacher as VSD asks it, for ``VSD.phi_only``."""

    denoiser: Denoiser
    names: tuple[str, ...]

    @property
    def schedule(self) -> Schedule:
        """The denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """The expected clean image."""
        return self.denoiser(x_t, t, {name: value for name, value in cond.items() if name not in self.names})


def _dropped(camera: Tensor, share: float, generator: Generator) -> Tensor:
    keep = torch.rand(len(camera), generator=generator, device=generator.device) >= share
    return camera * keep.to(camera).reshape(-1, *[1] * (camera.ndim - 1))
