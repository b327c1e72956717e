"""What train_controlnet.py can be told: options, presets, and which values are possible."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from command import RunOptions, check_numbers, check_run
from control_tasks import ANNOTATORS, TaskOptions
from control_watch import WatchOptions, check_watch


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, TaskOptions, WatchOptions):
    """Train a ControlNet, and prove that control was learned."""

    preset: Literal["", "circles", "toyworld-canny", "toyworld-depth", "sd15-canny", "sdxl-canny"] = ""
    """Values for all other options; those given beside it win."""
    teacher: str = ""
    """The frozen model that the adapter is put on: folder or name of a text-to-image pipeline, folder of
    train_circles.py, toyworld, which ships, or module:function, whose code is run."""
    allow_pickle: bool = False
    """Read pickled weights of a teacher that has no safetensors. Only if you trust where it comes from."""
    variant: str = ""
    """Of the weight files of a diffusers model that has no plain ones, such as fp16."""
    results: ClassVar[tuple[str, ...]] = ("controlnet", "report.json", "samples.png")

    out: Path = Path("runs/controlnet")
    """Folder for checkpoints, TensorBoard logs, report.json and the finished adapter."""
    steps: int = 10_000
    """Iterations in all."""
    batch_size: int = 4
    """Images per micro-batch and process."""
    learning_rate: float = 1e-5
    """Peak learning rate (ControlNet: 1e-5, and 2e-6 with --unlocked; small models want far more)."""
    new_factor: float = 1.0
    """Times the learning rate for what is no copy: zero convolutions and the hint's embedding."""
    calibrate: bool = True
    """Start the hint's embedding at unit strength over the first hints: control comes earlier (LOG.md)."""
    warmup: int = 100
    """Updates of linear warm-up, a tenth of --steps at most."""
    lr_floor: float = 1.0
    """Where a cosine of the learning rate ends, in units of its peak; 1: constant (ControlNet)."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down."""
    min_snr: float = 0.0
    """Gamma of min-SNR weighting of the loss; 0: none (ControlNet)."""
    ema_decay: float = 0.999
    """Of the averaged weights, which are judged and saved."""
    unlocked: bool = False
    """Train the teacher's decoder too (sd_locked=False); it is saved beside the adapter."""
    recompute_levels: int | None = None
    """Levels of resolution, from the finest, that --gradient-checkpointing recomputes; None: all."""
    licence: str = ""
    """Of the finished adapter, for its card, as hubs name it; it copies the teacher, whose licence may bind it."""
    activation_budget: float = 1.0
    """Share of activations that --compile keeps for the backward pass; torch chooses what it computes again."""


def toyworld_canny() -> Config:
    """Minutes on a CPU with the pipeline that ships, which was trained on means of latents."""
    return Config(
        preset="toyworld-canny", teacher="toyworld", data="toyworld", num_samples=2000,
        prompt_drop=0.1, steps=250, batch_size=32, learning_rate=5e-4, new_factor=4.0, warmup=25, lr_floor=0.0,
        ema_decay=0.98, eval_every=50, eval_samples=32, test_samples=128, guidance=3.0, save_every=50,
        log_every=10,
    )  # fmt: skip


def toyworld_depth() -> Config:
    """The same, told how far everything is."""
    return replace(toyworld_canny(), preset="toyworld-depth", hint="depth")


def circles() -> Config:
    """The same, for longer, on what train_circles.py painted."""
    return replace(
        toyworld_canny(), preset="circles", teacher="runs/circles/base", data="circles", hint="outline",
        num_samples=50_000, steps=600, eval_every=25,
    )  # fmt: skip


def sd15_canny() -> Config:
    """Zhang et al. 2023 (arXiv 2302.05543) on Stable Diffusion 1.5; a batch of 32 by accumulation."""
    return Config(
        preset="sd15-canny", teacher="stable-diffusion-v1-5/stable-diffusion-v1-5", data="images", size=512,
        batch_size=4, accumulate=8, precision="bf16", gradient_checkpointing=True, recompute_levels=1, flip=True,
        test_samples=64,
    )  # fmt: skip


def sdxl_canny() -> Config:
    """The same on SDXL."""
    return replace(
        sd15_canny(), preset="sdxl-canny", teacher="stabilityai/stable-diffusion-xl-base-1.0", size=1024,
        batch_size=1, accumulate=32, recompute_levels=None, guidance=5.0,
    )  # fmt: skip


PRESETS: Mapping[str, Callable[[], Config]] = {
    "": Config, "circles": circles, "toyworld-canny": toyworld_canny, "toyworld-depth": toyworld_depth,
    "sd15-canny": sd15_canny, "sdxl-canny": sdxl_canny,
}  # fmt: skip
"""Settings by name; PAPERS.md puts those of the papers beside them."""


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range or missing."""
    check_run(config)
    check_watch(config)
    check_numbers(
        config, positive=("new_factor",), rates=("learning_rate",),
        not_negative=("warmup", "min_snr", "hint_channels"), shares=("ema_decay",),
    )  # fmt: skip
    for name, value in {"prompt-drop": config.prompt_drop, "hint-drop": config.hint_drop}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"--{name} must lie in [0, 1]; got {value}.")
    if not 0 <= config.lr_floor <= 1:
        raise ValueError(f"--lr-floor must lie in [0, 1]; got {config.lr_floor}.")
    if not 0 < config.activation_budget <= 1 or (config.activation_budget < 1 and not config.compile):
        raise ValueError(
            f"--activation-budget must lie in (0, 1], and 1 without --compile; got {config.activation_budget}."
        )
    if (levels := config.recompute_levels) is not None and (levels < 0 or not config.gradient_checkpointing):
        raise ValueError(
            f"--recompute-levels must be at least 0, and None without --gradient-checkpointing; got {levels}."
        )
    if config.cache is not None and any(path.is_file() for path in (config.cache, *config.cache.parents)):
        raise ValueError(f"--cache {config.cache} is a file, or inside of one; name a folder.")
    if not config.hint:
        raise ValueError(f"--hint is missing: {', '.join(ANNOTATORS)}, or the name of a map of the samples.")
    if not config.teacher or not config.data:
        raise ValueError("--teacher and --data are needed, or a --preset that names them.")
