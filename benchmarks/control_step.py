"""Images per second and memory of training an adapter: this library against the usual practice of other trainers.

    python benchmarks/control_step.py --out runs/control.json

The networks are those of the toy world, with random weights. The other loop does what diffusers'
train_controlnet.py does: it encodes images and prompts in each step, recomputes activations in the adapter alone,
updates by an AdamW that is not fused, and reads the loss off the device in each step. Ratios are printed only if
both compute the same losses, which is checked in float64. With --configs, the operations of a step are counted at
the size of public models.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from measure import Ratio, peak_bytes, ratio, saved_bytes, take_turns
from teachers import as_codec, build, meta_cond, operations
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from controlnet.adapter import ControlledDenoiser, copy_encoder, unet_of
from controlnet.training import adamw, compile_lightly, control_phase, lighten
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.models.networks import DiffusersNetwork
from scorefield.randomness import Rng, normal_like
from scorefield.schedule import VariancePreserving
from scorefield.times import uniform
from scorefield.training.loop import train
from toyworld.parts import LENGTH, SIZE, make_text_encoder, make_unet, make_vae

VOCABULARY, LEARNING_RATE, CLIP_NORM = 256, 1e-5, 1.0
NAMES = ("diffusers", "ours", "ours, one level", "ours, hint alone", "ours, nothing recomputed")
COMPILED = "ours, compiled"
LEVELS = {"ours, one level": 1, "ours, hint alone": 0}
TOLERANCE, COMPILED_TOLERANCE = 1e-9, 1e-6  # compiled code computes the sines of t otherwise, in float32
GOALS = {"time": ">= 1.50", "saved bytes": "<= 0.70"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time a training step of an adapter against the usual practice of other trainers."""

    batch: int = 8
    """Images per step."""
    rounds: int = 9
    """Measured turns of each contender."""
    steps: int = 2
    """Steps per turn."""
    warmup: int = 2
    """Turns of each contender before the measured ones."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision. bf16 also casts the frozen networks, for all contenders."""
    clock: Literal["wall", "process"] = "wall"
    """process counts seconds of processor time, for one thread on a machine that is shared. CPU only."""
    compile: bool = False
    """Add a compiled form of this library; compiling takes minutes, twice."""
    activation_budget: float = 0.6
    """Share of activations that the compiled form keeps."""
    configs: Path | None = None
    """Folder of JSON files with the constructor arguments of sd15_unet, sd_vae, sdxl_unet and sdxl_vae."""
    out: Path | None = None
    """File for the result as JSON."""


@dataclass(frozen=True, eq=False)
class Setup:
    """Networks of one contender, with weights of their own, and the batch that all of them learn.

    Attributes:
        vae: Frozen, like the next two.
        text_encoder: Encodes the prompts.
        base: The model under control.
        adapter: The network that is trained.
        images: (b, 3, h, w) in [-1, 1].
        hint: (b, 1, h, w) in [0, 1].
        tokens: (b, length).
    """

    vae: Any
    text_encoder: Any
    base: NetworkDenoiser
    adapter: Any
    images: Tensor
    hint: Tensor
    tokens: Tensor


def main(config: Config) -> dict[str, Any]:
    """Check, measure and print; also write the result to ``--out``."""
    if config.rounds < 1 or config.warmup < 0 or config.batch < 1 or config.steps < 1:
        raise ValueError(
            "--rounds, --batch and --steps must be at least 1 and --warmup at least 0; got "
            f"{config.rounds}, {config.batch}, {config.steps} and {config.warmup}."
        )
    if not 0 < config.activation_budget <= 1:
        raise ValueError(f"--activation-budget must lie in (0, 1]; got {config.activation_budget}.")
    if config.clock == "process" and config.device != "cpu":
        raise ValueError("--clock process does not measure a GPU; use --clock wall, or --device cpu.")
    errors = loss_errors(config)
    for name, error in errors.items():
        if not error <= (COMPILED_TOLERANCE if name == COMPILED else TOLERANCE):
            raise ValueError(f"{name!r} does not compute the losses of 'diffusers', relative error {error:g}.")
    sizes = {} if config.configs is None else SIZES
    result = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "loss_errors": errors, **measure(config),
        "gflop": {name: work(config.configs, *parts) for name, parts in sizes.items() if config.configs},
    }  # fmt: skip
    show(config, result)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=2))
    return result


def make_setup(config: Config, dtype: torch.dtype = torch.float32) -> Setup:
    """Return the same weights and data at each call. Zero convolutions are not zero, as after a few steps."""
    torch.manual_seed(0)
    device = torch.device(config.device)
    vae, text_encoder, unet = make_vae(), make_text_encoder(VOCABULARY), make_unet()
    frozen = torch.bfloat16 if config.precision == "bf16" else dtype
    base = NetworkDenoiser(DiffusersNetwork(unet), VariancePreserving.scaled_linear(), "v")
    adapter = copy_encoder(base, hint_channels=1, factor=4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for network in (vae, text_encoder, base.network):
        freeze(network, frozen).to(device)
    images = torch.rand(config.batch, 3, SIZE, SIZE).to(dtype) * 2 - 1
    hint = (torch.rand(config.batch, 1, SIZE, SIZE) < 0.1).to(dtype)
    tokens = torch.randint(VOCABULARY, (config.batch, LENGTH))
    placed = (tensor.to(device) for tensor in (images, hint, tokens))
    return Setup(vae, text_encoder, base, adapter.to(device, dtype), *placed)


def diffusers(config: Config, setup: Setup) -> Iterator[float]:
    """Run a step as train_controlnet.py does, with this library's draws of times and noise."""
    base, schedule = unet_of(setup.base), setup.base.schedule
    setup.adapter.model.enable_gradient_checkpointing()
    # As in diffusers' own ControlNet; this library's embedding of the hint could recompute as well.
    setup.adapter.model.controlnet_cond_embedding.gradient_checkpointing = False
    optimizer = torch.optim.AdamW(setup.adapter.parameters(), LEARNING_RATE)
    device_type = torch.device(config.device).type
    for step in count():
        with torch.autocast(device_type, torch.bfloat16, enabled=config.precision == "bf16"):
            latents = posterior(setup, step) * setup.vae.config.scaling_factor
            generator = Rng(0, step)("noise")
            t = uniform(0.0, 1.0)(len(latents), schedule, generator).to(latents.device)
            noise = normal_like(latents, generator)
            x_t = schedule.diffuse(latents, noise, t)
            states = setup.text_encoder(input_ids=setup.tokens).last_hidden_state
            dtype = next(base.parameters()).dtype
            down, mid = setup.adapter.model(
                x_t, t, encoder_hidden_states=states.to(x_t.dtype), controlnet_cond=setup.hint, return_dict=False
            )
            output = base(
                x_t.to(dtype), t, encoder_hidden_states=states.to(dtype), return_dict=False,
                down_block_additional_residuals=[value.to(dtype) for value in down],
                mid_block_additional_residual=mid.to(dtype),
            )[0]  # fmt: skip
            target = schedule.from_x0(latents, x_t, t, "v").to(latents.dtype)
            loss = nn.functional.mse_loss(output.to(target.dtype), target)
        loss.backward()
        nn.utils.clip_grad_norm_(setup.adapter.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach().item()


def ours(
    config: Config, setup: Setup, accelerator: Accelerator, recompute: bool = True, levels: int | None = None,
    compiled: bool = False,
) -> Iterator[float]:  # fmt: skip
    """Run this library: posteriors and text states from a cache, fused updates; see :func:`lighten`."""
    for network in (setup.base.network, setup.adapter):
        lighten(network, recompute=recompute, levels=levels)
        if compiled:
            compile_lightly(network, config.activation_budget)
    with torch.no_grad():
        cached = setup.vae.encode(setup.images.to(setup.vae.dtype)).latent_dist
        states = setup.text_encoder(input_ids=setup.tokens).last_hidden_state
    mean, std = cached.mean.to(setup.images), cached.std.to(setup.images)

    def batches(rng: Rng) -> dict[str, Any]:
        x0 = (mean + std * draw(mean, rng.step)) * setup.vae.config.scaling_factor
        return {"x0": x0, "hint": setup.hint, "cond": {"encoder_hidden_states": states}}

    controlled = ControlledDenoiser(setup.base, setup.adapter)
    phase = control_phase(controlled, adamw(setup.adapter, LEARNING_RATE))
    for report in train([phase], batches, accelerator, steps=10**9, clip_norm=CLIP_NORM):
        yield report.metrics["control/loss"]  # type: ignore[misc]


def posterior(setup: Setup, step: int) -> Tensor:
    """Return a sample of the encoder's Gaussian, unscaled."""
    cached = setup.vae.encode(setup.images.to(setup.vae.dtype)).latent_dist
    mean = cached.mean.to(setup.images)
    return mean + cached.std.to(mean) * draw(mean, step)


def draw(mean: Tensor, step: int) -> Tensor:
    return normal_like(mean, Rng(0, step)("posterior"))


def start(name: str, config: Config, setup: Setup, accelerator: Accelerator) -> Iterator[float]:
    """Return the contender's training at its first step."""
    if name == "diffusers":
        return diffusers(config, setup)
    recompute = name not in (COMPILED, "ours, nothing recomputed")
    return ours(config, setup, accelerator, recompute, LEVELS.get(name), compiled=name == COMPILED)


def contenders(config: Config) -> list[str]:
    return [*NAMES, *([COMPILED] if config.compile else [])]


def loss_errors(config: Config, steps: int = 3) -> dict[str, float]:
    """Return the largest relative differences from diffusers' first losses, in float64, with updates between."""
    small = dataclasses.replace(config, batch=min(config.batch, 2), precision="no")
    accelerator = make_accelerator(small)
    runs = {}
    for name in contenders(config):
        running = start(name, small, make_setup(small, torch.float64), accelerator)
        runs[name] = torch.tensor([float(next(running)) for _ in range(steps)], dtype=torch.float64)
    theirs = runs.pop("diffusers")
    return {name: float(((run - theirs) / theirs).abs().max()) for name, run in runs.items()}


def make_accelerator(config: Config) -> Accelerator:
    return Accelerator(cpu=config.device == "cpu", mixed_precision=config.precision)


def measure(config: Config) -> dict[str, Any]:
    """Return seconds, bytes and ratios of all contenders."""
    accelerator, device = make_accelerator(config), torch.device(config.device)
    setups = {name: make_setup(config) for name in contenders(config)}
    running = {name: start(name, config, setups[name], accelerator) for name in setups}
    seconds = take_turns(
        running, iterations=config.steps, rounds=config.rounds, warmup=config.warmup, device=device,
        clock=time.perf_counter if config.clock == "wall" else time.process_time,
    )  # fmt: skip
    saved, peak = {}, {}
    for name, contender in running.items():
        networks = [setups[name].base.network, setups[name].adapter, setups[name].vae, setups[name].text_encoder]
        saved[name] = saved_bytes(contender, config.steps, networks)
        peak[name] = peak_bytes(contender, config.steps, device)
    ratios = {
        name: dataclasses.asdict(ratio(seconds["diffusers"], seconds[name]))
        for name in setups
        if name != "diffusers"
    }
    return {"seconds": seconds, "saved_bytes": saved, "peak_bytes": peak, "speedups": ratios}


SIZES = {"SD 1.5, 512 px": ("sd15_unet", "sd_vae"), "SDXL, 1024 px": ("sdxl_unet", "sdxl_vae")}


def work(configs: Path, unet: str, vae: str) -> dict[str, float]:
    """Return GFLOP per image, forward and backward, at the size of a public model, counted on the meta device."""
    base = NetworkDenoiser(DiffusersNetwork(build(configs, unet)), VariancePreserving.scaled_linear())
    settings: Any = unet_of(base).config
    side, cond = int(settings.sample_size), meta_cond(settings, 77)
    adapter, codec = copy_encoder(base), as_codec(build(configs, vae))
    phase = control_phase(ControlledDenoiser(base, adapter), torch.optim.SGD(adapter.parameters(), 1.0))
    hint = torch.zeros(1, 3, 8 * side, 8 * side, device="meta")
    batch = {"x0": torch.zeros(1, 4, side, side, device="meta"), "hint": hint, "cond": cond}

    def step() -> float:
        with FlopCounterMode(display=False) as counter:
            phase.loss(batch, Rng(0, 0))["loss"].backward()
        return counter.get_total_flops() / 1e9

    counted = {"nothing recomputed": step()}
    for name, levels in (("hint alone", 0), ("one level", 1), ("all", None)):
        for network in (base.network, adapter):
            lighten(network, levels=levels, channels_last=False)
        counted[name] = step()
    counted["encoding the image"] = operations(lambda: codec.encode(hint)) / 1e9
    return counted


def show(config: Config, result: dict[str, Any]) -> None:
    """Print the tables."""
    apart = ", ".join(f"{name} {error:.1e}" for name, error in result["loss_errors"].items())
    print(f"relative difference of the losses from diffusers': {apart}; threads: {result['threads']}\n")
    print(f"{'':26} {'images/s':>9} {'faster by':>22} {'saved MiB':>10} {'of theirs':>10} {'peak MiB':>9}")
    theirs = result["saved_bytes"]["diffusers"]
    for name, seconds in result["seconds"].items():
        speed = config.steps * config.batch / statistics.median(seconds)
        found = Ratio(**result["speedups"].get(name, {"median": 1, "low": 1, "high": 1}))
        faster = f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"
        saved, peak = result["saved_bytes"][name], result["peak_bytes"][name]
        top = "" if peak is None else f"{peak / 2**20:.0f}"
        print(f"{name:26} {speed:9.2f} {faster:>22} {saved / 2**20:10.1f} {saved / theirs:10.2f} {top:>9}")
    print(f"\ngoals of ours: {', '.join(f'{name} {goal}' for name, goal in GOALS.items())}")
    for size, counted in result["gflop"].items():
        listed = ", ".join(f"{name} {value:,.0f}" for name, value in counted.items())
        print(f"GFLOP of one image, {size}: {listed}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
