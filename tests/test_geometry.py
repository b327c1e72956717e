"""Does score distillation find geometry? The teacher is exact, so what is missing is missing in the scene."""

import time

import geometry
import numpy as np
import pytest
import torch

from score.exact import GaussianMixture
from sds.views import orbit
from toyworld.solids import occupancy

close = torch.testing.assert_close


def test_the_teacher_is_the_exact_denoiser_of_its_gaussian(schedule, generator):
    means = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = schedule.at(torch.tensor([0.1, 0.5, 0.9]))
    x_t = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
    answer = geometry.GaussianTeacher(schedule, 0.3)(x_t, t, {"mean": means})
    for row in range(3):
        alone = GaussianMixture(means[row : row + 1], torch.tensor([0.3]), torch.ones(1), schedule)
        close(answer[row : row + 1], alone(x_t[row : row + 1], t[row : row + 1], {}))


def test_a_crop_is_where_the_solid_is():
    """An error outside the box round the mask does not count, one inside does by its share of the box."""
    true = geometry.truth("cube", geometry.held_out()[:2], 32)
    mask = true.mask[0, 0]
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    size = int((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))
    rgb = true.rgb.clone()
    rgb[:, :, 0, 0] += 0.7
    assert geometry.crop_psnr(rgb, true) == float("inf")
    rgb[:, 0, rows[0], columns[0]] += 1.0
    share = 0.25 / (3 * size)
    assert geometry.crop_psnr(rgb[:1], geometry.truth("cube", geometry.held_out()[:1], 32)) == pytest.approx(
        -10 * np.log10(share), abs=1e-3
    )


def test_a_filled_mug_holds_no_tea():
    points = geometry.voxels(32)
    mug = occupancy("mug", points).numpy()
    within = (((points[..., 0] + 0.16) ** 2 + points[..., 1] ** 2).sqrt() < 0.3) & (points[..., 2].abs() < 0.3)
    assert not mug[within.numpy()].any()
    assert geometry.filled(mug)[within.numpy()].all()
    for shape in ("chair", "letter L"):
        solid = occupancy(shape, points).numpy()
        assert (geometry.filled(solid) == solid).all()


def test_the_best_ellipsoid_of_an_ellipsoid_is_itself():
    points = geometry.voxels(48)
    solid = (
        ((points - torch.tensor([0.1, 0, -0.05])) / torch.tensor([0.6, 0.4, 0.3])).square().sum(-1) <= 1
    ).numpy()
    centre, radii, overlap = geometry.best_ellipsoid(solid, points, sphere=False)
    close(centre, torch.tensor([0.1, 0.0, -0.05]), rtol=0, atol=0.02)
    close(radii, torch.tensor([0.6, 0.4, 0.3]), rtol=0, atol=0.03)
    assert overlap > 0.95
    assert geometry.best_ellipsoid(solid, points, sphere=True)[2] < 0.8


def test_a_hull_holds_its_solid():
    points = geometry.voxels(32)
    solid = occupancy("letter L", points).numpy()
    hull = geometry.hull("letter L", points)
    assert hull[solid].mean() > 0.99
    assert 0.6 < geometry.iou(hull, solid) < 1


def test_views_are_held_out():
    drawn = geometry.CAMERAS.draw(200, torch.Generator().manual_seed(0))
    held = geometry.held_out()
    distances = torch.cdist(held.position, drawn.position)
    assert distances.min() > 1e-3
    assert len(held) == 12
    close(
        held.camera_to_world,
        orbit(held.azimuth, held.elevation, held.position.norm(dim=1), held.focal).camera_to_world,
    )


@pytest.mark.slow
def test_a_mug_is_found_by_the_score_of_its_views():
    """PSNR on the object's crop and interior-filled IoU, between the baselines and the hull of 24 true masks."""
    start = time.process_time()
    scene = geometry.learn("mug", seed=0, steps=600)
    seconds = time.process_time() - start
    rows = geometry.report("mug", scene)
    for name, (psnr, overlap) in rows.items():
        print(f"{name:18s} {psnr:6.2f} dB  IoU {overlap:.3f}")
    psnr, overlap = rows.pop("scene")
    ceiling = rows.pop("hull of 24 masks")[1]
    assert psnr >= 20
    assert 0.6 <= overlap <= ceiling
    assert psnr > max(value for value, _ in rows.values())
    assert overlap > max(value for _, value in rows.values())
    assert seconds < 240
