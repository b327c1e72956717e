"""Demo on real digits: train a teacher, distil it to one step, score both, and show pictures of both.

    scorefield demo            # minutes on a CPU
    scorefield demo --long     # longer training, closer to the teacher

Writes report.json and samples.png under --out, besides the checkpoints and TensorBoard logs of both trainings.
"""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from distill.options import Config as Distill
from distill.options import digits
from distill.recipe import main as distil
from distill.student import Student
from scorefield import NetworkDenoiser
from scorefield.atomic import whole_file
from scorefield.commands.options import TrainTeacher
from scorefield.commands.teacher import main as train_teacher
from scorefield.models.teacher import load_teacher
from scorefield.report.write import add_page
from scorefield.sampling import grid, initial_noise, sample
from scorefield.training import checkpoint
from scorefield.training.identity import resolved
from toyworld.digits import NUM_CLASSES, SHAPE, Judge
from toyworld.options import Demo, check_demo


def main(config: Demo) -> Path:
    """Run the whole demo and return the path of the report."""
    check(config)
    recipe, teacher_out = teacher_config(config), config.out / "teacher"
    if config.dry_run:
        for part in (config, recipe, student_config(config, teacher_out / "teacher")):
            print(type(part).__module__, json.dumps(resolved(part), indent=2))
        return config.out
    check_length(config, recipe.steps)
    resumed = any(checkpoint.steps(config.out / name / "checkpoints") for name in ("teacher", "student"))
    start = time.perf_counter()
    student_out = distil(student_config(config, train_teacher(recipe)))
    teacher, student = load_teacher(str(teacher_out / "teacher")), load_teacher(str(student_out))
    judge = Judge(config.seed, config.num_images)
    noise = torch.randn(len(judge.labels), *SHAPE, generator=torch.Generator().manual_seed(config.seed))
    one_step = Student(student.denoiser, student.times)
    report, images = evaluate(config, judge, teacher.denoiser, one_step, noise)
    # If a training was resumed or already done, these seconds are not those of the whole job.
    report |= {"seconds": round(time.perf_counter() - start, 1), "resumed": resumed, "seed": config.seed}
    path = config.out / "report.json"
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2))
    draw(images, judge.labels, config.out / "samples.png")
    add_page(config.out)
    show(report, config.out)
    return path


def check(config: Demo) -> None:
    """Raise ``ValueError`` for options that would fail later, before the first training starts."""
    check_demo(config)
    every = student_config(config, Path()).student_every
    if config.student_iterations < every:
        raise ValueError(
            f"--student-iterations must be at least {every}, the first that updates the student; got "
            f"{config.student_iterations}."
        )


def check_length(config: Demo, steps: int) -> None:
    """Raise ``ValueError`` if ``--out`` holds a student whose teacher had another number of steps."""
    held = checkpoint.described(config.out / "teacher" / "checkpoints").get("steps", steps)
    begun = any(checkpoint.steps(config.out / "student" / stage / "checkpoints") for stage in ("", "warm-up"))
    if begun and held != steps:
        raise ValueError(
            f"--out {config.out} holds a student whose teacher was trained for {held:,} steps; this command "
            f"trains it for {steps:,}. Choose another --out."
        )


def teacher_config(config: Demo) -> TrainTeacher:
    """Return the options of the teacher's training."""
    steps = config.teacher_steps * (2 if config.long else 1)
    return TrainTeacher(out=config.out / "teacher", steps=steps, seed=config.seed)


def student_config(config: Demo, teacher: Path) -> Distill:
    """Return the options of the distillation. Only the number of iterations depends on ``--long``."""
    steps = config.student_iterations * (2 if config.long else 1)
    return replace(digits(), teacher=str(teacher), out=config.out / "student", steps=steps, seed=config.seed)


