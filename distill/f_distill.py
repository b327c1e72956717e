"""f-distill (Xu et al. 2025, arXiv 2502.15681): DMD for any f-divergence, by weighting each sample.

The gradient of D_f = E_fake f(r), r = p_real(x_t) / p_fake(x_t), is DMD's times h(r) = r^2 f''(r) (Theorem 1).
KL(fake || real), DMD's own, has h = 1: it seeks modes. An h that grows with r listens to samples where the student
is rare and covers modes. The ratio is the discriminator's: its logit is log r, and comes with the fake score's own
forward pass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from distill.dmd import DMD
from scorefield.denoiser import Cond
from scorefield.gradient import ScoreGradient, check_shapes, weighted_gap
from scorefield.schedule import Images, per_sample

Divergence = Callable[[Float[Tensor, " b"]], Float[Tensor, " b"]]
"""log r -> h(r)."""

DIVERGENCES: Mapping[str, Divergence] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda log_r: torch.sigmoid(-log_r),
    "jensen_shannon": torch.sigmoid,
    "hellinger": lambda log_r: 0.5 * (0.5 * log_r).exp(),
    "kl": torch.exp,
    "jeffreys": lambda log_r: 1 + log_r.exp(),
    "neyman": lambda log_r: 2 * (-log_r).exp(),
}
"""h by name, r = p_real / p_fake, f(r) below; constant factors are those of r^2 f''(r).

reverse_kl: -log r. softened_reverse_kl: (r + 1) log(1/2 + 1/(2 r)). hellinger: (1 - sqrt r)^2. kl: r log r.
jensen_shannon: r log r - (r + 1) log((r + 1) / 2), twice the usual. jeffreys: (r - 1) log r.
neyman: (1 - r)^2 / r.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class FDistill(DMD):
    """DMD whose gradient is weighted by h(r) of each sample; its fake score is, or holds, a critic.

    The critic is that of ``gan``, which trains it; under ``GAN(generator_weight=0)`` the student hears of it only
    through h.

    Args:
        divergence: one of ``DIVERGENCES``, or another function of log r.
        normalise: divide h by its mean, which keeps the learning rate's meaning (section 4). The mean is that of
            the micro-batch on this rank: unlike a running mean for each range of t it knows nothing of t, so a
            batch should hold a dozen samples or more.
        log_ratio_limit: log r is clamped to this, since a critic that is sure would give one sample all weight.
    """

    divergence: Divergence = DIVERGENCES["jensen_shannon"]
    normalise: bool = True
    log_ratio_limit: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.log_ratio_limit > 0:
            raise ValueError(
                f"log_ratio_limit must be above 0; got {self.log_ratio_limit}. 8 is a ratio of 3,000."
            )
        if self.gan is None:
            raise ValueError("f-distill reads h off a critic, which nothing trains with gan=None. Pass a GAN.")

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, fake_cond: Cond, *, generator: Generator) -> ScoreGradient:
        """DMD's times h(r), at one draw of t and noise.

        Raises ``ValueError`` for a fake score without critic, and for one sample, whose h is its own mean.
        """
        if self.normalise and len(x0) < 2:
            raise ValueError("h divided by the mean of one sample is 1. Pass two or more, or normalise=False.")
        t, x_t = self.noisy(x0, cond, self.times, generator)
        fake, extras = self.fake.unwrapped().with_extras(x_t, t, {**cond, **fake_cond})
        if not extras:
            raise ValueError(
                "f-distill reads the ratio of densities off a critic; the fake score returns no logits."
            )
        target = self.teacher(x_t, t, cond)
        check_shapes(x0, {"teacher": target, "fake score": fake})
        h = self.divergence(extras[0].to(x0).clamp(-self.log_ratio_limit, self.log_ratio_limit))
        h = h / h.mean() if self.normalise else h
        weight = per_sample(h, x0) * self.weight(x0, target, t, self.fake.schedule)
        gradient = weighted_gap(weight, fake - target, t)
        return ScoreGradient(gradient.value, {**gradient.metrics, "h_max": h.max()})
