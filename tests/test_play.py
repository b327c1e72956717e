"""``scorefield play`` without a browser: requests, uploads, models and the door in front of the server."""

import base64
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_pictures import HOSTILE, SVG, noise, png, url
from PIL import Image
from refusals import refused

import scorefield.commands.teacher as train_teacher
import scorefield.play.options as options
from controlnet.adapter import copy_encoder
from controlnet.export import save_adapter
from controlnet.play import draw_controlled, edges, load_controller
from distill.export import export_lora
from distill.student import Student, save_student
from edit.play import windows
from scorefield import cli
from scorefield.commands.options import TrainTeacher
from scorefield.models.lora import shared_backbone
from scorefield.models.lora_student import load_lora_student
from scorefield.models.prompts import default_cache_folder
from scorefield.models.teacher import load_teacher
from scorefield.play.drawing import as_pixels, controlled_picture, draw_picture, edited_pictures
from scorefield.play.models import check_mesh, load_models, load_students
from scorefield.play.options import Play, check_play
from scorefield.play.uploads import DRAWING, read_drawing, read_map, read_upload
from toyworld import adapter_folder, student_folder
from toyworld.control import choose_scenes, render_world

SIZE = (64, 64)


@pytest.fixture(scope="module")
def tiny(sd, tmp_path_factory):
    """A tiny teacher of prompts with a LoRA student and a ControlNet, each with random changes."""
    out, teacher = tmp_path_factory.mktemp("play"), load_teacher(sd)
    student, _ = shared_backbone(teacher.denoiser, rank=2, generator=torch.Generator().manual_seed(0))
    adapter = copy_encoder(teacher.denoiser, hint_channels=1, factor=teacher.codec.factor)
    with torch.no_grad():
        for network in (student.network, adapter):
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    export_lora(Student(student, (999.0,)), sd, out / "lora", size=teacher.size)
    save_adapter(adapter, out / "control", "")
    return {"teacher": str(sd), "lora": out / "lora", "control": out / "control", "student": student}


@pytest.fixture(scope="module")
def models(tiny):
    config = Play(teacher=tiny["teacher"], student=(tiny["lora"],), control=tiny["control"], device="cpu")
    return load_models(config)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_in_one_line_that_names_no_path(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "upload.png").write_bytes(content)
    for read in (read_upload, read_map):
        with refused(message) as error:
            read(str(tmp_path / "upload.png"), SIZE)
        said = str(error.value)
        assert said.startswith("The picture ")
        assert "\n" not in said
        assert "upload.png" not in said


