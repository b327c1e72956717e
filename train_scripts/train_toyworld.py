"""Train the toy world's text-to-image pipeline from scratch: renders, autoencoder, latent diffusion model.

    python train_scripts/train_toyworld.py --out runs/toyworld

There are four stages: render images to a file, train the autoencoder on them, train text encoder and UNet on its
latents, and save the averaged weights as a diffusers folder in --out/pipeline. A stage that was stopped resumes
when the same command is given again.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from scorefield import NetworkDenoiser, VariancePreserving
from scorefield.cache import TensorCache, fingerprint
from scorefield.commands.command import run
from scorefield.data.pictures import as_floats
from scorefield.gradient import TIME_NOT_FINITE, denoising_errors, prediction_weight, time_not_finite
from scorefield.guidance import guided
from scorefield.randomness import Rng, shuffled
from scorefield.sampling import grid, sample
from scorefield.times import uniform
from scorefield.training.identity import binding, check_earlier, identity, note_identity
from scorefield.training.loop import EMA, Phase
from scorefield.training.options import RunOptions, check_numbers, check_run
from scorefield.training.run import adamw, cosine, fit, prepare, resume, show_plan, start
from toyworld.parts import (
    Autoencoding,
    TextToLatent,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    save_pipeline,
)
from toyworld.renders import World, draw_captions, make_world


@dataclass(frozen=True, kw_only=True)
class Renders(RunOptions):
    """Renders with captions, and how a pipeline learns from them."""

    results: ClassVar[tuple[str, ...]] = ("pipeline",)

    num_images: int = 30_000
    """Number of renders to train on: scenes 0 to num_images - 1."""
    learning_rate: float = 1e-3
    """Peak learning rate of what learns from captions."""
    caption_dropout: float = 0.1
    """Share of captions that are emptied, so that the model can be guided."""
    part_dropout: float = 0.2
    """Share of captions without background and, drawn separately, share without view."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are the ones that are saved."""
    precision: Literal["no", "bf16"] = "bf16"
    """Autocast precision; weights stay float32."""
    save_every: int = 500
    """Iterations between checkpoints and sample grids."""


@dataclass(frozen=True, kw_only=True)
class Config(Renders):
    """Train the toy world's text-to-image pipeline."""

    out: Path = Path("runs/toyworld")
    """Folder for renders, checkpoints, logs and the finished pipeline."""
    steps: int = 4500
    """Iterations of text encoder and UNet."""
    vae_steps: int = 4000
    """Iterations of the autoencoder."""
    batch_size: int = 64
    """Latents with captions per micro-batch."""
    vae_batch_size: int = 16
    """Images per micro-batch of the autoencoder."""
    vae_lr: float = 1e-3
    """Peak learning rate of the autoencoder."""
    kl_weight: float = 1e-6
    """Weight of the latents' KL to N(0, 1), per image, relative to the mean squared error per pixel."""


VAE_OPTIONS = ("vae_steps", "vae_batch_size", "vae_lr", "kl_weight")
TEXT_OPTIONS = ("learning_rate", "caption_dropout", "part_dropout")


def main(config: Config) -> Path:
    """Run all stages and return the pipeline's folder."""
    check_run(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "train_toyworld.py runs as a single process, but a launcher started several. Start it with python."
        )
    check_numbers(
        config, positive=("num_images", "vae_steps", "vae_batch_size", "learning_rate", "vae_lr"),
        not_negative=("kl_weight",), shares=("caption_dropout", "part_dropout", "ema_decay"),
    )  # fmt: skip
    torch.manual_seed(config.seed)
    vae, text_encoder, unet = make_vae(), make_text_encoder(len(make_tokenizer())), make_unet()
    if config.dry_run:
        updates = {"autoencoder": config.vae_steps, "text encoder and unet": config.steps}
        before = (
            f"{config.num_images:,} renders, and {config.vae_steps:,} steps of {config.vae_batch_size} of them"
        )
        show_plan(config, {"vae": vae, "text_encoder": text_encoder, "unet": unet}, updates, before)
        return config.out
    own = binding(config)
    check_earlier(config.out, config.results, own, config.out / "text-to-image" / "checkpoints")
    world = make_world(config.out, config.num_images, config.seed)
    vae = train_vae(config, world, Autoencoding(vae))
    latents = encode(config, vae, world)
    network = train_text_to_image(config, world, latents, vae, TextToLatent(text_encoder, unet))
    note_identity(config.out, own)
    return save_pipeline(config.out / "pipeline", vae, network.text_encoder, network.unet, card(config))


