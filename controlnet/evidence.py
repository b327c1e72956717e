"""Was control learned? Figures that answer during training, each beside its floor and its ceiling.

The loss of a ControlNet says nothing: it fluctuates about the base's while control arrives all at once. Two
things do show it, on the same held-out samples, noise and seeds at each look:

- the paired gap: the loss under another sample's hint minus that under the right one. It is exactly 0 for a
  fresh adapter, takes two passes and no sampling, and moves first;
- control scores: hints are read off generated images and compared with those asked for. The floor is the same
  images against hints of other samples, the ceiling real images after the autoencoder's round trip.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from controlnet.adapter import ControlledDenoiser
from controlnet.scores import ERRORS, Score
from scorefield.denoiser import Cond, Conditioned, Denoiser, NetworkDenoiser
from scorefield.gradient import TimeWeight, prediction_weight, weighted_error
from scorefield.guidance import Norm, guided
from scorefield.progress import progress
from scorefield.randomness import derived_generator, normal_like
from scorefield.sampling import grid, initial_noise, sample
from scorefield.times import TimeSampler, uniform

ALL_TIMES = uniform(0.0, 1.0)

Share = Callable[[Callable[[Tensor], Tensor], int], Tensor]
"""(work, num_rows) -> rows: ``work`` on row numbers, whole or in shares; see :func:`ranks.shared_rows`."""


def alone(work: Callable[[Tensor], Tensor], num_rows: int) -> Tensor:
    """Return all rows on one rank."""
    return work(torch.arange(num_rows))


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Held-out samples by which control is judged, the same at each look; 64 make steady figures.

    Attributes:
        x0: (n, c, h, w) latents, or pixels for a model of pixels.
        hint: (n, k, h, w) in [0, 1].
        cond: of the base, batch n.
        images: (n, 3, h, w) in [-1, 1], the images that x0 and hint were made of.
        truth: whatever else a judge wants to know of them, batch n, such as colours.
    """

    x0: Tensor
    hint: Tensor
    cond: Cond
    images: Tensor
    truth: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = {"hint": self.hint, "images": self.images, **self.cond, **self.truth}
        if wrong := {name: len(value) for name, value in tensors.items() if len(value) != len(self)}:
            raise ValueError(f"a probe of {len(self)} samples needs as many of everything; got {wrong}.")
        if len(self) < 2:
            raise ValueError(f"a probe needs at least 2 samples, to exchange their hints; got {len(self)}.")

    def __len__(self) -> int:
        return len(self.x0)

    def shuffled(self) -> Self:
        """Return each sample with the hint, image and truth of the one half a round away; x0 and cond stay.

        Neighbours may be much alike, such as frames of one film.
        """
        far = len(self) // 2
        truth = {name: value.roll(far, 0) for name, value in self.truth.items()}
        return replace(self, hint=self.hint.roll(far, 0), images=self.images.roll(far, 0), truth=truth)


Judge = Callable[[Tensor, Probe], Mapping[str, Tensor]]
"""(images in [-1, 1], probe) -> scores by name, (n,) each; the first is the one to watch.

The first line of its docstring says in cards what is judged.
"""


def hint_judge(annotate: Callable[[Tensor], Tensor], scores: Mapping[str, Score]) -> Judge:
    """Return a judge that makes hints of the images and compares them with the probe's.

    Args:
        annotate: images in [-1, 1] to hints in [0, 1], as the hints of the probe were made, with fixed parameters.
        scores: such as :data:`controlnet.scores.EDGE_SCORES`.
    """

    def judge(images: Tensor, probe: Probe) -> dict[str, Tensor]:
        """Are the hints that the same annotator makes of the samples those asked for?"""
        made = annotate(images)
        return {name: score(made, probe.hint.to(made.device)) for name, score in scores.items()}

    return judge


@dataclass(frozen=True)
class Gap:
    """Loss under other samples' hints minus loss under the right ones.

    Attributes:
        right: mean loss under the right hints.
        shuffled: mean loss under those of other samples.
        error: standard error of the mean of the paired differences.
        residual_rms: of what the adapter adds to the base, or of the change of x0 by a control LoRA; 0 for a
            fresh one.
    """

    right: float
    shuffled: float
    error: float
    residual_rms: float

    @property
    def value(self) -> float:
        """0 for a fresh adapter, above 0 once the hint is of use."""
        return self.shuffled - self.right

    @property
    def significant(self) -> bool:
        """Above 0 by three standard errors."""
        return self.value > 3 * self.error


@torch.no_grad()
def paired_gap(
    denoiser: ControlledDenoiser, probe: Probe, *, times: TimeSampler = ALL_TIMES,
    weight: TimeWeight | None = None, seed: int = 0, batch_size: int = 16, share: Share = alone,
) -> Gap:  # fmt: skip
    """Return the paired gap on fixed x0, t and noise; neither depends on the batch size or the number of ranks.

    Args:
        denoiser: its own hint is ignored.
        probe: the samples.
        times: of the noise, one a sample.
        weight: of the loss, by default that of the base's prediction kind.
        seed: of times and noise.
        batch_size: samples per pass.
        share: splits the samples over ranks.
    """
    denoiser, schedule = denoiser.unwrapped(), denoiser.schedule
    weight = prediction_weight(denoiser.base.kind) if weight is None else weight
    t_all = times(len(probe), schedule, derived_generator(seed, "gap", "times"))
    hints = (probe.hint, probe.shuffled().hint)

    def losses(rows: Tensor) -> Tensor:
        x0, t = probe.x0[rows], t_all[rows].to(probe.x0.device)
        noise = normal_like(x0, [derived_generator(seed, "gap", row) for row in rows.tolist()])
        x_t, cond = schedule.diffuse(x0, noise, t), {name: value[rows] for name, value in probe.cond.items()}
        columns = []
        for hint in hints:
            prediction, residuals = denoiser.with_hint(hint[rows]).with_residuals(x_t, t, cond)
            columns.append(weighted_error(prediction, x0, t, schedule, weight).double())
        if not residuals:  # of a control LoRA, which changes the layers themselves
            residuals = {"x0": prediction - denoiser.base(x_t, t, cond)}
        square = torch.stack([value.float().square().flatten(1).mean(1) for value in residuals.values()])
        return torch.stack([*columns, square.mean(0).double()], 1)

    table = share(lambda rows: torch.cat([losses(part) for part in rows.split(batch_size)]), len(probe)).cpu()
    difference = table[:, 1] - table[:, 0]
    error = float(difference.std()) / math.sqrt(len(difference))
    right, shuffled, square = table.mean(0).tolist()
    return Gap(right, shuffled, error, math.sqrt(square))


