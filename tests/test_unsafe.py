"""What a downloaded folder may not do: name code or paths, fill the memory, wait for ever, forge lines."""

import gzip
import io
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import edit, pickle_weights, reweigh, weights_in
from PIL import Image
from refusals import refused
from safetensors.torch import load_file

import scorefield.commands.command as command
import scorefield.data.images as images
import scorefield.training.features as features
import toyworld.evaluate as evaluate_toyworld
import toyworld.students as evaluate_students
from distill.export import copied_parts, export_pipeline, lcm_times
from distill.student import Student
from scorefield.data.arrays import read_idx, read_npz
from scorefield.data.rows import File
from scorefield.denoiser import NetworkDenoiser, karras_denoiser
from scorefield.files import load_json, printable, read_json, read_regular
from scorefield.models import networks
from scorefield.models.components import check_part, copied_files
from scorefield.models.networks import ResidualMLP
from scorefield.models.pretrained import PartReader
from scorefield.models.storage import load_denoiser, save_denoiser
from scorefield.models.teacher import load_teacher
from scorefield.schedule import Karras, RectifiedFlow
from toyworld import circles
from toyworld.options import EvaluateStudents

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def student(sd, tmp_path_factory):
    teacher = load_teacher(sd, cache=tmp_path_factory.mktemp("cache"))
    return Student(teacher.denoiser, lcm_times(teacher.denoiser.schedule, 1))


def denoiser_folder(tmp_path, **options):
    network = ResidualMLP((1, 4, 4), 0, width=8, depth=1)
    options = {"width": 8, "depth": 1, **options}
    facts = {"network": "mlp", "shape": [1, 4, 4], "num_classes": 0, "options": options}
    return save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), tmp_path / "teacher", facts)


