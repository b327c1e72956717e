"""Train a class-conditional diffusion teacher: EDM preconditioning, log-normal noise levels, EMA.

    python train_scripts/train_teacher.py --out runs/teacher
    accelerate launch train_scripts/train_teacher.py --out runs/teacher    # several GPUs

Without --data it learns scikit-learn's 8 x 8 digits in about a minute on a CPU. Stopped runs resume: run the
same command again. The folder --out/teacher is what train_dmd.py takes as --teacher.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from command import (
    adamw,
    check_numbers,
    check_out,
    cosine,
    fingerprint,
    fit,
    identity,
    make_accelerator,
    resume,
    run,
    show_plan,
)
from digits import Labelled, load_images

from distill.student import TIMES
from score import Karras, KarrasPreconditioning, NetworkDenoiser, denoising_loss, freeze, karras_denoiser
from score.gradient import karras_weight
from score.network import ResidualMLP
from score.randomness import Rng, shuffled
from score.sampling import grid, initial_noise, sample
from score.storage import load_denoiser, read_facts, save_denoiser
from score.times import log_normal
from score.training import EMA, Phase


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a class-conditional diffusion teacher of small images on the CPU or a GPU."""

    out: Path = Path("runs/teacher")
    """Folder for checkpoints, TensorBoard logs and the finished teacher."""
    data: Path | None = None
    """npz file with images (n, c, h, w), uint8 or floats in [-1, 1], and labels (n,). None: 900 of the digits."""
    steps: int = 3000
    """Optimiser steps."""
    batch_size: int = 256
    """Images per step and process."""
    learning_rate: float = 1e-3
    """Peak of AdamW's learning rate: 100 steps of warm-up, then cosine to zero."""
    width: int = 256
    """Hidden width of the residual MLP."""
    depth: int = 4
    """Number of its blocks."""
    dropout: float = 0.1
    """In each block; 0 lets 900 images be memorised."""
    sigma_data: float = 0.75
    """Standard deviation of the data, for EDM preconditioning; the digits' is 0.75."""
    sigma_min: float = 0.02
    """Lowest noise level; the digits have 17 grey levels, so less would model their quantisation."""
    sigma_max: float = 20.0
    """Highest noise level, where a one-step student will be asked."""
    noise_mean: float = -0.8
    """Mean of log sigma in training (EDM: -1.2)."""
    noise_std: float = 1.2
    """Standard deviation of log sigma in training (EDM: 1.2)."""
    label_dropout: float = 0.1
    """Share of labels replaced by the null class, so that the teacher can be guided."""
    ema_decay: float = 0.999
    """Of the exponential moving average of the weights, which is what is saved."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision; weights stay float32."""
    seed: int = 0
    """Of every random draw."""
    log_every: int = 50
    """Steps between scalars."""
    save_every: int = 1000
    """Steps between checkpoints and sample grids."""
    dry_run: bool = False
    """Print the resolved config and the bytes per role, and stop."""


def build_network(facts: dict[str, Any], num_steps: int = 0) -> ResidualMLP:
    """The network that ``facts`` of a saved teacher or student describe; ``num_steps`` for a fake score."""
    names = ("shape", "num_classes", "width", "depth", "dropout")
    try:
        return ResidualMLP(**{name: facts[name] for name in names}, num_steps=num_steps)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"the saved denoiser does not say its {', '.join(names)} as train_teacher.py does: {error!r}."
        ) from error


def load_teacher(folder: Path) -> tuple[NetworkDenoiser, dict[str, Any]]:
    """A teacher written by this script, in eval mode, and its facts. Raises ``ValueError`` for a student."""
    facts = read_facts(folder)
    if TIMES in facts:
        raise ValueError(f"--teacher {folder} is a student, which knows no other noise level. Pass its teacher.")
    return load_denoiser(folder, KarrasPreconditioning(build_network(facts))), facts


def main(config: Config) -> Path:
    """Train and return the folder of the finished teacher."""
    check_numbers(
        config, positive=("steps", "batch_size", "learning_rate", "width", "depth", "sigma_data", "noise_std",
                          "log_every", "save_every"),
        shares=("dropout", "label_dropout", "ema_decay"),
    )  # fmt: skip
    check_out(config.out)
    data = load_images(config.data)
    facts: dict[str, Any] = {
        "shape": list(data.images.shape[1:]), "num_classes": int(data.labels.max()) + 1,
        "width": config.width, "depth": config.depth, "dropout": config.dropout,
    }  # fmt: skip
    torch.manual_seed(config.seed)
    schedule = Karras(config.sigma_min, config.sigma_max)
    denoiser = karras_denoiser(build_network(facts).train(), schedule, config.sigma_data)
    if config.dry_run:
        show_plan(config, {"teacher": denoiser.network, "its average": freeze(copy.deepcopy(denoiser.network))})
        return config.out
    accelerator = make_accelerator(config.out, config.precision)
    network = accelerator.prepare(denoiser.network)
    phase = teacher_phase(config, NetworkDenoiser(network, schedule, "x0"), facts["num_classes"])
    assert phase.ema is not None
    own = identity(config, accelerator, {"data": fingerprint([data.images, data.labels])})
    start = resume(config, [phase], accelerator, own)

    def batches(rng: Rng) -> Labelled:
        chosen = shuffled(len(data.images), config.batch_size, rng)
        return Labelled(data.images[chosen].to(accelerator.device), data.labels[chosen].to(accelerator.device))

    average = NetworkDenoiser(phase.ema.network, schedule, "x0")
    fit(
        config, [phase], batches, accelerator, own=own, start=start, columns=facts["num_classes"],
        preview=lambda: preview(average, facts),
    )  # fmt: skip
    folder = config.out / "teacher"
    if accelerator.is_main_process:
        save_denoiser(average, folder, facts)
    return folder


def teacher_phase(config: Config, denoiser: NetworkDenoiser, num_classes: int) -> Phase:
    """Denoising under EDM's weight, with some labels dropped."""
    times, weight = log_normal(config.noise_mean, config.noise_std), karras_weight(config.sigma_data)

    def loss(batch: Labelled, rng: Rng) -> dict[str, torch.Tensor]:
        dropped = torch.rand(len(batch.labels), generator=rng("labels")) < config.label_dropout
        cond = {"class_labels": batch.labels.masked_fill(dropped.to(batch.labels.device), num_classes)}
        losses = denoising_loss(denoiser, batch.images, cond, times=times, weight=weight, generator=rng("noise"))
        return {"loss": losses.mean()}

    optimizer = adamw(denoiser.network, config.learning_rate)
    return Phase(
        name="teacher", network=denoiser.network, optimizer=optimizer, loss=loss,
        ema=EMA(denoiser.network, config.ema_decay), lr_schedule=cosine(optimizer, config.steps),
    )  # fmt: skip


@torch.no_grad()
def preview(denoiser: NetworkDenoiser, facts: dict[str, Any], rows: int = 4) -> torch.Tensor:
    """A few samples of every class in 18 steps, always from the same noise."""
    device = next(denoiser.network.parameters()).device
    labels = torch.arange(facts["num_classes"]).repeat(rows).to(device)
    noise = torch.randn(len(labels), *facts["shape"], generator=torch.Generator().manual_seed(0)).to(device)
    times = grid(denoiser.schedule, 18)
    x_t = initial_noise(denoiser.schedule, noise, float(times[0]))
    return sample(denoiser, x_t, {"class_labels": labels}, times=times)


if __name__ == "__main__":
    run(main, Config, __doc__)
