r"""Image quality by network calls: each solver on each grid, and the calls from which a few-step student pays off.

    python benchmarks/solver_table.py --teacher runs/teacher/teacher --reference images/ --features runs/features \
        --students runs/student/student --out runs/solvers
    python benchmarks/solver_table.py --teacher toyworld/pipeline --prompts prompts.txt --guidance 3 ...

Every cell is the Fréchet distance to the reference; all cells start from the same noise. Cells are written to
table.json as they are made, and a run that is started again makes those that are missing. table.md and table.png
follow.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import scorefield.commands.sample as sample
from scorefield.atomic import whole_file
from scorefield.commands.command import run
from scorefield.commands.evaluate import load_features
from scorefield.commands.options import Sample
from scorefield.data.images import load_images
from scorefield.data.options import DataOptions
from scorefield.grids import Spacing
from scorefield.metrics import extract_features, frechet_distance
from scorefield.models.teacher import Teacher
from scorefield.solvers import Solver
from scorefield.training.features import Classifier
from scorefield.training.launcher import default_device
from scorefield.training.options import check_device, check_numbers, check_out

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure a teacher with every solver, grid and number of calls, and its students."""

    teacher: str
    """The teacher, as for --teacher of `scorefield sample`."""
    reference: str
    """Real images, as for --reference of `scorefield evaluate`."""
    features: Path
    """Folder of `scorefield features`, or the weights file of InceptionV3."""
    students: tuple[str, ...] = ()
    """Folders written by `scorefield distill`."""
    prompts: Path | None = None
    """File with a prompt per line, for text-to-image models."""
    negative_prompt: str = ""
    """Prompt that guidance moves away from."""
    guidance: float = 1.0
    """Scale of classifier-free guidance of the teacher."""
    solvers: tuple[Solver, ...] = ("ddim", "heun", "dpm++", "unipc")
    """Solvers; each row is a solver on a grid."""
    grids: tuple[Spacing, ...] = get_args(Spacing)
    """Grids of times; each row is a solver on a grid."""
    calls: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 10, 15, 20, 50)
    """Network calls per image; a column each."""
    num_images: int = 2000
    """Images per cell, and largest number of reference images."""
    out: Path = Path("runs/solvers")
    """Folder for table.json, table.md and table.png."""
    batch_size: int = 250
    """Images at a time."""
    seed: int = 0
    """Seed of the noise, the same in every cell."""
    device: str = default_device()
    """Where to draw and measure, such as cpu or cuda."""


def main(config: Config) -> Path:
    """Measure what is missing, then write and print the table."""
    check(config)
    table = read_table(config)
    teacher = load(config, config.teacher)
    features, classifier = load_features(config.features, config.device)
    reference = reference_features(config, teacher, features, classifier)
    half = len(reference) // 2
    table["floor"] = frechet_distance(reference[:half], reference[half:])
    for cell in tqdm(list(missing(config, table)), desc="cells", disable=None):
        solver, spacing, calls = cell
        table["cells"].setdefault(row_name(solver, spacing), {})[str(calls)] = measure(
            drawing(config, config.teacher, calls, solver, spacing), teacher, features, reference, table
        )
        write_json(config, table)
    for folder in config.students:
        if folder not in table["students"]:
            student = load(config, folder)
            figures = measure(drawing(config, folder, 1, "ddim", "trailing"), student, features, reference, table)
            table["students"][folder] = {"calls": len(student.times), "frechet": figures["frechet"]}
            write_json(config, table)
    write_json(config, table)
    text = as_markdown(config, table)
    (config.out / "table.md").write_text(text)
    picture(config, table).save(config.out / "table.png")
    print(text)
    return config.out


def check(config: Config) -> None:
    """Raise ``ValueError`` for options that cannot work, before anything is read or computed."""
    check_numbers(config, positive=("batch_size",), not_negative=("guidance",))
    check_device(config.device)
    check_out(config.out)
    if config.num_images < 4 or not config.calls or min(config.calls) < 1:
        raise ValueError(
            "--num-images must be at least 4 and --calls at least 1; got "
            f"{config.num_images} and {' '.join(map(str, config.calls))}."
        )
    if config.prompts is not None and not config.prompts.is_file():
        raise ValueError(f"--prompts {config.prompts} is no file; expected one with a prompt in each line.")


def drawing(config: Config, model: str, calls: int, solver: Solver, spacing: Spacing) -> Sample:
    """Return the options of `scorefield sample` that draw one cell."""
    lines = config.prompts.read_text().splitlines() if config.prompts is not None else []
    return Sample(
        teacher=model, prompts=tuple(line.strip() for line in lines if line.strip()), steps=calls, sampler=solver,
        grid=spacing, num_images=config.num_images, guidance=config.guidance, batch_size=config.batch_size,
        negative_prompt=config.negative_prompt, seed=config.seed,
    )  # fmt: skip


