"""Curves as plain SVG: where their points lie, and what they say."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scorefield.report.curves import Points
from scorefield.report.folder import figure

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 352, 10, 148
"""Corners of the plot within a chart."""

MOST_POINTS = 300
"""Points of a line; more are thinned out evenly."""

MOST_CHARTS = 60

ORDER = (
    "guard/distance", "control/", "probe/residual", "eval/frechet", "eval/", "probe/", "loss", "guard/", "scene/",
    "learning rates", "run/",
)  # fmt: skip
"""What of a name brings a chart forward."""

HIDDEN = ("_relative", "t_not_finite_max")
"""Ends of names that are not drawn: what floor and ceiling show already (nan where these cannot tell), and what is
for an error message."""

SUFFIXES = ("_floor", "_ceiling")
"""Curves that are drawn with the one they are read beside."""


@dataclass(frozen=True)
class Line:
    """One line: its label, its pieces as points of a polyline (broken where it is not finite), its last value."""

    label: str
    pieces: Sequence[str]
    last: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, and what it says."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: above it.
        lines: at most one for each colour that the page has, others share them.
        ticks: of the vertical axis.
        first: step at the left.
        last: step at the right.
        is_log: whether the vertical axis is logarithmic.
        lost: values that are not finite, and so are not drawn.
    """

    title: str
    lines: Sequence[Line]
    ticks: Sequence[Tick]
    first: str
    last: str
    is_log: bool
    lost: int


def grouped(curves: Mapping[str, Points]) -> dict[str, dict[str, Points]]:
    """Return the curves of a run by chart: a score with its floor and ceiling, all times of a probe, all rates."""
    found: dict[str, dict[str, Points]] = {}
    for tag, points in curves.items():
        if tag.endswith(HIDDEN):
            continue
        title, label = tag, tag.rpartition("/")[2]
        for suffix in SUFFIXES:
            if tag.endswith(suffix) and (title := tag.removesuffix(suffix)) in curves:
                label = suffix[1:]
        if re.fullmatch(r"t_[\d.]+", label):
            title = tag.rpartition("/")[0]
        if label == "learning_rate":
            title, label = "learning rates", tag.removesuffix("/learning_rate")
        found.setdefault(title, {})[label] = points
    return found


def together(runs: Mapping[str, Mapping[str, Points]]) -> dict[str, dict[str, Points]]:
    """Return the curves that at least two runs have, each with a line for each run."""
    tags = dict.fromkeys(tag for curves in runs.values() for tag in curves)
    shared = {tag: {name: curves[tag] for name, curves in runs.items() if tag in curves} for tag in tags}
    return {
        tag: lines for tag, lines in shared.items() if len(lines) > 1 and not tag.endswith((*SUFFIXES, *HIDDEN))
    }


def charts(groups: Mapping[str, Mapping[str, Points]], most: int = MOST_CHARTS) -> tuple[list[Chart], int]:
    """Return charts, those that say most first, and how many were left out."""

    def rank(title: str) -> tuple[int, str]:
        return next((i for i, part in enumerate(ORDER) if part in title), len(ORDER)), title

    titles = sorted(groups, key=rank)
    return [_chart(title, groups[title]) for title in titles[:most]], max(0, len(titles) - most)


def _chart(title: str, lines: Mapping[str, Points]) -> Chart:
    finite = [(step, value) for points in lines.values() for step, value in points if math.isfinite(value)]
    lost = sum(map(len, lines.values())) - len(finite)
    steps = [step for points in lines.values() for step, _ in points]
    first, last = min(steps), max(steps)
    values = [value for _, value in finite] or [0.0]
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > 100
    if is_log:
        low, high = math.log10(low), math.log10(high)
    if not high > low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room

    def x(step: int) -> float:
        return LEFT + (RIGHT - LEFT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        height = math.log10(value) if is_log else value
        return BOTTOM - (BOTTOM - TOP) * (height - low) / (high - low)

    def pieces(points: Points) -> list[str]:
        found, piece = list[str](), list[str]()
        for step, value in (*thinned(points), (0, math.nan)):
            if math.isfinite(value):
                piece.append(f"{x(step):.1f},{y(value):.1f}")
            elif piece:
                found.append(" ".join(piece if len(piece) > 1 else piece * 2))
                piece = []
        return found

    marks = [low, (low + high) / 2, high]
    ticks = [Tick(y(10**mark if is_log else mark), f"{10**mark if is_log else mark:.3g}") for mark in marks]
    drawn = [Line(label, pieces(points), figure(points[-1][1])) for label, points in lines.items()]
    return Chart(title, drawn, ticks, f"{first:,}", f"{last:,}", is_log, lost)


def thinned(points: Points) -> Points:
    """Return at most about ``MOST_POINTS`` points, the first and the last among them."""
    stride = -(-len(points) // MOST_POINTS)
    return [*points[:-1:stride], points[-1]] if stride > 1 else points


def signs(kind: str, curves: Mapping[str, Points]) -> list[str]:
    """Return what the curves say, in words: figures that are not finite, and the one that should fall."""
    said = []
    last = {tag: points[-1][1] for tag, points in curves.items() if not tag.endswith(HIDDEN)}
    broken = [tag for tag, value in last.items() if not math.isfinite(value)]
    if broken:
        said.append(f"{', '.join(broken[:4])}: the last value is not finite. Lower the learning rate.")
    named = {
        "sds": ("probe/residual", "the residual, the distance of renders from what the teacher expects"),
        "distill": ("guard/distance", "the student's distance from its teacher"),
        "teacher": ("eval/frechet_distance", "the Fréchet distance to the data"),
    }
    tag, name = named.get(kind, ("", ""))
    said += [f"{tag}: {name}, {_trend(curves[tag])}"] if len(curves.get(tag, ())) > 1 else []
    return said


def _trend(points: Points) -> str:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if len(finite) < 2:
        return "is not finite."
    (start, first), (_, last) = finite[0], finite[-1]
    at, least = min(finite, key=lambda point: point[1])
    if last > 1.1 * least and least > 0 and at != finite[-1][0]:
        return f"is rising: from {figure(least)} at step {at:,} to {figure(last)}."
    if last < 0.95 * first:
        return f"fell from {figure(first)} at step {start:,} to {figure(last)}."
    return f"stays about {figure(last)}."
