"""Teachers whose network lies in a .gguf file: what the folder it was made from says, and hostile files."""

import shutil
import struct

import pytest
import tiny_transformers as tiny
import torch
from hostile import run
from safetensors.torch import load_file

from scorefield.models.teacher import load_teacher

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

NAMES = ("z_image", "wan")
Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    for name in NAMES:
        tiny.FAMILIES[name]().save_pretrained(root / name)
    yield root
    shutil.rmtree(root)


def weights_of(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def write(path, weights, kind="F32", architecture="tiny"):
    """A .gguf file as llama.cpp's own writer makes it: matrices of whole blocks in Q8_0, all else in float."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.words", ["a", "mug"])
    for name, value in weights.items():
        array = value.float().numpy()
        if kind == "Q8_0" and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(array, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(name, array.astype("float16" if kind == "F16" else "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def folder_with(root, name, place):
    """A copy of the pipeline whose network has no weights, and where its .gguf file belongs."""
    shutil.copytree(root / name, place)
    (place / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    return place, place / "transformer" / f"{name}.gguf"


def expected(value, kind):
    if kind == "Q8_0" and value.ndim == 2 and value.shape[1] % 32 == 0:
        array = gguf.dequantize(gguf.quantize(value.numpy(), Q8), Q8)
        return torch.from_numpy(array)
    return value.half().float() if kind == "F16" else value


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_gguf_is_that_of_the_folder(root, tmp_path, name, kind):
    folder, file = folder_with(root, name, tmp_path / "own")
    weights = weights_of(root / name)
    write(file, weights, kind)
    found = load_teacher(folder, size=32, cache=tmp_path / "cache")
    wanted = load_teacher(root / name, size=32, cache=tmp_path / "cache")
    held = {key: expected(value, kind) for key, value in weights.items()}
    state = found.denoiser.network.model.state_dict()
    assert state.keys() == held.keys()
    rounded = [key for key, value in weights.items() if not torch.equal(value, held[key])]
    assert bool(rounded) == (kind != "F32")
    for key, value in held.items():
        assert torch.allclose(state[key], value, rtol=2**-10, atol=0), key
        if name != "wan":  # of which diffusers keeps some parts in float32, and multiplies their scales in float16
            assert torch.equal(state[key], value), key
    wanted.denoiser.network.model.load_state_dict(state)
    x_t, t, cond = torch.randn(1, *wanted.shape), torch.tensor([0.5]), wanted.prompts(["a mug"])
    torch.testing.assert_close(found.denoiser(x_t, t, cond), wanted.denoiser(x_t, t, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_is_rounded_is_plain_again(root, tmp_path, dtype):
    """Embeddings and lone parameters too, which diffusers leaves rounded; and it is saved like any other."""
    folder, file = folder_with(root, "z_image", tmp_path / "own")
    weights = weights_of(root / "z_image")
    assert weights["x_pad_token"].shape == (1, 32)
    write(file, weights, "Q8_0")
    model = load_teacher(folder, size=32, cache=tmp_path / "cache", dtype=dtype).denoiser.network.model
    assert {type(value) for value in model.parameters()} == {torch.nn.Parameter}
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert {type(module).__name__ for module in model.modules()}.isdisjoint({"GGUFLinear"})
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors").keys() == weights.keys()


def test_names_of_the_makers_are_converted_in_gguf_too(root, tmp_path):
    """Z-Image's own files have queries, keys and values in one matrix, whose blocks are then taken apart."""
    folder, file = folder_with(root, "z_image", tmp_path / "own")
    weights = weights_of(root / "z_image")
    write(file, tiny.in_makers_names(weights), "Q8_0")
    state = load_teacher(folder, size=32, cache=tmp_path / "cache").denoiser.network.model.state_dict()
    assert all(torch.equal(state[key], expected(value, "Q8_0")) for key, value in weights.items())


def renamed(weights):
    return {f"foreign.{key}": value for key, value in weights.items()}


def without_one(weights):
    return dict(list(weights.items())[1:])


def narrow(weights):
    name = "layers.0.feed_forward.w1.weight"
    return {**weights, name: weights[name][:-1]}


def string(text):
    return struct.pack("<Q", len(text)) + text


def header(tensors=0, values=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


ENDLESS = header(values=1) + string(b"a") + struct.pack("<IIQ", 9, 4, 2**60)
LONG = header(values=1) + string(b"a") + struct.pack("<IIQ", 9, 0, 200_000) + bytes(200_000)
WIDE = header(tensors=1) + string(b"cap_pad_token") + struct.pack("<IQQIQ", 2, 2**40, 2**30, 0, 0)
BYTES = {
    "nothing": (b"", "no whole .gguf file"),
    "another": (b"PK\x03\x04" + b"\0" * 64, "does not begin with GGUF"),
    "version": (header(version=99), "version is 99"),
    "other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is"),
    "many tensors": (header(tensors=2**62), "entries; expected at most 65,536"),
    "many values": (header(values=2**62), "entries; expected at most 65,536"),
    "a long name": (header(tensors=1) + struct.pack("<Q", 2**63), "ends within its header"),
    "a list without end": (ENDLESS, "entries; expected at most 65,536"),
    "a long list": (LONG, "names 200,001 entries; expected at most 65,536"),
    "a list of lists": (ENDLESS[:-12] + struct.pack("<IQ", 9, 1), "unknown type 9"),
    "many sides": (header(tensors=1) + string(b"a") + struct.pack("<I", 10**9), "1000000000 sides"),
    "a wide tensor": (WIDE + b"\0" * 128, "cannot be read"),
    "a far tensor": (WIDE[:-8] + struct.pack("<Q", 2**60) + b"\0" * 128, "beyond the end"),
    "no tensors": (header() + b"\0" * 64, ""),
}
WEIGHTS = {
    "foreign names": (renamed, "it lacks"), "one missing": (without_one, "it lacks tensors that"),
    "foreign shapes": (narrow, "feed_forward.w1.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BYTES, *WEIGHTS, "cut", "another network", "many layers"])
def test_hostile_files_are_refused_in_one_line(root, tmp_path, case):
    folder, file = folder_with(root, "z_image", tmp_path / "own")
    weights, said = weights_of(root / "z_image"), ""
    if case in BYTES:
        data, said = BYTES[case]
        file.write_bytes(data)
    elif case in WEIGHTS:
        change, said = WEIGHTS[case]
        write(file, change(weights), "Q8_0")
    elif case == "another network":
        write(file, weights_of(root / "wan"), "Q8_0", architecture="wan")
    else:
        write(file, weights, "Q8_0")
    if case == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    if case == "many layers":
        config = folder / "transformer" / "config.json"
        config.write_text(config.read_text().replace('"n_layers": 2', '"n_layers": 1000000000'))
        said = "n_layers must be at most 1000"
    out = tmp_path / "out"
    words = ["--teacher", str(folder), "--prompts", "a mug", "--size", "32", "--out", str(out)]
    code, output = run("sample", words)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) == (2, 1), output
    assert "Traceback" not in output
    assert said in errors[0]
    assert str(folder) in errors[0]
    assert not out.exists()
