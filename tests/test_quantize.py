"""Rounded teachers: what they compute, the gradients through them, LoRAs on top, and what comes out at the end.

They need bitsandbytes and torchao: pip install -e ".[quantize]".
"""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_transformers
import torch
from diffusers import DiffusionPipeline, FluxControlNetModel, FluxControlPipeline
from PIL import Image
from torch import nn

import controlnet.recipe as controlnet
from controlnet.adapter import ControlledDenoiser
from controlnet.canny import Canny
from controlnet.options import check as check_control
from distill.checks import check
from distill.options import Config
from scorefield.cli import main
from scorefield.denoiser import freeze
from scorefield.models import quantize as module
from scorefield.models.lora import LoRA, merged, shared_backbone
from scorefield.models.quantize import (
    count_weights,
    dequantized,
    is_quantized,
    outlined,
    planned_weights,
    quantize,
    unpacked,
)
from scorefield.models.teacher import load_teacher


def needs(how):
    return pytest.param(how, marks=pytest.mark.skipif(
        module.find_spec(module.QUANTIZE_PACKAGES[how]) is None, reason=f"needs {module.QUANTIZE_PACKAGES[how]}"
    ))  # fmt: skip


HOW = [needs("nf4"), needs("int8")]
BITS = {"nf4": 4.127, "int8": 8}
LARGEST = {"nf4": 0.16, "int8": 0.005}
"""Rounding error relative to the largest weight: half of the widest gap, (1 - 0.6962) / 2 and 1 / 254."""


class Blocks(nn.Module):
    """A transformer in miniature: an embedding, a list of blocks, an end."""

    def __init__(self, width=64, depth=2):
        super().__init__()
        self.start, self.end = nn.Linear(8, width), nn.Linear(width, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(depth)
        )

    def forward(self, x, t=None):
        h = self.start(x)
        for block in self.blocks:
            h = h + block(h).tanh()
        return self.end(h)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return freeze(Blocks())


@pytest.mark.parametrize("how", HOW)
def test_only_linear_layers_in_blocks_are_rounded_and_each_within_its_error(network, how):
    before = copy.deepcopy(network)
    quantize(network, how)
    rounded = {name for name, parameter in network.named_parameters() if is_quantized(parameter)}
    assert rounded == {"blocks.0.1.weight", "blocks.1.1.weight"}
    for name in ("start.weight", "end.weight", "blocks.0.0.weight", "blocks.0.1.bias"):
        assert torch.equal(network.get_parameter(name), before.get_parameter(name))
    for number in range(2):
        full, plain = before.blocks[number][1].weight, dequantized(network.blocks[number][1]).weight
        assert plain.dtype == full.dtype
        error = (plain - full).abs().max() / full.abs().max()
        assert 0 < error <= LARGEST[how]
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("how", HOW)
def test_output_and_gradient_are_those_of_the_rounded_function(network, how):
    quantize(network, how)
    plain = copy.deepcopy(network)
    for block in plain.blocks:
        block[1] = dequantized(block[1])
    answers = []
    for one in (network, plain):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = one(x)
        y.square().sum().backward()
        answers.append((y.detach(), x.grad))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
def test_bytes_are_counted_with_the_scales(how):
    network = quantize(freeze(Blocks(width=512, depth=3)), how)
    number, size = count_weights(network)
    rounded = 3 * 512 * 512
    assert number == sum(parameter.numel() for parameter in Blocks(width=512, depth=3).parameters())
    assert size == pytest.approx(4 * (number - rounded) + rounded * BITS[how] / 8, rel=0.01)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_foretold_by_shapes_alone(how, dtype):
    """Codes, scales of 64 weights in 8 bits, scales of these and tables: of sizes that do not divide, too."""
    for width in (64, 72, 512):
        outline = freeze(Blocks(width=width).to("meta"), dtype)
        real = quantize(freeze(Blocks(width=width), dtype), how)
        assert planned_weights(outline, how) == count_weights(real)
        size = width * width * dtype.itemsize
        assert unpacked(outline, how) == unpacked(real) == size
        again = outlined(real)
        shapes = [(name, x.shape, x.dtype, x.device) for name, x in again.named_parameters()]
        assert shapes == [(name, x.shape, x.dtype, x.device) for name, x in outline.named_parameters()]
    assert planned_weights(outline, "no") == count_weights(outline)


