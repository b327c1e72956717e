"""What the processes of a run have to agree on: gradients after the last micro-batch, and weights always.

Networks wrapped in DDP average their gradients themselves; for all others it is done here.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scorefield.models.preflight import check_device


@contextmanager
def sync_only_if(last: bool, networks: Iterable[nn.Module], accelerator: Accelerator) -> Iterator[None]:
    """Let DDP wait with its all-reduce until the last micro-batch; forward and backward both belong inside."""
    with ExitStack() as stack:
        if not last:
            for network in networks:
                stack.enter_context(accelerator.no_sync(network))
        yield


def check_told_device() -> None:
    """Raise ``ValueError`` for a device of the launcher that torch does not know, or that is not here."""
    if told := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        try:
            if check_device(told).type == "meta":
                raise ValueError("device must be one that is here, such as cpu; got 'meta', an empty one.")
        except ValueError as error:
            raise ValueError(f"the launcher sets ACCELERATE_TORCH_DEVICE={told}: {error}") from error


def check_launch(accelerator: Accelerator) -> None:
    """Raise ``ValueError`` for a launch whose ranks do not know of each other, or share one network in pieces."""
    if accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise ValueError(
            f"{accelerator.distributed_type.value} shards one network; here several, each with its optimiser, "
            "share a step, and a checkpoint holds them whole. Launch with --multi_gpu (DDP); for memory use bf16 "
            "or gradient checkpointing."
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {world} but Accelerate sees {accelerator.num_processes} process(es): each rank would "
            "work alone. Without a GPU launch with torchrun and set ACCELERATE_USE_CPU=1."
        )


def check_same(what: str, value: int, fix: str, accelerator: Accelerator) -> None:
    """Raise ``ValueError`` on every rank unless all of them hold the same number."""
    every_rank = accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()
    if len(set(every_rank)) > 1:
        raise ValueError(f"{what} must be the same on all ranks; got {every_rank}. {fix}")


def check_same_fields(own: Mapping[str, Any], fix: str, accelerator: Accelerator) -> None:
    """Raise ``ValueError`` on every rank, naming the fields, unless all of them hold the same ones."""
    if accelerator.num_processes == 1:
        return
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in own.items()}
    every = gather_object([texts])
    fields = sorted({name for one in every for name in one})
    names = [name for name in fields if len({one.get(name) for one in every}) > 1]
    if names:
        listing = "; ".join(f"{name}: {', '.join(str(one.get(name)) for one in every)}" for name in names)
        raise ValueError(f"the {len(every)} ranks of a run must be alike; they differ in {listing}. {fix}")


def average_gradients(network: nn.Module, accelerator: Accelerator) -> None:
    """Average the gradients over ranks in one flat all-reduce, unless DDP has done it."""
    if accelerator.num_processes == 1 or is_ddp(network):
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    flat = accelerator.reduce(flat, reduction="mean")
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def broadcast_weights(networks: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Give every rank the weights and buffers of the first."""
    if accelerator.num_processes == 1:
        return
    for network in networks:
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.data.copy_(broadcast(tensor.data))


def _fingerprint(values: Tensor) -> Tensor:
    # Irrational weights, so that neither permuted nor compensating differences cancel.
    flat = values.flatten().double()
    return flat @ torch.arange(1, len(flat) + 1, device=flat.device, dtype=torch.float64).sqrt()


def verify_weights(name: str, network: nn.Module, accelerator: Accelerator) -> None:
    """Raise ``RuntimeError`` if the ranks hold different weights, judged by a weighted sum of each parameter."""
    sums = torch.stack([_fingerprint(p.detach()) for p in network.parameters()])
    every_rank = accelerator.gather(sums).view(accelerator.num_processes, -1)
    if not bool((every_rank == every_rank[0]).all()):
        raise RuntimeError(
            f"weights of phase {name!r} differ between ranks: a gradient was not averaged. Resume from the last "
            "checkpoint, and report what the loss does."
        )


def shared_rows(work: Callable[[Tensor], Tensor], num_rows: int, accelerator: Accelerator) -> Tensor:
    """``work`` on row numbers 0 to ``num_rows``, in equal shares by all ranks; every rank gets all rows in order.

    Args:
        work: (m,) row numbers -> (m, ...) rows; must not depend on which others a rank is given.
        num_rows: in all.
        accelerator: the ranks.
    """
    share = -(-num_rows // accelerator.num_processes)
    # Ranks gather equal shapes only, so the last share starts again from row 0.
    own = (accelerator.process_index * share + torch.arange(share)) % num_rows
    rows: Tensor = accelerator.gather(work(own).to(accelerator.device).contiguous())
    return rows[:num_rows]


def is_ddp(network: nn.Module) -> bool:
    """Return whether DDP averages this network's gradients."""
    return isinstance(getattr(network, "_orig_mod", network), DistributedDataParallel)
