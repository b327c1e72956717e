"""Scenes that are lost: what is seen, and how a run goes back and goes on."""

import pytest
import torch
from torch import nn

from scorefield.training import checkpoint
from scorefield.training.loop import Phase
from sds.recovery import (
    EMPTY,
    FULL,
    LostSceneError,
    check_opacity,
    check_weights,
    num_rollbacks,
    opacity_all_round,
    roll_back,
    seed_after,
)
from sds.scene import grid_scene


def make_phases(scheduled=True):
    torch.manual_seed(0)
    phases = []
    for name, rate in (("scene", 0.1), ("phi", 0.01)):
        network = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(network.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)) if scheduled else None
        settings = {"network": network, "optimizer": optimizer, "lr_schedule": schedule}
        phases.append(Phase(name=name, loss=lambda batch, rng: {}, **settings))
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


def filled(raw):
    """A scene whose whole cube is of one raw density, without a blob."""
    scene = grid_scene(resolutions=(4,), num_samples=16, initial=raw, blob=lambda points: 0 * points[:, 0])
    return scene.requires_grad_(False)


def test_weights_without_measure_are_those_of_a_lost_scene():
    check_weights(grid_scene(resolutions=(4,), initial=-4.0), 7)
    for value, said in ((1e30, "1e[+]30"), (-1e30, "1e[+]30"), (float("nan"), "nan")):
        scene = grid_scene(resolutions=(4,))
        with torch.no_grad():
            next(scene.parameters())[0, 0, 0, 0, 0] = value
        with pytest.raises(LostSceneError, match=f"exploded in step 7: its largest weight is {said}"):
            check_weights(scene, 7)


def test_a_weight_that_is_nan_behind_others_is_seen():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    network[1].bias.data[1] = float("nan")
    with pytest.raises(LostSceneError, match="its largest weight is nan"):
        check_weights(network, 7)


def test_opacity_is_that_of_the_whole_cube_and_draws_nothing():
    state = torch.random.get_rng_state()
    assert opacity_all_round(filled(-1e3)) == 0
    assert FULL < opacity_all_round(filled(1e3)) <= 1
    blob = opacity_all_round(grid_scene())
    assert 0.02 < blob < 0.2  # a ball of half the radius of its cube
    assert blob == opacity_all_round(grid_scene())
    assert torch.equal(state, torch.random.get_rng_state())
    for good in (EMPTY, 0.2, FULL):
        check_opacity(good, 1)
    nan = opacity_all_round(filled(float("nan")))
    for lost, what in ((0.0, "empty"), (EMPTY / 2, "empty"), (1.0, "full"), (nan, "not finite")):
        with pytest.raises(LostSceneError, match=f"the scene is {what} in step 7"):
            check_opacity(lost, 7)


@pytest.mark.parametrize("scheduled", [True, False])
def test_a_rollback_is_the_last_checkpoint_at_half_the_rates(tmp_path, scheduled):
    phases = make_phases(scheduled)
    step(phases)
    checkpoint.save(tmp_path, 1, phases, {"a": 1})
    kept, before = [phase.network.weight.detach().clone() for phase in phases], rates(phases)
    step(phases)
    phases[0].network.weight.data.fill_(float("nan"))
    assert roll_back(tmp_path, phases, {"a": 1}) == 1
    assert all(torch.equal(phase.network.weight, weight) for phase, weight in zip(phases, kept, strict=True))
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


def test_a_run_that_is_lost_again_goes_one_checkpoint_further_back(tmp_path):
    """As the newest may be what is wrong; but not once another has been saved since."""
    phases, kept = make_phases(scheduled=False), {}
    for number in (1, 2):
        step(phases)
        checkpoint.save(tmp_path, number, phases, {})
        kept[number] = phases[0].network.weight.detach().clone()
    assert [roll_back(tmp_path, phases, {}) for _ in range(3)] == [2, 1, 1]
    assert torch.equal(phases[0].network.weight, kept[1])
    assert num_rollbacks(phases[0].optimizer) == 3
    assert rates(phases) == pytest.approx([0.1 / 8, 0.01 / 8])  # as low as if it had been the same checkpoint
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    checkpoint.save(tmp_path, 2, phases, {})
    assert roll_back(tmp_path, phases, {}) == 2
    fresh = make_phases(scheduled=False)  # killed, and lost again
    checkpoint.load(tmp_path, fresh, {})
    assert roll_back(tmp_path, fresh, {}) == 1
    assert rates(fresh) == pytest.approx([0.1 / 32, 0.01 / 32])


def test_one_rank_writes_once_all_have_read_and_the_others_write_nothing(tmp_path):
    phases, seen = make_phases(), []
    path = checkpoint.save(tmp_path, 0, phases, {}) / "state.pt"
    before = path.read_bytes()
    roll_back(tmp_path, phases, {}, write=False)
    assert path.read_bytes() == before
    assert rates(phases) == pytest.approx([0.05, 0.005])
    roll_back(tmp_path, phases, {}, wait=lambda: seen.append(path.read_bytes() == before))
    assert seen == [True, False]


def test_rollbacks_that_cannot_work_are_refused_and_others_draw_other_numbers(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to go back to"):
        roll_back(tmp_path, make_phases(), {})
    for factor in (0.0, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"factor must lie in \(0, 1\)"):
            roll_back(tmp_path, make_phases(), {}, factor=factor)
    seeds = [seed_after(5, n) for n in range(4)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 4
    assert seeds == [seed_after(5, n) for n in range(4)]
