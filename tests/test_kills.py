"""SIGKILL of the whole process group, at any moment: the same command again ends in the same weights, bit by bit.

A run that silently starts from zero would end equal too, so each restart must say from which step it resumed.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import scorefield.commands.teacher as train_teacher
from scorefield.commands.options import TrainTeacher

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 240, 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    return train_teacher.main(TrainTeacher(out=out, steps=4, batch_size=16, width=32, depth=2))


class Run:
    """The distillation script on one or two ranks, as a process group of its own."""

    def __init__(self, out, teacher, ranks, accumulate):
        options = {
            "--teacher": teacher, "--out": out, "--steps": STEPS, "--save-every": SAVE_EVERY, "--batch-size": 16,
            "--student-every": 5, "--warmup-steps": 3, "--num-pairs": 20, "--accumulate": accumulate,
            "--pair-steps": 3, "--fake-warmup": 3, "--student-lr": 3e-4, "--fake-lr": 3e-4, "--warmup-lr": 1e-3,
            "--guard-images": 64, "--guard-every": STEPS // 2,
        }  # fmt: skip
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        self.command = [*launcher, str(ROOT / "train_scripts" / "train_dmd.py")]
        self.command += ["--skip-teacher-check", *(str(word) for item in options.items() for word in item)]
        self.out, self.log = out, out.with_suffix(".log")

    def start(self):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "TQDM_DISABLE": "1",
            "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def finish(self):
        assert self.process.wait(timeout=300) == 0, self.log.read_text()
        return load_file(self.out / "student" / "model.safetensors")

    def processes(self):
        """The launcher and its ranks, which it starts in sessions of their own."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def kill(self):
        processes = self.processes()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=60)
        self.process.wait(timeout=60)

    def newest(self):
        """The newest step on disk; -1 if there is none."""
        return max((int(path.name[5:]) for path in self.out.glob("checkpoints/step-*")), default=-1)

    def until(self, condition):
        """Wait for it; False if the run ended first."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.0005)
        return True


def kill_somewhere(run, chance, while_writing):
    """Start, wait for at least one further checkpoint, and kill; returns whether the run was still going."""
    run.start()
    before, saves = run.newest(), chance.randint(1, 3)
    if not run.until(lambda: run.newest() >= max(before, 0) + saves * SAVE_EVERY):
        return False
    if while_writing:
        if not run.until(lambda: any(run.out.glob("checkpoints/.writing-*"))):
            return False
    else:
        time.sleep(chance.uniform(0, 0.05))
    run.kill()
    return True


def check(tmp_path, teacher, ranks, accumulate, kills, seed, while_writing=False):
    whole = Run(tmp_path / "whole", teacher, ranks, accumulate)
    whole.start()
    expected = whole.finish()
    run, chance, done = Run(tmp_path / "cut", teacher, ranks, accumulate), random.Random(seed), 0
    while done < kills and kill_somewhere(run, chance, while_writing):
        done += 1
        if done > 1:
            assert_resumed(run, newest)
        newest = run.newest()
        assert newest >= SAVE_EVERY
    assert done >= 1, "the run ended before it could be killed"
    run.start()
    actual = run.finish()
    assert_resumed(run, newest)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    return done


def assert_resumed(run, newest):
    said = re.findall(r"resumed from step (\d+)", run.log.read_text())
    assert said == [str(newest)], (said, newest, run.log.read_text())


@pytest.mark.parametrize(
    ("ranks", "accumulate", "while_writing"),
    [
        pytest.param(1, 1, False, marks=pytest.mark.slow), (1, 2, True),
        pytest.param(2, 1, False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_killed_run_ends_in_the_same_weights(tmp_path, teacher, ranks, accumulate, while_writing):
    assert check(tmp_path, teacher, ranks, accumulate, kills=1, seed=0, while_writing=while_writing) == 1


@pytest.mark.slow
@pytest.mark.parametrize("while_writing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills(tmp_path, teacher, ranks, accumulate, while_writing):
    assert check(tmp_path, teacher, ranks, accumulate, kills=3, seed=1, while_writing=while_writing) == 3


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_first_and_the_rest_follows(tmp_path, teacher, ranks):
    """What a scheduler sends before it takes the machine away."""
    run = Run(tmp_path / "run", teacher, ranks, 1)
    run.start()
    assert run.until(lambda: run.newest() >= SAVE_EVERY)
    os.killpg(run.process.pid, signal.SIGTERM)
    code = run.process.wait(timeout=60)
    assert code == 143 if ranks == 1 else code != 0  # torchrun has codes of its own
    newest = run.newest()
    run.start()
    run.finish()
    assert_resumed(run, newest)
