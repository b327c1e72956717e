"""What an adapter learns by: which weights wake up when, two ranks, memory and work counted."""

import sys
from dataclasses import replace

import pytest
import torch
from ranks import run_on_ranks
from tiny_controls import (
    SD15,
    SDXL,
    HintPyramid,
    make_adapter,
    make_base,
    make_controlled,
    make_inputs,
    meta_controlled,
    state_of,
)
from torch.utils.flop_counter import FlopCounterMode
from workers import two_controls as worker

from controlnet.adapter import ControlledDenoiser
from controlnet.training import adamw, control_phase, lighten, unlock, with_weights
from scorefield.denoiser import freeze
from scorefield.gradient import TIME_NOT_FINITE, min_snr_weight
from scorefield.randomness import Rng, normal_like
from scorefield.times import constant, uniform
from scorefield.training.loop import EMA, train
from scorefield.training.ranks import shared_rows

close = torch.testing.assert_close


def make_batch(name="pixels", batch=4, dtype=torch.float32):
    inputs = make_inputs(name, batch, dtype)
    return {"x0": inputs["x0"], "hint": inputs["hint"], "cond": inputs["cond"]}


def one_step(phase, batch, step=0):
    loss = phase.loss(batch, Rng(0, step))["loss"]
    phase.optimizer.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in phase.network.named_parameters()}
    phase.optimizer.step()
    return gradients


# The loss.


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_the_loss_is_the_squared_error_of_the_networks_own_prediction(name):
    """eps for Stable Diffusion, v for the model of pixels; each sample under its own hint."""
    controlled, batch = make_controlled(name, trained=True), make_batch(name)
    phase = control_phase(replace(controlled, hint=None), adamw(controlled.adapter, 1e-4))
    rng, schedule = Rng(0, 5), controlled.schedule
    generator = rng("noise")
    t = uniform(0.0, 1.0)(4, schedule, generator)
    noise = normal_like(batch["x0"], generator)
    x_t = schedule.diffuse(batch["x0"], noise, t)
    residuals = controlled.with_hint(batch["hint"]).residuals(x_t, t, batch["cond"])
    output = controlled.base.network(x_t, t, **batch["cond"], **residuals)
    wanted = noise if name == "sd" else schedule.from_x0(batch["x0"], x_t, t, "v")
    metrics = phase.loss(batch, Rng(0, 5))
    close(metrics["loss"], (output - wanted).square().mean(), rtol=1e-4, atol=1e-6)
    assert float(metrics[TIME_NOT_FINITE]) == -1


def test_times_and_weight_are_those_asked_for_and_a_loss_that_is_not_finite_names_its_time():
    controlled, batch = make_controlled(trained=True), make_batch("sd")
    optimizer = adamw(controlled.adapter, 1e-4)
    plain = control_phase(controlled, optimizer, times=constant(300.0))
    snr = control_phase(controlled, optimizer, times=constant(300.0), weight=min_snr_weight(2.0))
    ratio = float(controlled.schedule.ratio(torch.tensor(300.0)))
    expected = min(ratio**-2, 2.0) * ratio**2  # min(SNR, gamma) / SNR of the loss of eps
    losses = [phase.loss(batch, Rng(0, 0))["loss"] for phase in (snr, plain)]
    close(losses[0] / losses[1], torch.tensor(expected), rtol=1e-4, atol=0)
    batch["x0"][2] = torch.nan
    assert float(plain.loss(batch, Rng(0, 0))[TIME_NOT_FINITE]) == 300.0


# What wakes up when.


@pytest.mark.parametrize("name", ["sd", "pixels"])
def test_zero_convolutions_learn_first_then_the_copy_then_the_hint(name):
    """arXiv 2302.05543, section 3.2: the hint reaches the copy's first layer with the third update only."""
    base = make_base(name)
    base.network.double()
    controlled = ControlledDenoiser(base, make_adapter(base, name).double())
    batch = {key: value.double() for key, value in make_batch(name).items() if key != "cond"}
    batch["cond"] = {key: value.double() for key, value in make_inputs(name)["cond"].items()}
    phase = control_phase(controlled, torch.optim.SGD(controlled.adapter.parameters(), 0.1))
    before = state_of(base.network)
    zero, last = ("controlnet_down_blocks", "controlnet_mid_block"), "controlnet_cond_embedding.conv_out"

    def awake(gradients):
        def heard(test):
            return {bool(value.any()) for key, value in gradients.items() if test(key.removeprefix("model."))}

        return (
            heard(lambda key: key.startswith(zero)),
            heard(lambda key: not key.startswith("controlnet_")),
            heard(lambda key: key.startswith(last)),
            heard(lambda key: key.startswith("controlnet_cond_embedding") and not key.startswith(last)),
        )

    assert awake(one_step(phase, batch, 0)) == ({True}, {False}, {False}, {False})
    assert awake(one_step(phase, batch, 1)) == ({True}, {True}, {True}, {False})
    assert awake(one_step(phase, batch, 2)) == ({True}, {True}, {True}, {True})
    assert all(p.grad is None for p in base.network.parameters())
    assert all(torch.equal(before[key], value) for key, value in base.network.state_dict().items())


