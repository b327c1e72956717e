"""Options of ``scorefield sds`` and its presets. PAPERS.md quotes the numbers that come from papers."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scorefield.choices import OnBadData, Quantize
from scorefield.training.options import (
    LoadOptions,
    RunOptions,
    check_init_from,
    check_numbers,
    check_quantize,
    check_run,
)
from sds.export_options import check_mesh

Pair = tuple[float, float]


def ramp(text: str) -> Pair:
    """Return the first and the last value that FIRST:LAST names; one number is both.

    >>> ramp("50:20"), ramp("3")
    ((50.0, 20.0), (3.0, 3.0))
    """
    first, _, last = text.partition(":")
    try:
        return float(first), float(last or first)
    except ValueError:
        raise ValueError(f"expected a number, or FIRST:LAST such as 50:20; got {text!r}") from None


def shown(value: Pair) -> str:
    """Return the text that :func:`ramp` reads."""
    return f"{value[0]:g}" if value[0] == value[1] else f"{value[0]:g}:{value[1]:g}"


Ramp = Annotated[
    Pair,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="FIRST[:LAST]", instance_from_str=lambda words: ramp(words[0]),
        is_instance=lambda value: isinstance(value, tuple) and len(value) == 2,
        str_from_instance=lambda value: [shown(value)],
    ),
]  # fmt: skip
"""A value at the start of the run, and at its end."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The score distillation loss: weights, timesteps and noise."""

    weight: Literal["sigma_squared", "unit", "alpha_sigma_squared", "noise_to_signal"] = "sigma_squared"
    """Weight w(t) of the residual. For x0-reconstruction and SDI it weighs the difference of images."""
    rescale: float = 0.0
    """How far guided images are rescaled to the spread of unguided ones: 0 not at all, 1 fully (MVDream: 0.5)."""
    t_low: Ramp = (0.02, 0.02)
    """Smallest timestep, as a share of the schedule."""
    t_high: Ramp = (0.98, 0.98)
    """Largest timestep, as a share of the schedule."""
    anneal: Pair = (0.0, 1.0)
    """The part of the run, as two shares, over which timesteps, guidance and penalties move from their first value
    to their last. Two equal shares mean a jump."""
    draws: int = 1
    """Noises and timesteps per render. They share one pass of the encoder."""
    phi_lr: float = 1e-4
    """VSD: learning rate of phi, the LoRA that follows the scene's renders."""
    phi_rank: int = 4
    """VSD: rank of phi."""
    interval: float = 0.05
    """ISM: the interval between its two timesteps, as a share of the schedule."""
    inversion_stride: float = 0.1
    """ISM and SDI: longest step of the DDIM inversion of a render, as a share of the schedule."""
    inversion_guidance: float = -7.5
    """SDI: guidance scale of the inversion. Below 0 it leads away from the prompt."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The scene: what it is stored in, how it starts and learns."""

    canvas: bool = False
    """Learn --batch-size images instead of a scene, to see what a loss does."""
    field: Literal["grid", "triplane", "hash", "frequency"] = "grid"
    """Storage of density and colour. grid is the fastest on a CPU; hash has the finest detail."""
    half_size: float = 0.9
    """Half of the side of the cube that holds the scene."""
    blob: Pair = (10.0, 0.5)
    """Strength and radius of the blob that the scene starts with. Its raw density is strength (1 - r / radius)."""
    initial: float = 0.0
    """Raw density that is added everywhere in a grid at the start. -4 leaves a faint cloud, which is easier to
    carve than a solid."""
    num_samples: int = 48
    """Points per ray."""
    learning_rate: Ramp = (0.05, 0.05)
    """Learning rate of the scene."""
    background_lr: float = 1e-3
    """Learning rate of the scene's background network. Only without --backdrops."""


@dataclass(frozen=True, kw_only=True)
class Starts:
    """How a run starts, and which of several starts goes on."""

    seeds: int = 1
    """Number of short starts, with the seeds --seed, --seed + 1, and so on. The one with the smallest residual at
    a high noise level goes on to the end."""
    start_steps: int = 100
    """Steps of each start. Only with --seeds above 1."""
    init_from: str = ""
    """Folder of a finished run whose scene this run starts from, with another prompt, teacher or loss. Both need
    the same --field, --half-size, --blob and kind of background."""