@pytest.mark.parametrize(
    ("image", "settings"),
    [
        (noise(), {"format": "png"}),
        (noise(mode="CMYK"), {"format": "jpeg"}),
        (noise(mode="I;16", dtype=np.uint16), {"format": "png"}),
        (noise(mode="RGBA"), {"format": "png"}),
        (noise(), {"format": "gif", "save_all": True, "append_images": [noise((80, 60))]}),
        (noise(), {"format": "tiff"}),
    ],
    ids=["png", "CMYK", "16 bits", "transparent", "animated", "tiff"],
)
def test_other_pictures_are_read_whatever_their_ending_says(tmp_path, image, settings):
    (tmp_path / "upload.txt").write_bytes(png(image, **settings))
    picture = read_upload(str(tmp_path / "upload.txt"), SIZE)
    assert picture.shape == (1, 3, *SIZE)
    assert -1 <= picture.min() < 0 < picture.max() <= 1
    found = edges(picture)
    assert found.shape == (1, 1, *SIZE)
    assert set(found.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("given", [None, 3, "", "/nowhere/at/all.png"])
def test_an_upload_that_is_not_there_is_said_to_be_missing(given):
    with refused("Upload (a picture first|it again)|no longer there"):
        read_upload(given, SIZE)


def test_lines_of_a_drawing_survive_at_the_size_of_the_model():
    image = Image.new("L", (256, 256))
    image.paste(255, (100, 0, 102, 256))
    hint = read_drawing(url(image), SIZE)
    assert hint.shape == (1, 1, *SIZE)
    assert hint[0, 0, :, 25].min() == 1
    assert hint.sum() == 64, "two of 256 columns are one of 64"


@pytest.mark.parametrize(
    "given",
    [None, "", "data:image/png;base64,!!!", "data:image/svg+xml;base64,AAAA", "file:///etc/passwd",
     DRAWING + "A" * 2**21, DRAWING + base64.b64encode(SVG).decode(), url(Image.new("L", (256, 256)))],
)  # fmt: skip
def test_a_drawing_that_is_none_is_refused(given):
    with refused("Draw something first|The drawing cannot be read|is none of PNG"):
        read_drawing(given, SIZE)


def test_a_picture_depends_on_the_request_alone(models):
    teacher, (student,) = models.teacher, models.students.values()
    first = draw_picture(teacher, "a red mug", seed=3, steps=2)
    draw_picture(teacher, "a blue chair", seed=4, steps=3)
    edited_pictures(teacher, "a mug", "a cup", steps=2)
    again = draw_picture(teacher, "a red mug", seed=3, steps=2)
    assert np.array_equal(first.pixels, again.pixels)
    assert first.pixels.dtype == np.uint8
    assert first.pixels.shape == (*teacher.size, 3)
    assert (first.calls, draw_picture(student, "a red mug", seed=3).calls) == (2, 1)
    assert not np.array_equal(first.pixels, draw_picture(teacher, "a red mug", seed=5, steps=2).pixels)


def test_the_student_begins_with_the_teachers_noise(tiny, models, monkeypatch):
    import scorefield.models.draw as place

    seen, before = [], place.initial_noise
    monkeypatch.setattr(place, "initial_noise", lambda s, noise, t: seen.append(noise) or before(s, noise, t))
    (student,) = models.students.values()
    draw_picture(models.teacher, "a mug", seed=7, steps=1)
    monkeypatch.setattr(
        "scorefield.models.student.initial_noise", lambda s, noise, t: seen.append(noise) or before(s, noise, t)
    )
    draw_picture(student, "a mug", seed=7)
    assert torch.equal(*seen)


def test_no_prompt_stays_in_the_cache_or_in_memory(models):
    before = sorted(default_cache_folder().rglob("*"))
    for number in range(5):
        draw_picture(models.teacher, f"a secret {'abcde'[number]}", steps=1)
    assert sorted(default_cache_folder().rglob("*")) == before
    assert not models.teacher.texts.kept
    assert not models.teacher.texts.told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": "  "}, "The prompt is empty"),
        ({"words": None}, "The prompt is empty"),
        ({"words": "a" * 501}, "at most 500 are read"),
        ({"seed": -1}, "The seed must be"),
        ({"seed": 1.5}, "The seed must be"),
        ({"seed": "0"}, "The seed must be"),
        ({"steps": 0}, "Steps must be"),
        ({"steps": 10**9}, "Steps must be"),
        ({"steps": float("nan")}, "Steps must be"),
        ({"guidance": float("inf")}, "Guidance must lie"),
        ({"guidance": True}, "Guidance must lie"),
    ],
)
def test_a_request_out_of_range_is_refused(models, changes, message):
    with refused(message):
        draw_picture(models.teacher, **{"words": "a mug", **changes})


def test_numbers_that_are_not_finite_are_no_picture():
    with refused("no finite numbers"):
        as_pixels(torch.full((3, 2, 2), float("nan")))


def test_how_much_stays_passes_through_the_presets():
    from edit.options import PRESETS

    for share, preset in {1.0: "recolour", 0.8: "prompt-to-prompt", 0.4: "reshape"}.items():
        config = PRESETS[preset]()
        assert windows(share) == pytest.approx((config.cross_window, config.self_window))
    assert windows(0.0) == (0, 0)


def test_an_edit_leaves_its_source_alone(models):
    before, after = edited_pictures(models.teacher, "a mug", "a cup", keep=1.0, steps=2, seed=1)
    other, same = edited_pictures(models.teacher, "a mug", "a mug", keep=0.0, steps=2, seed=1)
    assert np.array_equal(before.pixels, other.pixels)
    assert np.array_equal(other.pixels, same.pixels)
    assert not np.array_equal(before.pixels, after.pixels)


