"""Variational score distillation with a phi that is trained (Wang et al. 2023, arXiv 2305.16213, Algorithm 1).

The scene follows the gradient eps_s - eps_phi of teacher and phi, while phi learns to denoise the scene's renders
from every camera. Usually phi is the teacher's network with a LoRA, :func:`low_rank_denoiser`. Both are phases of
:func:`scorefield.training.loop.train`:

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
from scorefield.models.lora import ATTENTION, LoRA
from scorefield.randomness import Rng
from scorefield.schedule import Images, PerSample, Schedule
from scorefield.times import TimeSampler, uniform
from scorefield.training.loop import Phase
from sds.losses import sigma_squared, vsd

CAMERA = "camera"
"""Key of the camera in ``cond``: camera-to-world matrices. Zeros mean that the camera is unknown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VSD:
    """The gradient of :func:`sds.losses.vsd`, and the loss that trains its phi.

    A batch is {"x0": encoded renders, "cond": Cond}; ``cond["camera"]`` goes to phi alone.

    Args:
        teacher: A frozen denoiser with guidance; 7.5 in the paper.
        phi: A denoiser without guidance, on the teacher's schedule.
        times: Times of the scene's gradient.
        w: Weight of the scene's gradient.
        noise: Noise of the scene's gradient.
        phi_times: Times of phi's training; the full range.
        phi_weight: Weight of phi's loss; by default that of its prediction kind.
        phi_only: Entries of ``cond`` that the teacher does not get; empty for a teacher that takes cameras itself.
        camera_dropout: Share of phi's training samples whose camera is replaced by zeros.

    Raises ``ValueError`` for a ``camera_dropout`` outside [0, 1].
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
        """Return w(t) (eps_s - eps_phi) at one draw of t and noise per sample. No gradient reaches a network."""
        known = {name: value for name, value in cond.items() if name not in self.phi_only}
        phi = Conditioned(self.phi.unwrapped(), {name: cond[name] for name in self.phi_only if name in cond})
        method = vsd(self.teacher, phi, times=self.times, w=self.w, noise=self.noise)
        return method.gradient(x0, known, generator=generator)

    def phi_loss(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        """Return phi's denoising loss on the renders, which are constants here (Eq. 8)."""
        x0, cond = batch["x0"].detach(), dict(batch["cond"])
        if CAMERA in cond:
            cond[CAMERA] = _dropped(cond[CAMERA], self.camera_dropout, rng("camera dropout"))
        weight = self.phi_weight or prediction_weight(self.phi.kind)
        losses, t = denoising_errors(self.phi, x0, cond, times=self.phi_times, weight=weight, generator=rng("phi"))
        return {"loss": losses.mean(), TIME_NOT_FINITE: time_not_finite(losses, t)}

    def phase(self, optimizer: Optimizer, *, every: int = 1, lr_schedule: LRScheduler | None = None) -> Phase:
        """Return phi's phase of a training; ``optimizer`` is over ``phi.network.parameters()``."""
        return Phase(
            name="phi", network=self.phi.network, optimizer=optimizer, loss=self.phi_loss, every=every,
            lr_schedule=lr_schedule,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class WithoutConditions:
    """A denoiser that does not get some conditions: VSD's teacher does not get those in ``VSD.phi_only``."""

    denoiser: Denoiser
    names: tuple[str, ...]

    @property
    def schedule(self) -> Schedule:
        """The denoiser's schedule."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the expected clean image."""
        return self.denoiser(x_t, t, {name: value for name, value in cond.items() if name not in self.names})


def _dropped(camera: Tensor, share: float, generator: Generator) -> Tensor:
    keep = torch.rand(len(camera), generator=generator, device=generator.device) >= share
    return camera * keep.to(camera).reshape(-1, *[1] * (camera.ndim - 1))


def low_rank_denoiser(
    denoiser: NetworkDenoiser, *, rank: int = 4, targets: Sequence[str] = ATTENTION,
    camera_at: str | None = "model.time_embedding", generator: Generator,
) -> NetworkDenoiser:  # fmt: skip
    """Return VSD's phi: the teacher's network with a LoRA and the same weights, schedule and prediction kind.

    Args:
        denoiser: The teacher, without guidance.
        rank: Rank of the LoRA.
        targets: Names, or ends of names, of the layers to adapt; by default those that ProlificDreamer adapts.
        camera_at: Name of the submodule that embeds the time; the camera's embedding is added to its output.
            "model.time_embedding" for a UNet in :class:`scorefield.models.networks.DiffusersNetwork`,
            "model.time_text_embed" for SD3. None: no camera.
        generator: Draws the initial weights.

    Raises:
        ValueError: The network is not frozen, the rank is below 1, or the network has no such targets or
            ``camera_at``.
    """
    names = [name for name, _ in denoiser.network.named_modules()]
    if camera_at is not None and camera_at not in names:
        raise ValueError(f"the network has no submodule {camera_at!r}; it has {', '.join(names[1:13])}, ...")
    adapted = LoRA(denoiser.network, rank=rank, targets=targets, generator=generator)
    if camera_at is not None:
        like = next(iter(adapted.changes.values()))
        adapted.tell(CAMERA, camera_at, _embedding(adapted.backbone.get_submodule(camera_at), like, generator))
    return replace(denoiser, network=adapted)


class _CameraEmbedding(nn.Sequential):
    """Camera-to-world matrices (b, 12), (b, 3, 4) or (b, 4, 4) -> embeddings (b, width)."""

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
