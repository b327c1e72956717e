"""Images and figures out of finished models: the same for any batch size and number of ranks."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import edit
from PIL import Image
from refusals import refused
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import scorefield.commands.evaluate as evaluate
import scorefield.commands.features as train_features
import scorefield.commands.sample as sample
import scorefield.commands.teacher as train_teacher
from distill.student import Student, save_student
from scorefield.commands.options import Evaluate, Sample, TrainFeatures, TrainTeacher, check_evaluate
from scorefield.data.images import ImageSet, load_images
from scorefield.data.options import DataOptions
from scorefield.models.teacher import load_teacher
from scorefield.training.features import Classifier, Facts, load_classifier, save_classifier

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, and a two-step student of it, whose second step draws noise."""
    out = tmp_path_factory.mktemp("models")
    folder = train_teacher.main(TrainTeacher(out=out, steps=4, batch_size=16, width=32, depth=2))
    teacher = load_teacher(str(folder))
    save_student(Student(teacher.denoiser, (20.0, 1.0)), out / "student", teacher.facts)
    return {"teacher": str(folder), "student": str(out / "student")}


@pytest.mark.parametrize(("model", "sampler"), [("teacher", "ddim"), ("teacher", "ddpm"), ("teacher", "heun"),
                                                ("student", "ddim")])  # fmt: skip
def test_images_do_not_depend_on_the_batch_size(models, model, sampler):
    config = Sample(teacher=models[model], num_images=13, steps=4, sampler=sampler, guidance=1.5)
    teacher = load_teacher(config.teacher)
    labels = sample.asked_labels(config, teacher)
    assert labels.tolist() == [number % 10 for number in range(13)]

    def images(batch_size, seed=0):
        parts = torch.arange(13).split(batch_size)
        return sample.draw(dataclasses.replace(config, seed=seed), teacher, parts, labels)

    one = images(13)
    for batch_size in (1, 4, 7):
        assert (images(batch_size) - one).abs().max() < 1e-5
    assert (images(13, seed=1) - one).abs().amax((1, 2, 3)).min() > 0.1
    none = sample.draw(config, teacher, torch.arange(0).split(250), labels[:0])  # of a rank without images
    assert none.shape == (0, 1, 8, 8)


