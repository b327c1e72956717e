"""Regression on teacher pairs: DMD's second term and a good start for any student (arXiv 2311.18828, section 3.3).

A pair is a noise and the image that the deterministic teacher makes of it; for students of several steps also
points on the way, see :mod:`distill.trajectory`. Item i of a set depends on the seed and i alone, so ranks and
restarts can split the work in any way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.student import Student
from distill.trajectory import Recorded, States, inputs, step_numbers, through
from scorefield.atomic import whole_file
from scorefield.denoiser import Cond, Denoiser
from scorefield.randomness import Rng, derived_generator, shuffled
from scorefield.sampling import Multistep, Step, initial_noise, sample

Distance = Callable[[Tensor, Tensor], Tensor]
"""(images, targets) -> (b,) distance of each pair."""


def squared_error(images: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of each sample."""
    return (images - targets).square().flatten(1).mean(1)


def absolute_error(images: Tensor, targets: Tensor) -> Tensor:
    """Mean absolute error of each sample (L1): a pixel of many likely values is drawn as their median.

    A few pairs that cannot be matched pull less than in the square.
    """
    return (images - targets).abs().flatten(1).mean(1)


def pseudo_huber(c: float = 0.03) -> Distance:
    """sqrt(mean squared error + c^2) - c of each sample: L2 near zero, robust to pairs that cannot be matched.

    The form of arXiv 2310.14189 (section 3.3) per pixel, with c in image units.
    """

    def distance(images: Tensor, targets: Tensor) -> Tensor:
        return (squared_error(images, targets) + c**2).sqrt() - c

    return distance


def lpips(weights: Path, size: int = 224) -> Distance:
    """LPIPS with VGG-16 (Zhang et al. 2018), DMD's distance; images are resized to ``size`` and RGB.

    Args:
        weights: torchvision's ``vgg16`` state dict as safetensors; nothing is downloaded.
        size: DMD upsamples to 224.

    Raises:
        ValueError: no such file, or weights of another network.
    """
    if weights.suffix != ".safetensors" or not weights.is_file():
        raise ValueError(f"LPIPS needs torchvision's vgg16 weights as a .safetensors file; got {weights}.")
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(pretrained=True, net="vgg", pnet_rand=True).eval().requires_grad_(False)
    state, own = _load(weights), network.net.state_dict()
    # torchmetrics cuts vgg16.features into slices that keep the numbers: slice2.5.weight is features.5.weight.
    wanted = {name: "features." + name.split(".", 1)[1] for name in own}
    wrong = [
        theirs for name, theirs in wanted.items() if theirs not in state or state[theirs].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{weights} is not torchvision's vgg16: {', '.join(wrong[:4])} missing or of another shape."
        )
    network.net.load_state_dict({name: state[theirs] for name, theirs in wanted.items()})

    def distance(images: Tensor, targets: Tensor) -> Tensor:
        network.to(images.device)
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"LPIPS needs images (b, 1, h, w) or (b, 3, h, w); got {tuple(images.shape)}.")
        rgb = [x.float().expand(-1, 3, -1, -1) for x in (images, targets)]
        large = [torch.nn.functional.interpolate(x, (size, size), mode="bilinear") for x in rgb]
        result: Tensor = network(*large).flatten()
        return result

    return distance


