"""How a training is run: what keeps a bad state from being saved, and when it ends."""

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import scorefield.training.run as running
import scorefield.training.stopping as stopping
from scorefield.training.loop import Phase, Report
from scorefield.training.options import RunOptions


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

    monkeypatch.setattr(running, "train", train)
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: main))
    with pytest.raises(FloatingPointError, match="not finite at step 2"):
        running.fit(
            config, [phase], lambda rng: {}, Accelerator(cpu=True), own={}, first=0, preview=None, columns=1,
            check=lambda step, saving: checked.append((step, saving)),
        )  # fmt: skip
    assert checked == [(1, False), (2, True)]
    assert not list(tmp_path.glob("checkpoints/*"))


def lost(error, asked):
    with stopping.stop_signals(Accelerator(cpu=True)):
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        raise error("lost")


class WayBackError(Exception):
    pass


@pytest.mark.parametrize("error", [FloatingPointError, WayBackError])
def test_sigterm_in_a_step_that_is_lost_still_ends_the_run(error):
    """So it does where a guard sends the run back: it would go on for as long as the next step is."""
    with pytest.raises(SystemExit) as stopped:
        lost(error, asked=True)
    assert stopped.value.code == 143
    with pytest.raises(error, match="lost"):
        lost(error, asked=False)


def reports_of(steps):
    return lambda *args, **options: (Report(step, ("scene",), {"loss": torch.zeros(())}) for step in steps)


def test_steps_that_must_stay_are_saved_at_once_and_kept(monkeypatch, tmp_path):
    config, asked = RunOptions(out=tmp_path, steps=9, save_every=4), []

    def keep(step):
        asked.append(step)
        return (3,) if step >= 3 else ()

    monkeypatch.setattr(running, "train", reports_of(range(1, 10)))
    running.fit(config, [make_phase()], lambda rng: {}, Accelerator(cpu=True), own={}, first=0, keep=keep)
    assert asked == list(range(1, 10))
    saved = sorted(int(path.name[5:]) for path in tmp_path.glob("checkpoints/step-*"))
    assert saved == [3, 8, 9], "that of step 4 is the oldest of those that need not stay"


def test_what_sends_a_run_back_leaves_nothing_of_its_step(monkeypatch, tmp_path):
    def keep(step):
        if step == 4:
            raise WayBackError
        return ()

    config, seen = RunOptions(out=tmp_path, steps=9, save_every=2), []
    monkeypatch.setattr(running, "train", reports_of(range(1, 10)))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(WayBackError):
        running.fit(
            config, [make_phase()], lambda rng: {}, Accelerator(cpu=True), own={}, first=0, keep=keep,
            watch=lambda step: seen.append(step) or {},
        )  # fmt: skip
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["step-000000002"]
    assert seen == [1, 2, 3]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("last", [True, False])
def test_ranks_can_speak_after_a_stage_that_is_not_the_last(monkeypatch, tmp_path, last):
    ended, accelerator = [], Accelerator(cpu=True)
    monkeypatch.setattr(running, "train", reports_of([1]))
    monkeypatch.setattr(Accelerator, "end_training", lambda self: ended.append(1))
    config = RunOptions(out=tmp_path, steps=1)
    running.fit(config, [make_phase()], lambda rng: {}, accelerator, own={}, first=0, last=last)
    assert ended == [1] * last


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

    monkeypatch.setattr(running, "train", train)
    with pytest.raises(SystemExit):
        running.fit(
            config, [make_phase()], lambda rng: {}, Accelerator(cpu=True), own={}, first=2, watch=watch,
            all_watch=all_watch,
        )  # fmt: skip
    saved = [path.name for path in tmp_path.glob("checkpoints/*")]
    assert len(saved) == 1
    assert seen == ([(2, []), (3, [])] if all_watch else [(2, []), (3, []), (4, saved)])
