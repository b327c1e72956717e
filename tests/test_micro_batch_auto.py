"""How --micro-batch auto finds the size of a pass, and what it leaves alone."""

import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from ranks import run_on_ranks
from refusals import refused
from torch import nn
from trainers import TRAINERS, Places

import scorefield.training.micro_batch as micro_batch_module
from scorefield.commands.options import TrainTeacher
from scorefield.data.ahead import read_ahead
from scorefield.training import checkpoint
from scorefield.training.identity import binding, check_options
from scorefield.training.loop import EMA, Phase, rehearse
from scorefield.training.memory import measured
from scorefield.training.micro_batch import (
    SHARE,
    Trial,
    begun_with,
    by_trying,
    candidates,
    foreseen,
    free_bytes,
    ladder,
    settle,
    unforeseen,
)
from scorefield.training.options import images_per_pass, largest_divisor, passes_per_iteration
from scorefield.training.run import changes

CPU, GPU = torch.device("cpu"), torch.device("cuda")


# How auto finds it.


def test_each_candidate_is_at_most_half_of_the_one_before():
    assert [candidates(number) for number in (24, 7, 1, 9)] == [[24, 12, 6, 3, 1], [7, 1], [1], [9, 3, 1]]
    assert candidates(8, smallest=2) == [8, 4, 2]
    for number in range(1, 200):
        found = candidates(number)
        assert all(number % one == 0 for one in found)
        assert all(2 * after <= before for before, after in pairwise(found))
        rungs = ladder(found)
        assert set(found) <= set(rungs)
        assert all(before < after <= 2 * before for before, after in pairwise(rungs))


def test_the_largest_divisor_is_found_at_once():
    for number in range(1, 60):
        for most in range(1, 70):
            expected = max(one for one in range(1, min(number, most) + 1) if number % one == 0)
            assert largest_divisor(number, most) == expected
    assert largest_divisor(2**31 - 1, 2**30) == 1  # a prime
    assert largest_divisor(2**31 - 2, 2**30) == 2**30 - 1


class Normed(nn.Module):
    """With everything that a pass could leave behind: dropout, and a norm that counts what it sees."""

    def __init__(self, width=4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.5))

    def forward(self, x):
        return self.net(x)


