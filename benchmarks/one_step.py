r"""One table of one-step and few-step methods: one teacher, one number of network passes, one metric.

    python benchmarks/one_step.py --teacher runs/demo/teacher/teacher --features runs/features \
        --reference held_out.npz --passes 1e6 --out runs/one_step

Every cell is the Fréchet distance of a student that `scorefield distill --method ...` made in ``--passes`` forward
passes of one image, a backward pass counting as two; the teacher pairs count. Cells are written to table.json as
they are made; started again, the run makes those that are missing, and a training that was stopped goes on.
table.md holds mean and range over the seeds, and the teacher's own figures with the solver of `scorefield sample`.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import solver_table
from solver_table import drawing, kept, load, measure, reference_features, write_json
from torch import Tensor

import distill.recipe
from distill.options import ALONG_PATHS, PRESETS, MethodName
from distill.options import Config as Distil
from scorefield.commands.command import run
from scorefield.commands.evaluate import load_features
from scorefield.models.teacher import Teacher
from scorefield.training.launcher import default_device
from scorefield.training.options import check_device, check_numbers, check_out

UPDATE = 3.0
"""Passes of a network's update: forward, and backward as two."""

STUDENT_UPDATES = {"sid": UPDATE + 6}
"""Passes of a student's update with those of teacher and fake score: SiD's go backward to their input, too."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distil one teacher by every method, and compare."""

    teacher: str
    """The teacher, as for --teacher of `scorefield distill`."""
    reference: str
    """Real images, as for --reference of `scorefield evaluate`."""
    features: Path
    """Folder of `scorefield features`."""
    data: str | None = None
    """Images for the GAN term and the paths, as for --data of `scorefield distill`. By default digits for a
    teacher of digits, else images of the teacher."""
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """Methods, as of `scorefield distill --method`."""
    num_steps: tuple[int, ...] = (1, 2, 4)
    """Steps of the students."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; a student of each."""
    passes: float = 1e6
    """Forward passes of one image for each student, in all stages."""
    batch_size: int = 64
    """Images in a batch."""
    calls: tuple[int, ...] = (1, 2, 4, 8, 50)
    """Network calls of the teacher beside the students."""
    num_images: int = 2000
    """Images per cell, and largest number of reference images."""
    out: Path = Path("runs/one_step")
    """Folder for the runs, table.json and table.md."""
    device: str = default_device()
    """Where to draw and measure, such as cpu or cuda."""


