"""A disk that fills up: one line and exit code 1, wherever it happens; what was saved before is whole and used."""

import contextlib
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import distill.recipe as train_dmd
import scorefield.cli as cli
import scorefield.commands.command as command
import scorefield.commands.evaluate as evaluate
import scorefield.commands.features as train_features
import scorefield.commands.sample as sample
import scorefield.commands.teacher as train_teacher
import scorefield.training.features as features

SIZE = 2**22


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system of four MiB."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(autouse=True)
def empty(request):
    yield
    if "disk" in request.fixturenames:
        for path in request.getfixturevalue("disk").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def leave(disk, free):
    """Fill the disk up to some bytes."""
    (disk / "ballast").unlink(missing_ok=True)
    room = shutil.disk_usage(disk).free - free
    if room > 0:
        (disk / "ballast").write_bytes(bytes(room))


def run(script, **options):
    """Exit code, and what was said."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = [word for word in words if word != "True"]
    AcceleratorState._reset_state(True)
    said, name = io.StringIO(), f"{script.__name__}:main"
    (place,) = {one.options for one in cli.COMMANDS.values() if one.main == name}
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            command.run(script.main, cli.found(place), arguments=words)
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, said.getvalue()


def litter(disk):
    return [path.name for path in disk.rglob("*") if re.search("writing|replaced|tmp", path.name)]


TEACHER = {"steps": 6, "batch_size": 4, "save_every": 2, "log_every": 1, "width": 16, "depth": 1}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    assert run(train_teacher, out=out, **TEACHER)[0] == 0
    return out / "teacher"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=np.random.RandomState(0).rand(40, 1, 8, 8), labels=np.arange(40) % 10)
    return path


def check_full(disk, script, result, frees, **options):
    """At each amount of free room a whole result, or one line and exit code 1; with room enough the result."""
    codes = []
    for free in frees:
        leave(disk, free)
        code, said = run(script, out=disk / result, **options)
        codes.append(code)
        assert code in (0, 1), (free, said)
        assert code == 0 or said.count("error: the disk is full") == 1, (free, said)
        assert "Traceback" not in said
        assert not litter(disk), (free, litter(disk))
    assert 1 in codes, codes
    (disk / "ballast").unlink()
    assert run(script, out=disk / result, **options)[0] == 0


PAGE = 4096
"""Of a tmpfs."""


def test_a_training_goes_on_from_its_last_good_checkpoint(disk, teacher):
    """Whatever it was writing: notes, logs, weights, optimiser, manifest, result."""
    frees = [PAGE * pages for pages in (0, 1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128)]
    check_full(disk, train_teacher, "run", frees, **TEACHER)
    ours, whole = (
        load_file(disk / "run" / "teacher" / "model.safetensors"),
        load_file(teacher / "model.safetensors"),
    )
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_after_a_full_disk_the_run_resumes_from_what_is_whole(disk, teacher):
    leave(disk, SIZE)
    assert run(train_teacher, out=disk / "run", **{**TEACHER, "steps": 2})[0] == 0
    steps = {**TEACHER, "steps": 2}
    saved = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    shutil.rmtree(disk / "run" / "teacher")
    leave(disk, PAGE)
    code, said = run(train_teacher, out=disk / "run", **steps)
    assert (code, "resumed from step 2" in said) == (1, True), said
    assert sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()) == saved
    (disk / "ballast").unlink()
    code, said = run(train_teacher, out=disk / "run", **steps)
    assert (code, "resumed from step 2" in said) == (0, True), said


FEW = [PAGE * pages for pages in (0, 1, 2, 3, 5, 9)]


@pytest.mark.parametrize("name", ["samples", "samples.npz"])
def test_samples(disk, teacher, name):
    check_full(disk, sample, name, FEW, teacher=str(teacher), num_images=40, steps=2)


def test_figures(disk, images, tmp_path):
    network = features.Classifier(features.Facts(1, 8, 10))
    known = features.save_classifier(network, tmp_path / "features")
    check_full(disk, evaluate, "figures.json", FEW[:2], generated=images, reference=images, features=known)


def test_features(disk, images):
    frees = [PAGE * pages for pages in (0, 1, 2, 40, 60, 80)]
    check_full(disk, train_features, "features", frees, data=images, steps=2, batch_size=4)


def test_a_distillation(disk, teacher):
    tiny = {
        "steps": 2, "batch_size": 4, "save_every": 2, "log_every": 1, "student_every": 1, "warmup_steps": 1,
        "num_pairs": 4, "pair_steps": 2, "fake_warmup": 1, "guard_images": 64, "student_lr": 1e-4, "fake_lr": 1e-4,
        "warmup_lr": 1e-3, "gan_weight": 0, "skip_teacher_check": True,
    }  # fmt: skip
    frees = [PAGE * pages for pages in (1, 8, 24, 48, 80, 120)]
    check_full(disk, train_dmd, "run", frees, teacher=teacher, **tiny)


def test_a_cache_that_is_full_is_done_without(disk, teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    leave(disk, 0)
    with pytest.warns(UserWarning, match="cannot be written"):
        code, said = run(
            train_dmd, out=tmp_path / "run", teacher=teacher, steps=2, batch_size=4, num_pairs=64, pair_steps=2,
            guard_images=0, gan_weight=0, student_every=1, fake_warmup=1, skip_teacher_check=True,
        )  # fmt: skip
    assert code == 0, said
    assert not litter(disk)
