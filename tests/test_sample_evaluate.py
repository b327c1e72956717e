"""Images and figures out of finished models: the same for any batch size and number of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sample
import torch
import train_features
import train_teacher
from features import Classifier, Facts, load_classifier, save_classifier
from images import DataOptions, load_images
from networks import load_teacher
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from distill.student import Student, save_student

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, and a two-step student of it, whose second step draws noise."""
    out = tmp_path_factory.mktemp("models")
    folder = train_teacher.main(train_teacher.Config(out=out, steps=4, batch_size=16, width=32, depth=2))
    teacher = load_teacher(str(folder))
    save_student(Student(teacher.denoiser, (20.0, 1.0)), out / "student", teacher.facts)
    return {"teacher": str(folder), "student": str(out / "student")}


def arrays(config):
    with np.load(sample.main(config)) as file:
        return torch.tensor(file["images"]).float(), file["labels"]


@pytest.mark.parametrize(("model", "sampler"), [("teacher", "ddim"), ("teacher", "ddpm"), ("teacher", "heun"),
                                                ("student", "ddim")])  # fmt: skip
def test_images_do_not_depend_on_the_batch_size(models, tmp_path, model, sampler):
    settings = {"model": models[model], "num_images": 13, "steps": 4, "sampler": sampler, "guidance": 1.5}
    one, labels = arrays(sample.Config(**settings, out=tmp_path / "a.npz", batch_size=13))
    other, _ = arrays(sample.Config(**settings, out=tmp_path / "b.npz", batch_size=4))
    assert (one - other).abs().max() <= 1  # a rounding at the edge of two bytes
    assert labels.tolist() == [number % 10 for number in range(13)]
    fresh, _ = arrays(sample.Config(**settings, out=tmp_path / "c.npz", seed=1))
    assert (one - fresh).abs().max() > 1


def test_images_do_not_depend_on_the_ranks(models, tmp_path):
    settings = {"model": models["student"], "num_images": 7, "batch_size": 3}
    one, labels = arrays(sample.Config(**settings, out=tmp_path / "a.npz"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "train_scripts" / "sample.py"), "--out", str(tmp_path / "b.npz")]  # fmt: skip
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    with np.load(tmp_path / "b.npz") as file:
        assert (torch.tensor(file["images"]).float() - one).abs().max() <= 1
        assert file["labels"].tolist() == labels.tolist()


def test_a_folder_of_pictures_is_data_again(models, tmp_path):
    out = sample.main(sample.Config(model=models["teacher"], num_images=12, steps=2, classes=(3, 7), out=tmp_path))
    assert Image.open(out / "grid.png").mode == "L"
    (out / "grid.png").unlink()
    images = load_images(DataOptions(data=str(out)))
    assert images.class_names == ("0003", "0007")
    assert len(images) == 12


@pytest.mark.parametrize(("changes", "message"), [
    ({"classes": (10,)}, r"--classes must lie in \[0, 9\]"), ({"num_images": 0}, "--num-images must be above 0"),
    ({"guidance": -1.0}, "--guidance must be at least 0"),
])  # fmt: skip
def test_impossible_requests_are_refused(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sample.main(sample.Config(**{"model": models["teacher"], "out": tmp_path / "x", **changes}))
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    out, random = tmp_path_factory.mktemp("sets"), np.random.RandomState(0)
    for name, low in (("made", 0), ("real", 60)):
        np.savez(out / f"{name}.npz", images=random.randint(low, 256, (120, 1, 8, 8)).astype(np.uint8),
                 labels=np.arange(120) % 4)  # fmt: skip
    torch.manual_seed(0)
    save_classifier(Classifier(Facts(1, 8, 4, num_features=24)).eval(), out / "features")
    return out


class Shaped(torch.nn.Module):
    """The same features as torchmetrics wants to call them."""

    num_features = 24

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images.float() / 127.5 - 1)


def test_figures_agree_with_torchmetrics_on_the_same_features(sets, tmp_path):
    config = evaluate.Config(
        generated=str(sets / "made.npz"), reference=str(sets / "real.npz"), features=sets / "features",
        out=tmp_path / "figures.json", batch_size=50,
    )  # fmt: skip
    figures = json.loads(evaluate.main(config).read_text())
    network = Shaped(load_classifier(sets / "features").features)
    made, real = (torch.tensor(np.load(sets / f"{name}.npz")["images"]) for name in ("made", "real"))
    theirs = FrechetInceptionDistance(feature=network, input_img_size=(1, 8, 8), antialias=False)
    kid = KernelInceptionDistance(feature=network, subsets=1, subset_size=120)
    for metric in (theirs, kid):
        metric.update(real, real=True)
        metric.update(made, real=False)
    assert figures["frechet_distance"] == pytest.approx(float(theirs.compute()), rel=1e-3)
    assert figures["kid"] == pytest.approx(float(kid.compute()[0]), rel=1e-3, abs=1e-6)
    assert figures["num_generated"] == figures["num_reference"] == 120
    assert figures["floor_num"] == 60


def test_features_are_learned_saved_and_loaded(tmp_path):
    config = train_features.Config(out=tmp_path / "features", steps=150, batch_size=64)
    network = load_classifier(train_features.main(config))
    assert network.facts.accuracy > 0.9
    assert network.facts.num_classes == 10


@pytest.mark.parametrize("spoil", ["missing", "json", "weights", "format"])
def test_what_is_no_classifier_is_refused(sets, tmp_path, spoil):
    folder = tmp_path / "features"
    folder.mkdir()
    for name in ("features.json", "model.safetensors"):
        (folder / name).write_bytes((sets / "features" / name).read_bytes())
    if spoil == "missing":
        (folder / "features.json").unlink()
    elif spoil == "json":
        (folder / "features.json").write_text("[]")
    elif spoil == "format":
        (folder / "features.json").write_text('{"format": "x"}')
    else:
        (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"holds no classifier of train_features\.py"):
        load_classifier(folder)
