"""A scene that learns from a teacher: what the teacher is shown and told in a step, and the phases of a run.

    task = SceneDistillation(subject=SceneSubject(...), method=lambda step: sds(teacher, times=...))
    phases = task.phases(optimizer)
    for report in train(phases, task.batches, accelerator, rollout=task.rollout, steps=10_000): ...

The subject is rendered, and its renders encoded, once an iteration, however many noises and times are drawn for
them; a phi of VSD learns from the same renders. The teacher is part of no phase: it is in no checkpoint and is not
wrapped for several processes, whose gradients with respect to the scene are averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn.functional import interpolate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from scorefield.denoiser import Cond
from scorefield.randomness import Rng
from scorefield.schedule import Images
from scorefield.training.loop import Phase
from sds.cameras import CameraDistribution, Views, concatenated, view_conditions, word_bins
from sds.canvas import Canvas
from sds.losses import Distillation, distillation_loss
from sds.penalties import Penalties
from sds.scene import Render, Scene
from sds.shading import Shading, random_background
from sds.vsd import CAMERA, VSD


@dataclass(frozen=True, eq=False)
class Observation:
    """One batch for a loss of this package.

    Attributes:
        x0: (b, ...) what the teacher sees, with its graph.
        cond: what the teacher is told, batch b.
        penalty: scalar, of what the teacher does not see.
        metrics: scalars worth logging.
    """

    x0: Images
    cond: Cond
    penalty: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Subject(Protocol):
    """What learns, and what a teacher sees of it."""

    @property
    def network(self) -> nn.Module:
        """Whose parameters learn."""

    def observe(self, rng: Rng) -> Observation:
        """What is seen in step ``rng.step``, differentiable, with the random draws of this rank."""


Encode = Callable[[Images], Tensor]
"""Images in [-1, 1] of the teacher's size to its x0: ``Teacher.encode``."""


