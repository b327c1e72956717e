"""The benchmark of a text-to-image teacher's cycle: what it counts, compares, refuses; what does not fit."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import text_contenders
import text_cycle
import tiny_pipelines as tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from text_contenders import COMPILED, COPIES, NAMES, SHARED, TWO_CALLS, Case
from text_cycle import Config, Cycle
from torch import nn

from scorefield.models.lora import LAYERS, LoRA

TINY = Config(batch=1, rank=2, student_every=2, rounds=1, warmup=0)


def one_level():
    return tiny.text_unet(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _small_network(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(text_contenders, "make_unet", one_level)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def sdxl(tmp_path):
    """A case of SDXL's conditions, its network tiny."""
    unet = tiny.sdxl().unet
    (tmp_path / "sdxl_unet.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **unet.config}))
    return replace(TINY, shape="sdxl", configs=tmp_path)


@pytest.mark.parametrize(("precision", "frozen"), [("no", 4), ("bf16", 2)])
def test_bytes_are_those_counted_by_hand(precision, frozen):
    """What learns: weights, gradients and two moments in float32, and a float32 step count of each tensor."""
    unet, rank, changes = one_level(), 3, []
    for name, layer in unet.named_modules():
        if f".{name}".endswith(tuple(f".{target}" for target in LAYERS)):
            out, *rest = layer.weight.shape
            changes += [rank * torch.Size(rest).numel(), rank * out]
    size, tensors = sum(p.numel() for p in unet.parameters()), len(list(unet.parameters()))
    assert text_contenders.count_bytes(Case(rank=rank, precision=precision)) == {
        COPIES: frozen * size + 2 * (16 * size + 4 * tensors),
        SHARED: frozen * size + 2 * (16 * sum(changes) + 4 * len(changes)),
    }


def test_bytes_need_no_run(sdxl, monkeypatch, capsys):
    monkeypatch.setattr(text_cycle, "compared", lambda config: pytest.fail("something was run"))
    result = text_cycle.main(replace(sdxl, bytes_only=True, device="cuda", out=sdxl.configs / "new" / "text.json"))
    assert json.loads((sdxl.configs / "new" / "text.json").read_text()) == result
    counted = result["bytes"]
    assert 0 < counted[SHARED] < counted[COPIES]
    assert f"{counted[SHARED] / counted[COPIES]:.3f}   goal <= 0.25" in capsys.readouterr().out


@pytest.mark.slow
def test_it_reports_every_contender(tmp_path, capsys):
    result = text_cycle.main(replace(TINY, rounds=2, out=tmp_path / "text.json"))
    assert json.loads((tmp_path / "text.json").read_text()) == result
    assert result["loss_errors"].keys() == set(NAMES) - {SHARED}
    assert max(result["loss_errors"].values()) < 1e-9
    assert list(result["cycles"]) == list(NAMES)
    assert all(len(cycle["seconds"]) == 2 and cycle["saved_bytes"] > 0 for cycle in result["cycles"].values())
    assert result["ratios"].keys() == {f"{COPIES} / {SHARED}", f"{TWO_CALLS} / {SHARED}"}
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in NAMES)


def test_ratios_of_contenders_that_did_not_take_turns_are_those_of_medians():
    cycles = {COPIES: Cycle([3.0, 8.0, 4.0], 1, None), SHARED: Cycle([1.0, 2.0, 4.0], 1, None)}
    (found,) = text_cycle.ratios(replace(TINY, alone=True), cycles).values()
    assert found == {"median": 2.0, "low": 0.75, "high": 8.0}
    (found,) = text_cycle.ratios(TINY, cycles).values()
    assert found == {"median": 3.0, "low": 1.0, "high": 4.0}


def test_networks_of_sdxl_get_their_conditions(sdxl):
    runs = text_cycle.first_losses(replace(sdxl, student_every=1), NAMES, steps=1)
    for name in (COPIES, TWO_CALLS):
        torch.testing.assert_close(runs[name], runs[SHARED], rtol=1e-9, atol=0)


