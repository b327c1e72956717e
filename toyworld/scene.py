"""Scenes of the toy world: one solid of one colour over one background, and a camera."""

import math
from dataclasses import dataclass

from toyworld.solids import RADIUS, SOLIDS

SHAPES = tuple(SOLIDS)
"""Names of the solids."""

COLOURS = {
    "red": (0.90, 0.08, 0.10),
    "orange": (1.00, 0.50, 0.00),
    "yellow": (0.98, 0.92, 0.10),
    "green": (0.10, 0.68, 0.16),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.12, 0.22, 0.95),
    "purple": (0.52, 0.12, 0.78),
    "pink": (1.00, 0.52, 0.76),
}
"""RGB of the solids in full light, in [0, 1]. All have a hue; no background has one."""

BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "grey": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0)}
"""RGB of the backgrounds, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of one picture.

    Attributes:
        shape: One of ``SHAPES``.
        colour: One of ``COLOURS``.
        background: One of ``BACKGROUNDS``.
        azimuth: Azimuth of the camera in degrees; 0 sees the front of the solid.
        elevation: Elevation of the camera in degrees above the horizon, in [-90, 90].
        distance: Distance of the camera from the world's origin, which it looks at.
        position: Position of the solid's own origin in the world.

    Raises ``ValueError`` for unknown words, numbers that are not finite, and a camera inside the solid.
    """

    shape: str
    colour: str
    background: str
    azimuth: float
    elevation: float
    distance: float = 3.0
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        check_word("shape", self.shape, SHAPES)
        check_word("colour", self.colour, COLOURS)
        check_word("background", self.background, BACKGROUNDS)
        numbers = (self.azimuth, self.elevation, self.distance, *self.position)
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"angles, distance and position must be finite; got {numbers}.")
        if not -90 <= self.elevation <= 90:
            raise ValueError(f"elevation must lie in [-90, 90] degrees; got {self.elevation}.")
        nearest = RADIUS + sum(axis**2 for axis in self.position) ** 0.5
        if not self.distance > nearest:
            raise ValueError(
                f"the camera would be in the solid: distance must exceed {nearest:.2f}, the solid's radius "
                f"and the length of its position; got {self.distance}."
            )


def check_word(what: str, word: str, known: object) -> None:
    """Raise ``ValueError`` unless ``word`` is one of ``known``."""
    words = list(known)  # type: ignore[call-overload]
    if word not in words:
        raise ValueError(f"{what} must be one of {', '.join(words)}; got {word!r}.")
