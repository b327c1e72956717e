"""Scenes for the export whose pictures are written down: no sampling along rays, no mesh."""

import math
from dataclasses import dataclass

import torch

from sds.radiance import RadianceField, Rendered


def rays(camera_to_world, size, field_of_view=40.0):
    """Origins (b, 1, 1, 3) and unit directions (b, size, size, 3) of nerfstudio's cameras, float64."""
    focal = size / 2 / math.tan(math.radians(field_of_view) / 2)
    row, column = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) + 0.5] * 2, indexing="ij")
    local = torch.stack([(column - size / 2) / focal, (size / 2 - row) / focal, -torch.ones_like(row)], -1)
    camera = camera_to_world.double()
    axes = camera[:, None, :, :3].transpose(2, 3)
    return camera[:, None, None, :, 3], local / local.norm(dim=-1, keepdim=True) @ axes


@dataclass
class Ball:
    """A ball of constant density: a ray that stays a length c inside is hidden by 1 - exp(-density c).

    Its colour is that of the place where the ray enters: constant along every radius.
    """

    radius: float = 0.62
    density: float = 60.0
    centre: tuple = (0.0, 0.0, 0.0)
    background: tuple = (1.0, 1.0, 1.0)
    queries: int = 0

    def scene(self, **changes):
        functions = {"density": self.densities, "colour": self.colours, "render": self.render}
        return RadianceField(**{**functions, "background": self.background, **changes})

    def densities(self, points):
        self.queries += 1
        return self.density * (self._local(points).norm(dim=1) <= self.radius)

    def colours(self, points):
        local = self._local(points)
        return (torch.nn.functional.normalize(local, dim=1) + 1) / 2

    def render(self, camera_to_world, size):
        origin, direction = rays(camera_to_world, size)
        origin = self._local(origin)
        middle = -(origin * direction).sum(-1)
        inside = middle**2 - (origin**2).sum(-1) + self.radius**2
        half = inside.clamp(min=0).sqrt()
        depth = torch.where(inside > 0, middle - half, 0)
        normals = torch.where(inside[..., None] > 0, (origin + depth[..., None] * direction) / self.radius, 0)
        opacity = -torch.expm1(-self.density * 2 * half)[..., None]
        rgb = opacity * (normals + 1) / 2 + (1 - opacity) * torch.tensor(self.background)
        parts = (rgb * 2 - 1, depth[..., None], normals, opacity)
        return Rendered(*(part.permute(0, 3, 1, 2).float() for part in parts))

    def _local(self, points):
        return points - points.new_tensor(self.centre)
