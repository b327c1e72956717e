"""Where rays meet a solid: sphere tracing (Hart 1996, doi 10.1007/s003710050084) from its bounding box on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toyworld.solids import Solid

FREE_STEPS, FORCED_STEPS, FORCED = 32, 128, 0.0125
"""A ray almost parallel to a face comes to a standstill beside it, though something else may be behind. After so
many steps of the distance, every further one is at least ``FORCED`` long; together they cross any solid. Rays slow
enough to need them may miss a corner that they would cut by less."""


@dataclass(frozen=True, eq=False)
class Hits:
    """Where n rays first meet a solid.

    Attributes:
        depth: (n,) from the origin along the unit direction; 0 where nothing is met.
        normal: (3, n), unit, outwards; 0 where nothing is met.
        hit: (n,), bool.
    """

    depth: Tensor
    normal: Tensor
    hit: Tensor


def trace(solid: Solid, origin: Tensor, direction: Tensor) -> Hits:
    """First meetings of rays with a solid, in the frame of the solid.

    Args:
        solid: what is met.
        origin: (3, n), outside the solid.
        direction: (3, n), unit.
    """
    near, far = _box_interval(solid, origin, direction)
    # Rays stop at a shell outside the surface, where the gradient of the distance is that of one face. From there
    # one Newton step, whose error is quadratic, leads to the surface up to rounding.
    shell = torch.finfo(origin.dtype).eps ** 0.5
    chosen = (near < far).nonzero()[:, 0]
    depth, hit = torch.zeros_like(near), torch.zeros_like(near, dtype=torch.bool)
    normal = torch.zeros_like(direction)
    reached, at = _march(solid, origin[:, chosen], direction[:, chosen], near[chosen], far[chosen], shell)
    chosen, along = chosen[reached], direction[:, chosen[reached]]
    distance, outwards = _gradient(solid, origin[:, chosen] + at * along)
    x, y, z = outwards * along
    # Where a ray only touches the solid the step has no bound of its own.
    depth[chosen] = at + (distance / (-x - y - z).clamp(min=1e-3)).clamp(-0.05, 0.05)
    normal[:, chosen], hit[chosen] = outwards, True
    return Hits(depth, normal, hit)


def _box_interval(solid: Solid, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Depths (n,) at which rays enter and leave the bounding box; near >= far where they pass it."""
    margin = 1e-3
    lower, upper = (origin.new_tensor(corner)[:, None] for corner in (solid.lower, solid.upper))
    # A zero would make 0 / 0 where the origin is in the plane of a face.
    safe = torch.where(direction.abs() < 1e-12, torch.full_like(direction, 1e-12), direction)
    first, second = (lower - margin - origin) / safe, (upper + margin - origin) / safe
    return torch.minimum(first, second).amax(0), torch.maximum(first, second).amin(0)


def _march(
    solid: Solid, origin: Tensor, direction: Tensor, near: Tensor, far: Tensor, shell: float
) -> tuple[Tensor, Tensor]:
    """Which rays reach the shell (m,), as numbers, and at what depth (m,)."""
    number = torch.arange(len(near), device=near.device)
    reached: list[Tensor] = []
    depths: list[Tensor] = []
    point, depth = origin + near * direction, near
    for steps in range(FREE_STEPS + FORCED_STEPS):
        distance = solid.distance(point)
        arrived = distance < 2 * shell
        reached.append(number[arrived])
        depths.append(depth[arrived])
        step = (distance - shell).clamp(min=0.0 if steps < FREE_STEPS else FORCED)
        depth = depth + step
        going = (~arrived & (depth < far)).nonzero()[:, 0]
        if not len(going):
            break
        point, direction = point[:, going] + step[going] * direction[:, going], direction[:, going]
        number, depth, far = number[going], depth[going], far[going]
    return torch.cat(reached), torch.cat(depths)


def _gradient(solid: Solid, point: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (n,) and its unit gradient (3, n) at points (3, n)."""
    with torch.inference_mode(False), torch.enable_grad():
        point = point.clone().requires_grad_()
        distance = solid.distance(point)
        (gradient,) = torch.autograd.grad(distance.sum(), point)
    x, y, z = gradient
    return distance.detach(), gradient / (x * x + y * y + z * z).sqrt()
