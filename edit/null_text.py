"""Null-text inversion: what guidance moves away from is optimised until guided sampling returns to the image.

Mokady et al. 2022 (arXiv 2211.09794). The pivot is the path of DDIM inversion without guidance. From its noise on,
each time's null embedding is fitted so that the guided step lands on the pivot's next point:

    min over e of |z*_s - z_s(z_t, e, prompt)|^2,   then z_s = z_s(z_t, e, prompt)
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from edit.inversion import Inversion, number_of
from scorefield.denoiser import Cond, Denoiser, expand_cond
from scorefield.guidance import guided
from scorefield.sampling import Point, towards
from scorefield.schedule import Images, PerSample, Schedule

EMBEDDING = "encoder_hidden_states"
"""The entry of a condition that is optimised by default: a UNet's prompt."""


@dataclass(frozen=True, eq=False)
class NullText:
    """Fitted negatives: ``NullText.guided(denoiser)`` samples back to the images.

    Attributes:
        times: (n,) of the inversion.
        negatives: conditions of batch b: one for each time, or one for all.
        scale: of guidance that they were fitted at.
        losses: (n, b) mean squared distance to the pivot's next point behind each step.
    """

    times: Float[Tensor, " n"]
    negatives: tuple[Cond, ...]
    scale: float
    losses: Float[Tensor, "n b"]

    def guided(self, denoiser: Denoiser) -> Denoiser:
        """Return the denoiser under guidance away from these negatives, at these times only."""
        return GuidedByTime(denoiser, self)


@dataclass(frozen=True, eq=False)
class GuidedByTime:
    """Guidance with a negative of its own for each time and image."""

    denoiser: Denoiser
    null: NullText

    @property
    def schedule(self) -> Schedule:
        """The inner denoiser's."""
        return self.denoiser.schedule

    def __call__(self, x_t: Images, t: PerSample, cond: Cond) -> Tensor:
        """Return the guided clean image; a batch of several times b repeats the negatives as a whole.

        Raises ``ValueError`` at a time that is none of the inversion's.
        """
        null = self.null
        negative = null.negatives[number_of(null.times, t) if len(null.negatives) > 1 else 0]
        return guided(self.denoiser, null.scale, negative)(x_t, t, cond)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How negatives are fitted: Adam, afresh for every time, as in the paper's code.

    Attributes:
        scale: of guidance.
        num_inner: updates of a time; they must grow as steps do: at 20 steps 10 are too few.
        learning_rate: of the first time; it falls by a hundredth of it from time to time, to 0 behind the
            hundredth.
        tolerance: mean squared distance below which an image's fit at the first time stops; ``slack`` is added
            to it from time to time.
        slack: likewise.
        key: entry of the condition that is fitted.
    """

    scale: float = 7.5
    num_inner: int = 10
    learning_rate: float = 1e-2
    tolerance: float = 1e-5
    slack: float = 2e-5
    key: str = EMBEDDING

    def __post_init__(self) -> None:
        if self.num_inner < 0 or not self.learning_rate > 0 or self.tolerance < 0 or self.slack < 0:
            raise ValueError(
                "a fit needs num_inner, tolerance and slack of at least 0 and a learning_rate above 0; got "
                f"{self}."
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of step ``step``."""
        return self.learning_rate * max(0.0, 1 - step / 100)


def null_text(
    denoiser: Denoiser, inversion: Inversion, cond: Cond, negative: Cond, fit: Fit | None = None
) -> NullText:
    """Fit a negative for each time and image; each image's fit is its own, whatever the batch.

    Args:
        denoiser: without guidance. Give it and its weights in float32: half precision does not optimise.
        inversion: of the images, without guidance: the pivot.
        cond: of the source prompts, batch 1 or b.
        negative: to start from, batch 1 or b: the empty prompt.
        fit: :class:`Fit` () by default.

    Raises:
        ValueError: a negative without ``fit.key``.
    """
    fit = fit or Fit()
    path, times = inversion.path, inversion.path.times
    z, batch = inversion.x_t, len(inversion.x_t)
    cond, current = expand_cond(cond, batch), _owned(negative, batch, fit.key)
    negatives, losses = [], []
    for number, time in enumerate(times):
        t, wanted = time.to(z.device).expand(batch), path.points[number + 1]
        step = _Step(denoiser, t, _next(times, number, t), cond, fit.scale)
        with torch.no_grad():
            positive = denoiser(z, t, cond)
        with torch.enable_grad():  # also where the caller only samples
            current = _fitted(step, z, positive, wanted, current, fit, number)
        with torch.no_grad():
            z = step(z, positive, current)
        negatives.append(current)
        losses.append((z - wanted).square().flatten(1).mean(1))
    return NullText(times, tuple(negatives), fit.scale, torch.stack(losses))


