"""Files and folders that tests write, change and compare."""

import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


def edit(file, **changes):
    """Change some keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def reweigh(file, change):
    """Rewrite the tensors of a safetensors file as ``change`` returns them."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def weights_in(part):
    """The one safetensors file of a part."""
    (file,) = part.glob("*.safetensors")
    return file


def pickle_weights(folder):
    """Replace every safetensors file by the pickle that old versions wrote."""
    for path in folder.rglob("*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder):
    """All tensors below a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {(str(file.relative_to(folder)), name): x for file in files for name, x in load_file(file).items()}


def assert_same(one, other):
    """Tensors by name are equal bit by bit."""
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def picture(path, number=0, size=(24, 20)):
    """A picture of noise, of a number's own; ``size`` is width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def captioned(folder, prompts, size=(24, 20)):
    """Pictures beside a metadata.jsonl with their prompts; returns its path."""
    rows = []
    for number, prompt in enumerate(prompts):
        picture(folder / f"{number}.png", number, size)
        rows.append(json.dumps({"text": prompt, "file_name": f"{number}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder / "metadata.jsonl"