def load(config: Config, name: str) -> Teacher:
    """Return a teacher or student on the device. Raises ``ValueError`` if it is the other of the two."""
    model = sample.load(drawing(config, name, 1, "ddim", "trailing"), torch.device(config.device))
    if bool(model.times) != (name != config.teacher):
        raise ValueError(
            f"{name} is a {'student' if model.times else 'teacher'}; pass teachers to --teacher and students to "
            "--students."
        )
    return model


def reference_features(config: Config, teacher: Teacher, network: Any, classifier: Classifier | None) -> Tensor:
    """Return features of the real images at the teacher's size.

    Raises ``ValueError`` if the feature network takes another size.
    """
    channels, height, width = teacher.image_shape
    wanted = (classifier.facts.channels, classifier.facts.resolution) if classifier else (channels, height)
    if height != width or wanted != (channels, height):
        raise ValueError(
            f"{config.teacher} draws {channels} x {height} x {width}; --features {config.features} take "
            f"{wanted[0]} x {wanted[1]} x {wanted[1]}. Train features on images of that size."
        )
    mode: Literal["grey", "rgb"] = "grey" if channels == 1 else "rgb"
    images = load_images(DataOptions(data=config.reference, size=height, channels=mode))
    chosen = images.some(min(config.num_images, len(images)))
    parts = [images.batch(part, torch.Generator(), config.device).images for part in chosen.split(250)]
    return torch.cat([extract_features(network, part).cpu() for part in parts])


def missing(config: Config, table: Mapping[str, Any]) -> Iterator[tuple[Solver, Spacing, int]]:
    """Return the cells that are not in the table yet, the cheap ones first."""
    for calls in sorted(config.calls):
        for solver in config.solvers:
            for spacing in config.grids:
                if str(calls) not in table["cells"].get(row_name(solver, spacing), {}):
                    yield solver, spacing, calls


