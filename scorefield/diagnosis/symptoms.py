"""What is wrong with a teacher beside its reading: answers that are no answers, conditions, times off by one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from scorefield.denoiser import Cond, Denoiser, NetworkDenoiser
from scorefield.diagnosis.mistakes import off_by
from scorefield.diagnosis.readings import Output, Reading
from scorefield.diagnosis.trials import Errors, Trial, difference, errors, make_trial, tried
from scorefield.sampling import grid, initial_noise, sample
from scorefield.schedule import Images

Severity = Literal["error", "warning"]

EARLY = (2.0, 4.0, 8.0)
"""Integer times at which being off by one shows: each step there changes the noise by a tenth or more."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a teacher.

    Attributes:
        name: of the mistake, the same for all teachers; ``docs/teacher_check.md`` lists them.
        severity: an error means that training cannot succeed.
        message: what was found, what was expected and what to do.
    """

    name: str
    severity: Severity
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}: {self.message}"


def broken_answers(denoiser: Denoiser, noise: Images, cond: Cond) -> list[Finding]:
    """Answers of another shape, that are not finite, that change, or that depend on the rest of the batch.

    Args:
        denoiser: asked four times, at sigma / alpha = 1.
        noise: (n, *shape); up to four are used.
        cond: of batch n.
    """
    x_t = noise[:4]
    schedule = denoiser.schedule
    t = schedule.snap(schedule.time(torch.ones(len(x_t), dtype=torch.float64))).to(x_t)
    part = {name: value[: len(x_t)] for name, value in cond.items()}
    try:
        first, again = denoiser(x_t, t, part), denoiser(x_t, t, part)
    except ValueError as error:
        if "shape of x_t" not in str(error):
            raise
        hint = "Where its channels come last, permute x_t to (0, 2, 3, 1) before it and back after it."
        return [Finding("shape", "error", f"{error} {hint}")]
    alone = denoiser(x_t[:1], t[:1], {name: value[:1] for name, value in part.items()})
    mode = " It is in training mode: call network.eval()." if _is_training(denoiser) else ""
    if not bool(first.isfinite().all()):
        message = (
            "it answers with nan or inf at sigma / alpha = 1; expected numbers. Are its weights whole, and is its"
        )
        return [Finding("not_finite", "error", f"{message} precision enough?")]
    spread = float(first.std()) + 1e-12
    if float((first - again).std()) > 0.01 * spread:
        message = "the same question has two answers; expected one."
        return [Finding("random", "error", message + (mode or " Switch off dropout and noise in its forward."))]
    if float((first[:1] - alone).std()) > 0.05 * spread:
        message = "an image's answer depends on the others in its batch; expected one image, one answer."
        return [Finding("batch", "error", message + (mode or " Put batch normalisation into eval mode."))]
    return []


def _is_training(denoiser: Denoiser) -> bool:
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else None
    return isinstance(network, nn.Module) and any(module.training for module in network.modules())


def few_step_samples(
    denoiser: Denoiser, noise: Images, cond: Cond, counts: Mapping[int, int], batch_size: int
) -> dict[int, Tensor]:
    """Samples of DDIM, by the number of steps; ``counts`` says how many of each."""
    found: dict[int, Tensor] = {}
    for steps, n in counts.items():
        times = grid(denoiser.schedule, steps)
        parts = []
        for start in range(0, min(n, len(noise)), batch_size):
            part = slice(start, min(start + batch_size, n))
            x_t = initial_noise(denoiser.schedule, noise[part], times[0])
            some = {name: value[part] for name, value in cond.items()}
            parts.append(sample(denoiser, x_t, some, times=times))
        found[steps] = torch.cat(parts)
    return found


def unlike_pictures(samples: Images, bounded: bool) -> str:
    """Say why own samples are no pictures at all: not finite, far too large, white noise; or nothing."""
    largest = float(samples.abs().max())
    if not bool(samples.isfinite().all()) or largest > (4.0 if bounded else 30.0):
        return f"its own samples reach {largest:.3g}; expected about {'1' if bounded else '4'} at most"
    if samples.ndim == 4 and min(samples.shape[2:]) >= 4:
        centred = samples.double() - samples.double().mean([0, 2, 3], keepdim=True)
        pairs = (centred[..., 1:] * centred[..., :-1]).mean() + (centred[..., 1:, :] * centred[..., :-1, :]).mean()
        likeness = float(pairs / 2 / (centred.square().mean() + 1e-12))
        if likeness < 0.1:
            return f"in its own samples neighbours are alike by {likeness:.2f}, as in noise; expected 0.3 or more"
    return ""


def strange_range(samples: Images) -> list[Finding]:
    """Own samples that do not fill [-1, 1], as pictures mostly do; a warning, since some do not."""
    values = samples.double().flatten()
    values = values[:: -(-len(values) // 1_000_000)].cpu()  # all that torch's quantile takes
    low, high = values.quantile(torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
    # A dark set may lack white and a bright one black, but hardly both, nor anything below the middle.
    if -1.6 < low < -0.1 and high < 1.6 and (low < -0.7 or high > 0.7):
        return []
    message = (
        f"its own samples lie in [{low:.2f}, {high:.2f}] (1 % and 99 %); expected about [-1, 1]. If its data were "
        "scaled otherwise, rescale x_t and the schedule together in the wrapper."
    )
    return [Finding("data_scale", "warning", message)]


def wrong_conditions(base: Reading, output: Output, trial: Trial, null: Cond | None) -> list[Finding]:
    """Labels or prompts that do not belong to the images, and a null condition that was never learned.

    The images are asked about under their own conditions and under each other's.
    """
    other = exchanged(trial.cond)
    if other is None:
        return []
    own, wrong = errors(base, trial)[output], errors(base, trial.under(other))[output]
    gain = difference(own, wrong, trial.floor)
    found = better_conditions(base, output, trial, null)
    if not found and (gain.worse or (len(own[0]) >= 16 and gain.mean > max(-0.002, -2 * gain.error))):
        message = (
            f"its error of x0 is {_percent(gain.mean)} under the images' own labels or prompts than under those "
            "of other images; expected clearly smaller. Do they belong together, in the order of its training?"
        )
        found.append(Finding("labels", "warning", message))
    without = None if null is None else tried(base, trial.under(_whole(null, len(trial.x0)))).get(output)
    if without is not None and (loss := difference(without, wrong, trial.floor)).worse and loss.mean > 0.1:
        message = (
            f"without a label or prompt its error is {_percent(loss.mean)} than under wrong ones; expected "
            "smaller. It was not trained without them: pass --guidance 1, or the right null class."
        )
        found.append(Finding("null_class", "warning", message))
    return found


def better_conditions(base: Reading, output: Output, trial: Trial, null: Cond | None) -> list[Finding]:
    """Labels raised or lowered by one, or none, where they explain the images better than their own.

    A network that needs no label to know its images does as well without one as with the right one: labels are
    left out only where that is clearly better than a shift on the images whose labels the shift changes.
    """
    own = errors(base, trial)[output]
    shifts = [one for one in _shifted(base, output, trial, own) if one.gain < -0.05]
    best = min(shifts, key=lambda one: one.gain, default=None)
    without = None if null is None else tried(base, trial.under(_whole(null, len(trial.x0)))).get(output)
    if without is not None and (gain := difference(without, own, trial.floor)).better and gain.mean < -0.05:
        moved = torch.ones_like(without[0], dtype=torch.bool) if best is None else best.moved
        if best is None or difference(without[:, moved], best.error[:, moved], trial.floor).better:
            best = _Relabelled("they are left out", without, moved, gain.mean)
    if best is None:
        return []
    message = (
        f"the images' labels or prompts are not the teacher's: its error of x0 is {_percent(best.gain)} if "
        f"{best.how}. Count classes from 0, in the order of its training, and give each image its own prompt."
    )
    return [Finding("labels", "error" if best.gain < -0.7 else "warning", message)]


@dataclass(frozen=True, eq=False)
class _Relabelled:
    how: str
    error: Errors
    moved: Tensor  # (n,) bool
    gain: float


def _shifted(base: Reading, output: Output, trial: Trial, own: Errors) -> list[_Relabelled]:
    """Labels raised and lowered by one, where that is significantly better than ``own``."""
    labels = trial.cond.get("class_labels")
    if labels is None or labels.ndim != 1:
        return []
    # Labels beyond those that occur may not exist: images at the end keep theirs, which weakens the gain.
    low, high = int(labels.min()), int(labels.max())
    found = []
    for shift, how in ((1, "raised"), (-1, "lowered")):
        moved = (labels + shift).clamp(low, high)
        error = tried(base, trial.under({**trial.cond, "class_labels": moved})).get(output)
        if error is not None and (gain := difference(error, own, trial.floor)).better:
            changed = (moved != labels).to(error.device)
            found.append(_Relabelled(f"all are {how} by one", error, changed, gain.mean))
    return found


def _whole(null: Cond, n: int) -> Cond:
    return {name: value.expand(n, *value.shape[1:]) for name, value in null.items()}


def _percent(log: float) -> str:
    return f"{abs(2.718281828**log - 1):.1%} {'larger' if log > 0 else 'smaller'}"


def exchanged(cond: Cond) -> Cond | None:
    """Return the conditions of other images, as many as a rotation gives; None where all are alike."""
    n = len(next(iter(cond.values()), ()))
    rows = torch.cat([value.reshape(n, -1).double().cpu() for value in cond.values()], 1) if n > 1 else None
    if rows is None:
        return None
    changed = [float((rows.roll(shift, 0) != rows).any(1).double().mean()) for shift in range(1, n)]
    shift = max(range(1, n), key=lambda candidate: changed[candidate - 1])
    return {name: value.roll(shift, 0) for name, value in cond.items()} if changed[shift - 1] > 0.4 else None


def time_off_by_one(base: Reading, output: Output, trial: Trial, generator: Generator) -> list[Finding]:
    """Integer times that the network knows one earlier or later: at the first times each step counts.

    One step must be better than none and than two, at each of three times: a network merely vague about low
    noise prefers ever smaller or ever larger times instead.
    """
    schedule = base.schedule
    if not schedule.cell or base.sigma_data is not None or schedule.t_max < 4 * EARLY[-1]:
        return []
    ratios = schedule.ratio(torch.tensor(EARLY, dtype=torch.float64))
    early = make_trial(trial.x0, trial.cond, ratios, generator, trial.batch_size)
    found = {0: errors(base, early)[output]}
    for offset in (-2, -1, 1, 2):
        error = tried(off_by(base, offset), early).get(output)
        if error is None:
            return []
        found[offset] = error
    # Errors of eps: those of x0 are all tiny here.
    scale = early.ratios[:, None] ** 2
    found = {offset: error / scale for offset, error in found.items()}
    for offset in (1, -1):
        pairs = [(found[offset], found[other]) for other in (0, 2 * offset)]
        each = [difference(a[[i]], b[[i]], 1e-9).mean for a, b in pairs for i in range(len(EARLY))]
        if all(difference(a, b, 1e-9).better for a, b in pairs) and max(each) < 0:
            what = "t + 1" if offset > 0 else "t - 1"
            least = _percent(max(each[: len(EARLY)]))
            message = (
                f"at t = 2, 4 and 8 its error of eps is at least {least} if it is told {what}, and one more step "
                f"is worse. Pass {what} in the wrapper, or start the schedule's table where its training did."
            )
            return [Finding("off_by_one", "warning", message)]
    return []
