"""Options of the commands that belong to no pillar: teacher, sample, evaluate and features."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scorefield.atomic import check_replaceable
from scorefield.choices import LongPrompts, OnBadData, Quantize, Solver, Spacing
from scorefield.data.options import DataOptions
from scorefield.files import load_json
from scorefield.training.launcher import check_alone, default_device
from scorefield.training.options import (
    EvalOptions,
    LoadOptions,
    Passes,
    RunOptions,
    check_init_from,
    check_micro_batch,
    check_numbers,
    check_out,
    check_quantize,
    check_run,
)

MOST_RUNS = 24
"""Runs side by side in one report."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a teacher is sampled. A student knows its own steps and has guidance built in."""

    steps: int = 50
    """Network calls per image, whatever the sampler. Heun needs two per step: 17 calls are 9 steps."""
    sampler: Literal["auto", Solver] = "auto"
    """auto is unipc, or ddim in up to four calls of a plain DDPM. ddim beats heun below 15 calls of EDM or a plain
    DDPM, and it beats heun, dpm++ and unipc below 50 calls on the uniform grid. ddpm adds noise and needs many
    calls."""
    grid: Literal["auto", Spacing] = "auto"
    """Spacing of the timesteps. trailing: even timesteps, as in diffusers. karras, log-snr: even in a power of the
    noise level, or in its logarithm. uniform: even timesteps that end at the nearly clean image, which wastes a
    call. auto is log-snr for unipc and dpm++, karras for ddim, and trailing for flow models."""
    guidance: float = 1.0
    """Scale of classifier-free guidance. 1 means none; 7.5 is usual for Stable Diffusion."""
    negative_prompt: str = ""
    """What guidance moves away from."""


@dataclass(frozen=True, kw_only=True)
class Sample(Sampling, LoadOptions):
    """Draw images from a teacher or a student."""

    teacher: str
    """What to draw from, a teacher or a student: a folder of `scorefield teacher` or `scorefield distill`, name or
    folder of a diffusers model, toyworld, the one that ships, or module:function, whose code is run."""
    prompts: tuple[str, ...] = ()
    """Prompts for a text-to-image model. A name that ends in .txt, .jsonl, .csv, .parquet or .tar stands for the
    prompts in that file, and that of a folder with a slash, such as photos/, for those in it. Image i shows prompt
    i; if there are more images than prompts, they start again."""
    classes: tuple[int, ...] = ()
    """Classes to draw, in turn, from a model with classes. By default all of them."""
    num_images: int | None = None
    """Number of images. By default one per prompt, or 100 from a model without prompts."""
    size: int = 0
    """Height and width of a text-to-image model's images, in pixels. 0 means the model's own."""
    num_frames: int = 0
    """Frames of each video of a video model, such as 81; 1 draws images. 0 means those of a student, or else 1."""
    seed: int = 0
    """Seed of all images. Image i of a seed is always the same."""
    out: Path = Path("samples")
    """Folder for PNG files with a metadata.jsonl of their prompts or labels, which is itself valid --data; or a
    file that ends in .npz. Videos are GIF files of 256 colours; an .npz file has them exactly. Earlier samples
    there are replaced. The first hundred are shown in <out>.grid.png, or the frames of the first ten videos."""
    network: str = ""
    """For a student of a module:function: the module:function that builds its network, whose code is run. Code
    that a folder names is never run."""
    batch_size: int = 0
    """Images at a time and process. 0 means by their size: 1 of 1024 x 1024 pixels, 4 of 512 x 512, at most
    250."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision. bf16 also loads the weights of a text-to-image model in bf16."""
    quantize: Quantize = "no"
    """Round the weights of a pipeline's network, for memory, to 4 bits (nf4, needs bitsandbytes) or to 8 (int8,
    needs torchao)."""
    long_prompts: LongPrompts = "stop"
    """What to do about prompts that are longer than the text encoders read: stop, skip them, or cut them."""
    on_bad_data: OnBadData = "stop"
    """What to do about lines of a prompt file that cannot be used: stop, or skip them."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure the distance between two sets of images: Fréchet distance and KID."""

    generated: str
    """The generated images: a folder, an npz or idx file, a dataset, or whatever else --data takes."""
    reference: str
    """The real images, in the same forms. Nothing should have been trained on them."""
    features: Path
    """Folder of `scorefield features`, or the weights file of InceptionV3."""
    num_images: int | None = None
    """Images of each set, drawn at random from a fixed seed. By default all."""
    out: Path | None = None
    """JSON file for the figures. They are printed in any case."""
    on_bad_data: OnBadData = "stop"
    """What to do about images that cannot be used: stop, or skip them."""
    batch_size: int = 500
    """Images at a time."""
    device: str = default_device()
    """Where to compute, such as cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make one page about a run, or about several side by side, from their files alone."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders that commands wrote, such as runs/student, or a file of figures of `scorefield evaluate`."""
    out: Path | None = None
    """The page. By default report.html in the run's folder; of several runs, here."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """Put what a run made on the Hugging Face Hub, under a card of its figures."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run, such as runs/student, or a folder that one made."""
    to: str = ""
    """Name of the repository, as owner/name. It is made if it is not there; files of equal names are replaced."""
    private: bool = False
    """Make a new repository private, and refuse one that is public already."""
    licence: str = ""
    """Licence for the card, such as apache-2.0. By default that of the teacher's own card, if it is here."""
    dry_run: bool = False
    """Show the files and the card, and send nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainFeatures(DataOptions):
    """Train a classifier on your own classes, whose features `scorefield evaluate` compares."""

    out: Path = Path("runs/features")
    """Folder for the weights and a description of them."""
    steps: int = 2000
    """Number of optimizer steps."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 2e-3
    """Peak of a one-cycle learning rate."""
    seed: int = 0
    """Seed of the weights, of the augmentation, and of the tenth of the images that is held out."""
    device: str = default_device()
    """Where to train, such as cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network and its noise levels."""

    network: Literal["mlp", "unet"] = "mlp"
    """mlp: a residual MLP, for images of a few hundred pixels. unet: diffusers' UNet2DModel, for larger ones."""
    width: int = 256
    """Hidden width of the MLP."""
    depth: int = 4
    """Number of blocks of the MLP."""
    unet_channels: tuple[int, ...] = (64, 128)
    """Channels of the UNet at each resolution; each is half of the one before."""
    unet_layers: int = 1
    """Residual blocks of the UNet at each resolution."""
    unet_patch: int = 2
    """Pixels along a side that the UNet merges into channels first. 1 is slower and finer."""
    dropout: float = 0.1
    """Dropout in each block. 0 lets the network memorise a few hundred images."""
    sigma_data: float | None = None
    """Standard deviation of the data, for EDM's preconditioning. By default it is measured."""
    sigma_min: float = 0.02
    """Lowest noise level."""
    sigma_max: float = 20.0
    """Highest noise level."""
    noise_mean: float = -0.8
    """Mean of log sigma in training (EDM: -1.2)."""
    noise_std: float = 1.2
    """Standard deviation of log sigma in training (EDM: 1.2)."""
    label_dropout: float = 0.1
    """Share of labels that is replaced by "no class", so that the teacher can be guided."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights, which is what is saved."""


