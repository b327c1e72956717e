"""What two ranks do together, as each start costs seconds; imported by tests for one rank's answer."""

from dataclasses import dataclass, replace
from typing import ClassVar
from unittest.mock import patch

import torch
from torch import nn
from workers import backbone_ranks

from distill.adversarial import Critic, discriminator_head
from distill.dmd import DMD, GAN
from distill.regression import Pairs, Regression
from distill.student import Student, even_times
from scorefield.denoiser import KarrasPreconditioning, NetworkDenoiser, freeze
from scorefield.gradient import TIME_NOT_FINITE
from scorefield.models.networks import ResidualMLP
from scorefield.models.storage import save_denoiser
from scorefield.randomness import Rng, shuffled
from scorefield.schedule import Karras, RectifiedFlow
from scorefield.training import loop as training
from scorefield.training.loop import EMA, Phase, train
from scorefield.training.ranks import check_same

SHARE = 4
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


class Joined(torch.Generator):
    """Stands for the generators of several micro-batches and ranks, whose samples one batch holds."""

    parts: ClassVar[list[torch.Generator]] = []


@dataclass(frozen=True)
class JoinedRng(Rng):
    """The draws that ``micros`` micro-batches on each of ``ranks`` ranks would make, for one batch of all."""

    micros: ClassVar[int] = 1
    ranks: ClassVar[int] = 2

    def __call__(self, purpose):
        joined = Joined()
        places = [(micro, rank) for micro in range(self.micros) for rank in range(self.ranks)]
        joined.parts = [Rng(self.seed, self.step, micro, rank)(purpose) for micro, rank in places]
        return joined


