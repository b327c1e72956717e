"""The variational bound of a diffusion model in nats and bits, and variances that a network learns.

A chain of n steps goes from times[0], nearly pure noise, to the clean image after times[-1]. Its bound is

    -log p(x0) <= KL(q(x_T | x0) || p(x_T)) + sum of E KL(q(x_s | x_t, x0) || p(x_s | x_t)) - E log p(x0 | x_1)

(Ho et al. 2020, arXiv 2006.11239, Eq. 5). The last term is the decoder's: a density for continuous data, the
probability of a level for images of 256 levels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scorefield.denoiser import Cond, Denoiser, NetworkDenoiser
from scorefield.randomness import Generators, normal_like
from scorefield.schedule import Images, PerSample, Schedule, per_sample

Variance = Literal["small", "large", "learned"]
"""small: that of q(x_s | x_t, x0), right for a single image. large: that of q(x_t | x_s), right for white data.
learned: the network says where between them, see :func:`learned_range`."""

Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x0, mean, log variance) -> -log p(x0 | x_1) of each number, in nats."""


@dataclass(frozen=True, eq=False)
class Chain:
    """A diffusion of n steps, with the variances of its steps; all tables are (n,) float64.

    Args:
        schedule: the forward process.
        times: (n,) strictly decreasing, at least 2; DDPM's own chain is ``schedule.at(linspace(1, 0, T))``.

    Attributes:
        log_large: log variance of q(x_t | x_s); of the last step, to the clean image, that of its noise.
        log_small: log variance of q(x_s | x_t, x0). It is zero for the last step, where that of the step before
            stands in its place, as in Nichol and Dhariwal's code: the log of 0 would spoil every interpolation.
    """

    schedule: Schedule
    times: Float[Tensor, " n"]
    log_large: Tensor = field(init=False)
    log_small: Tensor = field(init=False)
    keep: Tensor = field(init=False)
    pull: Tensor = field(init=False)

    def __post_init__(self) -> None:
        times = self.times.double().cpu()
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
            raise ValueError(
                f"a chain needs at least 2 strictly decreasing times, noisiest first; got {self.times}."
            )
        alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        if not (bool((alpha > 0).all()) and bool((sigma > 0).all())):
            raise ValueError("a chain needs alpha > 0 and sigma > 0 at all its times. Leave out the ends of time.")
        alpha_s, sigma_s = (
            torch.cat([table[1:], table.new_tensor([end])]) for table, end in ((alpha, 1), (sigma, 0))
        )
        large = sigma**2 - (alpha / alpha_s * sigma_s) ** 2
        small = large * (sigma_s / sigma) ** 2
        derived = {
            "log_large": large.log(), "log_small": torch.cat([small[:-1], small[-2:-1]]).log(),
            "keep": alpha / alpha_s * (sigma_s / sigma) ** 2, "pull": alpha_s * large / sigma**2,
        }  # fmt: skip
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.times)

    def t(self, index: Int[Tensor, " b"]) -> PerSample:
        """Return the times (b,) of the steps with these numbers; 0 is the noisiest."""
        return self.times.to(index.device)[index]

    def mean(self, index: Int[Tensor, " b"], x0: Images, x_t: Images) -> Tensor:
        """Return the mean of q(x_s | x_t, x0) (arXiv 2006.11239, Eq. 7); of the last step it is x0 itself."""
        keep, pull = (table.to(index.device)[index] for table in (self.keep, self.pull))
        return per_sample(keep, x_t) * x_t + per_sample(pull, x0) * x0

    def log_variance(self, index: Int[Tensor, " b"], variance: Literal["small", "large"], x: Images) -> Tensor:
        """Return the fixed log variance of each step, shaped to multiply ``x``."""
        table = self.log_small if variance == "small" else self.log_large
        return per_sample(table.to(index.device)[index], x)


