"""Networks in pieces on several ranks learn, are saved and are read as whole ones on one rank."""

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from ranks import run_on_ranks
from torch import nn
from workers import sharded_ranks as worker

from scorefield.commands.options import TrainTeacher, check_teacher
from scorefield.models.networks import DiffusersNetwork, ResidualMLP
from scorefield.training import checkpoint
from scorefield.training.identity import binding
from scorefield.training.options import RunOptions
from scorefield.training.run import changes
from scorefield.training.sharding import blocks, make_mesh

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


@pytest.fixture(scope="module")
def one():
    """What one process has, by dtype and micro-batches, and its cycle."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    found = {
        f"{dtype} {number}": worker.distilled_by_one(accelerator, dtype, 2, number)
        for dtype, number in worker.RUNS
    }
    found["answers"] = worker.answers(worker.make_cycle(accelerator, torch.float32))
    found["unet"] = worker.denoised(accelerator, worker.unet, 1, accumulate=2)
    cycle = worker.make_cycle(accelerator, torch.float32, width=64)
    worker.learn(cycle, accelerator, torch.float32)
    found["bytes"] = worker.held_bytes(cycle)
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of checkpoints: there is one of whole networks."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    folder, accelerator = tmp_path_factory.mktemp("ranks"), Accelerator(cpu=True)
    cycle = worker.make_cycle(accelerator, torch.float32)
    worker.learn(cycle, accelerator, torch.float32)
    checkpoint.save(folder / "whole", worker.STEPS, cycle.phases, {})
    torch.save(cycle.weights(), folder / "whole.pt")
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return run_on_ranks(lambda accelerator: worker.main(accelerator, folder), folder)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    worst = max(float((found[name].double() - expected[name].double()).abs().max()) for name in expected)
    assert worst < tolerance, worst


@pytest.mark.parametrize(("dtype", "number"), worker.RUNS)
def test_two_ranks_of_pieces_take_the_steps_of_one_process(one, two, dtype, number):
    """DMD with GAN term, average and clipping: gradients pass through a frozen fake score in pieces."""
    found, expected = two[0][f"{dtype} {number}"], one[f"{dtype} {number}"]
    assert_close(found, expected, TOLERANCE[dtype])
    assert bool((expected["norms"] > 0.12).any()), "nothing was clipped"
    assert torch.equal(found["norms"], two[1][f"{dtype} {number}"]["norms"]), "of all ranks, not of one piece"


def test_a_unet_in_pieces_recomputes_its_activations(one, two):
    assert_close(two[0]["unet"], one["unet"], 1e-10)


def test_a_network_in_pieces_is_asked_for_features_and_logits_as_a_whole_one_is(one, two):
    for found in two:
        for name, expected in one["answers"].items():
            torch.testing.assert_close(found["answers"][name], expected, rtol=1e-5, atol=1e-6)


def test_each_rank_holds_half_of_weights_averages_and_states(one, two):
    for found in two:
        share = found["bytes"] / one["bytes"]
        assert bool(((share - 0.5).abs() < 0.025).all()), share


def test_a_checkpoint_of_pieces_is_one_of_whole_networks_and_the_other_way_round(two, folder, accelerator):
    first, second = (found["kept"] for found in two)
    assert [first["same states"], second["same states"]] == [True, True]
    assert torch.equal(*first["goes on"])
    for name, value in first["saved"].items():
        assert torch.equal(value, first["read pieces"][name])
    for name, value in torch.load(folder / "whole.pt").items():
        assert torch.equal(value, first["read whole"][name])
    cycle = worker.make_cycle(accelerator, torch.float32, seed=1)
    assert checkpoint.load(folder / "pieces", cycle.phases, {}) == worker.STEPS
    for name, value in cycle.weights().items():
        assert torch.equal(value, first["saved"][name])
    pieces, whole = (sorted(p.name for p in (folder / one).rglob("*")) for one in ("pieces", "whole"))
    assert pieces == whole
    assert all(state["exp_avg"].shape == p.shape for p, state in cycle.phases[0].optimizer.state.items())


def test_a_copy_is_in_the_same_pieces_and_is_its_own(two):
    assert [found["copied"] for found in two] == [True, True]


def test_blocks_are_what_lists_hold():
    mlp = ResidualMLP((2,), width=16, depth=3)
    assert blocks(mlp) == list(mlp.blocks)
    unet = tiny_pipelines.text_unet()
    found = blocks(DiffusersNetwork(unet))
    assert {*unet.down_blocks, *unet.up_blocks} <= set(found)
    inner = [found.index(part) for part in unet.down_blocks[0].modules() if part in found[:-1]]
    assert max(inner) == found.index(unet.down_blocks[0]), "inner ones come first"
    assert not any(isinstance(part, nn.Linear | nn.Conv2d) for part in found)
    transformer = tiny_transformers.flux().transformer
    found = blocks(transformer)
    assert {*transformer.transformer_blocks, *transformer.single_transformer_blocks} <= set(found)


@pytest.mark.parametrize(("changes", "world", "said"), [
    ({"shard": 2}, "1", "--shard 2 needs 2 processes or a multiple of them; got 1"),
    ({"shard": 3}, "4", "--shard 3 needs 3 processes"),
    ({"shard": 0}, "4", "--shard must be above 0"),
    ({"shard": 2, "compile": True}, "2", "--shard and --compile do not go together"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_name(monkeypatch, tmp_path, changes, world, said):
    for name, value in {"WORLD_SIZE": world, "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        check_teacher(TrainTeacher(out=tmp_path / "run", **changes))


def test_a_mesh_has_all_ranks():
    with pytest.raises(ValueError, match="--shard 4 does not divide the 6 processes"):
        make_mesh("cpu", 6, 4)


def test_the_number_of_ranks_and_of_micro_batches_may_change_on_the_way_and_is_said():
    saved, own = (
        {**binding(RunOptions(accumulate=number)), "num_processes": ranks} for number, ranks in ((1, 4), (2, 2))
    )
    assert checkpoint.differences(saved, own) == []
    assert checkpoint.differences(saved, own, going_on=False) == ["accumulate", "num_processes"]
    (said,) = changes(saved, own, [])
    assert said.startswith("4 process(es) with --accumulate 1 before, 2 process(es) with --accumulate 2 now: ")
    assert changes(saved, saved, []) == []
    assert "shard" in binding(RunOptions())["free"]


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [4, 2])
def test_four_ranks_take_the_steps_of_one_process(tmp_path, accelerator, one, pieces):
    """In four pieces, or two copies of two; each rank holds a fourth, or a half, of weights and states."""

    def work(four):
        found = {
            f"{dtype} {number}": worker.distilled(four, dtype, pieces, number) for dtype, number in worker.RUNS
        }
        cycle = worker.make_cycle(four, torch.float32, pieces, width=64)
        worker.learn(cycle, four, torch.float32)
        return {**found, "bytes": worker.held_bytes(cycle)}

    (found, *others) = run_on_ranks(work, tmp_path, num_ranks=4)
    for each in (found, *others):
        share = pieces * each["bytes"] / one["bytes"]
        assert bool(((share - 1).abs() < 0.05).all()), share
    for dtype, number in worker.RUNS:
        expected = worker.distilled_by_one(accelerator, dtype, 4, number)
        assert_close(found[f"{dtype} {number}"], expected, TOLERANCE[dtype])
