"""What is said and recorded while an adapter learns: looks made up by hand, and none twice."""

from types import SimpleNamespace

import control_watch
import pytest
import torch
from accelerate import Accelerator
from control_watch import ControlWatch

from controlnet.evidence import Gap, Probe, Standing
from controlnet.verdict import Evidence, EvidenceLog


def make_look(step, value):
    sure = Gap(right=1.0, shuffled=1.2, error=0.01, residual_rms=0.1)
    return Evidence(step, sure, {"edge_f1_1px": Standing(value, 0.2, 0.9)})


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
