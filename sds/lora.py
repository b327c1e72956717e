"""VSD's phi: a second network on the teacher's weights, with low-rank changes and, if wanted, a camera."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Generator, Tensor, nn

from scorefield.denoiser import NetworkDenoiser
from scorefield.models.lora import ATTENTION, Twin
from sds.losses import CAMERA


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
