"""Where a run shows how it goes: the trackers of --report-to, and pictures in --out/samples."""

import dataclasses
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from scorefield import __version__
from scorefield.atomic import whole_file
from scorefield.training.identity import code_hash, resolved

PROJECT = "scorefield"
"""Project of wandb and trackio; each start of a run is one of its runs, called as the folder is."""

ABOUT = "about.json"
"""In ``--out``: which options were set, and the versions of the last start."""

LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "kornia", "nerfstudio")
"""Packages whose versions are noted."""

SAMPLES = "samples"
"""Folder in ``--out`` of the pictures that are drawn on the way."""


def start_logging(accelerator: Accelerator, config: Any, out: Path, first: int) -> None:
    """Write the resolved config and open the trackers: the first files of a run.

    Raises ``ValueError`` for a tracker that cannot be started, TensorBoard's log apart.
    """
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        with whole_file(out / "config.json") as temporary:
            temporary.write_text(json.dumps(resolved(config), indent=2))
        with whole_file(out / ABOUT) as temporary:
            temporary.write_text(json.dumps({"set": differing(config), "versions": versions()}, indent=2))
    open_log(accelerator, first, out, resolved(config))


def differing(config: Any) -> list[str]:
    """Return the names of options that differ from the defaults of their class, or have none."""
    found = []
    for option in dataclasses.fields(config):
        default = option.default_factory() if callable(option.default_factory) else option.default
        if getattr(config, option.name) != default:
            found.append(option.name)
    return found


def versions() -> dict[str, str]:
    """Return what a run computes with: versions by name, the code's own hash, and the device."""
    found = {"scorefield": __version__, "code": code_hash(), "python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return found


def open_log(
    accelerator: Accelerator, first: int, out: Path | None = None, config: Mapping[str, Any] | None = None
) -> None:
    """Open the trackers of a run in ``out``, or of the whole one.

    What an earlier run logged to TensorBoard beyond step ``first`` is drawn again.
    """
    out = Path(accelerator.project_dir) if out is None else out
    kinds = [str(kind) for kind in accelerator.log_with]
    accelerator.trackers = [
        tracker for kind in kinds for tracker in _opened(accelerator, kind, first, out, dict(config or {}))
    ]


def _opened(accelerator: Accelerator, kind: str, first: int, out: Path, config: dict[str, Any]) -> list[Any]:
    # Accelerate opens all trackers under one name: for TensorBoard a folder, for others a project.
    open_before, wanted = accelerator.trackers, accelerator.log_with
    accelerator.trackers, accelerator.log_with = [], [LoggerType(kind)]
    try:
        if kind == "tensorboard":
            # Each stage of a run has a log of its own, since a new one hides the later steps of an old one.
            place = str(Path(os.path.relpath(out, accelerator.project_dir)) / "logs")
            accelerator.init_trackers(place, init_kwargs={kind: {"purge_step": first + 1}})
        else:
            accelerator.init_trackers(PROJECT, config, {kind: {"name": "/".join(out.absolute().parts[-2:])}})
        return list(accelerator.trackers)
    except OSError as error:
        _say(f"no log of {kind}, the run goes on without: {error}")
        return []
    except Exception as error:  # of any kind: a service's own
        raise ValueError(
            f"--report-to {kind} could not be started: {error}. Log in first, or leave it out."
        ) from error
    finally:
        accelerator.trackers, accelerator.log_with = open_before, wanted


def log(accelerator: Accelerator, step: int, scalars: Mapping[str, float], images: Tensor | None = None) -> None:
    """Write scalars, and images (n, c, h, w) in [0, 1] as "samples" and into ``--out/samples``.

    Curves are worth less than the run: if TensorBoard's log is gone, since someone deleted its folder, another is
    opened; any other tracker that fails is done without from then on.
    """
    if not accelerator.is_main_process:
        return
    for tracker in list(accelerator.trackers):
        try:
            _write(tracker, step, scalars, images)
        except OSError as error:
            _say(f"the log of {tracker.name} is lost at step {step}, the run goes on: {error}")
            again = _again(accelerator, tracker, step)
            accelerator.trackers = [t for t in accelerator.trackers if t is not tracker] + again
        except Exception as error:
            if tracker.name == "tensorboard":
                raise
            _say(f"{tracker.name} failed at step {step}, the run goes on without: {error}")
            accelerator.trackers = [t for t in accelerator.trackers if t is not tracker]
    if images is not None and accelerator.project_dir:
        save_samples(images, Path(accelerator.project_dir), step)


def _write(tracker: Any, step: int, scalars: Mapping[str, float], images: Tensor | None) -> None:
    if scalars:
        tracker.log(dict(scalars), step=step)
    if images is None:
        return
    if tracker.name == "tensorboard":
        tracker.log_images({"samples": images.cpu().numpy()}, step=step, dataformats="NCHW")
    elif hasattr(tracker, "log_images"):  # trackio's has none
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        tracker.log_images({"samples": list(pixels)}, step=step)


def _again(accelerator: Accelerator, tracker: Any, step: int) -> list[Any]:
    if tracker.name != "tensorboard":
        return []
    return _opened(accelerator, tracker.name, step, Path(tracker.logging_dir).parent, {})


def save_samples(images: Tensor, out: Path, step: int) -> None:
    """Write images (n, c, h, w) in [0, 1] as ``out/samples/step-....png``; a full disk costs the picture alone."""
    try:
        with whole_file(_picture(out, step)) as temporary:
            save_image(images, temporary, format="png")
    except OSError as error:
        _say(f"no picture of step {step}, the run goes on: {error}")


def has_samples(out: Path, step: int) -> bool:
    """Return True where :func:`save_samples` has written the picture of a step."""
    return _picture(out, step).exists()


def _picture(out: Path, step: int) -> Path:
    return out / SAMPLES / f"step-{step:09d}.png"


def forget_samples(out: Path) -> None:
    """Remove the pictures of an earlier run in the same folder; what is called otherwise stays."""
    for path in (out / SAMPLES).glob("step-*.png"):
        if re.fullmatch(r"step-\d{9}\.png", path.name):
            path.unlink()


def close_log(accelerator: Accelerator) -> None:
    """Write what trackers have not written yet; what is logged from here on belongs to no log."""
    for tracker in accelerator.trackers:
        with suppress(OSError):
            tracker.finish()
    accelerator.trackers = []


STRIP = 8
"""Frames of a video that a picture shows at most."""


def as_grid(images: Tensor, columns: int) -> Tensor:
    """Return images in [-1, 1] as one picture (1, c, h, w) in [0, 1]; each video is a row of its frames."""
    shown, columns = as_rows(images, columns)
    return make_grid((shown.clamp(-1, 1) + 1) / 2, nrow=columns, padding=1, pad_value=0.5)[None]


def as_rows(images: Tensor, columns: int) -> tuple[Tensor, int]:
    """Return what a grid shows, and in how many columns: images, or the frames of :func:`strips` of videos."""
    if images.ndim != 5:
        return images, columns
    shown = strips(images).transpose(1, 2)
    return shown.flatten(0, 1), shown.shape[1]


def strips(images: Tensor) -> Tensor:
    """Return images as they are, and of videos (n, c, frames, h, w) :data:`STRIP` frames at most.

    They are evenly spaced, the first and the last among them.
    """
    if images.ndim != 5:
        return images
    return images[:, :, torch.linspace(0, images.shape[2] - 1, min(STRIP, images.shape[2])).round().long()]


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
