"""The data set: fixed by seed and index, balanced, unambiguous, and exported as others read it."""

import json
from collections import Counter
from dataclasses import asdict

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from scorefield.data.images import load_images
from scorefield.data.options import DataOptions
from toyworld import data
from toyworld.camera import VIEWS, view_word
from toyworld.captions import describe, parse
from toyworld.data import HELD_OUT, MARGIN, captions_of, draw_azimuth, draw_scene, draw_scenes, export_folder
from toyworld.render import render
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES


def test_a_seed_and_an_index_fix_a_scene_for_ever():
    """Numbers written down when the shipped weights were trained: another draw would be another data set."""
    scene = draw_scene(0, seed=0)
    assert captions_of([scene]) == ["an orange cube on a black background, front view"]
    assert scene.azimuth == pytest.approx(17.986544697293397)
    assert scene.elevation == pytest.approx(18.555368700595555)
    assert scene.distance == pytest.approx(2.860637861272361)
    assert scene.position == pytest.approx((-0.041741048923766844, -0.07908920843637049, 0.017336803642908218))
    forwards = draw_scenes(range(30), seed=3)
    assert [draw_scene(index, seed=3) for index in reversed(range(30))] == forwards[::-1]
    assert draw_scene(5, seed=4) != forwards[5]
    assert len(set(forwards)) == 30
    for index in (np.int64(5), torch.tensor(5), np.uint8(5)):
        assert draw_scene(index, np.int32(3)) == forwards[5]
    with pytest.raises(ValueError, match="at least 0"):
        draw_scene(-1)
    with pytest.raises(TypeError):
        draw_scene(0.5)


def test_words_are_drawn_evenly_and_independently():
    scenes = [describe(scene) for scene in draw_scenes(range(HELD_OUT, HELD_OUT + 7200))]
    for words, name in ((SHAPES, "shape"), (COLOURS, "colour"), (BACKGROUNDS, "background"), (VIEWS, "view")):
        counts = Counter(getattr(scene, name) for scene in scenes)
        assert set(counts) == set(words)
        for count in counts.values():
            # Five standard deviations of a binomial.
            share = 1 / len(words)
            assert abs(count - 7200 * share) < 5 * (7200 * share * (1 - share)) ** 0.5
    assert len(Counter((scene.shape, scene.colour, scene.view) for scene in scenes)) == 9 * 8 * 4


def test_no_view_is_within_ten_degrees_of_another_and_each_fills_its_range(generator):
    for scene in draw_scenes(range(3000)):
        word = view_word(scene.azimuth, scene.elevation)
        if word != "overhead":
            assert {
                view_word(scene.azimuth + turn, scene.elevation) for turn in (-0.99 * MARGIN, 0.99 * MARGIN)
            } == {word}
        assert 15 <= scene.elevation <= 45 or 65 <= scene.elevation <= 90
    for view, low, high in (("front", 0, 35), ("side", 55, 125), ("back", 145, 180)):
        azimuths = torch.tensor([draw_azimuth(view, generator) for _ in range(2000)], dtype=torch.float64)
        assert azimuths.abs().min() == pytest.approx(low, abs=0.5)
        assert azimuths.abs().max() == pytest.approx(high, abs=0.5)
        assert azimuths.abs().mean() == pytest.approx((low + high) / 2, abs=1.5)
        assert 900 < int((azimuths > 0).sum()) < 1100


def test_every_solid_is_wholly_in_its_picture():
    mask = render(draw_scenes(range(500)), size=32).mask.clone()
    assert (mask.flatten(1).sum(1) > 40).all()
    mask[..., 1:-1, 1:-1] = False
    assert not mask.any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_folder(tmp_path_factory.mktemp("export") / "world", 12, seed=5, start=100)


def test_datasets_reads_the_export(folder, tmp_path):
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path))
    scenes = draw_scenes(range(100, 112), seed=5)
    rgb = (render(scenes).rgb + 1) * 127.5
    assert rows["text"] == captions_of(scenes)
    for row, scene, image in zip(rows, scenes, rgb, strict=True):
        assert {name: row[name] for name in ("shape", "colour", "background", "view")} == asdict(describe(scene))
        assert parse(row["text"]) == describe(scene)
        assert (row["azimuth"], tuple(row["position"])) == (scene.azimuth, scene.position)
        difference = torch.tensor(np.asarray(row["image"])).permute(2, 0, 1) - image
        assert difference.abs().max() <= 0.501
        assert [row[name].mode for name in ("depth", "normals", "mask", "edges")] == ["L", "RGB", "L", "L"]
    assert load_images(DataOptions(data=str(folder))).shape == (3, 64, 64), "our own scripts read it too"


def test_hint_images_show_what_they_say(folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    out = render(draw_scenes(range(100, 112), seed=5))
    for i, row in enumerate(rows):
        depth, normals, mask, edges = (
            torch.tensor(np.asarray(Image.open(folder / row[f"{hint}_file_name"])).astype(int))
            for hint in ("depth", "normals", "mask", "edges")
        )
        inside = out.mask[i, 0]
        assert torch.equal(mask, inside * 255)
        assert torch.equal(edges, out.edges[i, 0] * 255)
        assert not depth[~inside].any()
        shown = data.FARTHEST - depth[inside] / 255 * (data.FARTHEST - data.NEAREST)
        assert (shown - out.depth[i, 0][inside]).abs().max() < 0.006
        assert (normals[~inside] == 128).all()
        # In the camera's frame, a surface that is seen faces the camera, or nearly so at the rim.
        unit = normals[inside] / 127.5 - 1
        assert (unit.norm(dim=1) - 1).abs().max() < 0.02
        assert unit[:, 2].min() > -0.4
        world = unit.double() @ out.camera_to_world[i, :, :3].double().T
        assert (world - out.normals[i, :, inside].T).abs().max() < 0.02


def test_an_interrupted_export_leaves_the_older_folder(folder, tmp_path, monkeypatch):
    export_folder(tmp_path / "world", 2)
    before = sorted(path.name for path in (tmp_path / "world").iterdir())
    assert len(before) == 2 * 5 + 2, "pictures, metadata and the marker"

    def failing(image, path):
        raise OSError("disk full")

    monkeypatch.setattr(data, "_save", failing)
    with pytest.raises(OSError, match="disk full"):
        export_folder(tmp_path / "world", 3)
    assert sorted(path.name for path in (tmp_path / "world").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    for numbers in ({"num_samples": 0}, {"num_samples": 1, "start": -1}):
        with pytest.raises(ValueError, match="num_samples >= 1 and start >= 0"):
            export_folder(tmp_path / "other", **numbers)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