@dataclass(frozen=True, kw_only=True)
class TrainTeacher(Network, DataOptions, EvalOptions, Passes, RunOptions):
    """Train a diffusion teacher of small images, class-conditional if there are classes."""

    results: ClassVar[tuple[str, ...]] = ("teacher", "best", "best.json")

    out: Path = Path("runs/teacher")
    """Folder for checkpoints, logs, samples and the finished teacher."""
    steps: int = 3000
    """Number of optimizer steps."""
    init_from: str = ""
    """Folder of a finished teacher to start from. Its network must be built alike."""
    learning_rate: float = 1e-3
    """Peak learning rate: 100 steps of warm-up, then a cosine to zero."""


def check_sample(config: Sample) -> None:
    """Raise ``ValueError`` for options that are out of range."""
    check_numbers(config, positive=("steps",), not_negative=("guidance", "size", "batch_size", "num_frames"))
    check_quantize(config.quantize)
    if config.num_images is not None:
        check_numbers(config, positive=("num_images",))


def check_evaluate(config: Evaluate) -> None:
    """Raise ``ValueError`` for options that cannot work, before anything is read or computed."""
    check_numbers(config, positive=("batch_size",))
    if config.num_images is not None and config.num_images < 2:
        raise ValueError(f"--num-images must be at least 2, for a spread; got {config.num_images}.")
    if config.out is not None:
        check_out(config.out.parent)
        if config.out.is_dir():
            raise ValueError(f"--out {config.out} is a folder; expected a file to write. Choose another --out.")
        if config.out.exists() and not are_figures(config.out):
            raise ValueError(f"--out {config.out} holds what no earlier evaluation wrote. Choose another --out.")
    check_alone("evaluate")


def check_report(config: Report) -> None:
    """Raise ``ValueError`` for runs that are not there, and for a page that cannot be written."""
    if not 1 <= len(config.runs) <= MOST_RUNS:
        raise ValueError(
            f"a report is about 1 to {MOST_RUNS} runs; got {len(config.runs)}. Pass folders, such as runs/student."
        )
    if config.out is not None:
        if config.out.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--out must be a name that ends in .html; got {config.out}.")
        check_out(config.out.parent)
    check_alone("report")


_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
REPOSITORY = re.compile(rf"(?=.{{3,96}}$)(?!.*(?:--|\.\.))(?!.*\.git$){_PART}/{_PART}", re.ASCII)
"""Name of a repository of the hub."""

LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
"""What the hub takes for a licence; which names it knows, it says itself."""


def check_push(config: Push) -> None:
    """Raise ``ValueError`` for a name that no repository can have, a licence of another form, or no folder."""
    if not REPOSITORY.fullmatch(config.to):
        raise ValueError(f"--to must be owner/name, such as me/mugs-in-one-step; got {config.to!r}.")
    if config.licence and not LICENCE.fullmatch(config.licence):
        raise ValueError(f"--licence must be a short name, such as apache-2.0; got {config.licence!r}.")
    if not config.run.is_dir():
        raise ValueError(f"{config.run} is no folder. Pass the --out of a training, such as runs/student.")
    check_alone("push")


def are_figures(file: Path) -> bool:
    """Return True for a file that `scorefield evaluate` wrote."""
    try:
        held = load_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and {"features", "num_generated", "frechet_distance"} <= held.keys()


def check_features(config: TrainFeatures) -> None:
    """Raise ``ValueError`` for options that are out of range, or for an ``--out`` that may not be replaced."""
    check_numbers(config, positive=("steps", "batch_size"), rates=("learning_rate",))
    check_out(config.out)
    check_replaceable(config.out)
    check_alone("features")


def check_teacher(config: TrainTeacher) -> None:
    """Raise ``ValueError`` for options that are out of range."""
    check_run(config)
    check_micro_batch(config)
    check_init_from(config.init_from, config.out)
    check_numbers(
        config, positive=("width", "depth", "unet_layers", "unet_patch", "noise_std"), rates=("learning_rate",),
        shares=("dropout", "label_dropout", "ema_decay"),
    )  # fmt: skip
