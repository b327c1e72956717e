"""Variational score distillation with a phi that learns (Wang et al. 2023, arXiv 2305.16213, Algorithm 1).

The scene descends along eps_s - eps_phi, teacher and phi; phi, most often a
:class:`scorefield.models.lora.Twin` of the teacher,
learns to denoise the scene's renders, from every camera. Both are phases of :func:`loop.train`:

    phi = low_rank_denoiser(teacher.denoiser, generator=generator)
    method = VSD(teacher=guided(teacher.denoiser, 7.5, negative), phi=phi)
    phases = [scene_phase, method.phase(torch.optim.AdamW(phi.network.parameters(), 1e-4))]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scorefield.denoiser import Cond, Conditioned, Denoiser, NetworkDenoiser
from scorefield.gradient import (
    TIME_NOT_FINITE,
    NoiseSampler,
    ScoreGradient,
    TimeWeight,
    denoising_errors,
    prediction_weight,
    standard_normal,
    time_not_finite,
)
from scorefield.models.lora import ATTENTION, Twin
from scorefield.randomness import Rng
from scorefield.schedule import Images, PerSample, Schedule
from scorefield.times import TimeSampler, uniform
from scorefield.training.loop import Phase
from sds.losses import sigma_squared, vsd

CAMERA = "camera"
"""The key of the camera in ``cond``: camera-to-world matrices, zeros are "no camera in particular"."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VSD:
    """The gradient of :func:`sds.losses.vsd`, and the loss by which its phi learns.

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


def low_rank_denoiser(
    denoiser: NetworkDenoiser, *, rank: int = 4, targets: Sequence[str] = ATTENTION,
    camera_at: str | None = "model.time_embedding", generator: Generator,
) -> NetworkDenoiser:  # fmt: skip
    """A :class:`Twin` of a teacher's network, of the same schedule and prediction kind: VSD's phi.

    Args:
        denoiser: the teacher, without guidance.
        rank: of the changes.
        targets: names, or ends of names, of the layers to change; those that ProlificDreamer adapts.
        camera_at: name of the submodule whose output, the embedding of time, the camera's embedding is added to:
            "model.time_embedding" for a UNet in :class:`networks.DiffusersNetwork`, "model.time_text_embed" for
            SD3; None for no camera.
        generator: draws the initial weights.

    Raises:
        ValueError: a network that is not frozen, a rank below 1, targets or ``camera_at`` that it does not have.
    """
    names = [name for name, _ in denoiser.network.named_modules()]
    if camera_at is not None and camera_at not in names:
        raise ValueError(f"the network has no submodule {camera_at!r}; it has {', '.join(names[1:13])}, ...")
    twin = Twin(denoiser.network, rank=rank, targets=targets, generator=generator)
    if camera_at is not None:
        like = next(iter(twin.changes.values()))
        twin.tell(CAMERA, camera_at, _embedding(twin.backbone.get_submodule(camera_at), like, generator))
    return replace(denoiser, network=twin)


class _CameraEmbedding(nn.Sequential):
    """(b, 12), (b, 3, 4) or (b, 4, 4) camera-to-world matrices to (b, width)."""

    def forward(self, camera: Tensor) -> Tensor:
        numbers = camera.reshape(len(camera), -1)
        if numbers.shape[1] not in (12, 16):
            raise ValueError(f"camera must be (b, 12), (b, 3, 4) or (b, 4, 4); got {tuple(camera.shape)}.")
        # The last row of a homogeneous matrix is always 0 0 0 1.
        code: Tensor = super().forward(numbers[:, :12].to(next(self.parameters())))
        return code


def _embedding(time_embedding: nn.Module, like: Tensor, generator: Generator) -> nn.Module:
    linear = [module for module in time_embedding.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("camera_at must name a module that ends in a linear layer: the embedding of time.")
    width = linear[-1].out_features
    first, last = nn.Linear(12, width), nn.Linear(width, width)
    nn.init.normal_(first.weight, std=12**-0.5, generator=generator)
    for parameter in (first.bias, last.weight, last.bias):
        nn.init.zeros_(parameter)
    return _CameraEmbedding(first, nn.SiLU(), last).to(like)
