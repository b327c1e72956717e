"""Does score distillation find geometry? The teacher is exact, so what is missing is missing in the scene."""

import json

import geometry
import numpy as np
import pytest
import torch
import yardsticks

from scorefield.exact import GaussianMixture
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
    true = yardsticks.truth("cube", yardsticks.held_out()[:2], 32)
    mask = true.mask[0, 0]
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    size = int((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1))
    rgb = true.rgb.clone()
    rgb[:, :, 0, 0] += 0.7
    assert yardsticks.crop_psnr(rgb, true) == float("inf")
    rgb[:, 0, rows[0], columns[0]] += 1.0
    share = 0.25 / (3 * size)
    assert yardsticks.crop_psnr(rgb[:1], yardsticks.truth("cube", yardsticks.held_out()[:1], 32)) == pytest.approx(
        -10 * np.log10(share), abs=1e-3
    )


def test_a_filled_mug_holds_no_tea():
    points = yardsticks.voxels(32)
    mug = occupancy("mug", points).numpy()
    within = (((points[..., 0] + 0.16) ** 2 + points[..., 1] ** 2).sqrt() < 0.3) & (points[..., 2].abs() < 0.3)
    assert not mug[within.numpy()].any()
    assert yardsticks.filled(mug)[within.numpy()].all()
    assert 0.5 < yardsticks.hollow(mug) < 0.6
    assert yardsticks.hollow(yardsticks.filled(mug)) == 0
    for shape in ("chair", "letter L"):
        solid = occupancy(shape, points).numpy()
        assert (yardsticks.filled(solid) == solid).all()


def test_the_best_ellipsoid_of_an_ellipsoid_is_itself_and_a_hull_holds_its_solid():
    points = yardsticks.voxels(48)
    solid = (
        ((points - torch.tensor([0.1, 0, -0.05])) / torch.tensor([0.6, 0.4, 0.3])).square().sum(-1) <= 1
    ).numpy()
    centre, radii, overlap = yardsticks.best_ellipsoid(solid, points, sphere=False)
    close(centre, torch.tensor([0.1, 0.0, -0.05]), rtol=0, atol=0.02)
    close(radii, torch.tensor([0.6, 0.4, 0.3]), rtol=0, atol=0.03)
    assert overlap > 0.95
    assert yardsticks.best_ellipsoid(solid, points, sphere=True)[2] < 0.8
    points = yardsticks.voxels(32)
    solid = occupancy("letter L", points).numpy()
    hull = yardsticks.hull("letter L", points)
    assert hull[solid].mean() > 0.99
    assert 0.6 < yardsticks.iou(hull, solid) < 1


def test_views_are_held_out():
    drawn, held = geometry.CAMERAS.draw(200, torch.Generator().manual_seed(0)), yardsticks.held_out()
    assert torch.cdist(held.position, drawn.position).min() > 1e-3
    assert len(held) == 12


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "overlap"), [("mug", 0.6), ("chair", 0.5), ("letter L", 0.6)])
def test_a_solid_is_found_by_the_score_of_its_views(shape, overlap, tmp_path):
    """In at most four minutes; above all that needs no learning. The mesh looks like the scene."""
    found = geometry.run(shape, 0, geometry.Config(out=tmp_path))
    baselines = yardsticks.baselines(shape)
    assert found["psnr"] >= 20
    assert found["iou"] >= overlap
    assert found["psnr"] > max(baseline.psnr for baseline in baselines.values())
    assert found["iou"] > max(baseline.iou for baseline in baselines.values())
    assert found["mesh_versus_render"]["psnr"] >= 20
    assert found["cpu_seconds"] < 240
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "measures.json").read_text()) == found
    assert (folder / "export" / "scene.glb").is_file()
