"""Options of ``scorefield distill`` and its presets: numbers of papers, which PAPERS.md quotes, and our own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from scorefield.choices import LongPrompts
from scorefield.data.options import DataOptions
from scorefield.training.launcher import has_gpu
from scorefield.training.options import EvalOptions, RunOptions, check_init_from, check_numbers, check_run


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, DataOptions, EvalOptions):
    """Distil a diffusion teacher into a one-step or few-step generator (DMD, DMD2)."""

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "auto"
    teacher: str = "runs/teacher/teacher"
    """Folder of `scorefield teacher`, folder of a diffusers UNet2DModel pipeline, or module:function, such as
    mine:teacher for a function in mine.py, whose code is run. With --prompts: name or folder of a diffusers
    text-to-image pipeline, or "toyworld", the one that ships."""
    network: str = ""
    """For a --teacher that this script wrote from a module:function: the module:function that builds its network,
    whose code is run. What a folder names is never run."""
    init_from: str = ""
    """Folder of a finished student, in whose weights this one starts instead of in its teacher's; with --lora that
    of a LoRA."""
    results: ClassVar[tuple[str, ...]] = ("student", "best", "best.json")
    free: ClassVar[tuple[str, ...]] = (
        "preset", "skip_teacher_check", "long_prompts", "validation_prompts", "gradient_checkpointing", "offload",
    )  # fmt: skip

    out: Path = Path("runs/student")
    """Folder for checkpoints, TensorBoard logs and the finished student."""
    steps: int = 2000
    """Iterations of the distribution matching at most: updates of the fake score. The student takes one in
    --student-every. With --guard-images the run ends earlier where the student keeps drifting from its
    teacher."""
    student_every: int = 5
    """Fake-score updates per student update, as in DMD2."""
    num_steps: int = 1
    """Steps of the student: 1, or a few with backward simulation."""
    times: tuple[float, ...] = ()
    """Timesteps of the student, noisiest first. Default: the first where sigma / alpha is --student-ratio, the
    others evenly spaced below it."""
    student_ratio: float = 3.5
    """Noise level sigma / alpha of the student's first timestep. At the noisiest timestep a network that predicts
    eps multiplies its errors by 1 / alpha, up to 157. 0 means the noisiest timestep all the same. A text-to-image
    flow (Stable Diffusion 3) always starts from the noisiest."""
    ratio_range: tuple[float, float] = (0.15, 20.0)
    """Noise levels sigma / alpha at which student and teacher are compared. 0 0 means 2 to 98 % of the timesteps,
    as in DMD."""
    student_lr: float = 0.0
    """Peak learning rate of the student. 0: a 25th of the warm-up's."""
    fake_lr: float = 0.0
    """Peak learning rate of the fake score. 0: four tenths of the warm-up's."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a half cosine to zero, for the fake score to a tenth, or the peak to the end (DMD2)."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Of AdamW. Without first-moment memory, as the gradient's direction changes under the student; DMD2 has
    0 and 0.999 on ImageNet, 0.9 and 0.999 on Stable Diffusion."""
    guidance: float = 1.0
    """Scale of classifier-free guidance of the teacher; 1 means none."""
    alpha_in_gradient: bool = False
    """Keep the factor alpha(t) of the DMD paper's gradient, which its code drops. No difference for EDM."""
    gan_weight: float | None = None
    """Weight of the student's adversarial term. 0: the student never sees real images. Default: 0.03 where there
    are real images and the network has a bottleneck to listen to, else 0."""
    reals: Literal["data", "teacher"] = "data"
    """What the GAN term takes for real: --data, or the images of the teacher pairs, which need no data."""
    separate_guidance: bool = False
    """Draw noise levels of its own for the guidance term, below that of a few-step student's current step
    (decoupled DMD). No effect at --guidance 1."""
    critic_weight: float = 0.01
    """Weight of the critic's loss beside the fake score's."""
    warmup_steps: int | None = None
    """Steps of regression on teacher pairs before the distribution matching; 0 means none. Default: four times
    --steps; none with --init-from."""
    warmup_lr: float = 0.0
    """Peak learning rate of the warm-up. 0: found by a range test of 50 steps, which is then undone."""
    regression_loss: Literal["l1", "l2", "huber"] = "l1"
    """Distance of a student's image from its teacher's in the regression on pairs."""
    regression_weight: float = 1.0
    """Weight of the regression on pairs beside the distribution matching; 0 means none."""
    num_pairs: int = 0
    """Teacher pairs for the regressions. 0: one for every 20 that the warm-up reads, at least 2,000."""
    pair_steps: int = 16
    """Network calls of each pair."""
    pair_sampler: Literal["auto", "ddim"] = "auto"
    """How pairs are sampled. auto: as `scorefield sample` does, by schedule and number of calls; ddim: DDIM at
    evenly spaced timesteps, of which the last is nearly clean."""
    fake_warmup: int = 200
    """Updates of the fake score on the student's images before the student's first one."""
    guard_images: int = 512
    """Held-out teacher pairs that the student is compared with, in the teacher's own features: the best weights
    are kept, and a student that drifts goes back to them at half the learning rates. 0 means no guard."""
    guard_every: int = 100
    """Iterations between two such comparisons."""
    max_setbacks: int = 3
    """Setbacks from which the run goes on; after the next one it ends with its best weights."""
    ema_decay: float = 0.99
    """Of the student's moving average, ticked on student updates; it is what is saved. 0: the student itself."""
    allow_pickle: bool = False
    """Read weights that are no safetensors. They can run code of whoever made them."""
    variant: str = ""
    """Of the weight files of a diffusers model that has no plain ones, such as fp16."""
    bottleneck: str | None = None
    """Submodule whose output critic and guard read. None: the network's own choice, its mid_block, or where one
    pass of it is narrowest."""
    skip_teacher_check: bool = False
    """Do not ask the teacher about a few images before the training, and train with one that fails the check."""
    offload: bool = False
    """Keep the optimisers' state in the computer's memory between their steps."""

    # Text-to-image teachers
    prompts: str = ""
    """What the student learns to draw: a text file with a prompt a line; a jsonl, csv or parquet file, or a data
    set, with "prompt" (or "text", "caption") and, for the GAN term, the path of an "image" (or "file_name"); a
    folder of images with .txt captions or metadata.jsonl; webdataset .tar; or "toyworld". Given, the teacher is a
    text-to-image pipeline."""
    num_prompts: int = 0
    """How many of them to use, the first; 0: all, 4,000 of the toy world's."""
    long_prompts: LongPrompts = "stop"
    """What to do about prompts that are longer than the text encoders read."""
    negative: str = ""
    """What guidance moves away from."""
    teacher_size: int = 0
    """Height and width of the teacher's images in pixels; 0 is its own."""
    lora: bool = False
    """Student and fake score are LoRAs on the teacher's one copy of the weights, in place of copies."""
    lora_rank: int = 64
    """Rank of both."""
    lora_alpha: float = 0.0
    """peft's lora_alpha: the changes are scaled by alpha / rank; 0 is the rank."""
    validation_prompts: tuple[str, ...] = ()
    """What is drawn every --save-every iterations; none: the first eight prompts."""

    @property
    def may_change(self) -> tuple[str, ...]:
        """The length of the run, when it gives up, and rates that are constant."""
        rates = ("student_lr", "fake_lr") if self.lr_schedule == "constant" else ()
        return ("steps", "max_setbacks", *rates)


