"""What ranks do that hold networks in pieces, and the same work by one rank that holds all of it."""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import tiny_pipelines
import torch
from workers.two_ranks import DATA, SHARE, JoinedRng, joined_draw

from distill.adversarial import Critic, discriminator_head, features_at, logits_alone
from distill.dmd import DMD, GAN
from distill.student import Student, even_times
from scorefield.denoiser import KarrasPreconditioning, NetworkDenoiser, freeze
from scorefield.models.networks import DiffusersNetwork, ResidualMLP
from scorefield.schedule import Karras
from scorefield.training import checkpoint, loop
from scorefield.training.loop import EMA, Phase, train
from scorefield.training.sharding import duplicate, local, make_mesh, shard, whole

RUNS = ((torch.float64, 2), (torch.float32, 1))
"""Precision and micro-batches."""

STUDENT_EVERY, STEPS, MIDDLE = 2, 6, "network.blocks.1"


def networks(dtype, width=16, seed=0):
    """Student, critic and teacher, the same in every process; ``seed`` is of those that learn."""
    student, fake, teacher = (ResidualMLP((2,), 2, width=width, depth=3, embedding=8) for _ in range(3))
    critic = KarrasPreconditioning(Critic(fake, fake.bottleneck, discriminator_head(width)))
    made = [KarrasPreconditioning(student), critic, freeze(KarrasPreconditioning(teacher))]
    for network in made:
        drawn = torch.Generator().manual_seed(99 if network is made[-1] else seed)
        for p in network.parameters():
            p.data = 0.2 * torch.randn(p.shape, generator=drawn)
        network.to(dtype)
    return made


def in_pieces(accelerator, made, pieces):
    """The networks, each on ``pieces`` ranks; with 1 as they are."""
    if pieces == 1:
        return made
    mesh = make_mesh("cpu", accelerator.num_processes, pieces)
    return [shard(network, mesh) for network in made]


@dataclass
class Cycle:
    """A distillation: its method, its phases, and what it has learned."""

    method: Any
    phases: Any

    def held(self):
        """Networks by name."""
        student, fake = self.phases
        return {"student": student.network, "critic": fake.network, "average": student.ema.network}

    def weights(self):
        """All weights, on the first rank."""
        return {
            f"{role}.{name}": x
            for role, network in self.held().items()
            for name, x in whole(network).state_dict().items()
        }


def make_cycle(accelerator, dtype, pieces=1, gan=True, **settings):
    student, critic, teacher = in_pieces(accelerator, networks(dtype, **settings), pieces)
    schedule = Karras()
    method = DMD(
        teacher=NetworkDenoiser(teacher, schedule, "x0"),
        student=Student(NetworkDenoiser(student, schedule, "x0"), even_times(schedule, 1)),
        fake=NetworkDenoiser(critic, schedule, "x0"),
        shape=(2,), student_every=STUDENT_EVERY, gan=GAN(generator_weight=0.1, critic_weight=0.1) if gan else None,
    )  # fmt: skip
    optimizers = [torch.optim.AdamW(role.parameters(), 1e-3, fused=True) for role in (student, critic)]
    return Cycle(method, method.phases(*optimizers, student_ema=EMA(student, 0.9)))


def learn(cycle, accelerator, dtype, accumulate=1, joined_ranks=0):
    """Gradient norms of six iterations under clipping; one rank has the batch of several."""
    parts = accumulate * joined_ranks if joined_ranks else 1

    def batches(rng):
        place = 0 if joined_ranks else accelerator.num_processes * rng.micro + rng.rank
        chosen = torch.arange(place * SHARE, (place + parts) * SHARE) % len(DATA)
        return {"cond": {"class_labels": chosen % 2}, "real": DATA[chosen, :2].to(dtype)}

    torch.set_default_dtype(dtype)
    reports = train(
        cycle.phases, batches, accelerator, steps=STEPS, accumulate=1 if joined_ranks else accumulate,
        rollout=cycle.method.rollout, clip_norm=0.12, verify_every=1,
    )  # fmt: skip
    named = [item for report in reports for item in report.metrics.items()]
    torch.set_default_dtype(torch.float32)
    return torch.stack([value.double() for name, value in named if name.endswith("grad_norm")])


def distilled(accelerator, dtype, pieces, accumulate=1, **settings):
    """Norms and weights of a DMD cycle with GAN term, average and clipping."""
    cycle = make_cycle(accelerator, dtype, pieces, **settings)
    return {"norms": learn(cycle, accelerator, dtype, accumulate), **cycle.weights()}


def distilled_by_one(accelerator, dtype, ranks, accumulate=1, **settings):
    """:func:`distilled` on one rank that holds the samples of ``ranks``."""
    JoinedRng.micros, JoinedRng.ranks = accumulate, ranks
    cycle = make_cycle(accelerator, dtype, **settings)
    with (
        patch.object(loop, "Rng", JoinedRng), patch.object(torch, "rand", joined_draw(torch.rand)),
        patch.object(torch, "randn", joined_draw(torch.randn)),
    ):  # fmt: skip
        norms = learn(cycle, accelerator, dtype, accumulate, ranks)
    return {"norms": norms, **cycle.weights()}


