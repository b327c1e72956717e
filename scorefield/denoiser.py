"""The lingua franca: a denoiser maps a noisy image to the clean image it expects, E[x0 | x_t].

A network of any prediction kind, a Gaussian mixture, a guided or a ControlNet teacher are all the same
thing to the methods built on this package: ``denoiser(x_t, t, cond) -> x0``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scorefield.schedule import Images, Karras, Kind, PerSample, Schedule, check_kind, check_time, per_sample

Cond = Mapping[str, Tensor]
"""Conditioning by the network's own keyword names, each tensor with the batch in front."""


class Denoiser(Protocol):
    """Anything with a schedule that maps (x_t, t, cond) to E[x0 | x_t]."""

    @property
    def schedule(self) -> Schedule:
        """The forward process whose x_t and t this denoiser understands."""

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the expected clean image, shape of x_t; t holds one time per sample."""


@dataclass(frozen=True, eq=False)
class NetworkDenoiser:
    """A network of a given prediction kind as a :class:`Denoiser`.

    Args:
        network: called as ``network(x_t, time_scale * t, **cond)``; returns a tensor or anything whose
            first item is that tensor (a tuple, a diffusers output).
        schedule: the forward process the network was trained on.
        kind: what the network predicts: x0, eps, v or flow.
        time_scale: 1000 for flow networks that were trained on t in [0, 1000], such as SD3.
    """

    network: nn.Module
    schedule: Schedule
    kind: Kind = "eps"
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the expected clean image, float32 or better. Raises ``ValueError`` if t is not (b,)."""
        return self.with_extras(x_t, t, cond)[0]

    def with_extras(self, x_t: Images, t: PerSample, cond: Cond) -> tuple[Tensor, tuple[Any, ...]]:
        """x0 and whatever else the same forward pass returned, such as a critic's logits."""
        check_time(t, x_t)
        dtype = torch.promote_types(x_t.dtype, torch.float32)  # bf16 cannot tell timestep 998 from 1000
        output = self.network(x_t, self.time_scale * t.to(dtype), **cond)
        prediction = output if isinstance(output, Tensor) else output[0]
        extras = output[1:] if isinstance(output, tuple) else ()
        if prediction.shape != x_t.shape:
            raise ValueError(
                f"the network must return the shape of x_t {tuple(x_t.shape)}; got {tuple(prediction.shape)}. "
                "Split off a variance head before wrapping the network."
            )
        return self.schedule.to_x0(prediction, x_t, t, self.kind), tuple(extras)

    def unwrapped(self) -> "NetworkDenoiser":
        """Return the same without wrappers: for calls that are not part of this network's own training step."""
        return replace(self, network=unwrap(self.network))


class KarrasPreconditioning(nn.Module):
    """EDM preconditioning round a raw network: forward(x_t, sigma) -> x0 (arXiv 2206.00364, Eq. 7, Table 1).

    The result predicts x0: wrap it as ``NetworkDenoiser(KarrasPreconditioning(net), Karras(), "x0")``.

    Args:
        network: called as ``network(c_in x_t, c_noise, **cond)`` with c_noise = log(sigma) / 4.
        sigma_data: standard deviation of the data.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data

    def forward(self, x_t: Images, sigma: PerSample, **cond: Tensor) -> Any:
        """x0, or a tuple that starts with x0 if the network returns a tuple."""
        total = sigma**2 + self.sigma_data**2
        c_skip, c_out, c_in = (self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt(), total.rsqrt())
        output = self.network(per_sample(c_in, x_t) * x_t, sigma.log() / 4, **cond)
        prediction, extras = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
        x0 = per_sample(c_skip, x_t) * x_t + per_sample(c_out, x_t) * prediction.to(x_t.dtype)
        return x0 if extras is None else (x0, *extras)

    def get_extra_state(self) -> Tensor:
        """sigma_data: it belongs to the weights, and is restored with them."""
        return torch.tensor(self.sigma_data, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore sigma_data. Raises ``ValueError`` unless it is finite and above 0."""
        sigma_data = float(state)
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data must be a finite number above 0; got {sigma_data}.")
        self.sigma_data = sigma_data


@dataclass(frozen=True, eq=False)
class Rescheduled:
    """A denoiser asked about the noisy images of another schedule; see :func:`rescheduled`."""

    denoiser: Denoiser
    schedule: Schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the expected clean image. Raises ``ValueError`` outside the inner schedule's noise levels."""
        check_time(t, x_t)
        inner = self.denoiser.schedule
        ratio = self.schedule.ratio(t)
        if not _covers(inner, self.schedule):
            _check_ratio(inner, ratio)
        u = inner.time(ratio).clamp(inner.t_min, inner.t_max)
        # Both quotients are the same number; each is 0 / 0 at one end of time.
        by_alpha, by_sigma = inner.alpha(u) / self.schedule.alpha(t), inner.sigma(u) / self.schedule.sigma(t)
        scale = torch.where(ratio < 1, by_alpha, by_sigma)
        return self.denoiser(per_sample(scale, x_t) * x_t, u, cond)


