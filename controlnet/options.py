"""Options of ``scorefield control``, its presets, and which values are possible."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from scorefield.choices import Kind, LongPrompts, OnBadData, Quantize
from scorefield.training.options import (
    LoadOptions,
    Passes,
    RunOptions,
    check_init_from,
    check_micro_batch,
    check_numbers,
    check_quantize,
    check_run,
)


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Training samples and their hints."""

    free: ClassVar[tuple[str, ...]] = ("num_samples", "on_bad_data", "long_prompts", "convert", "cache")
    """Options that bind no checkpoint: what is trained on has a fingerprint."""

    data: str = ""
    """A folder of images with .txt captions, metadata.jsonl or .csv; a jsonl, csv or parquet file; a webdataset
    .tar; a Hugging Face dataset or its name; toyworld; or circles."""
    hint: str = "canny"
    """What controls the image. Made from it: canny, softedge, lineart, scribble, tile, lowres, blur, inpaint,
    palette. Or the name of a map of the samples, such as depth, which is read from the column depth_file_name.
    toyworld has the maps depth, normals, mask and edges; circles has outline."""
    hint_kind: Kind | None = None
    """What the maps of own data are, which decides how they are resized and mirrored. By default what their name
    says, else image."""
    hint_channels: int = 0
    """Channels of the maps of own data, 1 or 3; for label maps the number of labels. 0 means 3 for images and
    normals, else 1."""
    image_column: str = ""
    """Column of the images. By default file_name, or the first column of images that is no map."""
    text_column: str = "text"
    """Column of the captions. An empty name means no captions."""
    size: int = 0
    """Height and width to train at, in pixels. 0 means the teacher's own."""
    buckets: bool = False
    """Train on images in a few shapes of about the area of --size: each is cut to the nearest shape, and a batch
    has one. Samples are judged as squares. For your own images, and for networks that take any size."""
    num_samples: int = 50_000
    """Number of samples of toyworld or circles."""
    crop: Literal["center", "random"] = "center"
    """Which square of an image is used. Latents of random crops cannot be cached."""
    flip: bool = False
    """Mirror each sample with probability 1/2."""
    latents: Literal["auto", "sampled", "mean"] = "auto"
    """How latents come from the autoencoder's posterior. auto: as the teacher was trained, which for toyworld is
    on means."""
    prompt_drop: float = 0.5
    """Share of samples whose prompt is dropped, drawn anew in each epoch."""
    hint_drop: float = 0.0
    """Share of samples whose hint is dropped."""
    on_bad_data: OnBadData = "stop"
    """What to do about samples that cannot be used (damaged, too small, without a caption or map, not UTF-8):
    stop, or skip them."""
    long_prompts: LongPrompts = "stop"
    """What to do about captions that are longer than the text encoders read: stop, skip them, or cut them."""
    convert: bool = False
    """Accept images with transparency, with 16 bits, or in grey among coloured ones, and convert them."""
    cache: Path | None = None
    """Folder that keeps latents, encoded prompts and results of checks. By default ~/.cache/scorefield."""


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Proof of control: held-out samples are drawn with their own hint and with a mismatched one."""

    free: ClassVar[tuple[str, ...]] = (
        "eval_every", "eval_samples", "test_samples", "eval_batch_size", "sampling_steps", "guidance",
        "warn_after",
    )  # fmt: skip

    eval_every: int = 500
    """Iterations between two evaluations of the averaged weights. 0 means only at the end."""
    eval_samples: int = 64
    """Held-out samples of each evaluation."""
    test_samples: int = 0
    """Further held-out samples, for the final report. 0 means those of the evaluations."""
    eval_batch_size: int = 0
    """Images that are drawn, encoded and decoded at a time. 0 means --batch-size."""
    sampling_steps: int = 20
    """DDIM steps per image."""
    guidance: float = 7.5
    """Scale of classifier-free guidance of these images. 1 means none."""
    warn_after: int = 0
    """Iterations after which a warning names likely causes if control was not learned. 0 means half of --steps."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter and its optimizer."""

    free: ClassVar[tuple[str, ...]] = ("licence",)

    adapter: Literal["controlnet", "lora"] = "controlnet"
    """controlnet: a trained copy of the first layers beside the teacher. lora: a control LoRA, low-rank changes of
    a FLUX.1 teacher's own layers, of which the first takes the hint as further channels."""
    lora_rank: int = 64
    """Rank of a control LoRA."""
    quantize: Quantize = "no"
    """Round the weights of the frozen teacher to 4 bits (needs bitsandbytes) or 8 (needs torchao), for memory. The
    adapter is not rounded."""
    init_from: str = ""
    """Folder of a finished adapter, or name of a ControlNet online, to start from."""
    learning_rate: float = 1e-5
    """Peak learning rate (ControlNet: 1e-5, or 2e-6 with --unlocked). Small models need far more."""
    new_factor: float = 1.0
    """Factor on the learning rate of layers that are not copied: zero convolutions and the hint's embedding."""
    calibrate: bool = True
    """Scale the hint's embedding to unit strength on the first hints, so that control comes earlier. Not with
    --init-from."""
    warmup: int = 100
    """Iterations of linear warm-up of the learning rate, at most a tenth of --steps."""
    lr_floor: float = 1.0
    """Last learning rate of a cosine, as a share of its peak. 1 means constant (ControlNet)."""
    min_snr: float = 0.0
    """Gamma of the min-SNR weighting of the loss. 0 means none (ControlNet)."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is evaluated and saved."""
    unlocked: bool = False
    """Train the teacher's decoder, too (sd_locked=False). It is saved beside the adapter."""
    recompute_levels: int | None = None
    """How many levels of resolution, from the finest, --gradient-checkpointing recomputes. By default all. For
    UNets."""
    activation_budget: float = 1.0
    """Share of the activations that --compile keeps for the backward pass. It recomputes the others."""
    licence: str = ""
    """Licence of the finished adapter, for its model card, such as apache-2.0. The teacher's licence may bind
    it."""


