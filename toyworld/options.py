"""Options of the commands about the toy world and the digits."""

from dataclasses import dataclass
from pathlib import Path

from scorefield.training.launcher import default_device


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Distil a teacher of handwritten digits to one step, on the CPU, and measure it."""

    out: Path = Path("runs/demo")
    """Folder for the report, the pictures and both trainings."""
    seed: int = 0
    """Of both trainings and of the judge."""
    long: bool = False
    """Train teacher and student twice as long."""
    teacher_steps: int = 3000
    """Optimiser steps of the teacher, before --long."""
    student_iterations: int = 2000
    """Iterations of the distillation, before --long."""
    sampling_steps: int = 50
    """DDIM steps of the teacher's samples."""
    num_images: int = 5000
    """Generated images per figure, with the label frequencies of the 597 held-out ones."""
    dry_run: bool = False
    """Print the resolved configs of both trainings, and stop."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePipeline:
    """Measure the toy world's pipeline against renders it has not seen."""

    teacher: str = "runs/toyworld/pipeline"
    """Folder of diffusers, or toyworld, the pipeline that ships."""
    allow_pickle: bool = False
    """Read pickled weights where there are no safetensors. Only if you trust where they come from."""
    variant: str = ""
    """Of the weight files, if there are no plain ones, such as fp16."""
    out: Path = Path("runs/toyworld/figures")
    """Folder for figures.json and the contact sheet."""
    num_prompts: int = 500
    """Captions of scenes that nothing was trained on. To choose among pipelines, or the guidance, use another
    --seed than the one that is reported."""
    num_renders: int = 2000
    """Renders to compare with; twice as many are made, for the floor."""
    guidance: float = 3.0
    """Scale of classifier-free guidance; 1 means none."""
    steps: int = 50
    """DDIM steps."""
    batch_size: int = 50
    """Pictures at a time."""
    seed: int = 0
    """Of prompts and noise."""
    device: str = default_device()
    """Where to draw."""


@dataclass(frozen=True, kw_only=True)
class EvaluateStudents:
    """Measure students of the toy world's pipeline beside it."""

    students: tuple[Path, ...]
    """Folders that `scorefield distill` wrote: pipelines, or LoRAs."""
    teacher: str = "toyworld"
    """Folder of the pipeline they learned from, or toyworld, which ships."""
    allow_pickle: bool = False
    """Read pickled weights where there are no safetensors. Only if you trust where they come from."""
    variant: str = ""
    """Of the weight files, if there are no plain ones, such as fp16."""
    out: Path = Path("runs/students")
    """Folder for figures.json and the contact sheet."""
    num_prompts: int = 500
    """Captions of scenes that nothing was trained on."""
    num_renders: int = 2000
    """Renders to compare with."""
    guidance: float = 3.0
    """Of the teacher."""
    steps: int = 50
    """DDIM steps of the teacher."""
    batch_size: int = 50
    """Pictures at a time."""
    seed: int = 0
    """Of scenes and noise; trainings watch themselves on those of seed 1."""
    device: str = default_device()
    """Where to draw."""


def demo_folders(config: Demo) -> list[Path]:
    """Return the folders that no other run may use meanwhile."""
    return [] if config.dry_run else [config.out, config.out / "teacher", config.out / "student"]
