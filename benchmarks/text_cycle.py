"""Memory and seconds of one text-to-image DMD2 cycle: three copies of the weights, or one shared backbone.

    python benchmarks/text_cycle.py --shape sdxl --precision bf16 --configs configs --bytes-only
    python benchmarks/text_cycle.py --shape sdxl --precision bf16 --configs configs --device cuda

Bytes of parameters, gradients and AdamW's state are counted on the meta device, without weights. Then cycles are
run with random weights: --student-every iterations, of which the last updates the student, too; without GAN term
and moving average. On a GPU each contender is built, measured and freed by itself, and one that does not fit is
reported as out of memory. Ratios are printed only if all contenders start from the same losses, which is checked
in float64 with the toy world's network. --configs is the same folder as for teachers.py: sd15_unet.json and
sdxl_unet.json.
"""

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo
import tyro
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from measure import Ratio, peak_bytes, ratio, saved_bytes, take_turns
from text_contenders import COMPILED, COPIES, NAMES, SHAPES, SHARED, TWO_CALLS, Case, count_bytes, rank_of, start
from torch import Tensor

RATIOS = (
    (COPIES, SHARED), (TWO_CALLS, SHARED), (COPIES, COMPILED[0]), (SHARED, COMPILED[1]),
)  # fmt: skip
TOLERANCE, COMPILED_TOLERANCE = 1e-9, 1e-4  # compiled code computes the sines of t otherwise, in float32
GOAL = 0.25
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True)
class Config(Case):
    """Count the bytes of three copies and of a shared backbone, and time one cycle of DMD2 with each."""

    bytes_only: bool = False
    """Count bytes, and run nothing."""
    compile: bool = False
    """Add contenders with compiled networks; compiling takes minutes, twice."""
    rounds: int = 5
    """Measured cycles of each contender."""
    warmup: int = 1
    """Cycles of each contender before the measured ones."""
    alone: bool = False
    """Build, measure and free one contender after the other, as on a GPU, instead of taking turns."""
    clock: Literal["wall", "process"] = "wall"
    """process counts seconds of processor time, for one thread on a machine that is shared. CPU only."""
    out: Path | None = None
    """File for the result as JSON."""

    @property
    def in_turns(self) -> bool:
        """Return whether all contenders are in memory together and take turns."""
        return self.device == "cpu" and not self.alone


@dataclass(frozen=True)
class Cycle:
    """Cost of a cycle.

    Attributes:
        seconds: Seconds of each round.
        saved_bytes: Most bytes that autograd kept for backward passes at one time.
        peak_bytes: Most bytes in use on the GPU at one time, weights and optimisers included; None on a CPU.
    """

    seconds: list[float]
    saved_bytes: int
    peak_bytes: int | None


def main(config: Config) -> dict[str, Any]:
    """Count, check, measure and print; also write the result to ``--out``."""
    check(config)
    counted = count_bytes(config)
    result: dict[str, Any] = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)), "device": device_name(config),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "bytes": counted,
    }  # fmt: skip
    show_bytes(config, counted)
    if not config.bytes_only:
        # A compiled contender that fell back to eager code would be measured under a wrong name.
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            result |= compared(config)
        show_cycles(result)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=2))
    return result


