"""The page: one run or several are read, and drawn by one template that escapes everything from files."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from scorefield import __version__
from scorefield.report import measurements, trainings
from scorefield.report.charts import MOST_CHARTS, Chart, charts, grouped, signs, together
from scorefield.report.curves import Points, read_curves
from scorefield.report.folder import Folder, number, shortened, told, whole
from scorefield.report.galleries import galleries
from scorefield.report.summary import Summary
from scorefield.report.words import command

GENERATOR = "scorefield report"
"""What a page calls its maker, by which a page of ours is known."""

ROOM = 3_400_000
"""Characters of all pictures of a page; a page is below 5 MB."""

INPUTS = {
    "teacher": "teacher", "base": "teacher", "data": "data", "prompts": "prompts", "init_from": "started from",
    "features": "features", "hint": "hint", "prompt": "prompt", "preset": "preset", "classifier": "classifier",
    "generated": "generated images", "held_out": "held-out images", "pseudo_label": "labels of generated images",
}  # fmt: skip
"""Options and entries of identity.json that say what a run was made from, and what the page calls them."""


def find_run(place: Path) -> tuple[Folder, str]:
    """Return the folder of a run, and the name of the file that was meant, if it was one of figures.

    Raises ``ValueError`` for what is no run: nothing there, no folder, or a folder without a trace of one.
    """
    wants = "Pass the --out of a command, such as runs/student."
    if not place.exists():
        raise ValueError(f"{place} is not there. {wants}")
    if place.is_file():
        folder = Folder(place.resolve().parent, str(place.parent))
        if place.suffix == ".json" and measurements.kind_of(folder, place.name)[0] == "evaluate":
            return folder, place.name
        raise ValueError(f"{place} is no file of figures that `scorefield evaluate` wrote. {wants}")
    if not place.is_dir():
        raise ValueError(f"{place} is no folder. {wants}")
    folder = Folder(place.resolve(), str(place))
    if not trainings.is_run(folder):
        raise ValueError(f"{place} is no run: it holds neither config.json nor figures nor logs. {wants}")
    return folder, ""


def read_run(folder: Folder, file: str = "", room: int = ROOM) -> Summary:
    """Return all that a page says of the run in a folder, with pictures of at most ``room`` characters."""
    config = {} if file else folder.object("config.json")
    kind, content = trainings.kind_of(config), dict[str, Any]()
    if kind is None:
        kind, content = measurements.kind_of(folder, file)
    options = config or content.get("options", content.get("settings", {}))
    options = options if isinstance(options, dict) else {}
    if kind in trainings.READERS:
        outcome = trainings.READERS[kind](folder, config)
    elif kind:
        outcome = measurements.READERS[kind](content, folder.shown)
    else:
        outcome = trainings.unknown(folder)
    about = {} if file or not config else folder.object("about.json")
    drawn = [] if file else galleries(folder, kind, content, room)
    facts = [] if file else facts_of(folder, config, options, about)
    logs = Folder(folder.place, folder.shown)
    curves = {} if file or kind in measurements.READERS else all_curves(logs)
    if not curves and kind in trainings.READERS and not outcome.works:
        logs.notes.append("There are no curves: the folder holds no log that can be read.")
    again = f"{folder.shown}/config.json"
    notes = list(dict.fromkeys(folder.notes))[:40]
    return Summary(
        name=file or folder.name, place=folder.shown, kind=kind or "run",
        outcome=replace(outcome, warnings=[*outcome.warnings, *notes]),
        command=command("scorefield", kind, "--config", again) if kind in trainings.READERS else "",
        facts=facts, options=options_of(options, about), galleries=drawn, curves=curves, signs=signs(kind, curves),
        damaged=logs.notes,
    )  # fmt: skip


def all_curves(folder: Folder) -> dict[str, Points]:
    """Return the scalars of a run and of its warm-up; those of control from its evidence where no log has them."""
    curves = read_curves(folder)
    curves |= {f"warm-up: {tag}": points for tag, points in read_curves(folder, "warm-up/logs").items()}
    return curves if any(tag.startswith("control/") for tag in curves) else {**curves, **evidence(folder)}


def evidence(folder: Folder) -> dict[str, Points]:
    """Return the scores of control by step, as evidence.jsonl has them, for a run without a log."""
    curves: dict[str, Points] = {}
    for look in folder.lines("evidence.jsonl"):
        step, standings = whole(look.get("step")), look.get("standings")
        for name, standing in list(standings.items())[:20] if isinstance(standings, dict) else ():
            for key, suffix in (("value", ""), ("floor", "_floor"), ("ceiling", "_ceiling")):
                value = number(standing.get(key)) if isinstance(standing, dict) else None
                if value is not None and step is not None:
                    curves.setdefault(f"control/{shortened(name, 60)}{suffix}", []).append((step, value))
    return curves


def facts_of(
    folder: Folder, config: Mapping[str, Any], options: Mapping[str, Any], about: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return what a run was made from, as far as its files say: names, hashes, versions."""
    own = folder.object("identity.json") if config else {}
    found = [(name, told(options[key])) for key, name in INPUTS.items() if options.get(key)]
    hashed = ("teacher", "base", "data", "prompts", "init_from")
    found += [
        (f"{INPUTS[key]}, hash", told(own[key]))
        for key in hashed
        if isinstance(own.get(key), str) and own[key] and own[key] != options.get(key)
    ]
    if isinstance(own.get("num_processes"), int):
        found.append(("processes", told(own["num_processes"])))
    versions = about.get("versions")
    if isinstance(versions, dict):
        found.append(("versions", ", ".join(f"{told(k)} {told(v)}" for k, v in list(versions.items())[:20])))
    return found


