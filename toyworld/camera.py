"""Cameras on a sphere around the origin, their rays, and the view words for their positions.

In the world z is up. ``camera_to_world`` (3, 4) follows nerfstudio and OpenGL: its columns are the camera's x axis
(right), y axis (up), z axis (backwards: the camera looks along -z) and position. All angles are in degrees.

Azimuth 0 is on +x, where the front of every solid faces, and grows counter-clockwise seen from above: azimuth 90
is on +y. Elevation 90 is straight above.
"""

import math

import torch
from torch import Tensor

FIELD_OF_VIEW = 40.0
"""Vertical field of view of every picture of this world."""

VIEWS = ("front", "side", "back", "overhead")
"""View words, as in the view-dependent prompts of text-to-3D."""

OVERHEAD_ABOVE = 60.0
"""Views above this elevation are overhead, whatever their azimuth (DreamFusion, arXiv 2209.14988)."""

FRONT_WITHIN = 45.0
"""Azimuths at most this far from 0 are the front, from 180 the back; all others are a side."""


def view_word(azimuth: float, elevation: float) -> str:
    """Return the view word, one of ``VIEWS``, for a camera at this azimuth and elevation."""
    if elevation > OVERHEAD_ABOVE:
        return "overhead"
    from_front = abs((azimuth + 180) % 360 - 180)
    if from_front <= FRONT_WITHIN:
        return "front"
    return "back" if from_front >= 180 - FRONT_WITHIN else "side"


def orbit(azimuth: float, elevation: float, distance: float) -> Tensor:
    """Return ``camera_to_world`` (3, 4), float64, of a camera ``distance`` away from the origin, facing it.

    The right axis is always horizontal, so straight above is no special case: at azimuth 0, the up axis is -x
    there.
    """
    # Python's functions: torch's may round the last digit differently at another place in a batch.
    sin_a, cos_a = math.sin(math.radians(azimuth)), math.cos(math.radians(azimuth))
    sin_e, cos_e = math.sin(math.radians(elevation)), math.cos(math.radians(elevation))
    back = (cos_e * cos_a, cos_e * sin_a, sin_e)
    right = (-sin_a, cos_a, 0.0)
    up = (-sin_e * cos_a, -sin_e * sin_a, cos_e)
    position = tuple(distance * axis for axis in back)
    return torch.tensor((right, up, back, position), dtype=torch.float64).T.contiguous()


def focal_length(size: int, field_of_view: float = FIELD_OF_VIEW) -> float:
    """Return the focal length in pixels of pictures of ``size`` x ``size`` square pixels.

    The principal point is at ``size / 2``.
    """
    return size / 2 / math.tan(math.radians(field_of_view) / 2)


def ray_directions(camera_to_world: Tensor, column: Tensor, row: Tensor, focal: float, size: int) -> Tensor:
    """Return unit directions (3, n), in the world, of rays through points of the picture.

    Args:
        camera_to_world: (n, 3, 4), or (1, 3, 4) for one camera.
        column: (n,) in pixels from the left edge; the centre of the first pixel is at 0.5.
        row: (n,) in pixels from the upper edge.
        focal: Focal length in pixels.
        size: Height and width in pixels.
    """
    x, y = (column - size / 2) / focal, (size / 2 - row) / focal
    # Term by term: a matrix product may round differently for another number of rays.
    length = (x * x + y * y + 1).sqrt()
    right, up, back = camera_to_world[..., :3].permute(2, 1, 0)
    return (x * right + y * up - back) / length
