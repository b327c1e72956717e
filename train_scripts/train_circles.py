"""Train the painter of circles from scratch: a small pixel-space model that follows captions.

    python train_scripts/train_circles.py --out runs/circles
    scorefield control circles --out runs/circles-control

It draws what fill50k's captions say ("red circle with blue background") at a random place, until `scorefield
control` trains an adapter that sets the place. The result is in --out/base.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from controlnet.circles import Circles, pictures
from scorefield import guided
from scorefield.commands.command import run
from scorefield.gradient import TIME_NOT_FINITE, denoising_errors, prediction_weight, time_not_finite
from scorefield.models.networks import DiffusersNetwork
from scorefield.models.teacher import Teacher
from scorefield.randomness import Rng, shuffled
from scorefield.sampling import grid, sample
from scorefield.times import uniform
from scorefield.training.identity import identity
from scorefield.training.loop import EMA, Phase
from scorefield.training.options import RunOptions, check_numbers, check_run
from scorefield.training.run import adamw, cosine, fit, prepare, resume, show_plan, start
from scorefield.training.sharding import whole
from toyworld.circles import PALETTE, PATCHES, make_circles_unet, painter, save_circles


@dataclass(frozen=True, kw_only=True)
class Config(RunOptions):
    """Train a small text-to-image model of circles, in pixel space."""

    results: ClassVar[tuple[str, ...]] = ("base",)

    out: Path = Path("runs/circles")
    """Folder for checkpoints, logs and the finished model."""
    size: int = 32
    """Height and width of the pictures in pixels."""
    num_samples: int = 50_000
    """Number of different circles."""
    steps: int = 1200
    """Total number of iterations."""
    batch_size: int = 64
    """Pictures per micro-batch."""
    learning_rate: float = 1e-3
    """Peak learning rate. It falls to zero along a cosine."""
    caption_dropout: float = 0.1
    """Share of captions that are emptied, so that the model can be guided."""
    ema_decay: float = 0.995
    """Decay of the averaged weights, which are the ones that are saved."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    save_every: int = 200
    """Iterations between checkpoints and sample grids."""


def main(config: Config) -> Path:
    """Train and return the folder of the finished model."""
    check_run(config)
    check_numbers(
        config, positive=("num_samples",), rates=("learning_rate",), shares=("caption_dropout", "ema_decay")
    )
    step = 4 * PATCHES.factor
    if config.size < 16 or config.size % step:
        raise ValueError(f"--size must be a multiple of {step}, 16 at least; got {config.size}.")
    torch.manual_seed(config.seed)
    unet: Any = make_circles_unet(config.size)
    if config.dry_run:
        show_plan(config, {"unet": unet}, {"unet": config.steps})
        return config.out
    accelerator = start(config)
    network = prepare(DiffusersNetwork(unet), config, accelerator)
    teacher = painter(network, config.size)
    phase = make_phase(config, teacher)
    assert phase.ema is not None
    averaged: Any = phase.ema.network
    data = Circles(config.size, config.num_samples, colours=PALETTE, distinct=True)

    def batches(rng: Rng) -> dict[str, Any]:
        drawn = [data.circle(index) for index in shuffled(len(data), config.batch_size, rng).tolist()]
        kept = torch.rand(len(drawn), generator=rng("captions")) >= config.caption_dropout
        captions = [circle.caption if keep else "" for circle, keep in zip(drawn, kept, strict=True)]
        x0 = PATCHES.encode(pictures(drawn, config.size))
        return {"x0": x0.to(accelerator.device), "cond": teacher.prompts(captions)}

    own = identity(config, accelerator, {"data": f"circles of {len(PALETTE)} colours"})
    first = resume(config, [phase], accelerator, own)
    captions = [data.caption(index) for index in range(min(32, len(data)))]
    folder = config.out / "base"

    def save() -> None:
        model: Any = whole(averaged)
        if accelerator.is_main_process:
            save_circles(folder, model.model, config.size, card(config))

    fit(
        config, [phase], batches, accelerator, own=own, first=first, columns=8,
        preview=lambda: preview(painter(averaged, config.size), captions), at_end=save,
    )  # fmt: skip
    if accelerator.is_main_process:
        print(f"painter of circles: {folder}")
    return folder


def make_phase(config: Config, teacher: Teacher) -> Phase:
    """Return the phase: squared error of v at uniform times, AdamW, a cosine schedule and averaged weights."""
    denoiser, network = teacher.denoiser, teacher.denoiser.network

    def loss(batch: dict[str, Any], rng: Rng) -> dict[str, Tensor]:
        errors, t = denoising_errors(
            denoiser, batch["x0"], batch["cond"], times=uniform(0, 1), weight=prediction_weight("v"),
            generator=rng("noise"),
        )  # fmt: skip
        return {"loss": errors.mean(), TIME_NOT_FINITE: time_not_finite(errors, t)}

    optimizer = adamw(network, config.learning_rate, betas=(0.9, 0.99), kind=config.optimizer)
    return Phase(
        name="circles", network=network, optimizer=optimizer, loss=loss, ema=EMA(network, config.ema_decay),
        lr_schedule=cosine(optimizer, config.steps),
    )  # fmt: skip


@torch.no_grad()
def preview(teacher: Teacher, captions: list[str]) -> Tensor:
    """Return pictures of these captions, always from the same noise."""
    noise = torch.randn(len(captions), *teacher.shape, generator=torch.Generator().manual_seed(0))
    model = guided(teacher.denoiser, 2.0, teacher.negative())
    times = grid(model.schedule, 25)
    return teacher.decode(sample(model, noise.to(teacher.device), teacher.prompts(captions), times=times))


def card(config: Config) -> str:
    """Return the model card, which says how the folder was made."""
    return f"""---
license: apache-2.0
tags: [text-to-image]
---
# Circles of {config.size} x {config.size} pixels

Draws captions such as "red circle with blue background", of the colours {", ".join(PALETTE)}.
Pixels in patches of 2 x 2, v-prediction, betas of Stable Diffusion. Trained from nothing by
`train_scripts/train_circles.py`, seed {config.seed}: {config.steps:,} iterations of batch {config.batch_size}.
"""


if __name__ == "__main__":
    run(main, Config, __doc__)
