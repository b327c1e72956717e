"""The experiment of the geometry tests: a scene learns a solid of the toy world from an exact teacher."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_fill_holes
from torch import Tensor, nn

from score.gradient import ScoreDistillation, inject, noise_weight
from score.randomness import Rng
from score.schedule import Schedule, VariancePreserving, per_sample
from score.times import uniform
from sds.field import Field
from sds.regularisers import entropy_loss
from sds.scene import Scene, grid_scene
from sds.views import CameraDistribution, Views, orbit
from toyworld.camera import FIELD_OF_VIEW, focal_length
from toyworld.render import Rendering, render
from toyworld.scene import Scene as ToyScene
from toyworld.solids import occupancy

HALF_SIZE = 0.9
ISO = 5.0
"""Density of what counts as matter: half of the light is lost within 0.14."""

BACKGROUND = torch.ones(3)
CAMERAS = CameraDistribution(
    distance=(2.6, 3.1), elevation=(0.0, 80.0), focal=(focal_length(1, FIELD_OF_VIEW),) * 2,
    position_jitter=0, target_jitter=0, up_jitter=0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class GaussianTeacher:
    """The exact denoiser of N(mean, std^2) for the mean of each sample in ``cond``."""

    schedule: Schedule
    std: float = 0.1

    def __call__(self, x_t, t, cond):
        alpha, sigma = (per_sample(f(t), x_t) for f in (self.schedule.alpha, self.schedule.sigma))
        total = (alpha * self.std) ** 2 + sigma**2
        return (alpha * self.std**2 * x_t + sigma**2 * cond["mean"]) / total


def truth(shape: str, views: Views, size: int) -> Rendering:
    """What the toy world shows from the same cameras: a red solid before white."""
    distances = views.position.norm(dim=1)
    poses = zip(views.azimuth.tolist(), views.elevation.tolist(), distances.tolist(), strict=True)
    scenes = [
        ToyScene(shape=shape, colour="red", background="white", azimuth=a, elevation=e, distance=d)
        for a, e, d in poses
    ]
    return render(scenes, size=size)


def held_out() -> Views:
    """Twelve views all round, at three heights."""
    azimuth = torch.arange(12) * 30.0 + 15
    elevation = torch.tensor([10.0, 30.0, 50.0]).repeat(4)
    return orbit(azimuth, elevation, torch.full((12,), 2.85), torch.full((12,), focal_length(1, FIELD_OF_VIEW)))


def learn(shape: str, *, seed: int, steps: int, size: int = 32, num_views: int = 4) -> Scene:
    """SDS with view-conditioned means: nothing but the score's gradient and an entropy reaches the scene."""
    scene = grid_scene(half_size=HALF_SIZE)
    method = ScoreDistillation(
        teacher=GaussianTeacher(VariancePreserving.scaled_linear()), baseline=None, times=uniform(),
        weight=noise_weight(lambda t, schedule: schedule.sigma(t) ** 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(scene.parameters(), lr=0.05, betas=(0.9, 0.99), eps=1e-15)
    for step in range(steps):
        rng = Rng(seed, step)
        views = CAMERAS.draw(num_views, rng("views"))
        mean = truth(shape, views, size).rgb
        rendering = scene(views, height=size, width=size, background=BACKGROUND, generator=rng("points"))
        gradient = method.gradient(rendering.rgb, {"mean": mean}, generator=rng("gradient"))
        loss = inject(rendering.rgb, gradient.value) / num_views + 10 * entropy_loss(rendering.opacity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scene


@torch.no_grad()
def crop_psnr(rgb: Tensor, true: Rendering) -> float:
    """Mean over the views, in dB, of the PSNR within the tight box round the true mask."""
    values = []
    for image, target, mask in zip(rgb, true.rgb, true.mask[:, 0], strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box = (slice(None), slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
        values.append(-10 * torch.log10(((image - target)[box] / 2).square().mean()))
    return float(torch.stack(values).mean())


def voxels(resolution: int = 64) -> Tensor:
    """Centres (r, r, r, 3) of voxels of the cube [-1, 1]^3; axes x, y, z."""
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def filled(solid: np.ndarray) -> np.ndarray:
    """With what cannot be left horizontally: the inside of hollow matter, and of the mug, as outlines hide it."""
    return np.stack([binary_fill_holes(solid[:, :, level]) for level in range(solid.shape[2])], axis=2)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@torch.no_grad()
def matter(scene: Scene, points: Tensor) -> np.ndarray:
    dense = scene.field(points.reshape(-1, 3)).density.view(points.shape[:-1]) > ISO
    return (dense & (points.abs().amax(-1) < HALF_SIZE)).numpy()


def hull(shape: str, points: Tensor, size: int = 128) -> np.ndarray:
    """What 24 true masks leave of space: no teacher of silhouettes can say more."""
    azimuth, elevation = torch.meshgrid(torch.arange(8) * 45.0, torch.tensor([-20.0, 20.0, 60.0]), indexing="ij")
    many = torch.ones(24)
    views = orbit(azimuth.flatten(), elevation.flatten(), 2.85 * many, focal_length(1, FIELD_OF_VIEW) * many)
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
    """A hard ellipsoid of one colour, in the coordinates of its field."""

    def __init__(self, centre: Tensor, radii: Tensor, colour: Tensor):
        super().__init__()
        self.centre, self.radii, self.logits = centre, radii, torch.logit(colour, eps=1e-4)

    def forward(self, points: Tensor) -> Tensor:
        inside = 1 - ((points * HALF_SIZE - self.centre) / self.radii).square().sum(1, keepdim=True)
        return torch.cat([inside, self.logits.expand(len(points), 3)], 1)


def best_ellipsoid(solid: np.ndarray, points: Tensor, *, sphere: bool) -> tuple[Tensor, Tensor, float]:
    """Centre, radii and IoU of the ellipsoid that fits best, by coordinate descent from the moments."""
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


def report(shape: str, scene: Scene, size: int = 32) -> dict[str, tuple[float, float]]:
    """(PSNR on the crop in dB, interior-filled IoU) of the scene, the baselines and the ceiling."""
    views, points = held_out(), voxels()
    true, solid = truth(shape, views, size), filled(occupancy(shape, points).numpy())

    def of_scene(scene: Scene) -> tuple[float, float]:
        with torch.no_grad():
            rgb = scene(views, height=size, width=size, background=BACKGROUND).rgb
        return crop_psnr(rgb, true), iou(filled(matter(scene, points)), solid)

    rows = {"scene": of_scene(scene), "initial blob": of_scene(grid_scene(half_size=HALF_SIZE))}
    rows["background"] = crop_psnr(BACKGROUND.view(3, 1, 1).expand_as(true.rgb), true), 0.0
    colour = (true.rgb.transpose(0, 1)[:, true.mask[:, 0]].mean(1) + 1) / 2
    for name, sphere in (("best sphere", True), ("best ellipsoid", False)):
        centre, radii, _ = best_ellipsoid(solid, points, sphere=sphere)
        field = Field(
            Ellipsoid(centre, radii, colour), half_size=HALF_SIZE, activation=lambda raw: 300 * (raw > 0).to(raw)
        )
        rows[name] = of_scene(Scene(field, num_samples=256))
    rows["hull of 24 masks"] = float("nan"), iou(filled(hull(shape, points)), solid)
    return rows
