"""Noise schedules: ``x_t = alpha(t) x0 + sigma(t) eps``, where t always grows with noise.

Everything a method needs from a schedule follows from two functions, ``alpha`` and ``sigma``, and one
inverse, ``time``. EDM, variance-preserving diffusion and rectified flow differ in nothing else, because
E[x0 | x_t] depends only on ``(x_t / alpha, sigma / alpha)``.

Coefficients are computed in float64 and cast to the dtype of the image once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "b *shape"]
PerSample = Float[Tensor, " b"]

Kind = Literal["x0", "eps", "v", "flow"]
"""What a network predicts: x0, eps, ``v = alpha eps - sigma x0`` or ``flow = eps - x0``."""


def check_kind(kind: str) -> None:
    """Raise ``ValueError`` unless ``kind`` is one of x0, eps, v, flow."""
    if kind not in get_args(Kind):
        raise ValueError(
            f"unknown prediction kind {kind!r}; expected one of {', '.join(get_args(Kind))}. "
            "diffusers calls them 'sample' (x0), 'epsilon' (eps) and 'v_prediction' (v)."
        )


def check_time(t: Tensor, x: Tensor) -> None:
    """Raise ``ValueError`` unless ``t`` holds one time for each sample of ``x``: shape (b,)."""
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"t must have shape ({len(x)},) to match x_t {tuple(x.shape)}; got {tuple(t.shape)}. "
            "Pass one time per sample, for example torch.full((len(x_t),), t)."
        )


def per_sample(values: PerSample, x: Images) -> Tensor:
    """Cast ``values`` to the dtype of ``x`` and reshape it so that it multiplies each sample."""
    return values.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


class Schedule(ABC):
    """A forward process x_t = alpha(t) x0 + sigma(t) eps on ``t_min <= t <= t_max``.

    ``alpha``, ``sigma``, ``ratio`` and ``time`` map tensors of any shape to float64 tensors of that shape.
    """

    t_min: float
    t_max: float
    cell: float = 0.0  # width in ``fraction`` of one timestep, for teachers that know only integers

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the clean image at time t, in [0, 1]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """Return time at which sigma / alpha equals ``ratio``: the inverse of :meth:`ratio`."""

    @abstractmethod
    def at(self, fraction: Tensor) -> Tensor:
        """Return time at a fraction in [0, 1] of the schedule's customary spacing, float64.

        Uniform time draws and sampling grids both use it: (integer) timesteps for variance-preserving
        schedules, t itself for flows, Karras et al.'s rho-spaced levels for EDM.
        """

    @abstractmethod
    def initial_std(self, t: Tensor) -> Tensor:
        """Standard deviation of the pure noise a sampler starts from at time t (``init_noise_sigma``)."""

    def snap(self, t: Tensor) -> Tensor:
        """Return the nearest time a teacher of this schedule was trained on: an integer, or t itself."""
        return t.round() if self.cell else t

    def ratio(self, t: Tensor) -> Tensor:
        """``sigma / alpha``, the noise level that Karras et al. call sigma; infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def diffuse(self, x0: Images, noise: Images, t: PerSample) -> Images:
        """Return the noisy image alpha(t) x0 + sigma(t) noise. Raises ``ValueError`` if t is not (b,)."""
        check_time(t, x0)
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * noise

    def to_x0(self, output: Images, x_t: Images, t: PerSample, kind: Kind) -> Images:
        """Clean image from a network output of the given kind, computed in float32 or better.

        Raises ``ValueError`` for an unknown kind, a t that is not (b,), and eps where alpha(t) = 0: pure
        noise says nothing about x0 there.
        """
        check_kind(kind)
        check_time(t, x_t)
        dtype = torch.promote_types(output.dtype, torch.float32)
        output, x_t = output.to(dtype), x_t.to(dtype)
        if kind == "x0":
            return output
        if kind == "eps":
            self._check_positive(self.alpha, t, "alpha", "eps to x0")
        alpha, sigma = per_sample(self.alpha(t), x_t), per_sample(self.sigma(t), x_t)
        if kind == "eps":
            return (x_t - sigma * output) / alpha
        if kind == "v":
            return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
        return (x_t - sigma * output) / (alpha + sigma)

    def from_x0(self, x0: Images, x_t: Images, t: PerSample, kind: Kind) -> Images:
        """Return the network output of the given kind that means ``x0``: the inverse of :meth:`to_x0`.

        Raises ``ValueError`` where sigma(t) = 0 unless kind is x0: no noise can be read off a clean image.
        """
        check_kind(kind)
        check_time(t, x_t)
        if kind == "x0":
            return x0
        self._check_positive(self.sigma, t, "sigma", f"x0 to {kind}")
        alpha, sigma = per_sample(self.alpha(t), x_t), per_sample(self.sigma(t), x_t)
        noise = (x_t - alpha * x0) / sigma
        if kind == "eps":
            return noise
        return alpha * noise - sigma * x0 if kind == "v" else noise - x0

    def _check_positive(self, coefficient, t: Tensor, name: str, what: str) -> None:  # type: ignore[no-untyped-def]
        # Only schedules that reach 0 at an end pay for the comparison (on a GPU it waits for the device).
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64)
        if bool((coefficient(ends) == 0).any()) and bool((coefficient(t) == 0).any()):
            raise ValueError(
                f"{what} is undefined where {name}(t) = 0; got t in [{t.min():g}, {t.max():g}] on {self}. "
                "Stay inside the open interval, or use a network that predicts v, flow or x0."
            )


