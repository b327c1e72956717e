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


@pytest.mark.slow
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
    sizes = [result["saved_bytes"][name] for name in control_step.NAMES[1:]]
    assert sizes == sorted(set(sizes)), "recomputing more keeps less"
    assert result["saved_bytes"]["ours"] <= 0.7 * result["saved_bytes"]["diffusers"]


@pytest.mark.slow
def test_contenders_that_learn_something_else_are_not_compared(monkeypatch):
    """Other noise at once; a hundred times the learning rate, in this library alone, from the second loss on."""
    with monkeypatch.context() as patch:
        patch.setattr(control_step, "draw", lambda mean, step: torch.randn_like(mean))
        with pytest.raises(ValueError, match="does not compute the losses of 'diffusers', relative error"):
            control_step.main(TINY)
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


@pytest.mark.slow
def test_the_work_of_public_models_is_counted(tmp_path):
    for name, network in (("sd15_unet", tiny.text_unet(32)), ("sd_vae", tiny.vae())):
        settings = {"_class_name": type(network).__name__, **network.config}
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    counted = control_step.work(tmp_path, "sd15_unet", "sd_vae")
    values = list(counted.values())
    assert list(counted) == ["nothing recomputed", "hint alone", "one level", "all", "encoding the image"]
    assert 0 < values[0] < values[1] < values[2] < values[3]
    assert values[4] > 0


@pytest.mark.parametrize(("wrong", "message"), [
    *(({name: 0}, "--rounds, --batch and --steps must be at least 1") for name in ("rounds", "batch", "steps")),
    ({"warmup": -1}, "--warmup at least 0"),
    *(({"activation_budget": budget}, "--activation-budget must lie in") for budget in (0.0, 1.1, float("nan"))),
    ({"clock": "process", "device": "cuda"}, "--clock process does not measure a GPU"),
])  # fmt: skip
def test_impossible_options_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        control_step.main(replace(TINY, **wrong))
