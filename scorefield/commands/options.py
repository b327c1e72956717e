"""Options of the commands that belong to no pillar: teacher, sample, evaluate and features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scorefield.choices import LongPrompts, OnBadData, Solver, Spacing
from scorefield.data.options import DataOptions
from scorefield.training.launcher import default_device
from scorefield.training.options import EvalOptions, RunOptions


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample a teacher or a student."""

    teacher: str
    """What draws, teacher or student: a folder of `scorefield teacher` or `scorefield distill`, one of diffusers,
    the name of a diffusers model online, toyworld, which ships, or module:function, whose code is run."""
    network: str = ""
    """For the student of a module:function: the module:function that builds its network, whose code is run. What a
    folder names is never run."""
    prompts: tuple[str, ...] = ()
    """What a text-to-image model is asked for, in turn: image i shows prompt i modulo their number, its class. One
    that names a .txt, .jsonl, .csv, .parquet or .tar file, or a folder such as photos/, stands for the prompts
    in it."""
    long_prompts: LongPrompts = "stop"
    """What to do about prompts that are longer than the text encoders read."""
    on_bad_data: OnBadData = "stop"
    """Lines of a file of prompts that cannot be used: stop, or leave them out."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    out: Path = Path("samples")
    """Folder for PNG files, in a subfolder per class number, with a metadata.jsonl of their prompts or labels, so
    that it can be --data of other commands; or a file that ends in .npz. Earlier samples are replaced. The first
    hundred are shown in the picture <out>.grid.png, which lies beside."""
    num_images: int | None = None
    """Images in all. None: one for each prompt, or 100 of a model without prompts."""
    classes: tuple[int, ...] = ()
    """Classes to make, in turn; none means all of them."""
    steps: int = 50
    """Network calls per image of a teacher, whatever the sampler. Heun pays two a step: 17 calls are 9 steps. A
    student knows its own."""
    sampler: Literal["auto", Solver] = "auto"
    """Of a teacher. auto is unipc, or ddim in up to four calls of a plain DDPM. ddim beats heun below 15 calls of
    EDM or a plain DDPM, and heun, dpm++ and unipc below 50 calls on the uniform grid. ddpm adds noise and wants
    many calls."""
    grid: Literal["auto", Spacing] = "auto"
    """Times of a teacher's calls. trailing: even timesteps, as diffusers has it; karras, log-snr: even in a power,
    or in the logarithm, of the noise level; uniform: even timesteps whose last is the nearly clean image, a wasted
    call. auto suits the sampler: log-snr for unipc and dpm++, karras for ddim; trailing for flows."""
    guidance: float = 1.0
    """Scale of classifier-free guidance of a teacher; 1 means none, 7.5 is usual for Stable Diffusion. A student
    has it built in."""
    size: Annotated[int, tyro.conf.arg(aliases=("--teacher-size",))] = 0
    """Height and width of a text-to-image model's pictures in pixels; 0 means its own."""
    allow_pickle: bool = False
    """Read pickled weights of a diffusers model that has no safetensors. Only if you trust where it comes from."""
    variant: str = ""
    """Of the weight files of a diffusers model that has no plain ones, such as fp16."""
    batch_size: int = 0
    """Images at a time and process. 0: by their size, one of 1024 x 1024 pixels, 4 of 512 x 512, at most 250."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision of the network; bf16 also loads the weights of a text-to-image model as such."""
    seed: int = 0
    """Of all images: image i of a seed is always the same."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure the distance between two sets of images."""

    generated: str
    """Folder, npz or idx file, or dataset: whatever --data takes."""
    reference: str
    """The same, of real images that nothing was trained on."""
    features: Path
    """Folder of `scorefield features`, or the weights file of InceptionV3."""
    on_bad_data: OnBadData = "stop"
    """Images that cannot be used: stop, or leave them out."""
    num_images: int | None = None
    """Images of each set, drawn at random but always the same; None: all."""
    batch_size: int = 500
    """Images at a time."""
    out: Path | None = None
    """JSON file for the figures, which are printed anyway."""
    device: str = default_device()
    """Where to compute the features."""


@dataclass(frozen=True, kw_only=True)
class TrainFeatures(DataOptions):
    """Train the feature network of `scorefield evaluate`."""

    out: Path = Path("runs/features")
    """Folder for weights and facts."""
    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak of a one-cycle schedule."""
    seed: int = 0
    """Of the split into nine tenths and one tenth, the weights and the augmentation."""
    device: str = default_device()
    """Where to train."""


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(RunOptions, DataOptions, EvalOptions):
    """Train a diffusion teacher of small images, class-conditional where there are classes."""

    results: ClassVar[tuple[str, ...]] = ("teacher", "best", "best.json")

    out: Path = Path("runs/teacher")
    """Folder for checkpoints, TensorBoard logs and the finished teacher."""
    steps: int = 3000
    """Optimiser steps."""
    init_from: str = ""
    """Folder of a finished teacher whose weights this one starts from; it must be built alike."""
    learning_rate: float = 1e-3
    """Peak of AdamW's learning rate: 100 steps of warm-up, then cosine to zero."""
    network: Literal["mlp", "unet"] = "mlp"
    """A residual MLP for images of a few hundred pixels, or diffusers' UNet for larger ones."""
    width: int = 256
    """Of the MLP: hidden width."""
    depth: int = 4
    """Of the MLP: number of blocks."""
    unet_channels: tuple[int, ...] = (64, 128)
    """Of the UNet: channels at each resolution, halving from one to the next."""
    unet_layers: int = 1
    """Of the UNet: residual blocks at each resolution."""
    unet_patch: int = 2
    """Of the UNet: pixels that become channels first; 1 is slower and finer."""
    dropout: float = 0.1
    """In each block; 0 lets a few hundred images be memorised."""
    sigma_data: float | None = None
    """Standard deviation of the data, for EDM preconditioning. None: measured."""
    sigma_min: float = 0.02
    """Lowest noise level; the digits have 17 grey levels, so less would model their quantisation."""
    sigma_max: float = 20.0
    """Highest noise level, where a one-step student will be asked."""
    noise_mean: float = -0.8
    """Mean of log sigma in training (EDM: -1.2)."""
    noise_std: float = 1.2
    """Standard deviation of log sigma in training (EDM: 1.2)."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, so that the teacher can be guided."""
    ema_decay: float = 0.999
    """Of the exponential moving average of the weights, which is what is saved."""
