"""Guidance at noise levels of its own: decoupled DMD (Liu et al. 2025, arXiv 2511.22677).

With a guided teacher DMD's gradient is a sum (its Eq. 6): fake score less conditional teacher, which matches
distributions, and (scale - 1) times unconditional less conditional teacher, which builds the guidance into the
student. Its Eq. 8 asks the two at noise levels of their own. Matching has the whole range. Guidance has what the
student's current step has still to decide: the input of that step settles what is noisier than itself.

The paper's time runs from noise, 0, to data, 1, so that its tau_CA > t (section 4.1, Algorithm 1) means *less*
noise than the input of the current step. At the first step, whose input is pure noise, it is the whole range.
"""

from dataclasses import dataclass

import torch

from distill.student import Student
from scorefield.denoiser import Cond, Denoiser, expand_cond, under_each
from scorefield.gradient import ScoreGradient, Weight, check_shapes, described
from scorefield.guidance import Guided
from scorefield.schedule import Images, PerSample
from scorefield.times import TimeSampler, between_ratios

Noisy = tuple[PerSample, Images]
"""(t, x_t): times, and images noised to them."""


@dataclass(frozen=True, kw_only=True)
class SeparateGuidance:
    """The noise levels of the guidance term; :attr:`distill.dmd.DMD.times` are then those of matching alone.

    With ``below_step=False`` and the range of matching, the gradient is in the mean the coupled one, and the paper
    found hardly a difference; it found a clear one with guidance below the step (section 4.3, four steps). For a
    student of one step only low and high matter.

    Attributes:
        low: smallest sigma / alpha.
        high: largest sigma / alpha.
        below_step: at a later step of a few-step student, none above the noise level of that step.
    """

    low: float = 0.15
    high: float = 20.0
    below_step: bool = True

    def times(self, student: Student, step: int) -> TimeSampler:
        """Return the times of the guidance term for images of a step, counted from 0, in the customary spacing.

        Raises ``ValueError`` for a step that is asked below ``low``.
        """
        if step == 0 or not self.below_step:
            return between_ratios(self.low, self.high)
        level = float(student.denoiser.schedule.ratio(torch.tensor(student.times[step], dtype=torch.float64)))
        if not self.low < level:
            raise ValueError(
                f"guidance needs noise levels below that of step {step + 1}, sigma / alpha = {level:g}; its "
                f"smallest is low={self.low:g}. Lower it (--ratio-range), or use below_step=False."
            )
        return between_ratios(self.low, min(self.high, level))

    def check(self, student: Student) -> None:
        """Raise ``ValueError`` if at some step of the student there is no time to draw."""
        for step in range(student.num_steps):
            self.times(student, step)(1, student.denoiser.schedule, torch.Generator())


@torch.no_grad()
def decoupled_gradient(
    teacher: Guided, fake: Denoiser, x0: Images, cond: Cond, *, matching: Noisy, guidance: Noisy, weight: Weight
) -> ScoreGradient:
    """Return weight (fake - positive) at one noise level plus weight (scale - 1) (negative - positive) at another.

    In x0 space, where a difference of scores is a difference of clean images, times a factor that is part of the
    weight. Each term has the weight of the coupled gradient, with its guided target, at its own noise level. So at
    equal times and noise the sum *is* the coupled gradient, and learning rates carry over. The paper states no
    normaliser: its Algorithm 1 adds the two differences and multiplies by a constant.

    Args:
        teacher: guided; one call on 4b samples, where the coupled gradient needs 2b.
        fake: the fake score.
        x0: the student's images.
        cond: their conditions.
        matching: times and noisy images of the matching term.
        guidance: times and noisy images of the guidance term.
        weight: of either.

    Raises:
        ValueError: a denoiser that changes the shape of x0, or conditions of another batch.
    """
    n, schedule = len(x0), teacher.schedule
    (t, x_t), (s, x_s) = matching, guidance
    both = (teacher.negative, expand_cond(cond, 2 * n))
    neg, pos = under_each(teacher.denoiser, torch.cat([x_t, x_s]), torch.cat([t, s]), both)
    baseline = fake(x_t, t, cond)
    check_shapes(x0, {"teacher": pos[:n], "baseline": baseline})
    target = neg + teacher.scale * (pos - neg)
    gap, push = baseline - pos[:n], (teacher.scale - 1) * (neg[n:] - pos[n:])
    guided = weight(x0, target[n:], s, schedule) * push
    whole = described(weight(x0, target[:n], t, schedule) * gap + guided, gap, t)
    of_guidance = {"guidance_rms": guided.float().square().mean().sqrt(), "guidance_t_mean": s.mean()}
    return ScoreGradient(whole.value, {**whole.metrics, **of_guidance})
