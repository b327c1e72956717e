"""A student that is a LoRA, on the weights of the teacher that it was made of."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from scorefield.denoiser import freeze
from scorefield.files import read_json
from scorefield.models.families import family_of
from scorefield.models.lora import LORA_FILE, stacked
from scorefield.models.lora_keys import read_lora
from scorefield.models.pretrained import INDEX, LORA_FACTS, NUM_FRAMES, STUDENT_TIMES
from scorefield.models.student import Student
from scorefield.models.teacher import Teacher


def is_lora_student(folder: Path) -> bool:
    """Return True for a folder that holds a LoRA which ``scorefield distill --lora`` wrote."""
    return (folder / LORA_FACTS).is_file()


def load_lora_student(folder: Path, teacher: Teacher) -> Teacher:
    """Return the student; it shares the teacher's weights, text encoders and autoencoder.

    Args:
        folder: of a finished distillation with ``--lora``.
        teacher: a text-to-image pipeline, frozen, on its device.

    Raises:
        ValueError: a file that is damaged, a LoRA of another network, times that this teacher does not have, or
            a student of another size.
    """
    if teacher.source is None or not (teacher.source / INDEX).is_file():
        raise ValueError(f"{folder} is a LoRA of a text-to-image pipeline, and --teacher is none.")
    facts = read_json(folder / LORA_FACTS)
    size = facts.get("dmd2_height", teacher.size[0]), facts.get("dmd2_width", teacher.size[1])
    if size != teacher.size:
        raise ValueError(f"{folder} learned pictures of {size[0]} x {size[1]}; pass --size {size[0]}.")
    if (frames := facts.get(NUM_FRAMES, 1)) != teacher.num_frames:
        there, here = str(frames)[:80], teacher.num_frames
        raise ValueError(f"{folder} learned videos of {there} frames, and --teacher draws {here}.")
    family = family_of(read_json(teacher.source / INDEX))
    weights = read_lora(folder / LORA_FILE, family.pipeline, family.part)
    try:
        times = tuple(t / teacher.denoiser.time_scale for t in _numbers(facts.get(STUDENT_TIMES)))
        denoiser = replace(teacher.denoiser, network=stacked(teacher.denoiser.network, [(weights, 1.0)]))
        Student(denoiser, times)
    except (ValueError, StopIteration) as error:
        raise ValueError(f"{folder} is no student of this --teacher: {error}") from error
    freeze(denoiser.network).to(teacher.device)
    return replace(teacher, denoiser=denoiser, times=times)


def _numbers(given: Any) -> list[float]:
    found = given if isinstance(given, list) else []
    if not found or not all(type(t) in (int, float) and math.isfinite(t) for t in found):
        raise ValueError(f"its {LORA_FACTS} gives no timesteps")
    return [float(t) for t in found]
