"""A process that ends without a word is missed at once; one that says good-bye is not. Folders are one folder."""

import json
import os
import signal
import socket
import time

import pytest
from ranks import run_on_ranks

from scorefield.training import lifelines
from scorefield.training.lifelines import Lifelines, Peer
from scorefield.training.ranks import check_shared


@pytest.fixture
def store():
    held = {}

    def line(rank):
        return Lifelines(rank, "127.0.0.1", lambda told: held.update(told=told), lambda: held.get("told"))

    line.held = held
    return line


def told(lines, tries=50):
    """Who is missed within ``tries`` looks."""
    return next((gone for _ in range(tries) if (gone := lines.lost(0.02)) is not None), None)


def test_a_killed_process_is_missed_by_the_first_rank_and_the_first_rank_by_it(store):
    for dies, rank in ((1, 0), (0, 1)):
        read, write = os.pipe()
        store.held.clear()
        if rank == 0:
            lines = store(0)  # its port is known before the other one begins
        if (child := os.fork()) == 0:
            mine = store(dies)
            for _ in range(2):
                mine.lost(0.1)
            os.write(write, (store.held["told"] + "\n").encode())
            while True:
                mine.lost(1)
        with os.fdopen(read) as said:
            store.held["told"] = said.readline().strip()
        os.close(write)
        lines = lines if rank == 0 else store(1)
        assert told(lines, 10) is None, "it is alive"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        start = time.monotonic()
        assert told(lines) == Peer(dies, socket.gethostname(), child)
        assert time.monotonic() - start < 10
        lines.close()


def test_who_ends_in_order_is_not_missed(store):
    first, second = store(0), store(1)
    for one in (second, first, second):
        assert told(one, 3) is None
    second.close()
    assert told(first, 10) is None
    first.close()


def test_a_stranger_who_hangs_up_ends_nothing(store):
    first = store(0)
    port = json.loads(store.held["told"])[0]
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n".ljust(512), json.dumps(["wrong", 1, "x", 1]).encode().ljust(512)):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)
            assert told(first, 3) is None
        assert told(first, 5) is None
    first.close()


def test_a_stranger_is_told_nothing_and_one_who_says_half_a_word_holds_up_nobody(store, monkeypatch):
    monkeypatch.setattr(lifelines, "PATIENCE", 1)
    first = store(0)
    port, secret = json.loads(store.held["told"])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"[")
        began = time.monotonic()
        assert told(first, 5) is None
        assert time.monotonic() - began < 5, "it waited for the rest"
        stranger.settimeout(0.5)
        try:
            heard = stranger.recv(512)
        except OSError:
            heard = b""
        assert secret.encode() not in heard, "with it a stranger could end the run"
    second = store(1)
    for one in (second, first, second):
        assert told(one, 3) is None
    assert [peer.rank for peer in second._wires.values()] == [0], "who knows the secret is answered"
    second.close()
    first.close()


def test_where_nothing_gets_through_there_is_no_alarm_and_no_end_of_calls(store):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        store.held["told"] = f'[{closed.getsockname()[1]}, "x"]'
    lines = store(1)
    assert told(lines, 6) is None
    assert lines._tries == 0


def test_a_folder_that_is_not_shared_is_refused_by_name(tmp_path):
    """As on two machines without a common disk: each rank finds another folder under the name."""

    def look(accelerator):
        said = []
        for name in ("common", f"own {accelerator.process_index}"):
            (tmp_path / name).mkdir(exist_ok=True)
            accelerator.wait_for_everyone()
            try:
                check_shared(tmp_path / name / "run", accelerator, patience=0.3)
            except ValueError as error:
                said.append(str(error))
        return said

    notes = tmp_path / "notes"
    notes.mkdir()
    for rank, said in enumerate(run_on_ranks(look, notes)):
        assert len(said) == 1
        assert f"own {rank}/run is not one folder for all ranks: rank 1 on {socket.gethostname()} does" in said[0]
    assert not [path for name in ("common", "own 0", "own 1") for path in (tmp_path / name).rglob("*")]
