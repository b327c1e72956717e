"""One rank that gives up takes the others with it, wherever they wait."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import scorefield.commands.command as command
from scorefield.training.refusal import Ranks, Refusal

ROOT = Path(__file__).resolve().parent.parent


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(rank, size, port):
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_all_hear_who_gave_up_first_and_only_that_one_speaks():
    port, heard, all_heard = free_port(), [], threading.Event()

    def leave(rank, refusal):
        heard.append((rank, refusal))
        if len(heard) == 2:
            all_heard.set()

    ranks = [
        Ranks(lambda refusal, rank=rank: leave(rank, refusal), environment(rank, 3, port)) for rank in (0, 1, 2)
    ]
    assert ranks[1].give_up(2), "it says why"
    assert all_heard.wait(30)
    assert sorted(heard) == [(0, Refusal(1, 2)), (2, Refusal(1, 2))]
    assert not ranks[2].give_up(1), "another one has said why"
    for one in ranks:
        one.close()


def test_a_rank_alone_has_nobody_to_tell():
    before = threading.active_count()
    for told in ({}, environment(0, 1, 1), {"RANK": "0", "WORLD_SIZE": "2"}):
        assert Ranks(pytest.fail, told).give_up(2)
    assert threading.active_count() == before


def test_nobody_waits_for_a_first_rank_that_never_came(monkeypatch):
    """As with a launch of which only one machine started."""
    monkeypatch.setattr("scorefield.training.refusal.PATIENCE", 0.3)
    start = time.perf_counter()
    assert Ranks(pytest.fail, environment(1, 2, free_port())).give_up(2)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(("error", "code"), [
    (ValueError("no such file"), 2), (FloatingPointError("nan"), 1), (RuntimeError("a fault"), 1),
    (SystemExit(2), 2), (SystemExit(143), None), (KeyboardInterrupt(), None),
])  # fmt: skip
def test_every_end_that_others_do_not_share_is_told_and_said_by_the_first_to_give_up(
    monkeypatch, capsys, error, code
):
    def main(config):
        raise error

    def end():
        with pytest.raises((SystemExit, RuntimeError)) as stopped:
            command.run(main, command.RunOptions, arguments=[], folders=lambda config: [])
        return stopped.value

    told = []
    monkeypatch.setattr(Ranks, "give_up", lambda self, code: told.append(code) or True)
    end()
    assert told == ([] if code is None else [code])
    capsys.readouterr()
    monkeypatch.setattr(Ranks, "give_up", lambda self, code: False)  # another one was
    assert code != 2 or end().code == 2
    assert code != 2 or capsys.readouterr().err == ""


WORKER = """
import os, sys
from pathlib import Path
import scorefield.commands.command as command
import scorefield.training.run as fitting
rank, when, out = int(os.environ["RANK"]), sys.argv.pop(1), Path(sys.argv.pop(1))

def main(config):
    if rank and when == "before":
        raise ValueError("its data are not there")
    accelerator = fitting.start(config)
    print("met", flush=True)
    if rank:
        raise ValueError("its data are not there")
    accelerator.wait_for_everyone()  # for two hours

