"""Short starts of a scene with several seeds, of which the best one goes on.

What a scene becomes is decided in its first steps: a green chair of one seed became a stool, and no later step
made a chair of it. The probe's residual at a high noise level, where the teacher answers from the prompt and
hardly from the picture, shows that early. It has the same views, times and noise for all seeds.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scorefield.atomic import whole_file
from sds.options import Config

FOLDER, FILE = "starts", "starts.json"
"""In ``--out``: folder of the starts, each a run of its own; and what was chosen."""


@dataclass(frozen=True)
class Starts:
    """What came of the starts.

    Attributes:
        steps: Of each start.
        residuals: Seed -> the probe's residual at a high noise level after these steps, in the order of seeds; inf
            for a scene that was lost.
        chosen: Seed of the start that goes on.
    """

    steps: int
    residuals: Mapping[int, float]
    chosen: int

    def described(self) -> dict[str, Any]:
        """Return it as JSON has it: seeds are texts there, and a lost scene is null."""
        found = {str(seed): value if math.isfinite(value) else None for seed, value in self.residuals.items()}
        return {"steps": self.steps, "chosen": self.chosen, "residual_at_high_noise": found}

    def lines(self) -> list[str]:
        """Return what is said of each start."""
        return [
            f"start of seed {seed}: "
            + (f"residual at high noise {value:.4f}" if math.isfinite(value) else "the scene was lost")
            + f" after {self.steps} steps" + (", goes on" if seed == self.chosen else "")
            for seed, value in self.residuals.items()
        ]  # fmt: skip


def seeds_of(config: Config) -> range:
    """Return the seeds of the starts."""
    return range(config.seed, config.seed + config.seeds)


def folder_of(config: Config, seed: int) -> Path:
    """Return the folder of a start."""
    return config.out / FOLDER / f"seed-{seed}"


def choose(residuals: Mapping[int, float]) -> int:
    """Return the seed with the smallest residual, the first one among equals.

    Raises ``FloatingPointError`` if none is finite: all scenes were lost.
    """
    finite = {seed: value for seed, value in residuals.items() if math.isfinite(value)}
    if not finite:
        raise FloatingPointError(
            f"all {len(residuals)} starts (seeds {', '.join(map(str, residuals))}) lost their scenes. Lower the "
            "learning rate, or pass another --seed."
        )
    return min(finite, key=lambda seed: finite[seed])


def write_starts(out: Path, starts: Starts) -> None:
    """Write what was chosen into ``--out``."""
    with whole_file(out / FILE) as temporary:
        temporary.write_text(json.dumps(starts.described(), indent=2) + "\n")


def read_starts(config: Config) -> Starts | None:
    """Return what was chosen in ``--out`` by a run of these options, or None if nothing was, or it is damaged."""
    try:
        found = json.loads((config.out / FILE).read_text())
        held = found["residual_at_high_noise"]
        residuals = {int(seed): math.inf if value is None else float(value) for seed, value in held.items()}
        starts = Starts(int(found["steps"]), residuals, int(found["chosen"]))
        wanted = (config.start_steps, list(seeds_of(config)), choose(residuals))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, FloatingPointError):
        return None
    return starts if (starts.steps, list(residuals), starts.chosen) == wanted else None


def facts_of_starts(config: Config) -> dict[str, Any]:
    """Return what ``report.json`` says of the starts of the run in ``--out``; empty for a run with one start."""
    starts = read_starts(config) if config.seeds > 1 else None
    return {} if starts is None else {"starts": starts.described(), "seed": starts.chosen}


def plan_of_starts(config: Config) -> str:
    """Return in words what the starts take, for ``--dry-run``; empty for one start."""
    if config.seeds == 1:
        return ""
    total = config.steps + (config.seeds - 1) * config.start_steps
    seeds = ", ".join(map(str, seeds_of(config)))
    return (
        f"{config.seeds} starts of {config.start_steps:,} steps each, of the seeds {seeds}; one goes on. "
        f"{total:,} steps in all"
    )
