"""Solid matter from a density: space into which no camera sees counts as matter, however empty it is.

Score distillation learns what cameras see. Behind an opaque skin the density is arbitrary, so the surface on which
it has some value is foam. What cameras do determine is how much light passes from a point to them. A point is
*hidden* to the degree 1 - T, where T is the share that reaches a camera. The solid is what is dense or hidden.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad

from sds.mesh import Lattice, sample_lattice
from sds.radiance import RadianceField
from sds.turntable import turntable_cameras

ELEVATIONS = (0.0, 25.0, 50.0, 75.0)
"""Elevations, in degrees, of the rings of cameras that look for empty space. Few scenes are learned from below."""

NUM_VIEWS = 48
"""Cameras on all rings together."""

FAR = 100.0
"""Distance of these cameras, in sides of the scene's box."""

WITNESSES = 4
"""So many cameras must see a point for it to be empty. Fewer may look through a crack in a foggy wall."""


@dataclass(frozen=True, eq=False)
class Space:
    """A scene's density, and what of its box is hidden from cameras.

    Attributes:
        lattice: Samples of the density.
        hidden: (i, j, k) in [0, 1] at the same points; see :func:`hidden_share`.
        smooth: Standard deviation, in spacings, of the Gaussian that closes cracks and removes ripples. 0 is none.
    """

    lattice: Lattice
    hidden: Float[Tensor, "i j k"]
    smooth: float = 1.0

    def at(self, level: float) -> Lattice:
        """Return values whose surface at ``level`` bounds what is denser than that, or hidden by more than half.

        They are cut off at twice the level, so that the surface does not depend on how dense the inside is.
        """
        from scipy.ndimage import gaussian_filter

        values = torch.maximum(self.lattice.values.clamp(max=2 * level), 2 * level * self.hidden)
        if self.smooth:
            blurred = gaussian_filter(values.numpy(), self.smooth, mode="nearest")
            values = torch.from_numpy(blurred)
        return replace(self.lattice, values=values)


def survey(scene: RadianceField, resolution: int = 128, *, smooth: float = 1.0) -> Space:
    """Return the density in the scene's box, and what is hidden from cameras around it.

    Raises ``ValueError`` as :func:`sds.mesh.sample_lattice` does.
    """
    lattice = sample_lattice(scene, resolution)
    side = lattice.spacing * (max(lattice.values.shape) - 1)
    return Space(lattice, hidden_share(lattice, lookouts(side)), smooth)


def lookouts(side: float) -> Float[Tensor, "n 3 4"]:
    """Return cameras on rings around the origin, which they look at, and one straight above it.

    They are so far away that their rays are parallel: horizontal ones see exactly down to the underside of an
    object, neither into it nor into a cone of shadow below it.

    Args:
        side: Longest side of the box that they look at.
    """
    rings = turntable_cameras(NUM_VIEWS, elevations=ELEVATIONS, distance=FAR * side)
    return torch.cat([rings, turntable_cameras(1, elevations=(90.0,), distance=FAR * side)])


@torch.no_grad()
def hidden_share(
    lattice: Lattice, cameras: Float[Tensor, "n 3 4"], *, num_witnesses: int = WITNESSES, resolution: int = 64
) -> Float[Tensor, "i j k"]:
    """Return the share in [0, 1], at each point of the lattice, of its light that does not reach a camera.

    The camera that counts is the one to which the most light passes, but for ``num_witnesses`` - 1 others.

    Args:
        lattice: Samples of the density.
        cameras: Cameras as in nerfstudio and OpenGL.
        num_witnesses: At least 1, at most the number of cameras.
        resolution: Intervals along the longest side at whose ends light is counted; between them it is
            interpolated.

    Raises ``ValueError`` for more witnesses than cameras, or fewer than 1.
    """
    if not 1 <= num_witnesses <= len(cameras):
        raise ValueError(
            f"num_witnesses must lie between 1 and the number of cameras, {len(cameras)}; got {num_witnesses}."
        )
    shape = lattice.values.shape
    coarser = max(1.0, (max(shape) - 1) / resolution)
    size = [max(2, round((n - 1) / coarser) + 1) for n in shape]
    low, extent = _box(lattice)
    points = low + torch.cartesian_prod(*[torch.linspace(0, 1, n) for n in size]) * extent
    least = torch.full((num_witnesses, len(points)), torch.inf)  # in rising order
    for camera in cameras:
        depth = optical_depth(lattice, camera, points, resolution=max(size))
        for place in least:
            less, depth = torch.minimum(place, depth), torch.maximum(place, depth)
            place.copy_(less)
    share = -torch.expm1(-least[-1]).view(1, 1, *size)
    return interpolate(share, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]


