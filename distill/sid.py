"""Score identity distillation: SiD (Zhou et al. 2024, arXiv 2404.04057).

DMD descends KL(p_fake || p_real); SiD descends the Fisher divergence between the two at every noise level,

    F = E || s_real(x_t) - s_fake(x_t) ||^2 = E (alpha / sigma^2)^2 || mu_real - mu_fake ||^2,

with gradients through both networks to the image. Since mu_fake is the best guess at x0, the same number can be
written E (alpha / sigma^2)^2 (mu_real - mu_fake).(mu_real - x0) (the paper's third identity); the loss mixes both.
"""

from dataclasses import dataclass

import torch
from torch import Generator

from distill.dmd import DMD
from scorefield.denoiser import Cond
from scorefield.gradient import ScoreGradient, check_shapes, described
from scorefield.schedule import Images
from scorefield.times import TimeSampler, uniform


@dataclass(frozen=True, kw_only=True, eq=False)
class SiD(DMD):
    """DMD with the gradient of SiD in place of its own; rollout, fake score, GAN term (SiDA) and phases are DMD's.

    The loss is weight * gap . ((mu_real - x0) - mixture * gap), gap = mu_real - mu_fake. With an exact fake score
    its gradient at mixture 0.5 is half that of F, although the fake score is held fixed: twice the loss is then F
    as the largest value of a function of mu_fake, which does not change with mu_fake to first order. The paper
    finds 1 to 1.2 best all the same. Its weight, 1 / mean |x0 - mu_real|, is DMD's. Beyond DMD it costs a backward
    pass of teacher and fake score to their input.

    Args:
        mixture: the paper's alpha, a name that the schedule has already.
        times: of the gradient; the paper leaves the noisiest fifth out.
        student_every: 1, one fake-score update per student update.
    """

    mixture: float = 1.2
    times: TimeSampler = uniform(0.0, 0.8)
    student_every: int = 1

    def gradient(self, x0: Images, cond: Cond, fake_cond: Cond, *, generator: Generator) -> ScoreGradient:
        """Return the gradient of the loss with respect to x0; none reaches a weight of teacher or fake score."""
        x = x0.detach().requires_grad_()
        with torch.enable_grad():
            t, x_t = self.noisy(x, cond, self.times, generator)
            real, fake = self.teacher(x_t, t, cond), self.fake.unwrapped()(x_t, t, {**cond, **fake_cond})
            check_shapes(x, {"teacher": real, "fake score": fake})
            weight = self.weight(x.detach(), real.detach(), t, self.fake.schedule)
            gap = real - fake
            loss = (weight * gap * (real - x - self.mixture * gap)).sum()
        (value,) = torch.autograd.grad(loss, x)
        return described(value, gap.detach(), t)
