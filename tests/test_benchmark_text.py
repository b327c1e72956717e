"""The benchmark of a text-to-image teacher's cycle: what it counts, compares, refuses; what does not fit."""

import json
import subprocess
import sys
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

from scorefield.models.lora import LAYERS, Twin

TINY = Config(batch=1, rank=2, student_every=2, rounds=1, warmup=0)
CPU, META = torch.device("cpu"), torch.device("meta")


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


# Bytes.


def adapter_sizes(unet, rank):
    """Sizes of the two matrices of each adapted layer, by hand."""
    for name, layer in unet.named_modules():
        if f".{name}".endswith(tuple(f".{target}" for target in LAYERS)):
            out, *rest = layer.weight.shape
            yield rank * torch.Size(rest).numel()
            yield rank * out


@pytest.mark.parametrize(("precision", "frozen"), [("no", 4), ("bf16", 2)])
def test_bytes_are_those_counted_by_hand(precision, frozen):
    """What learns: weights, gradients and two moments in float32, and a float32 step count of each tensor."""
    unet, rank = one_level(), 3
    size, tensors = sum(p.numel() for p in unet.parameters()), len(list(unet.parameters()))
    changes = list(adapter_sizes(unet, rank))
    assert text_contenders.count_bytes(Case(rank=rank, precision=precision)) == {
        COPIES: frozen * size + 2 * (16 * size + 4 * tensors),
        SHARED: frozen * size + 2 * (16 * sum(changes) + 4 * len(changes)),
    }


def test_a_backbone_that_is_not_shared_is_counted():
    teacher = text_contenders.make_teacher(TINY, META)
    student, fake = text_contenders.make_roles(TINY, SHARED, teacher)
    other, _ = text_contenders.make_roles(TINY, SHARED, text_contenders.make_teacher(TINY, META))
    count = [
        text_contenders.bytes_of([teacher.network, nn.Sequential(first.network), fake.network], [])
        for first in (student, other)
    ]
    assert count[1] - count[0] == text_contenders.bytes_of([teacher.network], [])


def test_bytes_need_no_run(sdxl, monkeypatch, capsys):
    monkeypatch.setattr(text_cycle, "compared", lambda config: pytest.fail("something was run"))
    result = text_cycle.main(replace(sdxl, bytes_only=True, device="cuda", out=sdxl.configs / "new" / "text.json"))
    assert json.loads((sdxl.configs / "new" / "text.json").read_text()) == result
    counted = result["bytes"]
    assert 0 < counted[SHARED] < counted[COPIES]
    assert f"{counted[SHARED] / counted[COPIES]:.3f}   goal <= 0.25" in capsys.readouterr().out
    assert result["device"] == "meta"


# Cycles.


def test_it_reports_every_contender(tmp_path, capsys):
    result = text_cycle.main(replace(TINY, rounds=2, out=tmp_path / "text.json"))
    assert json.loads((tmp_path / "text.json").read_text()) == result
    assert result["loss_errors"].keys() == set(NAMES) - {SHARED}
    assert max(result["loss_errors"].values()) < 1e-9
    assert list(result["cycles"]) == list(NAMES)
    for cycle in result["cycles"].values():
        assert len(cycle["seconds"]) == 2
        assert min(*cycle["seconds"], cycle["saved_bytes"]) > 0
        assert cycle["peak_bytes"] is None
    assert result["ratios"].keys() == {f"{COPIES} / {SHARED}", f"{TWO_CALLS} / {SHARED}"}
    assert all(found["low"] <= found["median"] <= found["high"] for found in result["ratios"].values())
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in NAMES)


def test_ratios_of_contenders_that_did_not_take_turns_are_those_of_medians():
    cycles = {COPIES: Cycle([3.0, 8.0, 4.0], 1, None), SHARED: Cycle([1.0, 2.0, 4.0], 1, None)}
    (found,) = text_cycle.ratios(replace(TINY, alone=True), cycles).values()
    assert found == {"median": 2.0, "low": 0.75, "high": 8.0}
    (found,) = text_cycle.ratios(TINY, cycles).values()
    assert found == {"median": 3.0, "low": 1.0, "high": 4.0}


