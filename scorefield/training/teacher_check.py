"""The check of a teacher that runs before it is distilled: a table, what is wrong, and a picture."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor
from torchvision.utils import save_image

from scorefield import Cond
from scorefield.diagnosis.check import Diagnosis, diagnose
from scorefield.models.teacher import Teacher
from scorefield.progress import working
from scorefield.training.launcher import is_first_rank
from scorefield.training.report import as_grid, strips

PICTURE = "teacher_check.png"
COLUMNS = 8


def num_checked(shape: Sequence[int]) -> int:
    """Return how many images a teacher is asked about: 64, fewer where they are large, at least 8."""
    return max(8, min(64, 2**20 // torch.Size(shape).numel()))


def check_teacher(
    teacher: Teacher, x0: Tensor | None, labels: Tensor, *, null: Cond | None = None, bounded: bool = True,
    batch_size: int = 64,
) -> Diagnosis:  # fmt: skip
    """Print what is wrong with a teacher, and refuse one that cannot be distilled.

    Args:
        teacher: of classes or of prompts, frozen, on its device.
        x0: (n, c, h, w) data in [-1, 1], or latents of a latent teacher; None asks it about its own samples.
        labels: (n,) the numbers of their classes or prompts; without ``x0`` those to draw, ``num_checked`` many.
        null: the condition without class or prompt, batch 1, where guidance needs it.
        bounded: x0 are pictures; False for latents.
        batch_size: images in a call of the network.

    Raises:
        ValueError: an error among the findings, with what was found, expected, and what to do.
    """
    device = teacher.device
    generator = Generator().manual_seed(0)
    noise = torch.randn(len(labels), *teacher.shape, generator=generator).to(device)
    start = time.perf_counter()
    with working("teacher check"):
        found = diagnose(
            teacher.denoiser, None if x0 is None else x0.to(device), teacher.cond(labels.to(device)), null=null,
            noise=noise, generator=generator, batch_size=batch_size, bounded=bounded,
        )  # fmt: skip
    speaks = is_first_rank()
    if speaks:
        print(describe(found, time.perf_counter() - start))
    for finding in found.findings:
        if finding.severity == "warning" and speaks:
            print(finding, file=sys.stderr)
    if found.errors:
        said = " ".join(f"{finding.name}: {finding.message}" for finding in found.errors)
        raise ValueError(f"the teacher check stopped the run: {said} Or train anyway with --skip-teacher-check.")
    return found


def describe(found: Diagnosis, seconds: float) -> str:
    """Return the table of a diagnosis, and how its images and samples look."""
    on = "its own samples, which show fewer mistakes than data" if found.own else "data"
    number = 0 if found.images is None else len(found.images)
    lines = [f"teacher check on {number} images ({on}): {found.calls} calls, {seconds:.1f} s"]
    if found.rows:
        lines.append("  noise/data        t   teacher  constant    linear      blur   x0: mean   std  range")
    for row in found.rows:
        lines.append(
            f"  {row.ratio:10.3g} {row.t:8.4g} {row.teacher:9.3g} {row.constant:9.3g} {row.linear:9.3g} "
            f"{row.blurred:9.3g} {row.mean:10.2f} {row.std:5.2f}  {row.low:.2f} to {row.high:.2f}"
        )
    looked = {} if found.images is None else {"images": found.images}
    looked |= {f"{steps} steps": images for steps, images in sorted(found.samples.items())}
    for name, images in looked.items():
        low, high = float(images.min()), float(images.max())
        lines.append(f"  {name}: mean {images.mean():.2f}, std {images.std():.2f}, {low:.2f} to {high:.2f}")
    return "\n".join(lines)


@torch.no_grad()
def draw_check(teacher: Teacher, found: Diagnosis, path: Path) -> None:
    """Rows of images that were asked about, then samples of 1, 2 and 4 steps (16 without data), as a PNG file."""
    rows = [] if found.images is None or found.own else [found.images[:COLUMNS]]
    rows += [images[:COLUMNS] for _, images in sorted(found.samples.items())]
    # One by one: a large autoencoder needs gigabytes for each.
    decoded = [torch.cat([strips(teacher.decode(one)).float().cpu() for one in row.split(1)]) for row in rows]
    save_image(as_grid(torch.cat(decoded).nan_to_num(), len(rows[0])), path)
