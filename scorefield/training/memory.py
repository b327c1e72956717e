"""Bytes of a training, before any of it is allocated: weights, gradients, optimiser states, activations.

    role = role_of(network, optimizer="adamw")  # of shapes alone: a network on the meta device will do
    found = activations(lambda: network(x_t, t, **cond), [network])  # there nothing is computed or allocated

What tensors hold is counted. What the device keeps beside them is not: its context, the workspaces of its kernels,
and what its allocator loses between them.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from scorefield.choices import Quantize
from scorefield.models.quantize import planned_weights, unpacked

SMALLEST_8BIT, BLOCK_8BIT = 4096, 256
"""bitsandbytes' 8-bit AdamW: numbers of the smallest tensor that it rounds, and numbers that share a scale."""


@dataclass(frozen=True)
class Role:
    """Bytes that a network holds through a training.

    Attributes:
        number: of its parameters.
        weights: with the scales of those that are rounded.
        gradients: of the parameters that learn.
        states: of their optimiser.
        unpacked: of the largest layer that is rounded, as it is while it is used.
    """

    number: int
    weights: int
    gradients: int = 0
    states: int = 0
    unpacked: int = 0

    @property
    def bytes(self) -> int:
        """All that stays."""
        return self.weights + self.gradients + self.states


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward and backward pass, beside weights and the gradients of weights.

    Attributes:
        kept: by autograd from the forward pass for the backward pass; each storage counts once.
        most: of all tensors that are alive at one time, among them what is recomputed, and gradients on their way.
    """

    kept: int
    most: int


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass in one or two parts, each under an autocast of its own; see :func:`activations`."""

    run: Callable[[], Tensor]
    then: Callable[[Tensor], Tensor] | None = None


def role_of(network: nn.Module, optimizer: str = "adamw", how: Quantize = "no") -> Role:
    """Return the bytes of a network, whose parameters learn that require gradients.

    Args:
        network: on any device, the meta device too.
        optimizer: "adamw" or "adamw8bit".
        how: its weights will be rounded; they are not yet.
    """
    number, weights = planned_weights(network, how)
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in learned)
    states = sum(_state_of(parameter, optimizer) for parameter in learned)
    return Role(number, weights, gradients, states, unpacked(network, how))


def _state_of(parameter: Tensor, optimizer: str) -> int:
    # Two moments of each number.
    number = parameter.numel()
    if optimizer == "adamw8bit" and number >= SMALLEST_8BIT:
        return 2 * (number + 4 * -(-number // BLOCK_8BIT))
    return 2 * 4 * number


def most_bytes(networks: Mapping[str, Role], passes: Mapping[str, Activations], *, offload: bool = False) -> int:
    """Return the most bytes that a training holds at one time.

    Args:
        networks: all networks, each part once.
        passes: that take place one after the other.
        offload: states of the optimisers are on the device within their own step only, when activations are gone.
    """
    weights = sum(role.weights + role.gradients for role in networks.values())
    states = [role.states for role in networks.values()]
    working = max((found.most for found in passes.values()), default=0)
    working += max((role.unpacked for role in networks.values()), default=0)
    return weights + (max(working, max(states, default=0)) if offload else sum(states) + working)


def predicted(
    runs: Mapping[str, Pass], networks: Sequence[nn.Module], *, precision: str, gpu: bool
) -> dict[str, Activations]:
    """Return :func:`activations` of each pass, none of any where the shapes in a network depend on numbers.

    Networks, and what they are asked about, are on the meta device.
    """
    try:
        return {
            name: activations(one.run, networks, then=one.then, precision=precision, gpu=gpu)
            for name, one in runs.items()
        }
    except RuntimeError:  # a number was asked for
        return {}


def activations(
    run: Callable[[], Tensor], networks: Sequence[nn.Module], *, then: Callable[[Tensor], Tensor] | None = None,
    precision: str = "no", gpu: bool = False,
) -> Activations:  # fmt: skip
    """Return the bytes of a pass, forward, and backward if the result has a gradient.

    On the meta device they are a prediction, and nothing is computed. On a CPU they are measured.

    Args:
        run: the forward pass; the sum of what it returns is what is taken back.
        networks: all that take part, whose weights and their gradients do not count.
        then: goes on from its result under another autocast, as a loss does from what was rolled out.
        precision: of the autocast, "no" or "bf16".
        gpu: count as on a GPU, whose autocast computes norms and softmax in float32.

    Raises:
        RuntimeError: a network on the meta device asks for a number.
    """
    places = [place for network in networks for module in _modules(network) for place in _places(module)]
    weights: list[Tensor] = [tensor for held, name in places if (tensor := held[name]) is not None]
    ledger, rules = _Ledger(weights), _Rules(precision == "bf16", gpu)
    packed: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        one = _Held(tensor)
        packed.append(weakref.ref(one))
        return one

    with ExitStack() as stack:
        for parameter in (x for x in weights if x.requires_grad):
            stack.callback(parameter.register_post_accumulate_grad_hook(ledger.leave_out).remove)
        if any(weight.is_meta for weight in weights):
            stack.enter_context(torch.device("meta"))
        stack.enter_context(rules)
        stack.enter_context(ledger)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor))
        result = run()
        if then is not None:
            rules.copies = {}
            result = then(result)
        rules.copies = None
        kept = _bytes_of([one.tensor for ref in packed if (one := ref()) is not None], ledger.known)
        if result.requires_grad:
            _back(result.sum())
    for parameter in weights:
        parameter.grad = None
    return Activations(kept, ledger.most)