def make_trial(most, seen=None):
    """Two phases and a rollout; more than ``most`` images run out of memory, in the second phase."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = [Normed(), Normed()]
    noted = [] if seen is None else seen

    def loss_of(number):
        def loss(batch, rng):
            noted.append((number, len(batch["x"])))
            if len(batch["x"]) > most and (number or most < 2):
                raise torch.OutOfMemoryError("no more")
            return {"loss": networks[number](batch["x"]).square().mean()}

        return loss

    phases = [
        Phase(
            name=f"net{number}", network=network, optimizer=torch.optim.AdamW(network.parameters(), 0.1),
            loss=loss_of(number), ema=EMA(network, 0.9), every=2 - number,
        )
        for number, network in enumerate(networks)
    ]  # fmt: skip

    def trial(config):
        number = images_per_pass(config)
        return Trial(
            phases, lambda rng: {"n": number},
            lambda batch, due, rng: {"x": torch.randn(batch["n"], 4, generator=rng("x"))},
        )  # fmt: skip

    return phases, trial


def state_of(phases):
    held = [x.clone() for phase in phases for net in phase.networks().values() for x in net.state_dict().values()]
    return [*held, torch.random.get_rng_state()]


def options(tmp_path, **changes):
    return TrainTeacher(out=tmp_path / "run", **{"batch_size": 16, "micro_batch": "auto", **changes})


def test_auto_halves_until_an_iteration_fits_and_leaves_no_trace(accelerator, tmp_path, capsys):
    seen = []
    phases, trial = make_trial(most=5, seen=seen)
    before = state_of(phases)
    config = by_trying(options(tmp_path, accumulate=3), accelerator, trial)
    assert (config.micro_batch, config.batch_size, config.accumulate) == (4, 16, 3)
    assert (images_per_pass(config), passes_per_iteration(config)) == (4, 12)
    assert seen == [(0, 16), (1, 16), (0, 8), (1, 8), *[(0, 4), (1, 4)] * 2], "both learn, twice where it fits"
    for one, other in zip(before, state_of(phases), strict=True):
        assert torch.equal(one, other)
    assert all(p.grad is None and p.requires_grad for phase in phases for p in phase.network.parameters())
    assert not any(phase.optimizer.state for phase in phases)
    assert not any(phase.ema.num_updates for phase in phases)
    assert capsys.readouterr().out == "--micro-batch auto: 12 passes of 4 images an iteration, as tried\n"


def test_auto_refuses_where_nothing_fits_and_passes_on_other_errors(accelerator, tmp_path):
    with refused(r"not even 1 image\(s\) a pass fit"):
        by_trying(options(tmp_path), accelerator, make_trial(most=0)[1])
    with refused(r"not even 2 image\(s\) a pass fit"):
        by_trying(options(tmp_path), accelerator, make_trial(most=1)[1], smallest=2)

    def broken(config):
        raise RuntimeError("of another kind")

    with refused("of another kind", RuntimeError):
        by_trying(options(tmp_path), accelerator, broken)


@pytest.mark.parametrize(
    "said", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDNN_STATUS_ALLOC_FAILED"]
)
def test_libraries_that_cannot_allocate_are_out_of_memory(accelerator, tmp_path, said):
    _, trial = make_trial(most=16)

    def short(config):
        if images_per_pass(config) > 4:
            raise RuntimeError(said)
        return trial(config)

    assert by_trying(options(tmp_path), accelerator, short).micro_batch == 4


def test_what_a_run_asks_before_its_iterations_is_tried_and_measured(accelerator, tmp_path, monkeypatch):
    _, trial = make_trial(most=16)

    def asking(work):
        return lambda config: replace(trial(config), also=lambda: work(images_per_pass(config)))

    def short(number):
        if number > 2:
            raise torch.OutOfMemoryError

    assert by_trying(options(tmp_path), accelerator, asking(short)).micro_batch == 2
    monkeypatch.setattr(micro_batch_module, "free_bytes", lambda: 10**6)
    large = asking(lambda number: torch.zeros(150_000 * number, dtype=torch.uint8))
    assert settle(options(tmp_path), accelerator, large, smallest=2).micro_batch == 4


def test_no_trial_leaves_a_thread_behind(accelerator, tmp_path):
    def reading(most):
        _, trial = make_trial(most)

        def batches(config):
            return read_ahead(lambda number, seed: images_per_pass(config), lambda loaded, rng: {"n": loaded})

        return lambda config: replace(trial(config), batches=batches(config))

    before = set(threading.enumerate())
    by_trying(options(tmp_path), accelerator, reading(most=5))
    settle(options(tmp_path), accelerator, reading(most=16), smallest=2)
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.slow
def test_ranks_agree_on_the_least(tmp_path):
    def work(two):
        config = by_trying(options(tmp_path), two, make_trial(most=(16, 3)[two.process_index])[1])
        return torch.tensor(config.micro_batch)

    assert [int(found) for found in run_on_ranks(work, tmp_path)] == [2, 2]


def test_ranks_that_measure_agree_on_the_least(tmp_path):
    """Each climbs as far as the other, or one would wait."""

    def work(two):
        def needs(config, accelerator, trial):
            return 0, 1000 * config.micro_batch, (20_000, 5000)[two.process_index]

        micro_batch_module.needs = needs
        return torch.tensor(settle(options(tmp_path), two, pytest.fail).micro_batch)

    assert [int(found) for found in run_on_ranks(work, tmp_path)] == [4, 4]


def test_a_rehearsal_of_wrapped_networks_needs_no_other_rank(tmp_path):
    """One rank runs out of memory where the other would wait for its gradients."""

    def work(two):
        network = two.prepare(Normed())  # whose buffers DDP would share, too

        def loss(batch, rng):
            if two.process_index:
                raise torch.OutOfMemoryError
            return {"loss": network(batch).square().mean()}

        phase = Phase(name="net", network=network, optimizer=torch.optim.SGD(network.parameters(), 0.1), loss=loss)
        try:
            rehearse([phase], lambda rng: torch.randn(2, 4), two)
        except torch.OutOfMemoryError:
            return torch.tensor(1)
        return torch.tensor(0)

    assert [int(found) for found in run_on_ranks(work, tmp_path)] == [0, 1]


def wide_trial(width=64):
    network = nn.Sequential(nn.Linear(width, 8 * width), nn.Tanh(), nn.Linear(8 * width, width))
    phase = Phase(
        name="net", network=network, optimizer=torch.optim.AdamW(network.parameters(), 0.1),
        loss=lambda batch, rng: {"loss": network(batch).square().mean()},
    )  # fmt: skip
    return network, lambda config: Trial([phase], lambda rng: torch.ones(images_per_pass(config), width))


@pytest.mark.parametrize(("number", "fitting"), [(16, 16), (4, 4), (5, 4), (1, 1)])
def test_on_a_cpu_it_fills_what_is_free(accelerator, tmp_path, monkeypatch, capsys, number, fitting):
    """Free is what so many images a pass take in truth, with gradients and moments."""
    network, trial = wide_trial()
    bytes_of = {}
    for size in (number, 2 * number):
        tried = trial(replace(options(tmp_path), micro_batch=size))
        bytes_of[size] = measured(
            lambda tried=tried: rehearse(tried.phases, tried.batches, accelerator), [network]
        )
    stays = sum(3 * 4 * p.numel() for p in network.parameters())
    room = stays + (bytes_of[number] + bytes_of[2 * number]) / 2
    monkeypatch.setattr(micro_batch_module, "free_bytes", lambda: int(room / SHARE))
    config = settle(options(tmp_path), accelerator, trial)
    assert config.micro_batch == fitting
    assert ", as measured, of" in capsys.readouterr().out


@pytest.mark.parametrize(("bytes_of", "room", "seen", "chosen"), [
    (lambda number: max(1000, 1000 * number - 3000), 10_000, [1, 2, 4, 8], 8),
    (lambda number: 1000 * number**2, 100_000, [1, 2, 4, 8], 8),
    (lambda number: 1000 * number**2, 200_000, [1, 2, 4, 8, 16], 8),
    (lambda number: 1000 * number, 1400, [1], 1),
    (lambda number: 1000 * number, 17_000, [1, 2, 4, 8, 16], 16),
])  # fmt: skip
def test_a_peak_that_rises_ever_more_steeply_is_climbed(
    accelerator, tmp_path, monkeypatch, bytes_of, room, seen, chosen
):
    """Two small passes say little about a large one. What is taken was measured."""
    tried = []

    def needs(config, accelerator, trial):
        tried.append(config.micro_batch)
        return 500, bytes_of(config.micro_batch), room + 500

    monkeypatch.setattr(micro_batch_module, "needs", needs)
    assert settle(options(tmp_path), accelerator, pytest.fail).micro_batch == chosen
    assert tried == seen


def test_frozen_networks_are_no_bytes_of_a_pass(accelerator):
    """Their weights are there already, also where a layer looks at them the other way round."""
    teacher, network = nn.Linear(4, 10_000).requires_grad_(False), nn.Linear(4, 4)
    phase = Phase(
        name="net", network=network, optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss=lambda batch, rng: {"loss": (network(batch) @ teacher.weight.t()[:, :1]).square().mean()},
    )  # fmt: skip
    found = measured(lambda: rehearse([phase], lambda rng: torch.ones(1, 4), accelerator), [network, teacher])
    assert 0 < found < 4 * 10_000


def test_on_a_cpu_too_little_memory_is_said_with_its_bytes(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(micro_batch_module, "free_bytes", lambda: 1000)
    with refused(r"1 image\(s\) a pass would take 0.00 GiB beside the weights, of 0.00 that may be filled"):
        settle(options(tmp_path), accelerator, wide_trial()[1])


def test_free_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch):
    alone = free_bytes()
    assert 2**20 < alone < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes() == pytest.approx(alone / 4, rel=0.3)


def test_a_number_that_is_given_is_not_tried(accelerator, tmp_path):
    given = options(tmp_path, micro_batch=4)
    assert settle(given, accelerator, pytest.fail) is given


def test_a_run_that_began_without_keeps_the_whole_batch(accelerator, tmp_path):
    phases, _ = make_trial(most=1)
    config = options(tmp_path)
    own = binding(replace(config, micro_batch=0))
    assert "micro_batch" not in own, "checkpoints of older versions go on"
    assert "split_views" not in binding(TRAINERS["canvas"].options(Places(*[tmp_path] * 4)))
    checkpoint.save(config.out / "checkpoints", 1, phases, own)
    assert settle(config, accelerator, pytest.fail).micro_batch == 16


@pytest.mark.parametrize("number", [7, -3, 0, 1, 10**9, True, 8.0, "8", "auto", None])
def test_a_number_in_a_checkpoint_that_cannot_be_is_the_whole_batch(accelerator, tmp_path, number):
    phases, _ = make_trial(most=1)
    config = options(tmp_path)
    checkpoint.save(config.out / "checkpoints", 1, phases, {**binding(config), "micro_batch": number})
    assert settle(config, accelerator, pytest.fail, smallest=2).micro_batch == 16


def test_auto_goes_on_from_a_checkpoint_that_is_older_than_the_option(accelerator, tmp_path):
    """Which says neither a number, nor that it may change."""
    phases, _ = make_trial(most=1)
    config = options(tmp_path)
    old = binding(replace(config, micro_batch=0))
    old[checkpoint.MAY_CHANGE].remove("micro_batch")
    checkpoint.save(config.out / "checkpoints", 1, phases, old)
    check_options(config.out, binding(config), ())  # before the number is known
    settled = settle(config, accelerator, pytest.fail)
    assert checkpoint.load(config.out / "checkpoints", phases, binding(settled)) == 1


def test_another_number_may_be_given_on_the_way_and_is_said(tmp_path):
    saved, own = ({**binding(options(tmp_path, micro_batch=number)), "num_processes": 1} for number in (8, 4))
    assert checkpoint.differences(saved, own) == []
    (said,) = changes(saved, own, [])
    assert said.startswith(
        "1 process(es) with --accumulate 1 in passes of 8 images before, 1 process(es) with --accumulate 1 in "
        "passes of 4 images now: "
    )
    whole = {**binding(options(tmp_path, micro_batch=16)), "num_processes": 1}
    assert changes(whole, {**whole, "micro_batch": 0}, []) == []


# What a dry run says.


def test_a_plan_names_the_largest_number_that_is_predicted_to_fit(tmp_path):
    config = options(tmp_path)
    found, said = foreseen(config, lambda one: 100 * images_per_pass(one), 450, CPU)
    assert found.micro_batch == 4
    assert said.startswith("--micro-batch auto: 4 passes of 4 images an iteration, as predicted for the 0.00 GiB")
    assert foreseen(config, lambda one: None, 1, CPU) == (config, micro_batch_module.UNFORESEEN)
    given = options(tmp_path, micro_batch=2)
    assert foreseen(given, pytest.fail, 1, CPU) == (given, "")


def test_a_plan_refuses_what_a_start_refuses(tmp_path):
    """A GPU would be tried all the same."""
    assert "no pass is predicted to fit" in foreseen(options(tmp_path), lambda one: 2, 1, GPU)[1]
    with refused(r"1 image\(s\) a pass would take 2.00 GiB, of 1.00 that may be filled. Pass a number"):
        foreseen(options(tmp_path), lambda one: 2 * 2**30, 2**30, CPU)


def test_a_plan_names_the_number_that_the_run_began_with(tmp_path):
    phases, _ = make_trial(most=1)
    config = options(tmp_path)
    assert begun_with(config) == 0
    checkpoint.save(config.out / "warm-up" / "checkpoints", 1, phases, binding(replace(config, micro_batch=2)))
    folders = [config.out / "checkpoints", config.out / "warm-up" / "checkpoints"]
    for found, said in (
        foreseen(config, pytest.fail, 1, CPU, folders=folders), unforeseen(config, folders=folders)
    ):  # fmt: skip
        assert found.micro_batch == 2
        assert said == "--micro-batch auto: 8 passes of 2 images an iteration, as this run began"
