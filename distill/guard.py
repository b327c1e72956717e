"""A guard for distillation: is the student still getting closer to its teacher?

The loss of distribution matching says nothing about quality, and a student that drifts looks no different in the
curves. The guard compares images of the student with images that the teacher made of the same noise, in features
of the teacher's own network, so no pretrained feature network is needed. Against the teacher's images this ranks
checkpoints as an independent classifier does; against real images it rewards the drift (LOG.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.adversarial import features_at
from distill.regression import Pairs
from distill.student import Student
from scorefield.denoiser import Cond, NetworkDenoiser
from scorefield.metrics import frechet_distance, kernel_distance
from scorefield.progress import working
from scorefield.randomness import derived_generator
from scorefield.schedule import Images

GROUPS = 8
"""Parts of the held-out images, for the standard error of a difference."""


@dataclass(frozen=True)
class Look:
    """The distance of a student's images from its teacher's.

    Attributes:
        distance: Fréchet distance in the teacher's features, summed over noise levels.
        kernel: KID in the same features, averaged over noise levels.
        error: mean absolute difference of images of the same noise.
        brightness: mean of the student's images less that of the teacher's.
        left_out: ``distance`` without one of :data:`GROUPS` parts of the images, for each of them.
    """

    distance: float
    kernel: float
    error: float
    brightness: float
    left_out: tuple[float, ...]

    def figures(self) -> dict[str, float]:
        """Return the numbers that are logged."""
        names = ("distance", "kernel", "error", "brightness")
        return {f"guard/{name}": getattr(self, name) for name in names}


def difference(a: Look, b: Look) -> tuple[float, float]:
    """Distance of ``a`` less that of ``b``, and the standard error of this difference.

    Both looks are at images of the same noise, so most of their scatter cancels. The error is a delete-one-group
    jackknife (Efron 1979): sqrt((g - 1) / g sum (d_i - mean d)^2).
    """
    parts = torch.tensor(a.left_out, dtype=torch.float64) - torch.tensor(b.left_out, dtype=torch.float64)
    count = len(parts)
    error = ((count - 1) / count * (parts - parts.mean()).square().sum()).sqrt()
    return a.distance - b.distance, float(error)


def is_worse(now: Look, best: Look, deviations: float = 2.0) -> bool:
    """Return True where ``now`` is further from the teacher than ``best`` by more than the figures' noise."""
    gap, error = difference(now, best)
    return not gap <= deviations * error  # so that nan counts as worse