def answers(cycle):
    """What a critic says and hears, asked alone, with the gradient to its input."""
    x_t, t = DATA[:4, :2].float().clone().requires_grad_(True), torch.full((4,), 0.7)
    cond = {"class_labels": torch.arange(4) % 2}
    fake = cycle.method.fake
    for p in fake.network.parameters():
        p.requires_grad_(False)
    logits = logits_alone(fake, x_t, t, cond)
    logits.sum().backward()
    with torch.no_grad():
        heard = features_at(cycle.method.teacher, MIDDLE, x_t, t, cond)
    for p in fake.network.parameters():
        p.requires_grad_(True)
    return {"logits": logits.detach(), "gradient": x_t.grad, "features": heard}


def held_bytes(cycle):
    """Bytes of this rank: weights, average, optimiser states."""
    states = [x for phase in cycle.phases for s in phase.optimizer.state.values() for x in s.values() if x.ndim]
    weights = [p for network in cycle.held().values() for p in network.parameters()]
    return torch.tensor([sum(local(x).nbytes for x in many) for many in (weights, states)])


def kept(accelerator, folder, pieces):
    """A checkpoint of pieces, read again into other pieces; and one of whole networks, read into pieces."""
    cycle, other = make_cycle(accelerator, torch.float32, pieces), None
    learn(cycle, accelerator, torch.float32)
    checkpoint.save(folder / "pieces", STEPS, cycle.phases, {}, writes=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    found = {"saved": cycle.weights()}
    for name in ("pieces", "whole"):
        other = make_cycle(accelerator, torch.float32, pieces, seed=1)
        assert checkpoint.load(folder / name, other.phases, {}) == STEPS
        found[f"read {name}"] = other.weights()
        if name == "pieces":
            states = zip(*(x.phases[1].optimizer.state.values() for x in (cycle, other)), strict=True)
            found["same states"] = all(
                torch.equal(local(one[key]), local(two[key])) for one, two in states for key in one
            )
            found["goes on"] = [learn(x, accelerator, torch.float32) for x in (cycle, other)]
    return found


def denoised(accelerator, make, pieces, accumulate=1, recompute=False):
    """Weights after three steps on samples by number, whatever the layout of ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().double().requires_grad_(True)
    if recompute:
        network.model.enable_gradient_checkpointing()
    (network,) = in_pieces(accelerator, [network], pieces)
    drawn = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, 8, 8, generator=drawn, dtype=torch.float64)
    states = torch.randn(12, 5, 32, generator=drawn, dtype=torch.float64)

    def loss(rows, rng):
        t = 80.0 * (rows + 1).double()
        output = network(x[rows], t, encoder_hidden_states=states[rows])
        return {"loss": (output - x[rows].roll(1, 2)).square().mean()}

    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
    phase = Phase(name="net", network=network, optimizer=optimizer, loss=loss, ema=EMA(network, 0.9))
    reports = train(
        [phase], lambda rng: (2 * rng.index + torch.arange(2)) % 12, accelerator, steps=3, accumulate=accumulate,
        clip_norm=0.5,
    )  # fmt: skip
    norms = torch.stack([report.metrics["net/grad_norm"].double() for report in reports])
    return {"norms": norms, **whole(phase.ema.network).state_dict()}


def unet():
    return DiffusersNetwork(tiny_pipelines.text_unet())


def copied(accelerator, pieces):
    """A copy of a network in pieces answers as it does, and is its own."""
    cycle = make_cycle(accelerator, torch.float32, pieces)
    network = cycle.method.student.denoiser.network
    other = duplicate(network)
    inputs = (DATA[:4, :2].float(), torch.full((4,), 0.7), torch.arange(4) % 2)
    with torch.no_grad():
        before = network(inputs[0], inputs[1], class_labels=inputs[2])
        for p in network.parameters():
            local(p).zero_()
        after = other(inputs[0], inputs[1], class_labels=inputs[2])
    return torch.equal(before, after)


def main(accelerator, folder):
    """All of it, on two ranks."""
    pieces = accelerator.num_processes
    found = {f"{dtype} {number}": distilled(accelerator, dtype, pieces, number) for dtype, number in RUNS}
    cycle = make_cycle(accelerator, torch.float32, pieces, width=64)
    found["answers"] = answers(make_cycle(accelerator, torch.float32, pieces))
    learn(cycle, accelerator, torch.float32)
    found["bytes"] = held_bytes(cycle)
    found["kept"] = kept(accelerator, folder, pieces)
    found["copied"] = copied(accelerator, pieces)
    found["unet"] = denoised(accelerator, unet, pieces, recompute=True)
    return found