def test_a_training_teaches_the_hint_and_leaves_the_base_alone(accelerator):
    """Images that are what their hint says: after a few updates the right hint is worth more than another's."""
    from controlnet.evidence import Probe, paired_gap

    base = make_base("pixels")
    adapter = make_adapter(base, "pixels")
    phase = control_phase(ControlledDenoiser(base, adapter), adamw(adapter, 3e-3), ema=EMA(adapter, 0.5))
    batch = make_batch(batch=16)
    batch["x0"] = (2 * batch["hint"][:, :1] - 1).expand(-1, 3, -1, -1).clone()
    before = state_of(base.network)
    losses = [float(report.metrics["control/loss"]) for report in
              train([phase], lambda rng: batch, accelerator, steps=60, clip_norm=1.0)]  # fmt: skip
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    probe = Probe(x0=batch["x0"], hint=batch["hint"], cond=batch["cond"], images=batch["x0"])
    gap = paired_gap(ControlledDenoiser(base, phase.ema.network), probe)
    assert gap.significant
    assert gap.value > 0.05 * gap.right
    assert all(torch.equal(before[key], value) for key, value in base.network.state_dict().items())


# Unlocked.


def test_an_unlocked_decoder_learns_and_the_encoder_does_not():
    controlled, batch = make_controlled("pixels", trained=True), make_batch()
    before = state_of(controlled.base.network)
    network = unlock(controlled)
    phase = control_phase(controlled, adamw(network, 1e-3), network=network, ema=EMA(network, 0.5))
    one_step(phase, batch)
    phase.ema.update()
    changed = {
        key.split(".")[1] for key, value in controlled.base.network.state_dict().items()
        if not torch.equal(before[key], value)
    }  # fmt: skip
    assert changed == {"up_blocks", "conv_norm_out", "conv_out"}
    assert {key.split(".")[0] for key in network.state_dict()} == {"adapter", *changed}


def test_averages_of_what_was_unlocked_are_put_in_place():
    controlled, inputs = make_controlled("pixels", trained=True), make_inputs("pixels")
    call = (inputs["x_t"], inputs["t"], inputs["cond"])
    network = unlock(controlled)
    average = EMA(network).network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05)
        moved = controlled(*call)
        averaged = with_weights(controlled, average)(*call)
        close(averaged, make_controlled("pixels", trained=True)(*call), rtol=1e-5, atol=1e-5)
        assert (moved - averaged).abs().max() > 1e-2
        assert torch.equal(controlled(*call), moved), "the original is as it was"
        close(with_weights(controlled, network)(*call), moved, rtol=0, atol=0)
    encoder = controlled.base.network.model.conv_in.weight
    assert with_weights(controlled, average).base.network.model.conv_in.weight is encoder
    locked = with_weights(controlled, average["adapter"])
    assert (locked.adapter, locked.base) == (average["adapter"], controlled.base)


def frozen_in_part(unlocked=False, learning_base=False, dtype=torch.float32):
    """A phase of an adapter whose base is not frozen as it should be, or whose weights are too coarse."""
    controlled = make_controlled("pixels", dtype=dtype)
    network = unlock(controlled) if unlocked else controlled.adapter
    controlled.base.network.requires_grad_(learning_base or unlocked)
    return control_phase(controlled, adamw(network, 1e-3), network=network)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: frozen_in_part(learning_base=True), r"\d+ weights beside the phase's network require gradients"),
    (lambda: frozen_in_part(unlocked=True), r"or pass network=unlock\(denoiser\)"),
    (lambda: frozen_in_part(dtype=torch.bfloat16), r"must be float32, or small updates .* got torch\.bfloat16"),
    (lambda: adamw(make_base().network, 1e-4), "no parameter that requires a gradient; was it frozen"),
    (lambda: lighten(make_base().network, levels=-1), r"levels must be at least 0; got -1\. None means all"),
    (lambda: lighten(HintPyramid(3)), r"a HintPyramid cannot recompute activations\. Pass recompute=False"),
])  # fmt: skip
def test_what_could_not_learn_as_meant_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The optimiser.


