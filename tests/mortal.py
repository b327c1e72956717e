"""Runs of the console command that are killed: a server imports the libraries once and forks for each run.

    python tests/mortal.py

reads one order a line, JSON: words of the command, the folder to run in, where to put its output, and at which of
its writes it dies, 0 for none. It answers with the process, and with its wait status when that has ended.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import threading

WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "os.link")
UNFINISHED = "/.writing-"


class Clock:
    """Counts what a run writes below a folder, and ends the process without a word at one of these moments."""

    def __init__(self, folder, at):
        self.folder, self.at, self.count = folder + "/", at, 0

    def __call__(self, event, arguments):
        if event not in WRITES and event != "open":
            return
        name = arguments[0] if arguments else None
        if not isinstance(name, str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(name))
        if not path.startswith(self.folder):
            return
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            # What is read of an unfinished folder, to flush it or to sum it up, is a moment within its writing.
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and UNFINISHED not in path:
                return
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(order):
    """What the child does."""
    os.setsid()
    os.chdir(order["folder"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["XDG_CACHE_HOME"] = order["folder"] + "/cache"
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    clock, code = Clock(order["folder"], order["at"]), 1
    sys.addaudithook(clock)
    try:
        importlib.import_module("scorefield.cli").main(order["words"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        importlib.import_module("traceback").print_exc()
    print(f"writes: {clock.count}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def serve():
    for name in ("distill.recipe", "sds.recipe", "controlnet.recipe", "scorefield.commands.teacher",
                 "scorefield.commands.command", "toyworld.control", "tensorboard", "trimesh", "skimage.measure",
                 "imageio_ffmpeg", "diffusers", "transformers"):  # fmt: skip
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("nerfstudio.cameras.cameras")
    assert threading.active_count() == 1, "a fork would not have the other threads"
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            work(json.loads(line))
        print(process, file=answers)
        _, status = os.waitpid(process, 0)
        print(status, file=answers)


if __name__ == "__main__":
    serve()
