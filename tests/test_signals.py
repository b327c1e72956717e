"""Ctrl-C, a closed terminal and a scheduler: a checkpoint is saved, and the exit code says which it was."""

import os
import signal
import sys
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import scorefield.commands.command as command
import scorefield.training.run as running
import scorefield.training.stopping as stopping
from scorefield.training.loop import Phase, Report
from scorefield.training.options import RunOptions


def fit(monkeypatch, out, number):
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    phase = Phase(name="p", network=network, optimizer=optimizer, loss=lambda batch, rng: {})

    def train(*args, **options):
        for step in range(1, 9):
            if step == 3:
                os.kill(os.getpid(), number)
            yield Report(step, ("p",), {"loss": torch.zeros(())})

    monkeypatch.setattr(running, "train", train)
    config = RunOptions(out=out, steps=8, save_every=100)
    running.fit(config, [phase], lambda rng: {}, Accelerator(cpu=True), own={}, first=0)


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background jobs ignore Ctrl-C, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_each_signal_saves_and_has_its_own_exit_code(monkeypatch, tmp_path, number, code):
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped:
            fit(monkeypatch, tmp_path, number)
        assert signal.getsignal(number) == signal.default_int_handler, "and is as it was before"
    finally:
        signal.signal(number, before)
    assert stopped.value.code == code
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000003"]


@pytest.mark.parametrize("error", [ValueError("a picture is gone"), OSError(5, "no such device"), MemoryError()])
def test_what_fails_once_a_training_has_begun_was_not_refused(error, capsys):
    for begun, code in ((False, 2), (True, 1)):

        def main(config, begun=begun):
            with stopping.stop_signals(Accelerator(cpu=True)) if begun else nullcontext():
                raise error

        with pytest.raises(SystemExit) as stopped:
            command.run(main, RunOptions, arguments=[], folders=lambda config: [])
        assert stopped.value.code == code
        assert capsys.readouterr().err.count("error: ") == 1


def test_what_nohup_ignores_stays_ignored(monkeypatch, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(monkeypatch, tmp_path, signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000008"]


def test_the_second_ctrl_c_ends_at_once(capfd):
    with stopping.stop_signals(Accelerator(cpu=True)) as asked:
        assert asked(1) == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert asked(2) == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL, "the kernel ends the process"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert "press it again to end at once" in capfd.readouterr().err


class TwoRanks:
    """Another rank, which was asked by ``number``."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, number):
        self.number = number

    def gather(self, own):
        return torch.cat([own, torch.tensor([self.number])])


def test_ranks_stop_together_at_every_tenth_step():
    with stopping.stop_signals(TwoRanks(int(signal.SIGINT))) as asked:
        assert [asked(step) for step in range(1, 11)] == [0] * 9 + [signal.SIGINT]
    with stopping.stop_signals(TwoRanks(0)) as asked:
        assert asked(10) == 0


def test_ctrl_c_before_the_training_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "run")])

    def main(config):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("never reached")

    with pytest.raises(SystemExit) as stopped:
        command.run(main, RunOptions, "")
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip().splitlines() == [
        "stopped by Ctrl-C; the same command goes on from what is saved"
    ]
    assert not list(tmp_path.iterdir())
