"""Other readings of the same network: what its numbers would mean if its owner had wrapped it differently.

A wrapper says in which units a network knows the data, which schedule its times belong to, and what it predicts. A
mistake in any of these is another reading, and asking for x0 under that reading tells whether it was made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from scorefield.denoiser import Cond, Denoiser, KarrasPreconditioning, NetworkDenoiser
from scorefield.schedule import Images, Karras, Kind, PerSample, Schedule, per_sample

Output = tuple[str, int]
"""What an output means, and its sign: one of x0, eps, v, flow or score, and 1 or -1."""

OUTPUTS: tuple[Output, ...] = tuple((kind, sign) for sign in (1, -1) for kind in (*get_args(Kind), "score"))


def same(x: Tensor) -> Tensor:
    """Return its argument."""
    return x


@dataclass(frozen=True, eq=False)
class Reading:
    """How to ask a network for x0.

    Attributes:
        network: called with noisy data in its own units and a time; what it returns may start a tuple.
        schedule: which time belongs to which noise level.
        told: t of the schedule to what the network is told.
        scale: the network knows ``scale x0 + shift``.
        shift: see ``scale``.
        arrange: the order of the numbers in an image, as the network knows it.
        restore: the inverse of ``arrange``.
        wrapped: the wrapper applies ``scale`` and ``shift`` to x_t itself, but leaves the schedule as it is.
        sigma_data: of EDM's preconditioning, put round the network here; None for none.
        hidden: a sigma_data that the network was wrapped with inside, to be undone first.
    """

    network: Callable[..., Any]
    schedule: Schedule
    told: Callable[[Tensor], Tensor]
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    arrange: Callable[[Tensor], Tensor] = same
    restore: Callable[[Tensor], Tensor] = same
    wrapped: bool = False
    sigma_data: float | None = None
    hidden: float | None = None

    def levels(self, ratio: Tensor) -> Tensor:
        """Noise over data as the network sees it, for noise ``ratio`` on data of our scale."""
        scale = torch.as_tensor(self.scale, dtype=torch.float64, device=ratio.device).abs().mean()
        return ratio.double() * scale

    def knows(self, ratio: Tensor) -> Tensor:
        """Return which of the noise levels the schedule covers, (b,) bool."""
        ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64)
        low, high = self.schedule.ratio(ends).tolist()
        level = self.levels(ratio)
        return (level >= low * 0.999) & (level <= high * 1.001)

    @torch.no_grad()
    def x0(self, noisy: Images, ratio: PerSample, cond: Cond) -> dict[Output, Tensor]:
        """Return the clean image for ``noisy = x0 + ratio eps``, for every meaning that the output could have."""
        known = self.arrange(self.scale * noisy + self.shift)
        level = self.levels(ratio)
        schedule = self.schedule
        t = schedule.snap(schedule.time(level).clamp(schedule.t_min, schedule.t_max))
        if self.sigma_data is not None:
            found = {("x0", 1): self._preconditioned(known, level, t, cond)}
        else:
            x_t = per_sample(schedule.alpha(t), known) * known
            asked = (x_t - self.shift) / self.scale if self.wrapped else x_t
            found = _meanings(self._call(asked, t, cond), x_t, t, schedule)
        return {output: (self.restore(x0) - self.shift) / self.scale for output, x0 in found.items()}

    def _call(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        output = self.network(x_t, self.told(t).to(torch.promote_types(x_t.dtype, torch.float32)), **cond)
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        if first.shape != x_t.shape:
            raise ValueError(f"the network returned {tuple(first.shape)} for x_t {tuple(x_t.shape)}.")
        return first.to(x_t.dtype)

    def _preconditioned(self, known: Images, level: PerSample, t: PerSample, cond: Cond) -> Tensor:
        # arXiv 2206.00364, Table 1. Where the network hides another preconditioning, its inner network is given
        # the same input, and the inner output is solved for.
        assert self.sigma_data is not None
        skip, out, into = (per_sample(c, known) for c in coefficients(level, self.sigma_data))
        if self.hidden is None:
            return skip * known + out * self._call(into * known, t, cond)
        other_skip, other_out, other_into = (per_sample(c, known) for c in coefficients(level, self.hidden))
        asked = into / other_into * known
        return skip * known + out * (self._call(asked, t, cond) - other_skip * asked) / other_out


def coefficients(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of EDM (arXiv 2206.00364, Table 1)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data * total.rsqrt(), total.rsqrt()


def _meanings(output: Tensor, x_t: Images, t: PerSample, schedule: Schedule) -> dict[Output, Tensor]:
    sigma = per_sample(schedule.sigma(t), x_t)
    found: dict[Output, Tensor] = {}
    for kind, sign in OUTPUTS:
        if kind == "score":  # the gradient of log p(x_t): -eps / sigma
            found[kind, sign] = schedule.to_x0(-sign * sigma * output, x_t, t, "eps")
        else:
            found[kind, sign] = schedule.to_x0(sign * output, x_t, t, kind)  # type: ignore[arg-type]
    return found


def declared(denoiser: Denoiser) -> tuple[Reading, Output]:
    """Return the reading that ``denoiser`` has, and its kind of output; anything but a network answers x0."""
    if not isinstance(denoiser, NetworkDenoiser):

        def answer(x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
            return denoiser(x_t, t, cond)

        return Reading(answer, denoiser.schedule, same), ("x0", 1)
    network, scale = denoiser.network, denoiser.time_scale
    if isinstance(network, KarrasPreconditioning) and isinstance(denoiser.schedule, Karras):
        told = c_noise
        return Reading(network.network, denoiser.schedule, told, sigma_data=network.sigma_data), ("x0", 1)
    return Reading(network, denoiser.schedule, lambda t: scale * t), (denoiser.kind, 1)


def c_noise(t: Tensor) -> Tensor:
    """Return what EDM's networks are told of sigma (arXiv 2206.00364, Table 1)."""
    return t.log() / 4
