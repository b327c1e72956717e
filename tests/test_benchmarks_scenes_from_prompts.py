"""The measurement of scenes from prompts: does it find the turn and the scale, and does it count what it says?"""

import json
import math

import pytest
import scenes_from_prompts
import torch
from yardsticks import BACKGROUND, DISTANCE, Ellipsoid, crop_psnrs, voxels

from sds.field import Field
from sds.scene import grid_scene, save_scene
from toyworld.render import render
from toyworld.scene import Scene as ToyScene
from toyworld.solids import occupancy

close = torch.testing.assert_close


def solid(azimuth, scale=1.0):
    return ToyScene(
        shape="mug", colour="red", background="white", azimuth=azimuth, elevation=scenes_from_prompts.ELEVATION,
        distance=DISTANCE / scale,
    )  # fmt: skip


@pytest.mark.slow
def test_a_turned_and_scaled_solid_is_found():
    pictures = render([solid(float(a) + 40, 1.1) for a in range(0, 360, 15)], size=scenes_from_prompts.SIZE)
    fit = scenes_from_prompts.best_fit(pictures.rgb + 1e-3, "mug", "red", [1.0, 1.1, 1.12])
    assert (fit.degrees, fit.scale) == (40, 1.1)
    assert fit.psnr == pytest.approx(20 * 3.301, rel=1e-3)  # an error of 1e-3 / 2 everywhere
    close(fit.truth.rgb, pictures.rgb)
    close(fit.truth.mask, pictures.mask)


@pytest.mark.slow
def test_a_moved_solid_is_found_where_it_is_and_its_voxels_with_it(monkeypatch):
    there = (0.1, 0.0, -0.05)
    truth = scenes_from_prompts.true_views("mug", "red", 0.9, position=there, turn=15, first=40)
    assert len(truth.rgb) == scenes_from_prompts.NUM_VIEWS
    start = scenes_from_prompts.Fit(0.0, 40, 0.9, truth)
    monkeypatch.setattr(scenes_from_prompts, "MOVES", (0.1, 0.05))
    position, psnr, found = scenes_from_prompts.best_position(truth.rgb + 1e-3, "mug", "red", start)
    assert position == pytest.approx(there, abs=0.011)
    assert psnr > 35
    assert float((found.mask & truth.mask).sum() / (found.mask | truth.mask).sum()) > 0.98
    # The handle of the mug, at its front (+x), is turned by -40 degrees, made smaller and moved with it.
    solid, points = scenes_from_prompts.true_voxels("mug", start, position), voxels()
    handle = points[torch.from_numpy(solid)]
    share = 0.9**3 * float(occupancy("mug", points).sum())
    assert len(handle) == pytest.approx(share, rel=0.06)
    tip = handle[handle[:, :2].norm(dim=1).argmax()]
    assert math.degrees(math.atan2(tip[1], tip[0])) == pytest.approx(-40, abs=6)
    assert float(tip[:2].norm()) == pytest.approx(0.9 * (0.685 + 0.1), abs=0.04)
    assert float(handle[:, 2].min() + handle[:, 2].max()) / 2 == pytest.approx(-0.05 * 0.9, abs=0.02)


@pytest.mark.slow
def test_a_shifted_copy_gets_its_psnr_back(monkeypatch):
    """By a pixel to the side it is another picture; with the position fitted only the error of 1e-3 is left."""
    monkeypatch.setattr(scenes_from_prompts, "NUM_VIEWS", 3)
    monkeypatch.setattr(scenes_from_prompts, "SIZE", 32)
    there = (0.06, 0.0, -0.03)
    moved = scenes_from_prompts.true_views("cube", "red", 1.0, position=there, turn=120, first=20)
    still = scenes_from_prompts.true_views("cube", "red", 1.0, turn=120, first=20)
    assert float(crop_psnrs(moved.rgb + 1e-3, still.rgb, still.mask).mean()) < 25
    fit = scenes_from_prompts.Fit(0.0, 20, 1.0, still)
    position, psnr, found = scenes_from_prompts.best_position(moved.rgb + 1e-3, "cube", "red", fit)
    assert position == pytest.approx(there, abs=1e-6)
    assert psnr == pytest.approx(20 * 3.301, rel=1e-3)
    assert torch.equal(found.mask, moved.mask)


def test_a_stool_is_no_chair_whatever_the_judge_says():
    chair = {"silhouette_iou": 0.9, "volume_iou": 0.55, "psnr_moved": 15.0, "shape": 1.0}
    assert scenes_from_prompts.is_the_solid(chair, "chair")
    assert not scenes_from_prompts.is_the_solid(chair, "cube"), "0.65 of the volume"
    for name, value in {"silhouette_iou": 0.84, "volume_iou": 0.49, "psnr_moved": 13.9}.items():
        assert not scenes_from_prompts.is_the_solid({**chair, name: value}, "chair")