@dataclass(frozen=True)
class Karras(Schedule):
    """EDM: alpha = 1, sigma = t (Karras et al. 2022, arXiv 2206.00364, Table 1)."""

    t_min: float = 0.002
    t_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.t_min < self.t_max < torch.inf and 0 < self.rho < torch.inf):
            raise ValueError(f"Karras needs 0 < t_min < t_max < inf and 0 < rho < inf; got {self}.")

    def alpha(self, t: Tensor) -> Tensor:
        """One, at every t."""
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        """Return the time itself."""
        return t.double()

    def time(self, ratio: Tensor) -> Tensor:
        """Return the ratio itself."""
        return ratio.double()

    def at(self, fraction: Tensor) -> Tensor:
        """Noise levels equally spaced in sigma^(1/rho) (Eq. 5)."""
        low, high = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        return (low + fraction.double() * (high - low)) ** self.rho

    def initial_std(self, t: Tensor) -> Tensor:
        """Sigma: the data are negligible beside the noise at t_max."""
        return t.double()


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """Straight paths: alpha = 1 - t, sigma = t (Liu et al. 2022, arXiv 2209.03003).

    t = 1 is pure noise, t = 0 is data: the direction diffusers and SD3 use.
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(
                f"RectifiedFlow needs 0 <= t_min < t_max <= 1; got t_min={self.t_min}, t_max={self.t_max}."
            )

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t.double()

    def sigma(self, t: Tensor) -> Tensor:
        """Return the time itself."""
        return t.double()

    def time(self, ratio: Tensor) -> Tensor:
        """Ratio / (1 + ratio), written so that an infinite ratio gives 1."""
        return 1 / (1 + 1 / ratio.double())

    def at(self, fraction: Tensor) -> Tensor:
        """Linear in t; ``times.shifted`` warps it."""
        return self.t_min + fraction.double() * (self.t_max - self.t_min)

    def initial_std(self, t: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class VariancePreserving(Schedule):
    """DDPM: alpha^2 + sigma^2 = 1, t = timestep index in [0, T - 1] as a float (arXiv 2006.11239).

    Between integer timesteps log(sigma / alpha) is interpolated linearly, so ``time`` is an exact inverse.

    Args:
        alphas_cumprod: (T,) the products of 1 - beta, strictly decreasing within (0, 1); the last may be 0
            (zero terminal signal-to-noise), which only t = T - 1 itself reaches.
        integer: the teacher was trained on integer timesteps, so ``at`` rounds to them.
    """

    alphas_cumprod: Float[Tensor, " T"]
    integer: bool = True
    log_ratios: Tensor = field(init=False)
    t_min: float = field(init=False)
    t_max: float = field(init=False)
    cell: float = field(init=False)

    def __post_init__(self) -> None:
        table = torch.as_tensor(self.alphas_cumprod).double().cpu()
        if table.ndim != 1 or len(table) < 2 or not bool((table.diff() < 0).all()):
            raise ValueError(
                f"alphas_cumprod must be a strictly decreasing vector of at least 2; got {tuple(table.shape)}."
            )
        if not (table[0] < 1 and table[-1] >= 0):
            raise ValueError(f"alphas_cumprod must lie in [0, 1); got {table[0]:g} down to {table[-1]:g}.")
        log_ratios = (torch.log1p(-table) - torch.log(table)) / 2
        derived = {"alphas_cumprod": table, "log_ratios": log_ratios, "t_min": 0.0, "t_max": len(table) - 1.0}
        derived["cell"] = 1 / (len(table) - 1) if self.integer else 0.0
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def linear(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """Linear betas (Ho et al. 2020, section 4)."""
        return cls(torch.cumprod(1 - torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64), 0))

    @classmethod
    def scaled_linear(cls, num_steps: int = 1000, beta_start: float = 8.5e-4, beta_end: float = 0.012) -> Self:
        """Betas whose roots are linear: Stable Diffusion's schedule."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64)
        return cls(torch.cumprod(1 - roots**2, 0))

    @classmethod
    def cosine(cls, num_steps: int = 1000, offset: float = 0.008) -> Self:
        """Cosine alphas, betas clipped at 0.999 (Nichol and Dhariwal 2021, arXiv 2102.09672, Eq. 17)."""
        steps = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        bar = torch.cos((steps + offset) / (1 + offset) * torch.pi / 2) ** 2
        return cls(torch.cumprod(1 - (1 - bar[1:] / bar[:-1]).clamp(max=0.999), 0))

    def __repr__(self) -> str:
        low, high = self.log_ratios[[0, -1]].exp().tolist()
        steps = f"{len(self.log_ratios)} {'integer' if self.integer else 'continuous'} steps"
        return f"VariancePreserving({steps}, sigma / alpha {low:.6g} to {high:.6g})"

    def _log_ratio(self, t: Tensor) -> Tensor:
        table = self.log_ratios.to(t.device)
        t = t.double().clamp(0, len(table) - 1)
        low = t.floor().long().clamp(max=len(table) - 2)
        weight = t - low
        high = torch.where(table[low + 1].isinf(), table[low], table[low + 1])
        # An infinite last entry is reached at its own timestep alone, not interpolated towards.
        return torch.where(weight == 1, table[low + 1], table[low] + weight * (high - table[low]))

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(alpha_bar): the root of a sigmoid of twice the log ratio."""
        return torch.sigmoid(-2 * self._log_ratio(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha_bar)."""
        return torch.sigmoid(2 * self._log_ratio(t)).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        """Fractional timestep, by inverse linear interpolation of the log ratio."""
        table = self.log_ratios.to(ratio.device)
        value = ratio.double().log().clamp(table[0], table[-1])
        low = (torch.searchsorted(table, value, right=True) - 1).clamp(0, len(table) - 2)
        weight = (value - table[low]) / (table[low + 1] - table[low])
        return low + torch.where(value == table[low + 1], 1.0, weight)

    def at(self, fraction: Tensor) -> Tensor:
        """Linear in the timestep."""
        return self.snap(fraction.double() * self.t_max)

    def initial_std(self, t: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(t, dtype=torch.float64)
