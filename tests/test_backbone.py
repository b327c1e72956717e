"""One frozen network for three roles: what it costs, that nothing is switched, that its gradients are right."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import refused
from text_contenders import COPIES, SHARED, Case, count_bytes, make_network
from torch import nn
from workers import backbone_ranks as worker

from scorefield.models.lora import LAYERS, LoRA, adapter_weights, merged, recompute_activations, shared_backbone
from scorefield.models.networks import DiffusersNetwork, ResidualMLP
from scorefield.randomness import Rng
from scorefield.training import offload
from scorefield.training.loop import EMA, Phase, train
from scorefield.training.offload import offload_state

close = torch.testing.assert_close
RNG = Rng(seed=3, step=2)


# What it costs.


def case_of(shape, rank, precision):
    if shape == "toy":
        return Case(rank=rank, precision=precision)
    if "SCOREFIELD_CONFIGS" not in os.environ:
        pytest.skip("set SCOREFIELD_CONFIGS to a folder with the config.json of public models, as sd15_unet.json")
    folder = Path(os.environ["SCOREFIELD_CONFIGS"])
    if not (folder / f"{shape}_unet.json").is_file():
        pytest.skip(f"SCOREFIELD_CONFIGS is {folder}, which has no {shape}_unet.json")
    return Case(shape=shape, configs=folder, rank=rank, precision=precision)


# The teacher of three copies has the precision of the shared network: sharing alone makes the difference.
@pytest.mark.parametrize(("shape", "rank", "precision", "frozen"), [
    ("toy", 8, "no", 4), ("sd15", 64, "bf16", 2), ("sdxl", 64, "bf16", 2), ("sd15", 32, "no", 4),
])  # fmt: skip
def test_the_shared_backbone_takes_a_quarter_of_three_copies_or_less(shape, rank, precision, frozen):
    """As benchmarks/text_cycle.py counts, whose tests count adapters by hand."""
    case = case_of(shape, rank, precision)
    parameters = list(make_network(case, torch.device("meta")).parameters())
    size = sum(p.numel() for p in parameters)
    counted = count_bytes(case)
    assert counted[COPIES] == size * (frozen + 2 * 16) + 4 * 2 * len(parameters)
    assert frozen * size < counted[SHARED] <= counted[COPIES] / 4


# Gradients.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradients_are_those_of_three_copies(checkpointing):
    answers = []
    for build in (worker.shared, worker.copies):
        method = worker.make_method(build, checkpointing, num_steps=1)
        batch = {**worker.batches(RNG), "fake_cond": {}}
        noise = torch.randn(worker.B, *worker.SHAPE, generator=RNG("noise"), dtype=torch.float64)
        x0 = method.student.simulate(noise, batch["cond"], steps=1)
        learned = worker.learned(method)
        student = torch.autograd.grad(method.student_loss({**batch, "x0": x0}, RNG)["loss"], learned["student"])
        fake = torch.autograd.grad(method.fake_loss({**batch, "x0": x0.detach()}, RNG)["loss"], learned["fake"])
        answers.append({"student": student, "fake": fake})
        assert all(bool(gradient.abs().max() > 0) for gradient in (*student, *fake))
    for role, gradients in answers[0].items():
        for found, expected in zip(gradients, answers[1][role], strict=True):
            assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


# Nothing is switched, and nothing leaks.


def inputs():
    cond = {"encoder_hidden_states": torch.randn(2, 5, 32, generator=RNG("states"), dtype=torch.float64)}
    return (
        torch.randn(2, *worker.SHAPE, generator=RNG("x"), dtype=torch.float64),
        torch.tensor([20.0, 700.0]),
        cond,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teacher_stays_what_it_was(accelerator, checkpointing):
    teacher = worker.make_teacher()
    before = teacher(*inputs())
    student, fake = shared_backbone(teacher, rank=2, checkpointing=checkpointing, generator=RNG("lora"))
    assert torch.equal(student(*inputs()), before)
    assert torch.equal(fake(*inputs()), before)
    for role in (student, fake):
        loss = role(*inputs()).square().mean()
        optimizer = torch.optim.AdamW(role.network.parameters(), 1e-2)
        loss.backward()
        optimizer.step()
        assert not torch.allclose(role(*inputs()), before)
    assert not torch.allclose(student(*inputs()), fake(*inputs()), rtol=1e-6)
    assert torch.equal(teacher(*inputs()), before)
    assert all(p.grad is None and not p.requires_grad for p in teacher.network.parameters())
    assert not teacher.network.model.is_gradient_checkpointing
    assert all(role.network.backbone.model.is_gradient_checkpointing == checkpointing for role in (student, fake))


def test_an_average_has_adapters_of_its_own_on_the_same_weights():
    student = shared_backbone(worker.make_teacher(), rank=2, generator=RNG("lora"))[0].network
    average = EMA(student, 0.5).network
    shared = {p.data_ptr() for p in student.backbone.parameters()}
    own = {p.data_ptr() for p in average.parameters()}
    assert {p.data_ptr() for p in average.backbone.parameters()} == (
        shared - {p.data_ptr() for p in student.parameters()}
    ) | own
    assert not own & {p.data_ptr() for p in student.parameters()}
    x = inputs()
    before = average(x[0], x[1], **x[2])
    for parameter in student.parameters():
        parameter.data.add_(0.1)
    assert torch.equal(average(x[0], x[1], **x[2]), before)


def test_the_changes_merged_are_the_changes_beside(tmp_path):
    student = worker.shared(False)[1]
    whole = replace(student, network=merged(student.network))
    assert type(whole.network) is DiffusersNetwork
    assert whole.network.state_dict().keys() == worker.make_teacher().network.state_dict().keys()
    close(whole(*inputs()), student(*inputs()), rtol=1e-10, atol=1e-12)
    places = {name.split("/lora")[0].split("/")[-1] for name in student.network.changes}
    assert {"to_q", "conv1", "proj_in", "time_emb_proj", "conv_shortcut"} <= places, "only layers that are there"
    assert set(LAYERS) > {"add_q_proj"}
    names = adapter_weights(student.network)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in names


def test_alpha_scales_the_changes():
    def changed_by(alpha):
        teacher = worker.make_teacher()
        student = shared_backbone(teacher, rank=2, alpha=alpha, targets=("to_q",), generator=RNG("lora"))[0]
        for name, parameter in student.network.changes.items():
            if "lora_B" in name:
                parameter.data.fill_(1e-7)  # so small that the network is affine in the change
        return student(*inputs()) - teacher(*inputs())

    assert changed_by(2).abs().max() > 0
    close(changed_by(None), changed_by(2))
    close(changed_by(1), changed_by(2) / 2, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 0}, "rank must be at least 1; got 0"),
    ({"alpha": 0.0}, "alpha must be above 0"),
    ({"targets": ("nothing",)}, "the network has none of the layers nothing"),
])  # fmt: skip
def test_impossible_backbones_raise(settings, message):
    with refused(message):
        shared_backbone(worker.make_teacher(), **{"rank": 2, "generator": RNG("lora"), **settings})


def test_a_teacher_that_learns_or_cannot_recompute_raises():
    teacher = worker.make_teacher()
    teacher.network.model.conv_in.requires_grad_(True)
    with refused("must be frozen"):
        shared_backbone(teacher, rank=2, generator=RNG("lora"))
    with refused("a ResidualMLP cannot recompute its activations"):
        recompute_activations(ResidualMLP((2,)))


def test_a_critic_listens_to_the_fake_scores_twin():
    _, _, fake = worker.shared(False)
    _, (logits,) = fake.with_extras(*inputs())
    assert logits.shape == (2,)
    grads = torch.autograd.grad(logits.sum(), fake.network.head.parameters())
    assert all(bool(g.abs().sum() > 0) for g in grads)
    assert isinstance(fake.network.network, LoRA)
    assert not any(module._forward_hooks for module in fake.network.network.backbone.modules())


# Optimiser state away from the device.


def learn(optimizer_of, accelerator, steps=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
    optimizer = optimizer_of(network)
    phase = Phase(
        name="net", network=network, optimizer=optimizer,
        loss=lambda batch, rng: {"loss": network(torch.ones(1, 3)).square().sum()},
    )  # fmt: skip
    list(train([phase], lambda rng: None, accelerator, steps=steps))
    return network, optimizer


def test_state_is_at_home_between_steps_and_with_the_weights_within(accelerator, monkeypatch):
    """Where a device's memory is another memory; here both are the CPU, and the moves are watched."""
    calls, move = [], offload._move

    def watched(state, device):
        calls.append((sorted(state), device))
        move(state, device)

    def optimizer_of(network):
        optimizer = offload_state(torch.optim.AdamW(network.parameters(), 1e-2), home=torch.device("cpu", 0))
        optimizer.register_step_pre_hook(lambda *arguments: calls.append("step"))
        return optimizer

    monkeypatch.setattr(offload, "_move", watched)
    plain, _ = learn(lambda network: torch.optim.AdamW(network.parameters(), 1e-2), accelerator)
    away, optimizer = learn(optimizer_of, accelerator, steps=2)
    names = ["exp_avg", "exp_avg_sq", "step"]
    fetched, put_away = (names, torch.device("cpu")), (names, torch.device("cpu", 0))
    assert calls == ["step", put_away, put_away, fetched, fetched, "step", put_away, put_away]
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls[8:] == [put_away, put_away]
    away, _ = learn(optimizer_of, accelerator)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), away.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second memory: a GPU")
def test_state_of_weights_on_a_gpu_lies_on_the_cpu():
    network = nn.Linear(3, 2).cuda()
    optimizer = offload_state(torch.optim.AdamW(network.parameters(), 1e-2, fused=True))
    for _ in range(2):
        network(torch.ones(1, 3).cuda()).sum().backward()
        optimizer.step()
        assert {x.device.type for s in optimizer.state.values() for x in s.values()} == {"cpu"}
    optimizer.load_state_dict(optimizer.state_dict())
    assert {x.device.type for s in optimizer.state.values() for x in s.values()} == {"cpu"}