def test_a_lora_student_answers_as_it_did_in_training(tiny, models):
    teacher = load_teacher(tiny["teacher"])
    student = load_lora_student(tiny["lora"], teacher)
    assert student.times == (999.0,)
    assert not any(p.requires_grad for p in student.denoiser.network.parameters())
    cond, x_t, t = teacher.prompts(["a mug"]), torch.randn(1, *teacher.shape), torch.tensor([999.0])
    with torch.no_grad():
        torch.testing.assert_close(student.denoiser(x_t, t, cond), tiny["student"](x_t, t, cond))
        assert not torch.allclose(student.denoiser(x_t, t, cond), teacher.denoiser(x_t, t, cond))
    shared = student.denoiser.network.backbone.parameters(), teacher.denoiser.network.parameters()
    assert {p.data_ptr() for p in shared[1]} <= {p.data_ptr() for p in shared[0]}, "one copy of the weights"


@pytest.mark.parametrize("facts", [{}, {"dmd2_denoising_timesteps": []}, {"dmd2_denoising_timesteps": ["x"]},
                                   {"dmd2_denoising_timesteps": [1e9]}])  # fmt: skip
def test_a_lora_student_with_damaged_facts_is_refused(tiny, tmp_path, facts):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(
        (tiny["lora"] / "pytorch_lora_weights.safetensors").read_bytes()
    )
    (tmp_path / "dmd2.json").write_text(json.dumps(facts))
    with refused("is no student of this --teacher"):
        load_lora_student(tmp_path, load_teacher(tiny["teacher"]))
    (tmp_path / "dmd2.json").write_text(json.dumps({"dmd2_denoising_timesteps": [9], "dmd2_height": 999}))
    with refused("pass --size 999"):
        load_lora_student(tmp_path, load_teacher(tiny["teacher"]))


def test_what_is_no_student_of_this_teacher_is_refused(tiny, tmp_path):
    other = shutil.copytree(tiny["lora"], tmp_path / "lora")
    (other / "dmd2.json").write_text(json.dumps({"dmd2_denoising_timesteps": [999]}))
    with refused("is no student of this --teacher"):
        load_lora_student(other, load_teacher("toyworld"))
    with refused("is no student of few steps"):
        load_students(Play(student=(Path(tiny["teacher"]),), device="cpu"), load_teacher(tiny["teacher"]))


def test_the_adapter_is_that_of_its_folder(tiny, models):
    teacher = models.teacher
    hint = (torch.rand(1, 1, *teacher.size, generator=torch.Generator().manual_seed(0)) > 0.8).float()
    asked = {"seed": 2, "steps": 2, "guidance": 3.0}
    drawn = controlled_picture(teacher, models.controller, hint, "a mug", **asked)
    assert drawn.calls == 2
    assert drawn.pixels.shape == (*teacher.size, 3)
    off = replace(models.controller, scale=0.0)
    plain = draw_picture(teacher, "a mug", **asked).pixels
    alone = controlled_picture(teacher, off, hint, "a mug", **asked).pixels
    assert np.abs(alone.astype(int) - plain).max() <= 1, "the same noise and sampler, without control"
    assert np.abs(drawn.pixels.astype(int) - plain).max() > 1
    three = hint.expand(-1, 3, -1, -1)
    one = draw_controlled(teacher, models.controller, three, "a mug", **asked)
    assert np.abs(as_pixels(one).astype(int) - drawn.pixels).max() <= 1