def options_of(options: Mapping[str, Any], about: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return all options, those that differ from their defaults first."""
    given = about.get("set")
    names = {name for name in given if isinstance(name, str)} if isinstance(given, list) else set()
    rows = [(shortened(name, 60), told(value), name in names) for name, value in list(options.items())[:400]]
    return sorted(rows, key=lambda row: not row[2])


@dataclass(frozen=True)
class Table:
    """Runs side by side: a row has a name and a cell for each run."""

    rows: Sequence[tuple[str, Sequence[str]]]


def side_by_side(runs: Sequence[Summary]) -> Table:
    """Return the verdicts, figures and differing options of several runs as a table."""
    rows = [("made by", [run.kind for run in runs]), ("conclusion", [run.outcome.conclusion for run in runs])]
    figures = [{one.name: one.value for one in run.outcome.figures} for run in runs]
    for name in dict.fromkeys(name for one in figures for name in one):
        rows.append((name, [one.get(name, "") for one in figures]))
    options = [{name: value for name, value, _ in run.options} for run in runs]
    for name in dict.fromkeys(name for one in options for name in one):
        held = {one[name] for one in options if name in one}  # runs of other commands have other options
        if len(held) > 1 and name not in ("out", "free", "may_change"):
            rows.append((f"--{name.replace('_', '-')}", [one.get(name, "") for one in options]))
    return Table(rows)


def page(places: Sequence[Path]) -> str:
    """Return the page of one run, or of several side by side.

    Raises ``ValueError`` for a place that is no run.
    """
    found = [find_run(place) for place in places]
    return draw([read_run(folder, file, ROOM // len(found)) for folder, file in found])


def draw(runs: Sequence[Summary]) -> str:
    """Return the page of some runs that were read."""
    names = [run.name if [one.name for one in runs].count(run.name) == 1 else run.place for run in runs]
    runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    several = len(runs) > 1
    compared: tuple[list[Chart], int] = ([], 0)
    if several:
        compared = charts(together({run.name: run.curves for run in runs}), 12)
    drawn = [charts(grouped(run.curves), 9 if several else MOST_CHARTS) for run in runs]
    script = _templates().get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return str(_templates().get_template("page.html").render(
        runs=list(zip(runs, drawn, strict=True)), several=several, compared=compared, digest=digest,
        table=side_by_side(runs) if several else None, version=__version__, generator=GENERATOR,
        title=f"{len(runs)} runs" if several else runs[0].name,
    ))  # fmt: skip


@cache
def _templates() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    place = FileSystemLoader(Path(__file__).parent)
    return Environment(
        loader=place, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