def learned_range(chain: Chain, index: Int[Tensor, " b"], v: Images) -> Tensor:
    """Return the log variance that a network's ``v`` means: log small at -1, log large at 1, linear between.

    Nichol and Dhariwal 2021, arXiv 2102.09672, Eq. 15; diffusers calls it ``variance_type="learned_range"``.
    Exact at both ends; values outside [-1, 1] extrapolate.
    """
    share = (v + 1) / 2
    return share * chain.log_variance(index, "large", v) + (1 - share) * chain.log_variance(index, "small", v)


class SplitVariance(nn.Module):
    """A network of 2c channels that returns (prediction, v), which ``NetworkDenoiser.with_extras`` keeps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Images, t: PerSample, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two halves of the channels. Raises ``ValueError`` unless there are twice those of x_t."""
        output: Any = self.network(x_t, t, **cond)
        output = output if isinstance(output, Tensor) else output[0]
        if output.shape[1] != 2 * x_t.shape[1]:
            raise ValueError(
                f"a network with a variance head must return {2 * x_t.shape[1]} channels, twice those of x_t; got "
                f"{output.shape[1]}."
            )
        prediction, v = output.chunk(2, dim=1)
        return prediction, v


def gaussian_nll(x0: Images, mean: Images, log_variance: Tensor) -> Tensor:
    """Return -log N(x0; mean, exp(log_variance)) of each number, in nats: the decoder of continuous data."""
    return ((x0 - mean) ** 2 * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi)) / 2


def discretised_nll(x0: Images, mean: Images, log_variance: Tensor, levels: int = 256) -> Tensor:
    """Return -log of the probability of each level of an image, in nats (arXiv 2006.11239, Eq. 13).

    Args:
        x0: in [-1, 1], of ``levels`` equally spaced values; the outer ones take the tails.
        mean: of the Gaussian.
        log_variance: of the Gaussian.
        levels: 256 for images of bytes.
    """
    half, scale = 1 / (levels - 1), torch.exp(-log_variance / 2)
    upper, lower = ((x0 - mean + half) * scale, (x0 - mean - half) * scale)
    upper = torch.where(x0 > 1 - half, torch.inf, upper)
    lower = torch.where(x0 < -1 + half, -torch.inf, lower)
    # In the upper tail the difference of two numbers near 1 is rounding: its mirror image is computed there.
    mirrored = lower > 0
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    probability = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    return -probability.clamp(min=1e-12).log()


def vlb_term(
    chain: Chain, index: Int[Tensor, " b"], x0: Images, x_t: Images, x0_hat: Images, log_variance: Tensor,
    decoder: Decoder = gaussian_nll,
) -> PerSample:  # fmt: skip
    """Return the term of the bound of one step of each sample, (b,) nats.

    Args:
        chain: the steps.
        index: (b,) which of them; the last is the decoder's.
        x0: clean images.
        x_t: noisy images at ``chain.t(index)``.
        x0_hat: what the denoiser answered.
        log_variance: of p(x_s | x_t): ``chain.log_variance`` or :func:`learned_range`.
        decoder: for the last step.
    """
    mean, wanted = chain.mean(index, x0_hat, x_t), chain.mean(index, x0, x_t)
    gap = chain.log_variance(index, "small", x0) - log_variance
    divergence = (gap.exp() - gap - 1 + (wanted - mean) ** 2 * torch.exp(-log_variance)) / 2
    last = per_sample((index == len(chain) - 1).to(x0.dtype), x0) == 1
    term = torch.where(last, decoder(x0, mean, log_variance.expand_as(x0)), divergence.expand_as(x0))
    return term.flatten(1).sum(1)


def prior_term(chain: Chain, x0: Images) -> PerSample:
    """Return KL(q(x_T | x0) || N(0, initial_std^2)), (b,) nats: what the chain leaves of the image."""
    t = chain.times[0].to(x0.device).expand(len(x0))
    std = chain.schedule.initial_std(t)
    mean = per_sample(chain.schedule.alpha(t) / std, x0) * x0
    ratio = per_sample((chain.schedule.sigma(t) / std) ** 2, x0)
    return ((ratio - ratio.log() - 1 + mean**2) / 2).flatten(1).sum(1)


