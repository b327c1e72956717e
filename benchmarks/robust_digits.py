r"""Robust classifiers of 8 x 8 digits: three seeds on all data, and scarce data with and without generated images.

    python benchmarks/robust_digits.py --out runs/robust_digits

Of scikit-learn's 1,797 digits the first 900 of a fixed shuffle are learned from, or the first 100 or 200 of these,
and the last 597 measure. For each number of real images: a teacher (`scorefield teacher`) and a classifier without
attack learn from the same ones; the teacher draws images of its classes, and `scorefield robust digits` learns
from the real ones alone, with the generated ones under the classes they were drawn for, and with the same ones
under that classifier's answers. All are MLPs (CHEAP below), and have the same number of steps.

Results are written to table.json as they are made; started again, the script makes those that are missing, and a
training that was stopped goes on (its seconds are then those of the last process). table.md shows the same.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

import attack.robust_recipe
import scorefield.commands.sample
import scorefield.commands.teacher
from attack.recipe import load_classifier
from attack.robust_options import Robust, digits
from scorefield.atomic import whole_file
from scorefield.commands.options import Sample, TrainTeacher
from scorefield.data.images import Labelled
from toyworld.digits import load_digits

CHEAP: dict[str, Any] = {"network": "mlp", "width": 256, "steps": 1500, "learning_rate": 2e-3}
"""The classifiers of the comparison: as accurate on all images as the preset's, in a third of its time."""

ADDED = ("none", "classes", "answers")
"""What is learned from beside the real images: nothing, generated ones with their classes, with answers."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the preset on all 900 images."""
    numbers: tuple[int, ...] = (100, 200, 900)
    """Real images of the comparison with generated ones."""
    added: tuple[str, ...] = ADDED
    """Columns of the comparison."""
    scarce_seeds: tuple[int, ...] = (0,)
    """Seeds of the comparison."""
    num_generated: int = 6000
    """Images that each teacher draws."""
    mix: float = 0.5
    """Share of generated images in a batch."""
    steps: int = 0
    """Steps of the classifiers. 0 means those of the preset, and 1,500 in the comparison."""
    teacher_steps: int = 3000
    """Steps of the teachers."""
    test_steps: int = 40
    """Steps of PGD in the measurement, with two restarts."""
    autoattack: bool = False
    """Measure AutoAttack for the preset's first seed, too."""
    out: Path = Path("runs/robust_digits")
    """Folder for the runs, table.json and table.md."""


def main(config: Config) -> dict[str, Any]:
    """Make what is missing, write and print the table, and return it."""
    table = load(config)
    data_of(config)
    for seed in config.seeds:
        name = f"preset, seed {seed}"
        measured(config, table, name, lambda seed=seed: preset(config, seed))  # type: ignore[misc]
    for number in config.numbers:
        for seed in config.scarce_seeds:
            for added in config.added:
                name = f"{number} real, {added}, seed {seed}"
                measured(config, table, name, lambda a=(number, added, seed): scarce(config, *a))  # type: ignore[misc]
    text = "\n".join(rows(table))
    with whole_file(config.out / "table.md") as temporary:
        temporary.write_text(text + "\n")
    print(text)
    return table


def settings(config: Config) -> dict[str, Any]:
    """Return what the rows depend on."""
    names = ("num_generated", "mix", "steps", "teacher_steps", "test_steps")
    return {name: getattr(config, name) for name in names}


def load(config: Config) -> dict[str, Any]:
    """Return the rows that are there. Raises ``ValueError`` for a table of other settings."""
    file = config.out / "table.json"
    if not file.exists():
        return {"settings": settings(config), "rows": {}}
    table: dict[str, Any] = json.loads(file.read_text())
    if table["settings"] != settings(config):
        raise ValueError(f"{file} is of other settings: {table['settings']}. Choose another --out.")
    return table


