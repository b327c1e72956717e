"""One rank that gives up takes the others with it, wherever they wait."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

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