def on_ranks(number, config):
    """The script on some ranks: its whole file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number),
               str(ROOT / "train_scripts" / "sample.py")]  # fmt: skip
    for name in ("teacher", "out", "num_images", "batch_size", "steps"):
        command += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"images in {config.out}") == 1
    return config.out.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "num_images"), [("student", 5), ("teacher", 5), ("student", 1)])
def test_images_do_not_depend_on_the_ranks(models, tmp_path, model, num_images):
    """One image at a time, so that not even a rounding differs; and fewer images than ranks."""
    config = Sample(teacher=models[model], num_images=num_images, batch_size=1, steps=4, out=tmp_path / "a.npz")
    one = sample.main(config).read_bytes()
    assert on_ranks(2, dataclasses.replace(config, out=tmp_path / "b.npz")) == one


@pytest.mark.parametrize("classes", [(), (3, 7), (0,)])
def test_a_folder_of_pictures_is_data_again_with_its_labels(models, tmp_path, capsys, classes):
    config = Sample(teacher=models["teacher"], num_images=12, steps=2, classes=classes, out=tmp_path / "made")
    images = load_images(DataOptions(data=str(sample.main(config))))
    labels = sample.asked_labels(config, load_teacher(config.teacher))
    assert images.labels.tolist() == labels.tolist(), "in the order of metadata.jsonl"
    assert images.class_names == tuple(str(number) for number in range(int(labels.max()) + 1))
    with Image.open(tmp_path / "made.grid.png") as picture:
        assert (picture.mode, picture.size) == ("L", (91, 19))
    assert f"12 images in {config.out}" in capsys.readouterr().out
    arrays = load_images(DataOptions(data=str(sample.main(dataclasses.replace(config, out=tmp_path / "b.npz")))))
    assert arrays.labels.tolist() == labels.tolist()
    assert (tmp_path / "b.npz.grid.png").read_bytes() == (tmp_path / "made.grid.png").read_bytes()


def test_sampling_again_replaces_the_older_samples_whole(models, tmp_path, monkeypatch):
    config = Sample(teacher=models["teacher"], num_images=12, steps=2, out=tmp_path / "made")
    sample.main(config)
    sample.main(dataclasses.replace(config, num_images=4, classes=(3,)))
    files = sorted(path.relative_to(config.out).as_posix() for path in config.out.rglob("*.png"))
    assert files == [f"0003/{number:06d}.png" for number in range(4)]

    def killed(pixels):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "to_picture", killed)
    with pytest.raises(KeyboardInterrupt):
        sample.main(config)
    assert sorted(path.relative_to(config.out).as_posix() for path in config.out.rglob("*.png")) == files


def test_a_file_of_someone_else_is_kept_and_one_of_ours_replaced(models, tmp_path):
    config = Sample(teacher=models["teacher"], num_images=2, steps=2, out=tmp_path / "a.npz")
    before = np.load(sample.main(config))["images"]
    assert np.array_equal(np.load(sample.main(config))["images"], before)
    with np.load(config.out) as held:
        np.savez(tmp_path / "mine.npz", thesis=np.arange(3), **held)
    (tmp_path / "other.npz").write_text("mine")
    for name in ("mine.npz", "other.npz"):
        with refused("that no earlier sampling wrote"):
            sample.main(dataclasses.replace(config, out=tmp_path / name))
    own = tmp_path / "figures.json"
    figures = Evaluate(generated="a", reference="b", features=tmp_path, out=own, device="cpu")
    check_evaluate(figures)
    (tmp_path / "figures.json").write_text('{"features": "a", "num_generated": 1, "frechet_distance": 2}')
    check_evaluate(figures)
    (tmp_path / "figures.json").write_text('{"my": "work"}')
    with refused("what no earlier evaluation wrote"):
        check_evaluate(figures)


@pytest.mark.parametrize("out", ["loop", "loop/x", "x" * 250, "x" * 250 + ".npz"])
def test_a_place_that_cannot_be_is_refused_before_anything_is_drawn(tmp_path, out):
    (tmp_path / "loop").symlink_to("loop")
    with refused("--out .* cannot be written: .* Choose another --out"):
        sample.main(Sample(teacher="nowhere", out=tmp_path / out))


@pytest.mark.parametrize("other", ["notes.txt", "cat/000001.png", "0001/1.png", "0001/a.txt", "grid.png", None])
def test_a_folder_of_anything_else_is_refused_and_kept(models, tmp_path, other):
    out = tmp_path / "made"
    path = out if other is None else out / other
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with refused(r"--out .* (no earlier sample|is a file)"):
        sample.main(Sample(teacher=models["teacher"], num_images=2, steps=2, out=out))
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("changes", "message"), [
    ({"classes": (10,)}, r"--classes must lie in \[0, 9\]"), ({"num_images": 0}, "--num-images must be above 0"),
    ({"guidance": -1.0}, "--guidance must be at least 0"), ({"num_images": 2**31}, r"--num-images must be below"),
])  # fmt: skip
def test_impossible_requests_are_refused(models, tmp_path, changes, message):
    with refused(message):
        sample.main(Sample(**{"teacher": models["teacher"], "out": tmp_path / "x", **changes}))
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


def test_figures_agree_with_torchmetrics_on_the_same_features(sets):
    figures = figures_of(sets, batch_size=50)
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


def figures_of(sets, **changes):
    config = {"generated": str(sets / "made.npz"), "reference": str(sets / "real.npz")}
    out = sets / "figures.json"
    evaluate.main(Evaluate(**{**config, "features": sets / "features", "out": out, **changes}))
    return json.loads(out.read_text())


def test_some_images_are_drawn_from_all_classes(tmp_path, capsys):
    """Sets are sorted by class: of equal sets half of the images must not be half of the classes."""
    bright = np.linspace(0, 255, 400).repeat(64).reshape(400, 1, 8, 8).astype(np.uint8)
    for name in ("made", "real"):
        np.savez(tmp_path / f"{name}.npz", images=bright, labels=np.arange(400) // 100)
    torch.manual_seed(0)
    save_classifier(Classifier(Facts(1, 8, 4, num_features=24)).eval(), tmp_path / "features")
    whole, part = figures_of(tmp_path), figures_of(tmp_path, num_images=200)
    assert part["num_generated"] == part["num_reference"] == 200
    assert part["floor_frechet_distance"] == pytest.approx(whole["floor_frechet_distance"], abs=0.01)
    half = figures_of(tmp_path, num_images=200, reference=str(halved(tmp_path)))
    assert half["frechet_distance"] > 10 * part["floor_frechet_distance"], "the first half is another set"
    assert f"figures in {tmp_path / 'figures.json'}" in capsys.readouterr().out


def halved(folder):
    with np.load(folder / "real.npz") as file:
        np.savez(folder / "half.npz", images=file["images"][:200], labels=file["labels"][:200])
    return folder / "half.npz"


@pytest.mark.parametrize(("names", "known", "numbers"), [
    (("a", "b"), ("a", "b"), [0, 1]), (("b", "c"), ("a", "b", "c"), [1, 2]), (("b", "a"), ("a", "b"), [1, 0]),
    (("0", "1"), ("a", "b", "c"), [0, 1]), (("0", "1"), ("0", "1"), [0, 1]), (("2", "7"), ("2", "5", "7"), [0, 2]),
    (("0", "1", "2"), ("a", "b"), None), (("a", "x"), ("a", "b"), None), (("3", "4"), ("a", "b", "c"), None),
])  # fmt: skip
def test_classes_are_matched_by_name_or_else_by_number(names, known, numbers):
    matched = evaluate.class_numbers(names, known)
    assert numbers is None if matched is None else matched.tolist() == numbers


def test_accuracy_is_that_of_the_classes_meant(tmp_path):
    """Brightness is the class; the classifier knows it by names that a set numbers otherwise."""
    network = Classifier(Facts(1, 8, 3, num_features=1, class_names=("dark", "grey", "light"))).eval()
    network.features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
    with torch.no_grad():
        network.features[1].weight.fill_(1 / 64)
        network.features[1].bias.zero_()
        network.logits.weight.copy_(torch.tensor([[-2.0], [0.0], [2.0]]))
        network.logits.bias.copy_(torch.tensor([-1.0, 0.0, -1.0]))

    def accuracy(labels, names):
        shades = torch.tensor([-1.0, 0.0, 1.0])[[0, 1, 2, 2]].view(4, 1, 1, 1).expand(4, 1, 8, 8)
        images = ImageSet(shades, torch.tensor(labels), names, 8)
        config = Evaluate(generated="", reference="", features=tmp_path, device="cpu")
        return evaluate.accuracy(network, shades.mean((1, 2, 3))[:, None], images, config)

    assert accuracy([0, 1, 2, 2], ("0", "1", "2")) == {"accuracy": 1.0}
    assert accuracy([1, 0, 2, 2], ("grey", "dark", "light")) == {"accuracy": 1.0}
    assert accuracy([0, 0, 1, 1], ("grey", "light")) == {"accuracy": 0.75}
    said = accuracy([0, 1, 2, 2], ("a", "b", "c"))
    assert list(said) == ["accuracy_left_out"]
    assert "a, b, c" in said["accuracy_left_out"]
    assert "dark, grey, light" in said["accuracy_left_out"]


def test_a_classifier_keeps_the_names_of_its_classes(tmp_path):
    for name in ("cat", "dog"):
        for number in range(15):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number).save(tmp_path / "data" / name / f"{number}.png")
    config = TrainFeatures(data=str(tmp_path / "data"), out=tmp_path / "features", steps=1, batch_size=4)
    assert load_classifier(train_features.main(config)).facts.class_names == ("cat", "dog")
    path = tmp_path / "features" / "features.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in description.items() if name != "class_names"}))
    assert load_classifier(tmp_path / "features").facts.class_names == (), "a folder of an earlier version"


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_images": 0}, "--num-images must be at least 2"), ({"num_images": -3}, "must be at least 2, .* got -3"),
    ({"num_images": 121}, "--num-images 121 .* holds 120"), ({"device": "foo"}, "--device foo cannot be used"),
    ({"device": "meta"}, "--device meta cannot be used"),
    ({"device": f"cuda:{torch.cuda.device_count()}"}, "--device cuda:. cannot be used"),
    ({"features": Path("no/features")}, "folder of `scorefield features`, or torch-fidelity's file"),
    ({"out": Path("/dev/null/figures.json")}, "cannot write to --out"), ({"out": Path("/")}, "/ is a folder"),
])  # fmt: skip
def test_figures_that_cannot_be_made_are_refused_before_any_computing(sets, monkeypatch, changes, message):
    monkeypatch.setattr(evaluate, "extract_features", lambda *args: pytest.fail("computed"))
    with refused(message):
        figures_of(sets, **changes)


class Code:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("content", [
    b"", b"junk", pickle.dumps([1]), pickle.dumps(Code()), b"PK\x03\x04cut", {"fc.weight": torch.zeros(2)}, [1],
    {"fc.weight": "text"},
], ids=["empty", "junk", "pickle", "code", "zip", "other network", "list", "text"])  # fmt: skip
def test_files_that_are_no_inception_weights_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with refused(r"weights\.pth is no file of InceptionV3 weights"):
        evaluate.load_features(path, "cpu")
    assert not (tmp_path / "ran").exists()


def test_inception_moves_to_the_device_and_takes_both_sets_at_one_size(tmp_path, monkeypatch):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as patch:  # its shapes with values of our own, instead of a download
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **named: None)
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda self, held: None)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *to: (moved.append(to), self)[1])
    features, classifier = evaluate.load_features(tmp_path / "weights.pth", "cpu")
    assert classifier is None
    assert ("cpu",) in moved
    assert features(torch.zeros(1, 1, 8, 8)).shape == (1, 2048)
    for name, side in (("made", 16), ("real", 12)):
        np.savez(tmp_path / f"{name}.npz", images=np.zeros((4, 1, side, side), np.uint8))
    shapes = []
    monkeypatch.setattr(evaluate, "load_features", lambda *args: (None, None))
    monkeypatch.setattr(evaluate, "measure", lambda n, c, *sets: shapes.extend(s.shape for s in sets[:2]) or {})
    figures_of(tmp_path, features=tmp_path / "weights.pth")
    assert shapes == [(1, 12, 12), (1, 12, 12)]


def test_features_are_learned_saved_and_loaded(tmp_path):
    with refused("--device foo cannot be used here"):
        train_features.main(TrainFeatures(out=tmp_path / "features", device="foo"))
    assert not (tmp_path / "features").exists()
    config = TrainFeatures(out=tmp_path / "features", steps=150, batch_size=64)
    network = load_classifier(train_features.main(config))
    assert network.facts.accuracy > 0.9
    assert network.facts.num_classes == 10


@pytest.mark.parametrize(("name", "content"), [
    ("features.json", None), ("features.json", "[]"), ("features.json", '{"format": "x"}'),
    ("model.safetensors", "cut"), ("features.json", ["only one"]),
])  # fmt: skip
def test_what_is_no_classifier_is_refused(sets, tmp_path, name, content):
    folder = shutil.copytree(sets / "features", tmp_path / "features")
    if content is None:
        (folder / name).unlink()
    elif isinstance(content, str):
        (folder / name).write_text(content)
    else:
        edit(folder / name, class_names=content)
    with refused(r"holds no classifier of `scorefield features`"):
        load_classifier(folder)