class Payload:
    """Leaves a mark wherever it is unpickled by a loader that runs code."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


# Parts that an index names, and what is copied of them.


@pytest.mark.parametrize(("entry", "message"), [
    *(({name: ["diffusers", "AutoencoderKL"]}, "no name of a part")
      for name in ("../../../payload", "/etc", "..", "a\\b", "a\nb")),
    *(({"vae": value}, r"vae must be \[library, class\]") for value in (
        ["diffusers"], ["diffusers", "AutoencoderKL", "x"], ["../evil", "AutoencoderKL"], ["diffusers", None],
        {"diffusers": "AutoencoderKL"},
    )),
    ({"text_encoder": {"a": "b"}}, r"text_encoder must be \[library, class\]|lacks text_encoder"),
    ({"vae": ["payload", "AutoencoderKL"]}, r"unsupported vae: .*; expected a class of diffusers"),
    ({"vae": [None, None]}, "unsupported vae"), ({"vae": "diffusers"}, "unsupported vae"),
    ({"tokenizer": 3}, "unsupported tokenizer"),
])  # fmt: skip
def test_an_index_that_names_no_known_part_is_refused_before_any_training(folder, entry, message):
    edit(folder / INDEX, **entry)
    for read in (load_teacher, copied_parts):
        with refused(message):
            read(folder)


@pytest.mark.parametrize("part", ["vae", "tokenizer", "scheduler", "unet", "text_encoder"])
def test_a_part_without_a_folder_is_refused_before_any_training(folder, part):
    shutil.rmtree(folder / part)
    with refused(part):
        load_teacher(folder)
    if part not in ("unet", "scheduler"):  # which are not copied
        with refused(f"{part} holds no file that belongs to a {part}"):
            copied_parts(folder)


def test_an_export_copies_known_files_of_known_parts_only_and_writes_nothing_outside(folder, student, tmp_path):
    for part in ("vae", "text_encoder", "tokenizer", "payload"):
        for name in ("evil.py", "pytorch_model.bin", "w.pt", "x.pth", "y.ckpt", "z.pkl", "notes.txt"):
            (folder / part).mkdir(exist_ok=True)
            (folder / part / name).write_bytes(b"x")
    edit(folder / INDEX, payload=["diffusers", "AutoencoderKL"])
    out = export_pipeline(student, folder, tmp_path / "student")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {
        ".scorefield.json", "README.md", INDEX, SCHEDULER, "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert "payload" not in json.loads((out / INDEX).read_text())
    load_teacher(out, few_steps=True)
    shutil.move(folder / "payload", tmp_path / "payload")
    edit(folder / INDEX, **{"../payload": ["diffusers", "AutoencoderKL"]})
    before = set(tmp_path.rglob("*"))
    with refused("no name of a part"):
        export_pipeline(student, folder, tmp_path / "runs" / "student")
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["vae", "vae/config.json"])
def test_links_out_of_a_models_folder_are_not_copied(folder, student, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    for copy in (copied_parts, lambda source: export_pipeline(student, source, tmp_path / "student")):
        with refused("is a link out of"):
            copy(folder)
    assert not (tmp_path / "student").exists()


def test_links_of_the_cache_of_downloads_are_copied_as_files(folder, student, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1f"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        target = snapshot / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / str(number))
        target.symlink_to(os.path.relpath(blobs / str(number), target.parent))
    out = export_pipeline(student, snapshot, tmp_path / "student")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    same = "vae/diffusion_pytorch_model.safetensors"
    assert (out / same).read_bytes() == (folder / same).read_bytes()
    # A link of a snapshot that leaves the blobs is none of the cache's.
    (snapshot / "vae" / "config.json").unlink()
    (snapshot / "vae" / "config.json").symlink_to(folder / "vae" / "config.json")
    with refused("is a link out of"):
        copied_files(snapshot, "vae")


def test_of_a_teacher_in_pickles_the_student_is_in_safetensors(folder, student, tmp_path):
    weights = load_file(weights_in(folder / "vae"))
    pickle_weights(folder / "vae")
    out = export_pipeline(student, folder, tmp_path / "student")
    copied = load_file(weights_in(out / "vae"))
    assert copied.keys() == weights.keys()
    assert all(torch.equal(copied[name], weights[name]) for name in weights)
    assert not list(out.rglob("*.bin"))


# Code.


def test_commands_that_draw_run_no_pickle(folder, tmp_path):
    assert type(evaluate_toyworld.load_pipeline(folder, "cpu").scheduler).__name__ == "DDIMScheduler"
    mark, lora = tmp_path / "mark", tmp_path / "lora"
    pickle_weights(folder / "vae")
    next((folder / "vae").glob("*.bin")).write_bytes(pickle.dumps(Payload(mark)))
    with refused("pickled weights only"):
        evaluate_toyworld.load_pipeline(folder, "cpu")
    lora.mkdir()
    (lora / "dmd2.json").write_text('{"dmd2_num_inference_steps": 1}')
    (lora / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Payload(mark)))
    with refused(r"pytorch_lora_weights\.safetensors cannot be read"):
        evaluate_students.load_student(EvaluateStudents(students=(lora,), device="cpu"), lora)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["os:system", "LCMSampler", "StableDiffusionPipeline", None, ["a", "b"]])
def test_a_scheduler_that_diffusers_does_not_have_is_refused(folder, name):
    edit(folder / SCHEDULER, _class_name=name)
    with refused("must be a scheduler of diffusers"):
        evaluate_toyworld.load_scheduler(folder)


def test_no_code_of_a_folder_is_imported(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        (place / "payload_of_a_folder.py").write_text("raise AssertionError('imported')")
    for config in ("unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        edit(
            folder / config,
            auto_map={"AutoModel": "payload_of_a_folder.Model", "AutoTokenizer": ["payload_of_a_folder.T", None]},
        )
    load_teacher(folder, cache=tmp_path / "cache").prompts(["a"])
    evaluate_toyworld.load_pipeline(folder, "cpu")
    assert "payload_of_a_folder" not in sys.modules


# Weights that are not what is described, or not finite.


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_adapters_and_quantised_weights_are_refused(folder, part, monkeypatch, tmp_path):
    def nested(settings):
        return {"quantization_config": settings}, {"text_config": {"quantization_config": settings}}

    with monkeypatch.context() as patch:
        patch.setattr(PartReader, "read", lambda *arguments: pytest.fail("it was read"))
        config = (folder / part / "config.json").read_text()
        for settings in nested({"quant_method": "bitsandbytes", "load_in_4bit": True}):
            edit(folder / part / "config.json", **settings)
            with refused(rf"{part}/config\.json: the weights are quantised \(bitsandbytes\)"):
                load_teacher(folder)
            (folder / part / "config.json").write_text(config)
    reweigh(weights_in(folder / part), lambda weights: {k: v for k, v in weights.items() if k != min(weights)})
    settings = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
    (folder / part / "adapter_config.json").write_text(json.dumps(settings))
    with refused("holds an adapter"):
        load_teacher(folder, cache=tmp_path / "cache").prompts(["a"])


@pytest.mark.parametrize(("part", "changes"), [
    ("text_encoder", {"num_hidden_layers": 300}), ("unet", {"block_out_channels": [512, 1024]}),
    ("text_encoder", {"num_hidden_layers": 10**9}), ("unet", {"layers_per_block": [1, 10**12]}),
])  # fmt: skip
def test_a_config_that_asks_for_more_than_the_weights_hold_is_refused(folder, part, changes):
    edit(folder / part / "config.json", **changes)
    with refused(r"describes a network of|layers.* must be at most 1000"):
        load_teacher(folder).prompts(["a"])


@pytest.mark.parametrize(("part", "changes"), [
    ("unet", {"norm_eps": None}), ("unet", {"mid_block_scale_factor": [1]}), ("unet", {"norm_eps": "1e-5"}),
    ("vae", {"scaling_factor": True}),
])  # fmt: skip
def test_a_config_without_a_number_where_its_network_wants_one_is_refused(folder, part, changes):
    """Some are first used when the network is called: long after it was loaded."""
    edit(folder / part / "config.json", **changes)
    with refused(rf"{part}/config\.json: {min(changes)} must be a number|must have a scale"):
        load_teacher(folder).prompts(["a"])


def test_a_network_that_its_weights_do_not_fill_is_never_built(tmp_path, monkeypatch):
    load_teacher(str(denoiser_folder(tmp_path)))
    folder = denoiser_folder(tmp_path, width=4096, depth=200)
    devices, built = [], networks.ResidualMLP

    def build(*arguments, **options):
        network = built(*arguments, **options)
        devices.append(next(network.parameters()).device.type)
        return network

    monkeypatch.setattr(networks, "ResidualMLP", build)
    with refused("do not fit the ResidualMLP that is described beside"):
        load_teacher(str(folder))
    assert devices == ["meta"]
    features.save_classifier(features.Classifier(features.Facts(1, 8, 2, num_features=8)), tmp_path / "f")
    features.load_classifier(tmp_path / "f")
    edit(tmp_path / "f" / "features.json", num_features=10**9)
    with refused("do not fit the Classifier"):
        features.load_classifier(tmp_path / "f")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_a_pipeline_that_are_not_finite_are_named(folder, part, value, tmp_path):
    weights = load_file(weights_in(folder / part))
    name = next(name for name, x in weights.items() if x.is_floating_point() and x.ndim == 1)
    weights[name][0] = value
    reweigh(weights_in(folder / part), lambda _: weights)
    with refused(rf"{folder / part} hold nan or inf, in .*{name.split('.')[-1]}"):
        load_teacher(folder, cache=tmp_path / "cache").prompts(["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
def test_sigma_data_that_is_no_spread_and_buffers_that_are_not_finite_are_refused(tmp_path, value):
    denoiser = karras_denoiser(ResidualMLP((2,), width=8, depth=1), Karras())
    file = save_denoiser(denoiser, tmp_path / "teacher") / "model.safetensors"
    reweigh(file, lambda weights: {**weights, "_extra_state": torch.full_like(weights["_extra_state"], value)})
    with refused("sigma_data must be a finite number above 0"):
        load_denoiser(tmp_path / "teacher", denoiser.network)
    network = ResidualMLP((2,), width=8, depth=1)
    network.frequencies[3] = float("nan")
    folder = save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), tmp_path / "other")
    with refused("hold nan or inf, in frequencies"):
        load_denoiser(folder, network)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_of_json_are_finite(tmp_path, folder, text):
    place = folder / SCHEDULER
    place.write_text(place.read_text().replace("0.00085", text))
    with refused(f"scheduler_config.json: holds the number {text}"):
        load_teacher(folder)
    saved = denoiser_folder(tmp_path) / "denoiser.json"
    saved.write_text(saved.read_text().replace('"time_scale": 1.0', f'"time_scale": {text}'))
    with refused(f"holds the number {text}"):
        load_teacher(str(saved.parent))


@pytest.mark.parametrize("scaling", [0, -1.0, "x", None])
def test_latents_need_a_scale(folder, scaling):
    edit(folder / "vae" / "config.json", scaling_factor=scaling)
    with refused("scaling_factor must be a number( above 0)?; got"):
        load_teacher(folder)


@pytest.mark.parametrize("text", ["{}", '{"size": "a"}', '{"size": 7}', "[", '{"size": 1e999}'])
def test_a_painter_of_circles_that_was_edited_is_refused(tmp_path, text):
    circles.save_circles(tmp_path / "c", circles.make_circles_unet(16), 16, "")
    assert load_teacher(str(tmp_path / "c")).size == (16, 16)
    (tmp_path / "c" / "circles.json").write_text(text)
    with refused(r"circles\.json"):
        load_teacher(str(tmp_path / "c"))


# What would fill the memory.


def enlarge(file):
    """Two GiB that take no room on the disk; reading them would take four in memory."""
    with file.open("ab") as opened:
        opened.truncate(2**31)


@pytest.mark.parametrize("name", [
    INDEX, SCHEDULER, "unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json",
    "tokenizer/merges.txt", "tokenizer/spiece.model", "vae/any.json",
])  # fmt: skip
def test_texts_that_would_fill_the_memory_are_refused_unread(folder, name):
    enlarge(folder / name)
    with refused(rf"{name.split('/')[-1]}:? has 2,147,483,648 bytes; expected at most"):
        load_teacher(folder)


def test_descriptions_that_would_fill_the_memory_or_the_stack_are_refused(tmp_path):
    features.save_classifier(features.Classifier(features.Facts(1, 8, 2)), tmp_path / "f")
    for file, load in ((tmp_path / "f" / "features.json", features.load_classifier),
                       (denoiser_folder(tmp_path) / "denoiser.json", lambda x: load_teacher(str(x)))):  # fmt: skip
        enlarge(file)
        with refused("has 2,147,483,648 bytes"):
            load(file.parent)
    (tmp_path / "a.json").write_text("[" * 100_000)
    with refused("nested too deep"):
        load_json(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["../vae/x.safetensors", "/etc/passwd", "..", 3])
def test_shards_outside_their_folder_are_refused(folder, name):
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with refused("shards must be names of files beside it"):
        load_teacher(folder)


def npy(shape, data=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def write_npz(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", content)


def test_an_npz_that_would_fill_the_memory_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.zeros((10, 8, 8, 3), np.uint8))
    assert read_npz(path)[0].shape == (10, 3, 8, 8)
    # The directory of the archive says it: two GiB of zeros, packed.
    write_npz(path, npy((1, 1, 8, 8), bytes(64)))
    content = path.read_bytes()
    place = content.rindex(b"PK\x01\x02") + 24
    path.write_bytes(content[:place] + struct.pack("<I", 2**31) + content[place + 4 :])
    with refused("would become 2,147,483,648"):
        read_npz(path)
    # The array says it, whose member is small.
    write_npz(path, npy((10**6, 3, 1000, 1000)))
    monkeypatch.setattr(np, "load", lambda *arguments, **options: pytest.fail("it was read"))
    with refused(r"images\.npy says it has shape \(1000000, 3, 1000, 1000\)"):
        read_npz(path)


def test_an_idx_file_that_unpacks_to_more_than_it_says_is_read_no_further(tmp_path):
    path, header = tmp_path / "train-images-idx3-ubyte.gz", struct.pack(">4I", 0x803, 1, 4, 4)
    huge = struct.pack(">4I", 0x803, 2**20, 64, 64)
    for content, message in (
        (header + bytes(2**24), "no whole idx file.*17 bytes"),
        (huge, "become 4,294,967,296"),
    ):
        path.write_bytes(gzip.compress(content))
        with refused(message):
            read_idx(path)
    path.write_bytes(gzip.compress(header + bytes(16)))
    assert read_idx(path)[0].shape == (1, 1, 4, 4)


# Names in what is printed, and names behind which there is no regular file.


def test_names_are_printed_on_one_line_without_control_characters(monkeypatch, capsys):
    assert printable("a\nerror: b\x1b[2J\x07\u202e\u2028\udcff") == (
        r"a\nerror: b\x1b[2J\x07\u202e\u2028\udcff"
    )  # fmt: skip
    assert printable("Größe 模型 é.png") == "Größe 模型 é.png"
    command.say("unusable image a\nerror: forged\x1b]0;x\x07.png")
    assert capsys.readouterr().err == "error: unusable image a\\nerror: forged\\x1b]0;x\\x07.png\n"
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def main(config):
        print(warnings.formatwarning("the file a\nb\x1b[0m", UserWarning, "x.py", 3))

    command.run(main, command.RunOptions, arguments=[], folders=lambda config: [])
    assert capsys.readouterr().out == "x.py:3: UserWarning: the file a\\nb\\x1b[0m\n\n"


def test_images_that_are_left_out_cannot_forge_lines(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (tmp_path / "a\nerror: forged\x1b[1m.png").write_bytes(b"x")
    images.load_images(images.DataOptions(data=str(tmp_path), on_bad_data="skip"))
    said = capsys.readouterr().err
    assert "a\\nerror: forged\\x1b[1m.png" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_only_regular_files_are_opened(kind, tmp_path):
    odd = tmp_path / "odd.png"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(odd))
    elif kind == "device":
        odd.symlink_to("/dev/zero")
    else:
        odd.mkdir()
    for read in (read_regular, read_json, lambda path: File(str(path)).read(), read_npz):
        with refused("expected a regular file"):
            read(odd)
    if kind != "folder":
        with refused(f"{odd} is .*expected a regular file"):
            check_part(tmp_path)
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "odd.png"}))
        with refused(r"1 of 1 samples .* is a .*; expected a regular file"):
            images.load_images(images.DataOptions(data=str(tmp_path)))