def main(config: Config) -> Path:
    """Make and measure what is missing, then write and print the table."""
    check(config)
    table = kept(config.out, settings(config), {"teacher": {}, "students": {}})
    measured = solver_table.Config(
        teacher=config.teacher, reference=config.reference, features=config.features, num_images=config.num_images,
        device=config.device,
    )  # fmt: skip
    teacher = load(measured, config.teacher)
    network, classifier = load_features(config.features, config.device)
    reference = reference_features(measured, teacher, network, classifier)
    none: dict[str, Any] = {"cells": {}}
    for calls in config.calls:
        if str(calls) not in table["teacher"]:
            options = replace(
                drawing(measured, config.teacher, calls, "ddim", "trailing"), sampler="auto", grid="auto"
            )
            table["teacher"][str(calls)] = measure(options, teacher, network, reference, none)["frechet"]
            write_json(config, table)
    for method, number, seed in missing(config, table):
        folder = distill.recipe.main(student_config(config, method, number, seed, teacher))
        figure = frechet(measured, folder, network, reference)
        table["students"].setdefault(f"{method} {number}", {})[str(seed)] = figure
        write_json(config, table)
    text = as_markdown(config, table)
    (config.out / "table.md").write_text(text)
    print(text)
    return config.out


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that cannot work, before anything is read or computed."""
    check_numbers(config, positive=("passes", "batch_size", "num_images"))
    check_device(config.device)
    check_out(config.out)
    if not config.methods or not config.seeds:
        raise ValueError("--methods and --seeds must name at least one.")
    if min((*config.num_steps, *config.calls), default=0) < 1:
        raise ValueError("--num-steps and --calls must name at least one number, all of them at least 1.")


def student_config(config: Config, method: MethodName, number: int, seed: int, teacher: Teacher) -> Distil:
    """Return the options of one distillation: its method's defaults, for as many steps as the passes allow."""
    usual = {"scm": "consistency"}.get(method, method)
    base = PRESETS[usual if method in ALONG_PATHS else "auto"]()
    has_images = config.data is not None or teacher.shape == (1, 8, 8)
    student = replace(
        base, method=method, teacher=config.teacher, data=config.data, num_steps=number, seed=seed,
        batch_size=config.batch_size, reals="data" if has_images else "teacher", skip_teacher_check=True,
        out=config.out / f"{method}-{number}-{seed}",
    )  # fmt: skip
    steps = iterations(student, config.passes)
    return replace(student, steps=steps, guard_every=max(1, steps // 20))


def iterations(student: Distil, passes: float) -> int:
    """Return how many iterations the passes pay for; see :func:`cost`. At least ten updates of the student."""
    along_data = student.method in ALONG_PATHS and student.reals == "data"
    pairs = student.guard_images + (0 if along_data else 2000)
    left = max(0.0, passes - pairs * student.pair_steps)
    return max(10 * student.student_every, int(left / (student.batch_size * cost(student))))


def cost(student: Distil) -> float:
    """Return the passes of one iteration for each image of its batch, the warm-up's and the pairs' share included.

    DMD and its relatives: the student's image and the fake score's update in each; in every ``student_every``-th
    the student's update in place of its image, teacher and fake score, and the regression; the passes of the
    critic end half-way. An iteration has four updates of warm-up, and each pair is read twenty times.
    """
    pair = student.pair_steps / 20
    if student.method in ALONG_PATHS:
        own = UPDATE + (3.0 if student.method == "scm" else 2.0)
        return own + (pair if student.reals == "teacher" else 0.0)
    every = student.student_every
    update = STUDENT_UPDATES.get(student.method, UPDATE + 2) + UPDATE
    critic = 0.0 if student.gan_weight == 0 else 1.5 + 1 / every
    return UPDATE + (every - 1) / every + update / every + critic + 4 * (UPDATE + pair)


def frechet(measured: solver_table.Config, folder: Path, network: Any, reference: Tensor) -> float | None:
    """Return the Fréchet distance of a student's images."""
    student = load(measured, str(folder))
    options = drawing(measured, str(folder), 1, "ddim", "trailing")
    figure: float | None = measure(options, student, network, reference, {"cells": {}})["frechet"]
    return figure


def missing(config: Config, table: dict[str, Any]) -> Iterator[tuple[MethodName, int, int]]:
    """Return method, steps and seed of the cells that are not in the table, the first seed of all first."""
    for seed in config.seeds:
        for number in config.num_steps:
            for method in config.methods:
                if method == "progressive" and number > 1:  # it ends in one step
                    continue
                if str(seed) not in table["students"].get(f"{method} {number}", {}):
                    yield method, number, seed


def settings(config: Config) -> dict[str, str]:
    """Return the options that all figures depend on."""
    names = ("teacher", "reference", "features", "data", "passes", "batch_size", "num_images")
    return {name: str(getattr(config, name)) for name in names}


def as_markdown(config: Config, table: dict[str, Any]) -> str:
    """Return the table: the mean over seeds, in brackets the lowest and the highest, and the teacher's figures."""
    numbers = sorted(config.num_steps)
    lines = [
        f"| method | {' | '.join(f'{number} steps' for number in numbers)} |",
        "|---" * (1 + len(numbers)) + "|",
    ]
    for method in config.methods:
        cells = [cell_text(table["students"].get(f"{method} {number}", {})) for number in numbers]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    calls = ", ".join(f"{number}: {value:.2f}" for number, value in table["teacher"].items() if value is not None)
    facts = f"{config.passes:,.0f} passes a student, {config.num_images:,} images a figure. The teacher by calls: "
    return "\n".join([*lines, "", f"{facts}{calls}.", ""])


def cell_text(found: dict[str, float | None]) -> str:
    """Return mean, and lowest and highest of several seeds; a dash where samples were not finite."""
    values = [value for value in found.values() if value is not None]
    if not values or len(values) < len(found):
        return "-"
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    run(main, Config, __doc__)
