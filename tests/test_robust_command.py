"""``scorefield robust``: files, mixtures, classes, refusals, AutoAttack, and what `attack` reads of it."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from folders import assert_same, tensors
from PIL import Image
from ranks import run_on_ranks

import attack.autoattack as adapter
import attack.robust_recipe as recipe
import scorefield.cli as cli
from attack.networks import load_classifier
from attack.pgd import PGD
from attack.robust_options import PRESETS, Robust
from attack.robust_report import radii
from attack.threat import Threat
from toyworld.digits import held_out_images

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "steps": 4, "batch_size": 16, "width": 4, "attack_steps": 2, "test_steps": 2, "save_every": 2, "epsilon": 25.5,
    "report_to": ("none",),
}  # fmt: skip
BRIEF = ["--batch-size", "16", "--width", "4", "--attack-steps", "2", "--test-steps", "2", "--report-to", "none"]
WORDS = ["--steps", "4", *BRIEF]

MINE = """
    import torch
    from torch import nn

    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def normalised():
        return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))

    def even():
        return lambda images: torch.nn.functional.one_hot(2 * (images.sum((1, 2, 3)).long() % 5), 10).float()

    def five():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def number():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(0), nn.Unflatten(1, (5, 2)))

    def not_finite():
        network = five()
        nn.init.constant_(network[1].bias, float("nan"))
        return network

    def frozen():
        return five().requires_grad_(False)

    def function():
        return lambda images: images.flatten(1)

    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, images):
            with torch.no_grad():
                return self.inner(images)

    def blind():
        return Blind()

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = network(), 0

        def forward(self, images):
            self.calls += 1
            return self.inner(images) * (float("nan") if self.calls > 30 else 1)

    def late():
        return Late()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Images that were generated, with and without labels, and functions of the user."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    random = np.random.RandomState(0)
    images = random.randint(0, 255, (30, 1, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "made.npz", images=images, labels=np.arange(30) % 10)
    np.savez(tmp_path / "unlabelled.npz", images=images)
    np.savez(tmp_path / "beyond.npz", images=images, labels=np.arange(30) % 12)
    np.savez(tmp_path / "few.npz", images=images[:12], labels=np.arange(12) % 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    AcceleratorState._reset_state(True)
    cli.main(["robust", *map(str, words)])


def train(out, **changes):
    AcceleratorState._reset_state(True)
    return recipe.main(Robust(**{**TINY, "out": Path(out), **changes}))


def report(out="runs/robust"):
    return json.loads((Path(out) / "report.json").read_text())


def test_a_run_leaves_a_classifier_figures_and_pictures_that_agree(place):
    run("digits", *WORDS, "--test-epsilon", 10, "--eval-every", 2)
    found = report()
    assert [point["epsilon"] for point in found["curve"]] == [0, 10, 25.5]
    assert (found["num_images"], found["attack"], found["epsilon"]) == (597, "PGD-2 x 2", 25.5)
    network = load_classifier(Path("runs/robust/classifier"))
    held = held_out_images()
    images, right = (held.images + 1) / 2, []
    right.append(network(images).argmax(1) == held.labels)
    assert found["accuracy"] == found["curve"][0]["accuracy"] == pytest.approx(float(right[0].double().mean()))
    attack = PGD(threat=Threat(0.1), step_size=2.5 * 0.1 / 2, num_steps=2, num_restarts=2)
    made = attack(network, images, held.labels, generator=torch.Generator().manual_seed(0))
    share = float((right[0] & (network(made).argmax(1) == held.labels)).double().mean())
    assert found["robust_accuracy"] == found["curve"][2]["accuracy"] == pytest.approx(share, abs=0.03)
    assert found["curve"][2]["accuracy"] <= found["curve"][1]["accuracy"] <= found["accuracy"]
    with Image.open("runs/robust/images.png") as picture:
        assert picture.size == (8 * 10 + 2, 3 * 10 + 2)
    facts = json.loads(Path("runs/robust/classifier/classifier.json").read_text())
    assert facts["training"] == {"loss": "pgd", "epsilon": 25.5, "norm": "linf", "steps": 4, "seed": 0}
    assert sorted(path.name for path in Path("runs/robust/classifier").iterdir() if path.name[0] != ".") == [
        "classifier.json",
        "model.safetensors",
    ]
    assert Path("runs/robust/report.html").exists()


def test_attack_reads_what_robust_wrote(place):
    run("digits", *WORDS)
    brief = ["--methods", "pgd", "--steps", "2", "--device", "cpu", "--num-images", "597"]
    cli.main(["attack", "--classifier", "runs/robust/classifier", "--data", "digits", *brief, "--out", "attacked"])
    found = json.loads((place / "attacked/figures.json").read_text())
    assert found["clean"]["num_images"] == 597
    assert found["clean"]["accuracy"] == report()["accuracy"]
    cli.main(["attack", "--classifier", "mine:network", "--transfer", "runs/robust/classifier", "--data", "digits",
              "--methods", "fgsm", "--num-images", "20", "--device", "cpu", "--out", "moved"])  # fmt: skip
    assert json.loads((place / "moved/figures.json").read_text())["fgsm 8"]["transfer"].keys() == {
        "runs/robust/classifier"
    }


def test_what_is_measured_may_change_on_a_finished_run_and_what_was_learned_may_not(place, capsys):
    train("run")
    weights = tensors(place / "run/classifier")
    train("run", test_restarts=1, test_epsilon=(5.0, 30.0))
    assert [point["epsilon"] for point in report("run")["curve"]] == [0, 5, 25.5, 30]
    assert_same(weights, tensors(place / "run/classifier"))
    with pytest.raises(ValueError, match=r"belongs to another config \(.*epsilon: 25.5 there, 8.0 now"):
        train("run", epsilon=8.0)


def test_plain_training_has_no_attack_and_a_curve_only_if_it_is_asked_for(place):
    train("plain", epsilon=0.0)
    found = report("plain")
    assert (found["robust_accuracy"], [point["epsilon"] for point in found["curve"]]) == (None, [0])
    train("plain", epsilon=0.0, test_epsilon=(20.0,))
    assert [point["epsilon"] for point in report("plain")["curve"]] == [0, 20]
    assert radii(PRESETS["digits"]()) == [12.75, 25.5, 38.25, 51.0]


def seen_by(monkeypatch):
    """The batches that a run learns from."""
    batches, real = [], recipe.pgd_loss

    def loss(network, images, labels, **options):
        batches.append((images, labels))
        return real(network, images, labels, **options)

    monkeypatch.setattr(recipe, "pgd_loss", loss)
    return batches


def test_generated_images_are_learned_with_their_labels_or_with_a_classifiers(place, monkeypatch):
    batches = seen_by(monkeypatch)
    with np.load("made.npz") as arrays:
        made = {
            image.tobytes(): int(label) for image, label in zip(arrays["images"], arrays["labels"], strict=True)
        }
    for name, pseudo in (("labelled", ""), ("answered", "mine:even")):
        batches.clear()
        train(name, generated="made.npz", mix=0.25, pseudo_label=pseudo)
        for images, labels in batches:
            keys = [(255 * image).round().to(torch.uint8).numpy().tobytes() for image in images]
            generated = [key in made for key in keys]
            assert generated == [False] * 12 + [True] * 4, "exactly a quarter of each batch"
            answers = labels[12:].tolist()
            assert (answers == [made[key] for key in keys[12:]]) == (not pseudo)
            assert not pseudo or all(answer % 2 == 0 for answer in answers)
    train("unlabelled", generated="unlabelled.npz", mix=1.0, pseudo_label="labelled/classifier")
    assert len(batches[-1][0]) == 16


def test_names_of_classes_are_looked_up(place):
    """A folder of generated images that lacks a class would be numbered otherwise."""
    for folder, names in (("real", "abcd"), ("made", "bd"), ("wrong", "bx")):
        for number, name in enumerate(names * 8):
            (place / folder / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 60 * "abcdx".index(name)).save(place / folder / name / f"{number}.png")
    config = Robust(**TINY, data="real", generated="made")
    parts = recipe.load(config)
    generated = parts.mixture.generated
    assert generated.class_names == ("a", "b", "c", "d")
    assert torch.equal(generated.labels, generated.images[:, 0, 0, 0].long() // 60)
    assert (len(parts.mixture.real), len(parts.held_out)) == (29, 3)
    assert parts.facts.class_names == ("a", "b", "c", "d")
    rows = recipe.load(config)
    assert rows.held_out.identity() == parts.held_out.identity(), "always the same tenth"
    np.savez("numbered.npz", images=np.zeros((8, 1, 8, 8), np.uint8), labels=np.arange(8) % 4)
    numbered = recipe.load(replace(config, generated="numbered.npz")).mixture.generated
    assert numbered.labels.tolist() == [0, 1, 2, 3] * 2
    with pytest.raises(ValueError, match=r"--generated has the class 'x', and --data has a, b, c, d\."):
        recipe.load(replace(config, generated="wrong"))


@pytest.mark.parametrize(("words", "message"), [
    (["--classifier", "mine:five"], "answers 5 classes, and --data has 10"),
    (["--classifier", "mine:number"], "must return finite logits (b, classes)"),
    (["--classifier", "mine:not_finite"], "must return finite logits (b, classes)"),
    (["--classifier", "mine:function"], "a torch.nn.Module with parameters that learn; got a function"),
    (["--classifier", "mine:frozen"], "a torch.nn.Module with parameters that learn; got a Sequential"),
    (["--classifier", "mine:blind"], "gives no gradient to its images"),
    (["--classifier", "mine:absent"], "mine:absent: no such function"),
    (["--generated", "unlabelled.npz"], "--generated unlabelled.npz has no labels. Label them, or pass"),
    (["--generated", "beyond.npz"], "--generated has the class '10', and --data has 10 classes, from 0"),
    (["--generated", "made.npz", "--pseudo-label", "mine:five"], "--pseudo-label mine:five answers 5 classes"),
    (["--generated", "made.npz", "--pseudo-label", "absent"], "absent holds no classifier of `scorefield robust`"),
    (["--generated", "absent.npz"], "absent.npz"),
    (["--held-out", "unlabelled.npz"], "--held-out unlabelled.npz has no labels. Label them."),
    (["--held-out", "beyond.npz"], "--held-out has the class '10'"),
    (["--data", "unlabelled.npz"], "--data unlabelled.npz has no classes, and a classifier learns them"),
    (["--data", "few.npz"], "--data has 12 images, and a tenth of them measures nothing"),
    (["--size", "16"], "the digits are 8 x 8 and grey"),
    (["--depth", "9"], "a cnn of depth 9 halves images 8 times"),
    (["--width", "99999"], "width must be a whole number in [1, 16384]"),
    (["--gradient-checkpointing", "--dry-run"], "--gradient-checkpointing: --network cnn cannot recompute"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(place, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run("digits", *words)
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert not (place / "runs").exists()


def test_a_dry_run_says_what_each_batch_holds(place, capsys):
    run("digits", "--generated", "made.npz", "--mix", 0.3, "--batch-size", 10, "--attack-steps", 3, "--dry-run")
    said = capsys.readouterr().out
    assert "images: 900 real, 30 generated, 597 to measure with" in said
    assert "each batch has 7 real and 3 generated ones, attacked in 3 steps" in said
    assert not (place / "runs").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_1(place, capsys):
    with pytest.raises(SystemExit) as stop:
        run("digits", *BRIEF, "--classifier", "mine:late", "--steps", 40)
    assert stop.value.code == 1
    assert "finite" in capsys.readouterr().err
    assert not Path("runs/robust/classifier").exists()


def test_a_network_of_the_user_is_saved_as_weights_that_no_folder_runs(place, capsys):
    run("digits", *WORDS, "--classifier", "mine:normalised", "--attack-mode", "train", "--loss", "trades")
    facts = json.loads(Path("runs/robust/classifier/classifier.json").read_text())
    assert facts["network"] == "function"
    assert "mine" not in json.dumps(facts)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["attack", "--classifier", "runs/robust/classifier", "--data", "digits", "--methods", "pgd"])
    assert stop.value.code == 2
    assert "its owner's code builds, which no folder can name" in capsys.readouterr().err


# AutoAttack.


def test_without_a_package_autoattack_says_what_to_install(place, monkeypatch, capsys):
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"AutoAttack needs a package: pip install git\+https"):
        adapter.available()
    monkeypatch.setattr("attack.robust_options.find_spec", lambda name: None)
    monkeypatch.setattr("attack.options.find_spec", lambda name: None)
    for words in (["robust", "digits", "--autoattack"],
                  ["attack", "--methods", "autoattack", "--classifier", "a:b", "--data", "digits"]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 2
        assert "AutoAttack needs a package: pip install" in capsys.readouterr().err


class Official:
    """What the official package is called with."""

    def __init__(self, model, norm, eps, version, seed, device, verbose):
        self.model, self.eps = model, eps
        assert (norm, version, seed, device) == ("Linf", "standard", 3, "cpu")

    def run_standard_evaluation(self, images, labels, bs):
        torch.manual_seed(99)
        assert bs == 7
        return (images + self.eps).clamp(0, 1)


@pytest.mark.parametrize("name", ["autoattack", "torchattacks"])
def test_the_adapter_calls_either_package_and_says_which(monkeypatch, name):
    module = type(sys)(name)
    module.AutoAttack = Official
    if name == "torchattacks":

        def theirs(model, norm, eps, version, n_classes, seed):
            assert (norm, version, n_classes, seed) == ("Linf", "standard", 5, 3)
            assert next(model.parameters()).device.type == "cpu"
            return lambda images, labels: (images + eps).clamp(0, 1)

        module.AutoAttack = theirs
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(adapter, "find_spec", lambda asked: asked if asked == name else None)
    monkeypatch.setattr(adapter.metadata, "version", lambda asked: "9.9")
    images, labels = 0.4 * torch.rand(20, 1, 4, 4), torch.arange(20) % 5
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5)).train()
    before = torch.get_rng_state()
    found = adapter.autoattack(network, images, labels, threat=Threat(0.25), seed=3, batch_size=7)
    torch.testing.assert_close(found.images, images + 0.25)
    assert found.package == f"{name} 9.9"
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training
    few = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    with pytest.raises(ValueError, match="needs at least 4 classes; the classifier has 3"):
        adapter.autoattack(few, images, labels % 3, threat=Threat(0.25))


@pytest.mark.slow
def test_autoattack_of_torchattacks_is_within_two_points_of_our_pgd(place):
    pytest.importorskip("torchattacks", reason="torchattacks is not installed")
    brief = {
        "steps": 300,
        "width": 8,
        "attack_steps": 5,
        "batch_size": 64,
        "learning_rate": 5e-3,
        "test_steps": 40,
    }
    train("run", **brief, autoattack=True)
    found = report("run")
    assert found["autoattack"]["package"].startswith("torchattacks ")
    assert found["accuracy"] > 0.9
    assert found["robust_accuracy"] > 0.6
    assert abs(found["autoattack"]["accuracy"] - found["robust_accuracy"]) <= 0.02


# Ranks and kills; tests/test_kills.py kills this command many times more.


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["", "mine:normalised"])
def test_two_ranks_learn_what_one_learns_that_accumulates(place, classifier):
    """Without a random start, which is each rank's own."""
    brief = {"batch_size": 8, "random_start": False, "classifier": classifier, "loss": "pgd"}

    def on_a_rank(accelerator):
        recipe.main(Robust(**{**TINY, **brief, "out": place / "two"}))
        return {"ended": True}

    run_on_ranks(on_a_rank, place)
    if classifier:  # statistics of a batch, and dropout, are each rank's own
        return
    train("one", **brief, accumulate=2)
    one, two = (tensors(place / name / "classifier") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
    assert report("one")["accuracy"] == report("two")["accuracy"]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_in_the_same_bytes(place):
    """The console command, by SIGKILL as a kernel sends it, after its second checkpoint."""
    words = [sys.executable, "-m", "scorefield", "robust", "digits", *BRIEF, "--loss", "trades"]
    words += ["--steps", "60", "--save-every", "10"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "PATH": "/usr/bin"}
    options = {"cwd": place, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*words, "--out", "whole"], check=True, timeout=300, **options)
    process = subprocess.Popen([*words, "--out", "cut"], **options)
    while not (place / "cut/checkpoints/step-000000020").exists():
        assert process.poll() is None
    process.kill()
    process.wait(timeout=60)
    assert not (place / "cut/classifier").exists()
    subprocess.run([*words, "--out", "cut"], check=True, timeout=300, **options)
    for name in ("classifier/model.safetensors", "classifier/classifier.json", "report.json", "images.png"):
        assert (place / "whole" / name).read_bytes() == (place / "cut" / name).read_bytes(), name
