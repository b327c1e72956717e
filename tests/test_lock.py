"""One run in a folder at a time, whoever is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import scorefield.commands.command as command
import toyworld.demo as quickstart
from scorefield.training.lock import NAME, FolderInUseError, FolderLock
from scorefield.training.options import RunOptions
from toyworld.options import demo_folders

ROOT = Path(__file__).resolve().parent.parent
# Without the package, whose import takes seconds.
HOLDER = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("lock", sys.argv[1])
sys.modules["lock"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
lock = module.FolderLock(Path(sys.argv[2]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``tmp_path / "run"``."""
    lock = ROOT / "scorefield" / "training" / "lock.py"
    words = [sys.executable, "-c", HOLDER, str(lock), str(tmp_path / "run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def start(out, main, *words):
    command.run(main, RunOptions, arguments=["--out", str(out), *words])


def refuse(config):
    assert (config.out / NAME).exists()
    raise ValueError("refused")


def test_a_second_run_is_told_who_holds_the_folder_and_writes_nothing(holder, tmp_path, monkeypatch, capsys):
    before, done = sorted(path.name for path in (tmp_path / "run").iterdir()), []
    with pytest.raises(SystemExit) as stopped:
        start(tmp_path / "run", done.append)
    said = capsys.readouterr().err
    assert (stopped.value.code, done) == (2, [])
    assert f"process {holder.pid} on {socket.gethostname()!r}" in said
    assert "choose another --out" in said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before == [NAME]
    start(tmp_path / "run", done.append, "--dry-run")  # which is free, as is another folder
    start(tmp_path / "other", done.append)
    monkeypatch.setattr("scorefield.commands.command.is_first_rank", lambda: False)  # it alone locks
    start(tmp_path / "run", done.append)
    assert [config.out.name for config in done] == ["run", "other", "run"]


def test_a_killed_holder_leaves_no_lock(holder, tmp_path):
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(FolderInUseError):
        lock.acquire()
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=10)
    assert (tmp_path / "run" / NAME).exists(), "the file stays, the lock does not"
    lock.acquire()
    assert json.loads((tmp_path / "run" / NAME).read_text())["process"] == os.getpid()
    lock.release()
    lock.release()
    assert not (tmp_path / "run" / NAME).exists()


def test_nothing_is_left_of_a_run_that_is_refused_and_what_was_written_stays(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        start(tmp_path / "new" / "run", refuse)
    assert stopped.value.code == 2
    assert "refused" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    lock = FolderLock(tmp_path / "new" / "run")
    lock.acquire()
    (tmp_path / "new" / "run" / "a.txt").write_text("a")
    lock.release()
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["a.txt"]


def test_the_lock_follows_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "big")
    first, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "big")
    first.acquire()
    with pytest.raises(FolderInUseError):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(descriptor, kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("scorefield.training.lock.fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="without locks"):
        FolderLock(tmp_path / "run").acquire()


def test_quickstart_holds_the_folders_of_both_trainings(tmp_path):
    config = quickstart.Demo(out=tmp_path)
    outs = [quickstart.teacher_config(config).out, quickstart.student_config(config, tmp_path).out]
    assert set(demo_folders(config)) == {tmp_path, *outs}