def global_null_text(
    denoiser: Denoiser, inversion: Inversion, cond: Cond, negative: Cond, fit: Fit | None = None
) -> NullText:
    """Fit one negative for all times: the paper's ablation, cheaper to keep and a worse fit.

    Each of ``fit.num_inner`` sweeps passes all times, and makes one update at each from the pivot's own point.
    Arguments and errors are those of :func:`null_text`; ``fit.rate`` falls from sweep to sweep.
    """
    fit = fit or Fit()
    path, times = inversion.path, inversion.path.times
    batch = len(inversion.x_t)
    cond, current = expand_cond(cond, batch), _owned(negative, batch, fit.key)
    embedding = current[fit.key].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([embedding], fit.learning_rate)
    updates = 0 if fit.scale == 1 else fit.num_inner  # without guidance nothing sees the negative
    losses = torch.zeros(len(times), batch, dtype=embedding.dtype)
    for sweep in range(updates + 1):  # the last one only measures
        optimizer.param_groups[0]["lr"] = fit.rate(sweep)
        for number, time in enumerate(times):
            x_t, t = path.points[number], time.to(embedding.device).expand(batch)
            step = _Step(denoiser, t, _next(times, number, t), cond, fit.scale)
            with torch.no_grad():
                positive = denoiser(x_t, t, cond)
            with torch.set_grad_enabled(sweep < updates):
                error = step(x_t, positive, {**current, fit.key: embedding}) - path.points[number + 1]
                loss = error.square().flatten(1).mean(1)
            losses[number] = loss.detach()
            if sweep < updates:
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
    found = {**current, fit.key: embedding.detach()}
    return NullText(times, (found,), fit.scale, losses)


@dataclass(frozen=True, eq=False)
class _Step:
    """A guided DDIM step whose positive prediction is known: one call of the network, on the negative."""

    denoiser: Denoiser
    t: Tensor
    s: Tensor | None
    cond: Cond
    scale: float

    def __call__(self, x_t: Tensor, positive: Tensor, negative: Cond) -> Tensor:
        away = self.denoiser(x_t, self.t, negative) if self.scale != 1 else positive
        x0 = (away + self.scale * (positive - away)).to(x_t.dtype)
        if self.s is None:
            return x0
        return towards(self.denoiser.schedule, Point(self.t, x_t, x0), x0, self.s)


def _fitted(step: _Step, z: Tensor, positive: Tensor, wanted: Tensor, start: Cond, fit: Fit, number: int) -> Cond:
    if step.scale == 1 or not fit.num_inner:  # guidance does not see the negative
        return start
    embedding = start[fit.key].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([embedding], fit.rate(number))
    enough = fit.tolerance + number * fit.slack
    done = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    for _ in range(fit.num_inner):
        loss = (step(z, positive, {**start, fit.key: embedding}) - wanted).square().flatten(1).mean(1)
        done = done | (loss.detach() < enough)
        if bool(done.all()):
            break
        optimizer.zero_grad()
        loss.sum().backward()
        before = embedding.detach().clone()
        optimizer.step()
        with torch.no_grad():
            embedding[done] = before[done]
    return {**start, fit.key: embedding.detach()}


def _owned(negative: Cond, batch: int, key: str) -> Cond:
    if key not in negative or not negative[key].is_floating_point():
        raise ValueError(
            f"null-text inversion fits the entry {key!r} of the negative condition; got {sorted(negative)}. "
            "It needs a model of prompts."
        )
    return expand_cond(negative, batch)


def _next(times: Tensor, number: int, t: Tensor) -> Tensor | None:
    return times[number + 1].to(t.device).expand(len(t)) if number + 1 < len(times) else None


def with_scale(null: NullText, scale: float) -> NullText:
    """Return the same negatives under another scale: farther from the image, for stronger edits."""
    return replace(null, scale=scale)
