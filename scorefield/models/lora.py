"""A second network on the weights of a first, with low-rank changes of its own.

peft switches adapters on and off inside one network, and a switch can be forgotten: the teacher answers with the
adapter on, a weight that is off between forward and backward gets no gradient, and gradient checkpointing
recomputes with whatever is on at that moment. Here nothing is switched. The twin has modules of its own that hold
the very same tensors, and the adapters are in the twin.
"""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The linear layers of attention in diffusers' networks."""


class Twin(nn.Module):
    """A frozen network plus low-rank changes (Hu et al. 2021, arXiv 2106.09685), called as the network is.

    The network's own weights are shared, not registered: parameters, state dict and checkpoints of this module are
    the low-rank matrices, and copies of it share the network's weights too. It starts as the network itself, to
    the last bit.

    Args:
        network: frozen, on the device where it will stay; its modules are left as they are, its tensors shared.
        rank: of the changes.
        targets: names, or ends of names, of the linear layers and convolutions to change.
        scale: of the changes, peft's lora_alpha / rank.
        generator: draws the initial weights.

    Raises:
        ValueError: a network that is not frozen, a rank below 1, targets that it does not have.
    """

    def __init__(
        self, network: nn.Module, *, rank: int, targets: Sequence[str] = ATTENTION, scale: float = 1.0,
        generator: Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        _check(network, rank, targets)
        twin = _twin(network)
        # A whole number times the rank would do for peft as well; its type says int, its arithmetic does not.
        settings: Any = {"r": rank, "lora_alpha": scale * rank, "target_modules": list(targets)}
        inject_adapter_in_model(LoraConfig(**settings), twin)
        changes = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        for name, parameter in changes.items():
            _initialise(name, parameter, rank, generator)
        self.changes = nn.ParameterDict({name.replace(".", "/"): p for name, p in changes.items()})
        self.rank, self.scale = rank, scale
        self._hidden = (twin,)  # in a tuple, which nn.Module does not look into

    @property
    def backbone(self) -> nn.Module:
        """The twin itself, for example to switch gradient checkpointing on, or to listen to a layer."""
        return self._hidden[0]

    def forward(self, *args: Any, **cond: Any) -> Any:
        """What the network returns."""
        return self.backbone(*args, **cond)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A twin with changes of its own on the same network."""
        own = {id(p) for p in self.parameters()}
        shared = (*self.backbone.parameters(), *self.backbone.buffers())
        memo.update({id(tensor): tensor for tensor in shared if id(tensor) not in own})
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def adapter_weights(twin: Twin) -> dict[str, Tensor]:
    """The changes by the names that diffusers and peft load, such as "mid_block...to_q.lora_A.weight".

    The scale is multiplied into the second matrices, so that whoever loads them needs no lora_alpha: it is the
    rank. A leading "model." of :class:`scorefield.models.families.DiffusersNetwork` is left out.
    """
    weights = {}
    for name, parameter in twin.changes.items():
        place = name.replace("/", ".").removeprefix("model.").replace(".default.", ".")
        value = parameter.detach() * (twin.scale if ".lora_B." in place else 1.0)
        weights[place] = value.contiguous().cpu()
    return weights


def merged(twin: Twin) -> nn.Module:
    """A network of the original class whose weights are a copy of the shared ones with the changes added."""
    network = copy.deepcopy(twin.backbone)
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, layer.get_base_layer())
    return network.requires_grad_(False)


def _check(network: nn.Module, rank: int, targets: Sequence[str]) -> None:
    if any(p.requires_grad for p in network.parameters()):
        raise ValueError(
            "the network must be frozen: its weights are shared. Pass it through scorefield.freeze first."
        )
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}.")
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise ValueError(f"the network has no layer {target!r}; it has {', '.join(names[1:13])}, ...")


def _twin(network: nn.Module) -> nn.Module:
    # deepcopy takes what it finds in the memo for copied: modules are new, tensors are the same objects.
    return copy.deepcopy(network, {id(x): x for x in (*network.parameters(), *network.buffers())})


@torch.no_grad()
def _initialise(name: str, parameter: nn.Parameter, rank: int, generator: Generator) -> None:
    # Adapters learn in float32 or better, whatever the precision of the network. The second matrix stays zero.
    parameter.data = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    if "lora_A" in name and not parameter.is_meta:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device=generator.device) / rank)
