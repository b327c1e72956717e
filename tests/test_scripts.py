"""The scripts as a user runs them, on a few steps: what they write, how they resume, what they refuse."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distill.options as distill_options
import distill.recipe as train_dmd
import scorefield.cli as cli
import scorefield.commands.teacher as train_teacher
import scorefield.training.run as running
import toyworld.demo as quickstart
from distill.student import Student, save_student
from scorefield.commands.options import TrainTeacher
from scorefield.data.images import load_images
from scorefield.data.options import DataOptions
from scorefield.models.networks import ResidualMLP
from scorefield.models.storage import save_denoiser
from scorefield.models.teacher import load_teacher
from toyworld.digits import SHAPE, Judge, load_digits, proportional_labels

TINY = {"steps": 6, "batch_size": 16, "save_every": 3, "log_every": 2}
# A teacher of a few steps would not pass the check.
SHORT = {"warmup_steps": 2, "num_pairs": 20, "skip_teacher_check": True}


def teacher_config(out, **changes):
    return TrainTeacher(out=out, **{**TINY, "width": 32, "depth": 2, **changes})


def student_config(out, teacher, **changes):
    recipe = distill_options.digits()
    return dataclasses.replace(recipe, out=out, teacher=str(teacher), **{**TINY, **SHORT, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train_teacher.main(teacher_config(tmp_path_factory.mktemp("teacher")))


def load(folder):
    student = load_teacher(str(folder))
    return Student(student.denoiser, student.times)


def parts_of(folder):
    teacher = load_teacher(str(folder))
    return teacher.denoiser, teacher.facts


def all_files(folder):
    return {path: path.is_dir() or path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("changes", [{}, {"gan_weight": 0.0, "warmup_steps": 0}, {"regression_weight": 0.25},
                                     {"num_steps": 4, "warmup_steps": 0}, {"guidance": 2.0}])  # fmt: skip
def test_a_student_is_distilled_saved_and_sampled_at_its_own_times(tmp_path, teacher, changes):
    folder = train_dmd.main(student_config(tmp_path, teacher, **changes))
    student = load(folder)
    assert student.num_steps == changes.get("num_steps", 1)
    assert student.times[0] == pytest.approx(20.0)
    images = student.sample(
        torch.randn(10, *SHAPE), {"class_labels": torch.arange(10)}, generator=torch.Generator()
    )
    assert images.shape == (10, *SHAPE)
    assert images.isfinite().all()
    assert json.loads((tmp_path / "config.json").read_text())["student_every"] == 2
    assert list((tmp_path / "logs").glob("events*"))


def test_guidance_and_the_gan_change_the_student(tmp_path, teacher):
    weights = [
        load_file(train_dmd.main(student_config(tmp_path / str(n), teacher, **changes)) / "model.safetensors")
        for n, changes in enumerate([{}, {"guidance": 3.0}, {"gan_weight": 1.0}])
    ]
    names = [name for name in weights[0] if name.endswith("weight")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in names)
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in names)


def test_dry_run_prints_config_parameters_bytes_and_steps_and_writes_nothing(tmp_path, teacher, capsys):
    out = tmp_path / "run"
    train_dmd.main(student_config(out, teacher, dry_run=True, student_every=2))
    printed = capsys.readouterr().out
    assert '"batch_size": 16' in printed
    number = sum(p.numel() for p in load_teacher(str(teacher)).denoiser.network.parameters())
    assert f"\nteacher: {number:,} parameters, {4 * number:,} bytes of weights\n" in printed
    assert f"\nits average: {number:,} parameters, {4 * number:,} bytes of weights\n" in printed
    state = f"{12 * number:,} bytes of gradients and optimiser state"
    assert f"\nstudent: {number:,} parameters, {4 * number:,} bytes of weights, {state}\n" in printed
    assert "\nfake: " in printed
    assert "6 iterations, 96 images on 1 process(es); updates: 3 of the student, 6 of the fake" in printed
    assert "20 teacher pairs of 50 network calls each, 2 warm-up updates of the student" in printed
    assert not out.exists()


@pytest.mark.parametrize("spoil", ["delete", "file"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_folder_that_goes_away_does_not_stop_the_run(tmp_path, monkeypatch, capsys, spoil):
    """Someone tidies up TensorBoard's folder, or its place is taken; long enough for the writer to see."""
    logs, made, preview = tmp_path / "run" / "logs", [], train_teacher.preview

    def tidy(teacher):
        if not made:
            shutil.rmtree(logs)
            if spoil == "file":
                logs.write_text("in the way")
        made.append(preview(teacher))
        return made[-1]

    monkeypatch.setattr(train_teacher, "preview", tidy)
    train_teacher.main(teacher_config(tmp_path / "run", steps=12, log_every=1))
    assert len(made) == 4
    assert load_teacher(str(tmp_path / "run" / "teacher")).shape == (1, 8, 8)
    if spoil == "delete":
        events = EventAccumulator(str(logs)).Reload()
        assert events.Scalars("teacher/loss")[-1].step == 12, "the rest is logged anew"
    assert "the run goes on" in capsys.readouterr().err


