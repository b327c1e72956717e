"""One copy of a network's weights in several roles: second networks on them, with low-rank changes of their own.

    student, fake = shared_backbone(teacher.denoiser, rank=64, generator=generator)

peft switches adapters on and off inside one network, and a switch can be forgotten: the teacher answers with the
adapter on, a weight that is off between forward and backward gets no gradient, and gradient checkpointing
recomputes with whatever is on at that moment. Here nothing is switched. A LoRA has modules of its own that hold
the very same tensors, and the adapters are in the LoRA. LoRAs are not wrapped in DDP: ``loop.train`` averages
their gradients in one all-reduce.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Generator, Tensor, nn

from scorefield.denoiser import NetworkDenoiser
from scorefield.models.quantize import dequantized

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The linear layers of attention in diffusers' networks."""

LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
"""Linear layers and convolutions of the UNets and transformers of diffusers; DMD2 adapts these in SDXL."""


LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name of the file that ``load_lora_weights`` of diffusers looks for."""


class LoRA(nn.Module):
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
        adapted = _copied(network)
        # A whole number times the rank would do for peft as well; its type says int, its arithmetic does not.
        settings: Any = {"r": rank, "lora_alpha": scale * rank, "target_modules": list(targets)}
        with warnings.catch_warnings():  # it cannot merge into weights that torchao rounded, which merged() does
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
            inject_adapter_in_model(LoraConfig(**settings), adapted)
        changes = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        for name, parameter in changes.items():
            _initialise(name, parameter, rank, generator)
        self.changes = nn.ParameterDict({name.replace(".", "/"): p for name, p in changes.items()})
        self.rank, self.scale = rank, scale
        self._hidden = (adapted,)  # in a tuple, which nn.Module does not look into
        self._told: dict[str, str] = {}

    @property
    def backbone(self) -> nn.Module:
        """The LoRA itself, for example to switch gradient checkpointing on, or to listen to a layer."""
        return self._hidden[0]

    @property
    def heard(self) -> tuple[nn.Module, ...]:
        """Modules whose outputs it adds to, which ``compile_network`` leaves open."""
        return tuple(self.backbone.get_submodule(place) for place in self._told.values())

    def tell(self, name: str, place: str, embedding: nn.Module) -> None:
        """Let the LoRA be told more than its network is: from now on its ``cond`` needs ``name``.

        Args:
            name: of the condition, and of the embedding among the LoRA's modules.
            place: submodule of the network whose output the embedded condition is added to.
            embedding: learns with the changes.
        """
        self.add_module(name, embedding)
        self._told[name] = place

    def forward(self, *args: Any, **cond: Any) -> Any:
        """Return what the network returns. Raises ``ValueError`` where a condition of :meth:`tell` is missing."""
        with ExitStack() as hooks:
            for name, place in self._told.items():
                if (value := cond.pop(name, None)) is None:
                    raise ValueError(f"cond needs a {name!r}, which this LoRA is told.")
                code = self.get_submodule(name)(value)
                # Hooked per call: a hook that stays would not survive copy.deepcopy.
                hook = self.backbone.get_submodule(place).register_forward_hook(
                    lambda module, inputs, output, code=code: output + code.to(output)
                )
                hooks.callback(hook.remove)
            return self.backbone(*args, **cond)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a LoRA with changes of its own on the same network."""
        own = {id(p) for p in self.parameters()}
        shared = (*self.backbone.parameters(), *self.backbone.buffers())
        memo.update({id(tensor): tensor for tensor in shared if id(tensor) not in own})
        adapted = self.__class__.__new__(self.__class__)
        memo[id(self)] = adapted
        adapted.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return adapted


