"""Options of ``scorefield control``, its presets, and which values are possible."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from scorefield.choices import Kind, LongPrompts, OnBadData
from scorefield.training.options import RunOptions, check_init_from, check_numbers, check_run


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is learned, from what."""

    free: ClassVar[tuple[str, ...]] = ("num_samples", "on_bad_data", "long_prompts", "convert", "cache")
    """Options that bind no checkpoint: what is trained on has a fingerprint."""

    data: str = ""
    """Folder of images with .txt captions, metadata.jsonl or .csv; jsonl, csv or parquet file, webdataset .tar, or
    Hugging Face data set or its name; "toyworld" or "circles"."""
    hint: str = "canny"
    """canny, softedge, lineart, scribble, tile, lowres, blur, inpaint or palette, made of the image; or a map of
    the samples: column depth_file_name for depth, or depth, normals, mask, edges (toyworld), outline (circles)."""
    hint_kind: Kind | None = None
    """What the maps of own data mean: how they are resized and mirrored. None: as their name is, or image."""
    hint_channels: int = 0
    """Of maps of own data, 1 or 3; 0: 3 for kinds image and normals, else 1. Of labels: how many there are."""
    image_column: str = ""
    """Of own data; empty: file_name, or the first column of images that is no map."""
    text_column: str = "text"
    """Of own data; empty: no captions."""
    size: Annotated[int, tyro.conf.arg(aliases=("--teacher-size",))] = 0
    """Pixels of a side to train at; 0: the teacher's own."""
    buckets: bool = False
    """Train on pictures in a few shapes of the area of --size, each picture in the nearest one, a batch in one;
    judged are squares. For pictures of your own, and teachers whose networks take any size."""
    num_samples: int = 50_000
    """Of toyworld and circles."""
    crop: Literal["center", "random"] = "center"
    """Which part of an image that is not square; latents of random crops cannot be kept."""
    flip: bool = False
    """Mirror half of the samples."""
    latents: Literal["auto", "sampled", "mean"] = "auto"
    """Of the autoencoder's posterior: draw from it, or take its mean; auto: as the teacher was trained, which
    is on means for toyworld. Draws teach nothing to a model of means."""
    prompt_drop: float = 0.5
    """Share of samples whose prompt is dropped, drawn anew in each epoch."""
    hint_drop: float = 0.0
    """Share of samples whose hint is dropped."""
    on_bad_data: OnBadData = "stop"
    """What to do about samples that cannot be used: corrupt, too small, without caption or map, no UTF-8."""
    long_prompts: LongPrompts = "stop"
    """What to do about captions that are longer than the text encoders read."""
    convert: bool = False
    """Take pictures with transparency, of 16 bits, or grey ones among coloured."""
    cache: Path | None = None
    """Folder of latents, prompts and what was checked; None: ~/.cache/scorefield."""


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """How a training is watched and judged."""

    free: ClassVar[tuple[str, ...]] = (
        "eval_every", "eval_samples", "test_samples", "eval_batch_size", "sampling_steps", "guidance",
        "warn_after",
    )  # fmt: skip

    eval_every: int = 500
    """Iterations between looks at the averaged weights; 0: at the end only."""
    eval_samples: int = 64
    """Held-out samples of each look."""
    test_samples: int = 0
    """Further held-out samples, which the report is made of; 0: those of the looks."""
    eval_batch_size: int = 0
    """Of them that are drawn, encoded and decoded at a time; 0: --batch-size, which fits since it trains."""
    sampling_steps: int = 20
    """DDIM steps of their images."""
    guidance: float = 7.5
    """Scale of classifier-free guidance of their images; 1 means none."""
    warn_after: int = 0
    """Iterations after which a warning names likely causes if control has not come; 0: half of --steps."""


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, TaskOptions, WatchOptions):
    """Train a ControlNet, and prove that control was learned."""

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = ""
    teacher: str = ""
    """The frozen model that the adapter is put on: folder or name of a text-to-image pipeline, folder of
    train_circles.py, toyworld, which ships, or module:function, whose code is run."""
    allow_pickle: bool = False
    """Read pickled weights of a teacher that has no safetensors. Only if you trust where it comes from."""
    variant: str = ""
    """Of the weight files of a diffusers model that has no plain ones, such as fp16."""
    init_from: str = ""
    """Folder of a finished adapter, or name of a ControlNet online, whose weights this one starts from."""
    results: ClassVar[tuple[str, ...]] = ("controlnet", "report.json", "samples.png")
    free: ClassVar[tuple[str, ...]] = ("preset", "teacher", "licence")

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
    """Start the hint's embedding at unit strength over the first hints: control comes earlier (LOG.md). Not with
    --init-from."""
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

    @property
    def may_change(self) -> tuple[str, ...]:
        """The length of the run, and the rate where it is constant."""
        return ("steps", "learning_rate") if self.lr_floor == 1 else ("steps",)


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


def check_watch(options: Any) -> None:
    """Raise ``ValueError`` for options that are out of range."""
    check_numbers(
        options, positive=("sampling_steps", "num_samples"),
        not_negative=("eval_every", "eval_batch_size", "test_samples", "warn_after", "size", "guidance"),
    )  # fmt: skip
    for name, value in {"--eval-samples": options.eval_samples, "--test-samples": options.test_samples}.items():
        if value < 2 and not (value == 0 and name == "--test-samples"):
            raise ValueError(f"{name} must be at least 2, since samples exchange their hints; got {value}.")


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range or missing."""
    check_run(config)
    check_init_from(config.init_from, config.out)
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
        raise ValueError("--hint is missing. Pass canny, another hint that --help names, or a map of the samples.")
    if not config.teacher or not config.data:
        raise ValueError("--teacher and --data are missing. Pass both, or begin with a preset: toyworld-canny.")
