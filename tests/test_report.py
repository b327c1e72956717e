"""Where curves and pictures of a run go: the trackers of --report-to, and PNG files in --out/samples."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import scorefield.commands.teacher as train_teacher
import scorefield.training.options as run_options
from scorefield.commands.options import TrainTeacher
from scorefield.training.options import RunOptions, check_run, check_trackers
from scorefield.training.report import close_log, forget_samples, log, open_log, save_samples
from scorefield.training.run import start

TINY = {"steps": 4, "batch_size": 8, "save_every": 2, "log_every": 1, "width": 16, "depth": 1}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Service:
    """wandb and trackio, as far as Accelerate asks them."""

    def __init__(self, name):
        self.name, self.runs, self.logged, self.images, self.config_of = name, [], [], [], []
        self.finished, self.fails = 0, ""
        self.module = ModuleType(name)
        self.module.init = self.init
        self.module.Image = lambda array: array
        self.module.config = self

    def init(self, **options):
        if self.fails == "init":
            raise RuntimeError("no key")
        self.runs.append(options)
        return self

    @property
    def config(self):
        return self

    def update(self, values, allow_val_change=False):
        self.config_of.append(values)

    def log(self, values, step=None, **options):
        if self.fails == "log":
            raise RuntimeError("no network")
        kept = self.images if any(isinstance(value, list) for value in values.values()) else self.logged
        kept.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def services(monkeypatch):
    """Both installed, whether they are or not."""
    made = {name: Service(name) for name in ("wandb", "trackio")}
    for name, service in made.items():
        monkeypatch.setitem(sys.modules, name, service.module)
    have = list(dict.fromkeys([*tracking._available_trackers, LoggerType.WANDB, LoggerType.TRACKIO]))
    monkeypatch.setattr(tracking, "_available_trackers", have)
    find = run_options.find_spec
    monkeypatch.setattr(run_options, "find_spec", lambda name: name in made or find(name))
    return made


def scalars(out):
    return EventAccumulator(str(out / "logs")).Reload().Scalars


def test_several_trackers_get_all_curves_pictures_and_the_options(services, tmp_path):
    out = tmp_path / "mug" / "run"
    train_teacher.main(TrainTeacher(out=out, report_to=("tensorboard", "wandb", "trackio"), **TINY))
    steps = [event.step for event in scalars(out)("teacher/loss")]
    assert steps == [1, 2, 3, 4]
    for service in services.values():
        assert service.runs == [{"project": "scorefield", "name": "mug/run"}]
        assert [step for step, values in service.logged if "teacher/loss" in values] == steps
        assert service.config_of[0]["width"] == 16
        assert service.finished == 1
    assert [step for step, _ in services["wandb"].images] == [2, 4]
    (picture,) = services["wandb"].images[0][1]["samples"]
    with Image.open(out / "samples" / "step-000000002.png") as file:
        shown = np.asarray(file)
    assert np.abs(picture.astype(int) - shown).max() <= 1


def test_rates_and_seconds_are_logged_with_each_step(tmp_path):
    train_teacher.main(TrainTeacher(out=tmp_path, learning_rate=0.5, **TINY))
    rates = [event.value for event in scalars(tmp_path)("teacher/learning_rate")]
    assert rates == pytest.approx([0.5 * 0.5 * (1 + np.cos(np.pi * done / 4)) for done in range(4)])
    assert all(event.value > 0 for event in scalars(tmp_path)("run/seconds_per_step"))


def test_without_a_tracker_pictures_are_there_all_the_same(tmp_path):
    train_teacher.main(TrainTeacher(out=tmp_path, report_to=("none",), **TINY))
    assert not (tmp_path / "logs").exists()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-000000002.png", "step-000000004.png"
    ]  # fmt: skip
    again = TrainTeacher(out=tmp_path, report_to=("tensorboard",), **TINY)
    train_teacher.main(again)  # where curves go binds no checkpoint


@pytest.mark.parametrize(("wanted", "said"), [
    (("trackio",), "--report-to trackio needs: pip install trackio"),
    (("tensorboard", "wandb"), "--report-to wandb needs: pip install wandb"),
    (("none", "tensorboard"), "--report-to none stands alone"),
])  # fmt: skip
def test_a_tracker_that_is_not_installed_is_refused_before_work(tmp_path, monkeypatch, wanted, said):
    find, lacking = run_options.find_spec, ("wandb", "trackio")
    monkeypatch.setattr(run_options, "find_spec", lambda name: None if name in lacking else find(name))
    with pytest.raises(ValueError, match=said):
        check_run(RunOptions(out=tmp_path / "run", report_to=wanted))
    assert not list(tmp_path.iterdir())
    check_trackers(("none", "none"))
    check_trackers(())


def test_a_tracker_that_does_not_start_is_refused_and_one_that_fails_later_is_done_without(
    services, tmp_path, capsys
):
    config = TrainTeacher(out=tmp_path / "a", report_to=("tensorboard", "wandb"), **TINY)
    services["wandb"].fails = "init"
    with pytest.raises(ValueError, match=r"--report-to wandb could not be started: no key\. Log in first"):
        train_teacher.main(config)
    services["wandb"].fails = "log"
    AcceleratorState._reset_state(reset_partial_state=True)
    train_teacher.main(config)
    said = capsys.readouterr().err
    assert said.count("wandb failed at step 1, the run goes on without: no network") == 1
    assert len(scalars(tmp_path / "a")("teacher/loss")) == 4


def test_each_stage_has_its_log_and_a_lost_one_is_opened_where_it_was(tmp_path, capsys):
    accelerator = start(RunOptions(out=tmp_path))
    open_log(accelerator, 0, tmp_path / "warm-up")
    (tracker,) = accelerator.trackers

    def lose(*arguments, **options):
        raise OSError("gone")

    tracker.log = lose
    log(accelerator, 3, {"x": 1.0})
    assert "the log of tensorboard is lost at step 3" in capsys.readouterr().err
    log(accelerator, 4, {"x": 2.0})
    close_log(accelerator)
    assert accelerator.trackers == []
    assert not (tmp_path / "logs").exists()
    assert [event.step for event in scalars(tmp_path / "warm-up")("x")] == [4]


def test_pictures_of_another_run_go_and_files_of_someone_else_stay(tmp_path, monkeypatch, capsys):
    save_samples(torch.rand(1, 3, 8, 8), tmp_path, 7)
    for name in ("step-7.png", "notes.txt"):
        (tmp_path / "samples" / name).write_text("mine")
    forget_samples(tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["notes.txt", "step-7.png"]
    forget_samples(tmp_path / "nowhere")
    (tmp_path / "file").write_text("in the way")
    save_samples(torch.rand(1, 3, 8, 8), tmp_path / "file", 7)
    assert "no picture of step 7, the run goes on" in capsys.readouterr().err
