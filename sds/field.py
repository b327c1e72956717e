"""What fills space: density and colour as functions of position, from any network, with normals that learn.

A network maps points scaled to [-1, 1]^3 to four raw numbers, one for density and three for colour. Whatever the
network is (grid, planes, hash table, MLP), density and colour are made of its numbers here, in one way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate, softplus

Points = Float[Tensor, "n 3"]

Blob = Callable[[Tensor], Tensor]
"""World positions (n, 3) -> what is added to the raw density there (n,)."""

Activation = Callable[[Tensor], Tensor]
"""Raw density (n,) -> density (n,) per world unit, at least 0; must rise strictly, see :meth:`Field.forward`."""


def cone_blob(strength: float = 10.0, radius: float = 0.5) -> Blob:
    """Magic3D's: strength (1 - r / radius), below 0 outside, where space is then empty (arXiv 2211.10440)."""

    def blob(points: Tensor) -> Tensor:
        # The offset keeps the derivatives of the root finite at the origin.
        return strength * (1 - (points.square().sum(-1) + 1e-12).sqrt() / radius)

    return blob


def scaled_softplus(scale: float = 10.0) -> Activation:
    """A multiple of softplus: matter opaque within a voxel is then hundreds of steps away, not thousands."""
    return lambda raw: scale * softplus(raw)


@dataclass(frozen=True, eq=False)
class Matter:
    """What a field holds at n points.

    Attributes:
        density: (n,) per world unit: light loses the share 1 - exp(-density length) on its way.
        albedo: (n, 3) colour in [0, 1].
        normals: (n, 3) unit vectors in the world, out of the matter; None if they were not asked for.
    """

    density: Float[Tensor, " n"]
    albedo: Float[Tensor, "n 3"]
    normals: Float[Tensor, "n 3"] | None


class Field(nn.Module):
    """Density, colour and normals of points in the cube [-half_size, half_size]^3.

    Args:
        network: (n, 3) in [-1, 1] -> (n, 4) raw numbers; twice differentiable if normals are to learn.
        half_size: of the cube, in world units.
        blob: added to the raw density; a scene that starts empty has no gradient to grow by.
        activation: of the density: ``softplus`` or :func:`scaled_softplus`.
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
        """What is at these points of the world.

        A normal is the direction in which the raw density falls, which is where the density falls, as the
        activation rises strictly; only the raw one still has a slope where the density saturates or vanishes.
        Normals are differentiable with respect to the parameters: the derivative is taken with ``create_graph``.
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
    """Vectors of length one; those shorter than ``floor`` stay short, with finite derivatives of any order."""
    return vectors * (vectors.square().sum(-1, keepdim=True) + floor**2).rsqrt()


class DenseGrid(nn.Module):
    """Numbers on the corners of a regular grid over [-1, 1]^3, interpolated linearly: the fastest field on a CPU.

    It is the sum of coarser and coarser grids, all parameters. They add no detail, but a step then moves the
    surroundings of a voxel with it: a chair is found in half the steps, thin legs too, and under noise with fewer
    specks.

    Args:
        resolutions: corners along an edge, of each grid; the finest is what is interpolated.
        channels: numbers at each corner.
        initial: value of the first channel everywhere; of the others 0.
    """

    def __init__(self, resolutions: Sequence[int] = (10, 20, 40), channels: int = 4, initial: float = 0.0) -> None:
        super().__init__()
        if not resolutions or min(resolutions) < 2:
            raise ValueError(f"resolutions must be whole numbers of at least 2; got {resolutions}.")
        self.grids = nn.ParameterList(torch.zeros(1, channels, r, r, r) for r in sorted(resolutions))
        self.grids[-1].data[:, 0] = initial

    def forward(self, points: Points) -> Float[Tensor, "n c"]:
        """The interpolated numbers; beyond the grid those of its boundary."""
        # grid_sample counts x along the last axis of the volume, and so z along the first.
        coordinates = points.view(1, 1, 1, -1, 3)
        values = grid_sample(self.volume(), coordinates, padding_mode="border", align_corners=True)
        return values.view(values.shape[1], -1).T

    def volume(self) -> Float[Tensor, "1 c r r r"]:
        """All grids in one, at the finest resolution; axes z, y, x."""
        finest = self.grids[-1]
        size = finest.shape[2:]
        total = finest
        for grid in list(self.grids)[:-1]:
            total = total + interpolate(grid, size=size, mode="trilinear", align_corners=True)
        return total
