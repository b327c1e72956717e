"""Nine solids as signed distance functions in frames of their own: z up, front +x, within 0.81 of the origin.

View words refer to the front of a solid:

- mug: the handle is at the front. From a side it stands out; from the back the body hides it.
- chair: the sitter looks to the front; the backrest is at the back.
- arrow: lies flat and points to the front.
- letter L: stands upright and reads as an L from the front; from the back it is mirrored.
- sphere, cylinder, cone and torus look the same from all sides, a cube after every quarter turn.

Distances are negative inside. Near a face they are Euclidean, with a gradient of length one. Off an edge, where
several faces meet, the distance is the largest distance to one of the faces. That is less than the Euclidean
distance, so a ray never steps too far.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RADIUS = 0.81
"""Every solid lies within this distance of its own origin."""

VIEWED_SHAPES = ("mug", "chair", "arrow", "letter L")
"""Solids that look different from the front, a side, the back and overhead."""


@dataclass(frozen=True)
class Solid:
    """A shape.

    Attributes:
        distance: Points (3, n) -> signed distance (n,).
        lower: Corner of the tight bounding box with the smallest x, y, z.
        upper: Opposite corner.
    """

    distance: Callable[[Tensor], Tensor]
    lower: tuple[float, float, float]
    upper: tuple[float, float, float]


def signed_distance(shape: str, points: Tensor) -> Tensor:
    """Return the signed distance (...) of points (..., 3) in the solid's frame.

    Raises ``ValueError`` for an unknown shape.
    """
    return find_solid(shape).distance(points.reshape(-1, 3).T).reshape(points.shape[:-1])


def occupancy(shape: str, points: Tensor, position: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
    """Return whether points (..., 3) in world coordinates lie in the solid at ``position``: (...) bool."""
    return signed_distance(shape, points - points.new_tensor(position)) <= 0


def find_solid(shape: str) -> Solid:
    """Return the solid of that name. Raises ``ValueError`` for an unknown name."""
    if shape not in SOLIDS:
        raise ValueError(f"shape must be one of {', '.join(SOLIDS)}; got {shape!r}.")
    return SOLIDS[shape]


def _length(*parts: Tensor) -> Tensor:
    squares = sum((part * part for part in parts[1:]), parts[0] * parts[0])
    # The square root has no gradient at 0; below 1e-10 the length counts as constant.
    return squares.clamp(min=1e-20).sqrt()


def _largest(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = torch.maximum(first, other)
    return first


def _between(value: Tensor, lower: float, upper: float) -> Tensor:
    return (value - (lower + upper) / 2).abs() - (upper - lower) / 2


def _sphere(p: Tensor) -> Tensor:
    return _length(*p) - 0.62


def _cube(p: Tensor) -> Tensor:
    return _largest(*(p.abs() - 0.45))


def _cylinder(p: Tensor) -> Tensor:
    x, y, z = p
    return torch.maximum(_length(x, y) - 0.42, z.abs() - 0.6)


def _cone(p: Tensor) -> Tensor:
    x, y, z = p
    # The slope falls from (0, 0.65) to (0.55, -0.55) in (radius, height): its normal is (1.2, 0.55) / 1.32.
    slope = (1.2 * _length(x, y) + 0.55 * (z - 0.65)) / (1.2**2 + 0.55**2) ** 0.5
    return torch.maximum(slope, -0.55 - z)


def _torus(p: Tensor) -> Tensor:
    x, y, z = p
    return _length(_length(x, y) - 0.53, z) - 0.22


def _mug(p: Tensor) -> Tensor:
    x, y, z = p[0] + 0.16, p[1], p[2]
    radius = _length(x, y)
    cavity = torch.maximum(radius - 0.36, -0.38 - z)
    body = _largest(radius - 0.44, z.abs() - 0.5, -cavity)
    ring = _length(_length(x - 0.47, z) - 0.29, y) - 0.085
    return torch.minimum(body, torch.maximum(ring, 0.4 - radius))


def _chair(p: Tensor) -> Tensor:
    x, y, z = p
    across = y.abs() - 0.36
    seat = _largest(x.abs() - 0.36, across, _between(z, -0.14, 0.0))
    rest = _largest(_between(x, -0.36, -0.24), across, _between(z, -0.14, 0.62))
    legs = _largest(_between(x.abs(), 0.22, 0.36), _between(y.abs(), 0.22, 0.36), _between(z, -0.6, -0.1))
    return torch.minimum(torch.minimum(seat, rest), legs)


def _arrow(p: Tensor) -> Tensor:
    x, y, z = p
    shaft = torch.maximum(_between(x, -0.72, 0.1), y.abs() - 0.17)
    # The edge of the head runs from (0.02, 0.52) to (0.74, 0): its normal is (0.52, 0.72) / 0.89.
    edge = (0.52 * (x - 0.74) + 0.72 * y.abs()) / (0.52**2 + 0.72**2) ** 0.5
    head = torch.maximum(edge, 0.02 - x)
    return torch.maximum(torch.minimum(shaft, head), z.abs() - 0.12)


def _letter_l(p: Tensor) -> Tensor:
    x, y, z = p
    stroke = torch.maximum(_between(y, -0.42, -0.1), z.abs() - 0.62)
    foot = torch.maximum(y.abs() - 0.42, _between(z, -0.62, -0.3))
    return torch.maximum(torch.minimum(stroke, foot), x.abs() - 0.17)


SOLIDS = {
    "sphere": Solid(_sphere, (-0.62, -0.62, -0.62), (0.62, 0.62, 0.62)),
    "cube": Solid(_cube, (-0.45, -0.45, -0.45), (0.45, 0.45, 0.45)),
    "cylinder": Solid(_cylinder, (-0.42, -0.42, -0.6), (0.42, 0.42, 0.6)),
    "cone": Solid(_cone, (-0.55, -0.55, -0.55), (0.55, 0.55, 0.65)),
    "torus": Solid(_torus, (-0.75, -0.75, -0.22), (0.75, 0.75, 0.22)),
    "mug": Solid(_mug, (-0.6, -0.44, -0.5), (0.685, 0.44, 0.5)),
    "chair": Solid(_chair, (-0.36, -0.36, -0.6), (0.36, 0.36, 0.62)),
    "arrow": Solid(_arrow, (-0.72, -0.52, -0.12), (0.74, 0.52, 0.12)),
    "letter L": Solid(_letter_l, (-0.17, -0.42, -0.62), (0.17, 0.42, 0.62)),
}
