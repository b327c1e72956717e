"""Two updates of a distilled flow transformer, by one process or by each of two ranks, from the same draws."""

from dataclasses import replace

import tiny_transformers as tiny
import torch

from distill.adversarial import Critic, discriminator_head
from distill.dmd import DMD, GAN
from distill.student import Student
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.guidance import guided
from scorefield.models.families import family_of
from scorefield.models.lora import shared_backbone
from scorefield.models.networks import DiffusersNetwork, Tokens
from scorefield.schedule import RectifiedFlow
from scorefield.training.loop import train

B = 2
SHAPES = {"z_image": (4, 4, 8), "wan": (16, 2, 4, 4)}
"""Of latents: an image with a critic, and a video of five frames without one."""


def make_teacher(name):
    pipeline = tiny.FAMILIES[name]()
    family = family_of({"_class_name": type(pipeline).__name__})
    tokens = Tokens(family.blocks, 2, family.image_first)
    network = DiffusersNetwork(pipeline.transformer, family.call, tokens, family.lora)
    return NetworkDenoiser(freeze(network), RectifiedFlow(), "flow", 1000.0)


def condition(name, number, generator):
    if name == "wan":
        return {"encoder_hidden_states": torch.randn(number, 5, 32, generator=generator)}
    texts, mask = torch.randn(number, 6, 16, generator=generator), torch.ones(number, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    return {"texts": texts, "mask": mask}


def make_method(name):
    """LoRAs whose second matrices are not zero, so that all of them learn from the first update on."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher, head = make_teacher(name), discriminator_head(32, 2)
    seeded = torch.Generator().manual_seed(0)
    student, fake = shared_backbone(teacher, rank=3, targets=teacher.network.layers, generator=seeded)
    for one in (student, fake):
        for parameter in one.network.changes.parameters():
            parameter.data = torch.randn(parameter.shape, generator=seeded) / 5
    gan = GAN(generator_weight=0.1, critic_weight=0.1) if name == "z_image" else None
    if gan is not None:
        layer = f"backbone.{teacher.network.bottleneck}"
        fake = replace(fake, network=Critic(fake.network, layer, head))
    away = condition(name, 1, seeded)
    return DMD(
        teacher=guided(teacher, 3.0, away), student=Student(student, (1.0,)), fake=fake, shape=SHAPES[name],
        gan=gan, student_every=1,
    )  # fmt: skip


def by_index(rng):
    """The draws of a micro-batch, whichever rank has it."""
    return replace(rng, micro=rng.index, rank=0)


def steps_of(name, accelerator, accumulate):
    """How far the weights of student and fake score have moved after two updates, flat."""
    method = make_method(name)

    def batches(rng):
        generator = by_index(rng)("batch")
        real = torch.randn(B, *SHAPES[name], generator=generator)
        return {"cond": condition(name, B, generator), "real": real}

    networks = {"student": method.student.denoiser.network, "fake": method.fake.network}
    learned = {role: [p for p in one.parameters() if p.requires_grad] for role, one in networks.items()}
    start = {role: torch.cat([p.detach().flatten() for p in ps]) for role, ps in learned.items()}
    phases = [
        replace(phase, loss=lambda batch, rng, own=phase.loss: own(batch, by_index(rng)))
        for phase in method.phases(*(torch.optim.SGD(ps, 1.0) for ps in learned.values()))
    ]
    rollout = lambda batch, due, rng: method.rollout(batch, due, by_index(rng))  # noqa: E731
    list(train(phases, batches, accelerator, steps=2, accumulate=accumulate, rollout=rollout, verify_every=1))
    return {role: torch.cat([p.detach().flatten() for p in ps]) - start[role] for role, ps in learned.items()}
