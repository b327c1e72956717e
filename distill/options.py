"""Options of ``scorefield distill`` and its presets: numbers of papers, which PAPERS.md quotes, and our own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from scorefield.choices import LongPrompts, Quantize
from scorefield.data.options import DataOptions
from scorefield.training.launcher import has_gpu
from scorefield.training.options import EvalOptions, LoadOptions, Passes, RunOptions


@dataclass(frozen=True, kw_only=True)
class Student:
    """The student: where it starts from, and the timesteps it is asked at."""

    free: ClassVar[tuple[str, ...]] = ("kohya_keys",)

    init_from: str = ""
    """Finished student to start from: its folder, or a LoRA's .safetensors file in diffusers' or kohya's keys."""
    lora: bool = False
    """Train the student and the fake score as LoRAs on one shared copy of the teacher's weights."""
    quantize: Quantize = "no"
    """With --lora: round the shared weights to 4 bits (needs bitsandbytes) or 8 (needs torchao), for memory."""
    lora_rank: int = 64
    """Rank of both LoRAs."""
    lora_alpha: float = 0.0
    """peft's lora_alpha: a LoRA's output is scaled by alpha / rank. 0 means alpha = rank."""
    kohya_keys: bool = False
    """Also write the LoRA in the keys of kohya's scripts, which ComfyUI reads: --out/student/kohya.safetensors."""
    times: tuple[float, ...] = ()
    """Timesteps of the student, noisiest first. By default the first one is where sigma / alpha equals
    --student-ratio, and the others are evenly spaced below it."""
    student_ratio: float = 3.5
    """Noise level sigma / alpha of the student's first timestep. 0 means the noisiest timestep, where a network
    that predicts eps multiplies its errors by 1 / alpha: up to 157. Text-to-image flow models always start at the
    noisiest timestep."""
    ema_decay: float = 0.99
    """Decay of the student's moving average, which is what is saved. 0 saves the student itself."""


MethodName = Literal["dmd", "sid", "f-distill", "diff-instruct", "consistency", "scm", "progressive"]
"""What the student learns from."""

ALONG_PATHS = ("consistency", "scm", "progressive")
"""Methods without a fake score, which learn from images and the teacher's paths through them."""


@dataclass(frozen=True, kw_only=True)
class Matching:
    """What the student learns from. Distribution matching: student updates, and the fake score that follows it."""

    method: MethodName = "dmd"
    """dmd: distribution matching (DMD2). sid, f-distill and diff-instruct: its relatives, with another gradient;
    f-distill needs the GAN term. consistency: neighbours on a path of the teacher shall end alike; with guidance
    that is LCM. scm: the same in continuous time. progressive: one step for two of the teacher's, again and again,
    to one step. These three have no fake score; their settings are in the presets consistency, lcm and
    progressive."""
    points: int = 32
    """Points on a path of the teacher, for --method consistency: CM 18, LCM 50. For --method progressive the steps
    of the first teacher, a power of two; each halving takes an equal share of --steps."""
    student_every: int = 5
    """Updates of the fake score per update of the student (DMD2: 5)."""
    ratio_range: tuple[float, float] = (0.15, 20.0)
    """Lowest and highest noise level sigma / alpha at which student and teacher are compared. 0 0 means 2 to 98 %
    of the timesteps, as in DMD."""
    student_lr: float = 0.0
    """Peak learning rate of the student. 0 means 1/25 of the warm-up's; a quarter
    for consistency, scm and progressive."""
    fake_lr: float = 0.0
    """Peak learning rate of the fake score. 0 means 2/5 of the warm-up's."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """How both rates go on after their warm-up. cosine: down to zero for the student and to a tenth for the fake
    score. constant: they stay (DMD2)."""
    betas: tuple[float, float] = (0.0, 0.99)
    """Betas of AdamW. DMD2 uses 0 and 0.999 on ImageNet, 0.9 and 0.999 on Stable Diffusion."""
    fake_warmup: int = 200
    """Updates of the fake score on the student's images before the student's first update."""
    alpha_in_gradient: bool = False
    """Keep the factor alpha(t) of the gradient in the DMD paper, which DMD's code drops. EDM has alpha = 1."""
    separate_guidance: bool = False
    """Draw the noise levels of the guidance term separately, below that of the student's current step (decoupled
    DMD). Has no effect at --guidance 1."""


