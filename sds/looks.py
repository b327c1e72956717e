"""What a teacher is shown in a step, and what it is told about it: views of a scene, or a canvas as it is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from scorefield.denoiser import Cond
from scorefield.randomness import Rng
from scorefield.schedule import Images
from sds.canvas import Canvas
from sds.lora import CAMERA
from sds.regularisers import Penalties
from sds.renders import encoded
from sds.scene import Render, Scene
from sds.shading import Shading, random_background
from sds.views import CameraDistribution, Views, concatenated, view_conditions, word_bins


@dataclass(frozen=True, eq=False)
class Look:
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
    """What learns, and how it is looked at."""

    @property
    def network(self) -> nn.Module:
        """Whose parameters learn."""

    def look(self, rng: Rng) -> Look:
        """The look of step ``rng.step``, differentiable, with the random draws of this rank."""


Encode = Callable[[Images], Tensor]
"""Images in [-1, 1] of the teacher's size to its x0: ``Teacher.encode``."""


@dataclass(frozen=True, eq=False)
class Backdrop:
    """What views stand before, and the prompts that go with it.

    Attributes:
        conditions: of the four ``sds.views.view_prompts``, batch 4.
        colour: (3,) in [-1, 1]; None for the scene's own background, or a random colour.
    """

    conditions: Cond
    colour: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneLooks:
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

    def look(self, rng: Rng) -> Look:
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
        return self.look_at(views, chosen, rng.step, light, rng("points"))

    def look_at(
        self, views: Views, chosen: Tensor, step: int, shading: Shading | None, generator: Generator | None
    ) -> Look:
        """The look of given views before the chosen (b,) backdrops; without a generator always the same."""
        penalties = self.penalties(step)
        render = self.render(views, chosen, step, shading, generator, normals=penalties.orientation > 0)
        cond = self.conditions(views, chosen)
        if self.tell_camera:
            cond[CAMERA] = views.camera_to_world.to(render.rgb)
        opacity = render.opacity.detach()
        metrics = {"opacity": opacity.mean(), "opacity_max": opacity.max()}
        penalty = penalties(render)
        return Look(encoded(render.rgb, self.encode, self.size), cond, penalty, metrics)

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
class CanvasLooks:
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

    def look(self, rng: Rng) -> Look:
        """The particles."""
        del rng
        x0 = self.canvas()
        cond = {name: value.expand(len(x0), *value.shape[1:]) for name, value in self.conditions.items()}
        return Look(x0, cond, x0.new_zeros(()))
