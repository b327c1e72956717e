"""What all trainers promise: plans write nothing, runs resume bit by bit, no result of another run is replaced."""

import json
import re
import shutil
import signal
from dataclasses import fields, replace

import pytest
import torch
from accelerate.state import AcceleratorState
from folders import assert_same, contents, tensors
from refusals import refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import TRAINERS, Killed, kill, make_places, stop

import scorefield.commands.features as train_features
from scorefield.commands.options import TrainFeatures
from scorefield.training import checkpoint

each = pytest.mark.parametrize("name", TRAINERS)
STEPS = [f"step-{step:09d}" for step in (3, 6)]


@pytest.fixture(scope="module")
def places(tmp_path_factory, sd):
    return make_places(tmp_path_factory.mktemp("places"), sd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, places):
    """Runs without interruption, by trainer, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("finished") / name
            run(name, places, made[name])
        return made[name]

    return get


def run(name, places, out, **changes):
    AcceleratorState._reset_state(True)
    return TRAINERS[name].main(replace(TRAINERS[name].options(places), out=out, **changes))


def newest(out):
    """The tensors of the last checkpoint, and of the result."""
    return tensors(out / "checkpoints" / STEPS[-1]), tensors(out)


@each
def test_a_dry_run_shows_the_plan_and_writes_nothing(name, places, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(name, places, tmp_path / "run", dry_run=True)
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") : said.index("\n}") + 2])["steps"] == 6
    assert re.search(
        r"^\w[\w ]*: [\d,]+ parameters, [\d,]+ bytes of weights, [\d,]+ bytes of gradients", said, re.M
    )
    assert "steps: 6 iterations, " in said
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] * (name == "canvas"), "for whose one prompt"


@each
def test_a_run_writes_its_config_curves_last_checkpoints_and_result(name, finished):
    out = finished(name)
    assert json.loads((out / "config.json").read_text())["save_every"] == 3
    saved = {path.name: {file.name for file in path.iterdir()} for path in (out / "checkpoints").iterdir()}
    assert set(STEPS) <= saved.keys() <= {*STEPS, "step-000000000"}, "the first one is a guard's best"
    assert all({checkpoint.MANIFEST, "config.json", "state.pt"} < names for names in saved.values())
    events = EventAccumulator(str(out / "logs")).Reload()
    curves = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert [2, 4, 6] in curves.values()
    assert (out / TRAINERS[name].result).exists()


@each
def test_a_run_that_is_killed_and_terminated_ends_in_the_same_bits(
    name, places, finished, tmp_path, monkeypatch, capsys
):
    """SIGTERM saves the step it comes in, and is the exit code."""
    whole, out = finished(name), tmp_path / "cut"
    with monkeypatch.context() as patch:
        stop(patch, 4, kill)
        with pytest.raises(Killed):
            run(name, places, out)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            run(name, places, out)
    assert stopped.value.code == 143
    assert capsys.readouterr().out.count("resumed from step 3\n") == 1
    run(name, places, out)
    assert capsys.readouterr().out.count("resumed from step 5\n") == 1
    for one, other in zip(newest(whole), newest(out), strict=True):
        ours = {key: value for key, value in other.items() if "step-000000005" not in key[0]}
        assert_same({key: value for key, value in one.items() if key in ours}, ours)
    states = [
        torch.load(each / "checkpoints" / STEPS[-1] / "state.pt", weights_only=True) for each in (whole, out)
    ]
    assert str(states[0]) == str(states[1]), "optimisers, schedules and averages, too"


@each
def test_a_finished_run_is_found_finished_and_belongs_to_its_options(name, places, finished, tmp_path, capsys):
    out = shutil.copytree(finished(name), tmp_path / "run")
    before = newest(out)
    run(name, places, out)
    assert "resumed from step 6\n" in capsys.readouterr().out
    for one, other in zip(before, newest(out), strict=True):
        assert_same(one, other)
    before = contents(out)
    (changed,) = TRAINERS[name].bound
    with refused(rf"belongs to another config \(.*{changed}: .* there, .* now"):
        run(name, places, out, **TRAINERS[name].bound)
    shutil.rmtree(out / "checkpoints")
    before = contents(out)
    with refused("of another run, and no checkpoint"):  # as after `rm -r checkpoints`
        run(name, places, out, **TRAINERS[name].bound)
    assert contents(out) == before


@each
def test_a_larger_number_of_steps_continues_a_finished_run_and_a_smaller_one_is_refused(
    name, places, finished, tmp_path, capsys
):
    out = shutil.copytree(finished(name), tmp_path / "run")
    capsys.readouterr()
    run(name, places, out, steps=9)
    said = capsys.readouterr().out
    assert "resumed from step 6\n6 steps before, 9 now: from here on all schedules are those of 9 steps" in said
    assert checkpoint.newest(out / "checkpoints").name == "step-000000009"
    assert json.loads((out / "config.json").read_text())["steps"] == 9
    before = contents(out)
    with refused(r"--steps 8 ends before step 9, which the run in .* has reached\. Pass --steps 9 or more"):
        run(name, places, out, steps=8)
    assert contents(out) == before


@each
def test_a_users_file_in_a_result_is_named_at_the_start(name, places, finished, tmp_path):
    out = shutil.copytree(finished(name), tmp_path / "run")
    result = out / TRAINERS[name].result
    if result.is_dir():
        (result / "notes.txt").write_text("mine")
        before = contents(out)
        with refused(f"{result.name} would be replaced, but it holds notes.txt"):
            run(name, places, out)
        assert contents(out) == before


@each
@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 0}, "--steps must be above 0; got 0"), ({"seed": -1}, r"--seed must lie in \[0, 2\^63\)"),
    ({"batch_size": 2**31}, r"--batch-size must be below 2\^31"),
    ({"clip_norm": float("nan")}, "--clip-norm must be finite"),
    ({"optimizer": "adamw8bit"}, "adamw8bit (needs a GPU and: pip install bitsandbytes|is not for scenes)"),
    ({"out": "file"}, "cannot write to --out"), ({"save_every": 0}, "--save-every must be above 0"),
])  # fmt: skip
def test_options_that_all_trainers_have_are_refused_before_anything_is_written(
    name, places, tmp_path, changes, message
):
    (tmp_path / "file").write_text("")
    changes = {"out": tmp_path / "run", **changes}
    if changes["out"] == "file":
        changes["out"] = tmp_path / "file" / "run"
    with refused(message):
        run(name, places, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert {"steps", "seed", "out"} <= {field.name for field in fields(TRAINERS[name].options(places))}


@pytest.mark.parametrize("name", ["canvas", "texts", "control"])
def test_a_home_that_cannot_be_written_is_done_without(name, places, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    options = TRAINERS[name].options(places)
    with pytest.warns(UserWarning, match="cannot be written"):
        run(name, places, tmp_path / "run", steps=max(2, getattr(options, "student_every", 1)))
    assert (tmp_path / "run" / TRAINERS[name].result).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_a_result_may_be_a_link_and_features_never_replace_another_folder(places, finished, tmp_path):
    out = shutil.copytree(finished("teacher"), tmp_path / "run")
    (out / "teacher").rename(tmp_path / "elsewhere")
    (out / "teacher").symlink_to(tmp_path / "elsewhere")
    run("teacher", places, out)
    assert (out / "teacher").is_symlink()
    before = contents(out)
    with refused("would be replaced, but it holds"):
        train_features.main(TrainFeatures(out=out, steps=1, device="cpu"))
    assert contents(out) == before
