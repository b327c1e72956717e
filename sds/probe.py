"""Curves that mean something: always the same views, times and noises, so that only the scene changes.

The "loss" of score distillation does not fall when training works. What falls is the residual, the distance of a
render from what the teacher, shown that render under the same noise, expects. Beside it: how strong the loss pulls
at each time, how that compares with the penalties, and pictures of what the teacher expects.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from score.denoiser import Cond, Denoiser
from score.gradient import ScoreDistillation, inject
from score.randomness import derived_generator, normal_like
from score.schedule import Images
from score.times import constant
from sds.looks import Look
from sds.lora import CAMERA
from sds.losses import Distillation
from sds.vsd import VSD

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where on the schedule is looked, in its customary spacing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """Looks at a subject from fixed views, at fixed times, with fixed noise.

    Attributes:
        look: a step's look at the fixed views, always the same for the same scene.
        target: the teacher as the loss guides it.
        decode: x0 to images, for pictures.
        network: whose parameters learn.
        fractions: of the schedule.
    """

    look: Callable[[int], Look]
    target: Denoiser
    decode: Callable[[Tensor], Tensor]
    network: nn.Module
    fractions: Sequence[float] = FRACTIONS

    @torch.no_grad()
    def residuals(self, x0: Images, cond: Cond) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Root mean square of x0 - E[x0 | x_t] at each fraction and their mean; and what the teacher expects."""
        known = {name: value for name, value in cond.items() if name != CAMERA}  # which VSD's phi alone is told
        residuals, expected = {}, []
        for fraction, t in self._times(x0):
            noise = normal_like(x0, derived_generator("probe", str(fraction)))
            answer = self.target(self.target.schedule.diffuse(x0, noise, t), t, known)
            residuals[f"residual/t_{fraction:g}"] = (x0 - answer).float().square().mean().sqrt()
            expected.append(answer)
        residuals["residual"] = torch.stack(list(residuals.values())).mean()
        return residuals, expected

    def gradients(self, method: Distillation, x0: Images, cond: Cond) -> dict[str, Tensor]:
        """Root mean square of the loss's gradient at each fraction; empty for a loss without a ``times`` field."""
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

    def balance(self, method: Distillation, look: Look) -> dict[str, Tensor]:
        """Norm of the score's gradient with respect to the parameters over that of the penalty's, if there is one.

        It runs one backward pass for each; the parameters' own gradients are not touched.
        """
        gradient = method.gradient(look.x0, look.cond, generator=derived_generator("probe", "balance"))
        score = inject(look.x0, gradient.value) / len(look.x0)
        norms = [self._norm(loss) for loss in (score, look.penalty)]
        return {"score_to_penalty": norms[0] / norms[1]} if norms[1] > 0 else {}

    def __call__(self, step: int, method: Distillation) -> tuple[Mapping[str, float], Tensor]:
        """All figures of a step's scene, and pictures in rows of b: the views, and what is expected at each t."""
        with torch.enable_grad():
            look = self.look(step)
            figures = self.balance(method, look)
        x0 = look.x0.detach()
        residuals, expected = self.residuals(x0, look.cond)
        figures |= {**residuals, **self.gradients(method, x0, look.cond)}
        with torch.no_grad():
            pictures = torch.cat([self.decode(image).float() for image in (x0, *expected)])
        values = torch.stack([value.detach().float().cpu() for value in figures.values()]).tolist()
        return {f"probe/{name}": value for name, value in zip(figures, values, strict=True)}, pictures

    def _times(self, x0: Images) -> list[tuple[float, Tensor]]:
        schedule = self.target.schedule
        times = schedule.at(torch.tensor(self.fractions, dtype=torch.float64)).float().to(x0.device)
        return [(fraction, t.expand(len(x0))) for fraction, t in zip(self.fractions, times, strict=True)]

    def _norm(self, loss: Tensor) -> Tensor:
        if not loss.requires_grad:
            return loss.new_zeros(())
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt()
