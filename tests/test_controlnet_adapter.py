"""The adapter: a fresh one changes nothing, to the last bit; a copy is a copy; diffusers agrees on the rest."""

from dataclasses import replace

import pytest
import tiny_pipelines as tiny
import torch
from tiny_controls import (
    SD15,
    SDXL,
    HintPyramid,
    make_adapter,
    make_base,
    make_controlled,
    make_inputs,
    meta_controlled,
)
from torch import nn

from controlnet.adapter import ControlledDenoiser, EncoderCopy, calibrate, copy_encoder
from scorefield.denoiser import Conditioned, NetworkDenoiser
from scorefield.guidance import guided
from scorefield.models.networks import DiffusersNetwork
from scorefield.schedule import RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


def call_of(inputs):
    return inputs["x_t"], inputs["t"], inputs["cond"]


def first_row(cond):
    return {name: value[:1] for name, value in cond.items()}


@pytest.mark.parametrize(
    ("name", "dtype"), [("sd", FLOAT), ("sd", HALF), ("sdxl", BF16), ("toyworld", FLOAT), ("pixels", BF16)]
)
def test_a_fresh_or_silenced_adapter_leaves_the_base_unchanged_to_the_last_bit(name, dtype):
    call, controlled = call_of(make_inputs(name, dtype=dtype)), make_controlled(name, dtype=dtype)
    alone = controlled.base(*call)
    assert alone.abs().max() > 0.1
    assert torch.equal(controlled(*call), alone)
    assert torch.equal(replace(controlled, guess=True)(*call), alone)
    assert torch.equal(replace(controlled, adapter=make_adapter(controlled.base, name))(*call), alone), "mixed"
    trained = make_controlled(name, trained=True, dtype=dtype)
    assert (trained(*call) - alone).abs().max() > 1e-3, "an adapter that did learn is heard"
    assert torch.equal(replace(trained, scale=0.0)(*call), alone)


@pytest.mark.slow
def test_the_identity_holds_for_compiled_networks():
    """Traced as a whole; the last stage, which writes C++ for minutes, would change no mathematics."""
    call, controlled = call_of(make_inputs()), make_controlled()
    assert all(bool((value == 0).all()) for value in controlled.residuals(*call).values())
    alone = controlled.base(*call)
    controlled.base.network.compile(backend="aot_eager")
    controlled.adapter.compile(backend="aot_eager")
    assert torch.equal(controlled(*call), alone)


@pytest.mark.parametrize(("name", "dtype"), [("sdxl", FLOAT), ("pixels", BF16)])
def test_everything_the_adapter_shares_with_the_base_is_copied_in_float32_and_the_rest_is_new(name, dtype):
    base = make_base(name, dtype)
    adapter = make_adapter(base, name)
    own, theirs = adapter.model.state_dict(), base.network.model.state_dict()
    encoder = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")
    assert {key for key in own if key in theirs} == {key for key in theirs if key.split(".")[0] in encoder}
    assert all(torch.equal(own[key], theirs[key].float()) for key in own if key in theirs)
    assert all(key.startswith("controlnet_") for key in own if key not in theirs)
    zero = [key for key in own if key.split(".")[0] in ("controlnet_down_blocks", "controlnet_mid_block")]
    zero += [key for key in own if key.startswith("controlnet_cond_embedding.conv_out")]
    assert len(zero) == 2 * (4 + 1 + 1)
    assert all(not own[key].any() for key in zero)
    assert {p.dtype for p in adapter.parameters()} == {FLOAT}
    shared = {p.data_ptr() for p in base.network.parameters()} & {p.data_ptr() for p in adapter.parameters()}
    assert not shared, "a copy, not the same memory"
    assert all(p.requires_grad for p in adapter.parameters())
    assert not any(p.requires_grad for p in base.network.parameters())


@pytest.mark.parametrize(
    ("settings", "convolutions", "millions"), [(SD15, 13, 361.3), (SDXL, 10, 1251.0)], ids=["sd15", "sdxl"]
)
def test_the_public_models_get_adapters_of_the_published_sizes(settings, convolutions, millions):
    """Those of ControlNet for Stable Diffusion 1.5, and of diffusers' for SDXL."""
    adapter = meta_controlled(settings)[0].adapter
    assert len(adapter.model.controlnet_down_blocks) + 1 == convolutions
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 1) == millions
    assert (adapter.channels, adapter.factor) == (3, 8)


