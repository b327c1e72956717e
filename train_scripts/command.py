"""What the scripts share: a command line from a frozen dataclass, an output folder, a loop that logs."""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import torch
import tyro
from accelerate import Accelerator
from launcher import check_launcher
from torch import nn

from scorefield.atomic import check_replaceable, is_full
from scorefield.cache import fingerprint as fingerprint
from scorefield.files import printable
from scorefield.training.lock import FolderLock
from scorefield.training.refusal import Ranks, Refusal

PROBE = ".writing-probe-"
"""How folders begin that are made only to see whether one can be."""

C = TypeVar("C")
T = TypeVar("T")

RENAMED = {"--model": "--teacher", "--base": "--teacher", "--pipeline": "--teacher"}
"""Options that had other names in earlier versions."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training script can be told about its run.

    ``results`` are the folders and files in ``--out`` that a finished run leaves and a repeated one replaces.
    """

    results: ClassVar[tuple[str, ...]] = ()

    out: Path = Path("runs/run")
    """Folder for checkpoints, TensorBoard logs and the result."""
    steps: int = 1000
    """Iterations in all."""
    batch_size: int = 256
    """Images per micro-batch and process."""
    accumulate: int = 1
    """Micro-batches per iteration."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision; weights that learn stay float32. Frozen ones may become bf16, too: those of a
    text-to-image teacher on a GPU, those under a ControlNet."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW in its fused form, or with 8-bit moments (needs bitsandbytes and a GPU)."""
    compile: bool = False
    """Compile the networks with torch.compile: minutes at the start, faster steps. Not one with a critic."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third slower, far less memory. UNets only."""
    deterministic: bool = False
    """Deterministic kernels on a GPU, so that a resumed run is equal bit by bit. A CPU run always is."""
    clip_norm: float = 10.0
    """Largest norm of a network's gradient; a larger one is scaled down."""
    seed: int = 0
    """Of every random draw."""
    log_every: int = 50
    """Iterations between scalars."""
    save_every: int = 1000
    """Iterations between checkpoints and sample grids."""
    dry_run: bool = False
    """Print the resolved config, parameters, bytes per role and steps, and stop."""