def rescheduled(denoiser: Denoiser, schedule: Schedule) -> Denoiser:
    """``denoiser`` on ``schedule``: exact, since E[x0 | x_t] depends only on (x_t / alpha, sigma / alpha).

    An EDM teacher can so train a flow student. A teacher trained on integer timesteps is asked between them, where
    its embedding of t interpolates. A call raises ``ValueError`` outside the noise levels that
    the denoiser knows: Stable Diffusion reaches sigma / alpha = 14.6, EDM 80.
    """
    return Rescheduled(denoiser, schedule)


def _ratio_range(schedule: Schedule) -> Tensor:
    return schedule.ratio(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))


def _covers(inner: Schedule, outer: Schedule) -> bool:
    (low, high), (outer_low, outer_high) = _ratio_range(inner), _ratio_range(outer)
    return bool(outer_low >= low * (1 - 1e-6) and outer_high <= high * (1 + 1e-6))


def _check_ratio(inner: Schedule, ratio: Tensor) -> None:
    low, high = _ratio_range(inner).tolist()
    if not bool(((ratio >= low * (1 - 1e-6)) & (ratio <= high * (1 + 1e-6))).all()):
        raise ValueError(
            f"noise level sigma / alpha must lie in [{low:g}, {high:g}], all that this denoiser knows; got "
            f"[{ratio.min():g}, {ratio.max():g}]. Draw times in a narrower range."
        )


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A denoiser with some of its conditions fixed, whatever it is called with.

    The null label makes an unconditional baseline of a conditional teacher.
    """

    denoiser: Denoiser
    cond: Cond

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the inner denoiser under ``cond``, overridden by the fixed conditions expanded to the batch."""
        return self.denoiser(x_t, t, {**cond, **expand_cond(self.cond, len(x_t))})


def expand_cond(cond: Cond, batch: int) -> Cond:
    """Repeat entries of batch 1 to ``batch``, and whole entries of b rows where ``batch`` is a multiple of b.

    Whoever enlarges a batch of b (guidance, several noises an image) joins whole batches end to end, so that what
    was given for each of the b samples repeats with them. Raises ``ValueError`` for any other batch.
    """
    for name, value in cond.items():
        if not len(value) or batch % len(value):
            raise ValueError(f"cond[{name!r}] must have batch 1 or {batch}; got {tuple(value.shape)}.")
    return {name: _repeat(value, batch // len(value)) for name, value in cond.items()}


def _repeat(value: Tensor, times: int) -> Tensor:
    # A single row is not copied.
    rest = value.shape[1:]
    return value.expand(times, *rest) if len(value) == 1 else value.repeat(times, *[1] * len(rest))


def under_each(denoiser: Denoiser, x_t: Images, t: PerSample, conds: Sequence[Cond]) -> tuple[Tensor, ...]:
    """Return the clean images under each of several conditions, from one call on a batch of ``len(conds)`` b.

    Args:
        denoiser: of any kind.
        x_t: noisy images, the same for all conditions.
        t: their times.
        conds: each of batch b, or as :func:`expand_cond` takes it; all with the keys of the last.

    Raises:
        ValueError: other keys, another batch.
    """
    *others, last = conds
    for cond in others:
        if cond.keys() != last.keys():
            raise ValueError(
                f"the negative condition must have the keys of cond {sorted(last)}; got {sorted(cond)}."
            )
    whole = [expand_cond(cond, len(x_t)) for cond in conds]
    joined = {name: torch.cat([cond[name].to(value) for cond in whole]) for name, value in last.items()}
    n = len(conds)
    return denoiser(x_t.repeat(n, *[1] * (x_t.ndim - 1)), t.repeat(n), joined).chunk(n)


def freeze(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put a teacher in eval mode without gradients, optionally in another dtype; returns the module."""
    module.eval().requires_grad_(False)
    return module if dtype is None else module.to(dtype)


def karras_denoiser(network: nn.Module, schedule: Karras, sigma_data: float = 0.5) -> NetworkDenoiser:
    """Return a raw network under EDM preconditioning, as a :class:`Denoiser`."""
    return NetworkDenoiser(KarrasPreconditioning(network, sigma_data), schedule, "x0")


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network inside wrappers of DDP and ``torch.compile``, in either order, or the network itself."""
    while True:
        inner = network.module if isinstance(network, DistributedDataParallel) else network
        # Compiled modules name their weights "_orig_mod. ...", which nothing else could load.
        inner = getattr(inner, "_orig_mod", inner)
        if inner is network:
            return network
        network = inner
