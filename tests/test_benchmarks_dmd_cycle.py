"""The benchmark of a DMD2 cycle on tiny networks: equal gradients, what it writes, what it counts. No timing."""

import json
from dataclasses import replace

import contenders
import dmd_cycle
import fastgen
import pytest
import torch
from accelerate.state import AcceleratorState
from dmd_cycle import Config
from measure import ratio, saved_bytes, take_turns
from torch import nn

MLP = Config(batch=4, width=16, depth=3, rounds=2, warmup=0, student_every=2)
UNET = Config(network="unet", batch=2, channels=(8, 8), rounds=1, warmup=0, student_every=2)


@pytest.fixture(autouse=True)
def _new_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_it_reports_every_contender_and_ratio(tmp_path, capsys):
    result = dmd_cycle.main(replace(MLP, out=tmp_path / "new" / "cycle.json"))
    assert json.loads((tmp_path / "new" / "cycle.json").read_text()) == result
    names = {"bare", "bare + AdamW", "ours", "official", "fastgen", "ours, GAN", "official, GAN"}
    assert result["seconds"].keys() == result["saved_bytes"].keys() == result["peak_bytes"].keys() == names
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["seconds"].values())
    assert result["ratios"].keys() == dmd_cycle.RATIOS.keys() - {"ours / ours, compiled"}
    assert 0 < result["saved_bytes"]["bare"] <= result["saved_bytes"]["ours"] < result["saved_bytes"]["ours, GAN"]
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in [*names, *result["ratios"]])


@pytest.mark.parametrize("config", [MLP, replace(UNET, guidance=2.0)])
def test_all_contenders_start_from_the_same_gradients(config):
    errors = dmd_cycle.gradient_errors(config)
    peers = ("official", "fastgen", "official, GAN")
    assert errors.keys() == {f"{name}: {role}" for name in peers for role in ("student", "fake")}
    assert max(errors.values()) < 1e-9


def test_a_contender_with_other_mathematics_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(fastgen, "prediction_weight", lambda kind: lambda t, schedule: torch.ones_like(t))
    with pytest.raises(ValueError, match="same gradients"):
        dmd_cycle.main(MLP)
    assert not capsys.readouterr().out
    for changes in ({"rounds": 0}, {"batch": 0}, {"clock": "process", "device": "cuda"}):
        with pytest.raises(ValueError, match=r"rounds|clock"):
            dmd_cycle.main(replace(MLP, **changes))


@pytest.mark.parametrize("name", ["bare + AdamW", "ours", "official", "fastgen"])
def test_a_cycle_updates_the_fake_score_always_and_the_student_last(name):
    setup = dmd_cycle.make_setup(MLP, gan=False)
    training = dmd_cycle.start(name, setup, dmd_cycle.make_accelerator(MLP))
    networks, moved = [one.network for one in (setup.teacher, *contenders.trained(setup))], []
    for _ in range(2):
        before = [torch.cat([p.detach().flatten() for p in network.parameters()]) for network in networks]
        next(training)
        after = [torch.cat([p.detach().flatten() for p in network.parameters()]) for network in networks]
        moved.append([not torch.equal(new, old) for new, old in zip(after, before, strict=True)])
    assert moved == [[False, False, True], [False, True, True]]


def test_bytes_turns_and_ratios_are_counted_as_said():
    network, x = nn.Linear(8, 8, bias=False), torch.randn(16, 8)

    def iterations():
        while True:
            y = network(x)  # keeps x and the weight
            (y * y + y.sin()).sum().backward()  # keeps y three times
            yield

    assert saved_bytes(iterations(), 3, [network]) == 4 * (x.numel() + 16 * 8)
    calls = []

    def contender(name):
        while True:
            calls.append(name)
            yield

    clock, names = iter(range(100)).__next__, {name: contender(name) for name in "ab"}
    seconds = take_turns(names, iterations=2, rounds=2, warmup=1, device=torch.device("cpu"), clock=clock)
    assert "".join(calls) == "aabb" + "bbaa" + "aabb"
    assert seconds == {"a": [1, 1], "b": [1, 1]}
    found = ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
