"""Quality of a scene of a toy-world solid, measured against the truth, and baselines that need no learning."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_fill_holes
from torch import Tensor, nn

from sds.cameras import Views, orbit
from sds.field import Field
from sds.scene import Scene, grid_scene
from toyworld.camera import FIELD_OF_VIEW, focal_length
from toyworld.render import Rendering, render
from toyworld.scene import Scene as ToyScene
from toyworld.solids import occupancy

HALF_SIZE = 0.9
"""Half the side of the cube in which scenes are learned; every solid fits."""

DISTANCE = 2.85
"""Distance of the cameras of all measurements from the origin."""

FOCAL = focal_length(1, FIELD_OF_VIEW)

ISO = 5.0
"""Density above which a point counts as matter: half of the light is lost within 0.14."""

BACKGROUND = torch.ones(3)


@dataclass(frozen=True)
class Measures:
    """Measures of a scene.

    Attributes:
        psnr: In dB, on the object's crop, mean over the held-out views; None without pictures.
        iou: IoU of interior-filled voxels.
    """

    psnr: float | None
    iou: float


def truth(shape: str, views: Views, size: int) -> Rendering:
    """Return the toy world's renders from the same cameras: a red solid over white."""
    distances = views.position.norm(dim=1)
    poses = zip(views.azimuth.tolist(), views.elevation.tolist(), distances.tolist(), strict=True)
    scenes = [
        ToyScene(shape=shape, colour="red", background="white", azimuth=a, elevation=e, distance=d)
        for a, e, d in poses
    ]
    return render(scenes, size=size)


def ring(azimuth: Tensor, elevation: Tensor) -> Views:
    """Return views (b,) at the distance of all measurements."""
    many = torch.ones(len(azimuth))
    return orbit(azimuth, elevation, DISTANCE * many, FOCAL * many)


def held_out() -> Views:
    """Return twelve views all around, at three heights."""
    return ring(torch.arange(12) * 30.0 + 15, torch.tensor([10.0, 30.0, 50.0]).repeat(4))


@torch.no_grad()
def shown(scene: Scene, views: Views, size: int) -> Tensor:
    """Return pictures (b, 3, size, size) of the scene over white."""
    return scene(views, height=size, width=size, background=BACKGROUND).rgb


