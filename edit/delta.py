"""Edits by gradients: the difference of two score distillations, of the edited image and of its source.

    DDS    w (eps(x_t, target prompt) - eps(source_t, source prompt))      the errors of SDS cancel
    CDS    DDS, and a contrast that holds the structure of the source
    PDS    w (z(x, target prompt) - z(source, source prompt))              z is the noise of one stochastic step

All see the two images under the same noise at the same time. :func:`descend` follows a gradient; anything else
with parameters, such as a scene, may follow it, too: the losses have the interface of those of ``sds``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import normalize

from scorefield.denoiser import Cond, Denoiser, NetworkDenoiser, expand_cond
from scorefield.gradient import (
    NoiseSampler,
    ScoreGradient,
    TimeWeight,
    described,
    noise_weight,
    standard_normal,
    weighted_gap,
)
from scorefield.models.attention import attention_layers
from scorefield.sampling import ddim_moments
from scorefield.schedule import Images, Schedule, per_sample
from scorefield.times import TimeSampler, uniform

TIMES = uniform(0.05, 0.95)
"""50 to 950 of 1000, as both papers draw them."""


def unit(t: Tensor, schedule: Schedule) -> Tensor:
    """Return 1, the weight of both papers' code."""
    return torch.ones_like(schedule.sigma(t))


