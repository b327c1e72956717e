"""Shading of views: plain albedo, a point light, or a point light on white matter, drawn for each view."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from scorefield.randomness import normal_like
from sds.cameras import Views
from sds.field import normalised


@dataclass(frozen=True, eq=False)
class Shading:
    """Light of b views. A view with ambient 1 and diffuse 0 shows albedo.

    Attributes:
        light: (b, 3) position of the point light.
        ambient: (b,) brightness in the shade.
        diffuse: (b,) additional brightness of a surface that faces the light.
        textureless: (b,) whether the matter is white, so that only its geometry shows.
    """

    light: Float[Tensor, "b 3"]
    ambient: Float[Tensor, " b"]
    diffuse: Float[Tensor, " b"]
    textureless: Bool[Tensor, " b"]

    @property
    def needs_normals(self) -> bool:
        """Return True if any view is lit."""
        return bool((self.diffuse != 0).any())

    def at(self, view: Tensor) -> "Shading":
        """Return the light of these views (n,), which may repeat."""
        return Shading(*(value[view.to(value.device)] for value in vars(self).values()))


Samples = Float[Tensor, "n s 3"]


def shaded(albedo: Samples, normals: Samples | None, points: Samples, shading: Shading) -> Samples:
    """Return albedo (ambient + diffuse max(0, n . l)), with l towards the light (arXiv 2209.14988, section 3.1).

    The albedo is 1 in textureless views. ``shading`` has a row for each of the n rays. Without normals nothing is
    lit.
    """
    ambient, diffuse = (x.to(points)[:, None, None] for x in (shading.ambient, shading.diffuse))
    brightness = ambient
    if normals is not None:
        towards = normalised(shading.light.to(points)[:, None] - points)
        brightness = ambient + diffuse * (normals * towards).sum(-1, keepdim=True).clamp(min=0)
    white = shading.textureless.to(points.device)[:, None, None]
    return torch.where(white, torch.ones_like(albedo), albedo) * brightness


@dataclass(frozen=True, kw_only=True)
class ShadingSchedule:
    """DreamFusion's schedule: albedo at first, then a mixture that shows geometry (arXiv 2209.14988, App. A.2).

    Attributes:
        albedo_until: Before this step every view shows albedo.
        lit: Probability that a view is lit after that.
        textureless: Probability that a lit view is shown without albedo.
        ambient: Ambient brightness of lit views; their diffuse brightness is 1 - ambient.
        light_distance: Range of the light's distance from the origin, uniform. Its direction is that of a normal
            draw around the camera, with standard deviation 1.

    Raises ``ValueError`` for probabilities or brightnesses outside [0, 1].
    """

    albedo_until: int = 1000
    lit: float = 0.75
    textureless: float = 0.5
    ambient: float = 0.1
    light_distance: tuple[float, float] = (0.8, 1.5)

    def __post_init__(self) -> None:
        for name in ("lit", "textureless", "ambient"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}.")

    def draw(self, step: int, views: Views, generator: Generator) -> Shading:
        """Return the light of each view at this step. The same random numbers are drawn at every step."""
        lit, textureless, distance = torch.rand(3, len(views), generator=generator, device=generator.device)
        direction = torch.nn.functional.normalize(views.position + normal_like(views.position, generator), dim=1)
        low, high = self.light_distance
        diffuse = ((lit < self.lit) & (step >= self.albedo_until)) * (1 - self.ambient)
        return Shading(
            light=direction * (low + (high - low) * distance)[:, None],
            ambient=1 - diffuse,
            diffuse=diffuse,
            textureless=(textureless < self.textureless) & (diffuse > 0),
        )


def random_background(
    num_views: int, generator: Generator, probability: float = 0.5
) -> Float[Tensor, "b 3"] | None:
    """Return a random colour in [-1, 1] for each view with this probability, otherwise None: the scene's own.

    With random colours matter has to be opaque to look right, and the background cannot take its place.
    """
    colours = torch.rand(num_views + 1, 3, generator=generator, device=generator.device)
    return colours[1:] * 2 - 1 if bool(colours[0, 0] < probability) else None
