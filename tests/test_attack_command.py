"""``scorefield attack``: figures, files, regions, targets, one result for any batch, refusals."""

import json
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

import scorefield.cli as cli

MINE = """
    import torch
    from torch import nn
    from scorefield import GaussianMixture, NetworkDenoiser, VariancePreserving
    from scorefield.models.teacher import Teacher

    SCHEDULE = VariancePreserving.linear()

    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixture = GaussianMixture(torch.zeros(1, 1, 8, 8), torch.tensor([0.4]), torch.ones(1), SCHEDULE)

        def forward(self, x_t, t):
            return self.mixture(x_t, t, {})

    def teacher():
        return Teacher(NetworkDenoiser(Exact(), SCHEDULE, "x0"), (1, 8, 8))

    def classifier():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def other():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def large():
        return nn.Sequential(nn.Flatten(), nn.Linear(100, 5))

    def two_numbers():
        return lambda images: images[:, 0, 0, 0]

    def nothing():
        return None

    def blind():
        inner = classifier()

        def answer(images):
            with torch.no_grad():
                return inner(images)

        return answer

    def whole_numbers():
        inner = classifier()
        return lambda images: (1000 * inner(images)).long()

    def in_place():
        inner = classifier()
        return lambda images: inner(images.sub_(0.5))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    random = np.random.RandomState(0)
    images = random.randint(80, 176, (6, 1, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.array([0, 1, 2, 3, 4, 0]))
    np.savez(tmp_path / "unlabelled.npz", images=images)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, classifier="mine:classifier", data="data.npz", device="cpu"):
    cli.main(["attack", "--classifier", classifier, "--data", data, "--device", device, *map(str, words)])


def figures(place, out="runs/attack"):
    return json.loads((place / out / "figures.json").read_text())


def test_figures_images_and_a_picture_are_written(place):
    run("--teacher", "mine:teacher", "--methods", "fgsm", "pgd", "diff-pgd", "--epsilon", 8, 32, "--draws", 2,
        "--steps", 4, "--transfer", "mine:other", "--evaluations", 3, "--data", "unlabelled.npz")  # fmt: skip
    found = figures(place)
    assert found["settings"]["labels"] == "the classifier's answers"
    assert found["clean"]["accuracy"] == 1, "they are its own answers"
    assert found["clean"].keys() >= {"purified_accuracy", "purified_error", "off_manifold", "flags"}
    assert found["pgd 32"]["success"] >= found["pgd 8"]["success"]
    assert found["pgd 32"]["success"] == 1
    for name in ("fgsm 8", "pgd 8", "diff-pgd 32"):
        assert found[name]["within_ball"]
        assert found[name]["transfer"].keys() == {"mine:other"}
        assert found[name]["num_draws"] == 3
    assert found["pgd 8"]["linf_max"] == pytest.approx(8 / 255, abs=1e-6)
    assert "within_ball" not in found["diff-pgd 8 realistic"]
    assert found["settings"]["times"] == [99.0, 49.0]
    with np.load(place / "runs/attack/adversarial.npz") as arrays:
        assert arrays["diff-pgd_8_realistic"].shape == arrays["images"].shape == (6, 1, 8, 8)
        assert arrays["pgd_8"].dtype == np.float32
    with Image.open(place / "runs/attack/images.png") as picture:
        assert picture.size == (6 * 10 + 2, 17 * 10 + 2), "clean ones, and eight results with their changes"
    run("--methods", "pgd")  # without a teacher; it replaces what it wrote
    assert figures(place).keys() == {"clean", "pgd 8", "settings"}


def test_the_result_does_not_depend_on_the_batch_and_stays_in_its_region(place):
    words = ("--teacher", "mine:teacher", "--draws", 2, "--steps", 3, "--region", 0.5, 0, 1, 0.5, "--restarts", 2)
    held = []
    for batch_size in (2, 6):
        run(*words, "--batch-size", batch_size, "--out", f"of{batch_size}")
        with np.load(place / f"of{batch_size}/adversarial.npz") as arrays:
            held.append({name: arrays[name] for name in arrays.files})
    for name, images in held[0].items():
        np.testing.assert_allclose(images, held[1][name], atol=1e-6, err_msg=name)
        changed = np.ones((8, 8), bool)
        changed[:4, 4:] = False
        if images.ndim == 4:
            assert (images == held[0]["images"])[:, :, changed].all(), name
    assert (held[0]["pgd_8"] != held[0]["images"]).any()


def test_a_target_is_a_number_of_the_classifier_and_images_of_it_are_left_out(place):
    run("--methods", "pgd", "--epsilon", 64, "--target", 0, "--steps", 20)
    found = figures(place)
    assert found["clean"]["num_images"] == 4
    with np.load(place / "runs/attack/adversarial.npz") as arrays:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
        answers = network(torch.from_numpy(arrays["pgd_64"])).argmax(1)
    assert (answers == 0).all()


@pytest.mark.parametrize(("words", "message"), [
    (["--methods", "diff-pgd"], "--methods diff-pgd goes through a purification. Pass --teacher"),
    (["--methods", "pgd", "--purify-prompt", "a"], "--purify-prompt is for a text-to-image --teacher; got none"),
    (["--methods", "pgd", "--classifier", "mine:large"], "does not take images (1, 8, 8) in [0, 1]"),
    (["--methods", "pgd", "--classifier", "mine:two_numbers"], "must return finite logits (b, classes)"),
    (["--methods", "pgd", "--classifier", "mine:blind"], "mine:blind gives no gradient to its images"),
    (["--methods", "pgd", "--classifier", "mine:whole_numbers"], "mine:whole_numbers gives no gradient"),
    (["--methods", "pgd", "--classifier", "mine:in_place"], "--classifier mine:in_place writes into its images"),
    (["--methods", "pgd", "--transfer", "mine:in_place"], "--transfer mine:in_place writes into its images"),
    (["--methods", "pgd", "--transfer", "mine:large"], "--transfer mine:large does not take images"),
    (["--teacher", "mine:teacher", "--strength", "1e-9"], "--purify-steps 2 do not go into --strength 1e-09: "),
    (["--methods", "pgd", "--classifier", "mine:nothing"], "must return a function from images to logits"),
    (["--methods", "pgd", "--classifier", "mine:absent"], "mine:absent: no such function"),
    (["--methods", "pgd", "--target", "7"], "--target must be a number below 5; got '7'"),
    (["--methods", "pgd", "--region", "0", "0", "0.01", "1"], "holds no pixel of 8 x 8"),
    (["--methods", "pgd", "--data", "absent.npz"], "absent.npz"),
    (["--teacher", "mine:teacher", "--data", "toyworld"], "Pass another --size, or a teacher of such images"),
    (["--teacher", "mine:teacher", "--purify-prompt", "a"], "takes no prompts; leave out --purify-prompt"),
    (["--teacher", "mine:teacher", "--purify-steps", "900"], "fewer than 900 distinct times"),
    (["--methods", "pgd", "--out", "mine.py"], "mine.py"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(place, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (place / "runs").exists()


def test_a_dry_run_counts_the_work_and_refuses_what_cannot_start(place, capsys):
    run("--teacher", "mine:teacher", "--epsilon", 4, 8, "--dry-run")
    said = capsys.readouterr().out
    assert '"epsilon": [' in said
    assert "6 images of (1, 8, 8), each attacked in 4 ways" in said
    with pytest.raises(SystemExit) as stop:
        run("--methods", "pgd", "--region", 0, 0, 0.01, 1, "--dry-run")
    assert stop.value.code == 2
    assert not (place / "runs").exists()


def test_labels_beyond_the_classes_are_refused(place, capsys):
    np.savez(place / "more.npz", images=np.zeros((3, 1, 8, 8), np.uint8), labels=np.array([0, 1, 7]))
    with pytest.raises(SystemExit) as stop:
        run("--methods", "pgd", data="more.npz")
    assert stop.value.code == 2
    assert "Number the labels as the classifier does" in capsys.readouterr().err


def test_the_judge_of_the_toy_world_is_attacked_on_renders(place):
    cli.main(["attack", "toyworld", "--teacher", "", "--methods", "pgd", "--num-images", "4", "--target", "mug",
              "--steps", "2", "--device", "cpu"])  # fmt: skip
    found = figures(place)
    assert found["clean"]["accuracy"] == 1
    assert found["pgd 8"]["linf_max"] <= 8 / 255 + 1e-6