def measured(run: Callable[[], None], networks: Sequence[nn.Module]) -> int:
    """Return the most bytes of tensors that are alive at one time while something runs on a CPU.

    Args:
        run: forward and backward passes.
        networks: all that take part, whose weights and their gradients do not count.
    """
    places = [place for network in networks for module in _modules(network) for place in _places(module)]
    weights: list[Tensor] = [tensor for held, name in places if (tensor := held[name]) is not None]
    ledger = _Ledger(weights)
    with ExitStack() as stack:
        for parameter in (x for x in weights if x.requires_grad):
            stack.callback(parameter.register_post_accumulate_grad_hook(ledger.leave_out).remove)
        stack.enter_context(ledger)
        run()
    return ledger.most


def _back(loss: Tensor) -> None:
    # What loss.backward() calls; under a torch function mode that would switch the mode off on its way.
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _bytes_of(tensors: Sequence[Tensor], known: set[int]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({one._cdata: one.nbytes() for one in storages if one._cdata not in known}.values())


class _Held:
    # Lives as long as the graph holds the tensor.
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Ledger(TorchDispatchMode):
    # Bytes of the storages that are alive and were made within, and the most at one time.
    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[Any, int]] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else (result,):
            if isinstance(one, Tensor):
                self._add(one.untyped_storage())
        return result

    def leave_out(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._drop(parameter.grad.untyped_storage()._cdata)
            self.known.add(parameter.grad.untyped_storage()._cdata)

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known and key not in self.alive:
            self.alive[key] = (weakref.ref(storage, lambda _: self._drop(key)), size)
            self.now += size
            self.most = max(self.most, self.now)

    def _drop(self, key: int) -> None:
        _, size = self.alive.pop(key, (None, 0))
        self.now -= size


HALVED = {
    functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, functional.conv_transpose2d,
    torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.bmm,
    Tensor.mm, Tensor.__matmul__, functional.scaled_dot_product_attention,
}  # fmt: skip
"""What autocast computes in bf16."""

PRECISE = {functional.layer_norm, functional.group_norm, functional.softmax, torch.softmax, Tensor.softmax}
"""What a GPU's autocast computes in float32 and a CPU's does not."""


class _Rules(TorchFunctionMode):
    # Autocast, which the meta device lacks, and an attention that is not kept as a matrix, as on any device.
    def __init__(self, halves: bool, gpu: bool) -> None:
        super().__init__()
        self.halves, self.gpu = halves, gpu
        # Autocast keeps copies of weights that learn until it ends; a block that is recomputed drops its own.
        self.copies: dict[int, Tensor] | None = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0]  # how many are true is a number, not a shape: all of them at most
        if self.halves and func in HALVED:
            args, given = self._all(self._half, args, given)
        elif self.halves and self.gpu and func in PRECISE:
            args, given = self._all(_precise, args, given)
        return (_attention if func is functional.scaled_dot_product_attention else func)(*args, **given)

    def _all(self, cast: Callable[[Any], Any], args: Any, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(cast, args)), {name: cast(value) for name, value in given.items()}

    def _half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self.copies is None or not (value.is_leaf and value.requires_grad):
            return value.bfloat16()
        if id(value) not in self.copies:
            self.copies[id(value)] = value.bfloat16()
        return self.copies[id(value)]


def _precise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    # What it keeps is what flash attention keeps on a GPU: its inputs, its output, and a number for each row.
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    mask = None if attn_mask is None else attn_mask.to(query.dtype)
    attend: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = attend(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
    return output


def _modules(network: nn.Module) -> Iterator[nn.Module]:
    # Those of a LoRA's backbone, too, which it does not register.
    for module in network.modules():
        yield module
        if isinstance(backbone := getattr(module, "backbone", None), nn.Module):
            yield from backbone.modules()


def _places(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    return [(held, name) for held in (module._parameters, module._buffers) for name in held]