@pytest.mark.slow
def test_contenders_that_learn_something_else_are_not_compared(monkeypatch):
    """Two calls that guide otherwise, copies that start elsewhere, another learning rate in one of them."""
    plain, start = text_contenders.make_student_and_fake, text_cycle.start

    def make_student_and_fake(case, name, teacher):
        student, fake = plain(case, name, teacher)
        if name == COPIES:
            nn.init.normal_(fake.network.model.conv_in.bias, std=1e-3)
        return student, fake

    def hasty(case, name, *arguments):
        patch.setattr(text_contenders, "LEARNING_RATE", 1e-3 if name == TWO_CALLS else 1e-5)
        return start(case, name, *arguments)

    with monkeypatch.context() as patch:
        two_calls = text_contenders.TwoCalls
        patch.setattr(text_contenders, "TwoCalls", lambda t, scale, negative: two_calls(t, scale + 1e-3, negative))
        with pytest.raises(ValueError, match=f"'{TWO_CALLS}' does not compute the losses of '{SHARED}', relative"):
            text_cycle.compared(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(text_contenders, "make_student_and_fake", make_student_and_fake)
        with pytest.raises(ValueError, match=f"'{COPIES}' does not compute the losses of '{SHARED}'"):
            text_cycle.compared(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(text_cycle, "start", hasty)
        assert max(text_cycle.loss_errors(TINY, steps=1).values()) < 1e-9
        assert text_cycle.loss_errors(TINY)[TWO_CALLS] > 1e-9


@pytest.mark.slow
def test_memory_that_runs_out_is_a_result_and_is_free_for_the_next(monkeypatch, capsys):
    plain_start, plain_turns, built = text_cycle.start, text_cycle.take_turns, {}

    def start(case, name, *arguments):
        assert not any(network() for networks in built.values() for network in networks)
        running, networks = plain_start(case, name, *arguments)
        built[name] = [weakref.ref(network) for network in networks]
        return running, networks

    def take_turns(running, **settings):
        (name,) = running
        next(running[name])
        if name == COPIES:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.54 GiB.")
        return plain_turns(running, **settings)

    monkeypatch.setattr(text_cycle, "start", start)
    monkeypatch.setattr(text_cycle, "take_turns", take_turns)
    monkeypatch.setattr(text_cycle, "loss_errors", lambda config: {})
    result = text_cycle.main(replace(TINY, alone=True))
    assert list(built) == list(NAMES)
    assert result["cycles"][COPIES] == "out of memory"
    assert result["cycles"][SHARED]["seconds"]
    assert result["ratios"].keys() == {f"{TWO_CALLS} / {SHARED}"}
    assert "out of memory" in capsys.readouterr().out


def test_what_is_compiled_is_what_is_called(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    for name in COMPILED:
        compiled.clear()
        _, networks = text_contenders.start(TINY, name, Accelerator(cpu=True))
        assert compiled == [part.backbone if isinstance(part, LoRA) else part for part in networks]
        assert len(compiled) == 3


@pytest.mark.parametrize(("wrong", "message"), [
    *(({name: 0}, "--student-every and --rank must be at least 1")
      for name in ("rounds", "batch", "student_every", "rank")),
    ({"warmup": -1}, "--warmup at least 0"), ({"guidance": 1.0}, "--guidance 1 means no guidance"),
    ({"clock": "process", "device": "cuda"}, "--clock process does not measure a GPU"),
    ({"shape": "sd15"}, r"--shape sd15 needs --configs, a folder with sd15_unet\.json"),
    ({"shape": "sdxl", "configs": Path("nowhere")}, r"--configs nowhere lacks sdxl_unet\.json"),
    ({"device": "cuda"}, "torch sees no GPU here"),
])  # fmt: skip
def test_impossible_options_are_refused(monkeypatch, wrong, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        text_cycle.main(replace(TINY, **wrong))
