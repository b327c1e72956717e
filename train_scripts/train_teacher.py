"""Train a class-conditional diffusion teacher: EDM preconditioning, log-normal noise levels, EMA.

    python train_scripts/train_teacher.py --out runs/teacher
    accelerate launch train_scripts/train_teacher.py --out runs/teacher    # several GPUs

Without --data it learns scikit-learn's 8 x 8 digits in about a minute on a CPU. Stopped runs resume: run the
same command again. The folder --out/teacher is what train_dmd.py takes as --teacher.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from command import RunOptions, check_numbers, check_run, fingerprint, identity, run, show_plan
from digits import Labelled
from fitting import adamw, cosine, fit, prepare, resume, start
from images import DataOptions, ImageSet, load_images
from monitoring import EvalOptions, check_evaluation, watcher

from scorefield import Karras, NetworkDenoiser, freeze
from scorefield.data.pictures import as_floats
from scorefield.gradient import TIME_NOT_FINITE, denoising_errors, karras_weight, time_not_finite
from scorefield.models.networks import build_network
from scorefield.models.storage import save_denoiser
from scorefield.models.teacher import Teacher
from scorefield.randomness import Rng, shuffled
from scorefield.sampling import grid, initial_noise, sample
from scorefield.times import log_normal
from scorefield.training.loop import EMA, Phase


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions, DataOptions, EvalOptions):
    """Train a diffusion teacher of small images, class-conditional where there are classes."""

    results: ClassVar[tuple[str, ...]] = ("teacher", "best", "best.json")

    out: Path = Path("runs/teacher")
    """Folder for checkpoints, TensorBoard logs and the finished teacher."""
    steps: int = 3000
    """Optimiser steps."""
    learning_rate: float = 1e-3
    """Peak of AdamW's learning rate: 100 steps of warm-up, then cosine to zero."""
    network: Literal["mlp", "unet"] = "mlp"
    """A residual MLP for images of a few hundred pixels, or diffusers' UNet for larger ones."""
    width: int = 256
    """Of the MLP: hidden width."""
    depth: int = 4
    """Of the MLP: number of blocks."""
    unet_channels: tuple[int, ...] = (64, 128)
    """Of the UNet: channels at each resolution, halving from one to the next."""
    unet_layers: int = 1
    """Of the UNet: residual blocks at each resolution."""
    unet_patch: int = 2
    """Of the UNet: pixels that become channels first; 1 is slower and finer."""
    dropout: float = 0.1
    """In each block; 0 lets a few hundred images be memorised."""
    sigma_data: float | None = None
    """Standard deviation of the data, for EDM preconditioning. None: measured."""
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


def main(config: Config) -> Path:
    """Train and return the folder of the finished teacher."""
    check_run(config)
    check_numbers(
        config, positive=("width", "depth", "unet_layers", "unet_patch", "noise_std"), rates=("learning_rate",),
        shares=("dropout", "label_dropout", "ema_decay"),
    )  # fmt: skip
    data = load_images(config)
    facts = describe(config, data)
    check_evaluation(config, data)
    torch.manual_seed(config.seed)
    schedule = Karras(config.sigma_min, config.sigma_max)
    network = build_network(facts).train()
    if config.dry_run:
        average = freeze(copy.deepcopy(network))
        show_plan(config, {"teacher": network, "its average": average}, {"teacher": config.steps})
        return config.out
    accelerator = start(config)
    network = prepare(network, config, accelerator)
    phase = teacher_phase(config, NetworkDenoiser(network, schedule, "x0"), facts)
    assert phase.ema is not None
    own = identity(config, accelerator, {"data": fingerprint([data.images, data.labels])})
    first = resume(config, [phase], accelerator, own)

    def batches(rng: Rng) -> Labelled:
        return data.batch(shuffled(len(data), config.batch_size, rng), rng("augment"), accelerator.device)

    model = Teacher(NetworkDenoiser(phase.ema.network, schedule, "x0"), data.shape, facts["num_classes"], facts)
    watch = watcher(config, model, data, teacher=None, save=lambda to: save_denoiser(model.denoiser, to, facts))
    fit(
        config, [phase], batches, accelerator, own=own, first=first, columns=min(10, data.num_classes),
        preview=lambda: preview(model), watch=watch,
    )  # fmt: skip
    folder = config.out / "teacher"
    if accelerator.is_main_process:
        save_denoiser(model.denoiser, folder, facts)
        print(f"teacher: {folder}")
    return folder


def describe(config: Config, data: ImageSet) -> dict[str, Any]:
    """How the network is built: what is saved beside the weights."""
    mlp = {"width": config.width, "depth": config.depth, "dropout": config.dropout}
    unet = {
        "channels": list(config.unet_channels), "layers": config.unet_layers, "patch": config.unet_patch,
        "dropout": config.dropout,
    }  # fmt: skip
    sigma_data = config.sigma_data or round(float(as_floats(data.images[data.some(10_000)]).std()), 2)
    if not sigma_data > 0:
        raise ValueError(
            f"--sigma-data must be above 0; got {sigma_data}: the images of --data are all of one grey."
        )
    return {
        "network": config.network, "options": mlp if config.network == "mlp" else unet, "shape": list(data.shape),
        "num_classes": data.num_classes if data.num_classes > 1 else 0, "class_names": list(data.class_names),
        "sigma_data": sigma_data, "null_class": config.label_dropout > 0,
    }  # fmt: skip


def teacher_phase(config: Config, denoiser: NetworkDenoiser, facts: dict[str, Any]) -> Phase:
    """Denoising under EDM's weight, with some labels dropped."""
    times, weight = log_normal(config.noise_mean, config.noise_std), karras_weight(facts["sigma_data"])
    num_classes = facts["num_classes"]

    def loss(batch: Labelled, rng: Rng) -> dict[str, torch.Tensor]:
        dropped = torch.rand(len(batch.labels), generator=rng("labels")) < config.label_dropout
        labels = batch.labels.masked_fill(dropped.to(batch.labels.device), num_classes)
        cond = {"class_labels": labels} if num_classes else {}
        errors, t = denoising_errors(
            denoiser, batch.images, cond, times=times, weight=weight, generator=rng("noise")
        )
        return {"loss": errors.mean(), TIME_NOT_FINITE: time_not_finite(errors, t)}

    optimizer = adamw(denoiser.network, config.learning_rate, kind=config.optimizer)
    return Phase(
        name="teacher", network=denoiser.network, optimizer=optimizer, loss=loss,
        ema=EMA(denoiser.network, config.ema_decay), lr_schedule=cosine(optimizer, config.steps),
    )  # fmt: skip


@torch.no_grad()
def preview(teacher: Teacher, rows: int = 4) -> torch.Tensor:
    """A few samples of the first ten classes in 18 steps, always from the same noise."""
    labels = torch.arange(min(10, max(1, teacher.num_classes))).repeat(rows).to(teacher.device)
    noise = torch.randn(len(labels), *teacher.shape, generator=torch.Generator().manual_seed(0)).to(labels.device)
    times = grid(teacher.denoiser.schedule, 18)
    x_t = initial_noise(teacher.denoiser.schedule, noise, float(times[0]))
    return sample(teacher.denoiser, x_t, teacher.cond(labels), times=times)


if __name__ == "__main__":
    run(main, Config, __doc__)
