"""The usual mistakes in wrapping a network, each as the reading that would be right had it been made."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scorefield.diagnosis.readings import Reading, c_noise, same
from scorefield.schedule import Images, Karras, RectifiedFlow, Schedule, VariancePreserving

LATENT_SCALES = {"Stable Diffusion": (0.18215, 0.0), "SDXL": (0.13025, 0.0), "SD3": (1.5305, 0.0609)}
"""``scaling_factor`` and ``shift_factor`` of common autoencoders: latents are (z - shift) scaling."""


@dataclass(frozen=True, eq=False)
class Mistake:
    """A reading that would be right if a mistake had been made.

    Attributes:
        name: of the mistake, as the findings have it.
        words: what the network seems to be, after "it denoises far better when ...".
        fix: what to do.
        reading: under which the network then denoises.
    """

    name: str
    words: str
    fix: str
    reading: Reading


def mistakes(base: Reading, x0: Images, time_scale: float = 1.0) -> Iterator[Mistake]:
    """The usual mistakes in wrapping a network, as readings beside ``base``; each costs one call to try.

    Args:
        base: as the owner has it.
        x0: clean images, whose mean and spread count.
        time_scale: the denoiser's.
    """
    yield from _scales(base, x0)
    yield from _arrangements(base, x0)
    yield from _times(base, time_scale)
    yield from _schedules(base)
    yield from _preconditionings(base, x0)


def _scales(base: Reading, x0: Images) -> Iterator[Mistake]:
    dims = [0, *range(2, x0.ndim)]
    mean, std = x0.mean(dims, keepdim=True), x0.std(dims, keepdim=True).clamp(min=1e-6)
    for what, scale, shift in (
        ("x / 2, in [-0.5, 0.5]", 0.5, 0.0),
        ("(x + 1) / 2, in [0, 1]", 0.5, 0.5),
        ("2 x", 2.0, 0.0),
        ("2 x - 1, as if those given were in [0, 1]", 2.0, -1.0),
        ("bytes, 127.5 (x + 1)", 127.5, 127.5),
        ("x / 127.5 - 1, as if those given were bytes", 1 / 127.5, -1.0),
        ("(x - mean) / std, standardised", 1 / std, -mean / std),
        ("x - mean, centred", 1.0, -mean),
        ("-x, black for white", -1.0, 0.0),
    ):
        yield _scaled(base, what, scale, shift)
        if base.sigma_data is None:
            yield _scaled(base, what, scale, shift, wrapped=True)
    for family, (scaling, offset) in LATENT_SCALES.items() if x0.ndim == 4 and x0.shape[1] >= 4 else ():
        yield _scaled(base, f"latents times {family}'s scaling_factor {scaling}", scaling, -scaling * offset)
        yield _scaled(base, f"latents without {family}'s scaling_factor {scaling}", 1 / scaling, offset)


def _scaled(
    base: Reading, what: str, scale: Tensor | float, shift: Tensor | float, *, wrapped: bool = False
) -> Mistake:
    words = f"it knows the data as {what}"
    fix = "Rescale x_t and the schedule together, so that data in our units reach the network in its own."
    if wrapped:
        words += ", which the wrapper gives it without a schedule to match"
    return Mistake("data_scale", words, fix, replace(base, scale=scale, shift=shift, wrapped=wrapped))


def more_scales(base: Reading, x0: Images) -> Iterator[Mistake]:
    """Scales and means of the data on a coarse grid, for a mistake that has no name."""
    mean = x0.mean()
    for scale in (0.03, 0.06, 0.12, 0.25, 0.35, 0.7, 1.4, 2.8, 4.0, 8.0, 16.0, 32.0):
        yield _scaled(base, f"{scale:g} x", scale, 0.0)
        yield _scaled(base, f"{scale:g} (x - mean)", scale, -scale * mean)
        yield _scaled(base, f"{scale:g} x", scale, 0.0, wrapped=True)


def _arrangements(base: Reading, x0: Images) -> Iterator[Mistake]:
    if x0.ndim != 4:
        return
    _, c, h, w = x0.shape

    def moved(
        name: str, words: str, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Mistake:
        fix = "Permute the axes of images (x.permute(0, 3, 1, 2)) where they are read; do not reshape them."
        fix = fix if name == "channels_last" else "Turn the images as the network's own training code does."
        return Mistake(name, words, fix, replace(base, arrange=there, restore=back))

    def last(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).reshape(len(x), c, h, w)

    def first(x: Tensor) -> Tensor:
        return x.reshape(len(x), h, w, c).permute(0, 3, 1, 2)

    if c > 1:
        words = "its images have their channels last, (h, w, c) in memory"
        yield moved("channels_last", words, last, first)
        yield moved("channels_last", "the images given were (h, w, c) and were reshaped", first, last)
    if c == 3:
        yield moved("channel_order", "red and blue are exchanged (BGR)", lambda x: x.flip(1), lambda x: x.flip(1))
    if h == w:
        yield moved("orientation", "rows and columns are exchanged", lambda x: x.mT, lambda x: x.mT)
    yield moved("orientation", "the images are upside down", lambda x: x.flip(2), lambda x: x.flip(2))


def _times(base: Reading, time_scale: float) -> Iterator[Mistake]:
    schedule, told = base.schedule, base.told
    low, high = schedule.t_min, schedule.t_max
    steps = round(high) + 1 if schedule.cell else 1000

    def other(name: str, words: str, fix: str, new: Callable[[Tensor], Tensor]) -> Mistake:
        return Mistake(name, f"it is told {words}", fix, replace(base, told=new))

    if not isinstance(schedule, Karras):
        if time_scale * high > 2:
            fix = f"It knows t in [0, 1]: pass time_scale={time_scale / steps:g}."
            yield other("time_scale", f"t / {steps}, a time in [0, 1]", fix, lambda t: told(t) / steps)
        else:
            fix = f"It knows t in [0, {steps}]: pass time_scale={time_scale * steps:g}."
            yield other("time_scale", f"{steps} t", fix, lambda t: told(t) * steps)
            yield other("time_reversed", f"{steps} (1 - t)", fix + " And t grows with noise here.",
                        lambda t: steps * told(low + high - t))  # fmt: skip
        fix = "Here t grows with noise; turn t round in the wrapper (and the sign of a flow)."
        yield other("time_reversed", "the reversed time, t_max - t", fix, lambda t: told(low + high - t))
    fix = "It is conditioned on the noise level, not on t: convert t in the wrapper."
    ratio = schedule.ratio
    yield other("time_scale", "sigma / alpha in place of t", fix, ratio)
    yield other(
        "time_scale", "log(sigma / alpha) / 4, EDM's c_noise, in place of t", fix, lambda t: ratio(t).log() / 4
    )
    yield other("time_scale", "log(sigma / alpha) in place of t", fix, lambda t: ratio(t).log())


def off_by(base: Reading, offset: int) -> Reading:
    """Return the same network told integer times that are ``offset`` later, kept within the schedule."""
    high = base.schedule.t_max
    return replace(base, told=lambda t: base.told((t + offset).clamp(0, high)))


def _schedules(base: Reading) -> Iterator[Mistake]:
    for name, schedule, told in _known_schedules(base):
        if not _alike(schedule, base.schedule):
            words, fix = f"its times are those of {name}", f"Wrap it with the schedule it was trained on: {name}."
            yield Mistake("schedule", words, fix, replace(base, schedule=schedule, told=told, sigma_data=None))
    for factor in (0.5, 0.7, 1.4, 2.0):
        words = f"it is told that the noise is {factor:g} times what it is"
        fix = "Its schedule is another one: take betas (or alphas_cumprod) from its training code."
        yield Mistake("schedule", words, fix, replace(base, schedule=_Louder(base.schedule, factor)))


def _known_schedules(base: Reading) -> Iterator[tuple[str, Schedule, Callable[[Tensor], Tensor]]]:
    steps = len(base.schedule.log_ratios) if isinstance(base.schedule, VariancePreserving) else 1000
    told = base.told if isinstance(base.schedule, VariancePreserving) else same
    for name, schedule in {
        "linear betas (DDPM)": VariancePreserving.linear(steps),
        "scaled linear betas (Stable Diffusion)": VariancePreserving.scaled_linear(steps),
        "the cosine schedule": VariancePreserving.cosine(steps),
    }.items():
        yield name, schedule, told
        yield f"{name} rescaled to zero terminal SNR", zero_snr(schedule), told
    yield "a rectified flow, t in [0, 1]", RectifiedFlow(), same
    yield "a rectified flow, t in [0, 1000]", RectifiedFlow(), lambda t: 1000 * t
    yield "EDM (alpha = 1, sigma = t)", Karras(), same


@dataclass(frozen=True, eq=False)
class _Louder(Schedule):
    """The schedule of a network whose times mean 1 / ``factor`` times the noise that ``schedule`` says."""

    schedule: Schedule
    factor: float

    def __post_init__(self) -> None:
        for name in ("t_min", "t_max", "cell"):
            object.__setattr__(self, name, getattr(self.schedule, name))

    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha as the inner schedule's family has it: sigma is 1 - alpha, or the root of 1 - alpha^2."""
        ratio = self.schedule.ratio(t) / self.factor
        if isinstance(self.schedule, Karras):
            return torch.ones_like(ratio)
        return 1 / (1 + ratio) if isinstance(self.schedule, RectifiedFlow) else (1 + ratio**2).rsqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise that is there."""
        return self.schedule.ratio(t) / self.factor * self.alpha(t)

    def time(self, ratio: Tensor) -> Tensor:
        """Return the inner schedule's time of ``factor`` times the noise level."""
        return self.schedule.time(self.factor * ratio)

    def at(self, fraction: Tensor) -> Tensor:
        """Return the inner schedule's."""
        return self.schedule.at(fraction)

    def initial_std(self, t: Tensor) -> Tensor:
        """Return the inner schedule's."""
        return self.schedule.initial_std(t)


