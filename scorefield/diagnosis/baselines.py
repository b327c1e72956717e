"""What denoises without a network: a constant, the best linear filter, a blur. A teacher must beat them."""

import torch
from torch import Tensor

from scorefield.schedule import Images

BLURS = (0.5, 1.0, 2.0, 4.0)
"""Standard deviations in pixels of the Gaussian blurs that are tried."""


def best_without_network(x0: Images, noise: Images, ratio: float) -> dict[str, Tensor]:
    """Mean squared error of each image of three denoisers of ``x0 + ratio noise``, (n,) each.

    ``constant`` is the mean image. ``linear`` is the Wiener filter: the mean image, and each frequency shrunk by
    P / (P + ratio^2) with P its power. ``blurred`` is the best of four Gaussian blurs. Mean and power are those
    of the other images, so that none is measured on what it was fitted to; of fewer than four they are their own.
    """
    others = len(x0) >= 4
    mean = _mean_of_others(x0) if others else x0.mean([0, *range(2, x0.ndim)], keepdim=True)
    centred = x0 - mean
    power = _fft(centred).abs().square()
    power = _mean_of_others(power) if others else power.mean(0, keepdim=True)
    noisy = _fft(centred + ratio * noise)
    linear = _back(noisy * (power / (power + ratio**2)), x0)
    blurs = [_error(_back(noisy * gain, x0), centred) for gain in _blur_gains(x0)]
    blurred = (
        min(blurs, key=lambda error: float(error.mean())) if blurs else _error(centred + ratio * noise, centred)
    )
    return {"constant": _error(centred, 0 * centred), "linear": _error(linear, centred), "blurred": blurred}


def _mean_of_others(x: Tensor) -> Tensor:
    return (x.sum(0, keepdim=True) - x) / (len(x) - 1)


def _error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).flatten(1).square().mean(1)


def _fft(x: Tensor) -> Tensor:
    # Points and other tensors without two sides are filtered number by number.
    return torch.fft.fft2(x, norm="ortho") if x.ndim == 4 else x + 0j


def _back(spectrum: Tensor, x: Tensor) -> Tensor:
    return torch.fft.ifft2(spectrum, norm="ortho").real if x.ndim == 4 else spectrum.real


def _blur_gains(x: Tensor) -> list[Tensor]:
    if x.ndim != 4:
        return []
    down, across = (torch.fft.fftfreq(size, device=x.device).to(x.dtype) for size in x.shape[2:])
    square = down[:, None] ** 2 + across**2
    return [torch.exp(-2 * torch.pi**2 * square * std**2) for std in BLURS]
