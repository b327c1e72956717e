"""The adapter: a fresh one changes nothing, to the last bit; a copy is a copy; diffusers agrees on the rest."""

from dataclasses import replace

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from tiny_controls import (
    BASES,
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
from torch.utils.flop_counter import FlopCounterMode

from controlnet.adapter import ControlledDenoiser, EncoderCopy, calibrate, copy_encoder
from scorefield.denoiser import Conditioned, NetworkDenoiser
from scorefield.guidance import guided
from scorefield.models.networks import DiffusersNetwork
from scorefield.sampling import grid, initial_noise, sample
from scorefield.schedule import RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def first_row(cond):
    return {name: value[:1] for name, value in cond.items()}


# A fresh adapter, and a silenced one.


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_a_fresh_adapter_leaves_the_base_unchanged_to_the_last_bit(name, dtype):
    inputs, controlled = make_inputs(name, dtype=dtype), make_controlled(name, dtype=dtype)
    call = (inputs["x_t"], inputs["t"], inputs["cond"])
    alone = controlled.base(*call)
    assert alone.abs().max() > 0.1
    assert torch.equal(controlled(*call), alone)
    assert torch.equal(replace(controlled, adapter=make_adapter(controlled.base, name))(*call), alone), "mixed"
    trained = make_controlled(name, trained=True, dtype=dtype)
    assert (trained(*call) - alone).abs().max() > 1e-3, "an adapter that did learn is heard"
    assert torch.equal(replace(trained, scale=0.0)(*call), alone)


@pytest.mark.parametrize("guess", [False, True])
def test_images_sampled_under_a_fresh_adapter_are_those_of_the_base(guess):
    inputs, controlled = make_inputs(), make_controlled()
    times, negative = grid(controlled.schedule, 4), first_row(inputs["cond"])

    def draw(denoiser):
        x_t = initial_noise(controlled.schedule, inputs["x_t"], times[0])
        with torch.no_grad():
            return sample(guided(denoiser, 3.0, negative), x_t, inputs["cond"], times=times)

    alone = draw(controlled.base)
    assert torch.equal(draw(replace(controlled, guess=guess)), alone)
    trained = replace(make_controlled(trained=True), guess=guess)
    assert not torch.equal(draw(trained), alone)
    assert torch.equal(draw(replace(trained, scale=0.0)), alone)


@pytest.mark.slow
def test_the_identity_holds_for_compiled_networks():
    """Traced as a whole; the last stage, which writes C++ for minutes, would change no mathematics."""
    inputs, controlled = make_inputs(), make_controlled()
    call = (inputs["x_t"], inputs["t"], inputs["cond"])
    nothing = controlled.residuals(*call)
    assert all(bool((value == 0).all()) for value in nothing.values())
    alone = controlled.base(*call)
    controlled.base.network.compile(backend="aot_eager")
    controlled.adapter.compile(backend="aot_eager")
    assert torch.equal(controlled(*call), alone)
    assert torch.equal(controlled.base(*call), alone)


# A copy is a copy.


@pytest.mark.parametrize("name", BASES)
def test_everything_the_adapter_shares_with_the_base_is_copied_and_the_rest_is_new(name):
    base = make_base(name)
    adapter = make_adapter(base, name)
    own, theirs = adapter.model.state_dict(), base.network.model.state_dict()
    encoder = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")
    assert {key for key in own if key in theirs} == {key for key in theirs if key.split(".")[0] in encoder}
    assert all(torch.equal(own[key], theirs[key]) for key in own if key in theirs)
    assert all(key.startswith("controlnet_") for key in own if key not in theirs)
    zero = [key for key in own if key.split(".")[0] in ("controlnet_down_blocks", "controlnet_mid_block")]
    zero += [key for key in own if key.startswith("controlnet_cond_embedding.conv_out")]
    assert len(zero) == 2 * (4 + 1 + 1)
    assert all(not own[key].any() for key in zero)
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


def test_a_copy_of_a_base_in_bf16_learns_in_float32():
    base = make_base(dtype=torch.bfloat16)
    adapter = make_adapter(base)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert torch.equal(adapter.model.conv_in.weight, base.network.model.conv_in.weight.float())


@pytest.mark.parametrize(
    ("factor", "widths"), [(1, (16,)), (4, (16, 32, 96)), (8, (16, 32, 96, 256)), (2, (5, 7))]
)
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_hints_of_any_channels_and_sizes_are_embedded(channels, factor, widths):
    base, inputs = make_base(), make_inputs()
    adapter = copy_encoder(base, hint_channels=channels, factor=factor, widths=widths if factor == 2 else None)
    assert adapter.model.config.conditioning_embedding_out_channels == widths
    hint = torch.rand(4, channels, 8 * factor, 8 * factor)
    values = adapter(inputs["x_t"], inputs["t"], hint, **inputs["cond"])
    assert list(values) == [*(f"down_residual_{i}" for i in range(4)), "mid_residual"]
    assert [tuple(value.shape[1:]) for value in values.values()] == [
        (8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4), (16, 4, 4)
    ]  # fmt: skip


def test_very_large_hints_repeat_the_widest_level():
    adapter = copy_encoder(make_base(), factor=32)
    assert adapter.model.config.conditioning_embedding_out_channels == (16, 32, 96, 256, 256, 256)


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("strength", [1.0, 1e-2])
def test_a_calibrated_embedding_hears_hints_of_any_strength_and_a_fresh_copy_still_returns_zeros(factor, strength):
    torch.manual_seed(0)
    base, inputs = make_base(), make_inputs()
    adapter = copy_encoder(base, hint_channels=1, factor=factor)
    hints = strength * (torch.rand(6, 1, 8 * factor, 8 * factor) < 0.05).float()
    embedding, seen = adapter.model.controlnet_cond_embedding, []
    convolutions = (embedding.conv_in, *embedding.blocks)
    hooks = [part.register_forward_hook(lambda module, given, made: seen.append(made)) for part in convolutions]
    embedding(hints)
    assert max(float(made.detach().std((0, 2, 3)).mean()) for made in seen) < 0.3, "what it is for"
    calibrate(adapter, hints)
    seen.clear()
    embedding(hints)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(convolutions)
    for made in seen:
        close(made.mean((0, 2, 3)), torch.zeros(made.shape[1]), atol=1e-5, rtol=0)
        close(made.var((0, 2, 3)).mean().sqrt(), torch.tensor(1.0), atol=1e-5, rtol=0)
    values = adapter(inputs["x_t"], inputs["t"], hints[:4], **inputs["cond"])
    assert all(not value.any() for value in values.values())


def test_plain_hints_are_nothing_to_calibrate_by():
    with pytest.raises(ValueError, match="3 hints to calibrate by are all plain"):
        calibrate(copy_encoder(make_base(), factor=1), torch.full((3, 3, 8, 8), 0.5))


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


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_residuals_act_as_in_diffusers(scale):
    controlled, inputs = replace(make_controlled(trained=True), scale=scale), make_inputs()
    eps = eps_of_diffusers(controlled, inputs, scale, guess=False)
    expected = controlled.schedule.to_x0(eps, inputs["x_t"], inputs["t"], "eps")
    close(controlled(inputs["x_t"], inputs["t"], inputs["cond"]), expected, rtol=1e-5, atol=1e-5)


def test_guess_mode_is_that_of_diffusers():
    controlled, inputs = replace(make_controlled(trained=True), scale=0.7, guess=True), make_inputs()
    negative = {"encoder_hidden_states": inputs["cond"]["encoder_hidden_states"].flip(0)}
    inputs["both"] = torch.cat([negative["encoder_hidden_states"], inputs["cond"]["encoder_hidden_states"]])
    uncond, cond = eps_of_diffusers(controlled, inputs, 0.7, guess=True).chunk(2)
    eps = uncond + 4.0 * (cond - uncond)
    expected = controlled.schedule.to_x0(eps, inputs["x_t"], inputs["t"], "eps")
    got = guided(controlled, 4.0, negative)(inputs["x_t"], inputs["t"], inputs["cond"])
    close(got, expected, rtol=1e-4, atol=1e-4)
    spoken = guided(replace(controlled, guess=False), 4.0, negative)(inputs["x_t"], inputs["t"], inputs["cond"])
    assert (got - spoken).abs().max() > 1e-2


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
    guided(counted, 2.0, first_row(inputs["cond"]))(inputs["x_t"], inputs["t"], inputs["cond"])
    assert (adapter.batches, network.batches) == (asked, [8])


@pytest.mark.parametrize("name", BASES)
def test_each_sample_follows_its_own_hint_guided_or_not(name):
    """One batch, and sample by sample: neither mixes up which hint belongs to whom."""
    controlled, inputs = make_controlled(name, trained=True), make_inputs(name)
    negative = first_row(inputs["cond"])
    for scale in (1.0, 2.5):
        whole = guided(controlled, scale, negative)(inputs["x_t"], inputs["t"], inputs["cond"])
        for i in range(4):
            own = {key: value[i : i + 1] for key, value in inputs["cond"].items()}
            alone = guided(controlled.with_hint(inputs["hint"][i : i + 1]), scale, negative)
            single = alone(inputs["x_t"][i : i + 1], inputs["t"][i : i + 1], own)
            close(whole[i : i + 1], single, rtol=1e-4, atol=1e-4)
            other = guided(controlled.with_hint(inputs["hint"][i - 1 : i or None]), scale, negative)
            assert (other(inputs["x_t"][i : i + 1], inputs["t"][i : i + 1], own) - single).abs().max() > 1e-3


def test_one_hint_serves_any_batch():
    controlled, inputs = make_controlled(trained=True), make_inputs()
    call, one = (inputs["x_t"], inputs["t"], inputs["cond"]), inputs["hint"][:1]
    expected = controlled.with_hint(one.repeat(4, 1, 1, 1))(*call)
    assert torch.equal(controlled.with_hint(one)(*call), expected)
    assert torch.equal(Conditioned(controlled.with_hint(one), {})(*call), expected)


def test_a_flow_base_asks_the_adapter_at_its_own_scale_of_time():
    controlled, inputs = make_controlled(trained=True), make_inputs()
    flow = replace(
        controlled, base=NetworkDenoiser(controlled.base.network, RectifiedFlow(), "flow", time_scale=1000.0)
    )
    wanted = controlled.residuals(inputs["x_t"], inputs["t"], inputs["cond"])
    got = flow.residuals(inputs["x_t"], inputs["t"] / 1000, inputs["cond"])
    for name, value in wanted.items():
        close(got[name], value, rtol=1e-4, atol=1e-4)


def test_times_are_not_rounded_for_an_adapter_in_bf16():
    controlled = make_controlled(trained=True, dtype=torch.bfloat16)
    inputs = make_inputs(dtype=torch.bfloat16)
    a, b = (
        controlled.residuals(inputs["x_t"], torch.full((4,), t), inputs["cond"])["down_residual_1"]
        for t in (998.0, 999.0)
    )
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", BASES)
def test_gradients_reach_the_adapter_and_the_image_but_not_the_base(name):
    controlled, inputs = make_controlled(name, trained=True), make_inputs(name)
    x_t = inputs["x_t"].requires_grad_()
    controlled(x_t, inputs["t"], inputs["cond"]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in controlled.adapter.parameters())
    assert all(p.grad is None for p in controlled.base.network.parameters())
    assert x_t.grad.abs().max() > 0


def test_another_adapter_needs_only_the_names_of_its_residuals():
    base, inputs = make_base(), make_inputs()
    call = (inputs["x_t"], torch.full((4,), 400.0), inputs["cond"])
    light = ControlledDenoiser(base, HintPyramid(3), inputs["hint"])
    assert torch.equal(light(*call), base(*call))
    optimizer, losses = torch.optim.Adam(light.adapter.parameters(), 0.1), []
    for _ in range(25):
        loss = (light(*call) - inputs["x0"]).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert (guided(light, 2.0, first_row(inputs["cond"]))(*call) - base(*call)).abs().max() > 1e-3


# Bad input.


def test_hints_of_another_shape_are_named():
    controlled, inputs = make_controlled(), make_inputs()
    for hint in (torch.zeros(4, 2, 64, 64), torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 64, 63)):
        with pytest.raises(ValueError, match=r"hint for x_t \(4, 4, 8, 8\) must be \(4, 3, 64, 64\).*got \(4, "):
            controlled.with_hint(hint)(inputs["x_t"], inputs["t"], inputs["cond"])