def test_new_weights_may_learn_faster_than_copied_ones():
    adapter = make_adapter(make_base())
    optimizer = adamw(adapter, 1e-5, new_factor=10.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-4])
    names = {id(p): name for name, p in adapter.named_parameters()}
    copied, new = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert all("controlnet_" in name for name in new)
    assert not any("controlnet_" in name for name in copied)
    assert len(copied) + len(new) == len(names)
    assert {(group["fused"], group["weight_decay"]) for group in optimizer.param_groups} == {(True, 0.01)}
    assert len(adamw(HintPyramid(3), 1e-4, new_factor=5.0).param_groups) == 1, "there is no copy"


def test_eight_bits_are_those_of_bitsandbytes(monkeypatch):
    class AdamW8bit(torch.optim.SGD):
        def __init__(self, groups, lr, betas, weight_decay):
            super().__init__(groups, lr, weight_decay=weight_decay)

    monkeypatch.setitem(sys.modules, "bitsandbytes", type(sys)("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="8-bit AdamW needs bitsandbytes: pip install"):
        adamw(HintPyramid(3), 1e-4, eight_bit=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", type(sys)("bitsandbytes.optim"))
    sys.modules["bitsandbytes.optim"].AdamW8bit = AdamW8bit
    optimizer = adamw(make_adapter(make_base()), 1e-4, new_factor=2.0, eight_bit=True)
    assert type(optimizer) is AdamW8bit
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 2e-4]


# Ranks.


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_on_ranks(worker.main, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["locked", "locked_bare", "unlocked"])
def test_two_ranks_learn_what_one_would_from_both_batches(two_ranks, name):
    expected = worker.expected("unlocked" in name)
    first, second = (answers[name] for answers in two_ranks)
    assert torch.equal(first, second)
    close(first, expected, rtol=0, atol=1e-10)
    assert (expected - worker.flat(worker.make_phase("unlocked" in name).network)).abs().max() > 1e-5


def test_two_ranks_share_the_work_of_a_look_and_see_the_same(two_ranks):
    expected = worker.look()
    for answers in two_ranks:
        assert answers["rows"] == 2 * 4, "half of seven samples, rounded up, under both hints"
        close(answers["look"]["gap"], expected["gap"], rtol=1e-4, atol=1e-7)
        close(answers["look"]["images"], expected["images"], rtol=1e-4, atol=1e-4)
        assert torch.equal(answers["look"]["ceiling"], expected["ceiling"])
        assert answers["look"]["decoded"] == 2 * 4, "its share of the images drawn, and of the real ones"


def test_one_rank_does_all_rows(accelerator):
    rows = shared_rows(lambda rows: rows[:, None] * 2, 5, accelerator)
    assert rows.tolist() == [[0], [2], [4], [6], [8]]


# Memory and work.


def saved_bytes(work, networks):
    """Bytes that autograd keeps for the way back, each storage once, weights not counted."""
    weights = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    total = sum(storage.nbytes() for storage in kept.values())
    return total, result


def loss_of(controlled, batch):
    phase = control_phase(controlled, torch.optim.SGD(controlled.adapter.parameters(), 1.0))
    return phase.loss(batch, Rng(0, 0))["loss"]


def lightened(controlled, base, adapter):
    for network, recompute in ((controlled.base.network, base), (controlled.adapter, adapter)):
        lighten(network, recompute=recompute)
    return controlled


def test_recomputing_the_frozen_decoder_too_keeps_far_less_and_changes_no_gradient():
    """As other trainers do, recomputing in the adapter alone; and in both."""
    batch, found = make_batch("sd", 2), {}
    for base, adapter in ((False, False), (False, True), (True, True)):
        controlled = lightened(make_controlled("sd", trained=True), base, adapter)
        networks = (controlled.base.network, controlled.adapter)
        size, loss = saved_bytes(lambda it=controlled: loss_of(it, batch), networks)
        loss.backward()
        found[base, adapter] = size, loss.detach(), [p.grad for p in controlled.adapter.parameters()]
    nothing, others, ours = (found[key] for key in ((False, False), (False, True), (True, True)))
    assert ours[0] <= 0.7 * others[0] < others[0] < nothing[0]
    for _, loss, gradients in (others, ours):
        close(loss, nothing[1], rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients, nothing[2], strict=True):
            close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)


def test_levels_are_recomputed_from_the_finest_and_the_hints_embedding_always():
    """The embedding works at the size of the image: 64 x 64 pixels for features of 8 x 8."""
    sizes, gradients, batch = [], [], make_batch("sd", 2)
    for levels in (0, 1, 2, None):
        controlled = make_controlled("sd", trained=True)
        networks = (controlled.base.network, controlled.adapter)
        for network in networks:
            lighten(network, levels=levels)
            assert network.model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        size, loss = saved_bytes(lambda it=controlled: loss_of(it, batch), networks)
        loss.backward()
        sizes.append(size)
        gradients.append(torch.cat([p.grad.reshape(-1) for p in controlled.adapter.parameters()]))
        up, down = controlled.base.network.model.up_blocks, controlled.adapter.model.down_blocks
        recomputed = [block.gradient_checkpointing for block in (*reversed(up), *down)]
        assert recomputed == [(levels is None or level < levels) for level in (0, 1)] * 2
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3], "the middle block is the last"
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()
    assert EMA(controlled.adapter).network.model.is_gradient_checkpointing
    controlled.adapter.model.controlnet_cond_embedding.gradient_checkpointing = False
    assert sizes[-1] < 0.6 * saved_bytes(lambda: loss_of(controlled, batch), networks)[0]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_frozen_encoder_keeps_nothing(frozen):
    """Between the first convolution and the end of the middle block, for the way back through the adapter."""
    controlled, inputs = make_controlled("sd"), make_inputs()
    unet = controlled.base.network.model
    unet.conv_in.requires_grad_(not frozen)
    inside, kept = [False], []
    unet.conv_in.register_forward_pre_hook(lambda *arguments: inside.append(True))
    unet.mid_block.register_forward_hook(lambda *arguments: inside.append(False))

    def pack(tensor):
        if inside[-1]:
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        controlled(inputs["x_t"], inputs["t"], inputs["cond"]).sum().backward()
    assert len(inside) == 3
    assert (sum(kept) == 0) == frozen
    assert all(p.grad is not None for p in controlled.adapter.parameters() if p.requires_grad)


