"""Fields: density and colour as functions of position, from any network, with differentiable normals.

A network maps points scaled to [-1, 1]^3 to four raw numbers, one for density and three for colour. The network
may be a grid, planes, a hash table or an MLP; its numbers become density and colour here, in one way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate, softplus

Points = Float[Tensor, "n 3"]

Blob = Callable[[Tensor], Tensor]
"""World positions (n, 3) -> values (n,) added to the raw density there."""

Activation = Callable[[Tensor], Tensor]
"""Raw density (n,) -> density (n,) per world unit, at least 0. It must be strictly increasing; see
:meth:`Field.forward`."""


def cone_blob(strength: float = 10.0, radius: float = 0.5) -> Blob:
    """Return Magic3D's initial blob, strength (1 - r / radius) (arXiv 2211.10440).

    Outside ``radius`` it is negative, so space there starts empty.
    """

    def blob(points: Tensor) -> Tensor:
        # The offset keeps the derivatives of the root finite at the origin.
        return strength * (1 - (points.square().sum(-1) + 1e-12).sqrt() / radius)

    return blob


def scaled_softplus(scale: float = 10.0) -> Activation:
    """Return ``scale`` times softplus.

    With it, matter that is opaque within a voxel is hundreds of steps away at the start, not thousands.
    """
    return lambda raw: scale * softplus(raw)


@dataclass(frozen=True, eq=False)
class Matter:
    """Density, colour and normals of a field at n points.

    Attributes:
        density: (n,) per world unit: a segment of some length absorbs the share 1 - exp(-density length) of the
            light.
        albedo: (n, 3) colour in [0, 1].
        normals: (n, 3) unit vectors in world coordinates, outwards; None if they were not asked for.
    """

    density: Float[Tensor, " n"]
    albedo: Float[Tensor, "n 3"]
    normals: Float[Tensor, "n 3"] | None


class Field(nn.Module):
    """Density, colour and normals of points in the cube [-half_size, half_size]^3.

    Args:
        network: Points (n, 3) in [-1, 1] -> raw numbers (n, 4). Must be twice differentiable if normals are
            optimised.
        half_size: Half the side of the cube, in world units.
        blob: Added to the raw density. A scene that starts empty has no gradient that would make it grow.
        activation: Raw density -> density: ``softplus`` or :func:`scaled_softplus`.

    Raises ``ValueError`` unless ``half_size`` is above 0.
    """

    def __init__(
        self, network: nn.Module, *, half_size: float = 1.0, blob: Blob | None = None,
        activation: Activation = softplus,
    ) -> None:  # fmt: skip
        super().__init__()
        if not half_size > 0:
            raise ValueError(f"half_size must be above 0; got {half_size}.")
        self.network, self.half_size, self.blob, self.activation = network, half_size, blob, activation

    def forward(self, points: Points, *, normals: bool = False) -> Matter:
        """Return the matter at these points (n, 3) of the world.

        Normals point in the direction in which the raw density falls. The density itself falls in the same
        direction, since the activation is strictly increasing; but where the density saturates or vanishes, only
        the raw density has a slope. Normals are differentiable with respect to the parameters: their derivative is
        taken with ``create_graph``.
        """
        if not normals:
            return self._matter(self._raw(points), None)
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            raw = self._raw(points)
            (slope,) = torch.autograd.grad(raw[:, 0].sum(), points, create_graph=learning)
        return self._matter(raw, normalised(-slope))

    def _raw(self, points: Tensor) -> Tensor:
        raw = self.network(points / self.half_size)
        if self.blob is None:
            return raw
        return torch.cat([raw[:, :1] + self.blob(points)[:, None], raw[:, 1:]], 1)

    def _matter(self, raw: Tensor, normals: Tensor | None) -> Matter:
        return Matter(self.activation(raw[:, 0]), raw[:, 1:].sigmoid(), normals)


def normalised(vectors: Float[Tensor, "*n 3"], floor: float = 1e-6) -> Float[Tensor, "*n 3"]:
    """Return vectors of length one. Those shorter than ``floor`` stay short; all their derivatives are finite."""
    return vectors * (vectors.square().sum(-1, keepdim=True) + floor**2).rsqrt()


class DenseGrid(nn.Module):
    """Numbers on the corners of a regular grid over [-1, 1]^3, interpolated linearly: the fastest field on a CPU.

    The grid is the sum of several grids of different resolutions, whose values are the parameters. The coarse ones
    add no detail, but they make a step move the neighbourhood of a voxel along with it. A chair, thin legs
    included, is then found in half the steps, and noise leaves fewer specks.

    Args:
        resolutions: Corners along an edge of each grid. The finest one is the resolution of the sum.
        channels: Numbers at each corner.
        initial: Initial value of the first channel; the others start at 0.

    Raises ``ValueError`` for no resolutions, or for one below 2.
    """

    def __init__(self, resolutions: Sequence[int] = (10, 20, 40), channels: int = 4, initial: float = 0.0) -> None:
        super().__init__()
        if not resolutions or min(resolutions) < 2:
            raise ValueError(f"resolutions must be whole numbers of at least 2; got {resolutions}.")
        self.grids = nn.ParameterList(torch.zeros(1, channels, r, r, r) for r in sorted(resolutions))
        self.grids[-1].data[:, 0] = initial

    def forward(self, points: Points) -> Float[Tensor, "n c"]:
        """Return the interpolated numbers (n, channels). Outside the grid they are those of its boundary."""
        # grid_sample counts x along the last axis of the volume, and so z along the first.
        coordinates = points.view(1, 1, 1, -1, 3)
        values = grid_sample(self.volume(), coordinates, padding_mode="border", align_corners=True)
        return values.view(values.shape[1], -1).T

    def volume(self) -> Float[Tensor, "1 c r r r"]:
        """Return the sum of all grids at the finest resolution; axes z, y, x."""
        finest = self.grids[-1]
        size = finest.shape[2:]
        total = finest
        for grid in list(self.grids)[:-1]:
            total = total + interpolate(grid, size=size, mode="trilinear", align_corners=True)
        return total
