"""Flags, files and folders that nobody meant: each ends in success, or in one line and exit code 2.

Every case runs a script's whole command line in this process; a traceback is an exception that reaches the test.
"""

import contextlib
import dataclasses
import io
import json
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import scorefield.cli as cli
import scorefield.commands.teacher as train_teacher
import scorefield.training.features as features
from distill.options import Config
from scorefield.commands.options import Evaluate, Sample, TrainFeatures, TrainTeacher

SMALL = ["--steps", "2", "--batch-size", "4", "--save-every", "2", "--log-every", "1"]


def fuzz(cases):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=quiet
    )


class Hung(BaseException):
    """Not an Exception: nothing may catch it on the way."""


def run(script, words):
    """Exit code and what was said; a run of more than a minute is a hang."""

    def hung(number, frame):
        raise Hung(words)

    AcceleratorState._reset_state(True)
    before = signal.signal(signal.SIGALRM, hung)
    said = io.StringIO()
    signal.alarm(60)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            cli.main([script, *words])
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        torch.use_deterministic_algorithms(False)
    return code, said.getvalue()


def check(script, words, result, out=None):
    """Success with the whole result, or 2 with words and nothing of it; ``out`` is the folder of the result."""
    out = out or result.parent
    code, said = run(script, [*words, "--out", str(out)])
    dry = "--dry-run" in words
    if code == 0:
        assert result.exists() is not dry, said
    else:
        assert code == 2, (words, code, said)
        assert "error: " in said or "helptext" in said, "neither ours nor the parser's words"
        assert not result.exists()
    assert not [path for path in out.parent.rglob("*") if ".writing" in path.name or ".replaced" in path.name]
    return code, said


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Nothing is there, and that is said at once."""
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    return train_teacher.main(TrainTeacher(out=out, steps=2, batch_size=8, width=16, depth=1))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    network = features.Classifier(features.Facts(1, 8, 10))
    return features.save_classifier(network, tmp_path_factory.mktemp("features") / "features")


@pytest.fixture
def fresh():
    """A new folder for each case (tmp_path is one for all cases of a test)."""

    def make():
        made.append(Path(tempfile.mkdtemp()))
        return made[-1]

    made = []
    yield make
    for folder in made:
        shutil.rmtree(folder)


NUMBERS = ["-1", "0", "1", "2", "3", "nan", "inf", "-inf", "1e-9", "0.5", "1e9", "99999999999999999999", "", "two"]
COUNTS = (
    "width", "depth", "num_pairs", "unet_layers", "size", "eval_images", "pair_steps", "fake_warmup",
)  # fmt: skip
SLOW = {"out", "steps", "compile", "dry_run", "log_every", "save_every"}


def flag_values(field):
    """Values for one option: good ones, bad ones, and none of its kind."""
    if field.type is bool:
        return st.sampled_from([[], ["maybe"]])
    if field.name in COUNTS:
        return st.sampled_from([[word] for word in (*NUMBERS, "4", "8")])
    return st.sampled_from([[word] for word in (*NUMBERS, "4", "unet", "bf16", "skip", "missing/folder")])


def flags(config_type, skipped):
    """One to three options with arbitrary values."""
    fields = [field for field in dataclasses.fields(config_type) if field.name not in skipped]
    one = st.sampled_from(fields).flatmap(
        lambda field: flag_values(field).map(lambda words: [f"--{field.name.replace('_', '-')}", *words])
    )
    return st.lists(one, min_size=1, max_size=3).map(lambda many: [word for words in many for word in words])


BRIEF_STUDENT = [*SMALL, "--student-every", "1", "--warmup-steps", "1", "--num-pairs", "4", "--pair-steps", "2",
                 "--fake-warmup", "1", "--guard-images", "64", "--skip-teacher-check", "--student-lr", "1e-4",
                 "--fake-lr", "1e-4", "--warmup-lr", "1e-3"]  # fmt: skip
# Options, those that are not fuzzed, words with which the command is brief, its result, its --out.
FLAGS = {
    "teacher": (TrainTeacher, SLOW, [*SMALL, "--width", "8", "--depth", "1", "--unet-channels", "8", "8"],
                "out/teacher", "out"),
    "distill": (Config, {*SLOW, "teacher"}, ["--teacher", "{teacher}", *BRIEF_STUDENT], "out/student", "out"),
    "sample": (Sample, {"out", "teacher"}, ["--teacher", "{teacher}", "--num-images", "2", "--steps", "2"],
               "out", "out"),
    "evaluate": (Evaluate, {"out"}, ["--generated", "{images}", "--reference", "{images}",
                                     "--features", "{features}"], "out.json", "out.json"),
    "features": (TrainFeatures, {"out"}, ["--data", "{images}", "--steps", "2", "--batch-size", "4"],
                 "out/features.json", "out"),
}  # fmt: skip
KNOWN = [
    ("teacher", "--width", "1000000000"), ("teacher", "--width", "1000000000000000"),
    ("teacher", "--batch-size", "1000000000000"), *(("evaluate", "--num-images", number) for number in "012"),
    *((command, "--device", "two") for command in ("evaluate", "features")),
    *((command, flag, "99999999999999999999") for command, flag in
      (("evaluate", "--batch-size"), ("features", "--steps"), ("features", "--batch-size"))),
]  # fmt: skip


def check_flags(command, words, folder, teacher, classifier, dry=False):
    _, _, brief, result, out = FLAGS[command]
    images = folder / "images.npz"
    np.savez(images, images=np.random.RandomState(0).rand(40, 1, 8, 8), labels=np.arange(40) % 10)
    brief = [word.format(teacher=teacher, images=images, features=classifier) for word in brief]
    trains = command in ("teacher", "distill")
    words = [*brief, *words, *(["--dry-run"] if dry and trains else [])]
    code, said = check(command, words, folder / result, folder / out)
    assert trains or code == 0 or "--" in said, said
    if command == "sample":
        assert (folder / "out.grid.png").exists() is (code == 0), (
            "the picture beside the samples: both, or neither"
        )


@pytest.mark.slow
@pytest.mark.parametrize("command", FLAGS)
@fuzz(40)
@given(data=st.data(), dry=st.booleans())
def test_flags(fresh, teacher, classifier, command, data, dry):
    config_type, skipped, *_ = FLAGS[command]
    check_flags(command, data.draw(flags(config_type, skipped)), fresh(), teacher, classifier, dry)


@pytest.mark.parametrize(("command", "flag", "word"), KNOWN)
def test_flags_that_were_trouble_once(fresh, teacher, classifier, command, flag, word):
    check_flags(command, [flag, word], fresh(), teacher, classifier)


def pixels(height, width, mode):
    shape = (height, width, *([len(mode)] if len(mode) > 1 else []))
    return Image.fromarray((np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape), mode)


def png(height, width, mode, cut):
    content = io.BytesIO()
    picture = Image.fromarray(np.arange(height * width).reshape(height, width).astype(np.uint16) * 99)
    (picture if mode == "I;16" else pixels(height, width, mode)).save(content, "png")
    return content.getvalue()[: int(len(content.getvalue()) * cut)]


IMAGES = st.builds(
    png, st.sampled_from([1, 3, 8, 9, 40]), st.sampled_from([1, 8, 40]),
    st.sampled_from(["L", "RGB", "RGBA", "I;16"]), st.sampled_from([1.0, 1.0, 1.0, 0.9, 0.5, 0.0]),
)  # fmt: skip
CONTENTS = st.one_of(IMAGES, IMAGES, IMAGES, st.binary(max_size=60))
NAMES = st.sampled_from(
    ["a.png", "b.png", "c.jpg", "d.PNG", "note.txt", "a/1.png", "a/2.png", "b/1.png", "b/deep/2.webp"]
)
LINES = st.one_of(
    st.builds(
        lambda name, label: json.dumps({"file_name": name, "label": label}), NAMES,
        st.sampled_from([None, 0, 1, -1, 10**9, "cat", 0.5, True, [], {}]),
    ),
    st.sampled_from(["", "{", "[]", "null", '{"file_name": null}', '{"file_name": "../x"}', '{"file_name": ""}']),
)  # fmt: skip


@pytest.mark.slow
@fuzz(60)
@given(
    files=st.dictionaries(NAMES, CONTENTS, max_size=6), lines=st.one_of(st.none(), st.lists(LINES, max_size=5)),
    skip=st.booleans(), size=st.sampled_from([None, "8", "16", "7"]),
    more=st.sampled_from([[], ["--flip"], ["--crop", "random"]]),
)  # fmt: skip
def test_folders_of_images(fresh, files, lines, skip, size, more):
    folder = fresh()
    for name, content in files.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(content)
    if lines is not None:
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    words = ["--data", str(folder / "data"), "--on-bad-data", "skip" if skip else "stop", "--width", "8", *more]
    words += ["--size", size] if size else []
    check("teacher", [*SMALL, "--depth", "1", *words], folder / "out" / "teacher")


def spoilt(content, place, byte, cut):
    """A file with one byte changed, or cut off."""
    place = int(place * len(content))
    return content[:place] if cut else content[:place] + bytes([byte]) + content[place + 1 :]


SPOILING = {"place": st.floats(0, 0.999), "byte": st.integers(0, 255), "cut": st.booleans()}
ARRAYS = st.sampled_from([
    np.zeros((6, 1, 8, 8), np.uint8), np.zeros((6, 8, 8, 3)), np.ones((6, 1, 8, 8), np.int64),
    np.zeros((0, 1, 8, 8)), np.full((6, 1, 8, 8), np.nan), np.zeros((6, 8, 8)), np.zeros((6, 2, 8, 8)),
    np.array(["a", "b"]),
    np.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8),
])  # fmt: skip
LABELS = st.sampled_from([
    None, np.arange(6), np.arange(6) - 1, np.zeros(5, int), np.full(6, 10**12), np.zeros(6), np.array([None] * 6),
])  # fmt: skip


@fuzz(40)
@given(images=ARRAYS, labels=LABELS, whole=st.booleans(), **SPOILING)
def test_npz_files(fresh, images, labels, whole, place, byte, cut):
    folder = fresh()
    path = folder / "data.npz"
    np.savez(path, images=images, **({} if labels is None else {"labels": labels}))
    if not whole:
        path.write_bytes(spoilt(path.read_bytes(), place, byte, cut))
    words = ["--data", str(path), "--width", "8", "--depth", "1"]
    check("teacher", [*SMALL, *words], folder / "out" / "teacher")


def check_samples(folder):
    words = ["--teacher", str(folder / "copy"), "--num-images", "2", "--steps", "2"]
    code, _ = check("sample", words, folder / "out", folder / "out")
    assert (folder / "out.grid.png").exists() is (code == 0)


@fuzz(60)
@given(name=st.sampled_from(["denoiser.json", "features.json", "model.safetensors"]), is_teacher=st.booleans(),
       **SPOILING)  # fmt: skip
def test_results_that_were_tampered_with(fresh, teacher, classifier, name, is_teacher, place, byte, cut):
    folder, is_teacher = fresh(), name == "denoiser.json" or (is_teacher and name != "features.json")
    path = shutil.copytree(teacher if is_teacher else classifier, folder / "copy") / name
    path.write_bytes(spoilt(path.read_bytes(), place, byte, cut))
    if is_teacher:
        check_samples(folder)
    else:
        np.savez(folder / "images.npz", images=np.random.RandomState(0).rand(8, 1, 8, 8))
        words = ["--generated", str(folder / "images.npz"), "--reference", str(folder / "images.npz")]
        words += ["--features", str(folder / "copy")]
        check("evaluate", words, folder / "out.json", folder / "out.json")


DELETED = object()
VALUES = st.sampled_from(
    [DELETED, None, 0, -1, 10**9, 1e400, "", "mlp", [], [1, 2], [0, 0, 0], {}, {"a": 1}, True]
)


@fuzz(60)
@given(place=st.integers(0, 30), value=VALUES)
def test_descriptions_that_were_edited(fresh, teacher, place, value):
    folder = fresh()
    path = shutil.copytree(teacher, folder / "copy") / "denoiser.json"
    description = json.loads(path.read_text())
    holders = [description, description["facts"], description["facts"]["options"], description["schedule"]]
    holder, key = [(holder, key) for holder in holders for key in holder][place % sum(map(len, holders))]
    if value is DELETED:
        del holder[key]
    else:
        holder[key] = value
    path.write_text(json.dumps(description))
    check_samples(folder)


CHECKPOINT = ["config.json", "manifest.json", "state.pt", "teacher.safetensors", "teacher.ema.safetensors"]


@pytest.mark.slow
@fuzz(30)
@given(name=st.sampled_from(CHECKPOINT), **SPOILING)
def test_checkpoints_that_were_tampered_with(fresh, name, place, byte, cut):
    """The run goes on from the checkpoint before, from the start, or says what differs: always with 0 or 2."""
    folder = fresh()
    words = [*SMALL, "--save-every", "1", "--width", "8", "--depth", "1"]
    assert check("teacher", words, folder / "out" / "teacher")[0] == 0
    newest = max((folder / "out" / "checkpoints").iterdir())
    assert {path.name for path in newest.iterdir()} == set(CHECKPOINT), "each of them is spoilt in some case"
    path = newest / name
    path.write_bytes(spoilt(path.read_bytes(), place, byte, cut))
    shutil.rmtree(folder / "out" / "teacher")
    code, said = run("teacher", [*words, "--out", str(folder / "out")])
    assert code in (0, 2), said
    assert (folder / "out" / "teacher").exists() is (code == 0)