def test_psnr_counts_the_crop_alone_and_opacity_what_is_outside_the_widened_silhouette():
    truth = scenes_from_prompts.turned(scenes_from_prompts.true_views("mug", "red", 1.0), 0)
    rgb = truth.rgb.clone()
    rgb[:, :, 0, 0] -= 1
    assert bool(crop_psnrs(rgb, truth.rgb, truth.mask).isinf().all())
    mask, opacity = torch.zeros(1, 1, 9, 9, dtype=torch.bool), torch.zeros(1, 1, 9, 9)
    mask[0, 0, 4, 4] = True
    opacity[0, 0, 2:7, 2:7] = 1.0  # two pixels round it: near
    assert scenes_from_prompts.outside(opacity, mask) == 0
    opacity[0, 0, 0, :] = 0.5
    assert scenes_from_prompts.outside(opacity, mask) == pytest.approx(9 * 0.5 / (81 - 25))


def test_bars():
    figures = {
        "shape": 0.84, "shape_of_true_renders": 0.98, "colour": 0.9, "colour_of_true_renders": 1.0, "psnr": 16.0,
        "psnr_bar": 16.0, "opacity_outside": 0.03,
    }  # fmt: skip
    assert scenes_from_prompts.reached(figures)
    for name, value in {"shape": 0.82, "colour": 0.89, "psnr": 15.9, "opacity_outside": 0.031}.items():
        assert not scenes_from_prompts.reached({**figures, name: value})
    assert scenes_from_prompts.BARS == {"cone": 20.0, "torus": 20.0}


def write_run(folder, **changes):
    scene = grid_scene(half_size=0.9, num_samples=8, initial=-4.0)
    config = {
        "prompt": "a red mug", "field": "grid", "canvas": False, "backdrops": ["white"], "half_size": 0.9,
        "num_samples": 8, "initial": -4.0, "blob": [10.0, 0.5], **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_scene(scene, folder / "scene.safetensors")
    return scene


@pytest.mark.slow
def test_a_run_is_measured_and_the_figures_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes_from_prompts, "SCALES", [0.95])
    monkeypatch.setattr(scenes_from_prompts, "FINER", [0.0, 0.05])
    monkeypatch.setattr(scenes_from_prompts, "MOVES", ())
    scene = write_run(tmp_path / "run")
    figures = scenes_from_prompts.evaluate(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == pytest.approx(figures)
    assert (tmp_path / "run" / "evaluation.png").is_file()
    assert figures["psnr_all_background"] < figures["psnr_best_ellipsoid"]
    assert figures["shape_of_true_renders"] > 0.9
    assert figures["psnr_moved"] == pytest.approx(figures["psnr"])  # it was not moved
    assert 0 < figures["volume_iou"] < 0.9
    assert 0 < figures["silhouette_iou"] < 0.9
    assert "mesh_volume_iou" not in figures  # nothing is exported there
    rgb = scenes_from_prompts.turntable(scene).rgb
    truth = scenes_from_prompts.turned(
        scenes_from_prompts.true_views("mug", "red", figures["scale"]), figures["degrees"]
    )
    assert figures["psnr"] == pytest.approx(float(crop_psnrs(rgb, truth.rgb, truth.mask).mean()))
    assert BACKGROUND.tolist() == [1, 1, 1]


def test_an_ellipsoid_is_as_large_in_any_cube():
    points = torch.tensor([[0.39, 0.0, 0.0], [0.41, 0.0, 0.0]])
    for half_size in (0.5, 0.9, 2.0):
        network = Ellipsoid(torch.zeros(3), torch.full((3,), 0.4), torch.full((3,), 0.5), half_size)
        field = Field(network, half_size=half_size, activation=lambda raw: (raw > 0).to(raw))
        assert field(points).density.flatten().tolist() == [1, 0]


def test_other_and_damaged_runs_are_refused(tmp_path):
    for changes in ({"field": "hash"}, {"canvas": True}, {"backdrops": []}):
        write_run(tmp_path / "run", **changes)
        with pytest.raises(ValueError, match="was not made by the toyworld preset"):
            scenes_from_prompts.load_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no config\.json"):
        scenes_from_prompts.load_run(tmp_path)
    write_run(tmp_path / "run")
    weights = tmp_path / "run" / "scene.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged or holds another kind of scene"):
        scenes_from_prompts.load_run(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"field": "grid"}')
    with pytest.raises(ValueError, match=r"config\.json lacks backdrops, blob"):
        scenes_from_prompts.load_run(tmp_path / "run")
    with pytest.raises(ValueError, match="--runs"):
        scenes_from_prompts.main(scenes_from_prompts.Config())
