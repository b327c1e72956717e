"""What the processes of a run have to agree on: gradients after the last micro-batch, and weights always.

Networks wrapped in DDP average their gradients themselves; for all others it is done here.
"""

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.nn.parallel import DistributedDataParallel

from scorefield.models.preflight import check_device
from scorefield.training.options import PROBE
from scorefield.training.sharding import is_piece, local, sharding_of

T = TypeVar("T")

AGAIN = "scorefield-restarted"
"""Scheme of the address at which ranks meet that were started again."""


@contextmanager
def sync_only_if(last: bool, networks: Iterable[nn.Module], accelerator: Accelerator) -> Iterator[None]:
    """Let DDP wait with its all-reduce until the last micro-batch; forward and backward both belong inside."""
    with ExitStack() as stack:
        if not last:
            for network in networks:
                stack.enter_context(accelerator.no_sync(network))
        yield


@contextmanager
def without_others(networks: Iterable[nn.Module], accelerator: Accelerator) -> Iterator[None]:
    """Let DDP share neither gradients nor buffers: a rank may stop on the way, and none waits for it."""
    wrapped: list[Any] = [getattr(network, "_orig_mod", network) for network in networks if is_ddp(network)]
    with sync_only_if(False, wrapped, accelerator):
        for network in wrapped:
            network.require_forward_param_sync = False
        try:
            yield
        finally:
            for network in wrapped:
                network.require_forward_param_sync = True


def meeting() -> dict[str, Any]:
    """Return how ranks that torchrun has started again meet, for ``InitProcessGroupKwargs``; empty for others.

    Its store lives on, with the addresses of the ranks before: gloo and NCCL would call those that are gone.
    """
    told = os.environ
    if told.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or told.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return {}
    with suppress(RuntimeError):  # known already
        register_rendezvous_handler(AGAIN, _meet_again)
    return {"init_method": f"{AGAIN}://"}


def _meet_again(
    url: str, timeout: timedelta = timedelta(hours=2), **others: Any
) -> Iterator[tuple[Any, int, int]]:
    told = os.environ
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        told["MASTER_ADDR"], int(told["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    own = distributed.PrefixStore(  # type: ignore[attr-defined]
        f"attempt {told['TORCHELASTIC_RESTART_COUNT']}", store
    )
    yield own, int(told["RANK"]), int(told["WORLD_SIZE"])


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
            "share a step. Launch with --multi_gpu; a training cuts its networks into pieces itself."
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
    # FSDP has averaged those of weights that are in pieces.
    gradients = [p.grad for p in network.parameters() if p.grad is not None and not is_piece(p)]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    flat = accelerator.reduce(flat, reduction="mean")
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def broadcast_weights(networks: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Give every rank the weights and buffers of the first; pieces of a sharded network stay."""
    if accelerator.num_processes == 1:
        return
    for network in networks:
        for tensor in [*network.parameters(), *network.buffers()]:
            if not is_piece(tensor):
                tensor.data.copy_(broadcast(tensor.data))


def _fingerprint(values: Tensor) -> Tensor:
    # Irrational weights, so that neither permuted nor compensating differences cancel.
    flat = values.flatten().double()
    return flat @ torch.arange(1, len(flat) + 1, device=flat.device, dtype=torch.float64).sqrt()


def verify_weights(name: str, network: nn.Module, accelerator: Accelerator) -> None:
    """Raise ``RuntimeError`` if the ranks hold different weights, judged by a weighted sum of each parameter.

    Of a sharded network those are compared that hold the same pieces.
    """
    sums = torch.stack([_fingerprint(local(p.detach())) for p in network.parameters()])
    every_rank = accelerator.gather(sums).view(accelerator.num_processes, -1)
    pieces = 1 if (plan := sharding_of(network)) is None else plan.ranks[1]
    if not bool((every_rank == every_rank[:pieces].repeat(len(every_rank) // pieces, 1)).all()):
        raise RuntimeError(
            f"weights of phase {name!r} differ between ranks: a gradient was not averaged. Resume from the last "
            "checkpoint, and report what the loss does."
        )


def check_shared(out: Path, accelerator: Accelerator, patience: float = 10.0) -> None:
    """Raise ``ValueError`` on every rank where one does not see what the first writes in ``out``.

    Leaves nothing there. A file system of a network may take seconds to show it.
    """
    if accelerator.num_processes == 1:
        return
    with ExitStack() as stack:
        places = (out.absolute(), *out.absolute().parents)  # another one on each machine, maybe
        token: list[Any] = [0, ""]
        if accelerator.is_main_process:
            up = next(number for number, path in enumerate(places) if path.is_dir())
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix=PROBE, dir=places[up]))
            token = [up, Path(made).name]
        broadcast_object_list(token)
        place, end = places[min(token[0], len(places) - 1)] / token[1], time.monotonic() + patience
        while not (seen := place.is_dir()) and time.monotonic() < end:
            time.sleep(0.1)
        every = gather_object([(seen, socket.gethostname())])
    blind = [rank for rank, (seen, _) in enumerate(every) if not seen]
    if blind:
        raise ValueError(
            f"--out {out} is not one folder for all ranks: rank {blind[0]} on {every[blind[0]][1]} does not see "
            f"what rank 0 on {every[0][1]} writes there. Let --out be a folder that all machines share."
        )


def first_says(value: T) -> T:
    """Return on all ranks what the first one passes."""
    said = [value]
    if PartialState().num_processes > 1:
        broadcast_object_list(said)
    return said[0]


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