@dataclass(frozen=True, kw_only=True)
class Cameras:
    """Cameras, and what is behind and around the scene."""

    render_size: Ramp = (64, 64)
    """Height and width of the renders in pixels, before and after --grow-at."""
    grow_at: float = 0.5
    """Share of the run after which renders have their second size."""
    distance: Pair = (1.0, 1.5)
    """Smallest and largest distance of a camera from the origin."""
    focal: Pair = (0.7, 1.35)
    """Smallest and largest focal length, in image heights. 1.37 is a field of view of 40 degrees."""
    elevation: Pair = (-10.0, 90.0)
    """Lowest and highest elevation of a camera, in degrees."""
    overhead: int = 0
    """How many of the views take --overhead-elevation instead."""
    overhead_elevation: Pair = (65.0, 90.0)
    """Lowest and highest elevation of these views, in degrees."""
    jitter: float = 1.0
    """Share of DreamFusion's random shifts of camera, target and up direction."""
    widen: float = 0.0
    """Share of the run over which the views widen from the front to the whole circle."""
    quarters: float = 1.0
    """How much of each quarter of the circle (front, left, back, right) views come from at first, equally many
    from each. Below 1 the view words are unambiguous while the scene finds its front."""
    quarters_until: float = 0.5
    """Share of the run after which views come from the whole circle."""
    words: Literal["bins", "interpolated", "none"] = "bins"
    """View words after the prompt, such as "front view": the nearest, a mixture of two, or none."""
    backdrops: tuple[str, ...] = ()
    """Colours to put behind the views and to name in the prompt, as in: white grey black. By default a learned
    background, which random colours replace half of the time."""
    shading: Literal["albedo", "dreamfusion"] = "albedo"
    """albedo: plain colours. dreamfusion: after 1,000 steps mixed with lit and with textureless views."""


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Weights of penalties on the scene. 0 means none."""

    opacity: Ramp = (0.0, 0.0)
    """Opacity, which keeps the scene from filling all space."""
    entropy: Ramp = (0.0, 0.0)
    """Entropy of opacity, which makes it 0 or 1."""
    orientation: Ramp = (0.0, 0.0)
    """Normals that face away from the camera. A step then takes two to three times as long."""
    distortion: Ramp = (0.0, 0.0)
    """Matter that is spread out along a ray (mip-NeRF 360)."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Figures while training, what happens to a lost scene, and the export."""

    free: ClassVar[tuple[str, ...]] = (
        "probe_every", "max_rollbacks", "mesh_resolution", "turntable_size", "faces", "texture",
    )  # fmt: skip

    probe_every: int = 100
    """Iterations between two measurements (residuals, gradients, balance of views) with pictures. 0 means
    never."""
    max_rollbacks: int = 4
    """How often a scene that is lost may go back to its last checkpoint, at half of the learning rate."""
    mesh_resolution: int = 128
    """Cells of the exported mesh along a side."""
    turntable_size: int = 128
    """Height and width of the exported videos, in pixels."""
    faces: int = 5000
    """Triangles of the exported mesh, at most. 0 keeps all."""
    texture: int = 512
    """Height and width of the mesh's texture in texels. 0: colours of the vertices instead."""


@dataclass(frozen=True, kw_only=True)
class Config(Loss, Scene, Starts, Cameras, Penalties, Watch, LoadOptions, RunOptions):
    """Turn a prompt into a 3D scene by score distillation.

    FIRST:LAST is a value at the start of the run and at its end; between them it moves in a straight line.
    """

    results: ClassVar[tuple[str, ...]] = ("export", "scene.safetensors", "canvas.png", "starts.json")
    free: ClassVar[tuple[str, ...]] = ("preset", "long_prompts", "on_bad_data")

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "toyworld"
    prompt: Annotated[str, tyro.conf.Positional] = ""
    """What the scene shows, such as "a red mug"."""
    prompts: str = ""
    """File of prompts, one a line, or a table with a column named prompt (jsonl, csv, parquet). Each becomes a run
    of its own in --out, in a folder called after prompt and seed; all share the teacher."""
    on_bad_data: OnBadData = "stop"
    """What to do about rows of --prompts that cannot be used: stop, or skip them."""
    teacher: str = "toyworld"
    """The frozen model: name or folder of a diffusers text-to-image pipeline, or toyworld, the one that ships."""
    method: Literal["sds", "csd", "vsd", "x0", "ism", "sdi"] = "sds"
    """Score distillation sampling, classifier score distillation, variational score distillation,
    x0-reconstruction, interval score matching, or score distillation via inversion."""
    guidance: Ramp = (7.5, 7.5)
    """Scale of classifier-free guidance. Papers that write cond + s (cond - uncond) call s what is s + 1 here."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    long_prompts: Literal["stop", "cut"] = "stop"
    """What to do about a prompt that, with its view words, is longer than the text encoders read."""
    size: int = 0
    """Height and width of the teacher's images in pixels. 0 means the teacher's own."""
    quantize: Quantize = "no"
    """Round the teacher's weights, for memory, to 4 bits (nf4, needs bitsandbytes) or to 8 (int8, needs
    torchao)."""
    tiny_vae: str = ""
    """Name or folder of an AutoencoderTiny to encode renders with, at less than half of a step's cost."""

    out: Path = Path("runs/scene")
    """Folder for checkpoints, logs, samples, the scene and its export."""
    batch_size: int = 4
    """Views per step and process. With --canvas: images."""
    split_views: bool = False
    """Share the --accumulate batches of views of a step among all processes, which then take the step that one
    process would take. By default each process adds as many."""
    clip_norm: float = 1e9
    """Largest norm of the scene's gradient. A larger gradient is scaled down to it."""

    @property
    def may_change(self) -> tuple[str, ...]:
        """Options that may change on resume: the length of the run, and learning rates that are constant."""
        constant = self.learning_rate[0] == self.learning_rate[1]
        return ("steps", "phi_lr", *(("learning_rate", "background_lr") if constant else ()))


