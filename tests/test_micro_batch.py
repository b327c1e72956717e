"""A batch in several passes learns what it learns in one; auto finds their size and changes nothing else."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from accelerate.state import AcceleratorState
from denoisers import random_denoiser
from folders import assert_same, tensors
from ranks import run_on_ranks
from refusals import refused
from torch import nn
from trainers import TRAINERS, Killed, Places, kill, make_places, stop
from workers import sharded_ranks as worker

import scorefield.training.micro_batch as micro_batch_module
from controlnet.options import check as check_control
from distill.checks import check as check_distill
from distill.dmd import GAN
from distill.f_distill import FDistill
from distill.options import auto
from distill.student import Student, even_times
from scorefield.commands.configuration import read_config
from scorefield.commands.options import TrainTeacher, check_teacher
from scorefield.training import checkpoint
from scorefield.training.identity import binding
from scorefield.training.loop import EMA, Phase, rehearse
from scorefield.training.memory import measured
from scorefield.training.micro_batch import Trial, by_trying, candidates, foreseen, free_bytes, settle
from scorefield.training.options import images_per_pass, micro_batch_of, passes_per_iteration
from scorefield.training.run import changes

PASSES = {"teacher": 8, "student": 8, "paths": 8, "texts": 2, "lora": 2, "control": 2}
"""Images of a pass that trainers are tried with: half of their batch."""


def trainers(*fast, of=tuple(PASSES)):
    """All of them, of which others than ``fast`` take long."""
    marked = [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in of]
    return pytest.mark.parametrize("name", marked)


@pytest.fixture(scope="module")
def places(tmp_path_factory, sd):
    return make_places(tmp_path_factory.mktemp("places"), sd)


def run(name, places, out, **changes):
    AcceleratorState._reset_state(True)
    return TRAINERS[name].main(replace(TRAINERS[name].options(places), out=out, **changes))


# What is learned.


@pytest.mark.parametrize("gan", [True, False])
def test_a_distillation_in_passes_is_that_of_the_whole_batch(accelerator, gan):
    """Student, fake score and critic, after six iterations under clipping, in float64."""
    passes = worker.distilled(accelerator, torch.float64, 1, accumulate=4, gan=gan)
    whole = worker.distilled_by_one(accelerator, torch.float64, 1, accumulate=4, gan=gan)
    assert passes.keys() == whole.keys()
    assert max(float((passes[name] - whole[name]).abs().max()) for name in whole) < 1e-10


def test_what_f_distill_divides_by_is_a_mean_over_the_pass(schedules):
    """As the documentation says: its passes are not the whole batch."""
    student = random_denoiser(schedules["karras"])
    fake = random_denoiser(schedules["karras"], seed=1, critic=True)
    method = FDistill(
        teacher=random_denoiser(schedules["karras"], seed=2), fake=fake, shape=(2,), gan=GAN(generator_weight=0.0),
        student=Student(student, even_times(schedules["karras"], 1)),
    )  # fmt: skip
    cond = {"class_labels": torch.zeros(1).long()}
    with refused("two or more"):
        method.gradient(torch.zeros(1, 2), cond, {}, generator=torch.Generator())


@trainers("teacher")
def test_a_run_in_passes_is_one_of_smaller_batches_and_more_of_them(places, tmp_path, name):
    number = PASSES[name]
    run(name, places, tmp_path / "passes", micro_batch=number)
    run(name, places, tmp_path / "smaller", batch_size=number, accumulate=2)
    assert_same(tensors(tmp_path / "passes"), tensors(tmp_path / "smaller"))


# What is refused.


def test_a_size_is_a_number_or_auto():
    assert [micro_batch_of(text) for text in ("auto", "8", "0")] == ["auto", 8, 0]
    for wrong in ("-1", "x", "1.5", ""):
        with refused("expected a whole number of images, or auto"):
            micro_batch_of(wrong)


@pytest.mark.parametrize(("changes", "said"), [
    ({"micro_batch": 3}, "--micro-batch must be a divisor of --batch-size 64; got 3. Pass 2,"),
    ({"micro_batch": 128}, "got 128. Pass 64,"),
    ({"micro_batch": 1, "method": "f-distill", "gan_weight": 0.1}, "must be at least 2, and a divisor"),
    ({"micro_batch": "auto", "compile": True}, "--micro-batch auto and --compile do not go together"),
    ({"micro_batch": "auto", "shard": 2, "dry_run": True}, "--micro-batch auto and --shard do not go together"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_refused(tmp_path, changes, said):
    with refused(said):
        check_distill(replace(auto(), out=tmp_path / "run", **changes))


def test_other_trainers_refuse_them_too(places, tmp_path):
    with refused("a divisor of --batch-size 64"):
        check_teacher(TrainTeacher(out=tmp_path / "run", batch_size=64, micro_batch=5))
    with refused("a divisor of --batch-size 4"):
        check_control(replace(TRAINERS["control"].options(places), out=tmp_path / "run", micro_batch=3))


def test_a_wrong_word_on_the_command_line_is_refused_in_one_line(capsys):
    from scorefield.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["distill", "--micro-batch", "half"])
    assert stopped.value.code == 2
    assert "expected a whole number of images, or auto; got 'half'" in " ".join(capsys.readouterr().err.split())


# How auto finds it.


def test_each_candidate_is_at_most_half_of_the_one_before():
    assert [candidates(number) for number in (24, 7, 1, 9)] == [[24, 12, 6, 3, 1], [7, 1], [1], [9, 3, 1]]
    assert candidates(8, smallest=2) == [8, 4, 2]
    for number in range(1, 200):
        found = candidates(number)
        assert all(number % one == 0 for one in found)
        assert all(2 * after <= before for before, after in pairwise(found))


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


def test_ranks_agree_on_the_least(tmp_path):
    def work(two):
        config = by_trying(options(tmp_path), two, make_trial(most=(16, 3)[two.process_index])[1])
        return torch.tensor(config.micro_batch)

    assert [int(found) for found in run_on_ranks(work, tmp_path)] == [2, 2]


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
    monkeypatch.setattr(micro_batch_module, "free_bytes", lambda: int(room / micro_batch_module.SHARE))
    config = settle(options(tmp_path), accelerator, trial)
    assert config.micro_batch == fitting
    assert "as measured with 1 and 2" in capsys.readouterr().out


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


# Runs under auto.


@pytest.fixture
def scarce(monkeypatch):
    """Let only so many images a pass fit, as measured."""

    def only(most):
        def by_measuring(config, accelerator, trial, smallest):
            trial_of = trial(replace(config, micro_batch=most))
            rehearse(trial_of.phases, trial_of.batches, accelerator, rollout=trial_of.rollout, seed=config.seed)
            return replace(config, micro_batch=most)

        monkeypatch.setattr(micro_batch_module, "_by_measuring", by_measuring)

    return only


@trainers("student")
def test_a_run_under_auto_is_one_with_the_number_that_it_finds(places, tmp_path, scarce, name):
    """Weights, states and draws are those of a run that tried nothing."""
    scarce(PASSES[name])
    run(name, places, tmp_path / "auto", micro_batch="auto")
    run(name, places, tmp_path / "given", micro_batch=PASSES[name])
    assert_same(tensors(tmp_path / "auto"), tensors(tmp_path / "given"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "lora"])
def test_two_ranks_under_auto_leave_what_they_leave_with_its_number(places, tmp_path, name):
    """With DDP and without; the second rank has less memory."""
    number, trainer = PASSES[name], TRAINERS[name]

    def train(two, out, micro_batch):
        AcceleratorState._reset_state()
        fits = micro_batch_module._fits

        def fits_here(config, accelerator, trial):
            return fits(config, accelerator, trial) and (two.process_index == 0 or config.micro_batch <= number)

        micro_batch_module._fits, micro_batch_module._by_measuring = fits_here, by_trying
        trainer.main(replace(trainer.options(places), out=out, micro_batch=micro_batch, report_to=("none",)))

    for out, micro_batch in (("auto", "auto"), ("given", number)):
        run_on_ranks(partial(train, out=tmp_path / out, micro_batch=micro_batch), tmp_path, timeout=400)
    assert_same(tensors(tmp_path / "auto"), tensors(tmp_path / "given"))


def test_a_file_of_options_holds_a_number_or_auto(tmp_path):
    file = tmp_path / "config.json"
    for value in (8, "auto", 0):
        file.write_text(json.dumps({"micro_batch": value}))
        assert read_config(file, TrainTeacher) == {"micro_batch": value}
    for wrong in (-4, 1.5, "half", True):
        file.write_text(json.dumps({"micro_batch": wrong}))
        with refused("micro_batch must be"):
            read_config(file, TrainTeacher)


@trainers("teacher", "student")
def test_bytes_of_a_whole_batch_lie_on_the_line_of_two_small_ones(places, tmp_path, monkeypatch, name):
    """Of every trainer, with what its losses ask of teacher, critic, average and pairs."""
    compared = []

    def compare(config, accelerator, trial, smallest):
        needed, _ = micro_batch_module.needs(config, accelerator, trial, smallest)
        tried = trial(replace(config, micro_batch=config.batch_size))
        networks = [*tried.others, *(one for phase in tried.phases for one in phase.networks().values())]
        work = partial(rehearse, tried.phases, tried.batches, accelerator, rollout=tried.rollout, seed=config.seed)
        stays = sum(
            12 * p.numel() for phase in tried.phases for p in phase.network.parameters() if p.requires_grad
        )
        compared.append((needed(config.batch_size) - stays, measured(work, networks)))
        raise Killed

    monkeypatch.setattr(micro_batch_module, "_by_measuring", compare)
    with pytest.raises(Killed):
        run(name, places, tmp_path / "run", micro_batch="auto")
    assert compared[0][0] == pytest.approx(compared[0][1], rel=0.1)


@trainers("teacher", of=("teacher", "student", "texts", "control"))
def test_auto_measures_every_trainer(places, tmp_path, capsys, name):
    run(name, places, tmp_path / "run", micro_batch="auto", steps=2, save_every=2)
    batch = TRAINERS[name].options(places).batch_size
    assert f"--micro-batch auto: 1 pass of {batch} images an iteration: " in capsys.readouterr().out


@trainers("teacher", of=("teacher", "student", "control"))
def test_a_run_that_goes_on_keeps_its_number_and_says_so(places, tmp_path, scarce, monkeypatch, capsys, name):
    number = PASSES[name]
    run(name, places, tmp_path / "whole", micro_batch=number)
    scarce(number)
    with monkeypatch.context() as patch:
        stop(patch, 4, kill)
        with pytest.raises(Killed):
            run(name, places, tmp_path / "cut", micro_batch="auto")
    scarce(1)
    capsys.readouterr()
    run(name, places, tmp_path / "cut", micro_batch="auto")
    said = capsys.readouterr().out
    assert f"--micro-batch auto: 2 passes of {number} images an iteration, as this run began" in said
    assert "before," not in said
    assert_same(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))


def test_a_run_that_began_without_keeps_the_whole_batch(accelerator, tmp_path):
    phases, _ = make_trial(most=1)
    config = options(tmp_path)
    own = binding(replace(config, micro_batch=0))
    assert "micro_batch" not in own, "checkpoints of older versions go on"
    assert "split_views" not in binding(TRAINERS["canvas"].options(Places(*[tmp_path] * 4)))
    checkpoint.save(config.out / "checkpoints", 1, phases, own)
    assert settle(config, accelerator, pytest.fail).micro_batch == 16


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
    found, said = foreseen(config, lambda one: 100 * images_per_pass(one), room=450)
    assert found.micro_batch == 4
    assert said.startswith("--micro-batch auto: 4 passes of 4 images an iteration, as predicted for the 0.00 GiB")
    assert foreseen(config, lambda one: None, 1) == (config, micro_batch_module.UNFORESEEN)
    assert "no pass is predicted to fit" in foreseen(config, lambda one: 2, 1)[1]
    given = options(tmp_path, micro_batch=2)
    assert foreseen(given, pytest.fail, 1) == (given, "")


@pytest.mark.parametrize(("name", "module"), [
    pytest.param("texts", "distill.text_recipe", marks=pytest.mark.slow),
    ("control", "controlnet.recipe"),
])  # fmt: skip
def test_dry_runs_predict_it(places, tmp_path, monkeypatch, capsys, name, module):
    def most(**changes):
        run(name, places, tmp_path / "run", dry_run=True, **changes)
        said = capsys.readouterr().out
        return said, int(said.split("at most on each process: ")[1].split(" ")[0].replace(",", ""))

    _, two = most(micro_batch=2)
    _, four = most(micro_batch=4)
    assert two < four
    monkeypatch.setattr(f"{module}.room_for", lambda device, here: two)
    said, found = most(micro_batch="auto")
    assert found == two
    assert "--micro-batch auto: 2 passes of 2 images an iteration, as predicted" in said
    assert "passes: 2 of 2 images in each iteration" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_dry_runs_of_small_networks_say_that_it_is_found_at_the_start(places, tmp_path, capsys, name):
    run(name, places, tmp_path / "run", dry_run=True, micro_batch="auto")
    assert micro_batch_module.UNFORESEEN in capsys.readouterr().out
