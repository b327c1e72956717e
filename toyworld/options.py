"""Options of the commands about the toy world and the digits."""

from dataclasses import dataclass
from pathlib import Path

from scorefield.training.launcher import check_alone, default_device
from scorefield.training.options import LoadOptions, check_numbers, check_out

NUM_DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Distil a teacher of handwritten digits to one step, on the CPU, and measure it."""

    out: Path = Path("runs/demo")
    """Folder for the report, the pictures and both trainings."""
    seed: int = 0
    """Seed of both trainings and of the classifier that measures them."""
    long: bool = False
    """Train the teacher and the student twice as long."""
    teacher_steps: int = 3000
    """Optimizer steps of the teacher, before --long."""
    student_iterations: int = 2000
    """Iterations of the distillation, before --long."""
    sampling_steps: int = 50
    """DDIM steps of the teacher's images."""
    num_images: int = 5000
    """Generated images per figure, with the label frequencies of the 597 held-out digits."""
    dry_run: bool = False
    """Print the resolved options of both trainings, and stop."""


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured, and how the teacher is sampled."""

    num_prompts: int = 500
    """Captions of scenes that nothing was trained on."""
    num_renders: int = 2000
    """Renders to compare with."""
    guidance: float = 3.0
    """Scale of the teacher's classifier-free guidance. 1 means none."""
    steps: int = 50
    """Steps of the teacher's scheduler."""
    batch_size: int = 50
    """Images at a time."""
    seed: int = 0
    """Seed of scenes and noise. Trainings watch themselves on seed 1; choose pipelines or guidance on other seeds
    than the one you report."""
    device: str = default_device()
    """Where to draw, such as cpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class EvaluatePipeline(Measuring, LoadOptions):
    """Measure a pipeline of the toy world against renders that it has not seen."""

    teacher: str = "runs/toyworld/pipeline"
    """Folder of a diffusers pipeline, or toyworld, the one that ships."""
    out: Path = Path("runs/toyworld/figures")
    """Folder for figures.json and the contact sheet."""


@dataclass(frozen=True, kw_only=True)
class EvaluateStudents(Measuring, LoadOptions):
    """Measure students of the toy world's pipeline beside their teacher."""

    students: tuple[Path, ...]
    """Folders that `scorefield distill` wrote: pipelines, or LoRAs."""
    teacher: str = "toyworld"
    """Folder of the pipeline that they learned from, or toyworld, the one that ships."""
    out: Path = Path("runs/students")
    """Folder for figures.json and the contact sheet."""


def demo_folders(config: Demo) -> list[Path]:
    """Return the folders that no other run may use meanwhile."""
    return [] if config.dry_run else [config.out, config.out / "teacher", config.out / "student"]


def check_demo(config: Demo) -> None:
    """Raise ``ValueError`` for options that are out of range."""
    check_numbers(config, positive=("teacher_steps", "student_iterations", "sampling_steps"))
    if config.num_images < 2 * NUM_DIGITS:
        raise ValueError(f"--num-images must be at least {2 * NUM_DIGITS}; got {config.num_images}.")
    check_out(config.out)
    check_alone("demo")


def check_measuring(config: Measuring) -> None:
    """Raise ``ValueError`` for options that are out of range."""
    check_numbers(config, positive=("num_prompts", "num_renders", "guidance", "steps", "batch_size"))
    if min(config.num_prompts, config.num_renders) < 2:
        raise ValueError("--num-prompts and --num-renders must be at least 2: distances need a covariance.")
    check_alone("toyworld")


def check_pipeline(config: EvaluatePipeline) -> None:
    """Raise ``ValueError`` for options that are out of range, or an ``--out`` that cannot be written."""
    check_measuring(config)
    check_out(config.out)


def check_students(config: EvaluateStudents) -> None:
    """Raise ``ValueError`` for options that are out of range, or an ``--out`` that cannot be written."""
    check_measuring(config)
    check_out(config.out)
    if not config.students:
        raise ValueError("--students names no folder; pass at least one that `scorefield distill` wrote.")