@torch.no_grad()
def evaluate(
    config: Demo, judge: Judge, teacher: NetworkDenoiser, student: Student, noise: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the figures, and the images they were measured on, from the same noise and labels for all."""
    cond, times = {"class_labels": judge.labels}, grid(teacher.schedule, config.sampling_steps, spacing="uniform")
    x_t = initial_noise(teacher.schedule, noise, float(times[0]))
    slow, fast = sample(teacher, x_t, cond, times=times), student.sample(noise, cond)
    images = {
        f"teacher, {config.sampling_steps} steps": slow,
        f"student, {student.num_steps} step": fast,
        "teacher, 1 step": sample(teacher, x_t, cond, times=times[:1]),
    }
    names = ("teacher", "student", "one_step_teacher")
    scores = {name: judge.score(x, judge.labels) for name, x in zip(names, images.values(), strict=True)}
    scores["test"] = judge.floor()
    report: dict[str, Any] = {"teacher_steps": config.sampling_steps, "student_steps": student.num_steps}
    for figure in ("fd", "kid", "accuracy"):
        report |= {f"{name}_{figure}": asdict(score)[figure] for name, score in scores.items()}
    report |= {
        "classifier_accuracy": judge.accuracy,
        "teacher_nearest": judge.nearest(slow),
        "student_nearest": judge.nearest(fast),
        "test_nearest": judge.nearest(judge.held_out.images),
        "num_images": len(noise),
        "test_num_images": len(judge.train.images),
        "speedup": speedup(teacher, student, x_t[:1000], cond["class_labels"][:1000], times),
        "student_saw_real_images": bool(student_config(config, Path()).gan_weight),
    }
    return report, images


def speedup(teacher: NetworkDenoiser, student: Student, x_t: Tensor, labels: Tensor, times: Tensor) -> float:
    """Return the teacher's seconds over the student's for the same images; both are medians of three runs."""
    cond, turns = {"class_labels": labels}, []
    for _ in range(3):
        marks = [time.perf_counter()]
        for sampler in (lambda: sample(teacher, x_t, cond, times=times), lambda: student.sample(x_t, cond)):
            sampler()
            marks.append(time.perf_counter())
        turns.append((marks[1] - marks[0], marks[2] - marks[1]))
    slow, fast = (sorted(column)[1] for column in zip(*turns, strict=True))
    return slow / fast


def draw(images: dict[str, Tensor], labels: Tensor, path: Path, columns: int = 20, scale: int = 5) -> None:
    """Write a picture with a named row per sampler: two samples of each digit, enlarged without smoothing."""
    per_class = columns // NUM_CLASSES
    chosen = torch.cat([(labels == digit).nonzero()[:per_class, 0] for digit in range(NUM_CLASSES)])
    cell, caption, margin = 8 * scale + 4, 24, 10
    width = columns * cell + 2 * margin
    sheet = Image.new("L", (width, len(images) * (cell + caption) + 2 * margin), 255)
    pen = ImageDraw.Draw(sheet)
    for row, (name, batch) in enumerate(images.items()):
        top = margin + row * (cell + caption)
        pen.text((margin, top + 2), name, fill=0, font=ImageFont.load_default(16))
        for column, image in enumerate(batch[chosen, 0]):
            pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            tile = Image.fromarray(255 - pixels.numpy()).resize((8 * scale, 8 * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + column * cell, top + caption))
    with whole_file(path) as temporary:
        sheet.save(temporary, "png")


def show(report: dict[str, Any], out: Path) -> None:
    """Print the figures as a table, and where the pictures are."""
    print(f"\n{'':24}{'Fréchet':>9}{'KID':>9}{'accuracy':>10}   (64-d features of a digit classifier)")
    rows = {
        "real against real": "test",
        f"teacher, {report['teacher_steps']} steps": "teacher",
        f"student, {report['student_steps']} step": "student",
        "teacher, 1 step": "one_step_teacher",
    }
    for name, key in rows.items():
        fd, kid, accuracy = (report[f"{key}_{figure}"] for figure in ("fd", "kid", "accuracy"))
        print(f"{name:24}{fd:9.3f}{kid:9.4f}{accuracy:10.3f}")
    ratio = report["student_fd"] / report["teacher_fd"]
    print(f"\nstudent / teacher distance {ratio:.2f}, {report['speedup']:.0f} times as fast per image")
    print(f"Pictures: {out / 'samples.png'}   figures: {out / 'report.json'}")
    print(f"Curves:   tensorboard --logdir {out}")
