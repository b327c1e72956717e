"""The table of robust digits: made once, resumed, of one split, and only under its own settings."""

import json

import numpy as np
import pytest
import robust_digits
from accelerate.state import AcceleratorState
from robust_digits import Config

from toyworld.digits import load_digits

BRIEF = {"seeds": (0,), "numbers": (20,), "num_generated": 20, "steps": 2, "teacher_steps": 2, "test_steps": 1}


@pytest.mark.slow
def test_every_cell_is_made_once_and_those_that_are_missing_are_made_again(tmp_path, monkeypatch):
    AcceleratorState._reset_state(True)
    config = Config(**BRIEF, out=tmp_path / "out")
    table = robust_digits.main(config)
    wanted = ["preset, seed 0", *(f"20 real, {added}, seed 0" for added in robust_digits.ADDED)]
    assert list(table["rows"]) == wanted
    for name, row in table["rows"].items():
        assert 0 <= row["robust_accuracy"] <= row["accuracy"] <= 1, name
        assert row["cpu_seconds"] > 0
    assert "answers_that_are_the_classes" in table["rows"]["20 real, answers, seed 0"]
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 6
    file = tmp_path / "out" / "table.json"
    held = json.loads(file.read_text())
    del held["rows"][wanted[2]]
    file.write_text(json.dumps(held))
    made = []
    monkeypatch.setattr(robust_digits, "trained", lambda options: made.append(options.out.name) or {
        "accuracy": 1.0, "robust_accuracy": None, "cpu_seconds": 1.0
    })  # fmt: skip
    robust_digits.main(config)
    assert made == ["20_classes_0"]
    with pytest.raises(ValueError, match="is of other settings"):
        robust_digits.main(Config(**{**BRIEF, "steps": 3}, out=tmp_path / "out"))


def test_what_is_learned_from_and_what_measures_are_other_images(tmp_path):
    robust_digits.data_of(Config(numbers=(100, 200), out=tmp_path))
    held = {name: np.load(tmp_path / f"{name}.npz") for name in ("real_100", "real_200", "held_out")}
    assert [len(arrays["labels"]) for arrays in held.values()] == [100, 200, 597]
    assert np.array_equal(held["real_100"]["images"], held["real_200"]["images"][:100])
    assert np.array_equal(held["held_out"]["images"], load_digits()[2].images.numpy())
    learned, measured = ({image.tobytes() for image in held[name]["images"]} for name in ("real_200", "held_out"))
    assert not learned & measured