def run(
    main: Callable[[C], Path | None], config_type: type[C], description: str,
    presets: Mapping[str, Callable[[], C]] | None = None,
    folders: Callable[[C], Sequence[Path]] | None = None,
) -> None:  # fmt: skip
    """Parse the command line into a config and call ``main``.

    Meanwhile no other run may use ``folders``, by default ``--out`` of a training.

    With ``presets`` the option --preset says where all values come from that are not given; the first by default.
    Bad input, or a file that cannot be read, is printed in one line and exits with 2; a run that stopped because
    it was not finite, or the disk is full, exits with 1. Ctrl-C exits with 130. A rank that gives up takes the
    others with it: all have its exit code, and it alone says why.
    """
    warnings.formatwarning = one_line
    held = ExitStack()
    ranks = Ranks(partial(_follow, held))
    try:
        with held:
            refuse_renamed(sys.argv[1:])
            default: dict[str, Any] = {} if presets is None else {"default": _preset(sys.argv[1:], presets)}
            config = tyro.cli(config_type, description=description, **default)
            for folder in _out_of(config) if folders is None else folders(config):
                hold(folder, held)
            main(config)
    except KeyboardInterrupt:
        if is_first_rank():
            print("\nstopped by Ctrl-C; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        if stop.code == 2:  # of the parser
            ranks.give_up(2)
        raise
    except Exception as error:
        message, code = _explained(error)
        if ranks.several:  # torchrun sends it as soon as one of them has ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        first = ranks.give_up(code)
        if message is None:
            raise
        if first:
            say(message)
        if ranks.several:
            _end(code)
        sys.exit(code)
    finally:
        ranks.close()


def _explained(error: Exception) -> tuple[str | None, int]:
    """What to say of an error, and the exit code; nothing to say of a fault of the program."""
    if is_full(error):
        return f"the disk is full, or its quota is used up: {error}. What was saved before is whole.", 1
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return str(error), 1 if isinstance(error, FloatingPointError) else 2
    # On a CPU torch has no class of its own for it.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"not enough memory: {error} Lower --batch-size or the size of the network.", 2
    return None, 1


def _follow(held: ExitStack, refusal: Refusal) -> None:
    """End this process as another rank ended; no exception would reach a main thread that waits for that rank."""
    held.close()
    _end(refusal.code)


def _end(code: int) -> NoReturn:
    """Exit without what Python does at its end, in which ranks wait for each other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def refuse_renamed(arguments: Sequence[str]) -> None:
    """Raise ``ValueError`` for an option of an earlier version, saying its new name."""
    for argument in arguments:
        if (flag := argument.partition("=")[0]) in RENAMED:
            raise ValueError(f"{flag} is called {RENAMED[flag]} now. Pass {RENAMED[flag]} in its place.")


def _out_of(config: Any) -> list[Path]:
    return [config.out] if isinstance(config, RunOptions) and not config.dry_run else []


def hold(folder: Path, held: ExitStack) -> None:
    """Take the folder for this run, until ``held`` closes; the first rank does it for all.

    Raises ``FolderInUseError`` where another run has it. A folder that cannot be made is refused by
    :func:`check_out`, which says why.
    """
    if not is_first_rank():
        return
    lock = FolderLock(folder)
    held.callback(lock.release)
    with suppress(OSError):
        lock.acquire()


def _preset(arguments: Sequence[str], presets: Mapping[str, Callable[[], C]]) -> C:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=next(iter(presets)))
    chosen = parser.parse_known_args(list(arguments))[0].preset
    # Tyro itself says which presets there are.
    return presets.get(chosen, next(iter(presets.values())))()


def say(message: str) -> None:
    """Say in one line why this rank ends."""
    rank = "" if is_first_rank() else f" on rank {os.environ['RANK']}"
    print(f"error{rank}: {printable(message)}", file=sys.stderr)


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as Python prints it, on one line whatever names it holds, without the line of code."""
    del line
    return f"{printable(filename)}:{lineno}: {category.__name__}: {printable(str(message))}\n"


def is_first_rank() -> bool:
    """Whether this process speaks for all; known before there is an Accelerator."""
    return int(os.environ.get("RANK", "0")) == 0


def resolved(config: Any) -> dict[str, Any]:
    """A config as JSON-able fields."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def identity(config: Any, accelerator: Accelerator, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What determines the numbers of a run: a checkpoint resumes only under the same.

    ``inputs`` are fingerprints of what the run reads; they stand for the paths, which can be written in many ways.
    """
    watching = {"log_every", "save_every", "eval_every", "eval_images", "features", "probe_every", "max_rollbacks"}
    export = {"mesh_resolution", "turntable_size"}
    ignored = {"out", "dry_run", "skip_teacher_check", "on_bad_data", "long_prompts", *watching, *export, *inputs}
    fields = {name: value for name, value in resolved(config).items() if name not in ignored}
    return {**fields, **inputs, "num_processes": accelerator.num_processes}


def show_plan(
    config: RunOptions, roles: Mapping[str, nn.Module], updates: Mapping[str, int], before: str = ""
) -> None:
    """Print the resolved config, each role's parameters and bytes, and the steps: what ``--dry-run`` shows.

    ``updates`` says how many optimiser steps each trained role takes, ``before`` what happens before the first.
    """
    if not is_first_rank():
        return
    print(json.dumps(resolved(config), indent=2))
    # Beside each gradient AdamW keeps two moments.
    state_bytes = 4 + 2 * (1 if config.optimizer == "adamw8bit" else 4)
    for role, network in roles.items():
        number = sum(p.numel() for p in network.parameters())
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        state = f", {trained * state_bytes:,} bytes of gradients and optimiser state" if trained else ""
        print(f"{role}: {number:,} parameters, {weights:,} bytes of weights{state}")
    if before:
        print(f"before the first step: {before}")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    images = config.steps * config.batch_size * config.accumulate * ranks
    steps = ", ".join(f"{count:,} of the {role}" for role, count in updates.items())
    print(f"steps: {config.steps:,} iterations, {images:,} images on {ranks} process(es); updates: {steps}")


def check_out(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` is, or can become, a folder to write in. Leaves nothing there."""
    for wanted in (out, out / "checkpoints", out / "logs"):
        nearest = next(path for path in [wanted, *wanted.absolute().parents] if path.exists())
        try:
            # Rights alone do not tell: root may write anywhere except where nobody may.
            for left in nearest.glob(f"{PROBE}*"):  # by a check that was killed
                with suppress(OSError):
                    left.rmdir()
            with tempfile.TemporaryDirectory(prefix=PROBE, dir=nearest):
                pass
        except OSError as error:
            raise ValueError(
                f"cannot write to --out {out}: {nearest} is no writable folder. Choose another --out."
            ) from error


def check_numbers(
    config: Any, *, positive: Sequence[str] = (), not_negative: Sequence[str] = (), shares: Sequence[str] = (),
    rates: Sequence[str] = (),
) -> None:  # fmt: skip
    """Raise ``ValueError``, naming the flag, for a number that is not finite, out of its range or past counting.

    ``shares`` lie in [0, 1), learning ``rates`` in (0, 1]; a seed, if there is one, fits into 63 bits.
    """
    for name, value in vars(config).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, int) and name != "seed" and value >= 2**31:
            raise ValueError(f"{flag} must be below 2^31; got {value}. Pass a smaller one.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag} must be finite; got {value}.")
        if name in positive and not value > 0:
            raise ValueError(f"{flag} must be above 0; got {value}.")
        if name in not_negative and not value >= 0:
            raise ValueError(f"{flag} must be at least 0; got {value}.")
        if name in rates and not 0 < value <= 1:
            raise ValueError(f"{flag} must lie in (0, 1]; got {value}.")
        if name in shares and not 0 <= value < 1:
            raise ValueError(f"{flag} must lie in [0, 1); got {value}.")
        if name == "seed" and not 0 <= value < 2**63:
            raise ValueError(f"{flag} must lie in [0, 2^63); got {value}.")


def check_device(name: str) -> None:
    """Raise ``ValueError`` for a ``--device`` that torch does not know or that is not there."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"--device {name} cannot be used here: {reason}. Pass cpu, or cuda with a GPU."
        ) from error


def check_run(config: RunOptions) -> None:
    """Raise ``ValueError`` for run options that cannot work, before anything is written."""
    check_numbers(config, positive=("steps", "batch_size", "accumulate", "clip_norm", "log_every", "save_every"))
    check_out(config.out)
    for name in config.results:
        if not Path(name).suffix:
            check_replaceable(config.out / name)
    check_launcher(config.precision, config.accumulate)
    if config.optimizer == "adamw8bit" and not (find_spec("bitsandbytes") and torch.cuda.is_available()):
        raise ValueError("--optimizer adamw8bit needs a GPU and: pip install bitsandbytes. Use adamw here.")
