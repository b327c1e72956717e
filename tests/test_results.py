"""What a finished run left is replaced by that run only, and what a user put beside it never."""

import dataclasses
import shutil

import pytest

import scorefield.commands.features as train_features
import scorefield.commands.teacher as train_teacher
from scorefield.commands.options import TrainFeatures, TrainTeacher

TINY = {"steps": 2, "batch_size": 16, "save_every": 1, "log_every": 2, "width": 16, "depth": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = TrainTeacher(out=tmp_path_factory.mktemp("finished") / "run", **TINY)
    train_teacher.main(config)
    return config


@pytest.fixture
def config(finished, tmp_path):
    """A copy of a finished run."""
    shutil.copytree(finished.out, tmp_path / "run")
    return dataclasses.replace(finished, out=tmp_path / "run")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["notes.txt", "denoiser.json"])
def test_a_users_file_in_a_result_is_named_at_the_start(config, name):
    (config.out / "teacher" / name).write_text("mine")
    before = contents(config.out)
    with pytest.raises(ValueError, match=f"teacher would be replaced, but it holds {name}"):
        train_teacher.main(config)
    assert contents(config.out) == before


def test_another_configuration_replaces_no_result(config):
    """As after ``rm -r checkpoints``."""
    shutil.rmtree(config.out / "checkpoints")
    before = contents(config.out)
    with pytest.raises(ValueError, match="holds teacher of another run, and no checkpoint"):
        train_teacher.main(dataclasses.replace(config, learning_rate=1e-4))
    assert contents(config.out) == before
    train_teacher.main(config)  # the same run again


def test_a_result_may_be_a_link(config, tmp_path):
    (config.out / "teacher").rename(tmp_path / "elsewhere")
    (config.out / "teacher").symlink_to(tmp_path / "elsewhere")
    train_teacher.main(config)
    assert (config.out / "teacher").is_symlink()


def test_features_never_replace_another_folder(config):
    before = contents(config.out)
    with pytest.raises(ValueError, match="would be replaced, but it holds"):
        train_features.main(TrainFeatures(out=config.out, steps=1, device="cpu"))
    assert contents(config.out) == before