def optical_depth(
    lattice: Lattice, camera: Float[Tensor, "3 4"], points: Float[Tensor, "n 3"], *, resolution: int = 64
) -> Float[Tensor, " n"]:
    """Return the density integrated from the camera to each point; inf for points that are not in front of it.

    The integral is taken once for all points: in steps along ``resolution`` x ``resolution`` rays through the
    box, and interpolated between rays and steps.

    Args:
        lattice: Samples of the density, which is 0 outside.
        camera: ``camera_to_world``.
        points: In the box, (n, 3).
        resolution: Rays along each axis of the picture, and steps along each ray.
    """
    axes, position = camera[:, :3], camera[:, 3]
    low, extent = _box(lattice)
    nearest = 1e-3 * float(extent.max())
    corners = _projected(low + torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3) * extent, camera, nearest)
    first, last = corners.amin(0), corners.amax(0)
    step = (last[2] - first[2]) / resolution
    x, y = (torch.linspace(float(first[i]), float(last[i]), resolution) for i in (0, 1))
    middles = first[2] + step * (torch.arange(resolution) + 0.5)
    ahead, up, right = torch.meshgrid(middles, y, x, indexing="ij")
    samples = torch.stack([ahead * right, ahead * up, -ahead], dim=-1) @ axes.T + position
    density = _interpolated(lattice.values.clamp(min=0), (samples - low) / extent, padding="zeros")
    depth = (density * step * (1 + right**2 + up**2).sqrt()).cumsum(0)
    depth = pad(depth, (0, 0, 0, 0, 1, 0))  # nothing before the first step
    places = (_projected(points, camera, nearest) - first) / (last - first)
    found = _interpolated(depth, places.flip(-1), padding="border")
    behind = (points - position) @ axes[:, 2] > -nearest
    return found.masked_fill(behind, torch.inf)


def field_normals(lattice: Lattice, points: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """Return unit normals (n, 3): the direction in which values on a lattice fall at these points.

    Args:
        lattice: As from :meth:`Space.at`.
        points: On its surface, (n, 3).
    """
    low, extent = _box(lattice)
    slopes = [
        _interpolated(slope, (points - low) / extent, padding="border") for slope in torch.gradient(lattice.values)
    ]
    return torch.nn.functional.normalize(-torch.stack(slopes, dim=1), dim=1)


def _box(lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Return the lattice's first point, and the distance (3,) from it to the last."""
    return torch.tensor(lattice.lower), lattice.spacing * (torch.tensor(lattice.values.shape) - 1)


def _projected(points: Tensor, camera: Tensor, nearest: float) -> Tensor:
    """Return where points are in the picture, right and up (of focal length 1), and how far ahead: (n, 3)."""
    right, up, back = ((points - camera[:, 3]) @ camera[:, :3]).unbind(-1)
    ahead = (-back).clamp(min=nearest)
    return torch.stack([right / ahead, up / ahead, ahead], dim=-1)


def _interpolated(values: Tensor, places: Tensor, *, padding: str) -> Tensor:
    """Return values (i, j, k), linearly interpolated at places (..., 3) in [0, 1] along these axes: (...)."""
    # grid_sample counts x along the last axis.
    grid = (places * 2 - 1).flip(-1).reshape(1, 1, 1, -1, 3)
    found = grid_sample(values[None, None], grid, align_corners=True, padding_mode=padding)
    return found.view(places.shape[:-1])
