"""How a training is run: what keeps a bad state from being saved, and when it ends."""

import os
import signal

import fitting
import pytest
import stopping
import torch
from accelerate import Accelerator
from command import RunOptions
from torch import nn

from score.training import Phase, Report


def make_phase():
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return Phase(name="scene", network=network, optimizer=optimizer, loss=lambda batch, rng: {})


@pytest.mark.parametrize("main", [True, False])
def test_weights_that_are_not_finite_stop_every_rank_before_one_saves(monkeypatch, tmp_path, main):
    """Not that rank alone which writes: the others would wait for it, and never hear."""
    phase, config = make_phase(), RunOptions(out=tmp_path, steps=4, save_every=2)
    checked = []

    def train(*args, **options):
        for step in range(1, 5):
            phase.network.weight.data.fill_(float("nan"))
            yield Report(step, ("scene",), {})

    monkeypatch.setattr(fitting, "train", train)
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: main))
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        fitting.fit(
            config, [phase], lambda rng: {}, Accelerator(cpu=True), own={}, first=0, preview=None, columns=1,
            check=lambda step, saving: checked.append((step, saving)),
        )  # fmt: skip
    assert checked == [(1, False), (2, True)]
    assert not list(tmp_path.glob("checkpoints/*"))


def lost(asked):
    with stopping.stop_signals(Accelerator(cpu=True)):
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        raise FloatingPointError("lost")


def test_sigterm_in_a_step_that_is_lost_still_ends_the_run():
    with pytest.raises(SystemExit) as stopped:
        lost(asked=True)
    assert stopped.value.code == 143
    with pytest.raises(FloatingPointError, match="lost"):
        lost(asked=False)


@pytest.mark.parametrize("all_watch", [False, True])
def test_a_step_is_saved_before_it_is_watched(monkeypatch, tmp_path, all_watch):
    """A look may take minutes, more than a scheduler waits; that of all ranks is spared when the run must stop."""
    config, seen = RunOptions(out=tmp_path, steps=4, save_every=2), []

    def train(*args, **options):
        for step in (3, 4):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            yield Report(step, ("scene",), {"loss": torch.zeros(())})

    def watch(step):
        seen.append((step, sorted(path.name for path in tmp_path.glob("checkpoints/*"))))
        return {}

    monkeypatch.setattr(fitting, "train", train)
    with pytest.raises(SystemExit):
        fitting.fit(
            config, [make_phase()], lambda rng: {}, Accelerator(cpu=True), own={}, first=2, watch=watch,
            all_watch=all_watch,
        )  # fmt: skip
    saved = [path.name for path in tmp_path.glob("checkpoints/*")]
    assert len(saved) == 1
    assert seen == ([(2, []), (3, [])] if all_watch else [(3, []), (4, saved)])
