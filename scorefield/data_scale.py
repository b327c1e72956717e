"""Networks that were trained on data in other units, such as [0, 1], as denoisers of images in [-1, 1]."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scorefield.denoiser import NetworkDenoiser
from scorefield.schedule import (
    Images,
    Karras,
    Kind,
    PerSample,
    RectifiedFlow,
    Schedule,
    VariancePreserving,
    per_sample,
)


class RescaledData(nn.Module):
    """A network of y as a network of x, where y = scale x + mean; see :func:`rescaled_data`.

    With y_t = alpha y0 + sigma eps, (y_t - alpha mean) / scale = alpha x0 + (sigma / scale) eps: the same noise
    and an image at another noise level. So x has a schedule whose sigma / alpha is that of y over ``scale``.

    Args:
        network: called as ``network(y_t, time_scale * u, **cond)``.
        inner: the schedule of y.
        kind: what the network predicts of y; this module predicts the same of x.
        scale: above 0.
        mean: a number, (c,) one a channel, or the shape of an image.
        time_scale: as in :class:`NetworkDenoiser`.
    """

    def __init__(
        self, network: nn.Module, inner: Schedule, kind: Kind, scale: float, mean: Tensor, time_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.network, self.inner, self.kind, self.time_scale = network, inner, kind, time_scale
        self.schedule = _schedule_of_x(inner, scale)
        # No buffer: a network that is cast to bfloat16 keeps its data's mean.
        self.scale, self.mean = scale, mean

    def forward(self, x_t: Images, t: PerSample, **cond: Tensor) -> Any:
        """Return the prediction for x, or a tuple that starts with it if the network returns a tuple."""
        u = _time_of_y(self.inner, t, self.scale)
        alpha, sigma = self.inner.alpha(u), self.inner.sigma(u)
        # Both quotients are the same number; each is 0 / 0 at one end of time.
        by_alpha, by_sigma = self.scale * alpha / self.schedule.alpha(t), sigma / self.schedule.sigma(t)
        gain = per_sample(torch.where(self.schedule.ratio(t) < 1, by_alpha, by_sigma), x_t)
        mean = _like_images(self.mean, x_t)
        y_t = gain * x_t + per_sample(alpha, x_t) * mean
        output = self.network(y_t, (self.time_scale * u).to(t.dtype), **cond)
        prediction, extras = (output, None) if isinstance(output, Tensor) else (output[0], output[1:])
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        of_x = self._of_x(prediction.to(dtype), y_t.to(dtype), t, u, mean)
        return (of_x, *extras) if isinstance(output, tuple) and extras is not None else of_x

    def _of_x(self, output: Tensor, y_t: Tensor, t: Tensor, u: Tensor, mean: Tensor) -> Tensor:
        # v and flow mix image and noise; both are read off, and mixed again in the units of x.
        if self.kind == "eps":
            return output  # the noise is the same
        if output.shape != y_t.shape:
            return output  # the denoiser says what is wrong with it
        x0 = (self.inner.to_x0(output, y_t, u, self.kind) - mean) / self.scale
        if self.kind == "x0":
            return x0
        alpha, sigma = per_sample(self.inner.alpha(u), y_t), per_sample(self.inner.sigma(u), y_t)
        if self.kind == "flow":
            return (y_t + alpha * output) / (alpha + sigma) - x0
        noise = (sigma * y_t + alpha * output) / (alpha**2 + sigma**2)
        return per_sample(self.schedule.alpha(t), y_t) * noise - per_sample(self.schedule.sigma(t), y_t) * x0

    def get_extra_state(self) -> Tensor:
        """Scale and mean: the weights mean something else with others."""
        return torch.cat([torch.tensor([self.scale], dtype=torch.float64), self.mean.flatten()])

    def set_extra_state(self, state: Tensor) -> None:
        """Compare scale and mean. Raises ``ValueError`` if the weights belong to others."""
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise ValueError(
                f"the weights belong to rescaled_data(..., {_listed(state)}); this network has "
                f"rescaled_data(..., {_listed(self.get_extra_state())}). Build it as theirs was."
            )


def rescaled_data(
    denoiser: NetworkDenoiser, scale: float, mean: float | Sequence[float] | Tensor = 0.0
) -> NetworkDenoiser:
    """Return a network that was trained on y = scale x + mean, as a denoiser of x in [-1, 1].

    Exact for every schedule.

    ``rescaled_data(NetworkDenoiser(net, schedule), 0.5, 0.5)`` wraps a network of images in [0, 1], ``(0.5)`` one
    of [-0.5, 0.5], ``(1 / std, -mean / std)`` one of standardised images. Halving x_t alone would be wrong: half
    the data under the same noise is noisier data. The schedule of the result therefore has other noise levels,
    sigma / alpha over ``scale``; timesteps of a variance-preserving one stay what they were.

    Args:
        denoiser: the network with the schedule and the prediction kind that it was trained with.
        scale: one number for all channels, as the noise has one level. For data in [low, high] (high - low) / 2.
        mean: a number, (c,) one a channel, or the shape of an image. For data in [low, high] (high + low) / 2.

    Returns:
        Denoiser of the same kind; its network is a :class:`RescaledData`.

    Raises:
        ValueError: a scale that is not above 0, numbers that are not finite, an unknown schedule.
    """
    offset = torch.as_tensor(mean, dtype=torch.float64).detach().clone()
    if not (0 < scale < math.inf and bool(offset.isfinite().all())):
        raise ValueError(f"rescaled_data needs a finite scale above 0 and a finite mean; got {scale}, {mean}.")
    network = RescaledData(
        denoiser.network, denoiser.schedule, denoiser.kind, float(scale), offset, denoiser.time_scale
    )
    return NetworkDenoiser(network, network.schedule, denoiser.kind)


def _schedule_of_x(inner: Schedule, scale: float) -> Schedule:
    # The schedule of the same family whose sigma / alpha is that of ``inner`` over ``scale``.
    match inner:
        case VariancePreserving():
            # 1 / (1 + (1 - a) / (a scale^2)), written so that a = 0 gives 0.
            signal = inner.alphas_cumprod * scale**2
            return VariancePreserving(signal / (signal + 1 - inner.alphas_cumprod), inner.integer)
        case Karras():
            return Karras(inner.t_min / scale, inner.t_max / scale, inner.rho)
        case RectifiedFlow():
            ends = (u / (u + scale * (1 - u)) for u in (inner.t_min, inner.t_max))
            return RectifiedFlow(*ends)
    raise ValueError(f"rescaled_data knows the schedules of scorefield.schedule; got a {type(inner).__name__}.")


def _time_of_y(inner: Schedule, t: Tensor, scale: float) -> Tensor:
    # When y was as noisy as x is at t; float64. In closed form, so that integer timesteps stay integers.
    match inner:
        case Karras():
            return scale * t.double()
        case RectifiedFlow():
            return scale * t.double() / (1 - t.double() + scale * t.double())
    return t.double()


def _listed(state: Tensor) -> str:
    scale, *mean = state.tolist()
    return f"scale={scale:g}, mean={', '.join(f'{value:g}' for value in mean[:4])}"


def _like_images(mean: Tensor, x: Tensor) -> Tensor:
    mean = mean.to(x)
    return mean.reshape(-1, *[1] * (x.ndim - 2)) if mean.ndim == 1 else mean
