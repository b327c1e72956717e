"""The benchmark of an adapter's training step: equal losses, what it counts, what it writes. No timing."""

import json
from dataclasses import replace

import control_step
import pytest
import tiny_pipelines as tiny
import torch
from accelerate.state import AcceleratorState
from control_step import Config
from diffusers import AutoencoderKL

TINY = Config(batch=1, rounds=1, steps=1, warmup=0)


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch):
    """A tenth of the toy world's width; its sizes of image, latent and prompt."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def vae():
        return AutoencoderKL(
            latent_channels=4, block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip

    monkeypatch.setattr(control_step, "make_vae", vae)
    monkeypatch.setattr(control_step, "make_unet", lambda: tiny.text_unet(32))
    monkeypatch.setattr(
        control_step, "make_text_encoder", lambda vocabulary: tiny.clip(length=control_step.LENGTH)
    )
    monkeypatch.setattr(control_step, "VOCABULARY", 64)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_it_reports_every_contender(tmp_path, capsys):
    result = control_step.main(replace(TINY, out=tmp_path / "new" / "control.json"))
    assert json.loads((tmp_path / "new" / "control.json").read_text()) == result
    assert result["loss_errors"].keys() == set(control_step.NAMES) - {"diffusers"}
    assert max(result["loss_errors"].values()) < 1e-9
    assert result["seconds"].keys() == result["saved_bytes"].keys() == set(control_step.NAMES)
    assert result["speedups"].keys() == set(control_step.NAMES) - {"diffusers"}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in result["seconds"].values())
    assert result["gflop"] == {}
    shown = capsys.readouterr().out
    assert all(name in shown for name in control_step.NAMES)


def test_recomputing_more_keeps_less():
    saved = control_step.measure(TINY)["saved_bytes"]
    sizes = [saved[name] for name in control_step.NAMES[1:]]
    assert sizes == sorted(set(sizes))
    assert saved["ours"] <= 0.7 * saved["diffusers"]


def test_contenders_that_learn_something_else_are_not_compared(monkeypatch):
    monkeypatch.setattr(control_step, "draw", lambda mean, step: torch.randn_like(mean))
    with pytest.raises(ValueError, match="does not compute the losses of 'diffusers', relative error"):
        control_step.main(TINY)


def test_updates_are_compared_too(monkeypatch):
    """A hundred times the learning rate, in this library alone, shows from the second loss on."""
    plain = control_step.adamw
    monkeypatch.setattr(control_step, "adamw", lambda network, rate: plain(network, 100 * rate))
    assert max(control_step.loss_errors(TINY, steps=1).values()) < 1e-9
    assert min(control_step.loss_errors(TINY).values()) > 1e-9


@pytest.mark.slow
def test_compiled_code_keeps_less_within_a_smaller_budget():
    bytes_by_budget = []
    for budget in (1.0, 0.3):
        torch.compiler.reset()
        result = control_step.main(replace(TINY, compile=True, activation_budget=budget))
        assert result["loss_errors"][control_step.COMPILED] < control_step.COMPILED_TOLERANCE
        bytes_by_budget.append(result["saved_bytes"][control_step.COMPILED])
    assert bytes_by_budget[1] < bytes_by_budget[0] < result["saved_bytes"]["ours, nothing recomputed"]


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_budgets_are_refused(budget):
    with pytest.raises(ValueError, match="--activation-budget must lie in"):
        control_step.main(replace(TINY, activation_budget=budget))


def test_the_work_of_public_models_is_counted(tmp_path):
    unet, vae = tiny.text_unet(32), tiny.vae()
    for name, network in (("sd15_unet", unet), ("sd_vae", vae)):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"_class_name": type(network).__name__, **network.config})
        )
    counted = control_step.work(tmp_path, "sd15_unet", "sd_vae")
    values = list(counted.values())
    assert list(counted) == ["nothing recomputed", "hint alone", "one level", "all", "encoding the image"]
    assert 0 < values[0] < values[1] < values[2] < values[3]
    assert values[4] > 0


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"batch": 0}, {"steps": 0}, {"warmup": -1}])
def test_impossible_counts_are_refused(wrong):
    with pytest.raises(ValueError, match="need rounds, batch, steps >= 1 and warmup >= 0"):
        control_step.main(replace(TINY, **wrong))


def test_processor_time_is_not_for_a_gpu():
    with pytest.raises(ValueError, match="--clock process does not see what a GPU does"):
        control_step.main(replace(TINY, clock="process", device="cuda"))
