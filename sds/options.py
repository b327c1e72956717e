"""Options of ``scorefield sds`` and its presets: numbers of papers, which PAPERS.md quotes, and our own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from scorefield.training.options import RunOptions

Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Turn a prompt into a 3D scene by score distillation."""

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "toyworld"
    prompt: Annotated[str, tyro.conf.Positional] = ""
    """What the scene shows, such as "a red mug"."""
    negative: str = ""
    """What guidance moves away from."""
    long_prompts: Literal["stop", "cut"] = "stop"
    """What to do about a prompt that, with its view words, is longer than the text encoders read."""
    teacher: str = "toyworld"
    """Name or folder of a diffusers text-to-image pipeline; "toyworld" is the one that ships with this package."""
    teacher_size: int = 0
    """Height and width of the teacher's images in pixels; 0 is its own."""
    tiny_vae: str = ""
    """Name or folder of an AutoencoderTiny to encode with: less than half of the cost of a step."""
    allow_pickle: bool = False
    """Read weights that are no safetensors. They can run code of whoever made them."""
    variant: str = ""
    """Of the weight files of a diffusers model that has no plain ones, such as fp16."""
    results: ClassVar[tuple[str, ...]] = ("export", "scene.safetensors", "canvas.png")
    free: ClassVar[tuple[str, ...]] = (
        "preset", "long_prompts", "probe_every", "max_rollbacks", "mesh_resolution", "turntable_size",
    )  # fmt: skip

    out: Path = Path("runs/scene")
    """Folder for checkpoints, TensorBoard logs, the scene and its export."""

    # The loss
    method: Literal["sds", "csd", "vsd", "x0"] = "sds"
    """Score distillation sampling, classifier score distillation, variational, or x0-reconstruction."""
    weight: Literal["sigma_squared", "unit", "alpha_sigma_squared", "noise_to_signal"] = "sigma_squared"
    """w(t) of the published residual, for x0-reconstruction of the difference of images."""
    guidance: Pair = (7.5, 7.5)
    """Scale of classifier-free guidance, from the first step to the last; a paper's s of cond + s (cond - uncond)
    is s + 1 here."""
    rescale: float = 0.0
    """How far guided images are brought back to the spread of unguided ones (MVDream: 0.5)."""
    t_low: Pair = (0.02, 0.02)
    """Smallest time, as a share of the schedule, first and last."""
    t_high: Pair = (0.98, 0.98)
    """Largest time, first and last."""
    anneal: Pair = (0.0, 1.0)
    """Shares of the run between which times, guidance and penalties go from first to last; equal: at once."""
    draws: int = 1
    """Noises and times per render, all through one pass of the encoder."""
    phi_lr: float = 1e-4
    """Learning rate of VSD's phi."""
    phi_rank: int = 4
    """Rank of VSD's phi, a LoRA of the teacher."""

    # The scene
    canvas: bool = False
    """Learn images in place of a scene: --batch-size of them, in the teacher's x0."""
    field: Literal["grid", "triplane", "hash", "frequency"] = "grid"
    """What density and colour are stored in; grid is the fastest on a CPU, hash has the finest detail."""
    half_size: float = 0.9
    """Of the cube that holds all matter."""
    blob: Pair = (10.0, 0.5)
    """Strength and radius of the matter that a scene starts with: strength (1 - r / radius), below 0 outside."""
    initial: float = 0.0
    """Raw density of a grid at the start, to which the blob is added; -4 leaves a faint cloud, which is carved
    more easily than a solid."""
    num_samples: int = 48
    """Points on each ray."""
    learning_rate: Pair = (0.05, 0.05)
    """Of the scene, from the first step to the last, linear."""
    background_lr: float = 1e-3
    """Of the scene's own background, a network; only without --backdrops."""
    batch_size: int = 4
    """Views per step and process; particles of a canvas."""

    # What is looked at
    size: Pair = (64, 64)
    """Height of the renders in pixels, before and after --grow-at."""
    grow_at: float = 0.5
    """Share of the run after which renders have their second size."""
    distance: Pair = (1.0, 1.5)
    """Of the cameras from the origin."""
    focal: Pair = (0.7, 1.35)
    """Focal length over the height of the picture; 1.37 is a field of view of 40 degrees."""
    elevation: Pair = (-10.0, 90.0)
    """Of the cameras in degrees."""
    overhead: int = 0
    """How many of the views are from --overhead-elevation instead."""
    overhead_elevation: Pair = (65.0, 90.0)
    """Of these cameras."""
    jitter: float = 1.0
    """Share of DreamFusion's random shifts of camera, target and upward direction."""
    widen: float = 0.0
    """Share of the run in which the views widen from the front to their whole range."""
    quarters: float = 1.0
    """Share of the front, left, back and right quarters that views come from at first, an equal number from each;
    all of it after --quarters-until. Below 1 the view words are clear while the scene finds its front."""
    quarters_until: float = 0.5
    """Share of the run after which views come from everywhere."""
    words: Literal["bins", "interpolated", "none"] = "bins"
    """View words after the prompt: the nearest, a mixture, or none."""
    backdrops: tuple[str, ...] = ()
    """Names of colours that views stand before, also named in the prompt, as in "white grey black". None: a
    network, half of the time replaced by random colours."""
    shading: Literal["albedo", "dreamfusion"] = "albedo"
    """Albedo alone, or after 1,000 steps mixed with lit and textureless views."""

    # What the teacher does not see
    opacity: Pair = (0.0, 0.0)
    """Weight of the opacity penalty, first and last."""
    entropy: Pair = (0.0, 0.0)
    """Weight of the entropy penalty, first and last."""
    orientation: Pair = (0.0, 0.0)
    """Weight of the orientation penalty, first and last; above 0 a step takes two to three times as long."""
    distortion: Pair = (0.0, 0.0)
    """Weight of the distortion penalty, first and last."""

    # The run
    clip_norm: float = 1e9
    """Largest norm of the scene's gradient; Adam does not mind its size."""
    probe_every: int = 100
    """Iterations between figures that mean something (residuals, gradients, balance) and pictures; 0: never."""
    max_rollbacks: int = 4
    """How often a scene that is lost goes back to its last checkpoint, at half of the learning rate."""
    mesh_resolution: int = 128
    """Cubes of the exported mesh along a side."""
    turntable_size: int = 128
    """Height and width of the exported videos."""

    @property
    def may_change(self) -> tuple[str, ...]:
        """The length of the run, and rates that are constant."""
        constant = self.learning_rate[0] == self.learning_rate[1]
        return ("steps", "phi_lr", *(("learning_rate", "background_lr") if constant else ()))


