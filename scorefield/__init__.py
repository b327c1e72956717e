"""The layer every method shares: a frozen diffusion model as a function ``denoiser(x_t, t, cond) -> x0``.

Conventions, everywhere:

- ``x0, x_t, noise, t, cond`` in that order; images in [-1, 1], NCHW; ``x_t = alpha(t) x0 + sigma(t) noise``.
- t grows with noise and always has shape (b,); ``ratio`` is sigma / alpha, Karras et al.'s sigma.
- A denoiser returns x0, whatever its network predicts; ``cond`` maps the network's keyword names to tensors.
- Guidance ``scale`` 1 means none: x0 = negative + scale (positive - negative).
- Everything random takes a ``generator``; losses reduce per sample first; counts are ``num_*``.

Names are imported when they are first asked for, so that the command line can answer before torch is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scorefield.data_scale import rescaled_data as rescaled_data
    from scorefield.denoiser import Cond as Cond
    from scorefield.denoiser import Conditioned as Conditioned
    from scorefield.denoiser import Denoiser as Denoiser
    from scorefield.denoiser import KarrasPreconditioning as KarrasPreconditioning
    from scorefield.denoiser import NetworkDenoiser as NetworkDenoiser
    from scorefield.denoiser import freeze as freeze
    from scorefield.denoiser import karras_denoiser as karras_denoiser
    from scorefield.denoiser import rescheduled as rescheduled
    from scorefield.exact import EmpiricalDistribution as EmpiricalDistribution
    from scorefield.exact import GaussianMixture as GaussianMixture
    from scorefield.gradient import ScoreDistillation as ScoreDistillation
    from scorefield.gradient import ScoreGradient as ScoreGradient
    from scorefield.gradient import denoising_loss as denoising_loss
    from scorefield.gradient import inject as inject
    from scorefield.guidance import classifier_guided as classifier_guided
    from scorefield.guidance import guided as guided
    from scorefield.schedule import Karras as Karras
    from scorefield.schedule import RectifiedFlow as RectifiedFlow
    from scorefield.schedule import Schedule as Schedule
    from scorefield.schedule import VariancePreserving as VariancePreserving

_PLACES = {
    "data_scale": ("rescaled_data",),
    "denoiser": (
        "Cond", "Conditioned", "Denoiser", "KarrasPreconditioning", "NetworkDenoiser", "freeze", "karras_denoiser",
        "rescheduled",
    ),
    "exact": ("EmpiricalDistribution", "GaussianMixture"),
    "gradient": ("ScoreDistillation", "ScoreGradient", "denoising_loss", "inject"),
    "guidance": ("classifier_guided", "guided"),
    "schedule": ("Karras", "RectifiedFlow", "Schedule", "VariancePreserving"),
}  # fmt: skip
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__version__ = "0.2.0"
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
