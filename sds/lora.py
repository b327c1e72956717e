"""VSD's phi: a second network on the teacher's weights, with low-rank changes and, if wanted, a camera."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Generator, Tensor, nn

from scorefield.denoiser import NetworkDenoiser
from scorefield.models.lora import ATTENTION, Twin
from scorefield.schedule import Images, PerSample

CAMERA = "camera"
"""The key of the camera in ``cond``."""


class LowRankTwin(Twin):
    """A :class:`scorefield.models.lora.Twin` that may be told a camera: forward(x_t, t, camera, **cond).

    Parameters, state dict and checkpoints of this module are the low-rank matrices and the camera's embedding.

    Args:
        network: frozen, on the device where it will stay; its modules are left as they are, its tensors shared.
        rank: of the changes.
        targets: names, or ends of names, of the layers to change; those that ProlificDreamer adapts.
        camera_at: name of the submodule whose output, the embedding of time, the camera's embedding is added to:
            "model.time_embedding" for a UNet in :class:`families.DiffusersNetwork`, "model.time_text_embed"
            for SD3; None for no camera.
        generator: draws the initial weights.

    Raises:
        ValueError: a network that is not frozen, a rank below 1, targets or ``camera_at`` that it does not have.
    """

    def __init__(
        self, network: nn.Module, *, rank: int = 4, targets: Sequence[str] = ATTENTION,
        camera_at: str | None = None, generator: Generator,
    ) -> None:  # fmt: skip
        names = [name for name, _ in network.named_modules()]
        if camera_at is not None and camera_at not in names:
            raise ValueError(f"the network has no submodule {camera_at!r}; it has {', '.join(names[1:13])}, ...")
        super().__init__(network, rank=rank, targets=targets, generator=generator)
        self.camera_at = camera_at
        like = next(iter(self.changes.values()))
        self.camera = (
            None
            if camera_at is None
            else _camera_embedding(self.backbone.get_submodule(camera_at), like, generator)
        )

    def forward(
        self, x_t: Images, t: PerSample, camera: Float[Tensor, "b *matrix"] | None = None, **cond: Tensor
    ) -> Any:
        """What the network returns.

        Args:
            x_t: noisy images.
            t: their times, as the network takes them.
            camera: camera-to-world matrices, (b, 12), (b, 3, 4) or (b, 4, 4); zeros are "no camera in particular".
            **cond: conditions of the network.

        Raises:
            ValueError: a camera that is missing, not expected or of another shape.
        """
        if (camera is None) != (self.camera is None):
            raise ValueError(
                "cond needs a 'camera' if, and only if, the network was made with camera_at; got "
                f"{'none' if camera is None else 'one'}, and camera_at={self.camera_at!r}."
            )
        with self._told(camera):
            return self.backbone(x_t, t, **cond)

    @contextmanager
    def _told(self, camera: Tensor | None) -> Iterator[None]:
        # Hooked per call: a hook that stays would not survive copy.deepcopy.
        if camera is None or self.camera is None or self.camera_at is None:
            yield
            return
        code = self.camera(_twelve(camera).to(next(self.camera.parameters())))
        at = self.backbone.get_submodule(self.camera_at)
        hook = at.register_forward_hook(lambda module, inputs, output: output + code.to(output))
        try:
            yield
        finally:
            hook.remove()


def low_rank_denoiser(
    denoiser: NetworkDenoiser, *, rank: int = 4, targets: Sequence[str] = ATTENTION,
    camera_at: str | None = "model.time_embedding", generator: Generator,
) -> NetworkDenoiser:  # fmt: skip
    """A :class:`LowRankTwin` of a teacher's network, of the same schedule and prediction kind: VSD's phi.

    Args:
        denoiser: the teacher, without guidance.
        rank: as there.
        targets: as there.
        camera_at: as there.
        generator: as there.

    Raises:
        ValueError: as there.
    """
    twin = LowRankTwin(denoiser.network, rank=rank, targets=targets, camera_at=camera_at, generator=generator)
    return replace(denoiser, network=twin)


def _camera_embedding(time_embedding: nn.Module, like: Tensor, generator: Generator) -> nn.Module:
    linear = [module for module in time_embedding.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("camera_at must name a module that ends in a linear layer: the embedding of time.")
    width = linear[-1].out_features
    first, last = nn.Linear(12, width), nn.Linear(width, width)
    nn.init.normal_(first.weight, std=12**-0.5, generator=generator)
    for parameter in (first.bias, last.weight, last.bias):
        nn.init.zeros_(parameter)
    return nn.Sequential(first, nn.SiLU(), last).to(like)


def _twelve(camera: Tensor) -> Tensor:
    # The last row of a homogeneous matrix is always 0 0 0 1.
    numbers = camera.reshape(len(camera), -1)
    if numbers.shape[1] not in (12, 16):
        raise ValueError(f"camera must be (b, 12), (b, 3, 4) or (b, 4, 4); got {tuple(camera.shape)}.")
    return numbers[:, :12]
