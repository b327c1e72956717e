"""What two ranks do; run by torchrun, and imported by test_training for one rank's answer."""

import sys
from pathlib import Path

import torch
from torch import nn

from distill.adversarial import Critic, discriminator_head
from distill.dmd import DMD, GAN
from distill.regression import Pairs, Regression
from distill.student import Student, even_times
from score.denoiser import KarrasPreconditioning, NetworkDenoiser
from score.network import ResidualMLP
from score.randomness import shuffled
from score.schedule import Karras
from score.training import EMA, Phase, train

DATA = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def flat(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def noisy(accelerator):
    """A loss with noise of its own, from weights that differ between ranks at the start."""
    torch.manual_seed(accelerator.process_index)
    network, noises = nn.Linear(3, 3), []

    def loss(batch, rng):
        noises.append(torch.randn(4, 3, generator=rng("noise")))
        return {"loss": (network(noises[-1]) - 1).square().mean()}

    phase = Phase(
        name="net", network=network, optimizer=torch.optim.AdamW(network.parameters(), 0.1), loss=loss,
        ema=EMA(network, 0.9),
    )  # fmt: skip
    for _ in train([phase], lambda rng: None, accelerator, steps=3, verify_every=1):
        pass
    return {"noise": torch.stack(noises), "weights": flat(network), "ema": flat(phase.ema.network)}


def from_index(accelerator, steps, accumulate, batch_size=4):
    """Batches by index and a loss without noise: the layout of ranks must not matter."""
    torch.manual_seed(0)
    a, b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def phase(name, network, every):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        return Phase(name=name, network=network, optimizer=optimizer, every=every,
                     loss=lambda x, rng: {"loss": (network(x).tanh() - x.roll(1, 1)).square().mean()})  # fmt: skip

    def batches(rng):
        return DATA[shuffled(len(DATA), batch_size, rng)]

    phases = [phase("a", a, 2), phase("b", b, 1)]
    for _ in train(phases, batches, accelerator, steps=steps, accumulate=accumulate):
        pass
    return torch.cat([flat(a), flat(b)])


def distil(accelerator, wrapped):
    """DMD with every term: the student calls the fake, the fake listens with a critic, pairs call the student."""
    torch.manual_seed(0)
    student, fake, teacher = (ResidualMLP((2,), 2, width=16, depth=2, embedding=8) for _ in range(3))
    for p in [*student.parameters(), *fake.parameters(), *teacher.parameters()]:
        p.data.normal_(0, 0.2)
    critic = KarrasPreconditioning(Critic(fake, fake.bottleneck, discriminator_head(16)))
    roles = [KarrasPreconditioning(student), critic]
    prepared = [accelerator.prepare(role) for role in roles] if wrapped else roles
    schedule = Karras()
    labels = {"class_labels": torch.arange(8) % 2}
    pairs = Pairs(torch.randn(8, 2), torch.randn(8, 2), labels)
    method = DMD(
        teacher=NetworkDenoiser(KarrasPreconditioning(teacher), schedule, "x0"),
        student=Student(NetworkDenoiser(prepared[0], schedule, "x0"), even_times(schedule, 1)),
        fake=NetworkDenoiser(prepared[1], schedule, "x0"),
        shape=(2,), student_every=2, gan=GAN(generator_weight=0.1, critic_weight=0.1),
        regression=Regression(pairs=pairs, batch=4),
    )  # fmt: skip

    def batches(rng):
        return {"cond": {"class_labels": torch.arange(4) % 2}, "real": DATA[:4, :2].float()}

    optimizers = [torch.optim.SGD(role.parameters(), 0.05, momentum=0.9) for role in prepared]
    phases = method.phases(*optimizers)
    for _ in train(phases, batches, accelerator, steps=4, accumulate=2, rollout=method.rollout, clip_norm=1.0):
        pass
    return torch.cat([flat(role) for role in roles])


def part_company(accelerator, every):
    """Weights that differ between ranks are noticed."""
    network = nn.Linear(3, 3)
    phase = Phase(
        name="lost", network=network, optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss=lambda batch, rng: {"loss": network(torch.ones(1, 3)).square().mean()}, every=every,
    )  # fmt: skip
    try:
        for _ in train([phase], lambda rng: None, accelerator, steps=4, verify_every=2):
            network.weight.data += accelerator.process_index
    except RuntimeError as error:
        return str(error)
    return ""


def main(folder):
    from accelerate import Accelerator

    torch.set_num_threads(1)
    accelerator = Accelerator()
    assert accelerator.num_processes == 2, "torchrun started separate runs"
    answers = {
        "noisy": noisy(accelerator),
        "from_index": from_index(accelerator, steps=5, accumulate=1),
        "from_index_accumulated": from_index(accelerator, steps=5, accumulate=2, batch_size=2),
        "wrapped": distil(accelerator, wrapped=True),
        "unwrapped": distil(accelerator, wrapped=False),
        "complaint": part_company(accelerator, every=1),
        "complaint_not_due": part_company(accelerator, every=3),
    }
    torch.save(answers, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