@contextmanager
def scaled(adapted: LoRA, factor: float) -> Iterator[None]:
    """Multiply a LoRA's changes by ``factor`` within the block; at 0 it is the network itself, bit for bit.

    A graph that is made inside may be followed back outside, but not recomputed: no gradient checkpointing.
    """
    layers: list[Any] = [one for one in adapted.backbone.modules() if isinstance(one, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer, own in zip(layers, before, strict=True):
            layer.scaling.update({name: factor * value for name, value in own.items()})
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.scaling.update(own)


def stacked(network: nn.Module, parts: Sequence[tuple[Mapping[str, Tensor], float]]) -> LoRA:
    """Return a LoRA whose change is the sum of several, each times its factor: B A = sum of factor_i B_i A_i.

    Args:
        network: frozen; see :class:`LoRA`.
        parts: what :func:`adapter_weights` returned of LoRAs of this network, and factors; their layers are alike.

    Raises:
        ValueError: none, or changes of different layers.
    """
    if not parts or any(weights.keys() != parts[0][0].keys() for weights, _ in parts):
        raise ValueError(f"changes of the same layers can be added, at least one; got {len(parts)} that differ.")
    first = parts[0][0]
    joined = {
        name: torch.cat([weights[name] * (factor if ".lora_B." in name else 1.0) for weights, factor in parts],
                        1 if ".lora_B." in name else 0)
        for name in first
    }  # fmt: skip
    rank = next(len(value) for name, value in joined.items() if ".lora_A." in name)
    layers = sorted({name.partition(".lora_")[0] for name in first})
    adapted = LoRA(network, rank=rank, targets=layers, generator=Generator().manual_seed(0))
    load_adapter_weights(adapted, joined)
    return adapted


def shared_backbone(
    teacher: NetworkDenoiser, *, rank: int, alpha: float | None = None, targets: Sequence[str] = LAYERS,
    checkpointing: bool = False, generator: Generator,
) -> tuple[NetworkDenoiser, NetworkDenoiser]:  # fmt: skip
    """Student and fake score on the teacher's weights; both start as the teacher, and it stays what it is.

    Of three copies, full of gradients and of optimiser state, one remains and two small adapters.

    Args:
        teacher: frozen, without guidance, on its device.
        rank: of both adapters.
        alpha: peft's lora_alpha, the changes are scaled by alpha / rank; None is the rank.
        targets: names, or ends of names, of the layers to change; those that the network lacks are left out.
        checkpointing: recompute activations in the backward pass of both.
        generator: draws the adapters' first weights.

    Raises:
        ValueError: a teacher that is not frozen, a rank below 1, none of the targets, or a network that cannot
            recompute.
    """
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be above 0; got {alpha}. None means the rank.")
    own = adaptable(teacher.network, targets)
    if not own:
        names = [name for name, _ in teacher.network.named_modules()]
        raise ValueError(f"the network has none of the layers {', '.join(targets)}; it has {names[1:13]}, ...")
    scale = 1.0 if alpha is None else alpha / max(rank, 1)
    student, fake = (
        LoRA(teacher.network, rank=rank, targets=own, scale=scale, generator=generator) for _ in range(2)
    )
    for role in (student, fake) if checkpointing else ():
        recompute_activations(role.backbone)
    return replace(teacher, network=student), replace(teacher, network=fake)


def adaptable(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the full names of the layers that end in one of ``targets`` and that a LoRA can change.

    Those are linear layers and ungrouped convolutions: in FLUX.2 "attn.to_out" is one in some blocks, and in
    others a list of modules.
    """
    kinds = (nn.Linear, nn.Conv2d)
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
        if any(f".{name}".endswith(f".{target}") for target in targets)
    ]


def recompute_activations(network: nn.Module) -> None:
    """Switch gradient checkpointing on. Raises ``ValueError`` for a network that has none."""
    able: list[Any] = [part for part in network.modules() if hasattr(part, "enable_gradient_checkpointing")]
    if not able:
        raise ValueError(f"a {type(network).__name__} cannot recompute its activations; UNets of diffusers can.")
    able[0].enable_gradient_checkpointing()


def adapter_weights(adapted: LoRA) -> dict[str, Tensor]:
    """Return the changes by the names that diffusers and peft load, such as "mid_block...to_q.lora_A.weight".

    The scale is multiplied into the second matrices, so that whoever loads them needs no lora_alpha: it is the
    rank. A leading "model." of :class:`scorefield.models.networks.DiffusersNetwork` is left out.
    """
    weights = {}
    for name, parameter in adapted.changes.items():
        place = _place(name)
        value = parameter.detach() * (adapted.scale if ".lora_B." in place else 1.0)
        weights[place] = value.contiguous().cpu()
    return weights


def load_adapter_weights(adapted: LoRA, weights: Mapping[str, Tensor]) -> None:
    """Give a LoRA the changes that :func:`adapter_weights` returned of another one of the same rank and layers.

    Raises ``ValueError`` naming the first that does not fit.
    """
    own = {_place(name): (name, parameter) for name, parameter in adapted.changes.items()}
    if odd := sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"{odd[0]} is {'missing' if odd[0] in own else 'of a layer that is not changed here'}.")
    for place, (_, parameter) in own.items():
        if weights[place].shape != parameter.shape:
            there, here = tuple(weights[place].shape), tuple(parameter.shape)
            raise ValueError(f"{place} is {there}; here it is {here}.")
    with torch.no_grad():
        for place, (_, parameter) in own.items():
            parameter.copy_(weights[place] / (adapted.scale if ".lora_B." in place else 1.0))


def _place(name: str) -> str:
    return name.replace("/", ".").removeprefix("model.").replace(".default.", ".")


def merged(adapted: LoRA) -> nn.Module:
    """Return a network of the original class whose weights are a copy of the shared ones with the changes added.

    Rounded weights become plain ones, with what the rounding lost still lost.
    """
    network = copy.deepcopy(adapted.backbone)
    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            base = dequantized(layer.get_base_layer())
            if base is layer.get_base_layer():
                layer.merge()
            else:
                base.weight.data += layer.get_delta_weight("default").to(base.weight)
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, base)
    for name, module in list(network.named_modules()):
        if (plain := dequantized(module)) is not module:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, plain)
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


def _copied(network: nn.Module) -> nn.Module:
    # deepcopy takes what it finds in the memo for copied: modules are new, tensors are the same objects.
    return copy.deepcopy(network, {id(x): x for x in (*network.parameters(), *network.buffers())})


@torch.no_grad()
def _initialise(name: str, parameter: nn.Parameter, rank: int, generator: Generator) -> None:
    # Adapters learn in float32 or better, whatever the precision of the network. The second matrix stays zero.
    parameter.data = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    if "lora_A" in name and not parameter.is_meta:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device=generator.device) / rank)