TEXT_ONLY = (
    "num_prompts", "long_prompts", "negative", "teacher_size", "lora", "lora_rank", "lora_alpha",
    "validation_prompts",
)  # fmt: skip
IMAGES_ONLY = ("network", "data", "resolution", "channels", "crop", "flip", "features")
IMAGE_PRESETS = ("auto", "digits")
MIN_GUARD = 64
LORA_ONLY = ("lora_rank", "lora_alpha")


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range or contradict each other."""
    check_run(config)
    check_init_from(config.init_from, config.out)
    check_numbers(
        config,
        positive=("student_every", "num_steps", "pair_steps", "lora_rank", "guard_every"),
        not_negative=(
            "guidance", "critic_weight", "regression_weight", "num_prompts", "teacher_size", "lora_alpha",
            "eval_every", "num_pairs", "student_ratio", "fake_warmup", "guard_images", "max_setbacks",
            "student_lr", "fake_lr", "warmup_lr",
        ),
        shares=("ema_decay",),
    )  # fmt: skip
    if config.steps < config.student_every:
        raise ValueError(
            f"--steps {config.steps} end before the student's first update, which comes at --student-every "
            f"{config.student_every}."
        )
    for name in ("student_lr", "fake_lr", "warmup_lr"):
        if getattr(config, name) > 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at most 1; got {getattr(config, name)}.")
    for name in ("gan_weight", "warmup_steps"):
        if (value := getattr(config, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0; got {value}.")
    low, high = config.ratio_range
    if not (low == high == 0 or 0 < low < high < math.inf):
        raise ValueError(f"--ratio-range needs 0 < first < last, or 0 0; got {low:g} {high:g}.")
    if 0 < config.guard_images < MIN_GUARD:
        raise ValueError(f"--guard-images must be 0 or at least {MIN_GUARD}; got {config.guard_images}.")
    if config.times and len(config.times) != config.num_steps:
        raise ValueError(f"--times must be --num-steps {config.num_steps} numbers; got {len(config.times)}.")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"--betas must lie in [0, 1); got {config.betas}.")
    if config.reals == "teacher" and config.warmup_steps == 0 and not config.regression_weight:
        raise ValueError(
            "--reals teacher takes the images of the teacher pairs, of which --warmup-steps 0 and "
            "--regression-weight 0 make none. Pass one of them above 0, or --reals data."
        )
    if config.gan_weight and not config.critic_weight:
        raise ValueError("--critic-weight 0 trains no critic for the GAN term. Pass 0.01, or --gan-weight 0.")
    if config.prompts:
        check_texts(config)
    else:
        check_no_texts(config)


def check_texts(config: Config) -> None:
    """Raise ``ValueError`` for options that contradict ``--prompts``."""
    if config.preset in IMAGE_PRESETS:
        raise ValueError(
            f"preset {config.preset} is for teachers of images. With --prompts take text, or name no preset."
        )
    refuse_given(config, IMAGES_ONLY, "is for teachers of images: leave it out with --prompts.")
    if not config.lora:
        refuse_given(config, LORA_ONLY, "is for LoRAs: pass --lora, too.")
    if config.lora and config.compile:
        raise ValueError("--compile is not for --lora, whose networks listen to one another's weights.")
    if any(not prompt.strip() for prompt in config.validation_prompts):
        raise ValueError(f"--validation-prompts must say something; got {list(config.validation_prompts)}.")
    if config.negative and config.guidance == 1:
        raise ValueError("--negative is what guidance moves away from: pass --guidance above 1, too.")
    if config.eval_every and config.eval_images < 2:
        raise ValueError(f"--eval-images must be at least 2; got {config.eval_images}.")


def check_no_texts(config: Config) -> None:
    """Raise ``ValueError`` for options that need ``--prompts``."""
    if config.preset not in IMAGE_PRESETS:
        raise ValueError(f"preset {config.preset} is for text-to-image teachers: pass --prompts, too.")
    refuse_given(config, TEXT_ONLY, "is for text-to-image teachers: pass --prompts, too.")


def refuse_given(config: Config, names: Sequence[str], why: str) -> None:
    """Raise ``ValueError`` for the first of some options that is not as the preset has it."""
    usual = PRESETS[config.preset]()
    for name in names:
        if getattr(config, name) != getattr(usual, name):
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def auto() -> Config:
    """The default recipe, for any teacher of images."""
    return Config(batch_size=64, save_every=500, betas=(0.9, 0.99))


PAPER: dict[str, Any] = {
    "student_ratio": 0.0, "ratio_range": (0.0, 0.0), "fake_warmup": 0, "guard_images": 0, "regression_weight": 0.0,
    "regression_loss": "l2", "pair_sampler": "ddim",
}  # fmt: skip
"""Of recipes that are meant to be as they were published or measured: no rule of the default recipe."""


def digits() -> Config:
    """The recipe behind `make demo`: fixed rates, the noisiest timestep, and real digits for the GAN term."""
    return Config(
        preset="digits", **PAPER, steps=2000, batch_size=256, student_every=2, student_lr=3e-4, fake_lr=3e-4,
        gan_weight=0.01, warmup_steps=500, warmup_lr=1e-3, num_pairs=5000, pair_steps=50,
    )  # fmt: skip


def text() -> Config:
    """Any text-to-image teacher: the default recipe under guidance 3, computed in bf16 on a GPU."""
    gpu = has_gpu()
    return Config(
        preset="text",
        batch_size=32,
        guidance=3.0,
        precision="bf16" if gpu else "no",
        gradient_checkpointing=gpu,
        betas=(0.9, 0.99),
    )


def toyworld_1step() -> Config:
    """The pipeline that ships, in minutes on a CPU; LOG.md says what was tried."""
    return Config(
        preset="toyworld-1step", **PAPER, teacher="toyworld", prompts="toyworld", out=Path("runs/text-1step"),
        steps=800, batch_size=32, student_every=2, student_lr=2e-4, fake_lr=2e-4, guidance=2.0, gan_weight=0.01,
        warmup_steps=300, warmup_lr=5e-4, num_pairs=640, pair_steps=16, ema_decay=0.98, precision="bf16",
        save_every=200, log_every=20,
    )  # fmt: skip


def toyworld_4step() -> Config:
    """The same in four steps, without a warm-up.

    The fake score is not told which step an image is of, since networks of diffusers cannot be; nor is DMD2's.
    LOG.md has a mixture of modes on which being told made the last step two to six times better.
    """
    return Config(
        preset="toyworld-4step", **PAPER, teacher="toyworld", prompts="toyworld", out=Path("runs/text-4step"),
        steps=1200, batch_size=32, student_every=2, num_steps=4, student_lr=1e-4, fake_lr=2e-4, guidance=2.0,
        gan_weight=0.01, warmup_steps=0, ema_decay=0.98, precision="bf16", save_every=200, log_every=20,
    )  # fmt: skip


def toyworld_1step_lora() -> Config:
    """The one-step recipe on one copy of the weights."""
    return Config(
        preset="toyworld-1step-lora", **PAPER, teacher="toyworld", prompts="toyworld",
        out=Path("runs/text-1step-lora"), steps=800, batch_size=32, student_every=2, student_lr=1e-3, fake_lr=1e-3,
        guidance=2.0, gan_weight=0.01, warmup_steps=300, warmup_lr=2e-3, num_pairs=640, pair_steps=16,
        ema_decay=0.98, lora=True, lora_rank=8, precision="bf16", save_every=200, log_every=20,
    )  # fmt: skip


def sd15_1step() -> Config:
    """DMD2's one-step student of Stable Diffusion 1.5, its first stage alone; its batch of 2,048 is 64 x 32.

    The paper's second stage, 5,000 iterations at 5e-7 with a GAN term of weight 1e-3, starts from the first one's
    student: pass that with --init-from. Other than there: 100 updates of warm-up in place of 500, and a fake score
    that starts from the teacher in both stages. Prompts are the user's: --prompts.
    """
    return Config(
        preset="sd15-1step", **PAPER, teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
        out=Path("runs/sd15-1step"), steps=40_000, batch_size=32, student_every=10, student_lr=1e-5, fake_lr=1e-5,
        lr_schedule="constant", betas=(0.9, 0.999), guidance=1.75, gan_weight=0.0, warmup_steps=0, ema_decay=0.0,
        precision="bf16", gradient_checkpointing=True,
    )  # fmt: skip


def sdxl_4step_lora() -> Config:
    """DMD2's four-step LoRA of SDXL; its batch of 128 is 64 x 2. Needs images for the GAN term: --prompts.

    Other than in the paper's code the fake score is a LoRA, too, of the student's rank and scale, 8 / 64, where
    DMD2 trains all its weights; and 100 updates of warm-up in place of 500.
    """
    return Config(
        preset="sdxl-4step-lora", **PAPER, teacher="stabilityai/stable-diffusion-xl-base-1.0",
        out=Path("runs/sdxl-4step-lora"), steps=16_000, batch_size=2, student_every=5, num_steps=4,
        student_lr=5e-5, fake_lr=5e-5, lr_schedule="constant", betas=(0.9, 0.999), guidance=8.0, gan_weight=5e-3,
        critic_weight=1e-2, warmup_steps=0, ema_decay=0.0, lora=True, lora_rank=64, lora_alpha=8.0,
        precision="bf16", gradient_checkpointing=True,
    )  # fmt: skip


PRESETS: Mapping[str, Callable[[], Config]] = {
    "auto": auto, "digits": digits, "text": text,
    "toyworld-1step": toyworld_1step, "toyworld-4step": toyworld_4step, "toyworld-1step-lora": toyworld_1step_lora,
    "sd15-1step": sd15_1step, "sdxl-4step-lora": sdxl_4step_lora,
}  # fmt: skip


def presets_for(arguments: Sequence[str]) -> Mapping[str, Callable[[], Config]]:
    """Return the presets, first the one that a command line means where it names none."""
    texts = any(argument.partition("=")[0] == "--prompts" for argument in arguments)
    return {"text": text, **PRESETS} if texts else PRESETS
