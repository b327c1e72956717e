"""Turntable: cameras on a circle around an object, and frames of colours, distances and normals."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sds.radiance import Colour, Rendered, check_colour

Frames = Float[Tensor, "n 3 h w"]
"""Pictures in [0, 1], in display values."""

NEAR, FAR = 0.85, 0.15
"""Brightness of the nearest and the farthest point in depth frames, so that neither is white or black."""


def turntable_cameras(
    num_views: int, *, elevations: Sequence[float] = (15.0,), distance: float = 3.0
) -> Float[Tensor, "n 3 4"]:
    """Return cameras evenly spaced around the origin, facing it; the first is in front (+x), the next to its left.

    Args:
        num_views: Number of cameras on the whole circle.
        elevations: Elevations in degrees above the horizon; the cameras take them in turn.
        distance: Distance from the origin.

    Raises:
        ValueError: There are no views or elevations, an elevation is beyond 90 degrees, or the distance is not
            positive.
    """
    possible = elevations and all(-90 <= elevation <= 90 for elevation in elevations)
    if num_views < 1 or not possible or not 0 < distance < math.inf:
        raise ValueError(
            "a turntable needs num_views >= 1, elevations in [-90, 90] degrees and a positive distance; got "
            f"{num_views}, {tuple(elevations)} and {distance}."
        )
    cameras = []
    for number in range(num_views):
        azimuth, elevation = 2 * math.pi * number / num_views, math.radians(elevations[number % len(elevations)])
        (sin_a, cos_a), (sin_e, cos_e) = ((math.sin(x), math.cos(x)) for x in (azimuth, elevation))
        back = (cos_e * cos_a, cos_e * sin_a, sin_e)
        # The right axis is always horizontal, so straight above is no special case.
        right, up = (-sin_a, cos_a, 0.0), (-sin_e * cos_a, -sin_e * sin_a, cos_e)
        cameras.append(torch.tensor((right, up, back, [distance * axis for axis in back])).T)
    return torch.stack(cameras)


def colour_frames(pictures: Rendered, background: Colour, wanted: Colour | None = None) -> Frames:
    """Return the pictures with ``wanted`` in place of the ``background`` that they have; None keeps it."""
    rgb = (pictures.rgb + 1) / 2
    if wanted is None:
        return rgb
    shift = _plain(wanted) - _plain(background)
    return (rgb + (1 - pictures.opacity) * shift).clamp(0, 1)


def depth_frames(pictures: Rendered, background: Colour = (1.0, 1.0, 1.0)) -> Frames:
    """Return depths as brightness, near bright and far dark, on one scale, so that a video does not flicker.

    The scale is taken from pixels that are more than half opaque: in fog, distances mean nothing.
    """
    seen = pictures.depth[pictures.opacity > 0.5]
    near, far = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    share = ((pictures.depth - near) / max(far - near, 1e-6)).clamp(0, 1)
    return _over((NEAR + (FAR - NEAR) * share).expand(-1, 3, -1, -1), pictures, background)


def normal_frames(pictures: Rendered, background: Colour = (1.0, 1.0, 1.0)) -> Frames:
    """Return world normals n as colours (n + 1) / 2: red is the front (+x), green is +y, blue is up (+z)."""
    normals = torch.nn.functional.normalize(pictures.normals, dim=1)
    return _over((normals + 1) / 2, pictures, background)


def contact_sheet(rows: Sequence[Frames], *, gap: int = 2, background: Colour = (1.0, 1.0, 1.0)) -> Tensor:
    """Return one picture (3, H, W) of rows of pictures, ``gap`` pixels apart and from the edge.

    Raises ``ValueError`` for rows of different shapes, or no rows.
    """
    shapes = [tuple(row.shape) for row in rows]
    if len(set(shapes)) != 1 or not len(rows[0]):
        raise ValueError(f"rows must be pictures of one shape (n, 3, h, w); got {shapes}.")
    num, _, height, width = rows[0].shape
    sheet = _plain(background)[0].repeat(1, len(rows) * (height + gap) + gap, num * (width + gap) + gap)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = gap + i * (height + gap), gap + j * (width + gap)
            sheet[:, top : top + height, left : left + width] = picture
    return sheet


def _over(frames: Frames, pictures: Rendered, background: Colour) -> Frames:
    return torch.lerp(_plain(background), frames, pictures.opacity)


def _plain(colour: Colour) -> Tensor:
    check_colour("background", colour)
    return torch.tensor(colour).view(1, 3, 1, 1)
