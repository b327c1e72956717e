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
import tiny_pipelines as tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    tiny.sd().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy of a pipeline to damage."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(scope="module")
def student(original, tmp_path_factory):
    teacher = load_teacher(original, cache=tmp_path_factory.mktemp("cache"))
    return Student(teacher.denoiser, lcm_times(teacher.denoiser.schedule, 1))


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class Payload:
    """Leaves a mark wherever it is unpickled by a loader that runs code."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


ENTRIES = [
    ({"../../../payload": ["diffusers", "AutoencoderKL"]}, "no name of a part"),
    ({"/etc": ["diffusers", "AutoencoderKL"]}, "no name of a part"),
    ({"..": ["diffusers", "AutoencoderKL"]}, "no name of a part"),
    ({"a\\b": ["diffusers", "AutoencoderKL"]}, "no name of a part"),
    ({"a\nb": ["diffusers", "AutoencoderKL"]}, "no name of a part"),
    ({"vae": ["diffusers"]}, r"vae must be \[library, class\]"),
    ({"vae": ["diffusers", "AutoencoderKL", "x"]}, r"vae must be \[library, class\]"),
    ({"vae": ["../evil", "AutoencoderKL"]}, r"vae must be \[library, class\]"),
    ({"vae": ["diffusers", None]}, r"vae must be \[library, class\]"),
    ({"vae": {"diffusers": "AutoencoderKL"}}, r"vae must be \[library, class\]"),
    ({"text_encoder": {"a": "b"}}, r"text_encoder must be \[library, class\]|lacks text_encoder"),
    ({"vae": ["payload", "AutoencoderKL"]}, r"unsupported vae: .*; expected a class of diffusers"),
    ({"vae": [None, None]}, "unsupported vae"),
    ({"vae": "diffusers"}, "unsupported vae"),
    ({"tokenizer": 3}, "unsupported tokenizer"),
]


@pytest.mark.parametrize(("entry", "message"), ENTRIES)
def test_an_index_that_names_no_known_part_is_refused_before_any_training(folder, entry, message):
    edit(folder / "model_index.json", **entry)
    with pytest.raises(ValueError, match=message):
        load_teacher(folder)
    with pytest.raises(ValueError, match=message):
        copied_parts(folder)


@pytest.mark.parametrize("part", ["vae", "tokenizer", "scheduler", "unet", "text_encoder"])
def test_a_part_without_a_folder_is_refused_before_any_training(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(ValueError, match=part):
        load_teacher(folder)
    if part not in ("unet", "scheduler"):  # which are not copied
        with pytest.raises(ValueError, match=f"{part} holds no file that belongs to a {part}"):
            copied_parts(folder)


def test_an_export_writes_nothing_outside_its_folder(folder, student, tmp_path):
    (tmp_path / "payload").mkdir()
    (tmp_path / "payload" / "mark.txt").write_text("mark")
    edit(folder / "model_index.json", **{"../payload": ["diffusers", "AutoencoderKL"]})
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="no name of a part"):
        export_pipeline(student, folder, tmp_path / "runs" / "student")
    assert set(tmp_path.rglob("*")) == before


def test_an_export_copies_known_files_of_known_parts_only(folder, student, tmp_path):
    stray = ["evil.py", "pytorch_model.bin", "w.pt", "x.pth", "y.ckpt", "z.pkl", "notes.txt"]
    for part in ("vae", "text_encoder", "tokenizer", "payload"):
        for name in stray:
            (folder / part).mkdir(exist_ok=True)
            (folder / part / name).write_bytes(b"x")
    edit(folder / "model_index.json", payload=["diffusers", "AutoencoderKL"])
    out = export_pipeline(student, folder, tmp_path / "student")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {
        ".scorefield.json", "README.md", "model_index.json", "scheduler/scheduler_config.json",
        "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert "payload" not in json.loads((out / "model_index.json").read_text())
    load_teacher(out, few_steps=True)


@pytest.mark.parametrize("whole", [False, True])
def test_links_out_of_a_models_folder_are_not_copied(folder, student, tmp_path, whole):
    secret = tmp_path / "elsewhere"
    place = folder / "vae" if whole else folder / "vae" / "config.json"
    place.rename(secret)
    place.symlink_to(secret)
    with pytest.raises(ValueError, match="is a link out of"):
        copied_parts(folder)
    with pytest.raises(ValueError, match="is a link out of"):
        export_pipeline(student, folder, tmp_path / "student")
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
    with pytest.raises(ValueError, match="is a link out of"):
        copied_files(snapshot, "vae")


def test_of_a_teacher_in_pickles_the_student_is_in_safetensors(folder, student, tmp_path):
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, folder / "vae" / "diffusion_pytorch_model.bin")
    out = export_pipeline(student, folder, tmp_path / "student")
    copied = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert copied.keys() == weights.keys()
    assert all(torch.equal(copied[name], weights[name]) for name in weights)
    assert not list(out.rglob("*.bin"))


def test_scripts_that_draw_run_no_pickle(folder, tmp_path):
    pipeline = evaluate_toyworld.load_pipeline(folder, "cpu")
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    mark = tmp_path / "mark"
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(ValueError, match="pickled weights only"):
        evaluate_toyworld.load_pipeline(folder, "cpu")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "dmd2.json").write_text('{"dmd2_num_inference_steps": 1}')
    (lora / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Payload(mark)))
    options = EvaluateStudents(students=(lora,), device="cpu")
    with pytest.raises(ValueError, match=r"pytorch_lora_weights\.safetensors cannot be read"):
        evaluate_students.load_student(options, lora)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["os:system", "LCMSampler", "StableDiffusionPipeline", None, ["a", "b"]])
def test_a_scheduler_that_diffusers_does_not_have_is_refused(folder, name):
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(ValueError, match="must be a scheduler of diffusers"):
        evaluate_toyworld.load_scheduler(folder)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_an_adapter_beside_weights_is_refused(folder, part):
    weights = next((folder / part).glob("*.safetensors"))
    held = load_file(weights)
    del held[min(held)]
    save_file(held, weights, metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
    (folder / part / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds an adapter"):
        load_teacher(folder).prompts(["a"])


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("nested", [False, True])
def test_quantised_weights_are_refused_before_any_are_read(folder, part, nested, monkeypatch):
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    edit(folder / part / "config.json", **({"text_config": settings} if nested else settings))
    monkeypatch.setattr(PartReader, "read", lambda *arguments: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=rf"{part}/config\.json: the weights are quantised \(bitsandbytes\)"):
        load_teacher(folder)


LARGE = [
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json",
    "tokenizer/tokenizer.json", "tokenizer/merges.txt", "tokenizer/spiece.model", "vae/any.json",
]  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_texts_that_would_fill_the_memory_are_refused_unread(folder, name):
    """Two GiB that take no room on the disk; reading them would take four in memory."""
    with (folder / name).open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(ValueError, match=rf"{name.split('/')[-1]}:? has 2,147,483,648 bytes; expected at most"):
        load_teacher(folder)


def test_descriptions_that_would_fill_the_memory_are_refused_unread(tmp_path):
    features.save_classifier(features.Classifier(features.Facts(1, 8, 2)), tmp_path / "f")
    for folder, name in ((denoiser_folder(tmp_path), "denoiser.json"), (tmp_path / "f", "features.json")):
        with (folder / name).open("r+b") as file:
            file.truncate(2**31)
        with pytest.raises(ValueError, match="has 2,147,483,648 bytes"):
            (features.load_classifier if name == "features.json" else lambda x: load_teacher(str(x)))(folder)


@pytest.mark.parametrize("text", ["{}", '{"size": "a"}', '{"size": 7}', "[", '{"size": 1e999}'])
def test_a_painter_of_circles_that_was_edited_is_refused(tmp_path, text):
    circles.save_circles(tmp_path / "c", circles.make_circles_unet(16), 16, "")
    assert load_teacher(str(tmp_path / "c")).size == (16, 16)
    (tmp_path / "c" / "circles.json").write_text(text)
    with pytest.raises(ValueError, match=r"circles\.json"):
        load_teacher(str(tmp_path / "c"))


@pytest.mark.parametrize("name", ["../vae/x.safetensors", "/etc/passwd", "..", 3])
def test_shards_outside_their_folder_are_refused(folder, name):
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="shards must be names of files beside it"):
        load_teacher(folder)


def denoiser_folder(tmp_path, **options):
    network = ResidualMLP((1, 4, 4), 0, width=8, depth=1)
    options = {"width": 8, "depth": 1, **options}
    facts = {"network": "mlp", "shape": [1, 4, 4], "num_classes": 0, "options": options}
    denoiser = NetworkDenoiser(network, RectifiedFlow(), "flow")
    return save_denoiser(denoiser, tmp_path / "teacher", facts)


def test_a_network_that_its_weights_do_not_fill_is_never_built(tmp_path, monkeypatch):
    load_teacher(str(denoiser_folder(tmp_path)))
    folder = denoiser_folder(tmp_path, width=4096, depth=200)
    devices, built = [], networks.ResidualMLP

    def build(*arguments, **options):
        network = built(*arguments, **options)
        devices.append(next(network.parameters()).device.type)
        return network

    monkeypatch.setattr(networks, "ResidualMLP", build)
    with pytest.raises(ValueError, match="do not fit the ResidualMLP that is described beside"):
        load_teacher(str(folder))
    assert devices == ["meta"]


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_encoder", {"num_hidden_layers": 300}),
        ("unet", {"block_out_channels": [512, 1024]}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("unet", {"layers_per_block": [1, 10**12]}),
    ],
)
def test_a_config_that_asks_for_more_than_the_weights_hold_is_refused(folder, part, changes):
    edit(folder / part / "config.json", **changes)
    with pytest.raises(ValueError, match=r"describes a network of|layers.* must be at most 1000"):
        load_teacher(folder).prompts(["a"])


def test_features_that_their_weights_do_not_fill_are_refused(tmp_path):
    facts = features.Facts(1, 8, 2, num_features=8)
    features.save_classifier(features.Classifier(facts), tmp_path / "f")
    features.load_classifier(tmp_path / "f")
    edit(tmp_path / "f" / "features.json", num_features=10**9)
    with pytest.raises(ValueError, match="do not fit the Classifier"):
        features.load_classifier(tmp_path / "f")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_a_pipeline_that_are_not_finite_are_named(folder, part, value, tmp_path):
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    name = next(name for name, x in weights.items() if x.is_floating_point() and x.ndim == 1)
    weights[name][0] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{folder / part} hold nan or inf, in .*{name.split('.')[-1]}"):
        load_teacher(folder, cache=tmp_path / "cache").prompts(["a"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.5])
def test_sigma_data_that_is_no_spread_is_refused_on_load(tmp_path, value):
    denoiser = karras_denoiser(ResidualMLP((2,), width=8, depth=1), Karras())
    save_denoiser(denoiser, tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["_extra_state"].fill_(value)
    save_file(weights, tmp_path / "teacher" / "model.safetensors")
    with pytest.raises(ValueError, match="sigma_data must be a finite number above 0"):
        load_denoiser(tmp_path / "teacher", denoiser.network)


def test_buffers_that_are_not_finite_are_refused_on_load(tmp_path):
    network = ResidualMLP((2,), width=8, depth=1)
    network.frequencies[3] = float("nan")
    save_denoiser(NetworkDenoiser(network, RectifiedFlow(), "flow"), tmp_path / "teacher")
    with pytest.raises(ValueError, match="hold nan or inf, in frequencies"):
        load_denoiser(tmp_path / "teacher", network)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_of_json_are_finite(tmp_path, folder, text):
    place = folder / "scheduler" / "scheduler_config.json"
    place.write_text(place.read_text().replace("0.00085", text))
    with pytest.raises(ValueError, match=f"scheduler_config.json: holds the number {text}"):
        load_teacher(folder)
    saved = denoiser_folder(tmp_path) / "denoiser.json"
    saved.write_text(saved.read_text().replace('"time_scale": 1.0', f'"time_scale": {text}'))
    with pytest.raises(ValueError, match=f"holds the number {text}"):
        load_teacher(str(saved.parent))


@pytest.mark.parametrize("scaling", [0, -1.0, "x", None])
def test_latents_need_a_scale(folder, scaling):
    edit(folder / "vae" / "config.json", scaling_factor=scaling)
    with pytest.raises(ValueError, match="scaling_factor must be a number above 0"):
        load_teacher(folder)


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        load_json(tmp_path / "a.json")


def test_names_are_printed_on_one_line_without_control_characters(capsys):
    assert printable("a\nerror: b\x1b[2J\x07\u202e\u2028\udcff") == (
        r"a\nerror: b\x1b[2J\x07\u202e\u2028\udcff"
    )  # fmt: skip
    assert printable("Größe 模型 é.png") == "Größe 模型 é.png"
    command.say("unusable image a\nerror: forged\x1b]0;x\x07.png")
    assert capsys.readouterr().err == "error: unusable image a\\nerror: forged\\x1b]0;x\\x07.png\n"
    assert command.one_line("a\nb", UserWarning, "x.py", 3) == "x.py:3: UserWarning: a\\nb\n"


def test_scripts_print_warnings_on_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "argv", ["script"])

    def main(config):
        print(warnings.formatwarning("the file a\nb\x1b[0m", UserWarning, "x.py", 3))

    command.run(main, command.RunOptions, "")
    assert capsys.readouterr().out == "x.py:3: UserWarning: the file a\\nb\\x1b[0m\n\n"


def test_images_that_are_left_out_cannot_forge_lines(tmp_path, capsys):
    for name in ("b.png", "a\nerror: forged\x1b[1m.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "a\nerror: forged\x1b[1m.png").write_bytes(b"x")
    images.load_images(images.DataOptions(data=str(tmp_path), on_bad_data="skip"))
    said = capsys.readouterr().err
    assert "a\\nerror: forged\\x1b[1m.png" in said
    assert said.count("\n") == 1


@pytest.fixture(params=["pipe", "socket", "device", "folder"])
def odd(request, tmp_path):
    """A name behind which there is no regular file."""
    place = tmp_path / "odd.png"
    if request.param == "pipe":
        os.mkfifo(place)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(place))
    elif request.param == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    return place


def test_only_regular_files_are_opened(odd, tmp_path):
    with pytest.raises(ValueError, match="expected a regular file"):
        read_regular(odd)
    with pytest.raises(ValueError, match="expected a regular file"):
        read_json(odd)
    with pytest.raises(ValueError, match="expected a regular file"):
        File(str(odd)).read()
    with pytest.raises(ValueError, match="expected a regular file"):
        read_npz(odd)
    if not odd.is_dir():
        with pytest.raises(ValueError, match=f"{odd} is .*expected a regular file"):
            check_part(tmp_path)


@pytest.mark.parametrize("what", ["pipe", "socket", "device"])
def test_metadata_that_names_no_regular_file_is_refused_at_once(tmp_path, what):
    names = {"pipe": "pipe", "socket": "socket", "device": "/dev/zero"}
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": names[what]}))
    with pytest.raises(ValueError, match=r"1 of 1 samples .* is a .*; expected a regular file"):
        images.load_images(images.DataOptions(data=str(tmp_path)))


def npy(shape, data=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def write_npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def test_an_npz_that_would_fill_the_memory_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.zeros((10, 8, 8, 3), np.uint8))
    assert read_npz(path)[0].shape == (10, 3, 8, 8)
    # The directory of the archive says it: two GiB of zeros, packed.
    write_npz(path, images=npy((1, 1, 8, 8), bytes(64)))
    content = path.read_bytes()
    place = content.rindex(b"PK\x01\x02") + 24
    path.write_bytes(content[:place] + struct.pack("<I", 2**31) + content[place + 4 :])
    with pytest.raises(ValueError, match="would become 2,147,483,648"):
        read_npz(path)
    # The array says it, whose member is small.
    write_npz(path, images=npy((10**6, 3, 1000, 1000)))
    monkeypatch.setattr(np, "load", lambda *arguments, **options: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"images\.npy says it has shape \(1000000, 3, 1000, 1000\)"):
        read_npz(path)


def test_an_idx_file_that_unpacks_to_more_than_it_says_is_read_no_further(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    header = struct.pack(">4I", 0x803, 1, 4, 4)
    path.write_bytes(gzip.compress(header + bytes(2**24)))
    with pytest.raises(ValueError, match=r"no whole idx file.*17 bytes"):
        read_idx(path)
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 2**20, 64, 64)))
    with pytest.raises(ValueError, match="would become 4,294,967,296"):
        read_idx(path)
    path.write_bytes(gzip.compress(header + bytes(16)))
    assert read_idx(path)[0].shape == (1, 1, 4, 4)


def test_no_code_of_a_folder_is_imported(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        (place / "payload.py").write_text("raise AssertionError('imported')")
    for config in ("unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        edit(folder / config, auto_map={"AutoModel": "payload.Model", "AutoTokenizer": ["payload.T", None]})
    load_teacher(folder, cache=tmp_path / "cache").prompts(["a"])
    evaluate_toyworld.load_pipeline(folder, "cpu")
    assert "payload" not in sys.modules