def test_a_base_in_bf16_teaches_an_adapter_in_float32(make_accelerator):
    """As large models are trained: what is frozen is cast, what learns computes in bf16 and recomputes."""
    batch, losses = make_batch(batch=8), {}
    for precision in ("no", "bf16"):
        base = make_base("pixels")
        adapter = make_adapter(base, "pixels", trained=True)
        freeze(base.network, torch.bfloat16 if precision == "bf16" else None)
        controlled = lightened(ControlledDenoiser(base, adapter), True, True)
        phase = control_phase(controlled, adamw(adapter, 1e-3))
        reports = list(train([phase], lambda rng: batch, make_accelerator(mixed_precision=precision), steps=4))
        losses[precision] = torch.stack([report.metrics["control/loss"].float() for report in reports])
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    close(losses["bf16"], losses["no"], rtol=0.02, atol=0)
    assert not torch.equal(losses["bf16"], losses["no"])
    assert losses["no"][-1] < losses["no"][0]


def flops_and_bytes(settings):
    controlled, inputs = meta_controlled(settings)
    networks = (controlled.base.network, controlled.adapter)
    with FlopCounterMode(display=False) as counter:
        size, loss = saved_bytes(lambda: loss_of(controlled, inputs), networks)
        loss.backward()
    lightened(controlled, True, True)
    light = saved_bytes(lambda: loss_of(controlled, inputs), networks)[0]
    return counter.get_total_flops() / 1e9, size, light


@pytest.mark.slow
def test_work_and_memory_of_a_step_at_the_size_of_stable_diffusion():
    """GFLOP of one image forth and back, latents cached; encoding it would add 1,117."""
    work, size, light = flops_and_bytes(SD15)
    assert 2200 <= work <= 2300
    assert light < 0.08 * size


@pytest.mark.slow
def test_work_and_memory_of_a_step_at_the_size_of_sdxl():
    work, size, light = flops_and_bytes(SDXL)
    assert 19_500 <= work <= 20_100
    assert light < 0.08 * size
