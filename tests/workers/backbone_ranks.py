"""Distillation on one shared backbone and on three copies of it, by one rank or by each of two."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_pipelines

from distill.adversarial import Critic, discriminator_head
from distill.dmd import DMD, GAN
from distill.student import Student
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.guidance import guided
from scorefield.models.lora import LAYERS, shared_backbone
from scorefield.models.networks import DiffusersNetwork
from scorefield.schedule import VariancePreserving
from scorefield.training.loop import train

B, RANK, SHAPE, BOTTLENECK = 2, 3, (4, 8, 8), "model.mid_block"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_teacher():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiffusersNetwork(tiny_pipelines.text_unet()).double()
    return NetworkDenoiser(freeze(network), VariancePreserving.scaled_linear())


def make_head():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return discriminator_head(16, 4).double()


def spread(network):
    """Changes that change something: peft's second matrices start at zero."""
    for number, parameter in enumerate(network.changes.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=seeded(number), dtype=torch.float64) / 5
    return network


def shared(checkpointing):
    """Teacher, student and fake score on the same tensors."""
    teacher = make_teacher()
    student, fake = shared_backbone(
        teacher, rank=RANK, alpha=2 * RANK, checkpointing=checkpointing, generator=seeded()
    )
    spread(student.network), spread(fake.network)
    return teacher, student, replace(fake, network=Critic(fake.network, f"backbone.{BOTTLENECK}", make_head()))


def copies(checkpointing):
    """The same roles in peft's own way on three networks, each adapter always on; as diffusers' scripts do it."""
    roles = []
    for adapted in (shared(False)[1].network, shared(False)[2].network.network):
        network = copy.deepcopy(make_teacher().network)
        names = [name for name, _ in network.named_modules()]
        own = [layer for layer in LAYERS if any(name.endswith("." + layer) for name in names)]
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=own), network)
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        weights = {name.replace("/", "."): p for name, p in adapted.changes.items()}
        assert trained.keys() == weights.keys()
        for name, parameter in trained.items():
            parameter.data = weights[name].data.clone()
        if checkpointing:
            network.model.enable_gradient_checkpointing()
        roles.append(network)
    teacher = make_teacher()
    fake = Critic(roles[1], BOTTLENECK, make_head())
    return teacher, replace(teacher, network=roles[0]), replace(teacher, network=fake)


def make_method(build, checkpointing, num_steps=2):
    teacher, student, fake = build(checkpointing)
    negative = {"encoder_hidden_states": torch.randn(1, 5, 32, generator=seeded(8), dtype=torch.float64)}
    return DMD(
        teacher=guided(teacher, 3.0, negative), student=Student(student, (999.0, 499.0)[:num_steps]), fake=fake,
        shape=SHAPE, gan=GAN(generator_weight=0.1, critic_weight=0.1), student_every=1,
    )  # fmt: skip


def batches(rng):
    real = torch.randn(B, *SHAPE, generator=rng("real"), dtype=torch.float64)
    states = torch.randn(B, 5, 32, generator=rng("cond"), dtype=torch.float64)
    return {"cond": {"encoder_hidden_states": states}, "real": real}


def learned(method):
    """Weights that learn, by role, in one order however they are kept."""
    answer = {}
    for role, network in (("student", method.student.denoiser.network), ("fake", method.fake.network)):
        named = {name.replace("/", ".").replace("changes.", ""): p for name, p in network.named_parameters()}
        answer[role] = [named[name] for name in sorted(named) if named[name].requires_grad]
    return answer


def steps_of(build, checkpointing, accelerator):
    """Weights that learn after two steps of plain descent, flat, by role, and whether all of them still learn."""
    torch.set_default_dtype(torch.float64)  # for the noise of the rollout
    try:
        method = make_method(build, checkpointing)
        before = {role: len(weights) for role, weights in learned(method).items()}
        networks = (method.student.denoiser.network, method.fake.network)
        weights = learned(method)
        start = {role: torch.cat([p.detach().flatten() for p in weights[role]]) for role in weights}
        optimizers = (torch.optim.SGD(weights[role], 1e-2) for role in ("student", "fake"))
        phases = method.phases(*optimizers)
        assert [phase.network for phase in phases] == list(networks)
        list(train(phases, batches, accelerator, steps=2, rollout=method.rollout, verify_every=1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {role: len(weights) for role, weights in learned(method).items()} == before
    return {role: torch.cat([p.detach().flatten() for p in weights[role]]) - start[role] for role in weights}


def all_steps(accelerator):
    """Of the shared backbone and of copies, with and without gradient checkpointing."""
    return {
        f"{build.__name__} {checkpointing}": steps_of(build, checkpointing, accelerator)
        for build in (shared, copies)
        for checkpointing in (False, True)
    }
