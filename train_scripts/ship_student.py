"""Make the one-step student that ships beside the toy world's pipeline, of a finished run; then add its card.

    scorefield distill toyworld-1step-lora --out runs/lora
    python train_scripts/ship_student.py --run runs/lora --out toyworld/student
    scorefield toyworld students --students toyworld/student

Weights are rounded to 16 bits, as the pipeline's are.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from scorefield.atomic import whole_file
from scorefield.commands.command import run
from scorefield.models.lora import LORA_FILE
from scorefield.models.pretrained import LORA_FACTS
from scorefield.training.options import check_out


@dataclass(frozen=True, kw_only=True)
class Config:
    """Make the student that ships."""

    run: Path = Path("runs/lora")
    """Folder of a finished `scorefield distill toyworld-1step-lora`."""
    out: Path = Path("toyworld/student")
    """Folder of the result."""


def main(config: Config) -> Path:
    """Round, write, and return the folder."""
    check_out(config.out)
    source = config.run / "student"
    weights = {name: value.half().contiguous() for name, value in load_file(source / LORA_FILE).items()}
    (config.out / "scheduler").mkdir(parents=True, exist_ok=True)
    with whole_file(config.out / LORA_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    (config.out / LORA_FILE).chmod(0o644)
    for name in (LORA_FACTS, "scheduler/scheduler_config.json"):
        with whole_file(config.out / name) as temporary:
            temporary.write_bytes((source / name).read_bytes())
        (config.out / name).chmod(0o644)
    return config.out


if __name__ == "__main__":
    run(main, Config, __doc__)