@dataclass(frozen=True)
class Bound:
    """The variational bound of some samples.

    Attributes:
        prior: (b,) nats.
        terms: (n, b) nats, noisiest step first, the decoder's last.
        num_numbers: of a sample.
    """

    prior: PerSample
    terms: Float[Tensor, "n b"]
    num_numbers: int

    @property
    def nats(self) -> PerSample:
        """An upper bound of -log p(x0), (b,)."""
        return self.prior + self.terms.sum(0)

    @property
    def bits_per_dim(self) -> PerSample:
        """The bound in bits, divided by the number of pixels and channels, (b,)."""
        return self.nats / (self.num_numbers * math.log(2))


@torch.no_grad()
def variational_bound(
    denoiser: Denoiser, x0: Images, cond: Cond, *, chain: Chain, generator: Generators,
    variance: Variance = "large", decoder: Decoder = gaussian_nll,
) -> Bound:  # fmt: skip
    """Return the bound with one draw of the noise a step: ``len(chain)`` network calls.

    Args:
        denoiser: for "learned" a :class:`NetworkDenoiser` whose network returns (prediction, v).
        x0: clean images.
        cond: conditioning, batch b.
        chain: the one that it samples with.
        generator: for the noise.
        variance: :data:`Variance`.
        decoder: :func:`discretised_nll` for bits of images of bytes.
    """
    terms = []
    for step in range(len(chain)):
        index = torch.full((len(x0),), step, device=x0.device)
        x_t = chain.schedule.diffuse(x0, normal_like(x0, generator), chain.t(index))
        x0_hat, log_variance = _answer(denoiser, x_t, cond, chain, index, variance)
        terms.append(vlb_term(chain, index, x0, x_t, x0_hat.to(x0.dtype), log_variance.to(x0.dtype), decoder))
    return Bound(prior_term(chain, x0), torch.stack(terms), x0[0].numel())


def hybrid_loss(
    denoiser: NetworkDenoiser, x0: Images, cond: Cond, *, chain: Chain, index: Int[Tensor, " b"],
    generator: Generators, weight: float = 1e-3, decoder: Decoder = gaussian_nll,
) -> PerSample:  # fmt: skip
    """Return L_simple + weight L_vlb (arXiv 2102.09672, Eq. 16) of each sample: the loss of learned variances.

    L_simple is the mean squared error of the network's own output. L_vlb is the whole bound in bits per dimension,
    estimated by ``len(chain)`` times one term. Its gradient reaches the variance alone: the mean is detached.

    Args:
        denoiser: its network returns (prediction, v), as :class:`SplitVariance` makes it.
        x0: clean images.
        cond: conditioning, batch b.
        chain: the steps, as many as it is trained on.
        index: (b,) which of them.
        generator: for the noise.
        weight: of the bound; the paper's.
        decoder: of the last step.
    """
    t, schedule = chain.t(index), chain.schedule
    x_t = schedule.diffuse(x0, normal_like(x0, generator), t)
    x0_hat, (v, *_) = denoiser.with_extras(x_t, t, cond)
    made, wanted = (schedule.from_x0(image, x_t, t, denoiser.kind) for image in (x0_hat, x0))
    simple = (made - wanted).square().flatten(1).mean(1)
    log_variance = learned_range(chain, index, v)
    term = vlb_term(chain, index, x0, x_t, x0_hat.detach(), log_variance, decoder)
    return simple + weight * len(chain) * term / (x0[0].numel() * math.log(2))


def _answer(
    denoiser: Denoiser, x_t: Tensor, cond: Cond, chain: Chain, index: Tensor, variance: Variance
) -> tuple[Tensor, Tensor]:
    t = chain.t(index)
    if variance != "learned":
        return denoiser(x_t, t, cond), chain.log_variance(index, variance, x_t)
    if not isinstance(denoiser, NetworkDenoiser):
        raise ValueError(f"a learned variance needs a NetworkDenoiser; got a {type(denoiser).__name__}.")
    x0_hat, extras = denoiser.with_extras(x_t, t, cond)
    if not extras:
        raise ValueError(
            "a learned variance needs a network that returns (prediction, v). Wrap it in SplitVariance."
        )
    return x0_hat, learned_range(chain, index, extras[0])
