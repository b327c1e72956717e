"""What the scripts share: a command line from a frozen dataclass, an output folder, a loop that logs."""

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

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


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every training script can be told about its run."""

    out: Path = Path("runs/run")
    """Folder for checkpoints, TensorBoard logs and the result."""
    steps: int = 1000
    """Iterations in all."""
    batch_size: int = 256
    """Images per micro-batch and process."""
    accumulate: int = 1
    """Micro-batches per iteration."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision; weights stay float32."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW in its fused form, or with 8-bit moments (needs bitsandbytes and a GPU)."""
    compile: bool = False
    """Compile the networks with torch.compile: minutes at the start, faster steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third slower, far less memory. UNets only."""
    deterministic: bool = False
    """Deterministic kernels on a GPU, so that a resumed run is equal bit by bit. A CPU run always is."""
    seed: int = 0
    """Of every random draw."""
    log_every: int = 50
    """Iterations between scalars."""
    save_every: int = 1000
    """Iterations between checkpoints and sample grids."""
    dry_run: bool = False
    """Print the resolved config, parameters, bytes per role and steps, and stop."""


def run(main: Callable[[C], Path], config_type: type[C], description: str) -> None:
    """Parse the command line into a config and call ``main``; a ``ValueError`` is printed and exits with 2."""
    config = tyro.cli(config_type, description=description)
    try:
        main(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def resolved(config: Any) -> dict[str, Any]:
    """A config as JSON-able fields."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def identity(config: Any) -> dict[str, Any]:
    """The fields that change what is computed: a checkpoint resumes only under the same."""
    ignored = {"out", "dry_run", "log_every", "save_every"}
    return {name: value for name, value in resolved(config).items() if name not in ignored}


def show_plan(config: Any, roles: Mapping[str, nn.Module]) -> None:
    """Print the resolved config and the bytes each role will hold: what ``--dry-run`` shows."""
    print(json.dumps(resolved(config), indent=2))
    for role, network in roles.items():
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        # AdamW keeps two float32 moments beside each gradient.
        print(f"{role}: {weights:,} bytes of weights, {trained * 12:,} bytes of gradients and optimiser state")


def check_out(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` is, or can become, a folder to write in. Writes nothing."""
    nearest = next(path for path in [out, *out.absolute().parents] if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"cannot write to --out {out}: {nearest} is no writable folder. Choose another --out.")


def check_positive(config: Any, *names: str) -> None:
    """Raise ``ValueError`` for a field that is not above zero, naming its flag."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0; got {getattr(config, name)}.")


def check_run(config: RunOptions) -> None:
    """Raise ``ValueError`` for run options that cannot work, before anything is written."""
    check_positive(config, "steps", "batch_size", "accumulate", "log_every", "save_every")
    check_out(config.out)
    if config.optimizer == "adamw8bit" and not (find_spec("bitsandbytes") and torch.cuda.is_available()):
        raise ValueError("--optimizer adamw8bit needs a GPU and: pip install bitsandbytes. Use adamw here.")


def start(config: RunOptions) -> Accelerator:
    """An Accelerator that will log to TensorBoard under ``--out``; writes nothing yet."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return Accelerator(mixed_precision=config.precision, log_with="tensorboard", project_dir=str(config.out))


def prepare(network: nn.Module, config: RunOptions, accelerator: Accelerator) -> nn.Module:
    """The network on its device, checkpointed, compiled and wrapped for several ranks as the options say.

    Raises ``ValueError`` where a network that cannot recompute its activations is asked to.
    """
    if config.gradient_checkpointing:
        able = [module for module in network.modules() if hasattr(module, "enable_gradient_checkpointing")]
        if not able:
            raise ValueError(f"--gradient-checkpointing: a {type(network).__name__} cannot; only UNets can.")
        able[0].enable_gradient_checkpointing()
    if config.compile:
        network.compile()  # in place: names of weights stay as they are
    prepared: nn.Module = accelerator.prepare(network)
    return prepared


def start_logging(accelerator: Accelerator, config: Any, out: Path) -> None:
    """Write the resolved config and open the TensorBoard log: the first files of a run."""
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(resolved(config), indent=2))
    try:
        accelerator.init_trackers("logs")
    except OSError as error:  # curves are worth less than the run
        print(f"no TensorBoard log: {error}", file=sys.stderr)


def resume(config: RunOptions, phases: Sequence[Phase], accelerator: Accelerator) -> int:
    """Load the newest checkpoint of the same config, say so, and open the log; the step to start from."""
    first = checkpoint.load(config.out / "checkpoints", phases, identity(config))
    if first and accelerator.is_main_process:
        print(f"resumed from step {first}")
    start_logging(accelerator, config, config.out)
    return first


def fit(
    config: RunOptions, phases: Sequence[Phase], batches: Callable[[Rng], Any], accelerator: Accelerator, *,
    first: int, preview: Callable[[], Tensor], columns: int, rollout: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Train to the end behind a progress bar; sample grids and checkpoints every ``save_every`` steps.

    SIGTERM, which is how schedulers announce the end, saves a checkpoint first and then exits with 143.
    """
    reports = train(
        phases, batches, accelerator, rollout=rollout, steps=config.steps, start=first, clip_norm=10.0,
        accumulate=config.accumulate, seed=config.seed,
    )  # fmt: skip
    with sigterm(accelerator) as asked_to_stop:
        for report in follow(reports, accelerator, start=first, steps=config.steps, log_every=config.log_every):
            stop = asked_to_stop()
            if report.step % config.save_every == 0 or report.step == config.steps or stop:
                if accelerator.is_main_process:
                    checkpoint.save(config.out / "checkpoints", report.step, phases, identity(config))
                log_grid(accelerator, "samples", preview(), report.step, columns)
            if stop:
                accelerator.end_training()
                sys.exit(143)
    accelerator.end_training()


@contextmanager
def sigterm(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Whether any rank was asked to end by SIGTERM: all of them agree, and stop after the same step."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

    def answer() -> bool:
        if accelerator.num_processes == 1:
            return bool(asked)
        return bool(accelerator.reduce(torch.tensor(len(asked), device=accelerator.device), "sum"))

    try:
        yield answer
    finally:
        signal.signal(signal.SIGTERM, before)


def progress(items: Iterable[T], name: str, total: int, accelerator: Accelerator, start: int = 0) -> "tqdm[T]":
    """A progress bar on the main process; in a log file it refreshes only every 30 seconds."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    hidden = not accelerator.is_main_process
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
    """Linear warm-up, then a half cosine down to ``floor`` times the learning rate."""

    def factor(update: int) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * min(update / updates, 1)))
        return min(1, (update + 1) / warmup) * (floor + (1 - floor) * fall)

    return LambdaLR(optimizer, factor)


def adamw(
    network: nn.Module, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), kind: str = "adamw"
) -> Optimizer:
    """AdamW in its fused form, or with 8-bit moments; weight decay 0.01."""
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        small: Optimizer = AdamW8bit(network.parameters(), lr=learning_rate, betas=betas, weight_decay=0.01)
        return small
    return torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=betas, weight_decay=0.01, fused=True)