def dreamfusion() -> Config:
    """Return DreamFusion (Poole et al. 2022, arXiv 2209.14988) on Stable Diffusion, with Adam instead of Shampoo.

    The weights of the penalties are threestudio's, whose reductions are ours; the paper's would have no effect
    here.
    """
    return Config(
        preset="dreamfusion", teacher="stable-diffusion-v1-5/stable-diffusion-v1-5", steps=15_000, batch_size=4,
        guidance=(101.0, 101.0), field="hash", half_size=1.0, num_samples=128, learning_rate=(0.01, 0.01),
        shading="dreamfusion", opacity=(1.0, 1.0), orientation=(10.0, 1000.0), anneal=(0.0, 1 / 3),
        precision="bf16", save_every=500, probe_every=250, mesh_resolution=256, turntable_size=256,
        start_steps=1000,
    )  # fmt: skip


def prolificdreamer() -> Config:
    """Return the first stage of ProlificDreamer (Wang et al. 2023, arXiv 2305.16213), with one particle."""
    return Config(
        preset="prolificdreamer", teacher="stable-diffusion-v1-5/stable-diffusion-v1-5", steps=25_000,
        batch_size=1, method="vsd", guidance=(7.5, 7.5), t_high=(0.98, 0.5), anneal=(0.2, 0.2), field="hash",
        half_size=1.0, num_samples=96, learning_rate=(0.01, 0.01), phi_lr=1e-4, render_size=(64, 512), grow_at=0.2,
        entropy=(0.0, 0.0), precision="bf16", save_every=500, probe_every=250, mesh_resolution=256,
        turntable_size=256, start_steps=1000,
    )  # fmt: skip


def toyworld() -> Config:
    """Return a preset that takes minutes on a CPU with the shipped pipeline; LOG.md says what was tried.

    Cameras are distributed as in the pipeline's training data. Guidance is weak and
    there are no small times: strong guidance and small times would only harden early errors.
    """
    return Config(
        preset="toyworld", steps=400, batch_size=5, draws=2, guidance=(2.0, 1.0), t_low=(0.3, 0.3),
        t_high=(0.95, 0.5), learning_rate=(0.1, 0.003), blob=(3.0, 0.5), initial=-4.0, render_size=(32, 32),
        distance=(2.7, 3.0), focal=(1.3737387, 1.3737387), elevation=(15.0, 45.0), overhead=1, quarters=0.2,
        jitter=0.0, backdrops=("white", "grey", "black"), entropy=(0.0, 10.0), save_every=100, log_every=10,
    )  # fmt: skip


LARGEST = {
    "learning_rate": 10.0, "guidance": 1e4, "opacity": 1e6, "entropy": 1e6, "orientation": 1e6, "distortion": 1e6,
    "distance": 1e3, "focal": 1e3,
}  # fmt: skip
"""Largest value of options without a natural bound. Papers use guidance of 101, and weights of 1,000."""

