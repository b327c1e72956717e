"""Training of a scene: what the teacher sees and is told in a step, and the phases of a run.

    task = SceneDistillation(subject=SceneSubject(...), method=lambda step: sds(teacher, times=...))
    phases = task.phases(optimizer)
    for report in train(phases, task.batches, accelerator, rollout=task.rollout, steps=10_000): ...

In each iteration the subject is rendered, and its renders encoded, once, however many noises and times are drawn
for them. VSD's phi is trained on the same renders. The teacher is part of no phase: it is in no checkpoint, and it
is not wrapped for several processes. The gradients with respect to the scene are averaged over the processes.
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
    """What the teacher sees and is told in one step: a batch for a loss of this package.

    Attributes:
        x0: (b, ...) encoded renders, with their graph.
        cond: Conditions of batch b.
        penalty: Scalar penalty on the scene, which the teacher does not see.
        metrics: Scalars to log.
    """

    x0: Images
    cond: Cond
    penalty: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Subject(Protocol):
    """Interface of what is trained: a network, and its observations."""

    @property
    def network(self) -> nn.Module:
        """The module whose parameters are trained."""

    def observe(self, rng: Rng) -> Observation:
        """Return the differentiable observation of step ``rng.step``, with this rank's random draws."""


Encode = Callable[[Images], Tensor]
"""Images in [-1, 1], of the teacher's size, -> x0: ``Teacher.encode``."""


@dataclass(frozen=True, eq=False)
class Backdrop:
    """Background of a view, with the conditions of the prompts that name it.

    Attributes:
        conditions: Conditions of the four ``sds.cameras.view_prompts``, batch 4.
        colour: (3,) in [-1, 1]. None: the scene's own background, or a random colour.
    """

    conditions: Cond
    colour: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneSubject:
    """A scene, observed in random views.

    Attributes:
        scene: The scene that is trained.
        encode: The teacher's encoder.
        size: Height and width of the teacher's images in pixels.
        cameras: step -> pairs (distribution, number of views); together they are the views of a step.
        backdrops: Backgrounds. Each view gets one of them at random; without colours there is only one.
        resolution: step -> height of the renders in pixels. Their aspect ratio is that of ``size``.
        weights: Views -> (b, 4) weights of the view words.
        penalties: step -> weights of the penalties.
        shading: (step, views, generator) -> light. None shows albedo.
        own_background: Probability that a step without coloured backdrops shows the scene's own background, rather
            than a random colour.
        tell_camera: Add ``cond["camera"]``, (b, 3, 4), for VSD's phi.
        num_ranks: Number of processes that share a step; their azimuths are stratified together.

    Raises ``ValueError`` if only some backdrops have a colour.
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
                "backdrops must all have a colour, or be a single one without; got colours "
                f"{[backdrop.colour for backdrop in self.backdrops]}."
            )

    @property
    def network(self) -> nn.Module:
        """The scene."""
        return self.scene

    def observe(self, rng: Rng) -> Observation:
        """Return encoded renders of random views over random backdrops, with the conditions of each view."""
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
        """Return the observation of given views over the chosen (b,) backdrops.

        Without a generator nothing is random.
        """
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
        """Return pictures of given views, in float32 whatever the teacher's precision."""
        height = self.resolution(step)
        width = round(height * self.size[1] / self.size[0])
        device = next(self.scene.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.scene(
                views, height=height, width=width, background=self._background(chosen, generator),
                shading=shading, normals=normals, generator=generator,
            )  # fmt: skip

    def conditions(self, views: Views, chosen: Tensor) -> dict[str, Tensor]:
        """Return the conditions of given views over the chosen backdrops."""
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
            raise ValueError("the scene has no background of its own, so its backdrops need colours.")
        if generator is None:
            return None
        return random_background(len(chosen), generator, 1 - self.own_background)


@dataclass(frozen=True, kw_only=True, eq=False)
class CanvasSubject:
    """A canvas of the shape of the teacher's x0; every step observes all its particles.

    Attributes:
        canvas: The canvas that is trained.
        conditions: Conditions of the prompt, batch 1.
    """

    canvas: Canvas
    conditions: Cond

    @property
    def network(self) -> nn.Module:
        """The canvas."""
        return self.canvas

    def observe(self, rng: Rng) -> Observation:
        """Return all particles, with the prompt's conditions."""
        del rng
        x0 = self.canvas()
        cond = {name: value.expand(len(x0), *value.shape[1:]) for name, value in self.conditions.items()}
        return Observation(x0, cond, x0.new_zeros(()))


def encoded(images: Float[Tensor, "b c h w"], encode: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Tensor:
    """Return renders as the teacher's x0, differentiably: resized to ``size`` (bilinear), then encoded.

    Args:
        images: (b, c, h, w) in [-1, 1], of any size.
        encode: ``Teacher.encode``; it returns latents for latent diffusion, the images themselves otherwise.
        size: ``Teacher.size``, height and width in pixels.

    Raises:
        ValueError: ``images`` are not (b, c, h, w).
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (b, c, h, w) in [-1, 1]; got {tuple(images.shape)}.")
    if images.shape[-2:] != size:
        images = interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    return encode(images)


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneDistillation:
    """A subject and the loss that trains it.

    Attributes:
        subject: A scene or a canvas.
        method: step -> loss of that step, since times and guidance may change along the run.
        num_draws: Noises and times per render; all share one pass of the encoder.
    """

    subject: Subject
    method: Callable[[int], Distillation]
    num_draws: int = 1

    def batches(self, rng: Rng) -> dict[str, Any]:
        """Return an empty batch: all data are renders of the scene."""
        del rng
        return {}

    def rollout(self, batch: Mapping[str, Any], phases: tuple[str, ...], rng: Rng) -> dict[str, Any]:
        """Return the observation of this step, with its graph, for all phases."""
        del batch, phases
        seen = self.subject.observe(rng)
        return {"x0": seen.x0, "cond": seen.cond, "observation": seen}

    def loss(self, batch: Mapping[str, Any], rng: Rng) -> dict[str, Tensor]:
        """Return the loss: score gradient and penalty, reduced as :func:`sds.losses.distillation_loss` says."""
        seen = batch["observation"]
        values = distillation_loss(
            self.method(rng.step), seen.x0, seen.cond, num_draws=self.num_draws, generator=rng("gradient")
        )
        loss = values.pop("loss") + seen.penalty
        return {"loss": loss, "penalty": seen.penalty, **values, **seen.metrics}

    def phases(
        self, optimizer: Optimizer, *, lr_schedule: LRScheduler | None = None, phi: Optimizer | None = None,
    ) -> list[Phase]:  # fmt: skip
        """Return the scene's phase and, for VSD, phi's phase, which follows on the same renders.

        Raises ``ValueError`` if a loss other than VSD gets an optimizer for phi, or VSD gets none.
        """
        method = self.method(0)
        if isinstance(method, VSD) != (phi is not None):
            raise ValueError(
                "VSD needs an optimizer for its phi, and no other loss takes one. Pass phi for VSD alone."
            )
        scene = Phase(
            name="scene", network=self.subject.network, optimizer=optimizer, loss=self.loss,
            lr_schedule=lr_schedule,
        )  # fmt: skip
        return [scene, method.phase(phi)] if isinstance(method, VSD) and phi is not None else [scene]