@dataclass(frozen=True, kw_only=True)
class GAN:
    """The adversarial term of DMD2: a critic on features of the fake score."""

    gan_weight: float | None = None
    """Weight of the adversarial term in the student's loss. 0 means no critic. By default 0.03 if there are real
    images and the network has a layer for the critic to read, else 0."""
    critic_weight: float = 0.01
    """Weight of the critic's loss beside the fake score's loss."""
    reals: Literal["data", "teacher"] = "data"
    """What the critic takes for real, and where consistency, scm and progressive take their images from: --data,
    or images that the teacher made, which need no data."""
    bottleneck: str | None = None
    """Name of the submodule whose output the critic and the guard read. By default the network's own mid_block, or
    the narrowest layer of one forward pass."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Regression on pairs of noise and teacher image: first alone, then beside the distribution matching."""

    warmup_steps: int | None = None
    """Steps of regression before the distribution matching. By default four times --steps, or 0 with
    --init-from."""
    warmup_lr: float = 0.0
    """Peak learning rate of the warm-up. 0 means: find it in a range test of 50 steps, which is then undone."""
    regression_loss: Literal["l1", "l2", "huber"] = "l1"
    """Distance between the student's image and the teacher's."""
    regression_weight: float = 1.0
    """Weight of the regression beside the distribution matching. 0 means none after the warm-up."""
    num_pairs: int = 0
    """Number of pairs. 0 means one for every 20 that the warm-up reads, and at least 2,000."""
    pair_steps: int = 16
    """Teacher calls per pair."""
    pair_sampler: Literal["auto", "ddim"] = "auto"
    """Sampler of the pairs. auto chooses by schedule and number of calls, as `scorefield sample` does. ddim uses
    evenly spaced timesteps, of which the last is nearly clean."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The guard: it compares the student with the teacher on held-out noise, and keeps the best weights."""

    free: ClassVar[tuple[str, ...]] = ("skip_teacher_check",)

    guard_images: int = 512
    """Held-out pairs that the student is compared on, in features of the teacher's own network. A student that
    drifts away goes back to the best weights at half the learning rates. 0 means no guard."""
    guard_every: int = 100
    """Iterations between two comparisons."""
    max_setbacks: int = 3
    """How often the student may go back. At the next drift the run ends with the best weights."""
    skip_teacher_check: bool = False
    """Skip the check of the teacher at the start, or train even though the check failed."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Prompts, for text-to-image teachers only."""

    free: ClassVar[tuple[str, ...]] = ("long_prompts", "validation_prompts")

    num_prompts: int = 0
    """Use only the first so many prompts. 0 means all of them, or 4,000 of the toy world's."""
    long_prompts: LongPrompts = "stop"
    """What to do about prompts that are longer than the text encoders read: stop, skip them, or cut them."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts that are drawn every --save-every iterations. By default the first eight of --prompts."""


@dataclass(frozen=True, kw_only=True)
class Config(
    Student, Matching, GAN, WarmUp, Guard, Texts, LoadOptions, DataOptions, EvalOptions, Passes, RunOptions
):
    """Distil a diffusion teacher into a generator of one or a few steps (DMD2 and relatives, consistency)."""

    results: ClassVar[tuple[str, ...]] = ("student", "best", "best.json", "report.json", "beside_teacher.png")
    free: ClassVar[tuple[str, ...]] = ("preset", "gradient_checkpointing", "offload")

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "auto"
    teacher: str = "runs/teacher/teacher"
    """The frozen model. A folder that `scorefield teacher` wrote, a folder of a diffusers UNet2DModel, or
    module:function, such as mine:teacher for a function in mine.py, whose code is run. With --prompts: the name or
    folder of a diffusers text-to-image pipeline, or toyworld, the one that ships."""
    prompts: str = ""
    """Prompts to learn, for text-to-image teachers. A text file with one prompt per line; a jsonl, csv or parquet
    file or a data set with a column prompt, text or caption, and for the GAN term a column image or file_name; a
    folder of images with .txt captions or metadata.jsonl; a webdataset .tar; or toyworld."""
    num_steps: int = 1
    """Steps of the student: 1, or a few, which are trained by backward simulation."""
    guidance: float = 1.0
    """Scale of the teacher's classifier-free guidance, which the student learns to include. 1 means none."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    size: int = 0
    """Height and width of images in pixels: with --prompts of the teacher's, else of those in --data. 0 means the
    teacher's own, or those of the first image."""
    num_frames: int = 1
    """Frames of the videos that a video teacher draws, such as 81. 1 means images. Videos are for --method dmd
    without a critic, and are learned from prompts alone."""

    network: str = ""
    """For a --teacher folder that was distilled from a module:function: the module:function that builds its
    network, whose code is run. Code that a folder names is never run."""

    out: Path = Path("runs/student")
    """Folder for checkpoints, logs, samples and the finished student."""
    steps: int = 2000
    """Updates of the fake score. The student takes one step in every --student-every of them. The run ends earlier
    if the guard sees the student drift too often."""
    offload: bool = False
    """Keep the optimizer states in CPU memory between their steps."""

    @property
    def needs_images(self) -> bool:
        """Return True if something learns from images beside noise: a critic, or the points of paths."""
        return self.method in ALONG_PATHS or bool(self.gan_weight)

    @property
    def may_change(self) -> tuple[str, ...]:
        """The length of the run, when it gives up, and rates that are constant."""
        rates = ("student_lr", "fake_lr") if self.lr_schedule == "constant" else ()
        length = () if self.method == "progressive" else ("steps",)  # which its stages are shares of
        return (*length, "max_setbacks", *rates)


