"""``--micro-batch auto``: how many images go through the networks at a time, found before a run begins.

    config = settle(config, accelerator, lambda config: Trial(phases, batches, rollout))

A GPU is asked: an iteration in which everything learns is tried with the whole batch, and with half of it until
it fits. Other devices swap, or end the process, before they say that memory is short. There the bytes of passes
are measured, of one image and of ever more, as long as the next number promises to fit.
"""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from scorefield.randomness import Rng
from scorefield.training import checkpoint
from scorefield.training.launcher import is_first_rank
from scorefield.training.loop import Batch, Phase, Rollout, rehearse
from scorefield.training.memory import measured, role_of
from scorefield.training.options import AUTO, RunOptions, images_per_pass, largest_divisor, passes_per_iteration
from scorefield.training.ranks import first_says

Config = TypeVar("Config", bound=RunOptions)

SHARE = 0.8
"""Share of the free memory that is filled where it cannot be tried: what is counted are tensors alone."""

GIB = 2**30


@dataclass(frozen=True, eq=False)
class Trial:
    """What a run will do in an iteration, for :func:`scorefield.training.loop.rehearse`.

    Attributes:
        phases: all that learn, with their averages.
        batches: of :func:`scorefield.training.options.images_per_pass` images.
        rollout: as ``train`` takes it.
        others: networks that take part and do not learn, such as the teacher.
        also: what the run asks of the networks before its iterations, without gradients.
    """

    phases: Sequence[Phase]
    batches: Callable[[Rng], Batch]
    rollout: Rollout | None = None
    others: Sequence[nn.Module] = ()
    also: Callable[[], None] | None = None


