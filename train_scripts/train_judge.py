"""Train the judge of the toy world, a classifier of shape, colour, background and view.

    python train_scripts/train_judge.py --out runs/judge

The shipped judge, toyworld/judge.safetensors and judge.json, was made by this command. Figures of another judge
are not comparable.
"""

from dataclasses import dataclass
from pathlib import Path

from scorefield.commands.command import run
from scorefield.training.launcher import default_device
from scorefield.training.options import check_device, check_numbers, check_out
from toyworld.judge import save_judge, train_judge


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train the judge of the toy world."""

    out: Path = Path("runs/judge")
    """Folder for the weights and facts."""
    steps: int = 3000
    """Optimiser steps."""
    batch_size: int = 64
    """Pictures per step."""
    num_images: int = 24_000
    """Renders to train on. They are kept in memory, at 12 kB each."""
    num_held_out: int = 4000
    """Further renders on which the judge is measured."""
    learning_rate: float = 4e-3
    """Peak learning rate of a one-cycle schedule."""
    seed: int = 0
    """Seed of the scenes, the weights and the augmentation."""
    device: str = default_device()
    """Where to train, such as cpu or cuda."""


def main(config: Config) -> Path:
    """Train the judge and return its folder."""
    check_numbers(config, positive=("steps", "batch_size", "num_images", "num_held_out", "learning_rate"))
    check_out(config.out)
    check_device(config.device)
    judge = train_judge(
        seed=config.seed, steps=config.steps, batch_size=config.batch_size, num_images=config.num_images,
        num_held_out=config.num_held_out, learning_rate=config.learning_rate, device=config.device,
    )  # fmt: skip
    save_judge(judge, config.out)
    if judge.facts:
        shares = ", ".join(f"{question} {share:.4f}" for question, share in judge.facts.accuracies.items())
        print(f"accuracy on {config.num_held_out} held-out renders: {shares}; judge in {config.out}")
    return config.out


if __name__ == "__main__":
    run(main, Config, __doc__)
