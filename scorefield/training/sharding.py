"""Networks in pieces: each of n ranks holds an n-th of every weight, and gathers a block to compute (FSDP2).

    mesh = make_mesh("cuda", num_processes=16, shard=8)  # two copies of each network, eight ranks a copy
    student = shard(student, mesh)
    average = duplicate(student)                         # in pieces, too
    save(whole(student))                                 # every rank calls whole; the first one has the weights

Whatever calls a sharded network has to be called by all ranks, and equally often: each call gathers weights.
"""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from scorefield.denoiser import NetworkDenoiser, unwrap

LARGE = 16
"""A block of more than one part in so many of its network is gathered in pieces of its own."""


@dataclass(frozen=True, eq=False)
class Sharding:
    """How a network was cut.

    Attributes:
        mesh: of ranks: one dimension, or copies times pieces.
        dtype: in which weights are gathered and computed with; None: the one that they are kept in.
        skeleton: the network as it was, its weights without memory: what a copy of it is made from.
    """

    mesh: Any
    dtype: torch.dtype | None
    skeleton: nn.Module

    @property
    def ranks(self) -> tuple[int, int]:
        """The piece of this rank, and how many there are."""
        last = self.mesh.ndim - 1
        return int(self.mesh.get_local_rank(last)), int(self.mesh.size(last))


@cache
def make_mesh(device_type: str, num_processes: int, shard: int) -> Any:
    """Return the mesh of all ranks: ``shard`` neighbours share one copy of each network.

    Raises ``ValueError`` where ``shard`` does not divide the number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if shard < 2 or num_processes % shard:
        raise ValueError(
            f"--shard {shard} does not divide the {num_processes} processes. Pass a divisor above 1, or launch "
            f"{shard} processes, or a multiple."
        )
    copies = num_processes // shard
    if copies == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (copies, shard), mesh_dim_names=("replicate", "shard"))


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the parts of a network that are gathered one after the other, inner ones before outer ones.

    They are what lists of modules hold: the blocks of a transformer, the levels of a UNet and its middle, those of
    our MLP. A large one is divided further by the lists within. Single layers stay with what is round them.
    """
    return list(_blocks(network, sum(p.numel() for p in network.parameters()) / LARGE))


def _blocks(module: nn.Module, most: float) -> Iterator[nn.Module]:
    for part in module.children():
        if not isinstance(part, nn.ModuleList):
            yield from _blocks(part, most)
            continue
        for block in part:
            size = sum(p.numel() for p in block.parameters())
            if size > most:
                yield from _blocks(block, most)
            if size and next(block.children(), None) is not None:
                yield block


def shard(network: nn.Module, mesh: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Cut a network into pieces, in place, on the device of the mesh; the first rank's weights count.

    Weights go to the device block by block, so that it never holds all of them.

    Args:
        network: on the CPU or on the device; not wrapped.
        mesh: of :func:`make_mesh`.
        dtype: in which weights are gathered, such as bf16 under autocast; those that are kept, gradients and
            optimiser states stay as they are. None: gathered as they are kept.

    Raises:
        ValueError: a weight that is a single number, or has two names.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _check(network)
    # It warns of views among the outputs, which must not be written into; nobody here writes into an output.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    plan = Sharding(mesh, dtype, _skeleton(network))
    reduced = None if dtype is None else torch.float32
    # Times stay float32, as autocast leaves them: bf16 cannot tell timestep 998 from 1000.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    for block in [*blocks(network), network]:
        _share(block, mesh.device_type)
        # The root, too: what is left gathered would neither count as one n-th nor be seen to be frozen.
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    object.__setattr__(network, "sharding", plan)
    return network


def _check(network: nn.Module) -> None:
    single = [name for name, p in network.named_parameters() if not p.ndim]
    every, once = (dict(network.named_parameters(remove_duplicate=one)) for one in (False, True))
    shared = [name for name in every if name not in once]
    for names, why in ((single, "is a single number"), (shared, "has two names")):
        if names:
            raise ValueError(
                f"--shard cannot cut the weight {names[0]} of a {type(network).__name__}, which {why}. Leave out "
                "--shard."
            )


def _skeleton(network: nn.Module) -> nn.Module:
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, empty)


def _share(block: nn.Module, device_type: str) -> None:
    # Ranks may have begun from other draws; the pieces of a weight must be those of one.
    for tensor in [*block.parameters(), *block.buffers()]:
        if tensor.is_meta or is_piece(tensor):
            continue
        tensor.data = tensor.data.to(device_type)
        distributed.broadcast(tensor.data, src=0)


def sharding_of(network: nn.Module) -> Sharding | None:
    """Return how a network was cut, or None if it is whole on every rank."""
    plan: Sharding | None = getattr(unwrap(network), "sharding", None)
    return plan


