"""A folder or file that is replaced is the old one or the new one, whenever the process dies."""

import os
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from refusals import refused

from scorefield import atomic
from scorefield.atomic import MARKER, check_replaceable, is_full, remove_folder, whole_file, whole_folder


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


def interrupted(writer, final):
    with writer(final) as path:
        (path / "half.txt" if path.is_dir() else path).write_text("half")
        raise Killed


def test_a_kill_between_the_renames_is_undone_by_the_next_call_and_an_error_leaves_nothing(tmp_path):
    """Nothing runs after SIGKILL: the state on disk is made by hand."""
    write(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / ".replaced-x")
    with pytest.raises(Killed):
        interrupted(whole_folder, tmp_path / "x")
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    write(tmp_path / "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "new"
    with pytest.raises(Killed):
        interrupted(whole_folder, tmp_path / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def write_file(final, text):
    with whole_file(final) as path:
        assert path.suffix == final.suffix  # writers choose the format by it
        path.write_text(text)


def test_a_file_appears_whole_in_a_new_folder_is_replaced_and_survives_errors(tmp_path, monkeypatch):
    final = tmp_path / "new" / "a.txt"
    for text in ("older", "old"):
        write_file(final, text)
        assert final.read_text() == text

    def failing(*paths):
        raise Killed

    with pytest.raises(Killed):
        interrupted(whole_file, final)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(Killed):
        write_file(final, "new")
    assert final.read_text() == "old"
    assert [path.name for path in final.parent.iterdir()] == ["a.txt"]


@pytest.fixture
def calls(monkeypatch):
    """What was flushed and renamed, in order: a power cut keeps only what was flushed before."""
    made, sync, replace = [], os.fsync, os.replace

    def flushed(descriptor):
        made.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def renamed(source, target):
        made.append(("rename", str(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return made


def test_a_folders_data_reach_the_disk_before_its_name_does(tmp_path, calls):
    with whole_folder(tmp_path / "model") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text("x")
    at = calls.index(("rename", str(folder)))
    for name in ("unet/weights", "unet", MARKER, ""):
        assert ("flush", str(folder / name)) in calls[:at], name
    assert ("flush", str(tmp_path)) in calls[at:]


def test_a_files_data_reach_the_disk_before_its_name_does(tmp_path, calls):
    with whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert calls == [("flush", str(temporary)), ("rename", str(temporary)), ("flush", str(tmp_path))]


def test_what_killed_writers_left_is_removed(tmp_path):
    """SIGKILL leaves what is being written; another process's file, here or on another machine, stays."""
    killed = subprocess.Popen(["true"])
    killed.wait()
    here = socket.gethostname()
    gone = [f".writing-{here}-{killed.pid}-5-a.txt", ".writing-older-1-1-5-a.txt", ".writing-77-5-a.txt"]
    kept = [f".writing-{here}-{os.getppid()}-5-a.txt", ".writing-another-1-1-5-a.txt", ".writing-mine-a.txt"]
    kept += [f".writing-{here}-{killed.pid}-5-b.txt", "writing-1-1-a.txt"]
    for name in (*gone, *kept):
        (tmp_path / name).write_text("half")
    for name in (".writing-older-1-1-5-a.txt", ".writing-77-5-a.txt", ".writing-mine-a.txt"):
        os.utime(tmp_path / name, (0, 0))
    write_file(tmp_path / "a.txt", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a.txt"])
    for name in (f".writing-{here}-{killed.pid}-0-x", f".writing-{here}-{os.getppid()}-0-x"):
        (tmp_path / name / "inner").mkdir(parents=True)
    write(tmp_path / "x", "whole")
    kept.append(f".writing-{here}-{os.getppid()}-0-x")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a.txt", "x"])


def test_two_that_write_one_folder_at_once_do_not_disturb_each_other(tmp_path):
    with whole_folder(tmp_path / "x") as first:
        (first / "a.txt").write_text("first")
        write(tmp_path / "x", "second")
        assert (tmp_path / "x" / "a.txt").read_text() == "second"
        (first / "b.txt").write_text("first")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [MARKER, "a.txt", "b.txt"]
    assert (tmp_path / "x" / "a.txt").read_text() == "first"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write(tmp_path / "x", str(number)), range(64)))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["x" * 255, "模" * 85, "x" * 251 + ".npz"])
def test_a_name_that_can_be_written_can_be_begun(tmp_path, name):
    for text in ("one", "two"):
        write(tmp_path / name, text)
    assert (tmp_path / name / "a.txt").read_text() == "two"
    shutil.rmtree(tmp_path / name)
    write_file(tmp_path / name, "three")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True), (OSError(122, "Disk quota exceeded"), True),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"), True),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(13, "Permission denied"), False), (RuntimeError("unexpected pos 5"), False),
    ],
)  # fmt: skip
def test_a_full_disk_is_known_in_all_words(error, full):
    assert is_full(error) is full
    outer = ValueError("cannot be written")
    outer.__cause__ = error
    assert is_full(outer) is full