@dataclass(frozen=True)
class Pairs:
    """Noise, what the teacher makes of it, and under which conditions.

    Attributes:
        noise: (n, *shape) standard normal, not yet scaled to a schedule.
        x0: (n, *shape) the teacher's images.
        cond: conditions, batch n.
        states: time -> (n, *shape), noisy images on the way from the noise to the image.
    """

    noise: Float[Tensor, "n *shape"]
    x0: Float[Tensor, "n *shape"]
    cond: Cond
    states: States = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one shard as safetensors, under a temporary name first."""
        tensors = {"noise": self.noise, "x0": self.x0, **{f"cond.{k}": v for k, v in self.cond.items()}}
        tensors |= {f"state.{time!r}": value for time, value in self.states.items()}
        with whole_file(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(temporary))

    @classmethod
    def load(cls, paths: Sequence[Path]) -> "Pairs":
        """Join shards. Raises ``ValueError`` if there are none, if one is damaged, or if their keys differ."""
        shards = [_load(path) for path in paths]
        if not shards or any(shard.keys() != shards[0].keys() for shard in shards):
            raise ValueError(f"need shards of one set of teacher pairs; got {[str(path) for path in paths]}.")
        joined = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        cond = {name.removeprefix("cond."): value for name, value in joined.items() if name.startswith("cond.")}
        states = {float(name[6:]): value for name, value in joined.items() if name.startswith("state.")}
        return cls(joined["noise"], joined["x0"], cond, states)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


@torch.no_grad()
def make_pairs(
    teacher: Denoiser, cond: Cond, *, shape: Sequence[int], times: Tensor, num: int | None = None,
    step: Step | Multistep | None = None, seed: int = 0, rank: int = 0, num_ranks: int = 1, batch: int = 256,
    device: torch.device | str = "cpu", keep: Sequence[float] = (),
    told: Callable[[int], object] = lambda count: None, items: Tensor | None = None,
) -> Pairs:  # fmt: skip
    """Run the deterministic teacher on seeded noises: items rank, rank + num_ranks, ... of the set.

    Args:
        teacher: guided as its student should be.
        cond: conditions of the *whole* set, batch n; empty for an unconditional teacher, which needs ``num``.
        num: pairs of the whole set, if ``cond`` does not tell.
        shape: of one image.
        times: sampling grid; DMD uses 18 (CIFAR-10) to 256 (ImageNet) Heun steps, 50 PNDM steps for SD 1.5.
        step: a deterministic step, :func:`scorefield.sampling.ddim` () by default.
        seed: of the set; item i depends on (seed, i) alone.
        rank: this shard.
        num_ranks: number of shards.
        batch: images at a time.
        device: where to compute; the pairs come back to the CPU.
        keep: times at which to keep the noisy image, for a few-step student ``student.times[1:]``. The grid is
            made to stop there: at most so many network calls more, and slightly other images.
        told: called with the number of pairs of each batch that is done.
        items: their numbers, in place of those of ``rank``.
    """
    sizes = {len(value) for value in cond.values()} | ({num} if num is not None else set())
    if len(sizes) != 1:
        raise ValueError(f"conditions and num must agree on the number of pairs; got {sorted(sizes)}.")
    size = sizes.pop()
    if not 0 <= rank < num_ranks <= size:
        raise ValueError(
            f"rank must lie in [0, num_ranks - 1], with a pair for each; got {rank} of {num_ranks}, {size} pairs."
        )
    items = torch.arange(rank, size, num_ranks) if items is None else items
    noises, images = [], []
    times, states = through(times, keep), {float(t): list[Tensor]() for t in keep}
    watched = Recorded(teacher, {t: torch.empty(0) for t in states})
    for part in items.split(batch):
        noise = torch.stack([torch.randn(*shape, generator=derived_generator(seed, "pair", int(i))) for i in part])
        own = {name: value[part].to(device) for name, value in cond.items()}
        x_t = initial_noise(teacher.schedule, noise.to(device), float(times[0]))
        images.append(sample(watched, x_t, own, times=times, step=step).cpu())
        for t, found in states.items():
            found.append(watched.latest[t])
        noises.append(noise)
        told(len(part))
    own = {name: value[items] for name, value in cond.items()}
    return Pairs(torch.cat(noises), torch.cat(images), own, {t: torch.cat(found) for t, found in states.items()})


def teacher_batch(pairs: Pairs, size: int, rng: Rng, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return a batch whose "real" images are the teacher's, each with the condition that it was made under as
    "cond".

    For :class:`distill.dmd.GAN` where there are no data: the critic then tells the student from its teacher, which
    a student can reach, not from data that the teacher misses as well (arXiv 2606.12575, abstract: "more
    attainable and informative"). Rows as of :func:`scorefield.randomness.shuffled`.
    """
    chosen = shuffled(len(pairs.x0), size, rng)
    cond = {name: value[chosen].to(device) for name, value in pairs.cond.items()}
    return {"cond": cond, "real": pairs.x0[chosen].to(device), "size": size}


@dataclass(frozen=True, kw_only=True, eq=False)
class Regression:
    """The distance of a student's images from its teacher's, for the same noise and condition.

    Samples of a batch are shared out over the steps of the student, in one network call: the first step is asked
    about the pair's noise, the others about the teacher's path from it (:mod:`distill.trajectory`).

    Attributes:
        pairs: of the teacher; with states at the later times of a student of several steps.
        weight: beside the distribution matching term (DMD: 0.25 with LPIPS).
        distance: :func:`absolute_error`, :func:`squared_error`, :func:`pseudo_huber` or :func:`lpips`.
        batch: pairs a step.
        shares: of the batch for each step of the student; none: equal.
    """

    pairs: Pairs
    weight: float = 0.25
    distance: Distance = squared_error
    batch: int = 256
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.shares and not (min(self.shares) >= 0 and sum(self.shares) > 0):
            raise ValueError(f"shares must be at least 0, and one of them more; got {self.shares}.")

    def loss(self, student: Student, rng: Rng) -> Tensor:
        """Mean distance over a batch of pairs, with gradient to the student.

        Raises ``ValueError`` if the pairs lack states at the student's later times, and for another number of
        shares than steps.
        """
        shares = self.shares or (1.0,) * student.num_steps
        if len(shares) != student.num_steps:
            raise ValueError(f"regression needs {student.num_steps} shares, one a step; got {len(shares)}.")
        device = next(student.denoiser.network.parameters()).device
        chosen = shuffled(len(self.pairs.noise), self.batch, rng)
        noise, x0 = self.pairs.noise[chosen].to(device), self.pairs.x0[chosen].to(device)
        cond = {name: value[chosen].to(device) for name, value in self.pairs.cond.items()}
        steps = step_numbers(shares, self.batch, rng)
        x_t = inputs(student, noise, {t: state[chosen] for t, state in self.pairs.states.items()}, steps)
        times = torch.tensor(student.times, device=device)[steps.to(device)]
        return self.distance(student.denoiser(x_t, times, cond), x0).mean()