def measured(config: Config, table: dict[str, Any], name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Make a row unless it is there, and write the table."""
    if name in table["rows"]:
        return
    table["rows"][name] = work()
    print(json.dumps({name: table["rows"][name]}), flush=True)
    config.out.mkdir(parents=True, exist_ok=True)
    with whole_file(config.out / "table.json") as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")


def data_of(config: Config) -> None:
    """Write the parts of the digits as files, for commands to read."""
    learned, _, held_out = load_digits()
    parts = {f"real_{number}": _first(learned, number) for number in config.numbers} | {"held_out": held_out}
    config.out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        if not (file := config.out / f"{name}.npz").exists():
            with whole_file(file) as temporary, temporary.open("wb") as opened:
                np.savez(opened, images=part.images.numpy(), labels=part.labels.numpy())


def _first(part: Labelled, number: int) -> Labelled:
    return Labelled(part.images[:number], part.labels[:number])


def classifier(config: Config, name: str, seed: int, **options: Any) -> Robust:
    """Return the options of a run."""
    chosen = {**options, "steps": config.steps} if config.steps else options
    brief: dict[str, Any] = {"test_steps": config.test_steps, "report_to": ("none",)}
    return replace(digits(), out=config.out / name, seed=seed, **brief, **chosen)


def preset(config: Config, seed: int) -> dict[str, Any]:
    """Return the figures of the preset on all 900 images."""
    return trained(classifier(config, f"preset_{seed}", seed, autoattack=config.autoattack and seed == 0))


def scarce(config: Config, number: int, added: str, seed: int) -> dict[str, Any]:
    """Return the figures of a classifier of few real images, with what is added."""
    places = {"data": str(config.out / f"real_{number}.npz"), "held_out": str(config.out / "held_out.npz")}
    real: dict[str, Any] = {**CHEAP, **places}
    if added == "none":
        return trained(classifier(config, f"{number}_none_{seed}", seed, **real))
    made, spent = generated(config, number)
    more: dict[str, Any] = {"generated": str(made), "mix": config.mix}
    if added == "answers":
        plain = classifier(config, f"{number}_plain", 0, **{**real, "epsilon": 0.0})
        first = trained(plain)
        more["pseudo_label"] = str(plain.out / "classifier")
        spent |= {"accuracy_of_labeller": first["accuracy"], "labeller_cpu_seconds": first["cpu_seconds"]}
        with np.load(made) as arrays:
            images = torch.from_numpy(arrays["images"]).float() / 255
            labels = torch.from_numpy(arrays["labels"])
        answers = load_classifier(more["pseudo_label"], "cpu")
        with torch.no_grad():
            spent["answers_that_are_the_classes"] = float((answers(images).argmax(1) == labels).double().mean())
    return trained(classifier(config, f"{number}_{added}_{seed}", seed, **real, **more)) | spent


def generated(config: Config, number: int) -> tuple[Path, dict[str, Any]]:
    """Return the file of the images that a teacher of so many real ones draws, and the seconds of both."""
    file, note = config.out / f"made_{number}.npz", config.out / f"made_{number}.json"
    if not note.exists():
        begun = time.process_time()
        teacher = scorefield.commands.teacher.main(
            TrainTeacher(
                data=str(config.out / f"real_{number}.npz"), out=config.out / f"teacher_{number}",
                steps=config.teacher_steps, report_to=("none",),
            )
        )  # fmt: skip
        scorefield.commands.sample.main(
            Sample(teacher=str(teacher), num_images=config.num_generated, steps=35, out=file)
        )
        with whole_file(note) as temporary:
            temporary.write_text(json.dumps({"teacher_cpu_seconds": time.process_time() - begun}))
    spent: dict[str, Any] = json.loads(note.read_text())
    return file, spent


def trained(options: Robust) -> dict[str, Any]:
    """Train, and return the figures that the run reports, with CPU seconds, those of the measurement included."""
    begun = time.process_time()
    attack.robust_recipe.main(options)
    found = json.loads((options.out / "report.json").read_text())
    kept = ("accuracy", "robust_accuracy", "cross_entropy", "curve", "flags", "autoattack")
    row = {name: found[name] for name in kept if name in found}
    return {**row, "steps": options.steps, "cpu_seconds": time.process_time() - begun}


def rows(table: dict[str, Any]) -> list[str]:
    """Return the table in Markdown."""
    lines = ["| | accuracy | under attack | CPU s |", "|---|---|---|---|"]
    for name, row in table["rows"].items():
        held = row["robust_accuracy"]
        shown = "-" if held is None else f"{held:.3f}"
        lines.append(f"| {name} | {row['accuracy']:.3f} | {shown} | {row['cpu_seconds']:.0f} |")
    return lines


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