def zero_snr(schedule: VariancePreserving) -> VariancePreserving:
    """Return the schedule with its last alpha shifted to 0 and its first kept (arXiv 2305.08891, Algorithm 1)."""
    roots = schedule.alphas_cumprod.sqrt()
    table = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return VariancePreserving(table, schedule.integer)


def _alike(a: Schedule, b: Schedule) -> bool:
    if type(a) is not type(b):
        return False
    if not isinstance(a, VariancePreserving) or not isinstance(b, VariancePreserving):
        return True
    if len(a.log_ratios) != len(b.log_ratios):
        return False
    # The last entry may be infinite in one of them.
    return bool((a.log_ratios - b.log_ratios)[:-1].abs().max() < 0.02)


def _preconditionings(base: Reading, x0: Images) -> Iterator[Mistake]:
    if not isinstance(base.schedule, Karras):
        return
    own = float(x0.std())
    sizes = dict.fromkeys((0.5, 1.0, own, 0.25, 2.0))
    fix = "Pass the sigma_data of its training: karras_denoiser(network, Karras(), sigma_data={:.3g})."
    for size in sizes:
        words = f"it is preconditioned as in EDM with sigma_data {size:.3g}"
        if base.sigma_data is None:
            reading = replace(base, told=c_noise, sigma_data=size)
            yield Mistake("sigma_data", words, fix.format(size), reading)
            for inner in (0.5, 1.0):
                if inner != size:
                    nested = replace(base, sigma_data=size, hidden=inner)
                    yield Mistake("sigma_data", f"{words}, not {inner:g}", fix.format(size), nested)
        elif abs(size / base.sigma_data - 1) > 0.1:
            yield Mistake("sigma_data", words, fix.format(size), replace(base, sigma_data=size))
    if base.sigma_data is not None:
        words, fix = "it is asked without EDM's preconditioning", "Wrap it without KarrasPreconditioning."
        yield Mistake("sigma_data", words, fix, replace(base, sigma_data=None, told=same))
