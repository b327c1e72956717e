"""Intersection of rays with a solid, by sphere tracing from its bounding box (Hart 1996).

Source: doi 10.1007/s003710050084.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from toyworld.solids import Solid

SHELL = 1e-4
"""Rays march until they are between once and twice this distance away; Newton's method finds the surface from
there."""

FREE_STEPS, FORCED_STEPS, FORCED = 40, 120, 0.0125
"""A ray almost parallel to a face comes to a standstill near it, though something else may lie behind. So after
``FREE_STEPS`` steps of the distance, every further one is at least ``FORCED`` long; ``FORCED_STEPS`` of them cross
any solid. Rays slow enough to need them may miss a corner if they cross less than ``FORCED`` of it. So may rays
that came near a surface, hit nothing and marched on, which happens at most twice."""

NEWTON_STEPS = 8
"""Each step squares the error; a face needs one."""


@dataclass(frozen=True, eq=False)
class Hits:
    """First intersections of n rays with a solid.

    Attributes:
        depth: (n,) distance from the origin along the unit direction; 0 without a hit.
        normal: (3, n) unit outward normal; 0 without a hit.
        hit: (n,) bool.
    """

    depth: Tensor
    normal: Tensor
    hit: Tensor


def trace(solid: Solid, origin: Tensor, direction: Tensor) -> Hits:
    """Return the first intersections of rays with a solid, in the solid's frame.

    Args:
        solid: The solid.
        origin: (3, n), outside the solid.
        direction: (3, n), unit vectors.
    """
    near, far = _box_interval(solid, origin, direction)
    depth, normal = torch.zeros_like(near), torch.zeros_like(direction)
    hit = torch.zeros_like(near, dtype=torch.bool)
    rays = (near < far).nonzero()[:, 0]
    for free_steps in (FREE_STEPS, 0, 0):
        near_by, at = _march(solid, origin[:, rays], direction[:, rays], near[rays], far[rays], free_steps)
        rays = rays[near_by]
        met, exact, outwards = _meet(solid, origin[:, rays], direction[:, rays], at)
        hit[rays[met]], depth[rays[met]], normal[:, rays[met]] = True, exact, outwards
        passing = torch.ones_like(rays, dtype=torch.bool).index_fill_(0, met, False)
        rays = rays[passing]
        if not len(rays):
            break
        near[rays] = at[passing] + FORCED
    return Hits(depth, normal, hit)


def _box_interval(solid: Solid, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return the depths (n,) at which rays enter and leave the bounding box; near >= far if they miss it."""
    margin = 1e-3
    lower, upper = (origin.new_tensor(corner)[:, None] for corner in (solid.lower, solid.upper))
    # A zero would give 0 / 0 where the origin lies in the plane of a face.
    safe = torch.where(direction.abs() < 1e-12, torch.full_like(direction, 1e-12), direction)
    first, second = (lower - margin - origin) / safe, (upper + margin - origin) / safe
    return torch.minimum(first, second).amax(0), torch.maximum(first, second).amin(0)


def _march(
    solid: Solid, origin: Tensor, direction: Tensor, near: Tensor, far: Tensor, free_steps: int
) -> tuple[Tensor, Tensor]:
    """Return the numbers (m,) of the rays that come near the surface, and the depths (m,) at which they do."""
    ray = torch.arange(len(near), device=near.device)
    rays: list[Tensor] = []
    depths: list[Tensor] = []
    point, depth = origin + near * direction, near
    for steps in range(free_steps + FORCED_STEPS):
        distance = solid.distance(point)
        arrived = distance < 2 * SHELL
        rays.append(ray[arrived])
        depths.append(depth[arrived])
        step = (distance - SHELL).clamp(min=0.0 if steps < free_steps else FORCED)
        depth = depth + step
        going = (~arrived & (depth < far)).nonzero()[:, 0]
        if not len(going):
            break
        point, direction = point[:, going] + step[going] * direction[:, going], direction[:, going]
        ray, depth, far = ray[going], depth[going], far[going]
    return torch.cat(rays), torch.cat(depths)


def _meet(solid: Solid, origin: Tensor, direction: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers (m,) of the rays that hit the surface near ``depth``, with their depths and normals."""
    rounding = 16 * torch.finfo(depth.dtype).eps
    ray = torch.arange(len(depth), device=depth.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(NEWTON_STEPS):
        distance, normal = _gradient(solid, origin + depth * direction)
        there = distance.abs() < rounding
        found.append((ray[there], depth[there], normal[:, there]))
        x, y, z = normal * direction
        facing = -x - y - z
        # A forced step may end inside, behind the middle: the way back is then no longer than that step.
        depth = depth + (distance / facing.clamp(min=1e-3)).clamp(-FORCED, FORCED)
        going = (~there & ((facing > 0) | (distance < 0))).nonzero()[:, 0]
        if not len(going):
            break
        ray, depth, origin, direction = ray[going], depth[going], origin[:, going], direction[:, going]
    rays, depths, normals = zip(*found, strict=True)
    return torch.cat(rays), torch.cat(depths), torch.cat(normals, 1)


def _gradient(solid: Solid, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance (n,) and its unit gradient (3, n) at points (3, n)."""
    with torch.inference_mode(False), torch.enable_grad():
        point = point.clone().requires_grad_()
        distance = solid.distance(point)
        (gradient,) = torch.autograd.grad(distance.sum(), point)
    x, y, z = gradient
    return distance.detach(), gradient / (x * x + y * y + z * z).sqrt()
