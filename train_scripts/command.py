"""What the scripts share: a command line from a frozen dataclass, an output folder, a loop that logs."""

import dataclasses
import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchvision.utils import make_grid
from tqdm import tqdm

from score import checkpoint
from score.randomness import Rng
from score.training import Phase, Report, train

C = TypeVar("C")
T = TypeVar("T")


def run(main: Callable[[C], Path], config_type: type[C], description: str) -> None:
    """Parse the command line into a config and call ``main``.

    Bad input, or a file that cannot be read or written, is printed in one line and exits with 2; a run that
    stopped because it was not finite exits with 1. Of several ranks the first one speaks.
    """
    config = tyro.cli(config_type, description=description)
    try:
        main(config)
    except (ValueError, OSError, FloatingPointError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def resolved(config: Any) -> dict[str, Any]:
    """A config as JSON-able fields."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def identity(config: Any, accelerator: Accelerator, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What determines the numbers of a run: a checkpoint resumes only under the same.

    ``inputs`` are fingerprints of what the run reads; they stand for the paths, which can be written in many ways.
    """
    ignored = {"out", "dry_run", "log_every", "save_every", *inputs}
    fields = {name: value for name, value in resolved(config).items() if name not in ignored}
    return {**fields, **inputs, "num_processes": accelerator.num_processes}


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Short hash of some tensors' contents."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def show_plan(config: Any, roles: Mapping[str, nn.Module]) -> None:
    """Print the resolved config and the bytes each role will hold: what ``--dry-run`` shows."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    print(json.dumps(resolved(config), indent=2))
    for role, network in roles.items():
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        # AdamW keeps two float32 moments beside each gradient.
        state = f", {trained * 12:,} bytes of gradients and optimiser state" if trained else ""
        print(f"{role}: {weights:,} bytes of weights{state}")


def check_out(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` is, or can become, a folder to write in. Leaves nothing there."""
    for wanted in (out, out / "checkpoints", out / "logs"):
        nearest = next(path for path in [wanted, *wanted.absolute().parents] if path.exists())
        try:
            # Rights alone do not tell: root may write anywhere except where nobody may.
            with tempfile.TemporaryDirectory(dir=nearest):
                pass
        except OSError as error:
            raise ValueError(
                f"cannot write to --out {out}: {nearest} is no writable folder. Choose another --out."
            ) from error


def check_numbers(
    config: Any, *, positive: Sequence[str] = (), not_negative: Sequence[str] = (), shares: Sequence[str] = ()
) -> None:
    """Raise ``ValueError``, naming the flag, for a number that is not finite or out of its range.

    ``shares`` lie in [0, 1); a seed, if there is one, fits into 63 bits.
    """
    for name, value in vars(config).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{flag} must be finite; got {value}.")
        if name in positive and not value > 0:
            raise ValueError(f"{flag} must be above 0; got {value}.")
        if name in not_negative and not value >= 0:
            raise ValueError(f"{flag} must be at least 0; got {value}.")
        if name in shares and not 0 <= value < 1:
            raise ValueError(f"{flag} must lie in [0, 1); got {value}.")
        if name == "seed" and not 0 <= value < 2**63:
            raise ValueError(f"{flag} must lie in [0, 2^63); got {value}.")


def make_accelerator(out: Path, precision: str) -> Accelerator:
    """An Accelerator that will log to TensorBoard under ``out``; writes nothing yet."""
    return Accelerator(mixed_precision=precision, log_with="tensorboard", project_dir=str(out))


def start_logging(accelerator: Accelerator, config: Any, out: Path, start: int) -> None:
    """Write the resolved config and open the TensorBoard log: the first files of a run."""
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(resolved(config), indent=2))
    # What an earlier run logged beyond its last checkpoint is drawn again.
    accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": start + 1}})


class RunConfig(Protocol):
    """The fields that every training config of these scripts has."""

    @property
    def out(self) -> Path: ...  # noqa: D102
    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def log_every(self) -> int: ...  # noqa: D102
    @property
    def save_every(self) -> int: ...  # noqa: D102


def resume(config: RunConfig, phases: Sequence[Phase], accelerator: Accelerator, own: Mapping[str, Any]) -> int:
    """Load the newest checkpoint of the same :func:`identity`, say so, open the log; the step to start from."""
    start = checkpoint.load(config.out / "checkpoints", phases, own)
    if start and accelerator.is_main_process:
        print(f"resumed from step {start}")
    start_logging(accelerator, config, config.out, start)
    return start


def fit(
    config: RunConfig, phases: Sequence[Phase], batches: Callable[[Rng], Any], accelerator: Accelerator, *,
    own: Mapping[str, Any], start: int, preview: Callable[[], Tensor], columns: int,
    rollout: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Train to the end behind a progress bar; sample grids and checkpoints every ``save_every`` steps."""
    reports = train(
        phases, batches, accelerator, rollout=rollout, steps=config.steps, start=start, clip_norm=10.0,
        seed=config.seed,
    )  # fmt: skip
    for report in follow(reports, accelerator, start=start, steps=config.steps, log_every=config.log_every):
        if report.step % config.save_every == 0 or report.step == config.steps:
            log_grid(accelerator, "samples", preview(), report.step, columns)
            if accelerator.is_main_process:
                checkpoint.save(config.out / "checkpoints", report.step, phases, own)
    accelerator.end_training()


def progress(items: Iterable[T], name: str, total: int, accelerator: Accelerator, start: int = 0) -> "tqdm[T]":
    """A progress bar on the main process; in a log file it refreshes only every 30 seconds."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    hidden = not accelerator.is_main_process or "TQDM_DISABLE" in os.environ
    return tqdm(
        items, desc=name, initial=start, total=total, mininterval=interval, maxinterval=interval, disable=hidden
    )


def follow(
    reports: Iterable[Report], accelerator: Accelerator, *, start: int, steps: int, log_every: int
) -> Iterator[Report]:
    """Pass reports on, behind a progress bar; every ``log_every`` steps log the scalars to TensorBoard."""
    bar = progress(reports, "steps", steps, accelerator, start)
    latest: dict[str, Tensor] = {}
    for report in bar:
        latest |= report.metrics
        if report.step % log_every == 0 or report.step == steps:
            values = Report(report.step, (), latest).read()
            accelerator.log(values, step=report.step)
            bar.set_postfix(
                {key: f"{value:.3g}" for key, value in values.items() if key.endswith("/loss")}, refresh=False
            )
        yield report


def log_grid(accelerator: Accelerator, name: str, images: Tensor, step: int, columns: int = 10) -> None:
    """Write images in [-1, 1] to TensorBoard as one grid."""
    grid = make_grid((images.clamp(-1, 1) + 1) / 2, nrow=columns, padding=1, pad_value=0.5)
    tracker = accelerator.get_tracker("tensorboard")
    if accelerator.is_main_process:
        tracker.log_images({name: grid[None].cpu().numpy()}, step=step, dataformats="NCHW")


def cosine(optimizer: Optimizer, updates: int, warmup: int = 100, floor: float = 0.0) -> LambdaLR:
    """Linear warm-up, over at most a tenth, and a half cosine down to ``floor`` times the learning rate."""
    warmup = max(1, min(warmup, updates // 10))

    def factor(update: int) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * min(update / updates, 1)))
        return min(1, (update + 1) / warmup) * (floor + (1 - floor) * fall)

    return LambdaLR(optimizer, factor)


def adamw(network: nn.Module, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> Optimizer:
    """AdamW in its fused form, weight decay 0.01."""
    return torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=betas, weight_decay=0.01, fused=True)