command.run(main, command.RunOptions, arguments=["--out", str(out / "run")])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("when", "torchrun"), [("before", True), ("behind", False)])
def test_two_real_ranks_end_together_with_the_refusals_code(tmp_path, when, torchrun):
    (tmp_path / "worker.py").write_text(WORKER)
    own = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words, port = [str(tmp_path / "worker.py"), when, str(tmp_path)], free_port()
    if torchrun:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
        environments = [own]
    else:
        launch = [sys.executable, *words]
        environments = [own | environment(rank, 2, port) for rank in (0, 1)]
    started = [
        subprocess.Popen(launch, env=one, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for one in environments
    ]
    answers = [process.communicate(timeout=240) for process in started]
    said = "".join(stderr for _, stderr in answers)
    assert said.count("error on rank 1: its data are not there") == 1, said
    assert "error: " not in said
    assert "".join(stdout for stdout, _ in answers).count("met") == (0 if when == "before" else 2)
    if torchrun:
        assert said.count("exitcode  : 2") == 2, said
    else:
        assert [process.returncode for process in started] == [2, 2], said
    assert not (tmp_path / "run").exists()


def test_ranks_that_are_started_again_do_not_call_those_that_are_gone(monkeypatch):
    """torchrun keeps one store for all attempts; addresses of the first one are still in it."""
    from torch import distributed

    from scorefield.training.ranks import meeting

    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("default_pg/address", "of a rank that is gone")
    for name, value in environment(1, 2, store.port).items():
        monkeypatch.setenv(name, value)
    assert meeting() == {}
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert meeting() == {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    for _ in range(2):
        own, rank, size = next(distributed.rendezvous(meeting()["init_method"]))
        assert (rank, size) == (1, 2)
        assert not own.check(["default_pg/address"])
    own.set("default_pg/address", "of this attempt")
    assert store.get("default_pg/address") == b"of a rank that is gone"


def as_rank(rank, port, folder):
    """What a forked process does as one of two ranks of a run that never ends, until it is missed."""
    from accelerate.state import AcceleratorState

    import scorefield.training.run as running

    os.environ.update(environment(rank, 2, port), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="1")
    said = os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT)
    sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)
    AcceleratorState._reset_state(reset_partial_state=True)

    def main(config):
        accelerator = running.start(config)
        while True:
            accelerator.wait_for_everyone()
            (folder / f"met{rank}").touch()
            time.sleep(0.05)

    with contextlib.suppress(SystemExit):
        command.run(main, command.RunOptions, arguments=["--out", str(folder / "run")])
    os._exit(99)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_other_one_which_ends(tmp_path, victim):
    port, children = free_port(), []
    for rank in range(2):
        if (child := os.fork()) == 0:
            as_rank(rank, port, tmp_path)
        children.append(child)
    wait_for(lambda: all((tmp_path / f"met{rank}").exists() for rank in range(2)), 60)
    time.sleep(1)  # the wires are drawn beside the run
    os.kill(children[victim], signal.SIGKILL)
    os.waitpid(children[victim], 0)
    start = time.monotonic()
    _, status = os.waitpid(children[1 - victim], 0)
    assert time.monotonic() - start < 15
    said = (tmp_path / f"said{1 - victim}").read_text()
    assert os.waitstatus_to_exitcode(status) == 1, said
    assert f"rank {victim} (process {children[victim]} on {socket.gethostname()}) is gone: it was killed" in said
    assert "Traceback" not in said


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TEACHER = (
    *("-m", "scorefield", "teacher", "--steps", "30", "--save-every", "5", "--batch-size", "16", "--width", "32"),
    *("--depth", "2", "--shard", "2", "--report-to", "none"),
)


def two_pieces(out, *options, **settings):
    """A teacher on two ranks of pieces, by torchrun."""
    own = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*LAUNCH, *options, *TEACHER, "--out", str(out)], env=own, **settings)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights of a run that was left alone."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert two_pieces(out).wait(timeout=500) == 0
    return (out / "teacher" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_and_torchrun_goes_on(tmp_path, alone, victim):
    """The weights at the end are those of a run that was left alone."""
    out = tmp_path / "run"
    with (tmp_path / "said").open("w") as log:
        run = two_pieces(out, "--max-restarts", "1", stdout=log, stderr=log)
    while not any(out.glob("checkpoints/step-*")):
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.01)
    ranks = {rank_of(child): child for child in psutil.Process(run.pid).children(recursive=True)}
    ranks[victim].kill()
    start = time.monotonic()
    psutil.wait_procs([ranks[1 - victim]], timeout=60)
    assert time.monotonic() - start < 20, "the other one ends in seconds"
    assert run.wait(timeout=500) == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert f"rank {victim} (process {ranks[victim].pid} on {socket.gethostname()}) is gone" in said, said
    assert "resumed from step " in said
    assert (out / "teacher" / "model.safetensors").read_bytes() == alone


def rank_of(process):
    """Rank of a process that torchrun started; None for another one."""
    rank = process.environ().get("RANK")
    return None if rank is None else int(rank)
