"""Radiance fields as plain functions: all that the export needs to know of a scene of any kind.

In the world z is up and the front of an object faces +x. Cameras follow nerfstudio and OpenGL: x right, y up, z
backwards. ``camera_to_world`` (3, 4) holds these axes and the position as columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sds.cameras import Views
from sds.scene import Render, Scene

Colour = tuple[float, float, float]
"""RGB in [0, 1], in display values (sRGB)."""

Corner = tuple[float, float, float]
"""x, y and z in world coordinates."""

CHUNK = 1 << 18
"""Number of points evaluated at once. It bounds the memory and changes no result."""


class Pictures(Protocol):
    """Interface of pictures from b cameras, rows from the top."""

    @property
    def rgb(self) -> Float[Tensor, "b 3 h w"]:
        """Colours in [-1, 1], in display values, over the background."""

    @property
    def depth(self) -> Float[Tensor, "b 1 h w"]:
        """Distance from the camera along the ray in world units. Used only where the opacity is above 0.5."""

    @property
    def normals(self) -> Float[Tensor, "b 3 h w"] | None:
        """Outward normals in world coordinates, of any length; not None. Used only where there is opacity."""

    @property
    def opacity(self) -> Float[Tensor, "b 1 h w"]:
        """Share of the background that is hidden, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class Rendered:
    """Pictures from b cameras on the CPU; see :class:`Pictures`."""

    rgb: Tensor
    depth: Tensor
    normals: Tensor
    opacity: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class RadianceField:
    """Density, colour and renders of a scene as plain functions, which are called without gradient and in pieces.

    Attributes:
        density: Points (n, 3) -> density (n,) per world unit: a segment of length d hides the share 1 -
            exp(-density d) of what is behind it.
        colour: Points (n, 3) -> colours (n, 3) in [0, 1], as pictures show them. Albedo if pictures are unlit.
        render: (cameras (b, 3, 4), size) -> pictures of ``size`` x ``size`` pixels over the constant
            ``background``. They show the colours of ``colour``, without light that a mesh cannot have.
        lower: Corner of the box that holds the object, with the smallest x, y, z.
        upper: Opposite corner.
        field_of_view: Vertical field of view of ``render``, in degrees. Pixels are square, and the principal point
            is the centre.
        distance: Distance of the export's cameras from the origin.
        background: Background of ``render``.
        device: Device on which points and cameras are made.

    Raises ``ValueError`` for a box without volume, or another value that is out of range.
    """

    density: Callable[[Tensor], Tensor]
    colour: Callable[[Tensor], Tensor]
    render: Callable[[Tensor, int], Pictures]
    lower: Corner = (-1.0, -1.0, -1.0)
    upper: Corner = (1.0, 1.0, 1.0)
    field_of_view: float = 40.0
    distance: float = 3.0
    background: Colour = (1.0, 1.0, 1.0)
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        corners = (*self.lower, *self.upper)
        if not all(map(math.isfinite, corners)) or any(
            a >= b for a, b in zip(self.lower, self.upper, strict=True)
        ):
            raise ValueError(f"lower must be below upper on every axis; got {self.lower} and {self.upper}.")
        if not 0 < self.field_of_view < 180:
            raise ValueError(f"field_of_view must lie in (0, 180) degrees; got {self.field_of_view}.")
        if not 0 < self.distance < math.inf:
            raise ValueError(f"distance must be positive; got {self.distance}.")
        check_colour("background", self.background)

    @torch.no_grad()
    def densities(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Return densities (n,) of points (n, 3), float32 on the CPU.

        Raises ``ValueError`` if ``density`` returns another shape, nan or inf.
        """
        return _asked("density", self.density, points, (), self.device)

    @torch.no_grad()
    def colours(self, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        """Return colours (n, 3) of points (n, 3), float32 on the CPU.

        Raises ``ValueError`` if ``colour`` returns another shape, nan, inf or values outside [0, 1].
        """
        colours = _asked("colour", self.colour, points, (3,), self.device)
        _check_range("colour", colours, 0.0, 1.0)
        return colours.clamp(0, 1)

    @torch.no_grad()
    def pictures(self, camera_to_world: Float[Tensor, "b 3 4"], size: int, batch_size: int = 4) -> Rendered:
        """Return pictures from any number of cameras (b, 3, 4), rendered ``batch_size`` at a time, on the CPU.

        Raises ``ValueError`` if ``render`` returns other shapes, values out of range, nan, inf or no normals.
        """
        parts = []
        for cameras in camera_to_world.split(batch_size):
            seen = self.render(cameras.to(self.device), size)
            parts.append([_checked(seen, name, channels, len(cameras), size) for name, channels in CHANNELS])
        return Rendered(*(torch.cat(part) for part in zip(*parts, strict=True)))


CHANNELS = (("rgb", 3), ("depth", 1), ("normals", 3), ("opacity", 1))


def check_colour(name: str, colour: Colour) -> None:
    """Raise ``ValueError`` unless ``colour`` is an RGB triple in [0, 1]."""
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise ValueError(f"{name} must be three numbers in [0, 1]; got {colour}.")


def _asked(
    name: str,
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    tail: tuple[int, ...],
    device: torch.device | str,
) -> Tensor:
    parts = []
    for chunk in points.split(CHUNK):
        values = function(chunk.to(device))
        if values.shape != (len(chunk), *tail):
            expected, got = (len(chunk), *tail), tuple(values.shape)
            raise ValueError(f"{name} of {len(chunk)} points must be of shape {expected}; got {got}.")
        parts.append(values.to("cpu", torch.float32))
    values = torch.cat(parts)
    _check_finite(name, values)
    return values


def _checked(seen: Pictures, name: str, channels: int, batch: int, size: int) -> Tensor:
    values = getattr(seen, name)
    if values is None:
        raise ValueError(f"the rendered {name} are missing; a turntable shows them. Render with {name}.")
    expected = (batch, channels, size, size)
    if values.shape != expected:
        raise ValueError(f"{name} of {batch} pictures must be of shape {expected}; got {tuple(values.shape)}.")
    values = values.to("cpu", torch.float32)
    _check_finite(f"the rendered {name}", values)
    if name in ("rgb", "opacity"):
        low = -1.0 if name == "rgb" else 0.0
        _check_range(f"the rendered {name}", values, low, 1.0)
        return values.clamp(low, 1)
    return values


def _check_finite(name: str, values: Tensor) -> None:
    wrong = int((~values.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{name} is nan or inf in {wrong} of {values.numel()} values: the scene has diverged. Export an "
            "earlier checkpoint, and train with a lower learning rate."
        )


def _check_range(name: str, values: Tensor, low: float, high: float) -> None:
    smallest, largest = float(values.min()), float(values.max())
    if smallest < low - 1e-3 or largest > high + 1e-3:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}]; got {smallest:.4g} to {largest:.4g}.")


def radiance_field(
    scene: Scene, *, distance: float, field_of_view: float, background: Colour = (1.0, 1.0, 1.0)
) -> RadianceField:
    """Return a scene's albedo over one colour: what a mesh with vertex colours can show.

    Args:
        scene: A scene on any device.
        distance: Distance of the cameras from the origin.
        field_of_view: Vertical field of view of the cameras, in degrees.
        background: RGB in [0, 1].
    """
    device = next(scene.parameters()).device
    focal = 0.5 / math.tan(math.radians(field_of_view) / 2)
    backdrop = torch.tensor(background, device=device) * 2 - 1

    def render(camera_to_world: Tensor, size: int) -> Render:
        camera = camera_to_world.float()
        angles = camera.new_zeros(len(camera))
        views = Views(camera, angles + focal, angles, angles)
        # Normals build a short-lived graph of their own; none is kept for the parameters.
        pictures = scene(views, height=size, width=size, background=backdrop, normals=True)
        # Faint matter in front of the background has normals too, which would show in a picture of normals.
        return replace(pictures, normals=pictures.normals * (pictures.opacity > 0.5))

    half = scene.field.half_size
    return RadianceField(
        density=lambda points: scene.field(points).density, colour=lambda points: scene.field(points).albedo,
        render=render, lower=(-half,) * 3, upper=(half,) * 3, field_of_view=field_of_view, distance=distance,
        background=background, device=device,
    )  # fmt: skip