@pytest.mark.parametrize("how", HOW)
def test_low_rank_changes_learn_on_rounded_weights_and_are_merged_into_plain_ones(network, how):
    quantize(network, how)
    assert is_quantized(network.get_parameter("blocks.0.1.weight"))
    adapted = LoRA(network, rank=2, targets=["blocks.0.1"], generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(adapted(x), network(x)), "it starts as the network itself"
    assert adapted.backbone.get_parameter("blocks.1.1.weight") is network.get_parameter("blocks.1.1.weight"), (
        "one copy"
    )
    adapted(x).square().sum().backward()
    grads = [parameter.grad for parameter in adapted.parameters()]
    assert len(grads) == 2
    assert sum(float(grad.abs().sum()) for grad in grads) > 0
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1
    whole = merged(adapted)
    assert not any(is_quantized(parameter) for parameter in whole.parameters())
    torch.testing.assert_close(whole(x), adapted(x), rtol=1e-5, atol=1e-5)
    twin_copy = copy.deepcopy(adapted)  # as its moving average is
    torch.testing.assert_close(twin_copy(x), adapted(x))


def test_a_network_without_blocks_and_a_missing_package_are_refused(network, monkeypatch):
    assert quantize(network, "no") is network
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for how, package in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(ValueError, match=f"rounding weights to {how} needs: pip install {package}"):
            quantize(network, how)
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match="no linear layers of 4,096 weights in blocks: nothing to round to nf4"):
        quantize(nn.Linear(4, 4), "nf4")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["toyworld", "flux"])
