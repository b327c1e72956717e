"""What a distillation leaves beside its student: report.json, and its pictures below the teacher's."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from distill.guard import Guard
from distill.guarding import Guarded
from distill.options import Config
from distill.student import Student
from scorefield.atomic import whole_file
from scorefield.models.teacher import Teacher
from scorefield.progress import working
from scorefield.training.report import as_grid, strips
from scorefield.training.run import in_pieces

REPORT, PICTURE = "report.json", "beside_teacher.png"

MOST_VIDEOS = 4
"""Videos that the picture shows of each; images are as many as ``Guard.beside`` gives."""


def outcome(config: Config, student: Student, guarded: Guarded | None) -> dict[str, Any]:
    """Return the figures of a finished run: what its guard saw of the weights that are kept, and a scale for it.

    Every rank calls it: where networks are in pieces, the teacher's features need all of them.
    """
    report: dict[str, Any] = {"steps": config.steps, "num_steps": student.num_steps}
    best = None if guarded is None else guarded.best
    if guarded is None or best is None:
        return report
    step, look = best
    report |= {
        "step": step, "distance": look.distance, "kernel": look.kernel, "error": look.error,
        "brightness": look.brightness, "num_images": len(guarded.guard.pairs.x0), "setbacks": guarded.setbacks,
        "ended_early": guarded.ended,
    }  # fmt: skip
    if guarded.accelerator.is_main_process or in_pieces(guarded.phases):
        with working("the guard's scale"), guarded.accelerator.autocast():
            report["distance_of_halves"] = guarded.guard.distance_of_halves()
    return report


def write_outcome(report: dict[str, Any], out: Path) -> None:
    """Write the figures; on the first rank."""
    with whole_file(out / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


@torch.no_grad()
def draw_beside(guard: Guard, student: Student, teacher: Teacher, out: Path) -> None:
    """Draw a row of the teacher's pictures, and one of the student's of the same noise; a full disk costs them.

    Videos are rows of frames, each of the student's below the teacher's.
    """

    def decoded(images: Tensor) -> Tensor:
        # One by one: a large autoencoder needs gigabytes for each.
        return torch.cat([strips(teacher.decode(one.to(teacher.device))).float().cpu() for one in images.split(1)])

    with working("teacher beside student"):
        number = MOST_VIDEOS if teacher.num_frames > 1 else None
        made = torch.stack([decoded(images[:number]) for images in guard.beside(student)])
        both = made.transpose(0, 1).flatten(0, 1) if made.ndim == 6 else made.flatten(0, 1)
    try:
        with whole_file(out / PICTURE) as temporary:
            save_image(as_grid(both, made.shape[1]), temporary, format="png")
    except OSError as error:
        tqdm.write(f"no {PICTURE}, the run goes on: {error}", file=sys.stderr)
