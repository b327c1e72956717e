"""The default recipe on a tiny teacher: what its stages write, how they resume, which weights they keep."""

import contextlib
import dataclasses
import json
import shutil
import signal

import pytest
import torch
from folders import assert_same, tensors
from refusals import refused
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distill.data as student_data
import distill.guarding as guarding
import distill.options as distill_options
import distill.recipe as train_dmd
import distill.stages as stages
import scorefield.commands.teacher as train_teacher
import scorefield.training.run as running
from distill import regression
from distill.student import Student
from scorefield.commands.options import TrainTeacher
from scorefield.models.teacher import load_teacher
from scorefield.schedule import Karras
from scorefield.training import checkpoint

TINY = {
    "steps": 12, "batch_size": 16, "save_every": 4, "log_every": 2, "student_every": 2, "warmup_steps": 6,
    "num_pairs": 40, "pair_steps": 3, "fake_warmup": 3, "guard_images": 64, "guard_every": 4,
    "skip_teacher_check": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    return train_teacher.main(TrainTeacher(out=out, steps=30, batch_size=64, width=32, depth=2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_dmd.main(config_for(out, teacher))
    return out


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it, to be run again."""
    shutil.copytree(finished, tmp_path / "again")
    return tmp_path / "again"


@pytest.fixture(scope="module")
def drifted(tmp_path_factory, teacher):
    """A run at a rate that spoils the student, and that goes back twice."""
    out = tmp_path_factory.mktemp("runs") / "drifted"
    train_dmd.main(config_for(out, teacher, **DRIFTING))
    return out


DRIFTING = {"student_lr": 0.5, "steps": 16, "student_every": 1, "save_every": 3}


def config_for(out, teacher, **changes):
    return dataclasses.replace(distill_options.auto(), out=out, teacher=str(teacher), **{**TINY, **changes})


class Killed(Exception):  # noqa: N818
    pass


def kill(monkeypatch, name, step):
    """Let the stage whose config lies in the folder ``name`` die after a step."""
    whole = running.follow

    def follow(reports, accelerator, **options):
        for report in whole(reports, accelerator, **options):
            yield report
            if report.step == step and any(key.startswith(f"{name}/") for key in report.metrics):
                raise Killed

    monkeypatch.setattr(running, "follow", follow)


def test_the_student_is_asked_where_the_noise_is_moderate(finished):
    student = load_teacher(str(finished / "student"))
    assert isinstance(student.denoiser.schedule, Karras)
    assert student.times == (pytest.approx(3.5),)
    for name, curve in (("warm-up", "warm-up/loss"), ("", "student/gradient_rms")):
        scalars = EventAccumulator(str(finished / name / "logs")).Reload().Scalars
        assert [event.step for event in scalars(curve)] == [2, 4, 6] if name else scalars(curve)
        looks = [event.step for event in scalars("guard/distance")]
        assert looks == ([1, 2, 3, 4, 5, 6] if name else [0, 4, 8, 12])
    assert json.loads((finished / "config.json").read_text())["gan_weight"] == 0.03


@pytest.mark.parametrize(("name", "step", "resumed"), [
    ("warm-up", 5, 4), *(pytest.param("fake", *steps, marks=pytest.mark.slow) for steps in ((7, 4), (2, 0))),
])  # fmt: skip
def test_a_run_killed_in_any_stage_resumes_to_the_same_weights(
    tmp_path, teacher, finished, monkeypatch, capsys, name, step, resumed
):
    with monkeypatch.context() as patch:
        kill(patch, name, step)
        with pytest.raises(Killed):
            train_dmd.main(config_for(tmp_path / "cut", teacher))
    capsys.readouterr()
    again = train_dmd.main(config_for(tmp_path / "cut", teacher))
    printed = capsys.readouterr()
    assert_same(tensors(finished / "student"), tensors(again))
    assert (f"resumed from step {resumed}" in printed.out) == bool(resumed)
    assert ("learning rates" in printed.err) == (name == "warm-up")


def test_a_student_that_drifts_ends_with_the_weights_of_its_warm_up(tmp_path, teacher, capsys):
    """At a rate that spoils it, each look is a setback: the run goes back, and ends before its last step."""
    drifting = config_for(tmp_path / "run", teacher, student_lr=0.5, steps=40, max_setbacks=2, student_every=1)
    result = tensors(train_dmd.main(drifting))
    printed = capsys.readouterr()
    assert printed.err.count("at half the learning rates") == 2
    assert "the run ends here" in printed.err
    assert "best weights: step 0" in printed.out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["step"], report["setbacks"], report["ended_early"]) == (0, 2, True)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The run ended before its last step" in page
    assert "Not finished" not in page
    begun = load_file(tmp_path / "run" / "checkpoints" / "step-000000000" / "student.ema.safetensors")
    assert_same({name: value for (_, name), value in result.items()}, begun)
    assert_same(result, tensors(train_dmd.main(drifting)))
    assert "half" not in capsys.readouterr().err


def test_each_setback_halves_the_rates(drifted):
    end = checkpoint.newest(drifted / "checkpoints")
    student = torch.load(end / "state.pt", weights_only=True)["phases"]["student"]
    (notes,) = student["optimizer"]["param_groups"]
    assert notes["setbacks"] > 1
    assert notes["initial_lr"] == student["lr_schedule"]["base_lrs"][0] == 0.5 / 2 ** notes["setbacks"]


@pytest.mark.parametrize("step", [pytest.param(6, marks=pytest.mark.slow), 11])
def test_a_run_killed_after_a_setback_resumes_as_if_it_had_not(tmp_path, teacher, drifted, monkeypatch, step):
    with monkeypatch.context() as patch:
        kill(patch, "fake", step)
        with pytest.raises(Killed):
            train_dmd.main(config_for(tmp_path / "cut", teacher, **DRIFTING))
    again = train_dmd.main(config_for(tmp_path / "cut", teacher, **DRIFTING))
    assert_same(tensors(drifted / "student"), tensors(again))
    ends = [checkpoint.newest(out / "checkpoints") for out in (drifted, tmp_path / "cut")]
    assert_same(*(load_file(end / "fake.safetensors") for end in ends))


@pytest.mark.parametrize("steps", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_few_step_student_warms_up_on_the_teachers_paths(tmp_path, teacher, monkeypatch, steps):
    """Each step learns in the warm-up, the later ones from the states that were kept on the way."""
    asked, kept, inputs = set(), [], regression.inputs

    def noted(student, noise, states, numbers):
        asked.update(numbers.tolist())
        kept.append(tuple(states))
        return inputs(student, noise, states, numbers)

    monkeypatch.setattr(regression, "inputs", noted)
    folder = train_dmd.main(config_for(tmp_path, teacher, num_steps=steps))
    student = load_teacher(str(folder))
    ratios = {2: [3.5, 0.7], 4: [3.5, 1.565, 0.7, 0.313]}[steps]
    assert student.times == pytest.approx(ratios, rel=1e-3)
    assert asked == set(range(steps))
    assert set(kept) == {student.times[1:]}
    whole = Student(student.denoiser, student.times)
    images = whole.sample(
        torch.randn(10, *student.shape), student.cond(torch.arange(10)), generator=torch.Generator().manual_seed(0)
    )
    assert images.isfinite().all()


def test_the_teachers_images_are_the_real_ones_where_that_is_asked_for(tmp_path, teacher, monkeypatch):
    """Each with its own condition; no data are read, and there is a GAN term all the same."""
    monkeypatch.setattr(student_data, "load_images", lambda options: pytest.fail("loaded images"))
    seen, pairs = [], []
    whole, batch_of = stages.teacher_pairs, stages.teacher_batch

    def made(*args, **options):
        pairs.append(whole(*args, **options))
        return pairs[-1]

    def batch(*args):
        seen.append(batch_of(*args))
        return seen[-1]

    monkeypatch.setattr(stages, "teacher_pairs", made)
    monkeypatch.setattr(stages, "teacher_batch", batch)
    train_dmd.main(config_for(tmp_path, teacher, reals="teacher", steps=4))
    assert json.loads((tmp_path / "config.json").read_text())["gan_weight"] == 0.03
    assert len(seen) >= 4
    known = {tuple(x0.flatten().tolist()): int(label) for x0, label in zip(
        pairs[0].x0, pairs[0].cond["class_labels"], strict=True
    )}  # fmt: skip
    for x0, label in zip(seen[-1]["real"], seen[-1]["cond"]["class_labels"], strict=True):
        assert known[tuple(x0.flatten().tolist())] == int(label)


def test_guidance_that_is_drawn_apart_gives_another_student(tmp_path, teacher):
    settings = {"guidance": 3.0, "guard_images": 0, "steps": 4, "gan_weight": 0.0, "ema_decay": 0.0}
    one, other = (
        tensors(train_dmd.main(config_for(tmp_path / str(apart), teacher, separate_guidance=apart, **settings)))
        for apart in (False, True)
    )
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_a_dry_run_shows_the_check_of_the_teacher_and_the_plan_and_writes_nothing(tmp_path, teacher, capsys):
    """The teacher of this test learned for moments: the check says so, and may stop at it."""
    config = config_for(tmp_path / "run", teacher, dry_run=True, skip_teacher_check=False, num_pairs=0)
    with contextlib.suppress(ValueError):
        train_dmd.main(config)
    printed = capsys.readouterr().out
    assert "teacher check on 64 images (data)" in printed
    assert "noise/data" in printed
    train_dmd.main(dataclasses.replace(config, skip_teacher_check=True))
    printed = capsys.readouterr().out
    assert "teacher check" not in printed
    assert "2,064 teacher pairs of 3 network calls each, 6 warm-up updates of the student" in printed
    assert '"gan_weight": 0.03' in printed, "as it was settled"
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_begun_resumes_without_a_check(again, teacher, capsys):
    """Whether there was one changes no number: the same run goes on."""
    train_dmd.main(config_for(again, teacher, skip_teacher_check=False))
    printed = capsys.readouterr().out
    assert "resumed from step 12" in printed
    assert "teacher check" not in printed


def test_without_a_guard_the_last_weights_are_the_result(tmp_path, teacher):
    folder = train_dmd.main(config_for(tmp_path, teacher, guard_images=0))
    last = load_file(tmp_path / "checkpoints" / "step-000000012" / "student.ema.safetensors")
    assert_same({name: value for (_, name), value in tensors(folder).items()}, last)


def peaks(out):
    """The peak learning rates of student and fake score that a run began with."""
    state = torch.load(out / "checkpoints" / "step-000000000" / "state.pt", weights_only=True)
    return [state["phases"][name]["lr_schedule"]["base_lrs"][0] for name in ("student", "fake")]


@pytest.mark.parametrize("changes", [
    {"warmup_lr": 1e-3, "student_lr": 2e-5, "fake_lr": 1e-4}, {"warmup_steps": 0, "regression_weight": 0.0},
    {"warmup_steps": 6, "regression_weight": 0.0},
])  # fmt: skip
def test_rates_are_those_given_or_measured_with_and_without_pairs(tmp_path, teacher, monkeypatch, capsys, changes):
    given = "student_lr" in changes
    if given:
        monkeypatch.setattr(stages, "range_test", lambda *args, **options: pytest.fail("tested"))
    train_dmd.main(config_for(tmp_path, teacher, guard_images=0, save_every=12, **changes))
    assert ("learning rates: warm-up" in capsys.readouterr().err) is not given
    student, fake = peaks(tmp_path)
    assert (student, fake) == (2e-5, 1e-4) if given else fake == pytest.approx(10 * student)


def test_another_config_is_refused_before_pairs_are_made(finished, teacher, monkeypatch):
    monkeypatch.setattr(stages, "teacher_pairs", lambda *args, **options: pytest.fail("made pairs"))
    with refused(r"ema_decay: 0\.99 there, 0\.5 now"):
        train_dmd.main(config_for(finished, teacher, ema_decay=0.5))


def test_sigterm_ends_a_run_that_a_guard_sends_back_in_the_same_step(tmp_path, teacher, monkeypatch):
    go_back = guarding.Guarded.go_back
    monkeypatch.setattr(guarding.Guarded, "go_back", lambda *args: pytest.fail("went on"))
    look = guarding.Guarded.look

    def asked(self):
        signal.raise_signal(signal.SIGTERM)
        return look(self)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "begin", after(stages.begin, lambda: patch.setattr(guarding.Guarded, "look", asked)))
        with pytest.raises(SystemExit) as stop:
            train_dmd.main(config_for(tmp_path, teacher, student_lr=0.5, student_every=1))
    assert stop.value.code == 143
    monkeypatch.setattr(guarding.Guarded, "go_back", go_back)
    train_dmd.main(config_for(tmp_path, teacher, student_lr=0.5, student_every=1))


def after(function, then):
    """The function, and then something else."""

    def both(*args, **options):
        result = function(*args, **options)
        then()
        return result

    return both


def test_sigterm_in_the_warm_up_saves_it(tmp_path, teacher, monkeypatch):
    def ask(step, saving):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    whole = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *args, **options: whole(*args, **{**options, "check": ask}))
    with pytest.raises(SystemExit) as stop:
        train_dmd.main(config_for(tmp_path, teacher))
    assert stop.value.code == 143
    assert checkpoint.newest(tmp_path / "warm-up" / "checkpoints").name == "step-000000004"
