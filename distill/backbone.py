"""One frozen network in memory for three roles: student and fake score as low-rank changes of the teacher.

Of three copies, full of gradients and of optimiser state, one copy of the weights remains and two small adapters:

    student, fake = shared_backbone(teacher.denoiser, rank=64, generator=generator)

Each adapter lives in a twin of the teacher's network (:class:`lora.Twin`), which has the same tensors and
modules of its own, so no role is ever switched on or off: the teacher cannot answer with an adapter, no weight
loses its ``requires_grad`` between forward and backward, and gradient checkpointing recomputes the role it began
with. The twins are not wrapped in DDP; ``loop.train`` averages their gradients in one all-reduce.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from distill.adversarial import Critic
from scorefield.denoiser import NetworkDenoiser
from scorefield.models.lora import Twin

LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""Linear layers and convolutions of the UNets and transformers of diffusers; DMD2 adapts these in SDXL."""


def shared_backbone(
    teacher: NetworkDenoiser, *, rank: int, alpha: float | None = None, targets: Sequence[str] = LAYERS,
    bottleneck: str | None = None, head: nn.Module | None = None, checkpointing: bool = False,
    generator: Generator,
) -> tuple[NetworkDenoiser, NetworkDenoiser]:  # fmt: skip
    """Student and fake score on the teacher's weights; both start as the teacher, and it stays what it is.

    Args:
        teacher: frozen, without guidance, on its device.
        rank: of both adapters.
        alpha: peft's lora_alpha, the changes are scaled by alpha / rank; None is the rank.
        targets: names, or ends of names, of the layers to change; those that the network lacks are left out.
        bottleneck: name of a submodule of the teacher's network for a critic to listen to.
        head: of the critic; :func:`distill.adversarial.discriminator_head`.
        checkpointing: recompute activations in the backward pass of both.
        generator: draws the adapters' first weights.

    Raises:
        ValueError: a teacher that is not frozen, a rank below 1, none of the targets, a network that cannot
            recompute, a bottleneck without head, or one that the network does not have.
    """
    if (bottleneck is None) != (head is None):
        raise ValueError("a critic needs a bottleneck and a head; got one without the other.")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be above 0; got {alpha}. None means the rank.")
    names = [name for name, _ in teacher.network.named_modules()]
    own = [target for target in targets if any(f".{name}".endswith(f".{target}") for name in names)]
    if not own:
        raise ValueError(f"the network has none of the layers {', '.join(targets)}; it has {names[1:13]}, ...")
    scale = 1.0 if alpha is None else alpha / max(rank, 1)
    roles = [Twin(teacher.network, rank=rank, targets=own, scale=scale, generator=generator) for _ in range(2)]
    if checkpointing:
        for role in roles:
            recompute_activations(role.backbone)
    student, fake = roles
    critic: nn.Module = fake if head is None else Critic(fake, f"backbone.{bottleneck}", head)
    device = next(teacher.network.parameters()).device
    return replace(teacher, network=student), replace(teacher, network=critic.to(device))


def recompute_activations(network: nn.Module) -> None:
    """Switch gradient checkpointing on. Raises ``ValueError`` for a network that has none."""
    able: list[Any] = [part for part in network.modules() if hasattr(part, "enable_gradient_checkpointing")]
    if not able:
        raise ValueError(f"a {type(network).__name__} cannot recompute its activations; UNets of diffusers can.")
    able[0].enable_gradient_checkpointing()


def offload_state(optimizer: Optimizer, home: torch.device | str = "cpu") -> Optimizer:
    """Keep the optimiser's state at ``home`` except within ``step``; returns the optimiser.

    The student's moments are idle while the fake score learns, four iterations of five. The state travels once per
    step in each direction; numbers and checkpoints are the same.
    """

    def fetch(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, state in optimizer.state.items():
            _move(state, parameter.device)

    def put_away(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for state in optimizer.state.values():
            _move(state, torch.device(home))

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(put_away)
    optimizer.register_load_state_dict_post_hook(lambda loaded: put_away(loaded, None, None))
    return optimizer


def _move(state: dict[str, Any], device: torch.device) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = value.to(device)
