"""A folder or file that is replaced is the old one or the new one, whenever the process dies."""

import os

import pytest

from score import atomic
from score.atomic import whole_file, whole_folder


class Killed(BaseException):
    pass


def write(final, text):
    with whole_folder(final) as folder:
        (folder / "a.txt").write_text(text)


@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_rename_leaves_the_older_folder(tmp_path, monkeypatch, at):
    write(tmp_path / "x", "old")
    replace, calls = os.replace, []

    def failing(*paths):
        calls.append(paths)
        if len(calls) == at:
            raise Killed
        return replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(Killed):
            write(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_kill_between_the_renames_is_undone_by_the_next_call(tmp_path):
    """Nothing runs after SIGKILL: the state on disk is made by hand."""
    write(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / ".replaced-x")
    with pytest.raises(Killed), whole_folder(tmp_path / "x"):
        raise Killed
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    write(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_error_inside_leaves_nothing(tmp_path):
    def half():
        with whole_folder(tmp_path / "x") as folder:
            (folder / "half.txt").write_text("half")
            raise Killed

    with pytest.raises(Killed):
        half()
    assert list(tmp_path.iterdir()) == []


def write_file(final, text):
    with whole_file(final) as path:
        assert path.suffix == final.suffix  # writers choose the format by it
        path.write_text(text)


def test_a_file_appears_whole_in_a_new_folder_and_is_replaced(tmp_path):
    final = tmp_path / "new" / "a.txt"
    for text in ("old", "new"):
        write_file(final, text)
        assert final.read_text() == text
    assert [path.name for path in final.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_older_file_and_no_other(tmp_path, monkeypatch):
    final = tmp_path / "a.txt"
    write_file(final, "old")

    def half():
        with whole_file(final) as path:
            path.write_text("half")
            raise Killed

    def failing(*paths):
        raise Killed

    with pytest.raises(Killed):
        half()
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Killed):
        write_file(final, "new")
    assert final.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_files_in_subfolders_reach_the_disk_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "_sync", lambda path: synced.append(path.name))
    with whole_folder(tmp_path / "model") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("x")
    assert {"weights", "unet"} <= set(synced)
