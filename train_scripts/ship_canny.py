"""Make the canny adapter that ships beside the toy world's pipeline, of a finished run.

    scorefield control toyworld-canny --out runs/canny
    python train_scripts/ship_canny.py --run runs/canny --time "519 seconds of CPU" --out toyworld/canny

Weights are rounded to 16 bits, as the pipeline's are; the card says what the run reached, and how far they moved.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from scorefield.atomic import whole_file
from scorefield.commands.command import run
from scorefield.files import read_json
from scorefield.training.options import check_out

FILES = ("diffusion_pytorch_model.safetensors", "config.json", "README.md")

CARD = """---
license: apache-2.0
library_name: diffusers
base_model: toyworld/pipeline
tags: [controlnet]
---
# The toy world under edges

A ControlNet of the toy world's pipeline, for Canny edges of 64 x 64 pixels, white on black. Trained on the toy
world alone, it knows nothing else.

Made by `scorefield control toyworld-canny`, seed {seed}, {time}; then `python train_scripts/ship_canny.py` rounded
its weights to float16.

Control {event}. {num_samples} held-out hints, guidance {guidance:g}, {sampling_steps} DDIM steps, before that:

| | value | floor: other samples' hints | ceiling: real images | without control |
|---|---|---|---|---|
{rows}

The rounding moves no weight by more than {moved:.1e}; the largest is {largest:.2f}.
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make the adapter that ships."""

    run: Path = Path("runs/canny")
    """Folder of a finished `scorefield control toyworld-canny`."""
    time: str = "time not noted"
    """What it took, for the card."""
    out: Path = Path("toyworld/canny")
    """Folder of the result."""


def main(config: Config) -> Path:
    """Round, write, and return the folder."""
    check_out(config.out)
    source, report = config.run / "controlnet", read_json(config.run / "report.json")
    whole = load_file(source / FILES[0])
    weights = {name: value.half().contiguous() for name, value in whole.items()}
    moved = max(float((value - weights[name].float()).abs().max()) for name, value in whole.items())
    largest = max(float(value.abs().max()) for value in whole.values())
    config.out.mkdir(parents=True, exist_ok=True)
    with whole_file(config.out / FILES[0]) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    with whole_file(config.out / FILES[1]) as temporary:
        temporary.write_bytes((source / FILES[1]).read_bytes())
    seed = read_json(config.run / "config.json")["seed"]
    with whole_file(config.out / FILES[2]) as temporary:
        temporary.write_text(card(report, seed, config.time, moved, largest))
    for name in FILES:  # readable for whoever installs them
        (config.out / name).chmod(0o644)
    return config.out


def card(report: dict[str, Any], seed: int, time: str, moved: float, largest: float) -> str:
    """Return what README.md says."""
    rows = []
    for name, score in report["scores"].items():
        free = report["scores_without_control"][name]["value"]
        values = score["value"], score["floor"], score["ceiling"], free
        rows.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |")
    names = ("event", "num_samples", "guidance", "sampling_steps")
    return CARD.format(
        seed=seed, time=time, rows="\n".join(rows), moved=moved, largest=largest,
        **{name: report[name] for name in names},
    )  # fmt: skip


if __name__ == "__main__":
    run(main, Config, __doc__)