def test_a_pipeline_is_loaded_rounded_and_its_gradient_reaches_the_image(tmp_path, family, how):
    if family == "flux":
        tiny_transformers.flux().save_pretrained(tmp_path / "flux")
    name, cache = tmp_path / "flux" if family == "flux" else "toyworld", tmp_path / "cache"
    size = 32 if family == "flux" else None
    plain, rounded = (load_teacher(name, size=size, rounding=one, cache=cache) for one in ("no", how))
    numbers = [count_weights(teacher.denoiser.network) for teacher in (plain, rounded)]
    assert numbers[0][0] == numbers[1][0]
    assert numbers[0][1] > numbers[1][1]
    cond, x_t = plain.prompts(["a red mug"]), torch.randn(1, *plain.shape, requires_grad=True)
    t = torch.full((1,), 0.5 if family == "flux" else 500.0)
    answers = [teacher.denoiser(x_t, t, cond) for teacher in (plain, rounded)]
    assert float((answers[0] - answers[1]).detach().abs().max()) > 0
    assert float((answers[0] - answers[1]).detach().square().mean() / answers[0].detach().square().mean()) < 0.1
    answers[1].square().sum().backward()
    assert bool(x_t.grad.isfinite().all())
    assert float(x_t.grad.abs().max()) > 0
    student, fake = shared_backbone(rounded.denoiser, rank=2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(student(x_t, t, cond), answers[1])
    assert next(fake.network.parameters()).dtype == torch.float32


@pytest.mark.parametrize("how", HOW)
def test_a_lora_is_distilled_on_rounded_weights_and_stock_diffusers_loads_it(tmp_path, how):
    tiny_transformers.flux().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red mug\na blue chair\n")
    words = [
        "distill", "--teacher", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--size", 32, "--lora",
        "--lora-rank", 2, "--quantize", how, "--steps", 2, "--student-every", 1, "--warmup-steps", 2,
        "--num-pairs", 4, "--pair-steps", 2, "--fake-warmup", 1, "--batch-size", 2, "--guard-images", 0,
        "--gan-weight", 0, "--skip-teacher-check",
        "--warmup-lr", 1e-3, "--out", tmp_path / "run", "--precision", "no", "--long-prompts", "cut",
    ]  # fmt: skip
    main([str(word) for word in words])
    student = tmp_path / "run" / "student"
    assert f"rounded to {how}" in (student / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.load_lora_weights(student)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["quantize"] == how


@pytest.fixture(scope="module")
def flux_and_pictures(tmp_path_factory):
    """A pipeline, and six pictures with captions."""
    place = tmp_path_factory.mktemp("control")
    tiny_transformers.flux().save_pretrained(place / "model")
    (place / "data").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(place / "data" / f"{number}.png")
        (place / "data" / f"{number}.txt").write_text("a red mug")
    return place


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("adapter", ["lora", "controlnet"])
def test_an_adapter_learns_beside_rounded_weights(flux_and_pictures, tmp_path, monkeypatch, adapter, how):
    place, bases, make = flux_and_pictures, [], controlnet.make_adapter
    monkeypatch.setattr(
        controlnet, "make_adapter", lambda config, base, task: bases.append(base) or make(config, base, task)
    )
    words = [
        "control", "--teacher", place / "model", "--data", place / "data", "--size", 32, "--adapter", adapter,
        "--quantize", how, "--steps", 2, "--batch-size", 2, "--eval-samples", 2, "--sampling-steps", 1,
        "--guidance", 1, "--learning-rate", 0.05, "--warmup", 1, "--cache", place / "cache", "--ema-decay", 0,
        "--out", tmp_path / "run", "--report-to", "none", *(("--lora-rank", 2) if adapter == "lora" else ()),
    ]  # fmt: skip
    main([str(word) for word in words])
    assert any(map(is_quantized, bases[0].denoiser.network.parameters()))
    folder = tmp_path / "run" / "controlnet"
    assert f"weights of the base: rounded to {how}" in (folder / "README.md").read_text()
    if adapter == "lora":
        pipeline = FluxControlPipeline.from_pretrained(place / "model")
        pipeline.load_lora_weights(folder)
    else:
        weights = FluxControlNetModel.from_pretrained(folder).state_dict().values()
        assert {value.dtype for value in weights} == {torch.float32}
    main([str(word) for word in [*words[:-1], words[-1], "--steps", 3]])  # it resumes on the same rounded weights
    assert (tmp_path / "run" / "checkpoints" / "step-000000003").is_dir()


@pytest.mark.parametrize("how", HOW)
def test_a_controlnet_is_copied_from_weights_that_are_not_rounded(how):
    plain, rounded = (load_teacher("toyworld", rounding=rounding) for rounding in ("no", how))
    config, hint = controlnet.Config(teacher="toyworld", quantize=how), SimpleNamespace(hint=Canny())
    adapter = controlnet.make_adapter(config, rounded, hint)
    wanted = controlnet.make_adapter(replace(config, quantize="no"), plain, hint).state_dict()
    own = adapter.state_dict()
    fresh = "controlnet_cond_embedding"  # drawn anew for each
    assert all(torch.equal(own[name], value) for name, value in wanted.items() if fresh not in name)
    controlled = ControlledDenoiser(rounded.denoiser, adapter, torch.rand(1, 1, 64, 64))
    x_t, t, cond = torch.randn(1, *plain.shape), torch.full((1,), 500.0), plain.prompts(["a red mug"])
    assert torch.equal(controlled(x_t, t, cond), rounded.denoiser(x_t, t, cond)), "neutral at first"
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01)
    controlled(x_t, t, cond).square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in adapter.parameters())
    assert sum(float(parameter.grad.abs().sum()) for parameter in adapter.parameters()) > 0


@pytest.mark.parametrize(("changes", "said"), [
    ({"unlocked": True}, "--unlocked trains the teacher's decoder"), ({"compile": True}, "Leave out --compile"),
])  # fmt: skip
def test_what_rounded_weights_cannot_do_beside_an_adapter_is_refused(tmp_path, monkeypatch, changes, said):
    own = {"teacher": "toyworld", "data": "toyworld", "out": tmp_path / "run", "report_to": ("none",)}
    config = controlnet.Config(quantize="nf4", **own, **changes)
    monkeypatch.setattr("scorefield.training.options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--quantize nf4 needs: pip install"):
        check_control(config)
    monkeypatch.setattr("scorefield.training.options.find_spec", lambda name: True)
    with pytest.raises(ValueError, match=said):
        check_control(config)
    assert not (tmp_path / "run").exists()


def test_only_a_lora_may_learn_from_rounded_weights(tmp_path):
    config = replace(Config(preset="text", prompts="p.txt", out=tmp_path / "run"), quantize="nf4")
    with pytest.raises(ValueError, match="--quantize is for LoRAs: pass --lora"):
        check(config)