@pytest.mark.parametrize(
    ("channels", "factor", "given", "widths"),
    [(1, 1, None, (16,)), (12, 4, None, (16, 32, 96)), (3, 2, (5, 7), (5, 7)),
     (1, 32, None, (16, 32, 96, 256, 256, 256))],
)  # fmt: skip
def test_hints_of_any_channels_and_sizes_are_embedded(channels, factor, given, widths):
    base, inputs = make_base(), make_inputs()
    adapter = copy_encoder(base, hint_channels=channels, factor=factor, widths=given)
    assert adapter.model.config.conditioning_embedding_out_channels == widths
    assert (EncoderCopy(adapter.model).channels, EncoderCopy(adapter.model).factor) == (channels, factor)
    values = adapter(*call_of(inputs)[:2], torch.rand(4, channels, 8 * factor, 8 * factor), **inputs["cond"])
    assert list(values) == [*(f"down_residual_{i}" for i in range(4)), "mid_residual"]
    assert [tuple(value.shape[1:]) for value in values.values()] == [
        (8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4), (16, 4, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(("factor", "strength"), [(1, 1e-2), (4, 1.0)])
def test_a_calibrated_embedding_hears_hints_of_any_strength_and_a_fresh_copy_still_returns_zeros(factor, strength):
    torch.manual_seed(0)
    base, inputs = make_base(), make_inputs()
    adapter = copy_encoder(base, hint_channels=1, factor=factor)
    hints = strength * (torch.rand(6, 1, 8 * factor, 8 * factor) < 0.05).float()
    embedding, seen = adapter.model.controlnet_cond_embedding, []
    convolutions = (embedding.conv_in, *embedding.blocks)
    for part in convolutions:
        part.register_forward_hook(lambda module, given, made: seen.append(made))
    embedding(hints)
    assert max(float(made.detach().std((0, 2, 3)).mean()) for made in seen) < 0.3, "what it is for"
    calibrate(adapter, hints)
    seen.clear()
    embedding(hints)
    assert len(seen) == len(convolutions)
    for made in seen:
        close(made.mean((0, 2, 3)), torch.zeros(made.shape[1]), atol=1e-5, rtol=0)
        close(made.var((0, 2, 3)).mean().sqrt(), torch.tensor(1.0), atol=1e-5, rtol=0)
    values = adapter(*call_of(inputs)[:2], hints[:4], **inputs["cond"])
    assert all(not value.any() for value in values.values())


# What diffusers does with the same networks.


def eps_of_diffusers(controlled, inputs, scale, guess):
    down, mid = controlled.adapter.model(
        inputs["x_t"], inputs["t"], encoder_hidden_states=inputs["cond"]["encoder_hidden_states"],
        controlnet_cond=inputs["hint"], conditioning_scale=scale, guess_mode=guess, return_dict=False,
    )  # fmt: skip
    if guess:  # as StableDiffusionControlNetPipeline: the unconditional half is left alone
        down = [torch.cat([torch.zeros_like(value), value]) for value in down]
        mid = torch.cat([torch.zeros_like(mid), mid])
    twice = 2 if guess else 1
    return controlled.base.network.model(
        inputs["x_t"].repeat(twice, 1, 1, 1), inputs["t"].repeat(twice),
        encoder_hidden_states=inputs["both"] if guess else inputs["cond"]["encoder_hidden_states"],
        down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False,
    )[0]  # fmt: skip


def test_residuals_and_guess_mode_act_as_in_diffusers():
    controlled, inputs = replace(make_controlled(trained=True), scale=0.6), make_inputs()
    negative = {"encoder_hidden_states": inputs["cond"]["encoder_hidden_states"].flip(0)}
    inputs["both"] = torch.cat([negative["encoder_hidden_states"], inputs["cond"]["encoder_hidden_states"]])
    plain = eps_of_diffusers(controlled, inputs, 0.6, guess=False)
    uncond, cond = eps_of_diffusers(controlled, inputs, 0.6, guess=True).chunk(2)
    to_x0 = lambda eps: controlled.schedule.to_x0(eps, inputs["x_t"], inputs["t"], "eps")  # noqa: E731
    close(controlled(*call_of(inputs)), to_x0(plain), rtol=1e-5, atol=1e-5)
    got = guided(replace(controlled, guess=True), 4.0, negative)(*call_of(inputs))
    close(got, to_x0(uncond + 4.0 * (cond - uncond)), rtol=1e-4, atol=1e-4)
    assert (got - guided(controlled, 4.0, negative)(*call_of(inputs))).abs().max() > 1e-2


# A Denoiser among others.


class Counting(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.batches = inner, []

    def forward(self, x_t, *arguments, **cond):
        self.batches.append(len(x_t))
        return self.inner(x_t, *arguments, **cond)


@pytest.mark.parametrize(("guess", "asked"), [(False, [8]), (True, [4])])
def test_guidance_is_one_call_of_the_base_and_one_of_the_adapter(guess, asked):
    controlled, inputs = make_controlled(trained=True), make_inputs()
    adapter, network = Counting(controlled.adapter), Counting(controlled.base.network)
    counted = replace(controlled, adapter=adapter, base=replace(controlled.base, network=network), guess=guess)
    guided(counted, 2.0, first_row(inputs["cond"]))(*call_of(inputs))
    assert (adapter.batches, network.batches) == (asked, [8])


@pytest.mark.parametrize("name", ["sdxl", "pixels"])
def test_each_sample_follows_its_own_hint_guided_or_not(name):
    """One batch, and sample by sample: neither mixes up which hint belongs to whom."""
    controlled, inputs = make_controlled(name, trained=True), make_inputs(name)
    negative = first_row(inputs["cond"])
    for scale in (1.0, 2.5):
        whole = guided(controlled, scale, negative)(*call_of(inputs))
        for i in range(4):
            own = {key: value[i : i + 1] for key, value in inputs["cond"].items()}
            call = inputs["x_t"][i : i + 1], inputs["t"][i : i + 1], own
            single = guided(controlled.with_hint(inputs["hint"][i : i + 1]), scale, negative)(*call)
            close(whole[i : i + 1], single, rtol=1e-4, atol=1e-4)
            other = guided(controlled.with_hint(inputs["hint"][i - 1 : i or None]), scale, negative)(*call)
            assert (other - single).abs().max() > 1e-3


def test_one_hint_serves_any_batch():
    controlled, inputs = make_controlled(trained=True), make_inputs()
    call, one = call_of(inputs), inputs["hint"][:1]
    expected = controlled.with_hint(one.repeat(4, 1, 1, 1))(*call)
    assert torch.equal(controlled.with_hint(one)(*call), expected)
    assert torch.equal(Conditioned(controlled.with_hint(one), {})(*call), expected)


def test_a_flow_base_asks_the_adapter_at_its_own_scale_of_time():
    controlled, inputs = make_controlled(trained=True), make_inputs()
    base = NetworkDenoiser(controlled.base.network, RectifiedFlow(), "flow", time_scale=1000.0)
    wanted = controlled.residuals(*call_of(inputs))
    got = replace(controlled, base=base).residuals(inputs["x_t"], inputs["t"] / 1000, inputs["cond"])
    for name, value in wanted.items():
        close(got[name], value, rtol=1e-4, atol=1e-4)


def test_times_are_not_rounded_for_an_adapter_in_bf16():
    controlled, inputs = make_controlled(trained=True, dtype=BF16), make_inputs(dtype=BF16)
    a, b = (
        controlled.residuals(inputs["x_t"], torch.full((4,), t), inputs["cond"])["down_residual_1"]
        for t in (998.0, 999.0)
    )
    assert not torch.equal(a, b)


def test_gradients_reach_the_adapter_and_the_image_but_not_the_base():
    controlled, inputs = make_controlled("sdxl", trained=True), make_inputs("sdxl")
    x_t = inputs["x_t"].requires_grad_()
    controlled(x_t, inputs["t"], inputs["cond"]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in controlled.adapter.parameters())
    assert all(p.grad is None for p in controlled.base.network.parameters())
    assert x_t.grad.abs().max() > 0


def test_another_adapter_needs_only_the_names_of_its_residuals():
    base, inputs = make_base(), make_inputs()
    light = ControlledDenoiser(base, HintPyramid(3), inputs["hint"])
    alone = base(*call_of(inputs))
    assert torch.equal(light(*call_of(inputs)), alone)
    nn.init.constant_(light.adapter.convs[-1].weight, 0.1)
    assert (guided(light, 2.0, first_row(inputs["cond"]))(*call_of(inputs)) - alone).abs().max() > 1e-3


# Bad input.


@pytest.mark.parametrize(("shape", "guess", "message"), [
    (None, False, r"has no hint yet: call controlled\.with_hint"),
    *((shape, False, r"hint for x_t \(4, 4, 8, 8\) must be \(4, 3, 64, 64\).*got \(4, ") for shape in
      ((4, 2, 64, 64), (4, 3, 32, 32), (4, 3, 64, 63))),
    *(((n, 3, 64, 64), guess, rf"{n} hints serve a batch of .*; got 4") for n, guess in
      ((3, False), (0, False), (8, False), (1, True), (3, True))),
])  # fmt: skip
def test_hints_that_do_not_fit_are_named(shape, guess, message):
    hint = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        replace(make_controlled(), hint=hint, guess=guess)(*call_of(make_inputs()))


@pytest.mark.parametrize(("make", "settings", "message"), [
    (lambda: DiffusersNetwork(tiny.pixel_unet()), {}, r"\(UNet2DConditionModel\); got UNet2DModel\."),
    (lambda: nn.Linear(2, 2), {}, r"\(UNet2DConditionModel\); got Linear\. Train a model"),
    (lambda: DiffusersNetwork(tiny.text_unet(time_cond_proj_dim=4, center_input_sample=True)), {},
     "cannot copy a UNet with center_input_sample, time_cond_proj_dim"),
    *((None, wrong, "need hint_channels >= 1 and a factor that is a power of two; got") for wrong in
      ({"factor": 3}, {"factor": 0}, {"factor": -2}, {"hint_channels": 0})),
    (None, {"factor": 4, "widths": (8, 8)}, r"4 times as large needs 3 widths; got \(8, 8\)"),
])  # fmt: skip
def test_copies_that_cannot_be_are_refused(make, settings, message):
    base = NetworkDenoiser(make(), VariancePreserving.scaled_linear()) if make else make_base()
    with pytest.raises(ValueError, match=message):
        copy_encoder(base, **settings)


def test_plain_hints_are_nothing_to_calibrate_by():
    with pytest.raises(ValueError, match="3 hints to calibrate by are all plain"):
        calibrate(copy_encoder(make_base(), factor=1), torch.full((3, 3, 8, 8), 0.5))