def candidates(batch_size: int, smallest: int = 1) -> list[int]:
    """Return the divisors of a batch that are tried, each at most half of the one before.

    >>> candidates(24), candidates(7), candidates(8, smallest=2)
    ([24, 12, 6, 3, 1], [7, 1], [8, 4, 2])
    """
    found = [batch_size]
    while found[-1] > 1 and (following := largest_divisor(batch_size, found[-1] // 2)) >= smallest:
        found.append(following)
    return found


def settle(
    config: Config, accelerator: Accelerator, trial: Callable[[Any], Trial], *, smallest: int = 1,
    folders: Sequence[Path] = (),
) -> Config:  # fmt: skip
    """Return the options with a number in place of ``--micro-batch auto``; says which. Nothing is learned.

    All ranks call it, and get the same number. A run that goes on keeps the one that it began with.

    Args:
        config: of the run; returned as it is where a number was given.
        accelerator: of all ranks.
        trial: options with a number -> what is tried.
        smallest: number of images that the losses need at least.
        folders: of checkpoints; by default that of ``--out``.

    Raises:
        ValueError: not even the smallest number fits.
    """
    if getattr(config, "micro_batch", 0) != AUTO:
        return config
    if number := first_says(begun_with(config, smallest, folders)):
        config = with_number(config, number)
        _say(f"{words(config)}{AS_BEGUN}", accelerator)
        return config
    if accelerator.device.type == "cpu":
        return _by_measuring(config, accelerator, trial, smallest)
    return by_trying(config, accelerator, trial, smallest)


AS_BEGUN = ", as this run began"
"""What is said of a number that a checkpoint names."""


def begun_with(config: RunOptions, smallest: int = 1, folders: Sequence[Path] = ()) -> int:
    """Return how many images a pass of the run in ``--out`` has; 0 where there is no checkpoint.

    The whole batch, where a checkpoint names no number that can be: it is older than the option, or damaged.
    Arguments as of :func:`settle`.
    """
    found = next(filter(None, map(checkpoint.described, folders or (config.out / "checkpoints",))), None)
    if found is None:
        return 0
    number = found.get("micro_batch")
    if type(number) is int and number >= smallest and config.batch_size % number == 0:  # True is no number
        return number
    return config.batch_size


def with_number(config: Config, number: int) -> Config:
    """Return the options with so many images a pass."""
    changed: Config = replace(config, micro_batch=number)  # type: ignore[call-arg]
    return changed


def words(config: RunOptions) -> str:
    """Return in words how an iteration is divided."""
    number, images = passes_per_iteration(config), images_per_pass(config)
    return f"--micro-batch auto: {number} pass{'es' * (number > 1)} of {images} images an iteration"


def by_trying(
    config: Config, accelerator: Accelerator, trial: Callable[[Any], Trial], smallest: int = 1
) -> Config:
    """Return the options with the largest number of images whose iteration does not run out of memory anywhere.

    Raises ``ValueError`` where none does.
    """
    for number in candidates(config.batch_size, smallest):
        tried = with_number(config, number)
        if _everywhere(_fits(tried, accelerator, trial), accelerator):
            _say(f"{words(tried)}, as tried", accelerator)
            return tried
    raise ValueError(
        f"--micro-batch auto: not even {number} image(s) a pass fit into the memory of every process. Pass "
        "--gradient-checkpointing, or read docs/scaling.md."
    )


def _fits(config: RunOptions, accelerator: Accelerator, trial: Callable[[Any], Trial]) -> bool:
    try:
        _rehearse_with_states(config, accelerator, trial(config))
        fits = True
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        fits = False
    gc.collect()  # behind the handler, whose traceback holds all that was computed
    if accelerator.device.type != "cpu":
        torch.accelerator.empty_cache()
    return fits


def _is_out_of_memory(error: RuntimeError) -> bool:
    # The libraries beside the allocator say CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED and the like.
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def _rehearse_with_states(config: RunOptions, accelerator: Accelerator, tried: Trial) -> None:
    if tried.also is not None:
        tried.also()
    # Beside room for the moments, which optimisers allocate at their first step.
    sizes = [role_of(phase.network, config.optimizer).states for phase in tried.phases]
    apart = getattr(config, "offload", False)
    held = [] if apart else [torch.empty(size, dtype=torch.uint8, device=accelerator.device) for size in sizes]
    rehearse(
        tried.phases, tried.batches, accelerator, rollout=tried.rollout, seed=config.seed,
        accumulate=passes_per_iteration(config),
    )  # fmt: skip
    del held


def _everywhere(fits: bool, accelerator: Accelerator) -> bool:
    return bool(accelerator.gather(torch.tensor([fits], device=accelerator.device)).all())


def _by_measuring(
    config: Config, accelerator: Accelerator, trial: Callable[[Any], Trial], smallest: int
) -> Config:
    numbers = candidates(config.batch_size, smallest)
    peaks, stays, room, good = [(0, 0)], 0, 0, 0
    for number in ladder(numbers):
        # Of the second rung at most twice as much is expected, and all that is free may be filled to learn more.
        most = room / SHARE if len(peaks) == 2 else room
        if len(peaks) > 1 and not _everywhere(stays + _secant(peaks, number) <= most, accelerator):
            break
        stays, peak, room = needs(with_number(config, number), accelerator, trial)
        peaks.append((number, peak))
        if not _everywhere(stays + peak <= room, accelerator):
            break
        good = number if number in numbers else good
    known = dict(peaks)
    if not good:
        raise ValueError(_too_little(numbers[-1], stays + known[numbers[-1]], room, " beside the weights"))
    chosen = with_number(config, good)
    _say(
        f"{words(chosen)}: {(stays + known[good]) / GIB:.2f} GiB beside the weights, as measured, of "
        f"{room / GIB:.2f} that may be filled", accelerator,
    )  # fmt: skip
    return chosen


def _too_little(number: int, needed: int, room: int, beside: str = "") -> str:
    return (
        f"--micro-batch auto: {number} image(s) a pass would take {needed / GIB:.2f} GiB{beside}, of "
        f"{room / GIB:.2f} that may be filled. Pass a number to try all the same."
    )


def ladder(numbers: Sequence[int]) -> list[int]:
    """Return the numbers of images that are measured, each at most twice the one before, up to all candidates.

    >>> ladder([24, 12, 6, 3, 1]), ladder([7, 1])
    ([1, 2, 3, 6, 12, 24], [1, 2, 4, 7])
    """
    rungs: list[int] = []
    for number in reversed(numbers):
        while rungs and 2 * rungs[-1] < number:
            rungs.append(2 * rungs[-1])
        rungs.append(number)
    return rungs


def _secant(peaks: Sequence[tuple[int, int]], number: int) -> float:
    # A peak is the largest of what several moments hold, each in proportion: it rises ever more steeply. So this
    # is the least that it can be, and says only whether it is worth measuring.
    (one, low), (two, high) = peaks[-2:]
    return high + (high - low) / (two - one) * (number - two)


def needs(config: RunOptions, accelerator: Accelerator, trial: Callable[[Any], Trial]) -> tuple[int, int, int]:
    """Return bytes on a CPU, as measured: what stays beside the weights, the most in a pass, what may be filled.

    Args:
        config: with a number of images a pass.
        accelerator: of this rank.
        trial: options -> what is tried.
    """
    tried = trial(config)
    roles = [role_of(phase.network, config.optimizer) for phase in tried.phases]
    networks = [*tried.others, *(one for phase in tried.phases for one in phase.networks().values())]

    def run() -> None:
        if tried.also is not None:
            tried.also()
        rehearse(tried.phases, tried.batches, accelerator, rollout=tried.rollout, seed=config.seed)

    peak = measured(run, networks)
    stays = sum(role.states + role.gradients for role in roles)
    return stays, peak, int(SHARE * free_bytes())  # while there are averages


def foreseen(
    config: Config, bytes_of: Callable[[Any], int | None], room: int, device: torch.device, *, smallest: int = 1,
    folders: Sequence[Path] = (),
) -> tuple[Config, str]:  # fmt: skip
    """Return the options as ``--micro-batch auto`` would leave them, and what ``--dry-run`` says of it.

    Args:
        config: of the run.
        bytes_of: options with a number -> the most bytes at one time; None where they cannot be predicted.
        room: bytes that may be filled.
        device: of the run. Only a GPU would be tried in spite of a prediction that nothing fits.
        smallest: as of :func:`settle`.
        folders: likewise.

    Raises:
        ValueError: not even the smallest number is predicted to fit on a CPU.
    """
    if getattr(config, "micro_batch", 0) != AUTO:
        return config, ""
    if number := begun_with(config, smallest, folders):
        one = with_number(config, number)
        return one, f"{words(one)}{AS_BEGUN}"
    number, needed = config.batch_size, 0
    for number in candidates(config.batch_size, smallest):
        one = with_number(config, number)
        if (found := bytes_of(one)) is None:
            return config, UNFORESEEN
        if (needed := found) <= room:
            return one, f"{words(one)}, as predicted for the {room / GIB:.2f} GiB that may be filled here"
    if device.type == "cpu":
        raise ValueError(_too_little(number, needed, room))
    return config, f"--micro-batch auto: no pass is predicted to fit into the {room / GIB:.2f} GiB here"


def unforeseen(config: Config, *, smallest: int = 1, folders: Sequence[Path] = ()) -> tuple[Config, str]:
    """Return what :func:`foreseen` does where no bytes are predicted."""
    return foreseen(config, lambda one: None, 0, best_device(), smallest=smallest, folders=folders)


UNFORESEEN = "--micro-batch auto: chosen at the start by measuring or trying; not predicted for this network"
"""What ``--dry-run`` says where bytes of passes are not predicted."""


def best_device() -> torch.device:
    """Return the device that a run would take here, for ``--dry-run``."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def room_for(device: torch.device, here: Mapping[str, nn.Module]) -> int:
    """Return the bytes that a run may fill on a device; what its networks take there already is among them."""
    weights = [p for network in here.values() for p in network.parameters() if p.device.type == device.type]
    held = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in weights}.values())
    if device.type == "cpu":
        return int(SHARE * (free_bytes() + held))
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE * (free + torch.cuda.memory_reserved(device)))


def free_bytes() -> int:
    """Return the bytes of this machine's memory that are free for this process, of several an equal share."""
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(told["MemAvailable"].split()[0])
    with suppress(OSError, ValueError):  # no limit of a container
        group = Path("/sys/fs/cgroup")
        most, now = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, most - now))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _say(text: str, accelerator: Accelerator) -> None:
    if accelerator.is_main_process and is_first_rank():
        print(text, flush=True)
