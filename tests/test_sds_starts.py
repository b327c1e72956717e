"""Several starts of a scene: which one goes on, that it is that of a plain run, and that no kill changes it."""

import json
import math
import os
import signal
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sds.options as scene_options
import sds.recipe as train_sds
from scorefield.commands.options import Report
from scorefield.commands.report import main as make_report
from sds.starts import Starts, choose, facts_of_starts, plan_of_starts, read_starts, seeds_of, write_starts

PICTURES = replace(
    scene_options.toyworld(), prompt="a red mug", canvas=True, overhead=0, quarters=1.0, batch_size=1, draws=1,
    steps=4, start_steps=2, seeds=3, seed=5, probe_every=0, save_every=2, log_every=1,
)  # fmt: skip
"""Pictures in place of scenes: a run of a few seconds."""

SCENE = replace(
    PICTURES, canvas=False, batch_size=2, overhead=1, render_size=(8, 8), num_samples=8, steps=6,
    mesh_resolution=12, turntable_size=16, faces=400, texture=32,
)  # fmt: skip


# Choosing.


def test_the_smallest_residual_goes_on_and_the_first_of_equals():
    assert choose({3: 0.58, 4: 0.36, 5: 0.44}) == 4
    assert choose({3: 0.36, 4: 0.36}) == 3
    assert choose({3: math.inf, 4: 0.9, 5: math.nan}) == 4
    with pytest.raises(FloatingPointError, match=r"all 2 starts \(seeds 3, 4\) lost their scenes"):
        choose({3: math.inf, 4: math.nan})


def test_what_was_chosen_is_read_again_and_anything_else_is_not(tmp_path):
    config = replace(PICTURES, out=tmp_path)
    starts = Starts(2, {5: 0.5, 6: math.inf, 7: 0.4}, 7)
    write_starts(tmp_path, starts)
    assert read_starts(config) == starts
    assert facts_of_starts(config) == {"starts": json.loads((tmp_path / "starts.json").read_text()), "seed": 7}
    assert facts_of_starts(replace(config, seeds=1)) == {}
    for other in ({"seed": 4}, {"seeds": 2}, {"start_steps": 3}):
        assert read_starts(replace(config, **other)) is None
    good = starts.described()
    for wrong in ({**good, "chosen": 5}, {**good, "chosen": "x"}, {**good, "residual_at_high_noise": [1]}, [], 3):
        (tmp_path / "starts.json").write_text(json.dumps(wrong))
        assert read_starts(config) is None
    (tmp_path / "starts.json").write_text("{")
    assert read_starts(config) is None


def test_what_is_said_of_the_starts():
    assert list(seeds_of(PICTURES)) == [5, 6, 7]
    assert plan_of_starts(PICTURES) == (
        "3 starts of 2 steps each, of the seeds 5, 6, 7; one goes on. 8 steps in all"
    )
    assert plan_of_starts(replace(PICTURES, seeds=1)) == ""
    assert Starts(2, {5: 0.5, 6: math.inf}, 5).lines() == [
        "start of seed 5: residual at high noise 0.5000 after 2 steps, goes on",
        "start of seed 6: the scene was lost after 2 steps",
    ]


