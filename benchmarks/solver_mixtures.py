"""Solvers and grids on an exact mixture, with and without a network's error: the basis of docs/solvers.md.

    python benchmarks/solver_mixtures.py --error 0.04

Each cell is the sliced Wasserstein distance of 400 samples to the mixture's own, by network calls.
"""

from dataclasses import dataclass, replace
from typing import get_args

import torch
import tyro
from torch import Tensor

from scorefield.denoiser import Cond
from scorefield.exact import GaussianMixture
from scorefield.grids import Spacing
from scorefield.metrics import sliced_wasserstein
from scorefield.sampling import initial_noise, sample
from scorefield.schedule import Karras, Kind, RectifiedFlow, Schedule, VariancePreserving
from scorefield.solvers import Solver, plan

CASES: dict[str, tuple[Schedule, Kind]] = {
    "plain DDPM, eps": (VariancePreserving.linear(), "eps"),
    "Stable Diffusion, eps": (VariancePreserving.scaled_linear(), "eps"),
    "EDM": (Karras(), "x0"),
    "flow": (RectifiedFlow(), "flow"),
}
SOLVERS: tuple[Solver, ...] = ("ddim", "heun", "dpm++", "unipc")


@dataclass(frozen=True)
class Imperfect:
    """A mixture with the error of a network that predicts ``kind``: ``error`` in the network's own output."""

    mixture: GaussianMixture
    kind: Kind
    error: float

    @property
    def schedule(self) -> Schedule:
        """The mixture's schedule."""
        return self.mixture.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return E[x0 | x_t] plus a wave of x_t and the noise level, added in the network's output."""
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        scale = {
            "eps": sigma / alpha,
            "flow": sigma / (alpha + sigma),
            "x0": 0.7 * sigma / (sigma**2 + 0.5).sqrt(),
        }
        mixing = 2 * torch.randn(2, 2, generator=torch.Generator().manual_seed(5)).double()
        phase = 2 * (sigma / (alpha + 1e-3)).log() + torch.tensor([0.0, 1.0])
        wave = torch.sin(x_t / (alpha**2 / 2 + sigma**2).sqrt() @ mixing + phase)
        return self.mixture(x_t, t, cond) + self.error * scale[self.kind] * wave


@dataclass(frozen=True)
class Config:
    """Options of the measurement."""

    error: float = 0.0
    """Error of the network's output, which has about unit scale."""
    calls: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10, 15, 20, 50)
    """Network calls; a column each."""


@torch.no_grad()
def main(config: Config) -> None:
    means = 0.6 * torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.6], [0.4, -1.0]], dtype=torch.float64)
    mixture = GaussianMixture(means, torch.tensor([0.05, 0.15, 0.1, 0.1]), torch.ones(4), Karras())
    true = mixture.sample(400, torch.Generator().manual_seed(3)).double()
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, (schedule, kind) in CASES.items():
        denoiser = Imperfect(replace(mixture, schedule=schedule), kind, config.error)
        print(f"\n| {name} | {' | '.join(map(str, config.calls))} |\n{'|---' * (1 + len(config.calls))}|")
        for spacing in get_args(Spacing):
            for solver in SOLVERS:
                cells = [distance(denoiser, noise, true, solver, spacing, calls) for calls in config.calls]
                print(f"| {solver}, {spacing} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)


def distance(
    denoiser: Imperfect, noise: Tensor, true: Tensor, solver: Solver, spacing: Spacing, calls: int
) -> float:
    """Return one cell."""
    chosen = plan(denoiser.schedule, calls, solver, spacing)
    x_t = initial_noise(denoiser.schedule, noise, float(chosen.times[0]))
    made = sample(denoiser, x_t, {}, times=chosen.times, step=chosen.step)
    return sliced_wasserstein(made, true, generator=torch.Generator().manual_seed(0), num_projections=30)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