def test_an_adapter_of_another_teacher_is_refused(tiny, tmp_path):
    with refused("does not fit --teacher"):
        load_controller(tiny["control"], load_teacher("toyworld"))
    (tmp_path / "unet").mkdir()
    with refused("a decoder of its own"):
        load_controller(tmp_path, load_teacher(tiny["teacher"]))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A teacher of classes, and a two-step student of it."""
    out = tmp_path_factory.mktemp("digits")
    folder = train_teacher.main(TrainTeacher(out=out, steps=2, batch_size=16, width=16, depth=1))
    teacher = load_teacher(folder)
    save_student(Student(teacher.denoiser, (20.0, 1.0)), out / "student", teacher.facts)
    return str(folder), out / "student"


def test_a_teacher_of_classes_draws_and_the_other_tabs_say_why_they_do_not(digits):
    models = load_models(Play(teacher=digits[0], student=(digits[1],), device="cpu"))
    drawn = draw_picture(models.teacher, "3", steps=2)
    assert drawn.pixels.shape == (8, 8)
    assert drawn.calls == 2
    (student,) = models.students.values()
    assert draw_picture(student, "3").calls == 2
    for words in ("11", "a mug", None):
        with refused("Choose one of 10 classes"):
            draw_picture(models.teacher, words, steps=2)
    assert models.controller is None
    assert not models.edits
    assert "takes no prompts" in models.notes["edit"]
    assert "scorefield control" in models.notes["control"]
    with refused("is a student. Pass its teacher"):
        load_models(Play(teacher=str(digits[1]), device="cpu"))
    with refused("draws .* of 10 classes, and --teacher .* of 0"):
        load_students(Play(student=(digits[1],), device="cpu"), load_teacher("toyworld"))


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no mesh"])
def test_a_scene_without_a_mesh_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "scene.glb").write_bytes(content)
    with refused("--scene"):
        check_mesh(tmp_path)


def told_by(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        cli.main(["play", *map(str, words)])
    return stop.value.code, capsys.readouterr().err


def test_without_gradio_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    code, said = told_by(capsys)
    assert code == 2
    assert said.count("\n") == 1
    assert "pip install 'scorefield[play]'" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 70000}, "--port must lie in"),
        ({"port": -1}, "--port must lie in"),
        ({"steps": 0}, "--steps must be above 0"),
        ({"guidance": float("nan")}, "--guidance must be finite"),
        ({"host": "no.such.host.invalid"}, "cannot serve at --host no.such.host.invalid"),
        ({"student": (Path("nowhere"),)}, "--student nowhere is no folder"),
        ({"student": (Path("."),) * 5}, "at most 4 folders"),
        ({"control": Path("nowhere")}, "--control nowhere is no folder"),
        ({"scene": Path("nowhere")}, "--scene nowhere is no folder"),
    ],
)
def test_options_that_cannot_work_are_refused(monkeypatch, changes, message):
    monkeypatch.setattr(options, "find_spec", lambda name: True)
    with refused(message):
        check_play(Play(**{"port": 0, **changes}))


def test_a_port_that_is_taken_is_refused(monkeypatch):
    import socket

    monkeypatch.setattr(options, "find_spec", lambda name: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with refused("Pass another --port"):
            check_play(Play(port=taken.getsockname()[1]))


def test_what_ships_is_small_works_at_once_and_has_cards():
    files = [path for one in (adapter_folder(), student_folder()) for path in one.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    card = (adapter_folder() / "README.md").read_text()
    for words in (
        "license: apache-2.0",
        "`scorefield control toyworld-canny`, seed 0, 519 seconds",
        "edge_f1_1px",
    ):
        assert words in card
    models = load_models(Play(device="cpu"))
    assert models.edits
    (student,) = models.students.values()
    assert draw_picture(student, "a red mug").calls == 1
    world = render_world(choose_scenes(4, held_out=True))
    for number in range(4):
        image = world.load(number)["image"][None].float() / 127.5 - 1
        hint, caption = edges(image), world.caption(number)
        asked = {"seed": number, "steps": 8}
        drawn = controlled_picture(models.teacher, models.controller, hint, caption, **asked).pixels
        plain = draw_picture(models.teacher, caption, **asked).pixels
        far, near = (np.abs(one.astype(float) / 127.5 - 1 - image[0].permute(1, 2, 0).numpy()).mean()
                     for one in (plain, drawn))  # fmt: skip
        assert near < 0.7 * far, (caption, near, far)
