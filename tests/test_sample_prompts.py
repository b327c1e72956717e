"""train_scripts/sample.py with text-to-image models: any family of scorefield.models.teacher under prompts."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from folders import pickle_weights
from refusals import refused

import controlnet.options as control_options
import scorefield.commands.sample as sample
from controlnet.tasks import load_task
from scorefield import guided
from scorefield.atomic import MARKER
from scorefield.commands.options import Sample
from scorefield.data.images import load_images
from scorefield.data.options import DataOptions
from scorefield.data.texts import read_texts
from scorefield.models.teacher import load_teacher
from scorefield.randomness import derived_generator
from scorefield.sampling import ddpm, grid, initial_noise
from scorefield.sampling import sample as draw_steps

PROMPTS = ("a red mug", "a blue chair", "cone")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sd):
    root = tmp_path_factory.mktemp("models")
    (root / "sd").symlink_to(sd)
    tiny.sd3().save_pretrained(root / "sd3")
    tiny.pixels().save_pretrained(root / "pixels")
    tiny.pixels(num_class_embeds=4).save_pretrained(root / "classes")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config_of(model, out, **changes):
    asked = {"prompts": PROMPTS, "num_images": 7, "steps": 3, "guidance": 4.0, **changes}
    return Sample(teacher=str(model), out=out, **asked)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_each_image_is_of_its_prompt_and_of_no_batch(folders, tmp_path, name):
    config = config_of(folders / name, tmp_path / "a.npz", sampler="ddpm", negative_prompt="dull")
    whole = np.load(sample.main(config))
    parts = np.load(sample.main(dataclasses.replace(config, out=tmp_path / "b.npz", batch_size=2)))
    assert whole["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert np.abs(whole["images"].astype(int) - parts["images"]).max() <= 1
    # Image 4 by hand.
    teacher = load_teacher(folders / name, cache=tmp_path / "other")
    denoiser = guided(teacher.denoiser, 4.0, teacher.negative("dull"))
    generator = derived_generator(0, "sample", 4)
    noise = torch.randn(teacher.shape, generator=generator)[None]
    times = grid(denoiser.schedule, 3, shift=teacher.shift)
    with torch.no_grad():
        x_t = initial_noise(denoiser.schedule, noise, times[0])
        x0 = draw_steps(
            denoiser, x_t, teacher.prompts([PROMPTS[1]]), times=times, step=ddpm(), generator=[generator]
        )
        image = ((teacher.decode(x0).clamp(-1, 1) + 1) * 127.5).round()[0]
    assert (image - torch.from_numpy(whole["images"][4])).abs().max() <= 1
    others = [np.abs(whole["images"][4].astype(float) - whole["images"][i]).max() for i in (0, 2, 3)]
    assert min(others) > 2, "prompts and noise tell images apart"


def test_pictures_lie_in_a_folder_per_prompt_and_a_grid_column(folders, tmp_path):
    out = sample.main(config_of(folders / "sd", tmp_path / "made"))
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "0000", "0001", "0002", "metadata.jsonl"]
    with sample.Image.open(tmp_path / "made.grid.png") as picture:
        side = sample.Image.open(next(out.rglob("*.png"))).size[0]
        assert picture.size == (min(7, 9) * (side + 1) + 1, side + 2)
    assert sample.columns(3) == 9
    assert sample.columns(0) == 10
    assert sample.columns(11) == 10


def test_prompts_that_name_files_or_folders_stand_for_what_is_in_them(tmp_path, monkeypatch):
    (tmp_path / "p.csv").write_bytes(b"prompt,x\na mug,1\nthe cat\x92s,2\n")
    asked = config_of("m", tmp_path, prompts=(str(tmp_path / "p.csv"),))
    with refused(r"p\.csv, line 3 is not UTF-8: byte 0x92"):
        sample.read_prompts(asked)
    assert sample.read_prompts(replace(asked, on_bad_data="skip")) == ("a mug",)
    (tmp_path / "q.txt").write_text("a tree\na sea\n")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a cat"}')
    monkeypatch.chdir(tmp_path)
    for words, read in (
        (("q.txt", "a mug", "q.txt"), ("a tree", "a sea", "a mug", "a tree", "a sea")),
        (("cats/",), ("a cat",)), (("cats",), ("cats",)), (("page 7 of a.txt",), ("page 7 of a.txt",)),
        (("x/" * 3000,), ("x/" * 3000,)), (("a mug and/or a cone",), ("a mug and/or a cone",)),
    ):  # fmt: skip
        assert sample.read_prompts(replace(asked, prompts=words)) == read
    with refused("--prompts q.text.txt: no such file"):
        sample.read_prompts(replace(asked, prompts=("a mug", "q.text.txt")))


def test_a_size_of_its_own_and_bf16(folders, tmp_path):
    made = np.load(sample.main(config_of(folders / "sd", tmp_path / "a.npz", size=24, num_images=2)))
    assert made["images"].shape[-2:] == (24, 24)
    model = sample.load(config_of(folders / "sd", "x", precision="bf16"), torch.device("cpu"))
    assert {p.dtype for p in model.denoiser.network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("sd", {"prompts": ()}, "--prompts ask for"), ("sd", {"prompts": ("a", " ")}, "--prompts must say"),
    ("sd", {"classes": (3,)}, r"--classes must lie in \[0, 2\]"), ("sd", {"size": 7}, "multiples of"),
    ("pixels", {}, "takes no prompts"), ("pixels", {"prompts": (), "negative_prompt": "x"}, "--negative-prompt"),
    ("classes", {"prompts": (), "guidance": 2.0}, "--guidance must be 1"),
    ("nothing/there", {}, "no folder here"), ("gone", {}, "no folder here"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(folders, tmp_path, name, changes, message):
    with refused(message):
        sample.main(config_of(folders / name, tmp_path / "out" / "made", **changes))
    assert not (tmp_path / "out").exists()


def test_pickles_only_if_asked(folders, folder, tmp_path):
    pickle_weights(folder)
    config = config_of(folder, tmp_path / "a.npz", num_images=2)
    with refused("pickle"):
        sample.main(config)
    trusted = np.load(sample.main(dataclasses.replace(config, allow_pickle=True)))
    safe = np.load(sample.main(config_of(folders / "sd", tmp_path / "b.npz", num_images=2)))
    assert np.array_equal(trusted["images"], safe["images"])


def test_one_picture_a_prompt_by_default_and_few_at_a_time(folders, tmp_path, monkeypatch):
    made = np.load(sample.main(config_of(folders / "sd", tmp_path / "a.npz", num_images=None)))
    assert made["labels"].tolist() == [0, 1, 2]
    made = np.load(sample.main(config_of(folders / "sd", tmp_path / "a.npz", num_images=None, classes=(2,))))
    assert made["labels"].tolist() == [2]
    sizes = []
    monkeypatch.setattr(sample, "batch_size_for", lambda size, num_frames: sizes.append(size) or 2)
    seen = []
    draw_images = sample.draw_images
    monkeypatch.setattr(
        sample, "draw_images", lambda teacher, parts, *args, **options: draw_images(
            teacher, (seen.append(len(part)) or part for part in parts), *args, **options
        )
    )  # fmt: skip
    sample.main(config_of(folders / "sd", tmp_path / "a.npz", num_images=5, batch_size=0))
    assert seen == [2, 2, 1]
    assert sizes == [(16, 16)]


def test_a_folder_of_pictures_is_data_for_control_and_prompts_for_distill(folders, tmp_path):
    """With the prompt of each picture, however often it was asked for."""
    out = sample.main(config_of(folders / "sd", tmp_path / "made", seed=4))
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert rows[4] == {"file_name": "0001/000004.png", "text": PROMPTS[1], "label": 1, "seed": 4, "steps": 3}
    asked = tuple(PROMPTS[number % 3] for number in range(7))
    texts = read_texts(str(out))
    assert texts.prompts == asked
    assert [Path(image.name).relative_to(out).as_posix() for image in texts.images] == [
        row["file_name"] for row in rows
    ]
    options = control_options.TaskOptions(data=str(out), hint="canny")
    task = load_task(options, (16, 16), 2)
    assert len(task.training) + len(task.held_out) == 7
    assert sorted(task.captions()) == sorted(asked)
    labelled = load_images(DataOptions(data=str(out)))
    assert labelled.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
