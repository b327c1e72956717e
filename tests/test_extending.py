"""A finished run goes on when --steps is larger; a constant rate may be another; nothing else may."""

import dataclasses
import json
import math
import shutil

import pytest
import tiny_pipelines as tiny
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_controlnet_recipe import SIZE, write_samples

import controlnet.options as control_options
import controlnet.recipe as train_controlnet
import distill.options as distill_options
import distill.recipe as train_dmd
import distill.stages as stages
import scorefield.commands.teacher as train_teacher
import toyworld.demo as quickstart
from scorefield.commands.options import TrainTeacher
from scorefield.training import checkpoint
from scorefield.training.checkpoint import MANIFEST, _sha256

TINY = {"batch_size": 16, "save_every": 3, "log_every": 2}
SHORT = {
    "student_every": 2, "pair_steps": 3, "num_pairs": 40, "fake_warmup": 2, "guard_images": 0, "warmup_steps": 3,
    "skip_teacher_check": True, "lr_schedule": "constant", "student_lr": 2e-4, "fake_lr": 1e-4, "warmup_lr": 1e-3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def teacher_config(out, steps, **changes):
    return TrainTeacher(out=out, steps=steps, width=32, depth=1, **{**TINY, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A finished run of six steps."""
    out = tmp_path_factory.mktemp("teacher")
    train_teacher.main(teacher_config(out, 6))
    return out


@pytest.fixture
def begun(teacher, tmp_path):
    """A copy of it."""
    shutil.copytree(teacher, tmp_path / "run")
    return tmp_path / "run"


def distil(out, teacher, steps, **changes):
    config = {**TINY, **SHORT, "steps": steps, "teacher": str(teacher / "teacher"), "out": out, **changes}
    return train_dmd.main(dataclasses.replace(distill_options.auto(), **config))


def same(a, b):
    a, b = (load_file(next(folder.glob("*.safetensors"))) for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files_of(folder):
    return {path: path.is_dir() or path.stat().st_mtime_ns for path in folder.rglob("*")}


def rate_of(out, step, phase):
    state = torch.load(out / "checkpoints" / f"step-{step:09d}" / "state.pt", weights_only=True)
    return state["phases"][phase]["optimizer"]["param_groups"][0]["lr"]


def test_a_finished_teacher_goes_on_and_its_cosine_is_that_of_the_new_total(begun, capsys, monkeypatch):
    """The rate of the first new step, too, which the checkpoint holds as zero."""
    assert rate_of(begun, 6, "teacher") == 0
    used, step = [], torch.optim.AdamW.step

    def noted(self, *arguments):
        used.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    folder = train_teacher.main(teacher_config(begun, 12))
    said = capsys.readouterr().out
    assert "resumed from step 6\n6 steps before, 12 now: from here on all schedules are those of 12 steps" in said
    assert used == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * done / 12)) for done in range(6, 12)])
    last = load_file(begun / "checkpoints" / "step-000000012" / "teacher.ema.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in load_file(folder / "model.safetensors").items())
    assert json.loads((begun / "config.json").read_text())["steps"] == 12


def test_results_without_a_checkpoint_are_not_replaced_by_a_longer_run(begun):
    shutil.rmtree(begun / "checkpoints")
    with pytest.raises(ValueError, match="holds teacher of another run"):
        train_teacher.main(teacher_config(begun, 12))
    train_teacher.main(teacher_config(begun, 6, log_every=5))


def test_checkpoints_of_earlier_versions_are_resumed_and_extended(begun, capsys):
    """They hold every option that bound them, and say nothing of what may change."""
    for path in checkpoint.steps(begun / "checkpoints"):
        config = json.loads((path / "config.json").read_text())
        dropped = {"free", "may_change", "log_every", "save_every", "eval_every", "eval_images", "dry_run"}
        dropped |= {"on_bad_data"}
        (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in dropped}))
        sums = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**sums, "config.json": _sha256(path / "config.json")}))
    train_teacher.main(teacher_config(begun, 6))
    train_teacher.main(teacher_config(begun, 9))
    assert capsys.readouterr().out.count("resumed from step 6") == 2
    assert checkpoint.newest(begun / "checkpoints").name == "step-000000009"


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher):
    """A student of eight iterations at constant rates."""
    out = tmp_path_factory.mktemp("student") / "run"
    distil(out, teacher, 8)
    return out


def test_a_student_at_constant_rates_goes_on_as_if_it_had_been_longer_from_the_start(tmp_path, teacher, student):
    distil(tmp_path / "whole", teacher, 12)
    shutil.copytree(student, tmp_path / "cut")
    distil(tmp_path / "cut", teacher, 12)
    assert same(tmp_path / "whole" / "student", tmp_path / "cut" / "student")
    assert not same(student / "student", tmp_path / "cut" / "student")


def test_a_constant_rate_may_change_on_the_way_and_comes_back(tmp_path, teacher, student, capsys):
    out = tmp_path / "run"
    shutil.copytree(student, out)
    distil(out, teacher, 10, student_lr=1e-5)
    assert "--student-lr was 0.0002, and is 1e-05 from here on" in capsys.readouterr().out
    assert (rate_of(out, 10, "student"), rate_of(out, 10, "fake")) == (1e-5, 1e-4)
    distil(out, teacher, 12, student_lr=1e-5)
    assert "from here on" not in capsys.readouterr().out.replace("from here on all schedules", "")
    assert rate_of(out, 12, "student") == 1e-5
    for refused in ({"lr_schedule": "cosine"}, {"student_lr": 1e-5, "betas": (0.5, 0.9)}, {"warmup_lr": 1.0}):
        with pytest.raises(ValueError, match=f"belongs to another config .*{list(refused)[-1]}: "):
            distil(out, teacher, 14, **refused)


def test_the_default_recipe_goes_on_with_the_warm_up_and_the_pairs_it_began_with(
    tmp_path, teacher, capsys, monkeypatch
):
    """Both defaults depend on --steps; the rates that were measured stay, too."""
    settings = {
        "lr_schedule": "cosine", "student_lr": 0.0, "fake_lr": 0.0, "warmup_lr": 0.0, "warmup_steps": None,
        "guard_images": 64, "guard_every": 3, "num_pairs": 0,
    }  # fmt: skip
    monkeypatch.setattr("distill.parts.PAIR_USES", 1000)
    distil(tmp_path, teacher, 3, **settings)
    monkeypatch.setattr(stages, "warm_up", lambda *args: pytest.fail("warmed up again"))
    monkeypatch.setattr(stages, "range_test", lambda *args, **options: pytest.fail("measured again"))
    capsys.readouterr()
    distil(tmp_path, teacher, 6, **settings)
    printed = capsys.readouterr()
    assert "resumed from step 3" in printed.out
    assert "shards of teacher pairs read" in printed.err
    assert json.loads((tmp_path / "config.json").read_text())["warmup_steps"] == 12
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-000000006"


def test_a_run_that_its_guard_ended_goes_on_with_more_setbacks(tmp_path, teacher, capsys):
    drifting = {
        "lr_schedule": "cosine", "student_lr": 0.5, "student_every": 1, "guard_images": 64, "guard_every": 2,
        "max_setbacks": 0,
    }  # fmt: skip
    distil(tmp_path, teacher, 20, **drifting)
    assert "the run ends here" in capsys.readouterr().err
    ended = checkpoint.newest(tmp_path / "checkpoints").name
    distil(tmp_path, teacher, 30, **drifting)
    assert "it goes on with --max-setbacks above 0" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "checkpoints").name == ended
    distil(tmp_path, teacher, 30, **{**drifting, "max_setbacks": 1})
    assert "at half the learning rates" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "checkpoints").name > ended


def control(place, out, steps, **changes):
    settings = {
        "teacher": str(place / "model"), "data": str(place / "data"), "size": SIZE, "steps": steps,
        "batch_size": 2, "eval_every": 0, "eval_samples": 2, "sampling_steps": 1, "save_every": 2,
        "learning_rate": 1e-3, "cache": place / "cache", "ema_decay": 0.5, "log_every": 1, "long_prompts": "cut",
    }  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    return train_controlnet.main(control_options.Config(out=out, **{**settings, **changes}))


@pytest.mark.slow
def test_an_adapter_goes_on_and_its_constant_rate_may_change(tmp_path):
    tiny.sd().save_pretrained(tmp_path / "model")
    write_samples(tmp_path / "data", 8)
    whole = control(tmp_path, tmp_path / "whole", 6)
    control(tmp_path, tmp_path / "cut", 3)
    assert same(whole, control(tmp_path, tmp_path / "cut", 6, sampling_steps=2))
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert (report["step"], report["resumed"]) == (6, True)
    control(tmp_path, tmp_path / "cut", 7, learning_rate=5e-4, new_factor=1.0)
    assert rate_of(tmp_path / "cut", 7, "control") == 5e-4
    with pytest.raises(ValueError, match=r"lr_floor: 1\.0 there, 0\.5 now"):
        control(tmp_path, tmp_path / "cut", 8, lr_floor=0.5)


@pytest.mark.parametrize("stage", ["", "warm-up"])
def test_a_demo_of_another_length_is_refused_before_its_teacher_is_trained_on(tmp_path, stage):
    """Its student is of the teacher as it was."""
    for name, step in (("teacher", 6), (f"student/{stage}", 2)):
        folder = tmp_path / name / "checkpoints" / f"step-{step:09d}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"steps": 6}))
    before = files_of(tmp_path)
    with pytest.raises(
        ValueError, match=r"whose teacher was trained for 6 steps; this command trains it for 12\."
    ):
        quickstart.main(quickstart.Demo(out=tmp_path, teacher_steps=6, long=True))
    assert files_of(tmp_path) == before