@pytest.mark.parametrize(("changes", "message"), [
    ({"seeds": 0}, "--seeds must be above 0"), ({"start_steps": 0}, "--start-steps must be above 0"),
    ({"start_steps": 4}, "--start-steps must be below --steps 4; got 4"),
    ({"seed": 2**63 - 1}, "leaves no room for --seeds 3"),
])  # fmt: skip
def test_starts_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_sds.main(replace(PICTURES, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# Whole runs.


def residuals(monkeypatch, values):
    """Let the probe find these residuals, by seed."""
    build = train_sds.build_probe

    def build_failing(config, task, teacher):
        probe = build(config, task, teacher)

        def probed(step, method):
            _, shown = probe(step, method)
            return {train_sds.NOISY: values[config.seed]}, shown

        probed.views = probe.views
        return probed

    monkeypatch.setattr(train_sds, "build_probe", build_failing)


def weights(config):
    return (config.out / "scene.safetensors").read_bytes()


def test_the_start_that_goes_on_is_the_plain_run_of_its_seed(tmp_path, monkeypatch, capsys):
    config = replace(PICTURES, out=tmp_path / "three")
    residuals(monkeypatch, {5: 0.5, 6: 0.25, 7: math.nan})
    train_sds.main(config)
    said = capsys.readouterr().out
    assert "start of seed 6: residual at high noise 0.2500 after 2 steps, goes on" in said
    assert "start of seed 7: the scene was lost after 2 steps" in said
    (config.out / "starts.json").unlink()
    train_sds.main(config)
    assert "resumed from step 4" in capsys.readouterr().out, "the run behind the starts is not put back"
    monkeypatch.undo()
    plain = replace(config, out=tmp_path / "plain", seed=6, seeds=1)
    train_sds.main(plain)
    assert weights(config) == weights(plain)
    assert json.loads((config.out / "starts.json").read_text()) == {
        "steps": 2, "chosen": 6, "residual_at_high_noise": {"5": 0.5, "6": 0.25, "7": None},
    }  # fmt: skip
    assert (config.out / "starts" / "seed-7" / "samples" / "step-000000002.png").is_file()
    assert not (plain.out / "starts").exists()
    events = EventAccumulator(str(config.out / "logs")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("starts/residual_of_seed_5")] == [(2, 0.5)]
    assert "starts/residual_of_seed_7" not in events.Tags()["scalars"]
    page = (config.out / "report.html").read_text()
    assert "start of seed 6: residual at high noise after 2 steps" in page
    assert "this one went on" in page
    train_sds.main(config)  # again, it changes nothing, and asks no start
    assert "start 1 of 3" not in capsys.readouterr().out
    assert weights(config) == weights(plain)


def test_a_lost_start_does_not_end_the_run_and_all_lost_do(tmp_path, monkeypatch, capsys):
    learn, lost = train_sds.learn, {5}

    def learn_or_lose(config, *args, **options):
        if config.seed in lost:
            raise FloatingPointError("the scene is empty in step 2")
        return learn(config, *args, **options)

    monkeypatch.setattr(train_sds, "learn", learn_or_lose)
    config = replace(PICTURES, out=tmp_path / "run", seeds=2)
    train_sds.main(config)
    assert "the start of seed 5 is given up: the scene is empty in step 2" in capsys.readouterr().err
    assert read_starts(config).chosen == 6
    lost.add(6)
    with pytest.raises(FloatingPointError, match="all 2 starts"):
        train_sds.main(replace(config, out=tmp_path / "other"))
    assert not (tmp_path / "other" / "starts.json").exists()
    make_report(Report(runs=(tmp_path / "other",)))
    assert "Its starts have begun" in (tmp_path / "other" / "report.html").read_text()


def test_a_dry_run_tells_the_steps_in_all(tmp_path, capsys):
    train_sds.main(replace(PICTURES, out=tmp_path / "run", dry_run=True))
    said = capsys.readouterr().out
    assert "before the first step: 3 starts of 2 steps each, of the seeds 5, 6, 7; one goes on. 8 steps" in said
    assert "updates: 8 of the scene" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_scene_says_in_its_reports_which_start_went_on(tmp_path):
    finished = replace(SCENE, out=tmp_path / "run")
    train_sds.main(finished)
    facts = json.loads((finished.out / "export" / "report.json").read_text())["facts"]
    chosen = min(facts["starts"]["residual_at_high_noise"].items(), key=lambda item: item[1])[0]
    assert facts["seed"] == facts["starts"]["chosen"] == int(chosen)
    assert facts["starts"]["steps"] == 2
    assert len(set(facts["starts"]["residual_at_high_noise"].values())) == 3
    plain = replace(finished, out=tmp_path / "plain", seed=int(chosen), seeds=1)
    train_sds.main(plain)
    assert weights(plain) == weights(finished)


KILLED_AT = {
    "first start": "starts/seed-5/checkpoints/step-000000002", "second start": "starts/seed-6/checkpoints",
    "last start": "starts/seed-7/checkpoints/step-000000002", "choice": "starts.json",
    "behind them": "checkpoints/step-000000004",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Pictures, whose runs are those of scenes without an export."""
    config = replace(PICTURES, out=tmp_path_factory.mktemp("pictures") / "run", steps=40)
    train_sds.main(config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("moment", list(KILLED_AT))
def test_a_run_that_is_killed_ends_in_the_same_bytes(moment, finished, tmp_path):
    config = replace(finished, out=tmp_path / "cut")
    if (child := os.fork()) == 0:
        with suppress(BaseException):
            train_sds.main(config)
        os._exit(1)
    deadline = time.monotonic() + 240
    while not (config.out / KILLED_AT[moment]).exists():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended before it was killed"
    train_sds.main(config)
    assert weights(config) == weights(finished)
    assert (config.out / "starts.json").read_bytes() == (finished.out / "starts.json").read_bytes()


@pytest.mark.slow
def test_two_ranks_agree_on_the_start_that_goes_on(tmp_path):
    """The second rank would choose another one, were it asked."""
    config = replace(PICTURES, out=tmp_path / "run")

    def work(accelerator):
        rank, found, build = accelerator.process_index, [], train_sds.build_probe

        def build_other(*args):
            probe, left = build(*args), [0.25, 0.5] if rank == 0 else [0.5, 0.25]

            def probed(step, method):
                return {train_sds.NOISY: left[args[0].seed - 5]}, probe(step, method)[1]

            probed.views = probe.views
            return probed

        train_sds.build_probe = build_other
        best = train_sds.best_start
        train_sds.best_start = lambda *args: found.append(best(*args)) or found[0]
        train_sds.main(replace(config, seeds=2))
        return {"seed": torch.tensor(found)}

    answers = run_on_ranks(work, tmp_path, timeout=400)
    assert [answer["seed"].tolist() for answer in answers] == [[5], [5]]
    assert load_file(config.out / "scene.safetensors")