@dataclass(frozen=True, kw_only=True, eq=False)
class Guard:
    """Held-out pairs of a teacher, and features of its network to compare a student's images with them.

    Args:
        teacher: frozen; its conditions are those of the pairs.
        layer: submodule of the teacher's network whose output is averaged over positions.
        pairs: noise and the teacher's images, which no student was trained on.
        ratios: noise levels sigma / alpha at which the images are shown to the network.
        batch: images whose noise is drawn together; of another number the same images have other figures.
        at_once: images a call, of which nothing depends; all of a batch at 0.
    """

    teacher: NetworkDenoiser
    layer: str
    pairs: Pairs
    ratios: tuple[float, ...] = (0.3, 1.0, 3.0)
    batch: int = 64
    at_once: int = 0
    _wanted: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.pairs.noise) < 2 * GROUPS:
            raise ValueError(f"a guard needs at least {2 * GROUPS} pairs; got {len(self.pairs.noise)}.")

    @torch.no_grad()
    def look(self, student: Student) -> Look:
        """Compare the images that ``student`` makes of the pairs' noise with the teacher's."""
        with working("the guard's look at the student"):
            return self._look(student)

    def _look(self, student: Student) -> Look:
        if not self._wanted:
            self._wanted.extend(self.features(self.pairs.x0))
        images = self.images(student)
        if not bool(images.isfinite().all()):
            nan = float("nan")
            return Look(nan, nan, nan, nan, (nan,) * GROUPS)
        made = self.features(images)
        return Look(
            distance=distance(made, self._wanted),
            kernel=sum(map(kernel_distance, *_scaled(made, self._wanted))) / len(made),
            error=float((images - self.pairs.x0).abs().mean()),
            brightness=float(images.mean() - self.pairs.x0.mean()),
            left_out=tuple(
                distance([one[kept] for one in made], [one[kept] for one in self._wanted])
                for kept in left_out(len(images))
            ),
        )

    @torch.no_grad()
    def distance_of_halves(self) -> float:
        """Return the distance of two random halves of the teacher's own images: a scale for that of a student.

        It is no floor: halves are of different noise, and have half as many images, which makes distances larger.
        """
        if not self._wanted:
            self._wanted.extend(self.features(self.pairs.x0))
        number = len(self.pairs.x0)
        order = torch.randperm(number, generator=derived_generator("guard halves"))
        halves = order[: number // 2], order[number // 2 :]
        return distance(*([one[half] for one in self._wanted] for half in halves))

    def beside(self, student: Student, number: int = 2 * GROUPS) -> tuple[Images, Images]:
        """Return the teacher's images and the student's of the same noise, the first ``number`` of each."""
        pairs = self.pairs
        cond = {name: value[:number] for name, value in pairs.cond.items()}
        few = replace(self, pairs=Pairs(pairs.noise[:number], pairs.x0[:number], cond))
        return few.pairs.x0, few.images(student)

    @torch.no_grad()
    def images(self, student: Student) -> Images:
        """Return images of the student from the pairs' noise; the noise between its steps is always the same."""
        device = next(student.denoiser.network.parameters()).device
        student, made = self._few_at_once(student.unwrapped()), []
        for number, part in enumerate(torch.arange(len(self.pairs.noise)).split(self.batch)):
            generator = derived_generator("guard", number)
            cond = self._cond(part, device)
            x0 = student.sample(self.pairs.noise[part].to(device), cond, generator=generator)
            made.append(x0.float().cpu())
        return torch.cat(made)

    @torch.no_grad()
    def features(self, images: Images) -> list[Float[Tensor, "n d"]]:
        """Features of images at each noise level: the layer's output, averaged over positions, on the CPU."""
        device = next(self.teacher.network.parameters()).device
        schedule, seen = self.teacher.schedule, []
        for level, ratio in enumerate(self.ratios):
            parts = []
            for number, part in enumerate(torch.arange(len(images)).split(self.batch)):
                generator = derived_generator("guard noise", level, number)
                noise = torch.randn(len(part), *images.shape[1:], generator=generator)
                t = _time(self.teacher, ratio).expand(len(part)).to(device)
                x_t = schedule.diffuse(images[part], noise, t.cpu()).to(device)
                for few in torch.arange(len(part)).split(self.at_once or self.batch):
                    cond = self._cond(part[few], device)
                    parts.append(pooled(features_at(self.teacher, self.layer, x_t[few], t[few], cond)))
            seen.append(torch.cat(parts).float().cpu())
        return seen

    def _few_at_once(self, student: Student) -> Student:
        if not self.at_once:
            return student
        network = _InParts(student.denoiser.network, self.at_once)
        return replace(student, denoiser=replace(student.denoiser, network=network))

    def _cond(self, part: Tensor, device: torch.device) -> Cond:
        return {name: value[part].to(device) for name, value in self.pairs.cond.items()}


class _InParts(nn.Module):
    # A network that is asked about a few samples at a time.
    def __init__(self, network: nn.Module, number: int) -> None:
        super().__init__()
        self.network, self.number = network, number

    def forward(self, x_t: Images, t: Tensor, **cond: Tensor) -> Tensor:
        answers = []
        for few in torch.arange(len(x_t)).split(self.number):
            output = self.network(x_t[few], t[few], **{name: value[few] for name, value in cond.items()})
            answers.append(output if isinstance(output, Tensor) else output[0])
        return torch.cat(answers)


def distance(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Fréchet distance summed over noise levels, in units of the wanted features' total variance."""
    return sum(map(frechet_distance, *_scaled(made, wanted)))


def _scaled(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    # Levels and networks have features of different size; each level counts alike.
    sizes = [one.double().var(0).sum().sqrt().clamp(min=1e-12) for one in wanted]
    pairs = ([one.double() / size for one, size in zip(many, sizes, strict=True)] for many in (made, wanted))
    return next(pairs), next(pairs)


def pooled(features: Tensor) -> Float[Tensor, "b d"]:
    """Features averaged over positions: (b, d, h, w), (b, d, f, h, w) or (b, tokens, d) -> (b, d); (b, d) stays.

    Raises ``ValueError`` for any other shape.
    """
    if features.ndim not in (2, 3, 4, 5):
        raise ValueError(
            f"features must be (b, d), (b, tokens, d) or (b, d, h, w), or (b, d, f, h, w) of videos; got "
            f"{tuple(features.shape)}."
        )
    if features.ndim == 2:
        return features
    return features.mean(1 if features.ndim == 3 else tuple(range(2, features.ndim)))


def left_out(number: int) -> list[Tensor]:
    """Return the numbers of all images but those of one group, for each of :data:`GROUPS` interleaved groups."""
    every = torch.arange(number)
    return [every[every % GROUPS != group] for group in range(GROUPS)]


def middle_layer(denoiser: NetworkDenoiser, shape: Sequence[int], cond: Cond) -> str:
    """Return the name of the submodule whose output describes an image: a UNet's bottleneck, or the middle of a
    stack.

    A module's own ``bottleneck`` attribute or a ``mid_block`` is taken at its word. Otherwise one pass of the
    network shows which outputs depend on the image (embeddings of time and conditions do not) and have the fewest
    positions; of those the middle one in the order of the pass.

    Args:
        denoiser: any network.
        shape: of one image.
        cond: a condition of batch 1.

    Raises:
        ValueError: no output of a submodule depends on the image.
    """
    network = denoiser.network
    modules = dict(network.named_modules())
    for prefix, module in modules.items():
        if isinstance(name := getattr(module, "bottleneck", None), str):
            return f"{prefix}.{name}".lstrip(".")
    for name in modules:
        if name.split(".")[-1] in ("mid_block", "middle_block"):
            return name
    found = [(name, positions) for name, positions in _positions(denoiser, shape, cond) if name]
    if not found:
        raise ValueError(f"no part of a {type(network).__name__} depends on the image, so none can describe it.")
    fewest = min(positions for _, positions in found)
    narrow = [name for name, positions in found if positions == fewest]
    return narrow[len(narrow) // 2]


@torch.no_grad()
def _positions(denoiser: NetworkDenoiser, shape: Sequence[int], cond: Cond) -> list[tuple[str, int]]:
    # Submodules in the order of a pass, whose outputs differ between images, and their numbers of positions.
    found: list[tuple[str, int]] = []
    device = next(denoiser.network.parameters()).device

    def note(name: str, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, Tensor) and output.ndim in (2, 3, 4) and len(output) == 2:
            differ = not torch.allclose(output[0].float(), output[1].float(), rtol=1e-3, atol=1e-6)
            # As in pooled: tokens of a sequence, or height times width.
            positions = {2: 1, 3: output.shape[1], 4: output[0, 0].numel()}[output.ndim]
            if differ and output[0].numel() > positions:
                found.append((name, positions))

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: note(name, output))
        for name, module in denoiser.network.named_modules()
    ]
    try:
        x_t = torch.randn(2, *shape, generator=derived_generator("middle layer")).to(device)
        t = _time(denoiser, 1.0).expand(2).to(device)
        denoiser(x_t, t, {name: value[:1].expand(2, *value.shape[1:]).to(device) for name, value in cond.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _time(denoiser: NetworkDenoiser, ratio: float) -> Tensor:
    schedule = denoiser.schedule
    t = schedule.time(torch.tensor([ratio], dtype=torch.float64)).clamp(schedule.t_min, schedule.t_max)
    return schedule.snap(t).float()


def as_record(look: Look, step: int) -> dict[str, object]:
    """Return the look as numbers and lists, which a checkpoint can hold."""
    return {"step": step, **{name: getattr(look, name) for name in look.__dataclass_fields__}}


def from_record(record: Mapping[str, object]) -> Look:
    """Return the look that :func:`as_record` wrote."""
    numbers = {name: record[name] for name in Look.__dataclass_fields__}
    return Look(**{**numbers, "left_out": tuple(record["left_out"])})  # type: ignore[arg-type]
