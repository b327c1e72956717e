"""The layer every method shares: a frozen diffusion model as a function ``denoiser(x_t, t, cond) -> x0``.

Conventions, everywhere:

- ``x0, x_t, noise, t, cond`` in that order; images in [-1, 1], NCHW; ``x_t = alpha(t) x0 + sigma(t) noise``.
- t grows with noise and always has shape (b,); ``ratio`` is sigma / alpha, Karras et al.'s sigma.
- A denoiser returns x0, whatever its network predicts; ``cond`` maps the network's keyword names to tensors.
- Guidance ``scale`` 1 means none: x0 = negative + scale (positive - negative).
- Everything random takes a ``generator``; losses reduce per sample first; counts are ``num_*``.
"""

from score.data_scale import rescaled_data as rescaled_data
from score.denoiser import Cond as Cond
from score.denoiser import Conditioned as Conditioned
from score.denoiser import Denoiser as Denoiser
from score.denoiser import KarrasPreconditioning as KarrasPreconditioning
from score.denoiser import NetworkDenoiser as NetworkDenoiser
from score.denoiser import freeze as freeze
from score.denoiser import karras_denoiser as karras_denoiser
from score.denoiser import rescheduled as rescheduled
from score.exact import EmpiricalDistribution as EmpiricalDistribution
from score.exact import GaussianMixture as GaussianMixture
from score.gradient import ScoreDistillation as ScoreDistillation
from score.gradient import ScoreGradient as ScoreGradient
from score.gradient import denoising_loss as denoising_loss
from score.gradient import inject as inject
from score.guidance import guided as guided
from score.schedule import Karras as Karras
from score.schedule import RectifiedFlow as RectifiedFlow
from score.schedule import Schedule as Schedule
from score.schedule import VariancePreserving as VariancePreserving