def npz(path, images, labels):
    np.savez(path, images=images, labels=labels)
    return path


GOOD = np.zeros((20, 1, 8, 8), np.float32)
NAN = np.where(np.arange(20)[:, None, None, None] == 7, np.nan, GOOD)


@pytest.mark.parametrize(("script", "arguments", "words"), [
    ("teacher", ["--stepz", "5"], ["stepz"]),
    ("teacher", ["--steps", "many"], ["many"]),
    ("teacher", ["--data", "{nan}"], ["image 7", "nan or inf", "Remove or repair"]),
    ("teacher", ["--data", "{negative}"], ["labels", "from -1"]),
    ("teacher", ["--data", "{loud}"], ["reach 3", "expected [-1, 1]"]),
    ("teacher", ["--data", "{missing}"], ["no such file or folder", "no data set"]),
    ("teacher", ["--data", "{halves}"], ["labels", "float64"]),
    ("teacher", ["--data", "{names}"], ["labels", "<U1"]),
    ("teacher", ["--data", "{words}"], ["images", "uint8"]),
    ("teacher", ["--data", "{huge}"], ["fewer than there are images", "1000000000"]),
    ("teacher", ["--data", "{cut}"], ["npz file"]),
    ("teacher", ["--data", "{npy}"], ["expected a folder of pictures", "or is idx"]),
    ("teacher", ["--learning-rate", "inf"], ["--learning-rate", "finite", "got inf"]),
    ("teacher", ["--noise-mean", "nan"], ["--noise-mean", "finite"]),
    ("teacher", ["--dropout", "1.5"], ["--dropout", "[0, 1)", "got 1.5"]),
    ("teacher", ["--label-dropout", "-1"], ["--label-dropout", "[0, 1)"]),
    ("teacher", ["--out", "/proc/x"], ["cannot write"]),
    ("sample", ["--model=x"], ["--model is called --teacher now"]),
    ("distill", ["--base", "x"], ["--base is called --teacher now"]),
    ("distill", ["--student-every", "0"], ["--student-every", "above 0", "got 0"]),
    ("distill", ["--teacher", "{missing}"], ["is no folder here", "Pass the folder of a teacher"]),
    ("distill", ["--data", "{large}"], ["(1, 8, 8)", "(1, 16, 16)", "teacher's own data"]),
    ("distill", ["--data", "{labels}"], ["10 classes", "of 11"]),
    ("distill", ["--teacher", "{student}"], ["is a student", "Pass its teacher"]),
    ("distill", ["--teacher", "{sick}"], ["nan or inf"]),
    ("distill", ["--guidance", "nan"], ["--guidance", "finite"]),
    ("distill", ["--gan-weight", "-1"], ["--gan-weight", "at least 0"]),
    ("distill", ["--warmup-lr", "-1"], ["--warmup-lr", "at least 0"]),
    ("distill", ["--warmup-steps", "-5"], ["--warmup-steps", "at least 0"]),
    ("distill", ["--ema-decay", "1.5", "--dry-run"], ["--ema-decay", "[0, 1)"]),
    ("distill", ["--steps", "4", "--student-every", "5"], ["before the student's first update"]),
    ("demo", ["--student-iterations", "0"], ["--student-iterations", "above 0"]),
    ("demo", ["--student-iterations", "1"], ["--student-iterations", "at least 2"]),
    ("demo", ["--sampling-steps", "0"], ["--sampling-steps", "above 0"]),
    ("demo", ["--num-images", "-5"], ["--num-images", "at least 20"]),
    ("demo", ["--out", "{file}/run"], ["cannot write"]),
    ("demo", ["--seeed", "1"], ["seeed"]),
])  # fmt: skip
def test_bad_input_exits_with_2_says_why_and_writes_nothing(
    tmp_path, teacher, monkeypatch, capsys, script, arguments, words
):
    places = {
        "nan": npz(tmp_path / "nan.npz", NAN, np.zeros(20, int)),
        "negative": npz(tmp_path / "negative.npz", GOOD, np.full(20, -1)),
        "loud": npz(tmp_path / "loud.npz", GOOD + 3, np.zeros(20, int)),
        "large": npz(tmp_path / "large.npz", np.zeros((20, 1, 16, 16), np.float32), np.zeros(20, int)),
        "labels": npz(tmp_path / "labels.npz", GOOD, np.full(20, 10)),
        "halves": npz(tmp_path / "halves.npz", GOOD, np.arange(20) / 2),
        "names": npz(tmp_path / "names.npz", GOOD, np.array(["a"] * 20)),
        "words": npz(tmp_path / "words.npz", GOOD.astype(str), np.zeros(20, int)),
        "huge": npz(tmp_path / "huge.npz", GOOD, np.full(20, 10**9)),
        "cut": tmp_path / "cut.npz",
        "npy": tmp_path / "npy.npy",
        "student": tmp_path / "student",
        "sick": tmp_path / "sick",
        "missing": tmp_path / "missing",
        "file": tmp_path / "nan.npz",
    }
    places["cut"].write_bytes(places["nan"].read_bytes()[:200])
    np.save(places["npy"], GOOD)
    denoiser, facts = parts_of(teacher)
    save_student(Student(denoiser, (20.0,)), places["student"], facts)
    denoiser.network.network.enter.bias.data.fill_(torch.nan)
    save_denoiser(denoiser, places["sick"], facts)
    arguments = [argument.format(**places) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "run")]
    if script == "distill" and "--teacher" not in arguments:
        arguments += ["--teacher", str(teacher)]
    before = all_files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main([script, *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert all(word in printed.err + printed.out for word in words)
    assert all_files(tmp_path) == before


def test_the_demo_shows_both_recipes_without_running_them(tmp_path, capsys):
    quickstart.main(quickstart.Demo(out=tmp_path / "demo", long=True, dry_run=True))
    printed = capsys.readouterr().out
    assert '"steps": 6000' in printed
    assert '"steps": 4000' in printed
    assert not (tmp_path / "demo").exists()


def test_the_same_teacher_by_another_path_resumes_and_another_at_the_same_path_does_not(tmp_path, teacher, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    train_dmd.main(student_config(tmp_path / "run", teacher))
    train_dmd.main(student_config(tmp_path / "run", moved))
    assert "resumed from step 6" in capsys.readouterr().out
    denoiser, facts = parts_of(moved)
    with torch.no_grad():
        denoiser.network.network.enter.bias += 1
    save_denoiser(denoiser, moved, facts)
    with pytest.raises(ValueError, match=r"belongs to another config \(teacher: "):
        train_dmd.main(student_config(tmp_path / "run", moved))


def test_a_student_inherits_all_that_its_teacher_means(tmp_path, teacher):
    """Kind, schedule and time scale: asking the student otherwise is the accident that its folder prevents."""
    denoiser, facts = parts_of(teacher)
    save_denoiser(dataclasses.replace(denoiser, time_scale=2.0), tmp_path / "scaled", facts)
    student = load(train_dmd.main(student_config(tmp_path / "run", tmp_path / "scaled")))
    assert student.denoiser.time_scale == 2.0


def test_teacher_pairs_are_made_where_the_teacher_is(teacher, make_accelerator):
    """On a GPU the noise has to be brought to it; a device without data stands in."""
    whole = load_teacher(str(teacher))
    config = student_config(teacher, teacher)
    whole.denoiser.network.to("meta")
    accelerator = make_accelerator()
    with pytest.raises(NotImplementedError, match="meta tensor"):  # only when the images are brought back
        train_dmd.teacher_pairs(config, whole.denoiser, whole, accelerator, number=20, identity="meta")


@pytest.mark.parametrize("updates", [5, 20, 100, 500])
def test_short_runs_reach_their_learning_rate_too(updates):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    decay, rates = running.cosine(optimizer, updates), []
    for _ in range(updates):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        decay.step()
    assert max(rates) > 0.9
    assert rates[-1] < 0.2


def test_help_explains_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("toyworld-1step", "--student-every", "(DMD2: 5)", "1 means none", "--dry-run"):
        assert words in text


def test_uint8_npz_is_scaled_to_plus_minus_one(tmp_path):
    pixels = np.array([0, 255], np.uint8).repeat(64).reshape(2, 1, 8, 8)
    path = npz(tmp_path / "x.npz", pixels, np.array([0, 1]))
    images = load_images(DataOptions(data=str(path))).batch(torch.arange(2), torch.Generator()).images
    assert images.amin((1, 2, 3)).tolist() == [-1, -1 + 2]
    assert images.dtype == torch.float32


def test_digits_split_is_fixed_disjoint_and_complete():
    parts = load_digits()
    assert [len(part.images) for part in parts] == [900, 300, 597]
    assert torch.equal(parts[0].labels, load_digits()[0].labels)
    rows = torch.cat([torch.cat([part.images.flatten(1), part.labels[:, None]], 1) for part in parts])
    assert len(rows.unique(dim=0)) >= 1790  # the data set itself repeats almost no image
    assert rows[:, :64].min() == -1
    assert rows[:, :64].max() == 1


def test_proportional_labels_keep_frequencies_and_number():
    labels = load_digits()[2].labels
    chosen = proportional_labels(labels, 5000)
    assert len(chosen) == 5000
    share = torch.bincount(labels, minlength=10) / len(labels)
    assert (torch.bincount(chosen, minlength=10) / 5000 - share).abs().max() < 1 / 5000


@pytest.mark.slow
def test_the_judge_knows_real_digits_and_punishes_wrong_labels_and_noise():
    judge = Judge(seed=0, num_images=100)
    assert judge.accuracy > 0.94
    floor = judge.floor()
    noise = judge.score(
        torch.randn(600, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.zeros(600).long()
    )
    assert noise.fd > 10 * floor.fd
    assert noise.kid > floor.kid
    wrong = judge.score(judge.held_out.images, (judge.held_out.labels + 1) % 10)
    assert wrong.fd == pytest.approx(0, abs=1e-6)
    assert wrong.accuracy < 0.05
    assert judge.nearest(judge.train.images) == pytest.approx(0, abs=1e-2)
    assert judge.nearest(judge.held_out.images) > 1


@pytest.mark.slow
def test_quickstart_writes_report_and_pictures(tmp_path, monkeypatch):
    short = {**TINY, **SHORT, "steps": 4}
    monkeypatch.setattr(quickstart, "student_config", lambda config, teacher: dataclasses.replace(
        distill_options.digits(), teacher=str(teacher), out=config.out / "student", seed=config.seed, **short
    ))  # fmt: skip
    path = quickstart.main(quickstart.Demo(out=tmp_path, teacher_steps=4, num_images=60, sampling_steps=50))
    report = json.loads(path.read_text())
    assert report["teacher_steps"] == 50
    assert report["student_steps"] == 1
    for name in ("teacher", "student", "one_step_teacher", "test"):
        assert report[f"{name}_fd"] > 0
        assert isinstance(report[f"{name}_kid"], float)
    assert 0 <= report["student_accuracy"] <= 1
    assert report["speedup"] > 1
    assert report["student_saw_real_images"] is True
    assert {"seconds", "seed", "teacher_accuracy", "num_images"} <= report.keys()
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size[0] > 500
        assert len(picture.convert("L").getcolors()) > 2


@pytest.mark.slow
def test_a_compiled_network_has_the_names_and_the_gradients_of_the_eager_one(tmp_path):
    """Names of weights stay, so that either kind of run loads the checkpoints of the other."""
    config, gradients = teacher_config(tmp_path, compile=True), {}
    accelerator = running.start(config)
    for compile_it in (False, True):
        torch.manual_seed(0)
        network = ResidualMLP((1, 8, 8), 10, width=32, depth=2)
        network.leave[-1].weight.data.normal_(0, 0.1)
        if compile_it:
            network = running.prepare(network, config, accelerator)
        torch.manual_seed(1)
        network(torch.randn(16, 1, 8, 8), torch.rand(16), torch.arange(16) % 10).square().mean().backward()
        gradients[compile_it] = {name: p.grad for name, p in network.named_parameters()}
    assert gradients[True].keys() == gradients[False].keys()
    for name, expected in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_distillation_with_a_critic_runs(tmp_path, teacher):
    """Compiled code calls no hooks, and the critic listens by one: the fake score stays eager."""
    folder = train_dmd.main(student_config(tmp_path, teacher, compile=True, steps=2, student_every=1))
    assert load_teacher(str(folder)).times


def test_deterministic_asks_for_deterministic_kernels_before_training(tmp_path, monkeypatch):
    asked, preview = [], train_teacher.preview

    def look(teacher):
        asked.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        return preview(teacher)

    monkeypatch.setattr(train_teacher, "preview", look)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        train_teacher.main(teacher_config(tmp_path, deterministic=True))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [(True, False)] * 2
