"""Is a teacher what its wrapper says? Measured on a few images in seconds, before anything is trained.

The same network is asked for x0 under the reading that its owner gave it, and under the readings that would be
right had one of the usual mistakes been made. All are asked about the same noisy images, so that differences are
paired, and a mistake is named only where it explains far more than chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from scorefield.denoiser import Cond, Denoiser
from scorefield.diagnosis.explanation import Asked, Row
from scorefield.diagnosis.symptoms import (
    Finding,
    better_conditions,
    broken_answers,
    few_step_samples,
    strange_range,
    time_off_by_one,
    unlike_pictures,
    wrong_conditions,
)
from scorefield.randomness import normal_like
from scorefield.schedule import Images

OWN_STEPS = 16
"""DDIM steps of the teacher's own samples, where there are no data."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        findings: the worst first; empty for a good teacher.
        rows: one for each noise level.
        images: that it was measured on, or None where it could not be asked.
        own: they are the teacher's own samples, which show fewer mistakes than data do.
        samples: from 1, 2 and 4 DDIM steps (16 where ``own``), by the number of steps.
        calls: of the network.
    """

    findings: tuple[Finding, ...]
    rows: tuple[Row, ...] = ()
    images: Tensor | None = None
    own: bool = False
    samples: Mapping[int, Tensor] = field(default_factory=dict)
    calls: int = 0

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings with which no training may start."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the findings."""
        return tuple(finding.name for finding in self.findings)


@torch.no_grad()
def diagnose(
    denoiser: Denoiser, x0: Images | None, cond: Cond, *, generator: Generator, noise: Images | None = None,
    null: Cond | None = None, batch_size: int = 64, bounded: bool = False,
) -> Diagnosis:  # fmt: skip
    """Ask a teacher about a few images, and say what is wrong with it.

    Args:
        denoiser: unguided; anything but a :class:`NetworkDenoiser` is judged by its answers alone.
        x0: (n, *shape) data as the teacher knows them (latents for a latent teacher), 8 to 64 of them; None if
            there are none, and the teacher is asked about its own samples.
        cond: of the images, batch n.
        generator: for the noise.
        noise: (n, *shape) from which samples are drawn; needed without ``x0``, where it says their shape.
        null: the condition without a class or prompt, batch 1, if it was trained.
        batch_size: images in a call of the network.
        bounded: the data are pictures in [-1, 1], which own samples should fill; latents have no bounds.

    Raises:
        ValueError: neither x0 nor noise.
    """
    if x0 is None and noise is None:
        raise ValueError("diagnose needs images, or noise of the shape of its samples; got neither.")
    start = normal_like(x0, generator) if noise is None and x0 is not None else noise
    assert start is not None
    if broken := broken_answers(denoiser, start, cond):
        return Diagnosis(tuple(broken), own=x0 is None, calls=3)
    counts = {1: 8, 2: 8, 4: 8, **({OWN_STEPS: len(start)} if x0 is None else {})}
    try:
        samples = few_step_samples(denoiser, start, cond, counts, batch_size)
    except ValueError as error:  # eps at alpha = 0
        return Diagnosis((Finding("schedule", "error", str(error)),), images=x0, own=x0 is None)
    images = samples[OWN_STEPS] if x0 is None else x0
    strange = unlike_pictures(images, bounded) if x0 is None else ""
    # Nothing can be measured on images that are none; noise keeps the search for another reading going.
    asked_on = start if strange else images
    asked = Asked.about(denoiser, asked_on, cond, generator, batch_size, own=x0 is None)
    if strange:
        message = f"this teacher does not denoise: {strange}. Are its weights loaded?"
        findings = asked.from_samples() or [Finding("does_not_denoise", "error", message)]
        return Diagnosis(tuple(findings), (), images, True, samples, asked.counted.calls + sum(samples) + 3)
    findings = asked.named()
    if bounded and x0 is None:
        findings = findings or strange_range(images)
    if [finding.name for finding in findings] == ["does_not_denoise"]:
        findings = better_conditions(asked.base, asked.output, asked.middle_trial, null) or findings
    elif all(finding.severity == "warning" for finding in findings):
        findings += wrong_conditions(asked.base, asked.output, asked.middle_trial, null)
        findings += time_off_by_one(asked.base, asked.output, asked.trial, generator)
    order = tuple(sorted(findings, key=lambda finding: finding.severity))
    calls = asked.counted.calls + sum(samples) + 3
    return Diagnosis(order, asked.rows(), images, x0 is None, samples, calls)
