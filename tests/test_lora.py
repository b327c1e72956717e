"""The LoRA of a network: bitwise the network until it learns, and never a trace of it in the network."""

import copy
from dataclasses import replace

import pytest
import tiny_pipelines
import torch
from denoisers import random_mlp, seeded
from refusals import refused
from safetensors.torch import load_model, save_model

from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.gradient import denoising_loss, prediction_weight
from scorefield.models.networks import DiffusersNetwork
from scorefield.schedule import RectifiedFlow, VariancePreserving
from scorefield.times import uniform
from sds.vsd import low_rank_denoiser

close = torch.testing.assert_close
B = 5
TARGETS = ("first", "second")


def make_teacher(dtype=torch.float32):
    network = random_mlp(shape=(4,), dtype=dtype)
    return NetworkDenoiser(freeze(network), VariancePreserving.scaled_linear(), "v", 1e-3)


def make_unet(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiffusersNetwork(tiny_pipelines.text_unet())
    return NetworkDenoiser(freeze(network, dtype), VariancePreserving.scaled_linear())


def make_phi(teacher, **settings):
    settings = {"targets": TARGETS, "camera_at": "time", **settings}
    return low_rank_denoiser(teacher, rank=3, generator=seeded(), **settings)


@pytest.fixture
def teacher():
    return make_teacher()


@pytest.fixture
def inputs():
    x_t = torch.randn(B, 4, generator=seeded(1))
    return x_t, torch.tensor([0.0, 20.0, 500.0, 979.0, 999.0]), {"class_labels": torch.arange(B) % 3}


@pytest.fixture
def unet_inputs():
    x_t = torch.randn(2, 4, 8, 8, generator=seeded(1))
    cond = {"encoder_hidden_states": torch.randn(2, 5, 32, generator=seeded(2))}
    return x_t, torch.tensor([20.0, 700.0]), cond


CAMERAS = torch.randn(B, 4, 4, generator=torch.Generator().manual_seed(3))


def learn(phi, cond, steps=5, shape=(4,)):
    """Some updates on noise; returns the weights that had a gradient, by name."""
    optimizer = torch.optim.AdamW(phi.network.parameters(), 1e-2)
    x0 = torch.randn(len(next(iter(cond.values()))), *shape, generator=seeded(4))
    for step in range(steps):
        optimizer.zero_grad()
        weight = prediction_weight(phi.kind)
        loss = denoising_loss(phi, x0, cond, times=uniform(), weight=weight, generator=seeded(step))
        loss.mean().backward()
        optimizer.step()
    return {name for name, p in phi.network.named_parameters() if p.grad is not None and p.grad.any()}


def test_what_the_twin_learns_leaves_no_trace_in_the_teacher(teacher, inputs):
    """A fresh LoRA is the teacher, which answers as if no adapter had ever been: its bits, modules and keys."""
    x_t, t, cond = inputs
    before, state = teacher(x_t, t, cond), copy.deepcopy(teacher.network.state_dict())
    modules = [type(module) for module in teacher.network.modules()]
    phi, told = make_phi(teacher), {**cond, "camera": CAMERAS}
    assert (phi.schedule, phi.kind, phi.time_scale) == (teacher.schedule, "v", 1e-3)
    assert torch.equal(phi(x_t, t, told), before)
    touched = learn(phi, told)
    assert touched == {name for name, _ in phi.network.named_parameters()}
    assert {name.split(".")[0] for name in touched} == {"changes", "camera"}
    assert sum("changes" in name for name in touched) == 2 * 2 * 2  # two blocks, two layers, two matrices
    assert not any(p.requires_grad or p.grad is not None for p in teacher.network.parameters())
    assert not torch.allclose(phi(x_t, t, told), before)
    assert torch.equal(teacher(x_t, t, cond), before)
    assert [type(module) for module in teacher.network.modules()] == modules
    after = teacher.network.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_the_transformer_of_stable_diffusion_3_has_a_twin():
    transformer = DiffusersNetwork(tiny_pipelines.sd3(with_t5=False).transformer)
    teacher = NetworkDenoiser(freeze(transformer), RectifiedFlow(), "flow", 1000.0)
    phi = low_rank_denoiser(teacher, camera_at="model.time_text_embed", generator=seeded())
    x_t, t = torch.randn(2, 8, 8, 8, generator=seeded(1)), torch.tensor([0.2, 0.7])
    cond = {"encoder_hidden_states": torch.randn(2, 5, 32), "pooled_projections": torch.randn(2, 24)}
    before, cameras = teacher(x_t, t, cond), {**cond, "camera": CAMERAS[:2]}
    assert torch.equal(phi(x_t, t, cameras), before)
    assert any("camera" in name for name in learn(phi, cameras, shape=(8, 8, 8)))
    assert not torch.allclose(phi(x_t, t, cameras), before)
    assert torch.equal(teacher(x_t, t, cond), before)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_the_twin_of_a_unet_learns_leaves_no_trace(unet_inputs, checkpointing):
    x_t, t, cond = unet_inputs
    teacher = make_unet()
    before = teacher(x_t, t, cond)
    phi = low_rank_denoiser(teacher, generator=seeded())
    assert torch.equal(phi(x_t, t, {**cond, "camera": CAMERAS[:2]}), before)
    if checkpointing:
        phi.network.backbone.model.enable_gradient_checkpointing()
    touched = learn(phi, {**cond, "camera": CAMERAS[:2]}, shape=(4, 8, 8))
    assert touched == {name for name, _ in phi.network.named_parameters()}
    assert torch.equal(teacher(x_t, t, cond), before)
    assert not teacher.network.model.is_gradient_checkpointing


def test_gradient_checkpointing_changes_no_gradient(unet_inputs):
    """It recomputes the forward pass during backward, with whichever adapter is switched on by then."""
    x_t, t, cond = unet_inputs

    def gradients(checkpointing):
        phi = low_rank_denoiser(make_unet(), generator=seeded())
        for parameter in phi.network.parameters():
            parameter.data.normal_(0, 0.1, generator=seeded(7))
        if checkpointing:
            phi.network.backbone.model.enable_gradient_checkpointing()
            assert phi.network.backbone.model.is_gradient_checkpointing
        loss = phi(x_t, t, {**cond, "camera": CAMERAS[:2]}).square().mean()
        return torch.autograd.grad(loss, list(phi.network.parameters()))

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().sum() > 0
        close(recomputed, plain)


def test_the_shared_weights_are_one_tensor_and_not_in_checkpoints(teacher):
    phi = make_phi(teacher)
    shared = {p.data_ptr() for p in teacher.network.parameters()}
    assert {p.data_ptr() for p in phi.network.backbone.parameters()} >= shared
    assert not {p.data_ptr() for p in phi.network.parameters()} & shared
    size = sum(value.numel() for value in phi.network.state_dict().values())
    assert size == 8 * 3 * 16 + (12 * 8 + 8) + (8 * 8 + 8)


def test_a_twin_is_restored_from_its_own_file(teacher, inputs, tmp_path):
    x_t, t, cond = inputs
    cond = {**cond, "camera": CAMERAS}
    phi, other = make_phi(teacher), low_rank_denoiser(
        teacher, rank=3, targets=TARGETS, camera_at="time", generator=seeded(9)
    )  # fmt: skip
    learn(phi, cond)
    save_model(phi.network, str(tmp_path / "phi.safetensors"))
    load_model(other.network, str(tmp_path / "phi.safetensors"))
    assert torch.equal(other(x_t, t, cond), phi(x_t, t, cond))


def test_the_generator_alone_decides_the_first_weights(teacher):
    torch.manual_seed(0)
    first = make_phi(teacher).network.state_dict()
    torch.manual_seed(1)
    again = make_phi(teacher).network.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any("lora_A" in name and value.abs().max() > 0 for name, value in first.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_changes_learn_in_float32_or_better(inputs, dtype):
    x_t, t, cond = inputs
    teacher = make_teacher(dtype)
    phi = make_phi(teacher)
    assert {p.dtype for p in phi.network.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert torch.equal(phi(x_t, t, {**cond, "camera": CAMERAS}), teacher(x_t, t, cond))
    assert learn(phi, {**cond, "camera": CAMERAS}) == {name for name, _ in phi.network.named_parameters()}
    assert {p.dtype for p in teacher.network.parameters()} == {dtype}


def test_moving_the_twin_moves_no_weight_of_the_teacher(teacher, inputs):
    x_t, t, cond = inputs
    phi = make_phi(teacher)
    phi.network.double()
    assert {p.dtype for p in phi.network.parameters()} == {torch.float64}
    assert {p.dtype for p in teacher.network.parameters()} == {torch.float32}
    assert torch.equal(phi(x_t, t, {**cond, "camera": CAMERAS}), teacher(x_t, t, cond))


def test_an_average_of_the_twin_stands_on_its_own(teacher, inputs):
    x_t, t, cond = inputs
    cond = {**cond, "camera": CAMERAS}
    phi = make_phi(teacher)
    learn(phi, cond)
    before = phi(x_t, t, cond)
    average = replace(phi, network=copy.deepcopy(phi.network))
    assert torch.equal(average(x_t, t, cond), before)
    learn(phi, cond)
    assert torch.equal(average(x_t, t, cond), before)


# Cameras.


def test_a_camera_changes_the_answer_of_its_own_sample(teacher, inputs):
    x_t, t, cond = inputs
    phi = make_phi(teacher)
    learn(phi, {**cond, "camera": CAMERAS})
    moved = CAMERAS.clone()
    moved[2, 0, 3] += 1
    before, after = (phi(x_t, t, {**cond, "camera": cameras}) for cameras in (CAMERAS, moved))
    changed = (before != after).any(1)
    assert changed.tolist() == [False, False, True, False, False]


def test_the_forms_of_a_camera_are_the_same(teacher, inputs):
    x_t, t, cond = inputs
    phi = make_phi(teacher)
    learn(phi, {**cond, "camera": CAMERAS})
    forms = [CAMERAS, CAMERAS[:, :3], CAMERAS[:, :3].flatten(1)]
    answers = [phi(x_t, t, {**cond, "camera": camera}) for camera in forms]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_no_hook_stays_behind(teacher, inputs):
    x_t, t, cond = inputs
    phi = make_phi(teacher)
    phi(x_t, t, {**cond, "camera": CAMERAS})
    with refused("class_labels must lie"):
        phi(x_t, t, {"class_labels": torch.full((B,), 9), "camera": CAMERAS})
    assert not any(module._forward_hooks for module in phi.network.backbone.modules())


def test_a_twin_without_camera(teacher, inputs):
    x_t, t, cond = inputs
    phi = make_phi(teacher, camera_at=None)
    assert {name.split(".")[0] for name in phi.network.state_dict()} == {"changes"}
    assert torch.equal(phi(x_t, t, cond), teacher(x_t, t, cond))


def test_a_camera_that_is_missing_or_not_expected_raises(teacher, inputs):
    x_t, t, cond = inputs
    with refused("cond needs a 'camera', which this LoRA is told"):
        make_phi(teacher)(x_t, t, cond)
    with pytest.raises(TypeError, match="camera"):
        make_phi(teacher, camera_at=None)(x_t, t, {**cond, "camera": CAMERAS})


@pytest.mark.parametrize("shape", [(B,), (B, 3), (B, 3, 3), (B, 13)])
def test_a_camera_of_another_shape_raises(teacher, inputs, shape):
    x_t, t, cond = inputs
    with refused(r"camera must be \(b, 12\), \(b, 3, 4\) or \(b, 4, 4\); got"):
        make_phi(teacher)(x_t, t, {**cond, "camera": torch.zeros(shape)})


@pytest.mark.parametrize(("settings", "message"), [
    ({"targets": ("to_q",)}, "the network has no layer 'to_q'; it has time"),
    ({"targets": ("irst",)}, "the network has no layer 'irst'"), ({"rank": 0}, "rank must be at least 1; got 0"),
    ({"camera_at": "model.time_embedding"}, "no submodule 'model.time_embedding'; it has time"),
    ({"camera_at": "time.1"}, "camera_at must name a module that ends in a linear layer"),
])  # fmt: skip
def test_impossible_twins_raise(teacher, settings, message):
    with refused(message):
        low_rank_denoiser(teacher, **{"targets": TARGETS, "camera_at": None, "generator": seeded(), **settings})


def test_a_network_that_still_learns_raises(teacher):
    teacher.network.leave.requires_grad_(True)
    with refused(r"must be frozen: .* Pass it through scorefield.freeze"):
        make_phi(teacher)
