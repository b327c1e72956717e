"""Options that several commands share, and their checks.

Importing this module imports no torch, since the command line is parsed and refused before that.
"""

import math
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from scorefield.atomic import check_replaceable
from scorefield.choices import QUANTIZE_PACKAGES, Quantize, Tracker
from scorefield.training.launcher import check_launcher, has_gpu

AUTO = "auto"
"""The value of ``--micro-batch`` that is found at the start of a run."""

PROBE = ".writing-probe-"
"""How folders begin that are made only to see whether one can be."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run: its length, its folder, how it computes and what it logs.

    Every option binds a checkpoint, except those in the tuple ``free`` of its class and those in ``may_change``.
    A group of options says so itself; :func:`free_options` joins the tuples of all groups. ``results`` are the
    folders and files in ``--out`` that a finished run leaves and a repeated one replaces.
    """

    results: ClassVar[tuple[str, ...]] = ()

    free: ClassVar[tuple[str, ...]] = ("out", "shard", "report_to", "log_every", "save_every", "dry_run")
    """Options that change no number of a run, beyond the order in which ranks add."""

    out: Path = Path("runs/run")
    """Folder for checkpoints, logs, samples and the result."""
    steps: int = 1000
    """Number of iterations."""
    batch_size: int = 256
    """Images per batch and process."""
    accumulate: int = 1
    """Batches per iteration and process, whose gradients are averaged."""
    seed: int = 0
    """Seed of every random draw."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision. Trained weights stay float32. With bf16, frozen weights may be stored in bf16, too."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """Fused AdamW, or AdamW with 8-bit moments, which needs bitsandbytes and a GPU."""
    clip_norm: float = 10.0
    """Largest norm of a network's gradient. A larger gradient is scaled down to it."""
    compile: bool = False
    """Compile the networks with torch.compile: minutes at the start, then faster steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""
    shard: int = 1
    """Cut every network into pieces on so many neighbouring processes, which have to divide their number: each
    holds one n-th of weights, gradients and optimizer states. 1 means that every process holds all (DDP)."""
    deterministic: bool = False
    """Use deterministic kernels on a GPU, so that a resumed run is equal bit for bit. On a CPU it always is."""
    log_every: int = 50
    """Iterations between two lines of the log."""
    save_every: int = 1000
    """Iterations between two checkpoints, and between two sample pictures in --out/samples."""
    report_to: tuple[Tracker, ...] = ("tensorboard",)
    """Where curves and pictures go, one or several. tensorboard writes to --out/logs; wandb and trackio need their
    package."""
    dry_run: bool = False
    """Check everything, print the resolved options, parameters and bytes per network, and stop."""

    @property
    def may_change(self) -> tuple[str, ...]:
        """Options that may have another value when a run goes on: its length, and rates that are constant."""
        return ("steps",)


def micro_batch_of(text: str) -> int | str:
    """Return what ``--micro-batch`` names: a number of images, or "auto"."""
    if text == AUTO:
        return AUTO
    if not re.fullmatch("-?[0-9]{1,4000}", text):  # Python reads 4300 digits; :func:`check_run` judges them
        raise ValueError(f"expected a whole number of images, or auto; got {text!r}")
    return int(text)


MicroBatch = Annotated[
    int | str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="N|auto", instance_from_str=lambda words: micro_batch_of(words[0]),
        is_instance=lambda value: isinstance(value, int) or value == AUTO,
        str_from_instance=lambda value: [str(value)],
    ),
]  # fmt: skip
"""A number of images, or "auto"."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How many images go through the networks at a time."""

    micro_batch: MicroBatch = 0
    """Images per forward and backward pass, which have to divide --batch-size. An iteration takes as many images
    as before, in more passes. auto: the most that fit into memory, as tried at the start. 0 means --batch-size."""


def images_per_pass(config: "RunOptions") -> int:
    """Return how many images go through the networks at a time; --batch-size while auto is undecided."""
    number = getattr(config, "micro_batch", 0)
    return number if isinstance(number, int) and number else config.batch_size