def test_hints_that_do_not_fit_the_batch_are_named():
    controlled, inputs = make_controlled(), make_inputs()
    call = (inputs["x_t"], inputs["t"], inputs["cond"])
    with pytest.raises(ValueError, match=r"has no hint yet: call controlled\.with_hint"):
        replace(controlled, hint=None)(*call)
    for wrong, guess in ((3, False), (0, False), (8, False), (1, True), (3, True)):
        with pytest.raises(ValueError, match=rf"{wrong} hints serve a batch of .*; got 4"):
            replace(controlled, guess=guess).with_hint(torch.zeros(wrong, 3, 64, 64))(*call)


def test_bases_that_take_no_control_are_named():
    pixels = DiffusersNetwork(tiny.pixel_unet())
    for network, found in ((pixels, "UNet2DModel"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(ValueError, match=rf"UNet2DConditionModel\); got {found}\. Train a model of pixels"):
            copy_encoder(NetworkDenoiser(network, VariancePreserving.scaled_linear()))


def test_a_base_that_a_copy_could_not_follow_is_named():
    unet = tiny.text_unet(time_cond_proj_dim=4, center_input_sample=True)
    base = NetworkDenoiser(DiffusersNetwork(unet), VariancePreserving.scaled_linear())
    with pytest.raises(ValueError, match="cannot copy a UNet with center_input_sample, time_cond_proj_dim"):
        copy_encoder(base)


@pytest.mark.parametrize("wrong", [{"factor": 3}, {"factor": 0}, {"factor": -2}, {"hint_channels": 0}])
def test_impossible_hints_are_refused(wrong):
    with pytest.raises(ValueError, match="need hint_channels >= 1 and a factor that is a power of two; got"):
        copy_encoder(make_base(), **wrong)


def test_widths_must_fit_the_factor():
    with pytest.raises(ValueError, match=r"4 times as large needs 3 widths; got \(8, 8\)"):
        copy_encoder(make_base(), factor=4, widths=(8, 8))


def test_an_adapter_of_diffusers_tells_its_channels_and_factor():
    model = ControlNetModel.from_unet(
        UNet2DConditionModel(**{**tiny.text_unet().config}), conditioning_embedding_out_channels=(4, 4, 4),
        conditioning_channels=5,
    )  # fmt: skip
    assert (EncoderCopy(model).channels, EncoderCopy(model).factor) == (5, 4)


def test_the_frozen_encoder_is_passed_once():
    """Control costs one pass of the adapter and one of the base, whatever is guided."""
    controlled, inputs = make_controlled(trained=True), make_inputs()
    call = (inputs["x_t"], inputs["t"], inputs["cond"])

    def flops(work):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        return counter.get_total_flops()

    base = flops(lambda: controlled.base(*call))
    adapter = flops(lambda: controlled.residuals(*call))
    assert flops(lambda: controlled(*call)) == base + adapter
    both = guided(replace(controlled, guess=True), 2.0, first_row(inputs["cond"]))
    assert flops(lambda: both(*call)) == 2 * base + adapter