def is_piece(tensor: Tensor) -> bool:
    """Return whether a tensor is one rank's piece of a larger one."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its piece, or all of it."""
    held: Any = tensor
    piece: Tensor = held.to_local() if is_piece(tensor) else tensor
    return piece


def duplicate(network: nn.Module) -> nn.Module:
    """Return a copy of a network; that of a sharded one is in the same pieces."""
    plan = sharding_of(network)
    if plan is None:
        return copy.deepcopy(network)
    other = shard(copy.deepcopy(plan.skeleton), plan.mesh, plan.dtype)
    other.to_empty(device=plan.mesh.device_type)  # buffers, too
    with torch.no_grad():
        for ours, theirs in zip(_held(other), _held(network), strict=True):
            local(ours).copy_(local(theirs))
    return other


def _held(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def whole(network: nn.Module) -> nn.Module:
    """Return a network whose weights are whole, on the CPU of the first rank; a network that is whole as it is.

    Every rank calls it. On the others the weights of what is returned have no memory.
    """
    plan = sharding_of(network)
    if plan is None:
        return network
    other, first = copy.deepcopy(plan.skeleton), distributed.get_rank() == 0
    gathered = {name: gather(p) for name, p in network.named_parameters()}
    if first:
        other.load_state_dict(gathered, strict=False, assign=True)
        for ours, theirs in zip(other.buffers(), network.buffers(), strict=True):
            ours.data = theirs.detach().cpu().clone()
    return other


def whole_denoiser(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """Return a denoiser round the :func:`whole` network. Every rank calls it."""
    return replace(denoiser, network=whole(unwrap(denoiser.network)))


def gather(tensor: Tensor) -> Tensor:
    """Return all of a tensor on the CPU of the first rank, an empty one on the others; every rank calls it."""
    if not is_piece(tensor):
        return tensor
    piece: Any = tensor.detach()
    full: Tensor = piece.full_tensor()
    # Not the same memory: of one rank of one piece the whole is the piece.
    return full.cpu().clone() if distributed.get_rank() == 0 else full.new_empty(0, device="cpu")


def gather_state(state: Any) -> Any:
    """Return an optimiser's ``state_dict`` with whole tensors on the first rank; every rank calls it."""
    if isinstance(state, dict):
        return {name: gather_state(value) for name, value in state.items()}
    return gather(state) if isinstance(state, Tensor) else state


def scatter_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimiser's ``state_dict`` of whole tensors with this rank's pieces of those that are cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {}
    for number, own in state["state"].items():
        parameter = parameters[number]
        values[number] = {name: _like(parameter, value) for name, value in own.items()}
    return {**state, "state": values}


def _like(parameter: Tensor, value: Any) -> Any:
    if not (isinstance(value, Tensor) and is_piece(parameter) and value.shape == parameter.shape):
        return value
    from torch.distributed.tensor import DTensor

    piece: Any = parameter
    rows = value[_rows(parameter)].to(piece.to_local().device).clone()
    return DTensor.from_local(
        rows, piece.device_mesh, piece.placements, run_check=False, shape=piece.shape, stride=piece.stride()
    )


def _rows(parameter: Any) -> slice:
    # Pieces are those of torch.chunk: equal ones, of which the last may be smaller or empty.
    mesh = parameter.device_mesh
    place, number = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    share = -(-parameter.shape[0] // number)
    start, stop = (min(end * share, parameter.shape[0]) for end in (place, place + 1))
    if stop - start != (held := parameter.to_local().shape[0]):
        raise RuntimeError(f"rank {place} of {number} holds {held} rows of {tuple(parameter.shape)}.")
    return slice(start, stop)


@torch.no_grad()
def load_pieces(network: nn.Module, file: Path) -> None:
    """Read this rank's pieces of a network from a file of whole weights, and nothing else of it.

    Args:
        network: a sharded one.
        file: safetensors, as ``safetensors.torch.save_model`` writes them.

    Raises:
        ValueError: the file holds other weights.
    """
    weights = dict(network.named_parameters())
    with safe_open(str(file), "pt") as saved:
        names = set(saved.keys())
        wanted = set(network.state_dict())
        if names != wanted:
            raise ValueError(f"{file} lacks {sorted(wanted - names)[:4]}, and holds {sorted(names - wanted)[:4]}.")
        for name, parameter in weights.items():
            rows = saved.get_slice(name)
            if tuple(rows.get_shape()) != tuple(parameter.shape):
                raise ValueError(f"{file}: {name} is {rows.get_shape()}, expected {tuple(parameter.shape)}.")
            local(parameter).copy_(rows[_rows(parameter)])
        rest = {name: saved.get_tensor(name) for name in names - set(weights)}
    network.load_state_dict(rest, strict=False)


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a norm of ``most`` over all weights, also those of other ranks; return the norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    total: Any = nn.utils.get_total_norm(gradients)
    norm: Tensor = total.full_tensor() if is_piece(total) else total
    nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm
