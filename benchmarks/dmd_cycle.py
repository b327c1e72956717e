"""Seconds and memory of one DMD2 cycle: bare network passes, this library, and the practice of other trainers.

    python benchmarks/dmd_cycle.py --network mlp --batch 64 --out runs/cycle.json

A cycle is --student-every iterations, of which the last updates the student, too. The contenders take turns. Each
line of the second table is the median over the rounds of a ratio. Ratios are printed only if all contenders start
from the same gradients. That is checked in float64, where rounding cannot hide a difference in mathematics.
"""

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from contenders import Setup, bare, ours, trained
from diffusers import UNet2DModel
from fastgen import fastgen
from measure import Ratio, peak_bytes, ratio, saved_bytes, take_turns
from official import official
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distill.adversarial import Critic, discriminator_head
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.models.networks import ResidualMLP
from scorefield.schedule import VariancePreserving

NUM_CLASSES = 10
TOLERANCE = 1e-5
RATIOS = {
    "ours / bare": "<= 1.10",
    "ours / bare + AdamW": "",
    "official / ours": ">= 1.30",
    "fastgen / ours": ">= 1.15",
    "ours, GAN / ours": "<= 1.25",
    "official, GAN / ours, GAN": ">= 1.30",
    "ours / ours, compiled": "",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time one cycle of DMD2 against bare passes and the practice of other trainers."""

    network: Literal["mlp", "unet"] = "mlp"
    """mlp: ResidualMLP on 8 x 8 images. unet: UNet2DModel of diffusers on 32 x 32 images."""
    batch: int = 64
    """Images per iteration."""
    width: int = 512
    """Width of the MLP."""
    depth: int = 6
    """Blocks of the MLP."""
    channels: tuple[int, ...] = (32, 64, 64)
    """Channels of the UNet, one number per resolution."""
    student_every: int = 5
    """Iterations per cycle: fake-score updates per student update."""
    guidance: float = 2.0
    """Scale of the teacher's guidance in every contender; 1 means none."""
    rounds: int = 9
    """Measured cycles of each contender."""
    warmup: int = 2
    """Cycles of each contender before the measured ones."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: Literal["no", "bf16"] = "no"
    """Autocast precision; weights stay float32."""
    compile: bool = False
    """Also measure this library with compiled networks."""
    clock: Literal["wall", "process"] = "wall"
    """process counts seconds of processor time, for one thread on a machine that is shared. CPU only."""
    out: Path | None = None
    """File for the result as JSON."""


def main(config: Config) -> dict[str, Any]:
    """Check, measure and print; also write the result to ``--out``."""
    if config.rounds < 1 or config.warmup < 0 or config.batch < 1:
        raise ValueError(
            "--rounds and --batch must be at least 1 and --warmup at least 0; got "
            f"{config.rounds}, {config.batch} and {config.warmup}."
        )
    if config.clock == "process" and config.device != "cpu":
        raise ValueError("--clock process does not measure a GPU; use --clock wall, or --device cpu.")
    errors = gradient_errors(config)
    if not max(errors.values()) <= TOLERANCE:
        raise ValueError(f"the contenders do not compute the same gradients, relative errors {errors}.")
    result = {
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gradient_errors": errors,
        **measure(config),
    }
    show(result)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(result, indent=2))
    return result


def make_setup(config: Config, *, gan: bool, compiled: bool = False) -> Setup:
    """Return teacher, student and fake score with weights of their own, the same at each call."""
    device, shape = torch.device(config.device), (1, 8, 8) if config.network == "mlp" else (1, 32, 32)
    schedule, scale = VariancePreserving.linear(), 1e-3 if config.network == "mlp" else 1.0
    networks = [make_network(config, seed).to(device) for seed in range(3)]
    freeze(networks[0])
    if gan:
        networks[2] = make_critic(config, networks[2]).to(device)
    if compiled:
        for network in networks:
            network.compile()
    teacher, student, fake = (NetworkDenoiser(network, schedule, "eps", scale) for network in networks)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(NUM_CLASSES, (config.batch,), generator=generator).to(device)
    real = torch.randn(config.batch, *shape, generator=generator).clamp(-1, 1).to(device)
    return Setup(
        teacher=teacher, student=student, fake=fake, guidance=config.guidance, student_every=config.student_every,
        batch={"cond": {"class_labels": labels}, "real": real}, precision=config.precision,
        null={"class_labels": torch.full((1,), NUM_CLASSES, device=device)},
    )  # fmt: skip


def make_network(config: Config, seed: int) -> nn.Module:
    """Return a class-conditional network with perturbed weights.

    A fresh one returns zeros, and then all gradients are zero.
    """
    torch.manual_seed(seed)
    network: Any
    if config.network == "mlp":
        network = ResidualMLP((1, 8, 8), NUM_CLASSES, width=config.width, depth=config.depth)
    else:
        levels = len(config.channels)
        network = UNet2DModel(
            sample_size=32, in_channels=1, out_channels=1, block_out_channels=config.channels,
            down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=math.gcd(32, *config.channels), num_class_embeds=NUM_CLASSES + 1,
        )  # fmt: skip
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def make_critic(config: Config, network: nn.Module) -> nn.Module:
    """Return a critic at the bottleneck."""
    torch.manual_seed(4)
    if isinstance(network, ResidualMLP):
        return Critic(network, network.bottleneck, discriminator_head(config.width))
    return Critic(network, "mid_block", discriminator_head(config.channels[-1], 32 >> (len(config.channels) - 1)))


def start(name: str, setup: Setup, accelerator: Accelerator) -> Iterator[Any]:
    """Return the contender's training at its first iteration."""
    kind = name.split(",")[0]
    if kind == "ours":
        return ours(setup, accelerator)
    if kind.startswith("bare"):
        return bare(setup, optimise=kind != "bare")
    return official(setup) if kind == "official" else fastgen(setup)


def gradient_errors(config: Config) -> dict[str, float]:
    """Return the relative distance of each contender's first gradients of student and fake score from ours."""
    small = dataclasses.replace(config, student_every=1, precision="no", batch=min(config.batch, 8))
    # One process has one mixed precision; this switches it off for the check.
    accelerator = make_accelerator(config, AutocastKwargs(enabled=False))
    errors = {}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for gan, others in ((False, ("official", "fastgen")), (True, ("official",))):
            expected = first_gradients(small, "ours", gan, accelerator)
            for name in others:
                found = first_gradients(small, name, gan, accelerator)
                for role, gradient in expected.items():
                    error = (found[role] - gradient).norm() / gradient.norm()
                    errors[f"{name}{', GAN' if gan else ''}: {role}"] = float(error)
    finally:
        torch.set_default_dtype(default)
    return errors


def first_gradients(config: Config, name: str, gan: bool, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return clipped gradients of student and fake score, as their optimisers see them in the first iteration."""
    setup = make_setup(config, gan=gan)
    first = [id(next(one.network.parameters())) for one in trained(setup)]
    found: dict[str, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = optimizer.param_groups[0]["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found[("student", "fake")[first.index(id(parameters[0]))]] = torch.cat(
            [gradient.flatten() for gradient in gradients]
        ).clone()

    hook = register_optimizer_step_pre_hook(keep)
    try:
        next(start(name, setup, accelerator))
    finally:
        hook.remove()
    return found


def make_accelerator(config: Config, *handlers: AutocastKwargs) -> Accelerator:
    return Accelerator(
        cpu=config.device == "cpu", mixed_precision=config.precision, kwargs_handlers=list(handlers)
    )


def measure(config: Config) -> dict[str, Any]:
    """Return seconds, bytes and ratios of all contenders."""
    names = ["bare", "bare + AdamW", "ours", "official", "fastgen", "ours, GAN", "official, GAN"]
    names += ["ours, compiled"] if config.compile else []
    accelerator, device = make_accelerator(config), torch.device(config.device)
    setups = {name: make_setup(config, gan="GAN" in name, compiled="compiled" in name) for name in names}
    running = {name: start(name, setups[name], accelerator) for name in names}
    clock: Callable[[], float] = time.perf_counter if config.clock == "wall" else time.process_time
    seconds = take_turns(
        running, iterations=config.student_every, rounds=config.rounds, warmup=config.warmup, device=device,
        clock=clock,
    )  # fmt: skip
    saved, peak = {}, {}
    for name, contender in running.items():
        networks = [one.network for one in (setups[name].teacher, *trained(setups[name]))]
        saved[name] = saved_bytes(contender, config.student_every, networks)
        peak[name] = peak_bytes(contender, config.student_every, device)
    pairs = {name: name.split(" / ") for name in RATIOS if set(name.split(" / ")) <= seconds.keys()}
    ratios = {name: ratio(seconds[a], seconds[b]) for name, (a, b) in pairs.items()}
    return {
        "seconds": seconds,
        "saved_bytes": saved,
        "peak_bytes": peak,
        "ratios": {name: dataclasses.asdict(value) for name, value in ratios.items()},
    }


def show(result: dict[str, Any]) -> None:
    """Print both tables."""
    print(f"largest relative error of a first gradient: {max(result['gradient_errors'].values()):.1e}")
    print(f"threads: {result['threads']}\n\n{'one cycle':28} {'ms':>10} {'saved MiB':>10} {'peak MiB':>10}")
    for name, seconds in result["seconds"].items():
        saved, peak = result["saved_bytes"][name] / 2**20, result["peak_bytes"][name]
        top = "" if peak is None else f"{peak / 2**20:.1f}"
        print(f"{name:28} {1e3 * statistics.median(seconds):10.1f} {saved:10.1f} {top:>10}")
    print(f"\n{'ratio':28} {'median':>10} {'low':>10} {'high':>10}   goal")
    for name, values in result["ratios"].items():
        found = Ratio(**values)
        print(f"{name:28} {found.median:10.2f} {found.low:10.2f} {found.high:10.2f}   {RATIOS[name]}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
