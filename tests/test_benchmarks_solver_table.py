"""benchmarks/solver_table.py on a tiny teacher: what is measured, what is not measured twice, what pays."""

import dataclasses
import json

import numpy as np
import pytest
import solver_table
import torch
from PIL import Image

import scorefield.commands.sample as sample
import scorefield.commands.teacher as train_teacher
from distill.student import Student, save_student
from scorefield.commands.options import Sample, TrainTeacher
from scorefield.metrics import frechet_distance
from scorefield.models.teacher import load_teacher
from scorefield.training.features import Classifier, Facts, save_classifier


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An untrained teacher of digits, a student of two steps, and features that nothing was taught."""
    out = tmp_path_factory.mktemp("table")
    folder = train_teacher.main(TrainTeacher(out=out / "run", steps=2, batch_size=16, width=16, depth=1))
    teacher = load_teacher(str(folder))
    save_student(Student(teacher.denoiser, (20.0, 1.0)), out / "student", teacher.facts)
    torch.manual_seed(0)
    save_classifier(Classifier(Facts(1, 8, 4, num_features=4)).eval(), out / "features")
    random = np.random.RandomState(0)
    np.savez(
        out / "real.npz", images=random.randint(0, 256, (40, 1, 8, 8)).astype(np.uint8), labels=np.arange(40) % 4
    )
    return solver_table.Config(
        teacher=str(folder), reference=str(out / "real.npz"), features=out / "features", num_images=20,
        students=(str(out / "student"),), calls=(1, 3), solvers=("ddim", "heun", "dpm++"),
        grids=("trailing", "log-snr"), out=out / "table", device="cpu",
    )  # fmt: skip


def test_cells_are_distances_of_what_sample_draws(config, monkeypatch):
    drawn = []
    draw = sample.draw
    monkeypatch.setattr(sample, "draw", lambda options, *rest: (drawn.append(options), draw(options, *rest))[1])
    table = json.loads((solver_table.main(config) / "table.json").read_text())
    assert set(table["cells"]) == {f"{a}, {b}" for a in config.solvers for b in config.grids}
    # One call is the same for all six rows; three calls are two steps of Heun.
    assert len(drawn) == 1 + 6 + 1
    assert len({cells["1"]["frechet"] for cells in table["cells"].values()}) == 1
    assert table["cells"]["heun, log-snr"]["3"]["calls"] == 3
    teacher = load_teacher(config.teacher)
    options = Sample(teacher=config.teacher, num_images=20, steps=3, sampler="dpm++", grid="log-snr", batch_size=7)
    made = draw(options, teacher, torch.arange(20).split(7), sample.asked_labels(options, teacher))
    pixels = ((made.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    features, classifier = solver_table.load_features(config.features, "cpu")
    reference = solver_table.reference_features(config, teacher, features, classifier)
    assert len(reference) == 20
    own = frechet_distance(features(pixels), reference)
    assert table["cells"]["dpm++, log-snr"]["3"]["frechet"] == pytest.approx(own, rel=1e-4)
    student = table["students"][config.students[0]]
    assert student["calls"] == 2
    assert student["frechet"] > 0
    text = (config.out / "table.md").read_text()
    assert "| dpm++, log-snr |" in text
    assert config.students[0] in text
    with Image.open(config.out / "table.png") as image:
        assert len(image.getcolors(maxcolors=10000)) > 4


def test_a_run_that_is_started_again_makes_only_what_is_missing(config, monkeypatch):
    before = json.loads((solver_table.main(config) / "table.json").read_text())
    drawn, draw = [], sample.draw
    monkeypatch.setattr(sample, "draw", lambda options, *rest: (drawn.append(options), draw(options, *rest))[1])
    path = config.out / "table.json"
    del before["cells"]["heun, trailing"]["3"]
    path.write_text(json.dumps(before))
    more = dataclasses.replace(config, calls=(1, 2, 3), solvers=("ddim", "heun"), grids=("trailing",))
    solver_table.main(more)
    # Heun in two calls is one step, and that is there.
    assert [(options.sampler, options.steps) for options in drawn] == [("ddim", 2), ("heun", 3)]
    after = json.loads(path.read_text())
    assert after["cells"]["dpm++, log-snr"] == before["cells"]["dpm++, log-snr"]


def row(**cells):
    return {calls.strip("n"): {"calls": int(calls.strip("n")), "frechet": value} for calls, value in cells.items()}


def test_a_student_pays_from_the_fewest_calls_at_which_some_solver_is_as_good():
    cells = {"ddim, trailing": row(n1=90.0, n4=30.0, n8=9.0), "heun, karras": row(n1=90.0, n4=None, n8=20.0)}
    table = {"cells": cells, "students": {"a": {"calls": 1, "frechet": 20.0}, "b": {"calls": 1, "frechet": 5.0},
                                          "c": {"calls": 2, "frechet": 95.0}}}  # fmt: skip
    assert "as good from 8 calls (ddim, trailing: 9.0). It saves 7 calls." in solver_table.pays(table, "a")
    assert "as good in none of these" in solver_table.pays(table, "b")
    assert "as good from 1 calls (ddim, trailing: 90.0). It does not pay." in solver_table.pays(table, "c")
    assert solver_table.lowest(table, 4) == 30.0
    assert solver_table.best_of(table, "heun") == [(1, 90.0), (8, 20.0)]


def test_samples_that_are_not_finite_leave_a_dash(config, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "draw", lambda options, *rest: torch.full((20, 1, 8, 8), torch.nan))
    other = dataclasses.replace(config, out=tmp_path, students=(), calls=(1,), solvers=("ddim",))
    text = (solver_table.main(other) / "table.md").read_text()
    assert "| ddim, trailing | - |" in text


def test_a_table_of_other_settings_and_features_of_another_size_are_refused(config, tmp_path):
    solver_table.main(config)
    with pytest.raises(ValueError, match=r"measured with other values of guidance, seed\. Choose another --out"):
        solver_table.main(dataclasses.replace(config, seed=1, guidance=2.0))
    save_classifier(Classifier(Facts(1, 16, 4, num_features=4)).eval(), tmp_path / "features")
    with pytest.raises(ValueError, match=r"draws 1 x 8 x 8; --features .* take 1 x 16 x 16"):
        solver_table.main(dataclasses.replace(config, features=tmp_path / "features", out=tmp_path / "table"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_images": 3}, "--num-images must be at least 4"), ({"calls": (0,)}, "--calls at least 1"),
    ({"students": ("teacher",)}, "is a teacher; pass teachers to --teacher"),
])  # fmt: skip
def test_impossible_requests_are_refused(config, tmp_path, changes, message):
    if "students" in changes:
        copy = tmp_path / "teacher"
        copy.symlink_to(config.teacher)
        changes = {"students": (str(copy),), "calls": (1,), "solvers": ("ddim",)}
    with pytest.raises(ValueError, match=message):
        solver_table.main(dataclasses.replace(config, out=tmp_path / "table", **changes))
