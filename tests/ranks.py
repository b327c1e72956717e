"""Ranks as copies of this process: they import nothing again, for which launched ones need half a minute."""

import os
import signal
import socket
import sys
import time
import traceback
from unittest.mock import patch

import torch


def run_on_ranks(function, folder, *, num_ranks=2, timeout=120):
    """What ``function(accelerator)`` returns on each of several processes that share gloo; tensors and numbers.

    Raises ``AssertionError`` with the traceback of a rank that failed, or if they do not end in time.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_ranks):
        if (child := os.fork()) == 0:
            _end_as_rank(function, folder, rank, {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
                "MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": 1,
            })  # fmt: skip
        children.append(child)
    deadline, codes = time.monotonic() + timeout, {}
    while len(codes) < num_ranks and time.monotonic() < deadline and not any(codes.values()):
        for child in set(children) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in set(children) - set(codes):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    said = "\n".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))
    assert list(codes.values()) == [0] * num_ranks, said or f"the ranks did not end within {timeout} s"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _end_as_rank(function, folder, rank, environment):
    # Nothing of the test's own end may run here: no finally, no exit handlers.
    code = 1
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        with patch.dict(os.environ, {name: str(value) for name, value in environment.items()}):
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(cpu=True)
            assert accelerator.num_processes == int(environment["WORLD_SIZE"]), "the ranks are alone"
            torch.save(function(accelerator), folder / f"rank{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        os._exit(code)