def train_vae(config: Config, world: World, network: Autoencoding) -> Any:
    """Return the averaged autoencoder. Its scaling factor is the inverse standard deviation of its latents."""
    stage = replace(config, out=config.out / "vae", steps=config.vae_steps, batch_size=config.vae_batch_size)
    accelerator = start(stage)
    wrapped = prepare(network, stage, accelerator)

    def loss(images: Tensor, rng: Rng) -> dict[str, Tensor]:
        return vae_loss(wrapped, images, config.kl_weight, rng)

    def batches(rng: Rng) -> Tensor:
        return as_floats(world.images[shuffled(len(world.images), stage.batch_size, rng)]).to(accelerator.device)

    phase = new_phase("vae", wrapped, loss, config.vae_lr, stage)
    average: Any = averaged(phase)
    shown = as_floats(world.images[:16]).to(accelerator.device)

    @torch.no_grad()
    def preview() -> Tensor:
        noise = torch.zeros(len(shown), 4, shown.shape[-1] // 4, shown.shape[-1] // 4, device=shown.device)
        return torch.cat([shown, average(shown, noise)[0].float()])

    run_stage(stage, phase, batches, accelerator, {"data": fingerprint([world.images])}, TEXT_OPTIONS, preview)
    vae = average.vae
    vae.register_to_config(scaling_factor=1 / float(latents_of(vae, world.images[:2000]).std()))
    return vae


def vae_loss(network: nn.Module, images: Tensor, kl_weight: float, rng: Rng) -> dict[str, Tensor]:
    """Return the loss of images in [-1, 1]: squared error of a posterior draw, plus weighted KL to N(0, 1)."""
    side = images.shape[-1] // 4
    noise = torch.randn(len(images), 4, side, side, generator=rng("posterior")).to(images.device)
    made, kl = network(images, noise)
    error = (made.float() - images).square().mean()
    # The images have a range of 2, whose square is 4.
    return {"loss": error + kl_weight * kl.mean(), "psnr": 10 * (4 / error).log10(), "kl": kl.mean()}


@torch.no_grad()
def latents_of(vae: Any, images: Tensor) -> Tensor:
    """Return the posterior means of images, given as bytes; they are not scaled."""
    device = next(vae.parameters()).device
    parts = [vae.encode(as_floats(part).to(device)).latent_dist.mean.cpu() for part in images.split(250)]
    return torch.cat(parts)


def encode(config: Config, vae: Any, world: World) -> Tensor:
    """Return all latents, scaled to unit variance.

    They are cached in ``--out/latents`` by the hash of autoencoder and images.
    """
    cache = TensorCache(config.out / "latents", fingerprint(vae.parameters()))
    made = cache.fetch(
        [world.images], lambda _: [{"latents": latents_of(vae, world.images) * vae.config.scaling_factor}]
    )
    return made[0]["latents"]


def train_text_to_image(
    config: Config, world: World, latents: Tensor, vae: Any, network: TextToLatent
) -> TextToLatent:
    """Return the averaged text encoder and UNet."""
    stage = replace(config, out=config.out / "text-to-image")
    accelerator = start(stage)
    schedule = VariancePreserving.scaled_linear()
    wrapped = prepare(network, stage, accelerator)
    denoiser = NetworkDenoiser(wrapped, schedule, "v")

    def loss(batch: dict[str, Tensor], rng: Rng) -> dict[str, Tensor]:
        return latent_loss(denoiser, batch, rng)

    def batches(rng: Rng) -> dict[str, Tensor]:
        chosen = shuffled(len(latents), config.batch_size, rng)
        tokens = draw_captions(world, chosen, config.part_dropout, config.caption_dropout, rng)
        return {"latents": latents[chosen].to(accelerator.device), "tokens": tokens.to(accelerator.device)}

    phase = new_phase("text-to-image", wrapped, loss, config.learning_rate, stage)
    average: Any = averaged(phase)
    model = guided(
        NetworkDenoiser(average, schedule, "v"), 3.0, {"tokens": world.empty[None].to(accelerator.device)}
    )

    @torch.no_grad()
    def preview() -> Tensor:
        tokens = world.tokens[:16, 0].to(accelerator.device)
        noise = torch.randn(len(tokens), *latents.shape[1:], generator=torch.Generator().manual_seed(0))
        z = sample(model, noise.to(accelerator.device), {"tokens": tokens}, times=grid(schedule, 25))
        made: Tensor = vae.to(accelerator.device).decode(z / vae.config.scaling_factor).sample
        return torch.cat([as_floats(world.images[:16]).to(made.device), made])

    inputs = {"data": fingerprint([latents, world.tokens])}
    run_stage(stage, phase, batches, accelerator, inputs, VAE_OPTIONS, preview)
    return average


def latent_loss(denoiser: NetworkDenoiser, batch: dict[str, Tensor], rng: Rng) -> dict[str, Tensor]:
    """Return the mean squared error of v at uniform times."""
    errors, t = denoising_errors(
        denoiser, batch["latents"], {"tokens": batch["tokens"]}, times=uniform(0, 1),
        weight=prediction_weight("v"), generator=rng("noise"),
    )  # fmt: skip
    return {"loss": errors.mean(), TIME_NOT_FINITE: time_not_finite(errors, t)}


def new_phase(
    name: str, network: nn.Module, loss: Callable[..., dict[str, Tensor]], learning_rate: float, stage: Config
) -> Phase:
    """Return a phase with AdamW, a cosine schedule to zero and averaged weights."""
    optimizer = adamw(network, learning_rate, betas=(0.9, 0.99), kind=stage.optimizer)
    return Phase(
        name=name, network=network, optimizer=optimizer, loss=loss, ema=EMA(network, stage.ema_decay),
        lr_schedule=cosine(optimizer, stage.steps),
    )  # fmt: skip


def averaged(phase: Phase) -> nn.Module:
    """Return the network whose weights are the moving average."""
    assert phase.ema is not None
    return phase.ema.network


def run_stage(
    stage: Config, phase: Phase, batches: Callable[[Rng], Any], accelerator: Accelerator,
    inputs: dict[str, str], others: tuple[str, ...], preview: Callable[[], Tensor],
) -> None:  # fmt: skip
    """Train one phase to its end from its newest checkpoint.

    The options named in ``others`` may have changed since.
    """
    own = {name: value for name, value in identity(stage, accelerator, inputs).items() if name not in others}
    first = resume(stage, [phase], accelerator, own)
    fit(stage, [phase], batches, accelerator, own=own, first=first, columns=16, preview=preview)


def card(config: Config) -> str:
    """Return the model card, which says how the folder was made."""
    return f"""---
license: apache-2.0
library_name: diffusers
tags: [text-to-image]
---
# The toy world's text-to-image pipeline

Draws rendered solids from captions such as "a red mug on a white background, side view", 64 x 64 pixels.
Trained from nothing by `train_scripts/train_toyworld.py`, seed {config.seed}, on {config.num_images:,} renders:
{config.vae_steps:,} iterations of the autoencoder (batch {config.vae_batch_size}), {config.steps:,} of text
encoder and UNet (batch {config.batch_size}), {config.precision}.
"""


if __name__ == "__main__":
    run(main, Config, __doc__)