def measure(
    options: Sample, model: Teacher, network: Any, reference: Tensor, table: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one cell: calls used and Fréchet distance, which is None if samples are not finite.

    A cell with the times and steps of another copies its figure: in one step, all solvers are DDIM.
    """
    key, paid = "student", len(model.times)
    if not model.times:
        chosen = sample.plan_of(options, model)
        key, paid = (
            f"{chosen.solver if len(chosen.times) > 1 else 'ddim'} {chosen.times.tolist()}",
            chosen.num_calls,
        )
        for cells in table["cells"].values():
            for cell in cells.values():
                if cell["key"] == key:
                    return dict(cell)
    labels = sample.asked_labels(options, model)
    made = sample.draw(options, model, torch.arange(len(labels)).split(options.batch_size), labels)
    figure = None
    if bool(made.isfinite().all()):
        device = model.device
        pixels = ((made.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
        parts = [extract_features(network, part.to(device)).cpu() for part in pixels.split(options.batch_size)]
        figure = frechet_distance(torch.cat(parts), reference)
    return {"calls": paid, "frechet": figure, "key": key}


def row_name(solver: str, spacing: str) -> str:
    """Return the name of a row: solver and grid."""
    return f"{solver}, {spacing}"


def settings(config: Config) -> dict[str, Any]:
    """Return the options that the figures depend on."""
    names = ("teacher", "reference", "features", "prompts", "negative_prompt", "guidance", "num_images", "seed")
    return {name: str(getattr(config, name)) for name in names}


def read_table(config: Config) -> dict[str, Any]:
    """Return the table as far as it has been made. Raises ``ValueError`` if it was made with other settings."""
    return kept(config.out, settings(config), {"cells": {}, "students": {}})


def kept(out: Path, options: Mapping[str, str], empty: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table.json of a folder, or an empty one. Raises ``ValueError`` if other options made it."""
    path = out / "table.json"
    if not path.is_file():
        return {"settings": dict(options), **empty}
    table: dict[str, Any] = json.loads(path.read_text())
    changed = [name for name, value in options.items() if table["settings"].get(name) != value]
    if changed:
        raise ValueError(f"{path} was measured with other values of {', '.join(changed)}. Choose another --out.")
    return table


def write_json(config: Any, table: Mapping[str, Any]) -> None:
    """Replace table.json of ``config.out`` atomically."""
    config.out.mkdir(parents=True, exist_ok=True)
    with whole_file(config.out / "table.json") as temporary:
        temporary.write_text(json.dumps(table, indent=2))


def as_markdown(config: Config, table: Mapping[str, Any]) -> str:
    """Return the table: each column's lowest distance in bold, and from how many calls each student pays off."""
    columns = [str(calls) for calls in sorted(config.calls)]
    best = {calls: lowest(table, int(calls)) for calls in columns}
    lines = [f"| solver, grid | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row, cells in table["cells"].items():
        shown = [figure_text(cells.get(calls, {}).get("frechet"), best[calls]) for calls in columns]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    for folder, student in table["students"].items():
        shown = [f"{student['frechet']:.1f}" if int(calls) == student["calls"] else "" for calls in columns]
        lines.append(f"| student {folder} | {' | '.join(shown)} |")
    facts = f"Fréchet distance of {config.num_images:,} images; two halves of the reference: {table['floor']:.2f}."
    return "\n".join([*lines, "", facts, *(pays(table, folder) for folder in table["students"]), ""])


def figure_text(value: float | None, best: float | None) -> str:
    """Return a cell: bold if it is the column's best, a dash if there is none."""
    if value is None:
        return "-"
    return f"**{value:.1f}**" if value == best else f"{value:.1f}"


def figures(table: Mapping[str, Any]) -> list[tuple[int, float, str]]:
    """Return (column, Fréchet distance, row) for every cell with a distance."""
    rows = [(int(n), cell["frechet"], row) for row, cells in table["cells"].items() for n, cell in cells.items()]
    return [row for row in rows if row[1] is not None]


def lowest(table: Mapping[str, Any], calls: int) -> float | None:
    """Return the lowest distance of a column."""
    return min((value for column, value, _ in figures(table) if column == calls), default=None)


def pays(table: Mapping[str, Any], folder: str) -> str:
    """Return a sentence: at how many calls, and how, the teacher first equals a student."""
    student = table["students"][folder]
    name, own = f"{folder} ({student['calls']} calls: {student['frechet']:.1f})", student["frechet"]
    as_good = [cell for cell in figures(table) if cell[1] <= own]
    if not as_good:
        return f"{name}: the teacher is as good in none of these."
    calls, value, row = min(as_good)
    saved = f"It saves {calls - student['calls']} calls." if calls > student["calls"] else "It does not pay."
    return f"{name}: the teacher is as good from {calls} calls ({row}: {value:.1f}). {saved}"


def picture(config: Config, table: Mapping[str, Any], size: tuple[int, int] = (900, 560)) -> Image.Image:
    """Return a plot of Fréchet distance against calls, both logarithmic.

    Each solver has a colour and shows its best grid; crosses are students.
    """
    image = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(image)
    points = {solver: best_of(table, solver) for solver in config.solvers}
    crosses = [(student["calls"], student["frechet"]) for student in table["students"].values()]
    everything = [point for line in points.values() for point in line] + [c for c in crosses if c[1] is not None]
    if not everything:
        return image
    logs = torch.tensor(everything, dtype=torch.float64).clamp(min=1e-6).log()
    low, span = logs.amin(0), (logs.amax(0) - logs.amin(0)).clamp(min=1e-3)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (torch.tensor(point, dtype=torch.float64).clamp(min=1e-6).log() - low) / span
        return 70 + float(x) * (size[0] - 240), size[1] - 50 - float(y) * (size[1] - 100)

    axes(canvas, place, sorted(config.calls), [value for _, value in everything], size)
    for number, (solver, line) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        canvas.line([place(point) for point in line], fill=colour, width=2)
        canvas.text((size[0] - 150, 40 + 20 * number), solver, fill=colour)
    for point in crosses:
        x, y = place(point)
        canvas.line([(x - 5, y - 5), (x + 5, y + 5)], fill="black", width=2)
        canvas.line([(x - 5, y + 5), (x + 5, y - 5)], fill="black", width=2)
    return image


def axes(
    canvas: ImageDraw.ImageDraw, place: Any, calls: Sequence[int], values: Sequence[float], size: Any
) -> None:
    """Draw the axes: calls below, distances at the left, in the units of the data."""
    for number in calls:
        x, _ = place((number, values[0]))
        canvas.line([(x, 50), (x, size[1] - 50)], fill="#dddddd")
        canvas.text((x - 6, size[1] - 42), str(number), fill="black")
    low, high = min(values), max(values)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = max(low, 1e-6) * (max(high, 1e-6) / max(low, 1e-6)) ** share
        _, y = place((calls[0], value))
        canvas.line([(70, y), (size[0] - 170, y)], fill="#dddddd")
        canvas.text((8, y - 6), f"{value:.1f}", fill="black")
    canvas.text((70, 20), "Fréchet distance by network calls, best grid of each solver", fill="black")


def best_of(table: Mapping[str, Any], solver: str) -> list[tuple[int, float]]:
    """Return (calls, lowest distance over all grids) of a solver."""
    own = [(calls, value) for calls, value, row in figures(table) if row.startswith(f"{solver},")]
    return [(calls, min(v for c, v in own if c == calls)) for calls in sorted({c for c, _ in own})]


if __name__ == "__main__":
    run(main, Config, __doc__)
