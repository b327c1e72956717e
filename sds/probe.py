"""Figures that can be compared along a training: views, times and noises are fixed, and only the scene changes.

The "loss" of score distillation does not fall when training works. What falls is the residual: the distance of a
render from what the teacher expects when it sees that render under the same noise. Also measured are the strength
of the loss's gradient at each time and its ratio to the penalties' gradient, and the images that the teacher
expects are shown.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scorefield.denoiser import Cond, Denoiser
from scorefield.gradient import ScoreDistillation, inject
from scorefield.randomness import derived_generator, normal_like
from scorefield.schedule import Images
from scorefield.times import constant
from sds.losses import Distillation
from sds.training import Observation
from sds.vsd import VSD

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times of the probe, as fractions of the schedule (see ``Schedule.at``)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Measurements of a subject from fixed views, at fixed times, with fixed noise.

    Only :meth:`balance` keeps a graph, and of one view at a time, so that a run has the memory for it.

    Attributes:
        views: For each fixed view, or for all particles of a canvas, a function step -> observation. It returns
            the same for the same scene and step, at the step's resolution and with its penalties.
        target: The teacher, guided as the loss guides it at the end. It gets all conditions of a view.
        decode: x0 to images, for pictures.
        network: The module whose parameters are trained.
        fractions: Times, as fractions of the schedule.
    """

    views: Sequence[Callable[[int], Observation]]
    target: Denoiser
    decode: Callable[[Tensor], Tensor]
    network: nn.Module
    fractions: Sequence[float] = FRACTIONS

    def __call__(self, step: int, method: Distillation) -> tuple[Mapping[str, float], Tensor]:
        """Return all figures of a step's scene, by name, and its pictures (see :meth:`pictures`)."""
        x0, cond = self._seen(step)
        expected = self._expected(x0, cond)
        figures = {
            **self._residuals(x0, expected),
            **self.gradients(method, x0, cond),
            **self.balance(step, method),
        }
        values = torch.stack([value.detach().float().cpu() for value in figures.values()]).tolist()
        named = {f"probe/{name}": value for name, value in zip(figures, values, strict=True)}
        return named, self._decoded(x0, *expected)

    def pictures(self, step: int) -> Tensor:
        """Return pictures in rows of b: first the views, then what the teacher expects at each fraction."""
        x0, cond = self._seen(step)
        return self._decoded(x0, *self._expected(x0, cond))

    def gradients(self, method: Distillation, x0: Images, cond: Cond) -> dict[str, Tensor]:
        """Return the root mean square of the loss's gradient at each fraction.

        Empty for losses other than VSD and the functions of :mod:`sds.losses`.
        """
        if not isinstance(method, ScoreDistillation | VSD):
            return {}
        norms = {}
        for fraction, t in self._times(x0):
            generator = derived_generator("probe", str(fraction))
            there = replace(method, times=constant(float(t[0])))
            norms[f"gradient/t_{fraction:g}"] = there.gradient(x0, cond, generator=generator).metrics[
                "gradient_rms"
            ]
        return norms

    def balance(self, step: int, method: Distillation) -> dict[str, Tensor]:
        """Return the norm of the score's gradient over that of the penalty's, both with respect to the parameters.

        Uses one time and noise per view, however many the run draws. The parameters' own ``grad`` is not touched.
        Empty if there is no penalty.
        """
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        sums = [[torch.zeros_like(p) for p in parameters] for _ in ("score", "penalty")]
        for number, observe in enumerate(self.views):
            with torch.enable_grad():
                seen = observe(step)
                if not seen.penalty.requires_grad:
                    return {}
                generator = derived_generator("probe", "balance", number)
                gradient = method.gradient(seen.x0, seen.cond, generator=generator)
                losses = inject(seen.x0, gradient.value) / len(seen.x0), seen.penalty
            for total, loss in zip(sums, losses, strict=True):
                parts = torch.autograd.grad(loss, parameters, retain_graph=loss is losses[0], allow_unused=True)
                for one, part in zip(total, parts, strict=True):
                    if part is not None:
                        one += part
        score, penalty = (torch.stack([g.float().square().sum() for g in total]).sum().sqrt() for total in sums)
        return {"score_to_penalty": score / penalty} if penalty > 0 else {}

    @torch.no_grad()
    def _seen(self, step: int) -> tuple[Tensor, Cond]:
        seen = [observe(step) for observe in self.views]
        cond = {name: torch.cat([one.cond[name] for one in seen]) for name in seen[0].cond}
        return torch.cat([one.x0 for one in seen]), cond

    @torch.no_grad()
    def _expected(self, x0: Images, cond: Cond) -> list[Tensor]:
        """Return what the teacher expects, E[x0 | x_t], at each fraction."""
        expected = []
        for fraction, t in self._times(x0):
            noise = normal_like(x0, derived_generator("probe", str(fraction)))
            expected.append(self.target(self.target.schedule.diffuse(x0, noise, t), t, cond))
        return expected

    def _residuals(self, x0: Images, expected: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the root mean square of x0 - E[x0 | x_t] at each fraction, and the mean of these values."""
        residuals = {
            f"residual/t_{fraction:g}": (x0 - answer).float().square().mean().sqrt()
            for fraction, answer in zip(self.fractions, expected, strict=True)
        }
        return {**residuals, "residual": torch.stack(list(residuals.values())).mean()}

    @torch.no_grad()
    def _decoded(self, *rows: Tensor) -> Tensor:
        return torch.cat([self.decode(image).float() for row in rows for image in row.split(1)])

    def _times(self, x0: Images) -> list[tuple[float, Tensor]]:
        schedule = self.target.schedule
        times = schedule.at(torch.tensor(self.fractions, dtype=torch.float64)).float().to(x0.device)
        return [(fraction, t.expand(len(x0))) for fraction, t in zip(self.fractions, times, strict=True)]
