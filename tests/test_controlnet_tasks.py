"""What an adapter is taught: hints by name, what is held out, and own data in all their forms."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import toyworld.control as control
from controlnet.hints.geometry import Depth, Segmentation
from controlnet.hints.hint import Precomputed
from controlnet.tasks import TaskOptions, load_task, make_hint
from toyworld.control import choose_scenes, is_held_out
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES


def write(folder, rows):
    """Rows of (image, caption, map called "hint", "depth", ...) as a folder; equal seeds are equal images."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (seed, caption, maps) in enumerate(rows):
        pixels = np.random.RandomState(seed).randint(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        line = {"file_name": f"{number}.png", "text": caption}
        for name, array in maps.items():
            Image.fromarray(array).save(folder / f"{number}_{name}.png")
            line[f"{name}_file_name"] = f"{number}_{name}.png"
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def load(folder, num_held_out=2, **options):
    return load_task(TaskOptions(data=str(folder), **options), (16, 16), num_held_out)


def captions(samples):
    return [samples.caption(index) for index in range(len(samples))]


def test_no_image_is_both_learned_and_judged_whatever_captions_it_has_and_in_whatever_order(tmp_path):
    rows = [(number // 3, f"{number // 3} in words {number % 3}", {}) for number in range(30)]
    task = load(write(tmp_path / "data", rows), num_held_out=4)
    learned, judged = ([c.split(" in words ") for c in captions(some)] for some in (task.training, task.held_out))
    assert len(learned) == 18
    assert [words for _, words in judged] == ["0"] * 4
    assert not {image for image, _ in learned} & {image for image, _ in judged}
    assert len({image for image, _ in judged}) == 4
    assert set(task.training.digests).isdisjoint(task.held_out.digests)
    other = load(write(tmp_path / "other", [rows[n] for m in range(27, -1, -3) for n in range(m, m + 3)]), 4)
    assert captions(other.held_out) == captions(task.held_out)
    with pytest.raises(ValueError, match=r"10 usable images, and 10 are held out.*--eval-samples"):
        load(tmp_path / "data", 10)


def test_captions_of_held_out_scenes_are_not_learned(monkeypatch):
    learned, judged = choose_scenes(2000, held_out=False), choose_scenes(128, held_out=True)
    assert (len(learned), len(judged)) == (2000, 128)
    said = [{(scene.shape, scene.colour, scene.background) for scene in some} for some in (learned, judged)]
    assert said[0].isdisjoint(said[1])
    assert len(said[0]) == len(SHAPES) * len(COLOURS) * len(BACKGROUNDS) * 8 // 9
    for words in said:  # every word is known, and asked for
        known = [set(SHAPES), set(COLOURS), set(BACKGROUNDS)]
        assert [set(column) for column in zip(*words, strict=True)] == known
    assert choose_scenes(5, held_out=True) == judged[:5]
    rendered, real = [], control.render_world
    monkeypatch.setattr(control, "render_world", lambda scenes: rendered.append(scenes) or real(scenes[:2]))
    load_task(TaskOptions(data="toyworld", num_samples=30), (64, 64), 5)
    assert [len(scenes) for scenes in rendered] == [30, 5]
    assert [{is_held_out(scene) for scene in scenes} for scenes in rendered] == [{False}, {True}]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"hint": "pose"}, Precomputed("pose", 3)),
        ({"hint": "pose", "hint_channels": 1}, Precomputed("pose", 1)),
        ({"hint": "pose", "hint_kind": "lines"}, Precomputed("pose", 1)),
        ({"hint": "mask"}, Precomputed("mask", 1)),
        ({"hint": "normals"}, Precomputed("normals", 3)),
        ({"hint": "depth"}, Depth()),
        ({"hint": "depth", "hint_kind": "image"}, Precomputed("depth", 3)),
        ({"hint": "labels", "hint_channels": 5}, Segmentation(5)),
        ({"hint": "labels", "hint_channels": 256}, Segmentation(256, ignore=256)),
        ({"hint": "depth", "data": "toyworld"}, Precomputed("depth", 1)),
        ({"hint": "normals", "data": "toyworld"}, Precomputed("normals", 3)),
        ({"hint": "labels"}, "--hint-channels is missing: how many labels"),
        ({"hint": "pose", "hint_channels": 2}, "--hint-channels must be 1 or 3 for a map of kind image; got 2"),
    ],
)  # fmt: skip
def test_hints_are_what_their_names_say(options, hint):
    if isinstance(hint, str):
        with pytest.raises(ValueError, match=hint):
            make_hint(TaskOptions(**options))
    else:
        assert make_hint(TaskOptions(**options)) == hint


def test_hints_that_cannot_be_are_refused_before_anything_is_rendered(monkeypatch):
    monkeypatch.setattr(control, "render_world", lambda scenes: pytest.fail("rendered"))
    for data, held in (("toyworld", "image, depth, normals, mask, edges"), ("circles", "image, outline, mask")):
        with pytest.raises(ValueError, match=f"is made of 'nonsense', but the samples hold {held} only"):
            load_task(TaskOptions(data=data, hint="nonsense"), (64, 64), 2)


def test_a_colour_map_stays_in_colour(tmp_path):
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[:, :, 1] = 200
    data = write(tmp_path / "data", [(number, "a", {"pose": colour, "normals": colour}) for number in range(4)])
    for name, kind in (("pose", "image"), ("normals", "normals")):
        task = load(data, hint=name)
        picture = task.training.load(0)[name].float()[None] / 255
        assert task.hint(picture, [torch.Generator()])[0, :, 0, 0].tolist() == pytest.approx([0, 200 / 255, 0])
        assert task.training.kinds[name] == kind


def test_depth_of_16_bits_are_distances_and_8_bits_are_asked_about(tmp_path):
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) + 1000
    task = load(write(tmp_path / "deep", [(number, "a", {"depth": deep}) for number in range(4)]), hint="depth")
    assert isinstance(task.hint, Depth)
    assert task.training.load(0)["depth"].max() == 1255
    rows = [(number, "a", {"depth": (deep % 256).astype(np.uint8)}) for number in range(4)]
    flat = write(tmp_path / "flat", rows)
    with pytest.raises(ValueError, match=r"_depth\.png has 8 bits.*--hint-kind image.*--hint-kind depth"):
        load(flat, hint="depth")
    assert load(flat, hint="depth", hint_kind="image").hint == Precomputed("depth", 3)
    assert load(flat, hint="depth", hint_kind="depth").hint == Depth()


def test_columns_may_have_other_names(tmp_path):
    data = write(tmp_path / "data", [(number, f"{number}", {}) for number in range(4)])
    lines = (data / "metadata.jsonl").read_text().replace("file_name", "photo").replace("text", "words")
    (data / "metadata.jsonl").write_text(lines)
    assert sorted(load(data, image_column="photo", text_column="words").captions()) == ["0", "1", "2", "3"]
    assert set(load(data, image_column="photo", text_column="").captions()) == {""}
    with pytest.raises(ValueError, match=r"4 of 4 samples .* line 1 names no picture"):
        load(data, text_column="words")
