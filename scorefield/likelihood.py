"""Exact likelihoods by the probability-flow ODE (Song et al. 2020, arXiv 2011.13456, section 4.3 and D.2).

In y = x_t / alpha against r = sigma / alpha the flow is dy/dr = (y - x0(y, r)) / r on every schedule, so along it
d log p(y) / d log r = -div(y - x0). The divergence is exact, one backward pass for each number of a sample, or
Hutchinson's estimate from random signs (arXiv 1810.01367), which is unbiased.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from scorefield.denoiser import Cond, Denoiser
from scorefield.randomness import Generators, normal_like
from scorefield.schedule import Images, PerSample, Schedule, per_sample

RATIOS = (1e-3, 200.0)
"""Noise levels sigma / alpha beyond which nothing is integrated, for schedules that reach 0 or infinity."""


@torch.no_grad()
def flow_log_density(
    denoiser: Denoiser, x: Images, cond: Cond, *, num_steps: int = 100, num_probes: int = 0,
    ratios: tuple[float, float] | None = None, generator: Generators | None = None,
) -> PerSample:  # fmt: skip
    """Return log p(x | cond) in nats, (b,), under the model's probability flow.

    ``x`` is taken for a sample at the lowest noise level, so the density is that of the data with that noise. At
    the highest one the prior is N(0, sigma^2), which data far from mean 0 miss by about mean / ratio. A teacher of
    integer timesteps is asked between them, where its embedding of t interpolates.

    Args:
        denoiser: guided or not: guidance has a flow, too, but its density is no Bayes posterior.
        x: (b, *shape).
        cond: conditioning, batch b.
        num_steps: of the classical Runge-Kutta method, even in log ratio; four network calls each.
        num_probes: random signs a sample for Hutchinson's estimate; 0 is the exact divergence.
        ratios: lowest and highest noise level; by default all of the schedule within :data:`RATIOS`.
        generator: for the signs, which stay the same along the flow.

    Raises:
        ValueError: not 0 < lowest < highest, no step, or a negative number of probes.
    """
    schedule = denoiser.schedule
    low, high = _range(schedule) if ratios is None else ratios
    if not 0 < low < high < math.inf or num_steps < 1 or num_probes < 0:
        raise ValueError(
            f"flow_log_density needs 0 < lowest < highest ratio, num_steps >= 1 and num_probes >= 0; got "
            f"{(low, high)}, {num_steps}, {num_probes}."
        )
    probes = [normal_like(x, generator).sign() for _ in range(num_probes)]

    def slope(u: float, y: Tensor) -> tuple[Tensor, Tensor]:
        t, alpha = _time(schedule, math.exp(u), y)
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            velocity = y - denoiser(per_sample(alpha, y) * y, t, cond).to(y.dtype)
            divergence = _divergence(velocity, y, probes)
        return velocity.detach(), divergence

    first, last = math.log(low), math.log(high)
    step = (last - first) / num_steps
    y, change = x / per_sample(_time(schedule, low, x)[1], x), x.new_zeros(len(x))
    for number in range(num_steps):
        u = first + number * step
        v1, d1 = slope(u, y)
        v2, d2 = slope(u + step / 2, y + step / 2 * v1)
        v3, d3 = slope(u + step / 2, y + step / 2 * v2)
        v4, d4 = slope(u + step, y + step * v3)
        y = y + step / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        change = change + step / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    size = x[0].numel()
    # log p(y) at the highest level, under N(0, ratio^2); then back along the flow, and from y to x = alpha y.
    prior = -y.flatten(1).square().sum(1) / (2 * high**2) - size * math.log(high * math.sqrt(2 * math.pi))
    return prior + change - size * _time(schedule, low, x)[1].log().to(x)


def dequantised(images: Images, generator: Generators, levels: int = 256) -> Tensor:
    """Return images of ``levels`` values in [-1, 1], each moved to a random place in its cell of width 2 / levels.

    A density of the result is below the probability of the levels times (levels / 2)^d (arXiv 1511.01844): see
    :func:`bits_per_dim`.
    """
    normal = normal_like(images, generator)
    return ((images + 1) * (levels - 1) / 2 + torch.special.ndtr(normal)) * 2 / levels - 1


def bits_per_dim(log_density: PerSample, x: Images, levels: int = 256) -> PerSample:
    """Return bits per dimension, (b,), of images of ``levels`` values, from a log density of them dequantised."""
    return math.log2(levels / 2) - log_density / (x[0].numel() * math.log(2))


def _range(schedule: Schedule) -> tuple[float, float]:
    ends = schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    return max(ends[0], RATIOS[0]), min(ends[1], RATIOS[1])


def _time(schedule: Schedule, ratio: float, x: Tensor) -> tuple[Tensor, Tensor]:
    t = schedule.time(torch.full((len(x),), ratio, dtype=torch.float64, device=x.device))
    t = t.clamp(schedule.t_min, schedule.t_max)
    return t, schedule.alpha(t)


def _divergence(velocity: Tensor, y: Tensor, probes: list[Tensor]) -> Tensor:
    total = velocity.new_zeros(len(y))
    for probe in probes or _axes(y):
        (product,) = torch.autograd.grad(velocity, y, probe, retain_graph=True)
        total = total + (product * probe).flatten(1).sum(1)
    return total / (len(probes) or 1)


def _axes(y: Tensor) -> Iterator[Tensor]:
    # One at a time: all together would be as large as a Jacobian.
    for number in range(y[0].numel()):
        axis = torch.zeros_like(y).flatten(1)
        axis[:, number] = 1
        yield axis.view_as(y)