IMAGE_PRESETS = ("auto", "digits", "consistency", "progressive")


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


def consistency() -> Config:
    """Consistency distillation of any teacher of images; with --method scm in continuous time."""
    return replace(
        auto(), preset="consistency", method="consistency", student_ratio=20.0, warmup_steps=0,
        regression_weight=0.0, guard_every=500, steps=10_000,
    )  # fmt: skip


def progressive() -> Config:
    """Progressive distillation of any teacher of images: eight, four, two steps, one."""
    return replace(consistency(), preset="progressive", method="progressive", points=16)


def lcm() -> Config:
    """Latent consistency distillation of a text-to-image teacher in four steps, at one scale of guidance."""
    return replace(
        text(), preset="lcm", method="consistency", reals="teacher", num_steps=4, student_ratio=0.0, points=50,
        warmup_steps=0, regression_weight=0.0, guard_every=500, out=Path("runs/lcm"),
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


LORA_OF_DMD2: dict[str, Any] = {
    "student_lr": 5e-5, "fake_lr": 5e-5, "lr_schedule": "constant", "betas": (0.9, 0.999), "student_every": 5,
    "num_steps": 4, "critic_weight": 1e-2, "warmup_steps": 0, "ema_decay": 0.0, "lora": True, "lora_rank": 64,
    "lora_alpha": 8.0, "precision": "bf16", "gradient_checkpointing": True,
}  # fmt: skip
"""DMD2's four-step LoRA of SDXL: nothing is published about LoRAs of flow transformers."""


def flux_4step_lora() -> Config:
    """FLUX.1-dev in four steps, never run here; needs images for the GAN term: --prompts.

    Guidance, GAN term, size, batch and length are FastGen's (NVIDIA); rates and LoRA are DMD2's of SDXL.
    """
    return Config(
        preset="flux-4step-lora", **PAPER, **LORA_OF_DMD2, teacher="black-forest-labs/FLUX.1-dev",
        out=Path("runs/flux-4step-lora"), steps=5000, batch_size=2, guidance=3.5, gan_weight=0.03, size=512,
    )  # fmt: skip


def qwen_image_4step_lora() -> Config:
    """The same for Qwen-Image, with the guidance of FastGen's ``QwenImage/config_dmd2.py``. Never run here."""
    out = Path("runs/qwen-image-4step-lora")
    return replace(
        flux_4step_lora(), preset="qwen-image-4step-lora", teacher="Qwen/Qwen-Image", guidance=4.0, out=out
    )


def z_image_4step_lora() -> Config:
    """The same for Z-Image, without GAN term, its guidance decoupled (arXiv 2511.22677). Never run here."""
    return replace(
        flux_4step_lora(), preset="z-image-4step-lora", teacher="Tongyi-MAI/Z-Image", guidance=6.0,
        separate_guidance=True, gan_weight=0.0, out=Path("runs/z-image-4step-lora"),
    )  # fmt: skip


def sd35_4step_lora() -> Config:
    """The same for Stable Diffusion 3.5 medium without a GAN term, at its own size. Never run here.

    Guidance 4 is SenseFlow's (arXiv 2506.00523), which says that plain DMD hardly converges on this model.
    """
    return replace(
        flux_4step_lora(), preset="sd35-4step-lora", teacher="stabilityai/stable-diffusion-3.5-medium",
        guidance=4.0, gan_weight=0.0, size=0, out=Path("runs/sd35-4step-lora"),
    )  # fmt: skip


def sana_1step() -> Config:
    """DMD2's one-step recipe for Sana 1.6B, under its pipeline's guidance. Never run here.

    Nothing is published about DMD on Sana; its makers' one-step model is of another method (arXiv 2503.09641).
    """
    return replace(
        sd15_1step(), preset="sana-1step", teacher="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        guidance=4.5, out=Path("runs/sana-1step"),
    )  # fmt: skip


PRESETS: Mapping[str, Callable[[], Config]] = {
    "auto": auto, "digits": digits, "consistency": consistency, "progressive": progressive,
    "text": text, "lcm": lcm,
    "toyworld-1step": toyworld_1step, "toyworld-4step": toyworld_4step, "toyworld-1step-lora": toyworld_1step_lora,
    "sd15-1step": sd15_1step, "sdxl-4step-lora": sdxl_4step_lora, "flux-4step-lora": flux_4step_lora,
    "qwen-image-4step-lora": qwen_image_4step_lora, "z-image-4step-lora": z_image_4step_lora,
    "sd35-4step-lora": sd35_4step_lora, "sana-1step": sana_1step,
}  # fmt: skip


def presets_for(arguments: Sequence[str]) -> Mapping[str, Callable[[], Config]]:
    """Return the presets, first the one that a command line means where it names none."""
    texts = any(argument.partition("=")[0] == "--prompts" for argument in arguments)
    return {"text": text, **PRESETS} if texts else PRESETS