@dataclass(frozen=True, eq=False)
class Backdrop:
    """What views stand before, and the prompts that go with it.

    Attributes:
        conditions: of the four ``sds.cameras.view_prompts``, batch 4.
        colour: (3,) in [-1, 1]; None for the scene's own background, or a random colour.
    """

    conditions: Cond
    colour: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneSubject:
    """Random views of a scene.

    Attributes:
        scene: what learns.
        encode: of the teacher.
        size: of the teacher's images, height and width in pixels.
        cameras: step -> (distribution, number of views) pairs: all views of a step.
        backdrops: each view stands before one of them, or, where they have no colour, all before the same.
        resolution: step -> height of the renders in pixels; they keep the proportions of ``size``.
        weights: (b, 4) weights of the words for each view.
        penalties: step -> weights of the regularisers.
        shading: (step, views, generator) -> light; None shows albedo.
        own_background: probability that a step without coloured backdrops shows the scene's own background; else
            a random colour.
        tell_camera: add ``cond["camera"]``, (b, 3, 4), for VSD's phi.
        num_ranks: processes that share a step; their azimuths are stratified together.

    Raises ``ValueError`` for backdrops of which only some have a colour.
    """

    scene: Scene
    encode: Encode
    size: tuple[int, int]
    cameras: Callable[[int], Sequence[tuple[CameraDistribution, int]]]
    backdrops: Sequence[Backdrop]
    resolution: Callable[[int], int]
    weights: Callable[[Views], Tensor] = word_bins
    penalties: Callable[[int], Penalties] = lambda step: Penalties()
    shading: Callable[[int, Views, Generator], Shading] | None = None
    own_background: float = 0.5
    tell_camera: bool = False
    num_ranks: int = 1

    def __post_init__(self) -> None:
        coloured = [backdrop.colour is not None for backdrop in self.backdrops]
        if not coloured or any(coloured) != all(coloured) or (not all(coloured) and len(coloured) > 1):
            raise ValueError(
                "backdrops must all have a colour, or be one without; got colours "
                f"{[backdrop.colour for backdrop in self.backdrops]}."
            )

    @property
    def network(self) -> nn.Module:
        """The scene."""
        return self.scene

    def observe(self, rng: Rng) -> Observation:
        """Renders of random views before random backdrops, encoded, with the words for each view."""
        generator = rng("views")
        views = concatenated(
            [
                cameras.draw(number, generator, rank=rng.rank, num_ranks=self.num_ranks)
                for cameras, number in self.cameras(rng.step)
            ]
        )
        chosen = torch.randint(len(self.backdrops), (len(views),), generator=generator)
        light = None if self.shading is None else self.shading(rng.step, views, generator)
        return self.observe_from(views, chosen, rng.step, light, rng("points"))

    def observe_from(
        self, views: Views, chosen: Tensor, step: int, shading: Shading | None, generator: Generator | None
    ) -> Observation:
        """Given views before the chosen (b,) backdrops; without a generator always the same."""
        penalties = self.penalties(step)
        render = self.render(views, chosen, step, shading, generator, normals=penalties.orientation > 0)
        cond = self.conditions(views, chosen)
        if self.tell_camera:
            cond[CAMERA] = views.camera_to_world.to(render.rgb)
        opacity = render.opacity.detach()
        metrics = {"opacity": opacity.mean(), "opacity_max": opacity.max()}
        penalty = penalties(render)
        return Observation(encoded(render.rgb, self.encode, self.size), cond, penalty, metrics)

    def render(
        self, views: Views, chosen: Tensor, step: int, shading: Shading | None, generator: Generator | None,
        normals: bool = False,
    ) -> Render:  # fmt: skip
        """The pictures of given views, in float32 whatever the teacher computes in."""
        height = self.resolution(step)
        width = round(height * self.size[1] / self.size[0])
        device = next(self.scene.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.scene(
                views, height=height, width=width, background=self._background(chosen, generator),
                shading=shading, normals=normals, generator=generator,
            )  # fmt: skip

    def conditions(self, views: Views, chosen: Tensor) -> dict[str, Tensor]:
        """What the teacher is told about given views before the chosen backdrops."""
        weights = self.weights(views)
        rows = [
            view_conditions(self.backdrops[number].conditions, weights[row : row + 1])
            for row, number in enumerate(chosen.tolist())
        ]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _background(self, chosen: Tensor, generator: Generator | None) -> Float[Tensor, "b 3"] | None:
        colours = [backdrop.colour for backdrop in self.backdrops]
        if colours[0] is not None:
            return torch.tensor(colours)[chosen]
        if self.scene.background is None:
            raise ValueError("without a colour of a backdrop the scene needs a background of its own.")
        if generator is None:
            return None
        return random_background(len(chosen), generator, 1 - self.own_background)


@dataclass(frozen=True, kw_only=True, eq=False)
class CanvasSubject:
    """A canvas of the shape of the teacher's x0, all particles in every step.

    Attributes:
        canvas: what learns.
        conditions: of the prompt, batch 1.
    """

    canvas: Canvas
    conditions: Cond

    @property
    def network(self) -> nn.Module:
        """The canvas."""
        return self.canvas

    def observe(self, rng: Rng) -> Observation:
        """The particles."""
        del rng
        x0 = self.canvas()
        cond = {name: value.expand(len(x0), *value.shape[1:]) for name, value in self.conditions.items()}
        return Observation(x0, cond, x0.new_zeros(()))


def encoded(images: Float[Tensor, "b c h w"], encode: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Tensor:
    """Renders as a teacher's x0, differentiable: resized to ``size`` (bilinear), then encoded.

    Args:
        images: in [-1, 1], of any size.
        encode: ``Teacher.encode``; latents for latent diffusion, the images for others.
        size: ``Teacher.size``, height and width in pixels.

    Raises:
        ValueError: not (b, c, h, w).
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (b, c, h, w) in [-1, 1]; got {tuple(images.shape)}.")
    if images.shape[-2:] != size:
        images = interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    return encode(images)


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneDistillation:
    """What learns, and by which loss.

    Attributes:
        subject: a scene or a canvas.
        method: step -> loss of that step, as times and guidance may change on the way.
        num_draws: noises and times per render, all through one pass of the encoder.
    """

    subject: Subject
    method: Callable[[int], Distillation]
    num_draws: int = 1

    def batches(self, rng: Rng) -> dict[str, Any]:
        """Nothing: all data is drawn from the scene."""
        del rng
        return {}

    def rollout(self, batch: Mapping[str, Any], phases: tuple[str, ...], rng: Rng) -> dict[str, Any]:
        """What is seen in this step, with its graph, for all phases."""
        del batch, phases
        seen = self.subject.observe(rng)
        return {"x0": seen.x0, "cond": seen.cond, "observation": seen}

    def loss(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        """The score's gradient and the penalty; see :func:`sds.losses.distillation_loss` for the reduction."""
        seen = batch["observation"]
        values = distillation_loss(
            self.method(rng.step), seen.x0, seen.cond, num_draws=self.num_draws, generator=rng("gradient")
        )
        loss = values.pop("loss") + seen.penalty
        return {"loss": loss, "penalty": seen.penalty, **values, **seen.metrics}

    def phases(
        self, optimizer: Optimizer, *, lr_schedule: LRScheduler | None = None, phi: Optimizer | None = None,
    ) -> list[Phase]:  # fmt: skip
        """The scene's phase and, for VSD, its phi's, which follows on the same renders.

        Raises ``ValueError`` for a phi's optimizer where the loss has none, and the other way round.
        """
        method = self.method(0)
        if isinstance(method, VSD) != (phi is not None):
            raise ValueError("VSD, and no other loss, needs an optimizer for its phi.")
        scene = Phase(
            name="scene", network=self.subject.network, optimizer=optimizer, loss=self.loss,
            lr_schedule=lr_schedule,
        )  # fmt: skip
        return [scene, method.phase(phi)] if isinstance(method, VSD) and phi is not None else [scene]
