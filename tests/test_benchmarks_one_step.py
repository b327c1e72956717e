"""benchmarks/one_step.py on a tiny teacher: every cell once, equal passes, nothing made twice."""

import json
from dataclasses import replace

import numpy as np
import one_step
import pytest
import torch
from refusals import refused

import distill.recipe
import scorefield.commands.teacher as train_teacher
from scorefield.commands.options import TrainTeacher
from scorefield.models.teacher import load_teacher
from scorefield.training.features import Classifier, Facts, save_classifier


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    out = tmp_path_factory.mktemp("table")
    folder = train_teacher.main(TrainTeacher(out=out / "run", steps=2, batch_size=16, width=16, depth=1))
    torch.manual_seed(0)
    save_classifier(Classifier(Facts(1, 8, 4, num_features=4)).eval(), out / "features")
    images = np.random.RandomState(0).randint(0, 256, (40, 1, 8, 8)).astype(np.uint8)
    np.savez(out / "real.npz", images=images, labels=np.arange(40) % 4)
    return one_step.Config(
        teacher=str(folder), reference=str(out / "real.npz"), features=out / "features", num_images=20,
        methods=("consistency", "dmd"), num_steps=(1,), seeds=(0, 1), calls=(1, 2), out=out / "made", device="cpu",
    )  # fmt: skip


def test_cells_are_made_once_and_the_table_is_their_mean(config, monkeypatch):
    asked = []

    def tiny(student):
        asked.append((student.method, student.seed))
        settings = {"steps": 2, "batch_size": 4, "guard_images": 0, "num_pairs": 4, "pair_steps": 2, "points": 4}
        if student.method == "dmd":
            settings |= {
                "student_every": 1,
                "fake_warmup": 0,
                "warmup_lr": 1e-3,
                "fake_lr": 1e-3,
                "warmup_steps": 1,
            }
        return real(replace(student, student_lr=1e-3, **settings))

    real = distill.recipe.main
    monkeypatch.setattr(distill.recipe, "main", tiny)
    table = json.loads((one_step.main(config) / "table.json").read_text())
    assert asked == [("consistency", 0), ("dmd", 0), ("consistency", 1), ("dmd", 1)]
    assert table["students"].keys() == {"consistency 1", "dmd 1"}
    values = list(table["students"]["dmd 1"].values())
    assert f"| dmd | {sum(values) / 2:.2f} (" in (config.out / "table.md").read_text()
    assert table["teacher"].keys() == {"1", "2"}
    one_step.main(config)
    assert len(asked) == 4, "all are there"
    with refused("was measured with other values of passes"):
        one_step.main(replace(config, passes=2e6))


def test_all_methods_have_the_same_passes(config):
    teacher = load_teacher(config.teacher)
    for method in ("dmd", "sid", "f-distill", "diff-instruct", "consistency", "scm", "progressive"):
        student = one_step.student_config(config, method, 1, 0, teacher)
        paid = student.steps * student.batch_size * one_step.cost(student)
        pairs = 512 if method in ("consistency", "scm", "progressive") else 2512
        assert paid + pairs * 16 == pytest.approx(1e6, rel=1e-3)
    plain = replace(student, method="dmd", gan_weight=0.0, student_every=5)
    # Five iterations: four images, five updates of the fake score, one of the student with two answers and the
    # regression, and twenty updates of warm-up on pairs of 16 passes.
    assert 5 * one_step.cost(plain) == pytest.approx(4 + 15 + 3 + 2 + 3 + 20 * (3 + 16 / 20))


def test_nothing_to_do_is_refused(config):
    with refused("--methods and --seeds must name at least one."):
        one_step.check(replace(config, seeds=()))
