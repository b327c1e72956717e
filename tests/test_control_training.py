"""What an adapter learns by: which weights wake up when, exact resuming, two ranks, memory and work counted."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
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
    state_of,
)
from torch.utils.flop_counter import FlopCounterMode

from controlnet.adapter import ControlledDenoiser
from controlnet.training import adamw, control_phase, lighten, unlock, with_weights
from scorefield.denoiser import freeze
from scorefield.gradient import TIME_NOT_FINITE, min_snr_weight
from scorefield.randomness import Rng, derived_generator, normal_like, shuffled
from scorefield.times import constant, uniform
from scorefield.training import checkpoint
from scorefield.training.loop import EMA, train
from scorefield.training.ranks import shared_rows

close = torch.testing.assert_close
WORKER = Path(__file__).parent / "workers" / "two_controls.py"


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


def test_times_and_weight_are_those_asked_for():
    controlled, batch = make_controlled(trained=True), make_batch("sd")
    optimizer = adamw(controlled.adapter, 1e-4)
    plain = control_phase(controlled, optimizer, times=constant(300.0))
    snr = control_phase(controlled, optimizer, times=constant(300.0), weight=min_snr_weight(2.0))
    ratio = float(controlled.schedule.ratio(torch.tensor(300.0)))
    expected = min(ratio**-2, 2.0) * ratio**2  # min(SNR, gamma) / SNR of the loss of eps
    losses = [phase.loss(batch, Rng(0, 0))["loss"] for phase in (snr, plain)]
    close(losses[0] / losses[1], torch.tensor(expected), rtol=1e-4, atol=0)


def test_a_loss_that_is_not_finite_names_its_time():
    controlled, batch = make_controlled(trained=True), make_batch("sd")
    phase = control_phase(controlled, adamw(controlled.adapter, 1e-4), times=constant(300.0))
    batch["x0"][2] = torch.nan
    assert float(phase.loss(batch, Rng(0, 0))[TIME_NOT_FINITE]) == 300.0


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


def test_the_average_of_a_locked_adapter_replaces_the_adapter():
    controlled = make_controlled("pixels", trained=True)
    average = EMA(controlled.adapter).network
    replaced = with_weights(controlled, average)
    assert replaced.adapter is average
    assert replaced.base is controlled.base


def test_weights_that_would_learn_by_mistake_are_refused():
    controlled = make_controlled("pixels")
    controlled.base.network.requires_grad_(True)
    with pytest.raises(ValueError, match=r"\d+ weights beside the phase's network require gradients\. Freeze the"):
        control_phase(controlled, adamw(controlled.adapter, 1e-3))
    freeze(controlled.base.network)
    network = unlock(controlled)
    with pytest.raises(ValueError, match=r"or pass network=unlock\(denoiser\)"):
        control_phase(controlled, adamw(controlled.adapter, 1e-3))
    control_phase(controlled, adamw(network, 1e-3), network=network)


@pytest.mark.parametrize("unlocked", [False, True])
def test_weights_in_bf16_are_not_trained(unlocked):
    controlled = make_controlled("pixels", dtype=torch.bfloat16)
    network = unlock(controlled) if unlocked else controlled.adapter
    with pytest.raises(
        ValueError, match=r"must be float32, or small updates are rounded away; got torch\.bfloat16"
    ):
        control_phase(controlled, adamw(network, 1e-3), network=network)


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
    assert {group["fused"] for group in optimizer.param_groups} == {True}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}
    assert [group["lr"] for group in adamw(adapter, 1e-5).param_groups] == [1e-5, 1e-5]


def test_adapters_without_a_copy_have_one_group():
    assert len(adamw(HintPyramid(3), 1e-4, new_factor=5.0).param_groups) == 1


def test_an_optimiser_without_anything_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient; was it frozen"):
        adamw(make_base().network, 1e-4)


def test_eight_bits_want_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="8-bit AdamW needs bitsandbytes: pip install"):
        adamw(HintPyramid(3), 1e-4, eight_bit=True)


def test_eight_bits_are_those_of_bitsandbytes(monkeypatch):
    class AdamW8bit(torch.optim.SGD):
        def __init__(self, groups, lr, betas, weight_decay):
            super().__init__(groups, lr, weight_decay=weight_decay)

    module = type(sys)("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", type(sys)("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    optimizer = adamw(make_adapter(make_base()), 1e-4, new_factor=2.0, eight_bit=True)
    assert type(optimizer) is AdamW8bit
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 2e-4]


# Resuming, accumulating, ranks.


def test_a_resumed_training_is_the_uninterrupted_one_to_the_last_bit(accelerator, tmp_path):
    """Stopped within an epoch, of 10 samples in batches of 2 times 2; weights, moments, average and figures."""
    inputs = make_inputs("pixels", 10)

    def batches(rng):
        rows = shuffled(10, 2, rng)
        cond = {name: value[rows] for name, value in inputs["cond"].items()}
        return {"x0": inputs["x0"][rows], "hint": inputs["hint"][rows], "cond": cond}

    def new_phase():
        base = make_base("pixels")
        adapter = make_adapter(base, "pixels")
        optimizer = adamw(adapter, 1e-3)
        lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
        return control_phase(ControlledDenoiser(base, adapter), optimizer, ema=EMA(adapter, 0.9), lr_schedule=lr)

    def run(phase, start, steps):
        reports = train([phase], batches, accelerator, start=start, steps=steps, accumulate=2, clip_norm=1.0)
        return [report.read() for report in reports]

    def everything(phase):
        moments = [value for state in phase.optimizer.state.values() for value in state.values()]
        weights = [value for network in phase.networks().values() for value in network.parameters()]
        return [*weights, *moments, torch.tensor(phase.optimizer.param_groups[0]["lr"])]

    straight = new_phase()
    figures = run(straight, 0, 6)
    stopped = new_phase()
    first = run(stopped, 0, 3)
    checkpoint.save(tmp_path, 3, [stopped], {})
    resumed = new_phase()
    assert checkpoint.load(tmp_path, [resumed], {}) == 3
    assert first + run(resumed, 3, 6) == figures
    assert all(torch.equal(a, b) for a, b in zip(everything(straight), everything(resumed), strict=True))
    assert not torch.equal(next(straight.network.parameters()), next(stopped.network.parameters()))
    files = {path.name for path in (tmp_path / "step-000000003").iterdir()}
    assert files == {"control.safetensors", "control.ema.safetensors", "state.pt", "config.json", "manifest.json"}
    assert (tmp_path / "step-000000003" / "control.safetensors").stat().st_size < 5 * sum(
        p.numel() for p in straight.network.parameters()
    ), "the frozen base is in no checkpoint"


def test_several_micro_batches_have_the_gradient_of_their_mean(accelerator):
    worker = load_worker()
    phase = worker.make_phase(False)
    for _ in train([phase], worker.batches, accelerator, steps=1, accumulate=3):
        pass
    by_hand = worker.make_phase(False)
    rngs = [Rng(0, 0, micro, 0, micro) for micro in range(3)]
    sum(by_hand.loss(worker.batches(rng), rng)["loss"] / 3 for rng in rngs).backward()
    by_hand.optimizer.step()
    close(worker.flat(phase.network), worker.flat(by_hand.network), rtol=0, atol=1e-12)
    assert not torch.equal(worker.flat(phase.network), worker.flat(worker.make_phase(False).network))


def load_worker():
    spec = importlib.util.spec_from_file_location("two_controls_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["locked", "locked_bare", "unlocked"])
def test_two_ranks_learn_what_one_would_from_both_batches(two_ranks, name):
    worker = load_worker()
    expected = worker.expected("unlocked" in name)
    first, second = (answers[name] for answers in two_ranks)
    assert torch.equal(first, second)
    close(first, expected, rtol=0, atol=1e-10)
    assert (expected - worker.flat(worker.make_phase("unlocked" in name).network)).abs().max() > 1e-5


def test_two_ranks_share_the_work_of_a_look_and_see_the_same(two_ranks):
    expected = load_worker().look()
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


def test_networks_in_channels_last_compute_the_same():
    inputs, controlled = make_inputs("pixels"), make_controlled("pixels", trained=True)
    call = (inputs["x_t"], inputs["t"], inputs["cond"])
    expected = controlled(*call)
    for network in (controlled.base.network, controlled.adapter):
        lighten(network, recompute=False)
        weight = network.model.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    close(controlled(*call), expected, rtol=1e-4, atol=1e-4)


def test_the_hints_embedding_is_recomputed_too():
    """It works at the size of the image: 64 x 64 pixels for features of 8 x 8."""
    batch = make_batch("sd", 2)
    controlled = lightened(make_controlled("sd", trained=True), True, True)
    embedding = controlled.adapter.model.controlnet_cond_embedding
    networks = (controlled.base.network, controlled.adapter)
    without = saved_bytes(lambda: loss_of(controlled, batch), networks)[0]
    embedding.gradient_checkpointing = False
    assert without < 0.6 * saved_bytes(lambda: loss_of(controlled, batch), networks)[0]


def test_levels_are_recomputed_from_the_finest():
    sizes, gradients = [], []
    batch = make_batch("sd", 2)
    for levels in (0, 1, 2, None):
        controlled = make_controlled("sd", trained=True)
        networks = (controlled.base.network, controlled.adapter)
        for network in networks:
            lighten(network, levels=levels)
        size, loss = saved_bytes(lambda it=controlled: loss_of(it, batch), networks)
        loss.backward()
        sizes.append(size)
        gradients.append(torch.cat([p.grad.reshape(-1) for p in controlled.adapter.parameters()]))
        up, down = controlled.base.network.model.up_blocks, controlled.adapter.model.down_blocks
        recomputed = [block.gradient_checkpointing for block in (*reversed(up), *down)]
        assert recomputed == [(levels is None or level < levels) for level in (0, 1)] * 2
        assert controlled.adapter.model.controlnet_cond_embedding.gradient_checkpointing
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3], "the middle block is the last"
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_levels_are_counted_from_zero():
    with pytest.raises(ValueError, match=r"levels must be at least 0; got -1\. None means all"):
        lighten(make_base().network, levels=-1)


def test_a_network_that_cannot_recompute_is_named():
    with pytest.raises(ValueError, match=r"a HintPyramid cannot recompute activations\. Pass recompute=False"):
        lighten(HintPyramid(3))
    lighten(HintPyramid(3), recompute=False)


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


def test_recomputing_adapters_can_be_averaged():
    adapter = make_adapter(make_base())
    lighten(adapter)
    average = EMA(adapter).network
    assert average.model.is_gradient_checkpointing


def flops_and_bytes(settings):
    controlled, inputs = meta_controlled(settings)
    networks = (controlled.base.network, controlled.adapter)
    with FlopCounterMode(display=False) as counter:
        size, loss = saved_bytes(lambda: loss_of(controlled, inputs), networks)
        loss.backward()
    lightened(controlled, True, True)
    light = saved_bytes(lambda: loss_of(controlled, inputs), networks)[0]
    return counter.get_total_flops() / 1e9, size, light


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


def test_generators_of_a_look_and_of_training_differ():
    """A probe's noise is never a training step's."""
    a = torch.randn(4, generator=derived_generator(0, "gap", 0))
    assert not torch.equal(a, torch.randn(4, generator=Rng(0, 0)("noise")))