def joined_draw(draw):
    """``torch.rand`` or ``torch.randn`` that takes a :class:`Joined` too."""

    def function(*size, generator=None, **options):
        if not isinstance(generator, Joined):
            return draw(*size, generator=generator, **options)
        n, *shape = size[0] if isinstance(size[0], tuple | torch.Size) else size
        # The fake score's batch is student's images, then real ones: each part draws for its share of both.
        total = len(generator.parts) * SHARE
        drawn = [draw(n // len(generator.parts), *shape, generator=g, **options) for g in generator.parts]
        return torch.cat([rows.reshape(n // total, SHARE, *shape) for rows in drawn], 1).reshape(n, *shape)

    return function


class Recorder(torch.optim.SGD):
    """Notes the gradients it is given, and whether other networks hold any."""

    def watch(self, others, notes):
        self.others, self.notes = others, notes
        return self

    def step(self, closure=None):
        gradients = [p.grad.clone().flatten() for group in self.param_groups for p in group["params"]]
        alone = [all(p.grad is None for p in network.parameters()) for network in self.others]
        self.notes.append({"gradient": torch.cat(gradients), "others_are_none": alone})
        return super().step(closure)


def gradients(accelerator, dtype, accumulate, joined):
    """Gradients of student, fake score and critic in four steps; one rank holds the batch of two if ``joined``."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    student, fake, teacher = (ResidualMLP((2,), 2, width=16, depth=2, embedding=8) for _ in range(3))
    critic = KarrasPreconditioning(Critic(fake, fake.bottleneck, discriminator_head(16)))
    for p in [*student.parameters(), *critic.parameters(), *teacher.parameters()]:
        p.data.normal_(0, 0.2)
    roles = [accelerator.prepare(role) for role in (KarrasPreconditioning(student), critic)]
    schedule = Karras()
    method = DMD(
        teacher=NetworkDenoiser(freeze(KarrasPreconditioning(teacher)), schedule, "x0"),
        student=Student(NetworkDenoiser(roles[0], schedule, "x0"), even_times(schedule, 1)),
        fake=NetworkDenoiser(roles[1], schedule, "x0"),
        shape=(2,), student_every=2, gan=GAN(generator_weight=0.1, critic_weight=0.1),
    )  # fmt: skip
    parts = accumulate * 2 if joined else 1

    def batches(rng):
        place = 0 if joined else 2 * rng.micro + rng.rank
        chosen = torch.arange(place * SHARE, (place + parts) * SHARE) % len(DATA)
        return {"cond": {"class_labels": chosen % 2}, "real": DATA[chosen, :2].to(dtype)}

    notes = {"student": [], "fake": []}
    optimizers = [
        Recorder(role.parameters(), 0.05).watch([other, teacher], notes[name])
        for name, role, other in (("student", roles[0], roles[1]), ("fake", roles[1], roles[0]))
    ]
    micros = 1 if joined else accumulate
    student_phase, fake_phase = method.phases(*optimizers)
    leaks = []

    def fake_loss(batch, rng):
        if rng.micro == 0:  # the student's backward is done, the fake score's is not
            leaks.append(any(p.grad is not None for p in roles[1].parameters()))
        return method.fake_loss(batch, rng)

    phases = [student_phase, replace(fake_phase, loss=fake_loss)]
    reports = train(phases, batches, accelerator, steps=4, accumulate=micros,
                    rollout=method.rollout)  # fmt: skip
    for _ in reports:
        pass
    torch.set_default_dtype(torch.float32)
    weights = torch.cat([flat(role) for role in roles])
    return {
        **notes,
        "leaks": leaks,
        "weights": weights,
        "head": sum(p.numel() for p in critic.network.head.parameters()),
    }


def joined_gradients(accelerator, dtype, accumulate):
    """:func:`gradients` on one rank that holds all samples of two."""
    JoinedRng.micros, JoinedRng.ranks = accumulate, 2
    with (
        patch.object(training, "Rng", JoinedRng), patch.object(torch, "rand", joined_draw(torch.rand)),
        patch.object(torch, "randn", joined_draw(torch.randn)),
    ):  # fmt: skip
        return gradients(accelerator, dtype, accumulate, joined=True)


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


def not_finite(accelerator):
    """Only the second rank meets a bad sample; both must stop, and say the same t."""
    network = nn.Linear(3, 3)

    def loss(batch, rng):
        bad = accelerator.process_index == 1 and rng.step == 1
        value = network(torch.ones(1, 3)).square().mean() * (float("nan") if bad else 1.0)
        return {"loss": value, TIME_NOT_FINITE: torch.tensor(0.7 if bad else -1.0)}

    phase = Phase(name="bad", network=network, optimizer=torch.optim.SGD(network.parameters(), 0.1), loss=loss)
    try:
        for _ in train([phase], lambda rng: None, accelerator, steps=4):
            pass
    except FloatingPointError as error:
        return str(error)
    return ""


def disagree(accelerator):
    try:
        check_same("the step", 3 * accelerator.process_index, "Share.", accelerator)
    except ValueError as error:
        return str(error)
    return ""


def starts(folder, rank):
    """What a rank is told, and whether anything was written, where options, code, inputs or nothing differ."""
    from distill.options import Config
    from scorefield.training import identity as starting
    from scorefield.training import run as running

    real, said, out = starting.code_hash, {}, folder / "starts"
    for what in ("option", "code", "input", "nothing"):
        message, config = "", Config(out=out, student_every=2 + rank if what == "option" else 2)
        with patch.object(starting, "code_hash", (lambda: "another") if what == "code" and rank else real):
            try:
                accelerator = running.start(config)
                own = starting.identity(config, accelerator, {"data": str(rank if what == "input" else 0)})
                running.resume(config, [], accelerator, own)
                accelerator.wait_for_everyone()  # the first rank writes
            except ValueError as error:
                message = str(error)
        said[what] = (message, out.exists())
    return said


def distil_by_script(folder, rank):
    """The default recipe of train_dmd.py at a rate that spoils the student: the run goes back, and then ends.

    Its GAN term takes the teacher's images for real. What each rank ends with, and what it went back to.
    """
    import distill.options as distill_options
    import distill.recipe as train_dmd
    import distill.stages as stages

    network = ResidualMLP((1, 4, 4), num_classes=2, width=16, depth=2)
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.2)
    options = {"shape": [1, 4, 4], "num_classes": 2, "network": "mlp", "options": {"width": 16, "depth": 2}}
    teacher = NetworkDenoiser(network, RectifiedFlow(), "flow")
    save_denoiser(teacher, folder / f"teacher{rank}", options)  # one path on both machines, of one content
    config = replace(
        distill_options.auto(), teacher=str(folder / f"teacher{rank}"), out=folder / "run", steps=12, batch_size=8,
        student_every=1, warmup_steps=4, num_pairs=30, pair_steps=2, fake_warmup=2, guard_images=64, guard_every=4,
        max_setbacks=1, student_lr=0.5, reals="teacher", save_every=6, log_every=4, skip_teacher_check=True,
    )  # fmt: skip
    notes, match, distil_all = {}, stages.match_guarded, train_dmd.distil

    def matched(*args):
        match(*args)
        guarded = args[-1]
        notes.update(best=guarded.best[0], setbacks=guarded.setbacks, ended=guarded.ended)

    def distilled(*args, **settings):
        student = distil_all(*args, **settings)
        notes["weights"] = flat(student.denoiser.network)
        return student

    with patch.object(stages, "match_guarded", matched), patch.object(train_dmd, "distil", distilled):
        train_dmd.main(config)
    return notes


def answers(accelerator, folder):
    """All of the above, on a rank."""
    rank = accelerator.process_index
    found = {
        "noisy": noisy(accelerator),
        "from_index": from_index(accelerator, steps=5, accumulate=1),
        "from_index_accumulated": from_index(accelerator, steps=5, accumulate=2, batch_size=2),
        "wrapped": distil(accelerator, wrapped=True),
        "unwrapped": distil(accelerator, wrapped=False),
        **{
            f"gradients_{dtype}_{accumulate}": gradients(accelerator, dtype, accumulate, joined=False)
            for dtype in (torch.float64, torch.float32)
            for accumulate in (1, 2)
        },
        "not_finite": not_finite(accelerator),
        "disagree": disagree(accelerator),
        "backbone": backbone_ranks.all_steps(accelerator),
        "complaint": part_company(accelerator, every=1),
        "complaint_not_due": part_company(accelerator, every=3),
    }
    found["starts"] = starts(folder, rank)
    found["script"] = distil_by_script(folder, rank)  # the last, as it parts the ranks at its end
    return found