def passes_per_iteration(config: "RunOptions") -> int:
    """Return how many passes of :func:`images_per_pass` an iteration has on each process."""
    return config.accumulate * (config.batch_size // images_per_pass(config))


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluation while training."""

    free: ClassVar[tuple[str, ...]] = ("eval_every", "eval_images", "features")

    eval_every: int = 0
    """Iterations between two evaluations of the averaged weights. 0 means never."""
    eval_images: int = 500
    """Generated images per evaluation."""
    features: Path | None = None
    """Folder of `scorefield features`, to measure Fréchet distance and KID to the data. The best weights are
    kept."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Weight files of a diffusers model."""

    allow_pickle: bool = False
    """Read pickled weights where there are no safetensors. Pickles can run code: only if you trust their
    source."""
    variant: str = ""
    """Variant of the weight files, such as fp16, for a model that has no others."""


def free_options(config: Any) -> frozenset[str]:
    """Return the options that change no number of a run: those that the classes of ``config`` name as ``free``."""
    return frozenset(name for part in type(config).__mro__ for name in vars(part).get("free", ()))


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


def check_init_from(init_from: str, out: Path) -> None:
    """Raise ``ValueError`` for an ``--init-from`` in ``--out``, which the run would replace."""
    if init_from and Path(init_from).resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--init-from {init_from} lies in --out {out}, which is written to. Pass another --out.")


def check_trackers(report_to: Sequence[Tracker]) -> None:
    """Raise ``ValueError`` for trackers that are not installed, and for none beside others."""
    if "none" in report_to and len(set(report_to)) > 1:
        raise ValueError(f"--report-to none stands alone; got {' '.join(report_to)}. Leave the others out.")
    for name in report_to:
        if name != "none" and find_spec(name) is None:
            raise ValueError(f"--report-to {name} needs: pip install {name}. Or pass --report-to none.")


def check_quantize(how: Quantize) -> None:
    """Raise ``ValueError`` for a ``--quantize`` whose package is not installed."""
    package = QUANTIZE_PACKAGES.get(how)
    if package and find_spec(package) is None:
        raise ValueError(f"--quantize {how} needs: pip install {package}. Or leave it out.")


def check_device(name: str) -> None:
    """Raise ``ValueError`` for a ``--device`` that torch does not know or that is not there."""
    import torch

    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")  # torch explains at length
        raise ValueError(
            f"--device {name} cannot be used here: {reason}. Pass cpu, or cuda with a GPU."
        ) from error


def check_shard(config: RunOptions) -> None:
    """Raise ``ValueError`` for a ``--shard`` that the processes or the other options do not allow."""
    check_numbers(config, positive=("shard",))
    if config.shard == 1:
        return
    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number % config.shard and not config.dry_run:
        raise ValueError(
            f"--shard {config.shard} needs {config.shard} processes or a multiple of them; got {number}. Launch "
            f"so many with torchrun or accelerate launch, or pass a divisor of {number}."
        )
    why = {
        "compile": "compiled networks gather no pieces", "offload": "pieces are small, and stay on the GPU",
        "lora": "a LoRA's networks are one, of which each process holds all",
    }  # fmt: skip
    for name, reason in why.items():
        if getattr(config, name, False):
            raise ValueError(f"--shard and --{name} do not go together: {reason}. Leave one of them out.")
    if config.optimizer != "adamw":
        raise ValueError(
            f"--shard goes with --optimizer adamw; got {config.optimizer}, which cannot step pieces. Leave one of "
            "them out."
        )


def check_micro_batch(config: Any, smallest: int = 1) -> None:
    """Raise ``ValueError`` for a ``--micro-batch`` that does not divide the batch, or that others exclude.

    Args:
        config: of a trainer that has the option.
        smallest: number of images that its losses need.
    """
    number, batch = config.micro_batch, config.batch_size
    if isinstance(number, int):
        if number and (number < smallest or batch % number):
            usual = f"at least {smallest}, and " if smallest > 1 else ""
            near = largest_divisor(batch, max(smallest, number))
            raise ValueError(
                f"--micro-batch must be {usual}a divisor of --batch-size {batch}; got {number}. Pass "
                f"{near if near >= smallest else batch}, or change --batch-size."
            )
        return
    for name, given, why in (
        ("--shard", config.shard > 1, "a process that runs out of memory would leave the others waiting for it"),
        ("--compile", config.compile, "each size that is tried would be compiled"),
    ):
        if given:
            raise ValueError(f"--micro-batch auto and {name} do not go together: {why}. Pass a number of images.")


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of ``number`` that is at most ``most``, or all of it."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return max(one for one in (*small, *(number // one for one in small)) if one <= most)


def check_run(config: RunOptions) -> None:
    """Raise ``ValueError`` for run options that cannot work, before anything is written."""
    check_numbers(config, positive=("steps", "batch_size", "accumulate", "clip_norm", "log_every", "save_every"))
    check_out(config.out)
    for name in config.results:
        if not Path(name).suffix:
            check_replaceable(config.out / name)
    check_trackers(config.report_to)
    check_launcher(config.precision, config.accumulate)
    check_shard(config)
    if config.optimizer == "adamw8bit" and not (find_spec("bitsandbytes") and has_gpu()):
        raise ValueError("--optimizer adamw8bit needs a GPU and: pip install bitsandbytes. Use adamw here.")