def test_weights_are_random_and_the_same_at_each_call():
    torch.use_deterministic_algorithms(True)  # fills memory that nobody has written with NaN
    try:
        networks = [text_contenders.make_network(TINY, CPU) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = list(zip(*(network.parameters() for network in networks), strict=True))
    assert all(bool(a.isfinite().all()) and torch.equal(a, b) for a, b in pairs)
    assert all(a.std() > 0 for a, _ in pairs if a.ndim > 1)


def test_recomputing_keeps_less_in_copies_and_twins():
    names, accelerator = (COPIES, SHARED), Accelerator(cpu=True)
    saved = [
        text_cycle.run(replace(TINY, gradient_checkpointing=recompute, student_every=1), names, accelerator)
        for recompute in (False, True)
    ]
    assert all(saved[1][name].saved_bytes < saved[0][name].saved_bytes for name in names)


def test_networks_of_sdxl_get_their_conditions(sdxl):
    runs = text_cycle.first_losses(replace(sdxl, student_every=1), NAMES, steps=1)
    for name in (COPIES, TWO_CALLS):
        torch.testing.assert_close(runs[name], runs[SHARED], rtol=1e-9, atol=0)


# What is not compared.


def test_two_calls_that_guide_otherwise_are_not_compared(monkeypatch):
    plain = text_contenders.TwoCalls
    monkeypatch.setattr(
        text_contenders, "TwoCalls", lambda teacher, scale, negative: plain(teacher, scale + 1e-3, negative)
    )
    with pytest.raises(ValueError, match=f"'{TWO_CALLS}' does not compute the losses of '{SHARED}', relative err"):
        text_cycle.compared(TINY)


def test_copies_that_start_elsewhere_are_not_compared(monkeypatch):
    plain = text_contenders.make_roles

    def make_roles(case, name, teacher):
        student, fake = plain(case, name, teacher)
        if name == COPIES:
            nn.init.normal_(fake.network.model.conv_in.bias, std=1e-3)
        return student, fake

    monkeypatch.setattr(text_contenders, "make_roles", make_roles)
    with pytest.raises(ValueError, match=f"'{COPIES}' does not compute the losses of '{SHARED}'"):
        text_cycle.compared(TINY)


def test_updates_are_compared_too(monkeypatch):
    """A hundred times the learning rate, in one contender, shows from the second loss on."""
    plain = text_cycle.start

    def start(case, name, *arguments):
        monkeypatch.setattr(text_contenders, "LEARNING_RATE", 1e-3 if name == TWO_CALLS else 1e-5)
        return plain(case, name, *arguments)

    monkeypatch.setattr(text_cycle, "start", start)
    assert max(text_cycle.loss_errors(TINY, steps=1).values()) < 1e-9
    assert text_cycle.loss_errors(TINY)[TWO_CALLS] > 1e-9


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
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert line.split() == ["three", "copies", "out", "of", "memory"]


@pytest.mark.slow
def test_compiled_contenders_compute_the_same_without_falling_back(monkeypatch):
    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda network: plain(network, backend="eager", fullgraph=True))
    result = text_cycle.main(replace(TINY, compile=True))
    assert set(COMPILED) < result["cycles"].keys()
    assert f"{SHARED} / {COMPILED[1]}" in result["ratios"]
    assert max(result["loss_errors"].values()) < text_cycle.TOLERANCE  # but for Triton's and C++'s own sines


def test_what_is_compiled_is_what_is_called(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    for name in COMPILED:
        compiled.clear()
        _, networks = text_contenders.start(TINY, name, Accelerator(cpu=True))
        assert compiled == [part.backbone if isinstance(part, Twin) else part for part in networks]
        assert len(compiled) == 3


# Refusals.


@pytest.mark.parametrize(("wrong", "message"), [
    ({"rounds": 0}, "need rounds, batch, student_every, rank >= 1"),
    ({"batch": 0}, "need rounds, batch, student_every, rank >= 1"),
    ({"student_every": 0}, "need rounds, batch, student_every, rank >= 1"),
    ({"rank": 0}, "need rounds, batch, student_every, rank >= 1"),
    ({"warmup": -1}, "warmup >= 0"),
    ({"guidance": 1.0}, "--guidance 1 is none"),
    ({"clock": "process", "device": "cuda"}, "--clock process does not see what a GPU does"),
    ({"shape": "sd15"}, r"--shape sd15 needs --configs, a folder with sd15_unet\.json"),
    ({"shape": "sdxl", "configs": Path("nowhere")}, r"--configs nowhere lacks sdxl_unet\.json"),
    ({"device": "cuda"}, "torch sees no GPU here"),
])  # fmt: skip
def test_impossible_options_are_refused(monkeypatch, wrong, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        text_cycle.main(replace(TINY, **wrong))


@pytest.mark.slow
def test_the_command_says_what_is_wrong_and_exits_with_two():
    command = [sys.executable, text_cycle.__file__, "--shape", "sdxl", "--bytes-only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --shape sdxl needs --configs")
    assert "Traceback" not in done.stderr
