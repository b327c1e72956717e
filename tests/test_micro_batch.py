"""A batch in several passes learns what it learns in one; auto finds their size and changes nothing else."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from denoisers import random_denoiser
from folders import assert_same, tensors
from ranks import run_on_ranks
from refusals import refused
from trainers import TRAINERS, Killed, kill, make_places, stop
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
from scorefield.models.codec import Codec
from scorefield.training.loop import rehearse
from scorefield.training.micro_batch import SHARE, by_trying
from scorefield.training.options import micro_batch_of

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
    assert [micro_batch_of(text) for text in ("auto", "8", "0", "-1")] == ["auto", 8, 0, -1]
    for wrong in ("--1", "x", "1.5", "", "\u0663", "8\n", "1" * 5000):
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


@pytest.mark.parametrize(("number", "said"), [
    ("-1", "--micro-batch must be a divisor of --batch-size 256; got -1. Pass 1,"),
    ("1" * 25, f"--micro-batch must be below 2^31; got {'1' * 25}."),
], ids=["negative", "25 digits"])  # fmt: skip
def test_a_number_that_cannot_be_is_refused_in_one_line(capsys, tmp_path, number, said):
    from scorefield.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["teacher", "--micro-batch", number, "--batch-size", "256", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


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
    for value in (8, "auto", 0, -4):  # which is refused later
        file.write_text(json.dumps({"micro_batch": value}))
        assert read_config(file, TrainTeacher) == {"micro_batch": value}
    for wrong in (1.5, "half", True):
        file.write_text(json.dumps({"micro_batch": wrong}))
        with refused("micro_batch must be"):
            read_config(file, TrainTeacher)


def under_auto(name, places, out, monkeypatch, look, **changes):
    """Start a run that ends where it would measure, and let ``look`` take what that is given."""

    def by_measuring(*given):
        look(*given)
        raise Killed

    monkeypatch.setattr(micro_batch_module, "_by_measuring", by_measuring)
    with pytest.raises(Killed):
        run(name, places, out, micro_batch="auto", **changes)


@trainers("teacher", "student", "control")
def test_auto_takes_what_fits_in_truth(places, tmp_path, monkeypatch, name):
    """Of every trainer, with what its losses ask of teacher, critic, average and pairs; each time the same."""
    found, by_measuring = [], micro_batch_module._by_measuring

    def look(config, accelerator, trial, smallest):
        def bytes_of(number):
            return sum(needs(replace(config, micro_batch=number), accelerator, trial)[:2])

        needs = micro_batch_module.needs
        less, more = bytes_of(PASSES[name]), bytes_of(config.batch_size)
        assert less < more
        monkeypatch.setattr(micro_batch_module, "free_bytes", lambda: int((less + more) / 2 / SHARE))
        found.append(by_measuring(config, accelerator, trial, smallest).micro_batch)
        assert bytes_of(PASSES[name]) == pytest.approx(less, rel=1e-3)

    under_auto(name, places, tmp_path / "run", monkeypatch, look)
    assert found == [PASSES[name]]


def test_every_trial_of_an_adapter_encodes_its_pictures(places, tmp_path, monkeypatch):
    """As a run may have to, whose latents nobody has kept: the trial before keeps none for it."""
    encoded, posterior = [], Codec.posterior

    def noted(codec, images):
        encoded.append(len(images))
        return posterior(codec, images)

    def look(config, accelerator, trial, smallest):
        monkeypatch.setattr(Codec, "posterior", noted)
        for number in (2, 4, 4):
            micro_batch_module.needs(replace(config, micro_batch=number), accelerator, trial)

    under_auto("control", places, tmp_path / "run", monkeypatch, look, cache=tmp_path / "cache")
    assert encoded == [2, 4, 4]


@pytest.mark.parametrize(("guidance", "times"), [(1.0, 1), (2.0, 2)])
def test_teacher_pairs_are_part_of_a_trial(places, tmp_path, monkeypatch, guidance, times):
    """With guidance the network is asked about each image twice."""
    asked = []

    def look(config, accelerator, trial, smallest):
        tried = trial(replace(config, micro_batch=8))
        tried.others[0].register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
        tried.also()
        trial(replace(config, micro_batch=16, batch_size=512)).also()
        trial(replace(config, micro_batch=256, batch_size=512, warmup_steps=0)).also()
        none = {"guard_images": 0, "warmup_steps": 0, "regression_weight": 0.0}
        assert trial(replace(config, **none)).also is None

    under_auto("student", places, tmp_path / "run", monkeypatch, look, guidance=guidance)
    assert asked == [64 * times, 128 * times, 256 * times]


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


# What a dry run says.


@pytest.mark.slow
@pytest.mark.parametrize(("name", "module"), [
    ("texts", "distill.text_recipe"), ("control", "controlnet.recipe"),
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