@dataclass(frozen=True, kw_only=True)
class Config(TaskOptions, Adapter, WatchOptions, LoadOptions, Passes, RunOptions):
    """Train a ControlNet, and prove that control was learned."""

    results: ClassVar[tuple[str, ...]] = ("controlnet", "report.json", "samples.png")
    free: ClassVar[tuple[str, ...]] = ("preset", "teacher")

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = ""
    teacher: str = ""
    """The frozen model: name or folder of a diffusers text-to-image pipeline, folder of train_circles.py,
    toyworld, the one that ships, or module:function, whose code is run."""

    out: Path = Path("runs/controlnet")
    """Folder for checkpoints, logs, samples, report.json and the finished adapter."""
    steps: int = 10_000
    """Number of iterations."""
    batch_size: int = 4
    """Images per batch and process."""
    clip_norm: float = 1.0
    """Largest norm of the gradient. A larger gradient is scaled down to it."""

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


def flux_control_lora_canny() -> Config:
    """A control LoRA of FLUX.1-dev, with the numbers of diffusers' example for such LoRAs. Never run here.

    Those are rank, rate, batch, accumulation, length and precision of examples/flux-control/README.md, which has
    AdamW in 8 bits (--optimizer adamw8bit), no warm-up and no average.
    """
    return Config(
        preset="flux-control-lora-canny", teacher="black-forest-labs/FLUX.1-dev", data="images", adapter="lora",
        lora_rank=64, steps=5000, batch_size=1, accumulate=4, learning_rate=1e-4, warmup=0, prompt_drop=0.0,
        ema_decay=0.0, precision="bf16", gradient_checkpointing=True, guidance=3.5, test_samples=64,
    )  # fmt: skip


PRESETS: Mapping[str, Callable[[], Config]] = {
    "": Config, "circles": circles, "toyworld-canny": toyworld_canny, "toyworld-depth": toyworld_depth,
    "sd15-canny": sd15_canny, "sdxl-canny": sdxl_canny, "flux-control-lora-canny": flux_control_lora_canny,
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
    check_micro_batch(config)
    check_init_from(config.init_from, config.out)
    check_watch(config)
    check_numbers(
        config, positive=("new_factor", "lora_rank"), rates=("learning_rate",),
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
    if config.adapter == "lora" and config.unlocked:
        raise ValueError("--unlocked trains the decoder beside a ControlNet. Leave out --adapter lora.")
    if config.shard > 1 and (config.adapter == "lora" or config.unlocked):
        option = "--adapter lora" if config.adapter == "lora" else "--unlocked"
        raise ValueError(
            f"--shard and {option} do not go together: what learns shares weights with the teacher. Leave one of "
            "them out."
        )
    if config.adapter == "controlnet" and config.lora_rank != Config.lora_rank:
        raise ValueError("--lora-rank is of a control LoRA: pass --adapter lora, too.")
    if (levels := config.recompute_levels) is not None and (levels < 0 or not config.gradient_checkpointing):
        raise ValueError(
            f"--recompute-levels must be at least 0, and None without --gradient-checkpointing; got {levels}."
        )
    check_quantized(config)
    if config.cache is not None and any(path.is_file() for path in (config.cache, *config.cache.parents)):
        raise ValueError(f"--cache {config.cache} is a file, or inside of one; name a folder.")
    if not config.hint:
        raise ValueError("--hint is missing. Pass canny, another hint that --help names, or a map of the samples.")
    if not config.teacher or not config.data:
        raise ValueError("--teacher and --data are missing. Pass both, or begin with a preset: toyworld-canny.")


def check_quantized(config: Config) -> None:
    """Raise ``ValueError`` for a ``--quantize`` that cannot be, or beside options that it excludes."""
    check_quantize(config.quantize)
    if config.quantize == "no":
        return
    if config.unlocked:
        raise ValueError(
            "--unlocked trains the teacher's decoder, and weights that --quantize rounds cannot learn. Leave out "
            "one of the two."
        )
    if config.compile:
        raise ValueError("--compile was not made to work with rounded weights. Leave out --compile or --quantize.")
