"""What is said and recorded while an adapter learns: looks made up by hand, and none twice."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

import controlnet.watch as control_watch
from controlnet.evidence import BoundedScore, Gap, Probe
from controlnet.evidence_log import Evidence, EvidenceLog
from controlnet.watch import ControlWatch


def make_look(step, value):
    sure = Gap(right=1.0, shuffled=1.2, error=0.01, residual_rms=0.1)
    return Evidence(step, sure, {"edge_f1_1px": BoundedScore(value, 0.2, 0.9)})


@pytest.fixture
def make_watch(monkeypatch, tmp_path):
    """A watch over a training whose scores are known by step; looks are counted in ``watch.taken``."""

    def make(scores, **changes):
        taken, images = [], torch.zeros(2, 3, 8, 8)

        def take_look(step, *arguments):
            taken.append(step)
            return make_look(step, scores[step]), images

        monkeypatch.setattr(control_watch, "take_look", take_look)
        probe = Probe(x0=images, hint=torch.rand(2, 1, 8, 8), cond={}, images=images)
        config = SimpleNamespace(**{"eval_every": 50, "steps": 250, "warn_after": 0})
        settings = {
            "config": config, "validation": SimpleNamespace(probe=probe), "denoiser": None, "images_per_step": 4,
            "accelerator": Accelerator(cpu=True), "log": EvidenceLog(tmp_path / "evidence.jsonl"),
        }  # fmt: skip
        watch = ControlWatch(**{**settings, **changes})
        watch.taken = taken
        return watch

    return make


def test_no_warning_while_control_arrives(make_watch, capsys):
    watch = make_watch({50: 0.2, 100: 0.3, 150: 0.86, 200: 0.9, 250: 0.9})
    said = []
    for step in range(1, 251):
        watch(step)
        said.append(capsys.readouterr().err)
    assert not any("warning" in words for words in said)
    assert [step for step, words in enumerate(said, 1) if "control learned at step 150" in words] == [200]


def test_one_warning_if_control_does_not_come(make_watch, capsys):
    watch = make_watch({50: 0.2, 100: 0.3, 150: 0.2, 200: 0.3, 250: 0.3})
    said = []
    for step in (50, 100, 150, 200, 250):
        watch(step)
        said.append(capsys.readouterr().err)
    assert ["warning: control has not come by step 150" in words for words in said] == [0, 0, 1, 0, 0]


def test_a_look_that_was_missed_is_taken_after_resuming_and_no_look_twice(make_watch):
    scores = dict.fromkeys((50, 100, 150), 0.3)
    watch = make_watch(scores)
    watch(50)
    same = make_watch(scores, first=50)
    same(50)
    assert same.taken == []
    late = make_watch(scores, first=100)
    late(100)
    late(150)
    assert late.taken == [100, 150]
    assert [look.step for look in late.log.read()] == [50, 100, 150]
    again = make_watch(scores, first=75)  # an older checkpoint: what was seen beyond it is seen anew
    again(75)
    again(100)
    assert again.taken == [100]
    other = make_watch(scores, first=100, log=EvidenceLog(watch.log.path, "another sampler"))
    other(100)
    assert other.taken == [100]


def test_a_look_is_recorded_once_its_figures_and_its_picture_are_logged(make_watch, monkeypatch):
    """A run that is killed in between finds no record, and takes the look again."""
    logged = []

    def killed(accelerator, step, scalars, images):
        logged.append((step, scalars["control/edge_f1_1px"], images.shape[0]))
        raise KeyboardInterrupt

    watch = make_watch({50: 0.3})
    with monkeypatch.context() as patch:
        patch.setattr(control_watch, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            watch(50)
    assert [(step, value) for step, value, _ in logged] == [(50, 0.3)]
    assert watch.log.read() == []
    watch(50)
    assert [look.step for look in watch.log.read()] == [50]


def test_looks_are_known_by_all_that_they_must_have_in_common():
    held_out = SimpleNamespace(identity=lambda index: f"image {index}", caption=lambda index: f"text {index}")
    config = SimpleNamespace(guidance=3.0, sampling_steps=20)
    task = SimpleNamespace(hint="canny", held_out=held_out)
    known = control_watch.fingerprint_of(config, task, range(4))
    assert known == control_watch.fingerprint_of(config, task, range(4))
    renamed = SimpleNamespace(identity=held_out.identity, caption=lambda index: "another")
    others = [
        (SimpleNamespace(guidance=5.0, sampling_steps=20), task, range(4)),
        (SimpleNamespace(guidance=3.0, sampling_steps=9), task, range(4)),
        (config, SimpleNamespace(hint="tile", held_out=held_out), range(4)),
        (config, SimpleNamespace(hint="canny", held_out=renamed), range(4)),
        (config, task, range(1, 5)),
    ]
    assert known not in {control_watch.fingerprint_of(*other) for other in others}