def dreamfusion() -> Config:
    """Poole et al. 2022 (arXiv 2209.14988) on Stable Diffusion, with Adam in place of Shampoo.

    Weights of penalties are threestudio's, whose reductions are ours; the paper's would do nothing here.
    """
    return Config(
        preset="dreamfusion", teacher="stable-diffusion-v1-5/stable-diffusion-v1-5", steps=15_000, batch_size=4,
        guidance=(101.0, 101.0), field="hash", half_size=1.0, num_samples=128, learning_rate=(0.01, 0.01),
        shading="dreamfusion", opacity=(1.0, 1.0), orientation=(10.0, 1000.0), anneal=(0.0, 1 / 3),
        precision="bf16", save_every=500, probe_every=250, mesh_resolution=256, turntable_size=256,
    )  # fmt: skip


def prolificdreamer() -> Config:
    """Wang et al. 2023 (arXiv 2305.16213), its first stage, of one particle."""
    return Config(
        preset="prolificdreamer", teacher="stable-diffusion-v1-5/stable-diffusion-v1-5", steps=25_000,
        batch_size=1, method="vsd", guidance=(7.5, 7.5), t_high=(0.98, 0.5), anneal=(0.2, 0.2), field="hash",
        half_size=1.0, num_samples=96, learning_rate=(0.01, 0.01), phi_lr=1e-4, size=(64, 512), grow_at=0.2,
        entropy=(0.0, 0.0), precision="bf16", save_every=500, probe_every=250, mesh_resolution=256,
        turntable_size=256,
    )  # fmt: skip


def toyworld() -> Config:
    """Minutes on a CPU with the pipeline that ships; LOG.md says what was tried.

    Cameras are where the pipeline's training had them. Guidance is weak and no time small: else what is wrong at
    first only hardens.
    """
    return Config(
        preset="toyworld", steps=400, batch_size=5, draws=2, guidance=(2.0, 1.0), t_low=(0.3, 0.3),
        t_high=(0.95, 0.5), learning_rate=(0.1, 0.003), blob=(3.0, 0.5), initial=-4.0, size=(32, 32),
        distance=(2.7, 3.0), focal=(1.3737387, 1.3737387), elevation=(15.0, 45.0), overhead=1, quarters=0.2,
        jitter=0.0, backdrops=("white", "grey", "black"), entropy=(0.0, 10.0), save_every=100, log_every=10,
    )  # fmt: skip


PRESETS = {"toyworld": toyworld, "dreamfusion": dreamfusion, "prolificdreamer": prolificdreamer}
