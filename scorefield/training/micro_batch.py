"""``--micro-batch auto``: how many images go through the networks at a time, found before a run begins.

    config = settle(config, accelerator, lambda config: Trial(phases, batches, rollout))

A GPU is asked: an iteration in which everything learns is tried with the whole batch, and with half of it until
it fits. Other devices swap, or end the process, before they say that memory is short. There the bytes of passes of
one and of two images are measured, which tell those of any number.
"""

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
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
    """

    phases: Sequence[Phase]
    batches: Callable[[Rng], Batch]
    rollout: Rollout | None = None
    others: Sequence[nn.Module] = ()


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
    begun = next(filter(None, map(checkpoint.described, folders or (config.out / "checkpoints",))), None)
    number = first_says(0 if begun is None else begun.get("micro_batch", 0) or config.batch_size)
    if number:
        config = with_number(config, number)
        _say(f"{words(config)}, as this run began", accelerator)
        return config
    if accelerator.device.type == "cpu":
        return _by_measuring(config, accelerator, trial, smallest)
    return by_trying(config, accelerator, trial, smallest)


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
    except torch.OutOfMemoryError:
        fits = False
    gc.collect()  # behind the handler, whose traceback holds all that was computed
    if accelerator.device.type != "cpu":
        torch.accelerator.empty_cache()
    return fits


def _rehearse_with_states(config: RunOptions, accelerator: Accelerator, tried: Trial) -> None:
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
    needed, room = needs(config, accelerator, trial, smallest)
    numbers = candidates(config.batch_size, smallest)
    good = [number for number in numbers if _everywhere(needed(number) <= room, accelerator)]
    if not good:
        raise ValueError(
            f"--micro-batch auto: {numbers[-1]} image(s) a pass would take {needed(numbers[-1]) / GIB:.2f} GiB "
            f"beside the weights, of {room / GIB:.2f} that may be filled. Pass a number to try all the same."
        )
    chosen = with_number(config, good[0])
    _say(
        f"{words(chosen)}: {needed(good[0]) / GIB:.2f} GiB beside the weights, as measured with {smallest} and "
        f"{2 * smallest}, of {room / GIB:.2f} that may be filled", accelerator,
    )  # fmt: skip
    return chosen


def needs(
    config: RunOptions, accelerator: Accelerator, trial: Callable[[Any], Trial], smallest: int = 1
) -> tuple[Callable[[int], int], int]:
    """Return a function from images a pass to bytes beside the weights on a CPU, and the bytes that may be filled.

    The bytes of passes lie on a straight line through those of ``smallest`` images and of twice as many.
    """
    few, stays, room, found = smallest, 0, 0, []
    for number in (few, 2 * few):
        tried = trial(with_number(config, number))
        roles = [role_of(phase.network, config.optimizer) for phase in tried.phases]
        networks = [*tried.others, *(one for phase in tried.phases for one in phase.networks().values())]
        stays = sum(role.states + role.gradients for role in roles)
        run = partial(rehearse, tried.phases, tried.batches, accelerator, rollout=tried.rollout, seed=config.seed)
        found.append(measured(run, networks))
        room = int(SHARE * free_bytes())  # while there are averages
        del tried, run, networks
    each = max(0, found[1] - found[0]) / few
    return lambda number: int(stays + found[0] + each * (number - few)), room


def foreseen(
    config: Config, bytes_of: Callable[[Any], int | None], room: int, smallest: int = 1
) -> tuple[Config, str]:
    """Return the options as ``--micro-batch auto`` would leave them, and what ``--dry-run`` says of it.

    Args:
        config: of the run.
        bytes_of: options with a number -> the most bytes at one time; None where they cannot be predicted.
        room: bytes that may be filled.
        smallest: as of :func:`settle`.
    """
    if getattr(config, "micro_batch", 0) != AUTO:
        return config, ""
    for number in candidates(config.batch_size, smallest):
        one = with_number(config, number)
        if (needed := bytes_of(one)) is None:
            return config, UNFORESEEN
        if needed <= room:
            return one, f"{words(one)}, as predicted for the {room / GIB:.2f} GiB that may be filled here"
    return config, f"--micro-batch auto: no pass is predicted to fit into the {room / GIB:.2f} GiB here"


def unforeseen(config: RunOptions) -> str:
    """Return what ``--dry-run`` says of ``--micro-batch auto`` where no bytes are predicted."""
    return UNFORESEEN if getattr(config, "micro_batch", 0) == AUTO else ""


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