class Delta(Protocol):
    """Interface of the losses of this file."""

    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return the gradient with respect to x0, at one draw of t and noise per sample. No graph is kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DDS:
    """Delta denoising score: edits an image from a source prompt to a target prompt (arXiv 2304.07090).

    The gradient is w(t) (eps_s(x_t, target prompt) - eps_s(source_t, source prompt)): SDS of the edited image less
    SDS of the source, at the same t and noise (Hertz et al. 2023). The errors of SDS on an image that already fits
    its prompt (blur, saturation) cancel. The gradient is 0 where image and prompt equal the source's. It costs one
    call of the teacher on 2b samples.

    Args:
        teacher: The denoiser, with guidance if wanted; the paper uses 7.5.
        source: x0 of the image to edit, batch 1 or b.
        source_cond: Condition of the prompt that describes it, batch 1 or b.
        times: How t is drawn; the paper draws 50 to 950 of 1000.
        w: Weight of the published difference; 1 in the paper's code.
        noise: How the noise is drawn.
    """

    teacher: Denoiser
    source: Images
    source_cond: Cond
    times: TimeSampler = TIMES
    w: TimeWeight = unit
    noise: NoiseSampler = standard_normal

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return the gradient at one draw of t and noise per sample; ``cond`` is the target prompt.

        Raises ``ValueError`` if the shapes of source and x0, or the keys of their conditions, differ.
        """
        return self._between(self._pair(x0, cond, generator), x0)

    def _pair(self, x0: Images, cond: Cond, generator: Generator) -> "_Pair":
        return _pair(self.teacher, x0, cond, self.source, self.source_cond, self.times, self.noise, generator)

    def _between(self, pair: "_Pair", x0: Images) -> ScoreGradient:
        gap = (x0 - pair.answer) - (pair.source - pair.source_answer)
        weight = noise_weight(self.w)(x0, pair.answer, pair.t, self.teacher.schedule)
        return weighted_gap(weight, gap, pair.t)


Features = Callable[[Tensor, Tensor, Cond], Sequence[Float[Tensor, "b places channels"]]]
"""(x_t, t, cond) -> what a network makes of each place of the image, in some of its layers; differentiable."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ContrastiveDDS(DDS):
    """DDS that keeps the structure of its source: contrastive denoising score (Nam et al. 2023, arXiv 2311.18608).

    To the gradient of :class:`DDS` comes that of a contrast of features, at the same t and noise. The features of
    each place of the edited image shall be nearest to those of the same place of the source:

        strength * sum over layers of the mean over places i of -log softmax over j of (f_i s_j / temperature) at i

    where f and s are features of unit length, and places are drawn anew each time. It costs one more pass through
    the network for the source, and one forward and back for the edited image.

    Args:
        features: such as :func:`attention_features` of the teacher without guidance.
        strength: of the contrast; 0 is DDS.
        temperature: of the softmax.
        num_places: drawn of each layer; all where it has fewer.

    Raises ``ValueError`` for a negative strength, and unless temperature and num_places are above 0.
    """

    features: Features
    strength: float = 3.0
    temperature: float = 0.07
    num_places: int = 256

    def __post_init__(self) -> None:
        if not (self.strength >= 0 and self.temperature > 0 and self.num_places > 0):
            raise ValueError(
                "a contrast needs strength >= 0, temperature > 0 and num_places > 0; got "
                f"{self.strength}, {self.temperature}, {self.num_places}."
            )

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return the gradient at one draw of t, noise and places; arguments and errors are those of DDS."""
        pair = self._pair(x0, cond, generator)
        found = self._between(pair, x0)
        theirs = self.features(pair.source_x_t, pair.t, expand_cond(self.source_cond, len(x0)))
        with torch.enable_grad():
            x_t = pair.x_t.detach().requires_grad_()
            losses = [
                self._contrast(own, other.detach(), generator)
                for own, other in zip(self.features(x_t, pair.t, cond), theirs, strict=True)
            ]
            (slope,) = torch.autograd.grad(self.strength * torch.stack(losses).sum(), x_t)
        # x_t moves by alpha(t) where x0 moves by 1.
        value = found.value + per_sample(self.teacher.schedule.alpha(pair.t), slope) * slope.to(found.value)
        metrics = {"contrast": torch.stack(losses).detach().sum() / len(x0)}
        return ScoreGradient(value, {**found.metrics, **described(value, value, pair.t).metrics, **metrics})

    def _contrast(self, own: Tensor, theirs: Tensor, generator: Generator) -> Tensor:
        places = torch.randperm(own.shape[1], generator=generator, device=generator.device)[: self.num_places]
        f, s = (normalize(one[:, places.to(one.device)], dim=2) for one in (own, theirs))
        logits = (f @ s.mT / self.temperature).log_softmax(2)
        return -logits.diagonal(dim1=1, dim2=2).mean(1).sum()


def attention_features(denoiser: NetworkDenoiser, largest: int = 32**2) -> Features:
    """Return what the layers of attention of a UNet's image to itself put out, on the way back up.

    Args:
        denoiser: without guidance.
        largest: most places of a layer that is taken.

    Raises:
        ValueError: no UNet of prompts.
    """
    inner = denoiser.unwrapped()
    names = [name for name in attention_layers(inner.network) if name.endswith("attn1") and "up_blocks." in name]

    def features(x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        found = list[Tensor]()

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            del module, inputs
            found.append(output)

        handles = [inner.network.get_submodule(name).register_forward_hook(keep) for name in names]
        try:
            with torch.compiler.set_stance("force_eager"):  # a compiled network has no hooks
                inner(x_t, t, cond)
        finally:
            for handle in handles:
                handle.remove()
        return [one for one in found if one.shape[1] <= largest]

    return features


@dataclass(frozen=True, kw_only=True, eq=False)
class PDS:
    """Posterior distillation sampling (Koo et al. 2023, arXiv 2311.13831, Eq. 8 to 13).

    The stochastic latent of an image is z = (x_s - mean of q(x_s | x_t, x0_hat)) / std, a time s before t. The
    gradient is w(t) (z of x0 under the target's prompt - z of the source under its own), without the network's
    Jacobian. The noise of x_s is the same for both and cancels; what is left is psi (x0 - source) + chi (eps -
    eps of the source), so that the image is also drawn back to its source, as DDS does not.

    Args:
        teacher: The denoiser, with guidance if wanted.
        source: x0 of the image to edit, batch 1 or b.
        source_cond: Condition of the prompt that describes it, batch 1 or b.
        gap: From t back to s, as a share of the schedule's times.
        times: How t is drawn; ``gap`` must not reach below its lowest time.
        w: Weight of the difference.
        noise: How the noise is drawn.

    Raises ``ValueError`` unless gap lies in (0, 1).
    """

    teacher: Denoiser
    source: Images
    source_cond: Cond
    gap: float = 0.02
    times: TimeSampler = TIMES
    w: TimeWeight = unit
    noise: NoiseSampler = standard_normal

    def __post_init__(self) -> None:
        if not 0 < self.gap < 1:
            raise ValueError(f"gap must lie in (0, 1); got {self.gap}.")

    @torch.no_grad()
    def gradient(self, x0: Images, cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return the gradient at one draw of t and noise per sample; ``cond`` is the target prompt.

        Raises ``ValueError`` if the shapes of source and x0, or the keys of their conditions, differ, and for a t
        that has no time ``gap`` before it.
        """
        schedule = self.teacher.schedule
        pair = _pair(self.teacher, x0, cond, self.source, self.source_cond, self.times, self.noise, generator)
        s = schedule.snap(pair.t - self.gap * (schedule.t_max - schedule.t_min))
        if bool((s <= schedule.t_min).any()):
            raise ValueError(
                f"PDS compares times {self.gap:g} of the schedule apart; t = {float(pair.t.min()):g} has none "
                "before it. Draw later times, or lower the gap."
            )
        mean, std = ddim_moments(schedule, pair.x_t, pair.answer, pair.t, s, eta=1.0)
        other, _ = ddim_moments(schedule, pair.source_x_t, pair.source_answer, pair.t, s, eta=1.0)
        alpha = per_sample(schedule.alpha(s), x0)
        gap = alpha * (x0 - pair.source) - (mean - other)
        return described(per_sample(self.w(pair.t, schedule) / std, x0) * gap, gap, pair.t)


@dataclass(frozen=True, eq=False)
class _Pair:
    """An image and its source under one noise, and what the teacher says of them."""

    t: Tensor
    source: Tensor
    x_t: Tensor
    source_x_t: Tensor
    answer: Tensor
    source_answer: Tensor


def _pair(
    teacher: Denoiser, x0: Images, cond: Cond, source: Images, source_cond: Cond, times: TimeSampler,
    noise: NoiseSampler, generator: Generator,
) -> _Pair:  # fmt: skip
    source = _source_for(source, x0)
    given = expand_cond(source_cond, len(x0))
    if given.keys() != cond.keys():
        raise ValueError(f"source_cond must have the keys of cond {sorted(cond)}; got {sorted(given)}.")
    schedule = teacher.schedule
    t = times(len(x0), schedule, generator).to(x0.device)
    drawn = noise(x0, cond, t, generator)
    x_t, source_x_t = (schedule.diffuse(image, drawn, t) for image in (x0, source))
    both = {name: torch.cat([value, given[name].to(value)]) for name, value in cond.items()}
    answer, source_answer = teacher(torch.cat([x_t, source_x_t]), t.repeat(2), both).chunk(2)
    return _Pair(t, source, x_t, source_x_t, answer, source_answer)


def _source_for(source: Images, x0: Images) -> Images:
    if source.shape[1:] != x0.shape[1:]:
        raise ValueError(
            f"source must be images like x0 {tuple(x0.shape)}; got {tuple(source.shape)}. Encode and "
            "resize it as the scene's renders are."
        )
    return expand_cond({"source": source.to(x0)}, len(x0))["source"]


def descend(
    method: Delta, x0: Images, cond: Cond, *, num_steps: int, learning_rate: float, generator: Generator
) -> Tensor:
    """Return x0 after plain gradient descent: an edit of an image without parameters of its own.

    Args:
        method: :class:`DDS` or :class:`PDS`.
        x0: (b, ...) to start from: the source.
        cond: of the target's prompt, batch b.
        num_steps: gradients followed.
        learning_rate: their factor; the authors of DDS descend on the mean of squares, whose rates look larger.
        generator: draws times and noise.

    Raises:
        ValueError: num_steps below 0, or a learning rate that is not above 0.
    """
    if num_steps < 0 or not learning_rate > 0:
        raise ValueError(
            f"num_steps must be at least 0 and learning_rate above 0; got {num_steps} and {learning_rate}."
        )
    for _ in range(num_steps):
        x0 = x0 - learning_rate * method.gradient(x0, cond, generator=generator).value
    return x0