def compared(config: Config) -> dict[str, Any]:
    """Return differences of the losses, costs of the cycles, and their ratios.

    Raises ``ValueError`` if a contender computes other losses.
    """
    errors = loss_errors(config)
    for name, error in errors.items():
        if not error <= (COMPILED_TOLERANCE if name in COMPILED else TOLERANCE):
            raise ValueError(f"{name!r} does not compute the losses of {SHARED!r}, relative error {error:g}.")
    cycles = measure(config)
    found = {name: OUT_OF_MEMORY if c is None else dataclasses.asdict(c) for name, c in cycles.items()}
    return {"loss_errors": errors, "cycles": found, "ratios": ratios(config, cycles)}


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range or contradict each other."""
    if min(config.rounds, config.batch, config.student_every, rank_of(config)) < 1 or config.warmup < 0:
        raise ValueError(
            "--rounds, --batch, --student-every and --rank must be at least 1 and --warmup at least 0; got "
            f"{config.rounds}, {config.batch}, {config.student_every}, {rank_of(config)} and {config.warmup}."
        )
    if config.guidance == 1:
        raise ValueError(
            "--guidance 1 means no guidance, which is one network call, batched or not. Pass another scale."
        )
    if config.clock == "process" and config.device != "cpu":
        raise ValueError("--clock process does not measure a GPU; use --clock wall, or --device cpu.")
    if SHAPES[config.shape].file and config.configs is None:
        raise ValueError(
            f"--shape {config.shape} needs --configs, a folder with {SHAPES[config.shape].file}.json."
        )
    if config.device == "cuda" and not config.bytes_only and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here. Pass --device cpu, or --bytes-only.")


def device_name(config: Config) -> str:
    if config.bytes_only:
        return "meta"
    return torch.cuda.get_device_name() if config.device == "cuda" else "CPU"


# Cycles.


def contenders(config: Config) -> list[str]:
    return [*NAMES, *(COMPILED if config.compile else ())]


def make_accelerator(config: Config, *handlers: AutocastKwargs) -> Accelerator:
    return Accelerator(
        cpu=config.device == "cpu", mixed_precision=config.precision, kwargs_handlers=list(handlers)
    )


def loss_errors(config: Config, steps: int = 2) -> dict[str, float]:
    """Return the largest relative differences from the shared backbone's losses, on the toy world in float64.

    Full weights move otherwise than adapters do. So for three copies only the first losses are compared, for the
    others those of ``steps`` updates.
    """
    small = replace(config, shape="toy", batch=min(config.batch, 2), student_every=1, rank=min(rank_of(config), 8))
    runs = first_losses(small, contenders(config), steps)
    ours = runs.pop(SHARED)
    apart = {name: ((run - ours) / ours).abs() for name, run in runs.items()}
    return {name: float((error[:1] if name.startswith(COPIES) else error).max()) for name, error in apart.items()}


def first_losses(config: Config, names: Sequence[str], steps: int) -> dict[str, Tensor]:
    """Return losses (steps, 2) of student and fake score in float64."""
    # One process has one mixed precision; this switches it off.
    accelerator = make_accelerator(config, AutocastKwargs(enabled=False))
    runs = {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for name in names:
            running, _ = start(config, name, accelerator, torch.float64)
            metrics = [next(running).metrics for _ in range(steps)]
            runs[name] = torch.tensor(
                [[float(m[f"{role}/loss"]) for role in ("student", "fake")] for m in metrics]
            )
    finally:
        torch.set_default_dtype(default)
    return runs


def measure(config: Config) -> dict[str, Cycle | None]:
    """Return the cost of the cycles; None for a contender that runs out of memory."""
    accelerator, names = make_accelerator(config), contenders(config)
    if config.in_turns:
        return {**run(config, names, accelerator)}
    return {name: run_alone(config, name, accelerator) for name in names}


def run(config: Config, names: Sequence[str], accelerator: Accelerator) -> dict[str, Cycle]:
    """Return the cost of cycles of contenders that take turns."""
    device = torch.device(config.device)
    before = allocated(device)
    started = {name: start(config, name, accelerator) for name in names}
    seconds = take_turns(
        {name: running for name, (running, _) in started.items()}, iterations=config.student_every,
        rounds=config.rounds, warmup=config.warmup, device=device,
        clock=time.perf_counter if config.clock == "wall" else time.process_time,
    )  # fmt: skip
    cycles = {}
    for name, (running, networks) in started.items():
        held = allocated(device) - before
        beyond = peak_bytes(running, config.student_every, device)
        saved = saved_bytes(running, config.student_every, networks)
        cycles[name] = Cycle(seconds[name], saved, None if beyond is None else held + beyond)
    return cycles


def run_alone(config: Config, name: str, accelerator: Accelerator) -> Cycle | None:
    """Return the cost of a cycle of one contender with the memory to itself, and free that memory."""
    cycle = None
    try:
        cycle = run(config, [name], accelerator)[name]
    except torch.OutOfMemoryError:
        print(f"{name}: {OUT_OF_MEMORY}", file=sys.stderr)
    # Not in the except block: an exception that is being handled keeps the tensors of its frames alive.
    gc.collect()
    if config.compile:
        torch.compiler.reset()
    if config.device == "cuda":
        torch.cuda.empty_cache()
    return cycle


def allocated(device: torch.device) -> int:
    """Return the bytes in use on a GPU, 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def ratios(config: Config, cycles: dict[str, Cycle | None]) -> dict[str, dict[str, float]]:
    """Return ratios of seconds: round by round if contenders took turns, otherwise of medians.

    The extremes are those of any rounds.
    """
    found = {}
    for first, second in RATIOS:
        a, b = cycles.get(first), cycles.get(second)
        if a is not None and b is not None:
            compare = ratio if config.in_turns else of_medians
            found[f"{first} / {second}"] = dataclasses.asdict(compare(a.seconds, b.seconds))
    return found


def of_medians(a: list[float], b: list[float]) -> Ratio:
    """Return the ratio of the medians, and the extremes over any pair of rounds."""
    return Ratio(statistics.median(a) / statistics.median(b), min(a) / max(b), max(a) / min(b))


# Tables.


def show_bytes(config: Config, counted: dict[str, int]) -> None:
    """Print the bytes of both, and their ratio."""
    share = counted[SHARED] / counted[COPIES]
    print(f"{config.shape}, rank {rank_of(config)}, precision {config.precision}; after one update\n")
    print(f"{'parameters + gradients + AdamW':32} {'GiB':>9}")
    for name, size in counted.items():
        print(f"{name:32} {size / 2**30:9.3f}")
    print(f"{SHARED + ' / ' + COPIES:32} {share:9.3f}   goal <= {GOAL}\n")


def show_cycles(result: dict[str, Any]) -> None:
    """Print the tables of cycles and of their ratios."""
    apart = ", ".join(f"{name} {error:.1e}" for name, error in result["loss_errors"].items())
    print(f"relative difference of the losses from those of {SHARED}: {apart}")
    print(f"{result['device']}; threads: {result['threads']}\n")
    print(f"{'one cycle':32} {'s':>9} {'saved MiB':>10} {'peak GiB':>9}")
    for name, cycle in result["cycles"].items():
        if cycle == OUT_OF_MEMORY:
            print(f"{name:32} {OUT_OF_MEMORY:>30}")
            continue
        peak = "" if cycle["peak_bytes"] is None else f"{cycle['peak_bytes'] / 2**30:.2f}"
        print(
            f"{name:32} {statistics.median(cycle['seconds']):9.3f} {cycle['saved_bytes'] / 2**20:10.1f} {peak:>9}"
        )
    print(f"\n{'ratio of seconds':50} {'median':>7} {'low':>7} {'high':>7}")
    for name, values in result["ratios"].items():
        found = Ratio(**values)
        print(f"{name:50} {found.median:7.2f} {found.low:7.2f} {found.high:7.2f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
