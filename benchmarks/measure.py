"""Seconds and memory of contenders that take turns, so that other load on the machine affects all alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ratio:
    """Median, lowest and highest of the ratios of all rounds."""

    median: float
    low: float
    high: float


def take_turns(
    contenders: Mapping[str, Iterator[Any]], *, iterations: int, rounds: int, warmup: int, device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Return seconds of ``iterations`` steps of each contender in each round; every other round is reversed."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            spent = _time(contenders[name], iterations, device, clock)
            if turn >= warmup:
                seconds[name].append(spent)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Return the ratio of two contenders' seconds, computed round by round."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def saved_bytes(contender: Iterator[Any], iterations: int, networks: list[nn.Module]) -> int:
    """Return the largest number of bytes that autograd kept for backward passes at one time.

    Each storage counts once; parameters do not count.
    """
    ledger = _Ledger({p.untyped_storage().data_ptr() for network in networks for p in network.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Held(tensor, ledger), lambda held: held.tensor):
        for _ in range(iterations):
            next(contender)
    return ledger.peak


def peak_bytes(contender: Iterator[Any], iterations: int, device: torch.device) -> int | None:
    """Return the most bytes allocated on a GPU beyond those allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(iterations):
        next(contender)
    return torch.cuda.max_memory_allocated(device) - before


class _Ledger:
    # How many saved tensors use each storage, and the bytes of all storages in use.
    def __init__(self, ignored: set[int]) -> None:
        self.ignored, self.users = ignored, dict[int, int]()
        self.bytes = self.peak = 0

    def add(self, pointer: int, size: int) -> None:
        if self.users.get(pointer, 0) == 0:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self.users[pointer] = self.users.get(pointer, 0) + 1

    def remove(self, pointer: int, size: int) -> None:
        self.users[pointer] -= 1
        if self.users[pointer] == 0:
            self.bytes -= size


class _Held:
    # Lives as long as the graph holds the tensor.
    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.ledger = tensor, ledger
        self.pointer, self.size = storage.data_ptr(), storage.nbytes()
        self.counted = self.pointer not in ledger.ignored
        if self.counted:
            ledger.add(self.pointer, self.size)

    def __del__(self) -> None:
        if self.counted:
            self.ledger.remove(self.pointer, self.size)


def _time(contender: Iterator[Any], iterations: int, device: torch.device, clock: Callable[[], float]) -> float:
    _wait(device)
    start = clock()
    for _ in range(iterations):
        next(contender)
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