PRESETS = {"toyworld": toyworld, "dreamfusion": dreamfusion, "prolificdreamer": prolificdreamer}


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range or contradict each other."""
    _check_unread(config)
    check_run(config)
    _check_prompt(config)
    _check_ranges(config)
    _check_start(config)
    check_quantize(config.quantize)
    if config.shard > 1:
        raise ValueError(f"--shard {config.shard} is for networks that are trained, not scenes. Leave it out.")
    _check_split(config)
    if config.method == "csd" and config.rescale:
        raise ValueError(
            f"--rescale {config.rescale} is not for --method csd, in which no image is guided. Leave it out."
        )
    if not config.canvas:
        check_mesh(None, config.faces, config.texture, "--")
        _check_views(config)


def _check_split(config: Config) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.split_views and config.accumulate % ranks:
        raise ValueError(
            f"--split-views shares --accumulate {config.accumulate} batches of views equally among {ranks} "
            f"processes. Pass a multiple of {ranks} to --accumulate, and a smaller --batch-size if you like."
        )


def _check_prompt(config: Config) -> None:
    if config.prompts:
        if config.prompt.strip():
            raise ValueError(
                f"a run has one prompt, and --prompts {config.prompts} many; got {config.prompt[:80]!r}, too. "
                "Leave one of them out."
            )
        return
    if not config.prompt.strip():
        raise ValueError(
            'the prompt is missing; say what the scene should show: scorefield sds toyworld "a red mug".'
        )
    if os.path.isfile(config.prompt):
        raise ValueError(
            f"the prompt {config.prompt} is a file; a scene takes words. Pass what is written in it, or --prompts "
            f"{config.prompt} for a scene of each line."
        )


def _check_start(config: Config) -> None:
    check_init_from(config.init_from, config.out)
    if config.init_from and config.canvas:
        raise ValueError(
            f"--init-from {config.init_from} is for scenes; --canvas starts from noise. Leave one out."
        )
    if config.seeds > 1 and config.start_steps >= config.steps:
        raise ValueError(
            f"--start-steps must be below --steps {config.steps}; got {config.start_steps}. The best of --seeds "
            f"{config.seeds} starts goes on from there."
        )
    if config.seed + config.seeds > 2**63:
        raise ValueError(f"--seed {config.seed} leaves no room for --seeds {config.seeds}. Pass a smaller --seed.")


def _check_unread(config: Config) -> None:
    """Raise ``ValueError`` for options of all trainings that scenes do not use."""
    for name in ("compile", "gradient_checkpointing"):
        if getattr(config, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for networks that are trained, not scenes. Leave it out."
            )
    if config.optimizer != "adamw":
        raise ValueError(f"--optimizer {config.optimizer} is not for scenes, which learn by Adam. Leave it out.")


def _check_ranges(config: Config) -> None:
    check_numbers(
        config, positive=("draws", "num_samples", "half_size", "mesh_resolution", "turntable_size", "phi_rank",
                          "seeds", "start_steps"),
        not_negative=("rescale", "overhead", "jitter", "probe_every", "max_rollbacks", "size"),
        rates=("background_lr", "phi_lr"),
    )  # fmt: skip
    for name, value in vars(config).items():
        if any(
            isinstance(part, float) and not math.isfinite(part)
            for part in (value if isinstance(value, tuple) else ())
        ):
            raise ValueError(f"{_flag(name)} must be finite numbers; got {value}.")
    for name in ("guidance", "opacity", "entropy", "orientation", "distortion", "learning_rate"):
        if min(getattr(config, name)) < 0:
            raise ValueError(f"{_flag(name)} must be at least 0; got {shown(getattr(config, name))}.")
    for name, most in LARGEST.items():
        if max(value := getattr(config, name)) > most:
            raise ValueError(
                f"{_flag(name)} must be at most {most:,.0f}; got {shown(value)}. Pass a smaller value."
            )
    for name in ("quarters", "quarters_until", "grow_at", "widen"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{_flag(name)} must lie in [0, 1]; got {getattr(config, name)}.")
    if not 0 < config.interval < 1:
        raise ValueError(f"--interval must lie in (0, 1); got {config.interval}.")
    if not 0 < config.inversion_stride <= 1:
        raise ValueError(f"--inversion-stride must lie in (0, 1]; got {config.inversion_stride}.")
    for name in ("t_low", "t_high", "anneal"):
        if not all(0 <= value <= 1 for value in getattr(config, name)):
            raise ValueError(f"{_flag(name)} must lie in [0, 1]; got {shown(getattr(config, name))}.")
    if config.anneal[0] > config.anneal[1] or any(a > b for a, b in zip(config.t_low, config.t_high, strict=True)):
        raise ValueError(
            f"--anneal must rise, and --t-low must not exceed --t-high; got {config.anneal}, "
            f"{shown(config.t_low)} and {shown(config.t_high)}."
        )
    if min(config.render_size) < 8 or any(value != round(value) for value in config.render_size):
        raise ValueError(f"--render-size must be whole numbers of at least 8; got {shown(config.render_size)}.")
    if not config.learning_rate[0] > 0:
        raise ValueError(f"--learning-rate must begin above 0; got {shown(config.learning_rate)}.")
    if not config.blob[1] > 0:
        raise ValueError(f"--blob needs a radius above 0; got {config.blob}. --blob 0 0.5 is no blob.")


def _check_views(config: Config) -> None:
    if config.overhead >= config.batch_size:
        raise ValueError(f"--overhead {config.overhead} must be below --batch-size {config.batch_size}.")
    if config.quarters < 1 and ((config.batch_size - config.overhead) % 4 or config.widen):
        raise ValueError(
            "--quarters below 1 needs --batch-size minus --overhead to be a multiple of 4, and --widen 0; got "
            f"{config.batch_size}, {config.overhead} and {config.widen}."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