def foreign_file(folder):
    (folder / "thesis.txt").write_text("years of work")


def edited(folder):
    (folder / "a.txt").write_text("mine")


def linked(folder):
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to("/etc/hostname")


def without_marker(folder):
    (folder / MARKER).unlink()


def nested(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize("change", [foreign_file, edited, linked, without_marker, nested])
def test_only_what_a_run_wrote_is_replaced_or_removed(tmp_path, change):
    final = tmp_path / "x"
    write(final, "old")
    change(final)
    before = {path.name: path.read_bytes() for path in final.rglob("*") if path.is_file()}
    for act in (lambda: write(final, "new"), lambda: remove_folder(final), lambda: check_replaceable(final)):
        with refused(r"would be replaced, but it holds .*txt.*Move it elsewhere"):
            act()
    assert {path.name: path.read_bytes() for path in final.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_that_comes_while_the_folder_is_written_is_kept(tmp_path):
    write(tmp_path / "x", "old")
    with refused(r"thesis\.txt, which no run wrote"), whole_folder(tmp_path / "x"):
        foreign_file(tmp_path / "x")
    assert {path.name for path in (tmp_path / "x").iterdir()} == {MARKER, "a.txt", "thesis.txt"}


def test_a_large_file_of_another_content_and_the_same_size_is_not_ours(tmp_path):
    with whole_folder(tmp_path / "x") as folder:
        (folder / "weights").write_bytes(bytes(4 * atomic.SAMPLE))
    check_replaceable(tmp_path / "x")
    (tmp_path / "x" / "weights").write_bytes(bytes(4 * atomic.SAMPLE - 1) + b"1")
    with refused("weights, which was changed"):
        check_replaceable(tmp_path / "x")


def test_an_empty_folder_and_a_copy_of_our_own_are_replaced_and_removed(tmp_path):
    (tmp_path / "x").mkdir()
    write(tmp_path / "x", "old")
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    write(tmp_path / "y", "new")
    assert (tmp_path / "y" / "a.txt").read_text() == "new"
    for name in ("x", "y", "nowhere"):
        remove_folder(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder_is_kept(tmp_path):
    (tmp_path / "x").write_text("mine")
    with refused("is a file"):
        write(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "mine"


def test_a_link_leads_to_the_folder_that_is_replaced(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "big" / "student")
    for text in ("old", "new"):
        write(tmp_path / "x", text)
        assert (tmp_path / "big" / "student" / "a.txt").read_text() == text
    assert (tmp_path / "x").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "x"]
    assert [path.name for path in (tmp_path / "big").iterdir()] == ["student"]


def test_a_caller_may_know_its_files_by_name(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.own").write_text("old")
    own = lambda name: name.endswith(".own")  # noqa: E731
    with whole_folder(tmp_path / "x", own) as folder:
        (folder / "b.own").write_text("new")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["b.own"], "and no marker"
    foreign_file(tmp_path / "x")
    with refused("thesis"), whole_folder(tmp_path / "x", own):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format": "scorefield-folder-1"}'])
def test_a_marker_that_says_nothing_proves_nothing(tmp_path, text):
    write(tmp_path / "x", "old")
    (tmp_path / "x" / MARKER).write_text(text)
    with refused(r"a\.txt, which no run wrote"):
        check_replaceable(tmp_path / "x")