@dataclass(frozen=True)
class BoundedScore:
    """A score between what it would be without control, and what it could be at best.

    Attributes:
        value: of the samples.
        floor: of the same against the hints of others.
        ceiling: of real images.
        error: whether less is better.
    """

    value: float
    floor: float
    ceiling: float
    error: bool = False

    @property
    def relative(self) -> float:
        """0 at the floor, 1 at the ceiling; nan where the ceiling is not better by 0.1, of an error by a tenth.

        Such a score cannot tell control from none: noise would take it anywhere.
        """
        better, least = self.ceiling - self.floor, 0.1
        if self.error:
            better, least = -better, 0.1 * self.floor
        if not (better > 0 and better >= least):
            return math.nan
        return (self.value - self.floor) / (self.ceiling - self.floor)


@dataclass(frozen=True, kw_only=True, eq=False)
class Validation:
    """How images are drawn and judged: fixed hints, prompts and seeds, whatever the batch size or number of ranks.

    Attributes:
        probe: the samples.
        judge: see :func:`hint_judge`.
        decode: x0 to images in [-1, 1]; nothing to do for a model of pixels.
        encode: images to x0, for the ceiling.
        guidance: scale; 1 is none.
        negative: condition that guidance moves away from, batch 1.
        norm: how guidance keeps the length of predictions.
        told: the network is told the scale of guidance, in place of classifier-free guidance (FLUX.1-dev).
        num_steps: of DDIM.
        shift: of the noise levels of its times.
        seed: of the initial noise.
        batch_size: images per pass.
        share: splits drawing and round trips over ranks, which must then ask for all of them together.
        errors: scores of the judge of which less is better.
    """

    probe: Probe
    judge: Judge
    decode: Callable[[Tensor], Tensor] = torch.clone
    encode: Callable[[Tensor], Tensor] = torch.clone
    guidance: float = 1.0
    negative: Cond = field(default_factory=dict)
    norm: Norm = "none"
    told: bool = False
    num_steps: int = 20
    shift: float = 1.0
    seed: int = 0
    batch_size: int = 16
    share: Share = alone
    errors: Collection[str] = ERRORS

    def images(self, denoiser: ControlledDenoiser | NetworkDenoiser) -> Tensor:
        """Return (n, 3, h, w) on the CPU, clamped to [-1, 1], the same for each rank; without control for a bare
        base.
        """
        denoiser, probe = denoiser.unwrapped(), self.probe
        times = grid(denoiser.schedule, self.num_steps, shift=self.shift, spacing="uniform")

        def draw(rows: Tensor) -> Tensor:
            seeds = [derived_generator(self.seed, "validation", row) for row in rows.tolist()]
            x_t = initial_noise(denoiser.schedule, normal_like(probe.x0[rows], seeds), times[0])
            cond = {name: value[rows] for name, value in probe.cond.items()}
            model = denoiser
            if isinstance(model, ControlledDenoiser):
                model = model.with_hint(probe.hint[rows])
            return self.decode(sample(self._guided(model), x_t, cond, times=times))

        return self._all(draw)

    def _guided(self, model: Denoiser) -> Denoiser:
        if self.told and self.guidance != 1:
            return Conditioned(model, {"guidance": torch.tensor([self.guidance], device=self.probe.x0.device)})
        return guided(model, self.guidance, {} if self.told else self.negative, norm=self.norm)

    def bounded_scores(self, images: Tensor) -> dict[str, BoundedScore]:
        """Return the scores of ``images``, with floor and ceiling."""
        values, floor = _means(self.judge(images, self.probe)), _means(self.judge(images, self.probe.shuffled()))
        return {
            name: BoundedScore(value, floor[name], self.ceiling[name], error=name in self.errors)
            for name, value in values.items()
        }

    @functools.cached_property
    def ceiling(self) -> dict[str, float]:
        """The scores of the real images after the autoencoder's round trip."""
        device = self.probe.x0.device
        images = self._all(lambda rows: self.decode(self.encode(self.probe.images[rows].to(device))))
        return _means(self.judge(images, self.probe))

    @torch.no_grad()
    def _all(self, draw: Callable[[Tensor], Tensor]) -> Tensor:
        # Row numbers to images, in batches, by all ranks.
        def drawn(rows: Tensor) -> Tensor:
            parts = progress(rows.split(self.batch_size), "validation images, in batches")
            return torch.cat([draw(part).clamp(-1, 1).float() for part in parts])

        return self.share(drawn, len(self.probe)).cpu()


def _means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(values.double().mean()) for name, values in scores.items()}
