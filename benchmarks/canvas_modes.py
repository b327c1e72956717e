"""SDS and VSD on a mixture in the plane, with the same particles, teacher and number of steps.

    python benchmarks/canvas_modes.py --out docs/canvas_modes.png

SDS moves each particle to the mode in whose basin it started. VSD pushes particles apart by their own score, phi,
and covers the mixture. Phi is computed in closed form (each particle is a narrow Gaussian) or learned by a network
along the way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.metrics import mode_shares
from scorefield.models.networks import ResidualMLP
from scorefield.schedule import VariancePreserving
from scorefield.times import TimeSampler, uniform
from scorefield.training.loop import Phase, train
from sds.canvas import Canvas
from sds.losses import Distillation, distillation_loss, sds, vsd
from sds.vsd import VSD

STD = 0.3
SHARES = torch.tensor([0.1, 0.2, 0.3, 0.4])


@dataclass(frozen=True)
class Config:
    """Options of the experiment."""

    out: Path | None = None
    """Picture to write: true samples, SDS, VSD with phi in closed form, VSD with a learned phi."""
    num_particles: int = 300
    steps: int = 600
    rate: float = 0.03
    """Learning rate of the particles; it falls to zero."""
    bandwidth: float = 0.12
    """Standard deviation of each particle's Gaussian in the closed-form phi."""
    high: float = 0.15
    """Largest time, in [0, 1]. Noise that blurs the modes into one would pull SDS to their middle."""
    learned_high: float = 0.4
    """Largest time for the learned phi, which is inaccurate near t = 0."""
    seed: int = 0


def truth() -> GaussianMixture:
    """Return a mixture of four distant modes of unequal weight."""
    angles = torch.arange(4) * torch.pi / 2
    means = 1.5 * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(means, torch.full((4,), STD), SHARES, VariancePreserving.scaled_linear())


@dataclass(frozen=True)
class Coverage:
    """How particles cover the modes.

    Attributes:
        shares: Share of the particles at each mode.
        spread: Root mean square distance to the nearest mode, divided by the mixture's.
        shift: Largest distance of a cluster's mean from its mode.
    """

    shares: Tensor
    spread: float
    shift: float
    share_error: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "share_error", (self.shares - SHARES).abs().max().item())

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.3f}" for share in self.shares.tolist())
        return f"shares {shares}; spread {self.spread:.2f}; shift {self.shift:.3f}"


def coverage(points: Tensor, mixture: GaussianMixture) -> Coverage:
    """Return how (n, 2) points cover the modes of the mixture."""
    nearest = mixture.component(points)
    inside = points - mixture.means[nearest]
    shift = max(inside[nearest == k].mean(0).norm().item() for k in nearest.unique().tolist())
    return Coverage(mode_shares(points, mixture), inside.square().mean().sqrt().item() / STD, shift)


def _start(config: Config, betas: tuple[float, float]) -> tuple[Canvas, Any, Any]:
    canvas = Canvas.noise((2,), num_particles=config.num_particles, generator=_seeded(config.seed))
    optimizer = torch.optim.Adam(canvas.parameters(), config.rate, betas=betas)
    return canvas, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)


def _descend(
    config: Config, method_for: Callable[[Tensor, TimeSampler], Distillation], betas: tuple[float, float]
) -> Tensor:
    canvas, optimizer, falling = _start(config, betas)
    generator = _seeded(config.seed + 1)
    for _ in range(config.steps):
        optimizer.zero_grad()
        x0 = canvas()
        method = method_for(x0.detach(), uniform(0.02, config.high))
        distillation_loss(method, x0, {}, generator=generator)["loss"].backward()
        optimizer.step()
        falling.step()
    return canvas().detach()


def by_sds(config: Config, mixture: GaussianMixture) -> Tensor:
    """Return the particles after SDS, in which each moves on its own."""
    return _descend(config, lambda x0, times: sds(mixture, times=times), (0.9, 0.999))


def by_vsd(config: Config, mixture: GaussianMixture) -> Tensor:
    """Return the particles after VSD with phi in closed form, from the particles' places."""

    def method(x0: Tensor, times: TimeSampler) -> Distillation:
        widths = torch.full((len(x0),), config.bandwidth)
        return vsd(mixture, GaussianMixture(x0, widths, torch.ones(len(x0)), mixture.schedule), times=times)

    return _descend(config, method, (0.0, 0.99))


def by_learned_vsd(config: Config, mixture: GaussianMixture, accelerator: Accelerator) -> Tensor:
    """Return the particles after VSD with a phi that is a network trained from scratch: two phases of one run."""
    canvas, optimizer, falling = _start(config, (0.0, 0.99))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = ResidualMLP((2,), width=64, depth=2, embedding=32)
    phi = NetworkDenoiser(network, mixture.schedule, "v", 1e-3)
    times = uniform(0.02, config.learned_high)
    method = VSD(teacher=mixture, phi=phi, times=times, phi_times=times)

    def scene_loss(batch: Any, rng: Any) -> dict[str, Tensor]:
        return distillation_loss(method, batch["x0"], batch["cond"], generator=rng("gradient"))

    def rollout(batch: Any, due: tuple[str, ...], rng: Any) -> Any:
        return {"x0": canvas(), "cond": {}}

    phases = [
        Phase(name="scene", network=canvas, optimizer=optimizer, loss=scene_loss, lr_schedule=falling),
        method.phase(torch.optim.AdamW(network.parameters(), 2e-3, betas=(0.0, 0.99))),
    ]
    for _ in train(phases, lambda rng: None, accelerator, steps=config.steps, rollout=rollout, seed=config.seed):
        pass
    return canvas().detach()


def picture(panels: list[Tensor], mixture: GaussianMixture, side: int = 300, reach: float = 2.7) -> Image.Image:
    """Return a picture with a square panel per set of points, drawn over the density of the mixture."""
    axis = torch.linspace(-reach, reach, side)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    density = mixture.log_density(grid, torch.zeros(len(grid))).exp().view(side, side)
    ground = torch.tensor([255.0, 255.0, 255.0]) - (density / density.max()).sqrt()[..., None] * torch.tensor(
        [110.0, 60.0, 10.0]
    )
    sheet = Image.new("RGB", (len(panels) * (side + 10) - 10, side), "white")
    for number, points in enumerate(panels):
        panel = Image.fromarray(ground.byte().numpy())
        draw = ImageDraw.Draw(panel)
        for x, y in ((points + reach) / (2 * reach) * side).tolist():
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(190, 40, 30))
        sheet.paste(panel.transpose(Image.Transpose.FLIP_TOP_BOTTOM), (number * (side + 10), 0))
    return sheet


def main(config: Config) -> dict[str, Coverage]:
    """Run all methods, print and return how they cover the modes, and write the picture if asked."""
    mixture = truth()
    points = {
        "true samples": mixture.sample(config.num_particles, _seeded(config.seed + 3)),
        "SDS": by_sds(config, mixture),
        "VSD, phi in closed form": by_vsd(config, mixture),
        "VSD, phi learned": by_learned_vsd(config, mixture, Accelerator(cpu=True)),
    }
    results = {name: coverage(x, mixture) for name, x in points.items()}
    for name, result in results.items():
        print(f"{name}: {result}")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        picture(list(points.values()), mixture).save(config.out)
    return results


def _seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
