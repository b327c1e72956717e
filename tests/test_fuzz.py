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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import distill.recipe as train_dmd
import scorefield.cli as cli
import scorefield.commands.teacher as train_teacher
import scorefield.training.features as features
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
    "width", "depth", "num_pairs", "unet_layers", "resolution", "eval_images", "pair_steps", "fake_warmup",
)  # fmt: skip


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


SLOW = {"out", "steps", "compile", "dry_run", "log_every", "save_every"}


@fuzz(60)
@given(words=flags(TrainTeacher, SLOW), dry=st.booleans())
@example(words=["--width", "1000000000"], dry=False)
@example(words=["--width", "1000000000000000"], dry=False)
@example(words=["--batch-size", "1000000000000"], dry=False)
def test_flags_of_the_teacher(fresh, words, dry):
    small = [*SMALL, "--width", "8", "--depth", "1", "--unet-channels", "8", "8"]
    check("teacher", [*small, *words, *(["--dry-run"] if dry else [])], fresh() / "out" / "teacher")


@fuzz(50)
@given(words=flags(train_dmd.Config, {*SLOW, "teacher"}), dry=st.booleans())
def test_flags_of_the_distillation(fresh, teacher, words, dry):
    small = ["--teacher", str(teacher), *SMALL, "--student-every", "1", "--warmup-steps", "1", "--num-pairs", "4"]
    small += ["--pair-steps", "2", "--fake-warmup", "1", "--guard-images", "64", "--skip-teacher-check"]
    small += ["--student-lr", "1e-4", "--fake-lr", "1e-4", "--warmup-lr", "1e-3"]
    check("distill", [*small, *words, *(["--dry-run"] if dry else [])], fresh() / "out" / "student")


def check_samples(words, folder):
    """Folder of samples and the picture beside it: both, or neither."""
    code, said = check("sample", words, folder / "out", folder / "out")
    assert (folder / "out.grid.png").exists() is (code == 0)
    return code, said


@fuzz(30)
@given(words=flags(Sample, {"out", "teacher"}))
def test_flags_of_sampling(fresh, teacher, words):
    small = ["--teacher", str(teacher), "--num-images", "2", "--steps", "2"]
    code, said = check_samples([*small, *words], fresh())
    assert code == 0 or "--" in said, said


def labelled(path):
    np.savez(path, images=np.random.RandomState(0).rand(40, 1, 8, 8), labels=np.arange(40) % 10)
    return str(path)


@fuzz(40)
@given(words=flags(Evaluate, {"out"}))
@example(words=["--num-images", "0"])
@example(words=["--num-images", "1"])
@example(words=["--num-images", "2"])
@example(words=["--device", "two"])
@example(words=["--batch-size", "99999999999999999999"])
def test_flags_of_the_figures(fresh, classifier, words):
    folder = fresh()
    images = labelled(folder / "images.npz")
    small = ["--generated", images, "--reference", images, "--features", str(classifier)]
    code, said = check("evaluate", [*small, *words], folder / "out.json", folder / "out.json")
    assert code == 0 or "--" in said, said


@fuzz(40)
@given(words=flags(TrainFeatures, {"out"}))
@example(words=["--device", "two"])
@example(words=["--steps", "99999999999999999999"])
@example(words=["--batch-size", "99999999999999999999"])
def test_flags_of_the_features(fresh, words):
    folder = fresh()
    small = ["--data", labelled(folder / "images.npz"), "--steps", "2", "--batch-size", "4"]
    code, said = check("features", [*small, *words], folder / "out" / "features.json", folder / "out")
    assert code == 0 or "--" in said, said


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


@fuzz(60)
@given(
    files=st.dictionaries(NAMES, CONTENTS, max_size=6), lines=st.one_of(st.none(), st.lists(LINES, max_size=5)),
    skip=st.booleans(), resolution=st.sampled_from([None, "8", "16", "7"]),
    more=st.sampled_from([[], ["--flip"], ["--crop", "random"]]),
)  # fmt: skip
def test_folders_of_images(fresh, files, lines, skip, resolution, more):
    folder = fresh()
    for name, content in files.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(content)
    if lines is not None:
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    words = ["--data", str(folder / "data"), "--on-bad-data", "skip" if skip else "stop", "--width", "8", *more]
    words += ["--resolution", resolution] if resolution else []
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


@fuzz(40)
@given(name=st.sampled_from(["denoiser.json", "model.safetensors"]), **SPOILING)
def test_teachers_that_were_tampered_with(fresh, teacher, name, place, byte, cut):
    folder = fresh()
    shutil.copytree(teacher, folder / "teacher")
    path = folder / "teacher" / name
    path.write_bytes(spoilt(path.read_bytes(), place, byte, cut))
    check_samples(["--teacher", str(folder / "teacher"), "--num-images", "2", "--steps", "2"], folder)


DELETED = object()
VALUES = st.sampled_from(
    [DELETED, None, 0, -1, 10**9, 1e400, "", "mlp", [], [1, 2], [0, 0, 0], {}, {"a": 1}, True]
)


@fuzz(60)
@given(place=st.integers(0, 30), value=VALUES)
def test_descriptions_that_were_edited(fresh, teacher, place, value):
    folder = fresh()
    shutil.copytree(teacher, folder / "teacher")
    path = folder / "teacher" / "denoiser.json"
    description = json.loads(path.read_text())
    holders = [description, description["facts"], description["facts"]["options"], description["schedule"]]
    holder, key = [(holder, key) for holder in holders for key in holder][place % sum(map(len, holders))]
    if value is DELETED:
        del holder[key]
    else:
        holder[key] = value
    path.write_text(json.dumps(description))
    check_samples(["--teacher", str(folder / "teacher"), "--num-images", "2", "--steps", "2"], folder)


@fuzz(30)
@given(name=st.sampled_from(["features.json", "model.safetensors"]), **SPOILING)
def test_features_that_were_tampered_with(fresh, classifier, name, place, byte, cut):
    folder = fresh()
    shutil.copytree(classifier, folder / "features")
    path = folder / "features" / name
    path.write_bytes(spoilt(path.read_bytes(), place, byte, cut))
    np.savez(folder / "images.npz", images=np.random.RandomState(0).rand(8, 1, 8, 8))
    words = ["--generated", str(folder / "images.npz"), "--reference", str(folder / "images.npz")]
    check("evaluate", [*words, "--features", str(folder / "features")], folder / "out.json", folder / "out.json")


CHECKPOINT = ["config.json", "manifest.json", "state.pt", "teacher.safetensors", "teacher.ema.safetensors"]


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
