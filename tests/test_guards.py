"""Scenes that are lost: what is seen, and how a run goes back and goes on."""

import pytest
import torch
from torch import nn

from score import checkpoint
from score.training import Phase
from sds.guards import EMPTY, FULL, LostSceneError, check_opacity, num_rollbacks, roll_back, seed_after


def make_phases(scheduled=True):
    torch.manual_seed(0)
    phases = []
    for name, rate in (("scene", 0.1), ("phi", 0.01)):
        network = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)) if scheduled else None
        phases.append(
            Phase(name=name, network=network, optimizer=optimizer, loss=lambda b, r: {}, lr_schedule=schedule)
        )
    return phases


def step(phases):
    for phase in phases:
        phase.network(torch.ones(1, 2)).sum().backward()
        phase.optimizer.step()
        phase.optimizer.zero_grad()
        if phase.lr_schedule:
            phase.lr_schedule.step()


def rates(phases):
    return [phase.optimizer.param_groups[0]["lr"] for phase in phases]


@pytest.mark.parametrize("opacity", [EMPTY, 0.2, FULL])
def test_a_scene_that_shows_something_passes(opacity):
    check_opacity(opacity, 1)


@pytest.mark.parametrize(
    ("opacity", "what"), [(0.0, "empty"), (EMPTY / 2, "empty"), (1.0, "full"), (float("nan"), "full")]
)
def test_a_lost_scene_is_named(opacity, what):
    with pytest.raises(LostSceneError, match=f"the scene is {what} in step 7"):
        check_opacity(opacity, 7)


@pytest.mark.parametrize("scheduled", [True, False])
def test_a_rollback_is_the_last_checkpoint_at_half_the_rates(tmp_path, scheduled):
    phases = make_phases(scheduled)
    step(phases)
    checkpoint.save(tmp_path, 1, phases, {"a": 1})
    kept = [phase.network.weight.detach().clone() for phase in phases]
    before = rates(phases)
    step(phases)
    phases[0].network.weight.data.fill_(float("nan"))
    assert roll_back(tmp_path, phases, {"a": 1}) == 1
    for phase, weight in zip(phases, kept, strict=True):
        assert torch.equal(phase.network.weight, weight)
    assert rates(phases) == pytest.approx([rate / 2 for rate in before])
    assert num_rollbacks(phases[0].optimizer) == 1
    if scheduled:  # and stay so as the schedule goes on
        step(phases)
        assert rates(phases) == pytest.approx([0.1 / 2 / 3, 0.01 / 2 / 3])


def test_a_run_that_is_killed_after_a_rollback_knows_of_it(tmp_path):
    phases = make_phases()
    checkpoint.save(tmp_path, 0, phases, {})
    roll_back(tmp_path, phases, {})
    roll_back(tmp_path, phases, {}, factor=0.25)
    fresh = make_phases()
    assert checkpoint.load(tmp_path, fresh, {}) == 0
    assert num_rollbacks(fresh[0].optimizer) == 2
    assert rates(fresh) == pytest.approx([0.1 / 8, 0.01 / 8])


def test_other_ranks_roll_back_without_writing(tmp_path):
    phases = make_phases()
    path = checkpoint.save(tmp_path, 0, phases, {})
    before = (path / "state.pt").read_bytes()
    roll_back(tmp_path, phases, {}, write=False)
    assert (path / "state.pt").read_bytes() == before
    assert rates(phases) == pytest.approx([0.05, 0.005])


def test_rollbacks_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to go back to"):
        roll_back(tmp_path, make_phases(), {})
    for factor in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"factor must lie in \(0, 1\)"):
            roll_back(tmp_path, make_phases(), {}, factor=factor)


def test_after_a_rollback_other_numbers_are_drawn():
    seeds = [seed_after(5, n) for n in range(4)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 4
    assert seeds == [seed_after(5, n) for n in range(4)]
    assert all(0 <= seed < 2**63 for seed in seeds)
