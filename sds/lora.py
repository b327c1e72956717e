"""A second network on the weights of a first, with low-rank changes of its own and, if wanted, a camera.

peft switches adapters on and off inside one network, and a switch can be forgotten: the teacher answers with the
adapter on, a weight that is off between forward and backward gets no gradient, and gradient checkpointing
recomputes with whatever is on at that moment. Here nothing is switched. The twin has modules of its own that hold
the very same tensors, and the adapters are in the twin.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, inject_adapter_in_model
from torch import Generator, Tensor, nn

from score.denoiser import NetworkDenoiser
from score.schedule import Images, PerSample

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The linear layers of attention in diffusers' networks, which ProlificDreamer adapts."""

CAMERA = "camera"
"""The key of the camera in ``cond``."""


class LowRankTwin(nn.Module):
    """A frozen network plus low-rank changes (Hu et al. 2021, arXiv 2106.09685): forward(x_t, t, camera, **cond).

    The network's own weights are shared, not registered: parameters, state dict and checkpoints of this module are
    the low-rank matrices and the camera's embedding. It starts as the network itself, to the last bit.

    Args:
        network: frozen, on the device where it will stay; its modules are left as they are, its tensors shared.
        rank: of the changes.
        targets: names, or ends of names, of the layers to change.
        camera_at: name of the submodule whose output, the embedding of time, the camera's embedding is added to:
            "model.time_embedding" for a UNet in :class:`score.families.DiffusersNetwork`, "model.time_text_embed"
            for SD3; None for no camera.
        generator: draws the initial weights.

    Raises:
        ValueError: a network that is not frozen, a rank below 1, targets or ``camera_at`` that it does not have.
    """

    def __init__(
        self, network: nn.Module, *, rank: int = 4, targets: Sequence[str] = ATTENTION,
        camera_at: str | None = None, generator: Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        _check(network, rank, targets, camera_at)
        twin = _twin(network)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), twin)
        changes = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        for name, parameter in changes.items():
            _initialise(name, parameter, rank, generator)
        self.changes = nn.ParameterDict({name.replace(".", "/"): p for name, p in changes.items()})
        self.camera_at = camera_at
        like = next(iter(changes.values()))
        self.camera = (
            None if camera_at is None else _camera_embedding(twin.get_submodule(camera_at), like, generator)
        )
        self._hidden = (twin,)  # in a tuple, which nn.Module does not look into

    @property
    def backbone(self) -> nn.Module:
        """The twin itself, for example to switch gradient checkpointing on."""
        return self._hidden[0]

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


def _check(network: nn.Module, rank: int, targets: Sequence[str], camera_at: str | None) -> None:
    if any(p.requires_grad for p in network.parameters()):
        raise ValueError("the network must be frozen: its weights are shared. Pass it through score.freeze first.")
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}.")
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise ValueError(f"the network has no layer {target!r}; it has {', '.join(names[1:13])}, ...")
    if camera_at is not None and camera_at not in names:
        raise ValueError(f"the network has no submodule {camera_at!r}; it has {', '.join(names[1:13])}, ...")


def _twin(network: nn.Module) -> nn.Module:
    # deepcopy takes what it finds in the memo for copied: modules are new, tensors are the same objects.
    return copy.deepcopy(network, {id(x): x for x in (*network.parameters(), *network.buffers())})


@torch.no_grad()
def _initialise(name: str, parameter: nn.Parameter, rank: int, generator: Generator) -> None:
    # Adapters learn in float32 or better, whatever the precision of the network. The second matrix stays zero.
    parameter.data = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    if "lora_A" in name:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device=generator.device) / rank)


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
