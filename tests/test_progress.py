"""Long work is never silent: a bar on a terminal, a line every ten seconds in a log file."""

import io
import re
import sys
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import distill.options as distill_options
import distill.recipe as train_dmd
import scorefield.commands.teacher as train_teacher
import scorefield.progress as shown
from distill.pair_store import stored_pairs
from distill.regression import make_pairs
from scorefield import Karras
from scorefield.commands.command import run
from scorefield.commands.options import TrainTeacher
from scorefield.models.prompts import PromptEncoder, share_work
from scorefield.progress import Progress, duration, progress, working
from scorefield.sampling import grid
from scorefield.training.options import RunOptions


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(shown.time, "monotonic", clock)
    return clock


@pytest.fixture
def soon(monkeypatch):
    """A line every 0.1 seconds."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(shown, "EVERY", 0.1)


@pytest.fixture
def seen(monkeypatch):
    """All work that is shown, by name."""
    seen, add = {}, shown._HEART.add
    monkeypatch.setattr(shown._HEART, "add", lambda work: seen.setdefault(work.name, work) and add(work))
    return seen


def test_a_line_says_how_many_how_fast_and_how_long(clock):
    work = Progress("steps", 5000, start=1000)
    assert work.line() == "steps: 1,000 of 5,000, 0 s so far"
    clock.now = 40.0
    work.update(200)
    work.note("student/loss 0.12")
    assert work.line() == "steps: 1,200 of 5,000, 0.2 s each, 12 min 40 s left; student/loss 0.12"
    assert work.seconds_each == 0.2
    slow = Progress("pairs", 2)
    clock.now += 4000
    slow.update()
    assert slow.line() == "pairs: 1 of 2, 4,000 s each, 1 h 6 min left"
    assert Progress("teacher check").line() == "teacher check: 0 s so far"


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (7530, "2 h 5 min"),
    (3_600_000, "1,000 h 0 min"),
])  # fmt: skip
def test_durations_can_be_read(seconds, text):
    assert duration(seconds) == text


def test_one_long_item_is_not_silent_and_lines_keep_their_distance(soon, monkeypatch):
    lines = []
    monkeypatch.setattr(shown.tqdm, "write", lambda text, file: lines.append((time.monotonic(), text)))
    for _ in progress([1, 2], "latents"):
        time.sleep(0.5)
    assert len(lines) >= 4
    assert lines[0][1] == "latents: 0 of 2, 0 s so far"
    assert re.fullmatch(r"latents: 1 of 2, 0\.\d+ s each, \d s left", lines[-1][1])
    times = [when for when, _ in lines]
    assert min(b - a for a, b in pairwise(times)) >= 0.09


def test_the_innermost_work_speaks_and_the_outer_one_goes_on_afterwards(soon, capsys):
    with working("outer"):
        with working("inner"):
            time.sleep(0.3)
        between = capsys.readouterr().err
        time.sleep(0.3)
    after = capsys.readouterr().err
    assert "inner: 0 s so far\n" in between
    assert "outer" not in between
    assert "outer: " in after
    assert "inner" not in after
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_what_fails_or_is_broken_off_is_no_longer_shown(soon, capsys):
    with pytest.raises(ValueError, match="lost"), working("failing"):
        raise ValueError("lost")
    for _ in progress(range(9), "broken"):
        break
    assert shown._HEART.shown == []


def test_short_work_leaves_no_line(monkeypatch, capsys):
    for _ in progress(range(3), "short"):
        time.sleep(0.01)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("name", "value"), [("RANK", "1"), ("TQDM_DISABLE", "1")])
def test_other_ranks_and_who_wants_none_are_silent(soon, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    with working("loading"):
        time.sleep(0.3)
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_seconds_an_item(soon, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with working("scorefield teacher"), Progress("steps", 4, unit="step") as bar:
        for _ in range(4):
            time.sleep(0.15)
            bar.update()
            bar.note("p/loss 1")
    said = terminal.getvalue()
    assert said.endswith("p/loss 1]\n"), "the bar stays when it is done"
    assert "scorefield teacher" not in said
    assert "4/4 [00:00<00:00," in said
    assert re.search(r"0\.1\ds/step, p/loss 1", said)
    assert "s each" not in said


def test_a_command_is_never_silent_whatever_it_does(soon, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scorefield", "--out", str(tmp_path / "run")])
    run(lambda config: time.sleep(0.4), RunOptions, prog="scorefield distill")
    assert "scorefield distill: 0 s so far" in capsys.readouterr().err


def test_teacher_pairs_are_counted_within_their_first_shard(soon, make_mixture, tmp_path, capsys):
    """One number for all that are missing, over all shards."""
    mixture, times = make_mixture(Karras(0.02, 10.0), labelled=False), grid(Karras(0.02, 10.0), 2)
    bar, counts = Progress("teacher pairs"), []

    class Slow:
        schedule = mixture.schedule

        def __call__(self, x_t, t, cond):
            time.sleep(0.1)
            counts.append((bar.count, bar.total))
            return mixture(x_t, t, cond)

    def make(shard, count):
        return make_pairs(
            Slow(), {}, num=11, shape=(2,), times=times, rank=shard, num_ranks=count, batch=2, told=bar.update
        )

    stored_pairs(make, "key", 11, tmp_path, shard_size=4, bar=bar)
    assert counts[0] == (0, 11)
    assert (2, 11) in counts
    assert bar.count == 11
    lines = re.findall(r"teacher pairs: (\d+) of 11, .* left", capsys.readouterr().err)
    assert {"2", "4"} & set(lines)
    next(tmp_path.rglob("*.safetensors")).unlink()
    stored_pairs(make, "key", 11, tmp_path, shard_size=4, bar=bar)
    assert bar.total == bar.count
    assert bar.total in (3, 4)


def test_shared_work_and_prompts_are_counted(seen, tmp_path):
    share_work(list(range(7)), done=lambda item: item < 3, do=lambda items: None, batch_size=2, name="latents")
    assert (seen["latents"].count, seen["latents"].total) == (7, 7)
    encoder = PromptEncoder(tmp_path, lambda: "one", lambda: lambda prompts: {"x": torch.zeros(len(prompts), 2)})
    encoder.encode([f"prompt {number}" for number in range(40)])
    assert (seen["prompts encoded"].count, seen["prompts encoded"].total) == (40, 40)


def test_a_distillation_shows_all_that_takes_long(seen, tmp_path):
    teacher = train_teacher.main(TrainTeacher(out=tmp_path / "teacher", steps=3, batch_size=16, width=32, depth=1))
    assert {"steps", "checkpoint of step 3"} <= seen.keys()
    recipe = replace(
        distill_options.auto(), teacher=str(teacher), out=tmp_path / "run", steps=4, student_every=2,
        batch_size=16, warmup_steps=2, num_pairs=20, pair_steps=2, fake_warmup=3, guard_images=64, guard_every=2,
        eval_every=2, eval_images=20, skip_teacher_check=True,
    )  # fmt: skip
    train_dmd.main(recipe)
    counts = {name: (work.count, work.total) for name, work in seen.items() if work.total}
    expected = {
        "teacher pairs": (20, 20), "teacher pairs of the guard": (64, 64), "steps of the fake score": (3, 3),
        "samples of the teacher": (1, 1), "samples to evaluate": (1, 1),
    }  # fmt: skip
    assert expected.items() <= counts.items()
    assert counts["range test of learning rates"][1] == 50
    assert {"loading the teacher", "the guard's look at the student", "saving the student"} <= seen.keys()
    with pytest.raises(ValueError, match="teacher check"):
        train_dmd.main(replace(recipe, out=tmp_path / "checked", skip_teacher_check=False))
    assert "teacher check" in seen