@torch.no_grad()
def crop_psnrs(rgb: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    """Return the PSNR (b,) in dB within the tight box around each true mask (b, 1, h, w)."""
    values = []
    for image, target, one in zip(rgb, true, mask[:, 0], strict=True):
        rows, columns = one.any(1).nonzero(), one.any(0).nonzero()
        box = (slice(None), slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        values.append(-10 * torch.log10(((image - target)[box] / 2).square().mean()))
    return torch.stack(values)


def crop_psnr(rgb: Tensor, true: Rendering) -> float:
    """Return the mean over the views, in dB, of :func:`crop_psnrs`."""
    return float(crop_psnrs(rgb, true.rgb, true.mask).mean())


def voxels(resolution: int = 64) -> Tensor:
    """Return centres (r, r, r, 3) of voxels of the cube [-1, 1]^3; axes x, y, z."""
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def filled(solid: np.ndarray) -> np.ndarray:
    """Return the solid with every voxel filled from which there is no horizontal way out.

    That fills hollow matter and the inside of the mug, which outlines hide.
    """
    return np.stack([binary_fill_holes(solid[:, :, level]) for level in range(solid.shape[2])], axis=2)


def hollow(solid: np.ndarray) -> float:
    """Return the share of the interior-filled voxels that were empty before; 0 for a solid without hollows."""
    return 1 - float(solid.sum() / filled(solid).sum())


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return intersection over union."""
    return float((a & b).sum() / (a | b).sum())


@torch.no_grad()
def matter(scene: Scene, points: Tensor) -> np.ndarray:
    """Return which of these points lie in dense matter."""
    dense = scene.field(points.reshape(-1, 3)).density.view(points.shape[:-1]) > ISO
    return (dense & (points.abs().amax(-1) < HALF_SIZE)).numpy()


def hull(shape: str, points: Tensor, size: int = 128) -> np.ndarray:
    """Return the visual hull of 24 true masks, sampled at the voxels' centres.

    Masks alone say no more than that. Shading does, so a scene that also sees it can do better in hollows.
    """
    azimuth, elevation = torch.meshgrid(torch.arange(8) * 45.0, torch.tensor([-20.0, 20.0, 60.0]), indexing="ij")
    views = ring(azimuth.flatten(), elevation.flatten())
    left = torch.ones(points.shape[:-1], dtype=torch.bool)
    for pose, mask in zip(views.camera_to_world, truth(shape, views, size).mask[:, 0], strict=True):
        x, y, z = ((points - pose[:, 3]) @ pose[:, :3]).unbind(-1)
        scale = focal_length(size, FIELD_OF_VIEW) / -z
        column, row = (
            (size / 2 + sign * axis * scale).long().clamp(0, size - 1) for sign, axis in ((1, x), (-1, y))
        )
        left &= mask[row, column]
    return left.numpy()


class Ellipsoid(nn.Module):
    """A hard ellipsoid of one colour, in world units, as the network of a field in a cube of ``half_size``."""

    def __init__(self, centre: Tensor, radii: Tensor, colour: Tensor, half_size: float):
        super().__init__()
        self.half_size = half_size
        self.centre, self.radii, self.logits = centre, radii, torch.logit(colour, eps=1e-4)

    def forward(self, points: Tensor) -> Tensor:
        """Return raw numbers (n, 4), as :class:`sds.field.Field` takes them: density above 0 inside."""
        inside = 1 - ((points * self.half_size - self.centre) / self.radii).square().sum(1, keepdim=True)
        return torch.cat([inside, self.logits.expand(len(points), 3)], 1)


def best_ellipsoid(solid: np.ndarray, points: Tensor, *, sphere: bool) -> tuple[Tensor, Tensor, float]:
    """Return centre, radii and IoU of the best-fitting ellipsoid, by coordinate descent from the moments."""
    inside = points[torch.from_numpy(solid)]
    radii = (5 * inside.var(0)).sqrt()
    state = torch.cat([inside.mean(0), radii.mean().expand(3) if sphere else radii])
    moves = [*torch.eye(6)[:3], torch.tensor([0, 0, 0, 1.0, 1, 1])] + ([] if sphere else [*torch.eye(6)[3:]])

    def score(state: Tensor) -> float:
        return iou((((points - state[:3]) / state[3:]).square().sum(-1) <= 1).numpy(), solid)

    best = score(state)
    for step in (0.08, 0.04, 0.02):
        improved = True
        while improved:
            improved = False
            for move in (sign * step * move for move in moves for sign in (1, -1)):
                if (value := score(state + move)) > best:
                    state, best, improved = state + move, value, True
    return state[:3], state[3:], best


def measured(shape: str, scene: Scene, size: int = 32) -> Measures:
    """Return the measures of one scene."""
    views, points = held_out(), voxels()
    return Measures(
        crop_psnr(shown(scene, views, size), truth(shape, views, size)),
        iou(filled(matter(scene, points)), filled(occupancy(shape, points).numpy())),
    )


def baselines(shape: str, size: int = 32) -> dict[str, Measures]:
    """Return the measures of what needs no score: nothing, the initial blob, the best sphere, the best ellipsoid.

    Place and size of the last two are fitted to the true solid by IoU; their colour is the mean of its pixels.
    """
    views, points = held_out(), voxels()
    true, solid = truth(shape, views, size), filled(occupancy(shape, points).numpy())
    nothing = BACKGROUND.view(3, 1, 1).expand_as(true.rgb)
    rows = {
        "all background": Measures(crop_psnr(nothing, true), 0.0),
        "initial blob": measured(shape, grid_scene(half_size=HALF_SIZE), size),
    }
    colour = (true.rgb.transpose(0, 1)[:, true.mask[:, 0]].mean(1) + 1) / 2
    for name, sphere in (("best sphere", True), ("best ellipsoid", False)):
        centre, radii, _ = best_ellipsoid(solid, points, sphere=sphere)
        field = Field(
            Ellipsoid(centre, radii, colour, HALF_SIZE), half_size=HALF_SIZE,
            activation=lambda raw: 300 * (raw > 0).to(raw),
        )  # fmt: skip
        rows[name] = measured(shape, Scene(field, num_samples=256), size)
    return rows


def ceiling(shape: str) -> Measures:
    """Return the measures of the visual hull of 24 true masks."""
    points = voxels()
    return Measures(None, iou(filled(hull(shape, points)), filled(occupancy(shape, points).numpy())))
