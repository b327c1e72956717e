"""Which options of ``scorefield sds`` cannot work: said before anything is loaded or written."""

import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from scorefield.training.options import check_numbers, check_run
from sds.export import Export
from sds.extra import check_extra
from sds.options import Config
from sds.parts import cameras_at, colour_of
from sds.video import check_encoder
from sds.views import check_nerfstudio


def check_scene(config: Config) -> None:
    """Raise ``ValueError`` for options that are out of range, contradict each other, or lack a library."""
    _check_unread(config)
    check_run(config)
    if not config.prompt.strip():
        raise ValueError(
            'the prompt is missing; say what the scene should show: scorefield sds toyworld "a red mug".'
        )
    if os.path.isfile(config.prompt):
        raise ValueError(f"the prompt {config.prompt} is a file; a scene takes words. Pass what is written in it.")
    _check_ranges(config)
    if config.method == "csd" and config.rescale:
        raise ValueError(
            f"--rescale {config.rescale} is not for --method csd, which guides no image. Leave it out."
        )
    if config.canvas:
        return
    _check_views(config)
    for name in config.backdrops:
        colour_of(name)
    check_extra("skimage", "trimesh", "imageio_ffmpeg")
    with TemporaryDirectory() as folder:
        check_encoder(Path(folder))
    export_choices(config)


def export_choices(config: Config) -> Export:
    """How finely, and from how high, the scene is exported."""
    return Export(
        resolution=config.mesh_resolution, size=config.turntable_size, elevation=sum(config.elevation) / 2
    )


def _check_unread(config: Config) -> None:
    """Options of all trainings that scenes have no use for."""
    for name in ("compile", "gradient_checkpointing"):
        if getattr(config, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for networks that are trained, not scenes. Leave it out."
            )
    if config.optimizer != "adamw":
        raise ValueError(f"--optimizer {config.optimizer} is not for scenes, which learn by Adam. Leave it out.")


def _check_ranges(config: Config) -> None:
    check_numbers(
        config, positive=("draws", "num_samples", "half_size", "mesh_resolution", "turntable_size", "phi_rank"),
        not_negative=("rescale", "overhead", "jitter", "probe_every", "max_rollbacks", "teacher_size"),
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
            raise ValueError(f"{_flag(name)} must be two numbers of at least 0; got {getattr(config, name)}.")
    for name in ("quarters", "quarters_until", "grow_at", "widen"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{_flag(name)} must lie in [0, 1]; got {getattr(config, name)}.")
    for name in ("t_low", "t_high", "anneal"):
        if not all(0 <= value <= 1 for value in getattr(config, name)):
            raise ValueError(f"{_flag(name)} must be two shares in [0, 1]; got {getattr(config, name)}.")
    if config.anneal[0] > config.anneal[1] or any(a > b for a, b in zip(config.t_low, config.t_high, strict=True)):
        raise ValueError(
            f"--anneal must rise, and --t-low lie below --t-high; got {config.anneal}, {config.t_low} and "
            f"{config.t_high}."
        )
    if min(config.size) < 8 or any(value != round(value) for value in config.size):
        raise ValueError(f"--size must be two whole numbers of at least 8; got {config.size}.")
    if not config.learning_rate[0] > 0:
        raise ValueError(f"--learning-rate must begin above 0; got {config.learning_rate}.")
    if not config.blob[1] > 0:
        raise ValueError(f"--blob needs a radius above 0; got {config.blob}. --blob 0 0.5 is no blob.")


def _check_views(config: Config) -> None:
    if config.overhead >= config.batch_size:
        raise ValueError(f"--overhead {config.overhead} must be below --batch-size {config.batch_size}.")
    if config.quarters < 1 and ((config.batch_size - config.overhead) % 4 or config.widen):
        raise ValueError(
            "--quarters below 1 need --batch-size less --overhead to be a multiple of 4, and no --widen; got "
            f"{config.batch_size}, {config.overhead} and {config.widen}."
        )
    try:
        check_nerfstudio()
    except ImportError as error:
        raise ValueError(str(error)) from error
    cameras_at(config, 0)  # which refuses what cameras cannot be


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
