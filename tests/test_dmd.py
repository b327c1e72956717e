"""DMD, its GAN and regression, few steps, and its relatives: each loss against its formula, each phase alone."""

import copy
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from denoisers import mlp_of, random_denoiser
from refusals import refused
from torch.nn.functional import softplus

from distill.adversarial import critic_accuracy, critic_loss
from distill.diff_instruct import integral_kl
from distill.dmd import DMD, GAN, dmd_weight
from distill.f_distill import FDistill
from distill.regression import Pairs, Regression
from distill.sid import SiD
from distill.student import Student, even_times
from scorefield.denoiser import NetworkDenoiser
from scorefield.gradient import denoising_loss, karras_weight, prediction_weight
from scorefield.guidance import guided
from scorefield.models.networks import ResidualMLP
from scorefield.randomness import Rng
from scorefield.schedule import Karras, RectifiedFlow
from scorefield.times import constant, uniform
from scorefield.training.loop import train

close = torch.testing.assert_close
B = 6
LABELS = {"class_labels": torch.arange(B) % 2}
RNG = Rng(seed=3, step=2)
METHODS = ["DMD", "GAN", "regression", "few-step", "SiD", "f-distill", "Diff-Instruct"]
WITH_GAN = ("GAN", "f-distill")
each_method = pytest.mark.parametrize("method", METHODS)


def make_pairs(dtype=torch.float32):
    noise, x0 = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(9), dtype=dtype).unbind()
    return Pairs(noise, x0, {"class_labels": torch.arange(8) % 2})


def make_dmd(schedule, method="DMD", dtype=torch.float32, **settings):
    """DMD, DMD + GAN, DMD + regression, a two-step student whose fake score is told the step, or a relative."""
    num_steps, listens = 2 if method == "few-step" else 1, method in WITH_GAN
    told = {"num_steps": 2} if num_steps == 2 else {}
    parts = {
        "teacher": random_denoiser(schedule, 0, dtype=dtype),
        "student": Student(random_denoiser(schedule, 1, dtype=dtype), even_times(schedule, num_steps)),
        "fake": random_denoiser(schedule, 2, critic=listens, dtype=dtype, **told),
        "gan": GAN(generator_weight=0.3, critic_weight=0.2) if listens else None,
        "regression": Regression(pairs=make_pairs(dtype), batch=4) if method == "regression" else None,
        "step_key": "step" if num_steps == 2 else None,
    }
    parts |= {"weight": integral_kl()} if method == "Diff-Instruct" else {}
    kind = {"SiD": SiD, "f-distill": FDistill}.get(method, DMD)
    return kind(shape=(2,), **{**parts, **settings})


def make_batch(dtype=torch.float64, seed=5):
    x0, real = torch.randn(2, B, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind()
    return {"x0": x0.clone().requires_grad_(), "real": real, "cond": LABELS, "fake_cond": {}}


def batch_of(rng):
    return {"cond": LABELS, "real": torch.randn(B, 2, generator=rng("real"))}


def networks_of(dmd):
    return {"teacher": dmd.teacher.network, "student": dmd.student.denoiser.network, "fake": dmd.fake.network}


def flat(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def has_gradient(network):
    return [p.grad is not None for p in network.parameters()]


def noised(dmd, purpose, times, x0):
    """t and x_t as the losses draw them."""
    generator = RNG(purpose)
    t = times(len(x0), dmd.fake.schedule, generator)
    return t, dmd.fake.schedule.diffuse(x0, torch.randn(x0.shape, generator=generator, dtype=x0.dtype), t)


def optimise(dmd, accelerator, steps, lr=1e-3):
    networks = networks_of(dmd)
    phases = dmd.phases(*(torch.optim.AdamW(networks[name].parameters(), lr) for name in ("student", "fake")))
    return phases, list(train(phases, batch_of, accelerator, steps=steps, rollout=dmd.rollout))


# Losses.


def test_the_weight_is_one_over_the_mean_distance_of_each_sample_times_alpha_if_asked(schedule, generator):
    x0, target = torch.randn(2, B, 2, 2, generator=generator, dtype=torch.float64).unbind()
    t = schedule.at(torch.linspace(0.1, 0.9, B))
    plain, scaled = (dmd_weight(alpha)(x0, target, t, schedule) for alpha in (False, True))
    assert plain.shape == (B, 1, 1)
    close(plain.flatten(), torch.stack([1 / (x - y).abs().mean() for x, y in zip(x0, target, strict=True)]))
    close(scaled, plain * schedule.alpha(t)[:, None, None])
    parts = [dmd_weight(True)(x0[i], target[i], t[i], schedule) for i in (slice(0, 2), slice(2, B))]
    close(scaled, torch.cat(parts), rtol=0, atol=0)
    target = x0 + torch.tensor([0.0, 1e-9, 1e-6, 1e-3, 1.0, 2.0])[:, None, None]
    clamped = dmd_weight(eps=1e-3)(x0, target, t, schedule).flatten()
    close(clamped, torch.tensor([1e3, 1e3, 1e3, 1e3, 1.0, 0.5], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_students_gradient_is_weight_times_fake_minus_teacher(schedule, alpha, guidance):
    dmd = make_dmd(schedule, dtype=torch.float64, weight=dmd_weight(alpha), gradient_weight=0.7)
    teacher = guided(dmd.teacher, guidance, {"class_labels": torch.tensor([2])})
    dmd, batch = replace(dmd, teacher=teacher), make_batch()
    losses = dmd.student_loss(batch, RNG)
    losses["loss"].backward()
    x0 = batch["x0"].detach()
    t, x_t = noised(dmd, "gradient", uniform(0.02, 0.98), x0)
    with torch.no_grad():
        real, fake = teacher(x_t, t, LABELS), dmd.fake(x_t, t, LABELS)
    weight = 1 / (x0 - real).abs().mean(1, keepdim=True) * (schedule.alpha(t)[:, None] if alpha else 1)
    expected = weight * (fake - real)
    close(batch["x0"].grad, 0.7 * expected / x0.numel(), rtol=1e-10, atol=1e-12)
    assert losses["gradient_rms"].item() == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-5)


def test_the_gan_adds_its_weight_times_the_generators_gradient(schedule, monkeypatch):
    dmd = make_dmd(schedule, "GAN", dtype=torch.float64)
    with_gan, without = make_batch(), make_batch()
    losses = dmd.student_loss(with_gan, RNG)
    losses["loss"].backward()
    plain = replace(dmd, gan=None).student_loss(without, RNG)
    plain["loss"].backward()
    x0 = make_batch()["x0"]
    t, x_t = noised(dmd, "adversarial", dmd.gan.times, x0)
    adversarial = softplus(-dmd.fake.with_extras(x_t, t, LABELS)[1][0]).mean()
    (gradient,) = torch.autograd.grad(adversarial, x0)
    assert gradient.abs().amax(1).min() > 0
    close(with_gan["x0"].grad, without["x0"].grad + 0.3 * gradient, rtol=1e-10, atol=1e-14)
    close(losses["adversarial"], adversarial)
    monkeypatch.delattr("distill.dmd.generator_loss")  # at weight 0 the critic is not even asked
    losses = replace(dmd, gan=GAN(generator_weight=0.0)).student_loss(make_batch(), RNG)
    assert losses.keys() == plain.keys()
    assert torch.equal(losses["loss"], plain["loss"])


def test_regression_adds_its_weight_times_the_distance(schedule):
    dmd = make_dmd(schedule, "regression", dtype=torch.float64)
    batch = make_batch()
    losses = dmd.student_loss(batch, RNG)
    distance = dmd.regression.loss(dmd.student, RNG)
    plain = replace(dmd, regression=None).student_loss(batch, RNG)
    close(losses["regression"], distance)
    close(losses["loss"], plain["loss"] + 0.25 * distance)
    losses["loss"].backward()
    weights = list(dmd.student.denoiser.network.parameters())
    close([p.grad for p in weights], list(torch.autograd.grad(0.25 * distance, weights)))


@pytest.mark.parametrize("own_weight", [False, True])
def test_the_fake_score_without_gan_learns_by_denoising(schedule, own_weight):
    dmd = make_dmd(schedule, dtype=torch.float64, fake_weight=karras_weight(0.3) if own_weight else None)
    batch = make_batch()
    losses = dmd.fake_loss(batch, RNG)
    weight = karras_weight(0.3) if own_weight else prediction_weight(dmd.fake.kind)
    settings = {"times": uniform(0.0, 1.0), "generator": RNG("fake"), "weight": weight}
    expected = denoising_loss(dmd.fake, batch["x0"].detach(), LABELS, **settings)
    close(losses["loss"], expected.mean(), rtol=1e-12, atol=0)
    assert set(losses) == {"denoising", "loss", "t_not_finite_max"}


def test_the_fake_score_with_gan_learns_both_from_one_pass_and_half_of_one_over_real_images(schedule):
    dmd = make_dmd(schedule, "GAN", dtype=torch.float64)
    batch, calls, decoded = make_batch(), [], []
    dmd.fake.network.register_forward_pre_hook(
        lambda module, arguments, cond: calls.append((arguments[0], cond)), with_kwargs=True
    )
    hook = mlp_of(dmd.fake).leave.register_forward_hook(lambda module, arguments, output: decoded.append(output))
    losses = dmd.fake_loss(batch, RNG)
    hook.remove()
    assert [len(output) for output in decoded] == [B]
    images = torch.cat([batch["x0"].detach(), batch["real"]])
    t, x_t = noised(dmd, "fake", dmd.fake_times, images)
    close(torch.cat([x for x, _ in calls]), x_t)
    assert [cond["class_labels"].tolist() for _, cond in calls] == [[0, 1, 0, 1, 0, 1]] * 2
    cond = {"class_labels": torch.cat([LABELS["class_labels"]] * 2)}
    prediction, (logits,) = dmd.fake.with_extras(x_t, t, cond)
    error = (prediction - images).square().mean(1)[:B]
    denoising = (prediction_weight(dmd.fake.kind)(t[:B], schedule) * error).mean()
    critic = critic_loss(real=logits[B:], fake=logits[:B])
    close(losses["denoising"], denoising)
    close(losses["critic"], critic)
    close(losses["loss"], denoising + 0.2 * critic)
    close(losses["critic_accuracy"], critic_accuracy(logits[B:], logits[:B]))


# Who learns.


@each_method
def test_each_phase_teaches_its_own_network_alone(accelerator, schedule, method):
    """No gradient of the student's loss reaches a teacher or fake score that was not frozen; and so on."""
    dmd = make_dmd(schedule, method, student_every=1)
    networks, notes = networks_of(dmd), []
    before = {name: flat(network) for name, network in networks.items()}
    phases = dmd.phases(*(torch.optim.SGD(networks[name].parameters(), 0.1) for name in ("student", "fake")))

    def spied(batch, rng, loss=phases[1].loss):
        notes.append({name: has_gradient(network) for name, network in networks.items()})
        student = [p.grad.clone() for p in networks["student"].parameters()]
        losses = loss(batch, rng)
        gradients = torch.autograd.grad(losses["loss"], list(networks["fake"].parameters()), retain_graph=True)
        assert any(bool((g != 0).any()) for g in gradients)
        unchanged = zip(student, networks["student"].parameters(), strict=True)
        assert all(torch.equal(old, p.grad) for old, p in unchanged)
        assert all(not p.requires_grad for p in networks["student"].parameters())
        return losses

    list(train([phases[0], replace(phases[1], loss=spied)], batch_of, accelerator, steps=1, rollout=dmd.rollout))
    assert all(notes[0]["student"])
    assert not any(notes[0]["fake"] + notes[0]["teacher"] + has_gradient(networks["teacher"]))
    changed = {name: not torch.equal(flat(network), before[name]) for name, network in networks.items()}
    assert changed == {"teacher": False, "student": True, "fake": True}
    batch = dmd.rollout(batch_of(RNG), ("student", "fake"), RNG)
    assert batch["x0"].requires_grad
    dmd.fake_loss(batch, RNG)["loss"].backward()
    assert not any(has_gradient(networks["student"]))
    assert any(has_gradient(networks["fake"]))


@pytest.mark.parametrize("critic", [False, True])
def test_nothing_moves_a_student_whose_fake_score_is_the_teacher(schedule, critic):
    teacher, fake = random_denoiser(schedule, 2), random_denoiser(schedule, 2, critic=critic)
    student = Student(copy.deepcopy(teacher), (schedule.t_max,))
    dmd = make_dmd(schedule, teacher=teacher, fake=fake, student=student)
    batch = dmd.rollout(batch_of(RNG), ("student",), RNG)
    batch["x0"].retain_grad()
    dmd.student_loss(batch, RNG)["loss"].backward()
    assert torch.equal(batch["x0"].grad, torch.zeros(B, 2))
    assert all(bool((p.grad == 0).all()) for p in dmd.student.denoiser.network.parameters())


@pytest.mark.parametrize(("every", "steps", "updates"), [(1, 4, 4), (3, 10, 3), (None, 10, 2), (5, 9, 1)])
def test_the_student_steps_once_for_so_many_fake_updates_five_unless_told(accelerator, every, steps, updates):
    dmd = make_dmd(Karras(), **({"student_every": every} if every else {}))
    phases, reports = optimise(dmd, accelerator, steps=steps)
    assert [phase.every for phase in phases] == [every or 5, 1]
    counts = [int(next(iter(phase.optimizer.state.values()))["step"]) for phase in phases]
    assert counts == [updates, steps]
    assert reports[(every or 5) - 1].phases == ("student", "fake")
    assert Counter(name for report in reports for name in report.phases) == {"student": updates, "fake": steps}


def test_phases_carry_their_ema_and_schedules():
    dmd, parts = make_dmd(Karras()), [SimpleNamespace(param_groups=[]) for _ in range(5)]
    student, fake = dmd.phases(parts[0], parts[1], student_ema=parts[2], student_lr=parts[3], fake_lr=parts[4])
    assert (student.optimizer, student.ema, student.lr_schedule) == (parts[0], parts[2], parts[3])
    assert (fake.optimizer, fake.ema, fake.lr_schedule) == (parts[1], None, parts[4])
    assert (student.network, fake.network) == (dmd.student.denoiser.network, dmd.fake.network)


# Rollouts.


def listen(network):
    conds = []
    network.register_forward_pre_hook(lambda module, a, cond: conds.append(cond), with_kwargs=True)
    return conds


@pytest.mark.parametrize("key", ["step", None])
def test_the_fake_score_alone_is_told_which_step_made_an_image_if_anybody_is(schedule, key):
    fake = random_denoiser(schedule, 2, critic=True, num_steps=2)
    dmd = make_dmd(schedule, "few-step", fake=fake, gan=GAN(), step_key=key)
    heard = {name: listen(network) for name, network in networks_of(dmd).items()}
    steps_seen = set()
    for i in range(8):
        for conds in heard.values():
            conds.clear()
        rng = Rng(0, i)
        batch = dmd.rollout(batch_of(rng), ("student", "fake"), rng)
        made_in = len(heard["student"]) - 1
        steps_seen.add(made_in)
        dmd.student_loss(batch, rng)
        dmd.fake_loss(batch, rng)
        assert len(heard["teacher"]) == 1
        assert all(cond.keys() == {"class_labels"} for cond in heard["teacher"] + heard["student"])
        told = [cond["step"].tolist() if "step" in cond else None for cond in heard["fake"]]
        assert told == [[made_in] * B if key else None] * 4
    assert steps_seen == {0, 1}


def test_the_rollout_is_the_student_at_its_own_noise_with_a_gradient_only_if_it_is_due(schedule):
    dmd = make_dmd(schedule, "few-step")
    for i in range(4):
        rng = Rng(0, i)
        batch = dmd.rollout({**batch_of(rng), "extra": 1}, ("fake",), rng)
        due = dmd.rollout(batch_of(rng), ("student", "fake"), rng)["x0"]
        steps = int(batch["fake_cond"]["step"][0]) + 1
        with torch.no_grad():
            noise = torch.randn(B, 2, generator=rng("noise"))
            expected = dmd.student.simulate(noise, LABELS, steps=steps, generator=rng("simulation"))
        assert (due.requires_grad, batch["x0"].requires_grad) == (True, False)
        assert torch.equal(batch["x0"], expected)
        assert torch.equal(due, expected)
        assert batch["extra"] == 1


def test_ranks_share_the_step_and_not_the_noise():
    dmd, steps = make_dmd(RectifiedFlow(), "few-step"), []
    for i in range(12):
        first, second = (dmd.rollout({"cond": LABELS}, ("fake",), Rng(0, i, rank=rank)) for rank in (0, 1))
        assert torch.equal(first["fake_cond"]["step"], second["fake_cond"]["step"])
        assert not bool((first["x0"] == second["x0"]).any())
        steps.append(int(first["fake_cond"]["step"][0]))
    assert set(steps) == {0, 1}


# What is checked.


@each_method
def test_check_accepts_what_fits_and_leaves_no_gradient(schedule, schedules, method):
    dmd = make_dmd(schedule, method)
    assert dmd.check(batch_of(RNG)) is None
    assert not any(any(has_gradient(network)) for network in networks_of(dmd).values())
    for own, teachers in ((schedules["karras"], schedules["flow"]), (Karras(), Karras(t_max=70.0))):
        with refused("must share a schedule"):
            make_dmd(own, method, teacher=random_denoiser(teachers))


def test_a_batch_without_conditions_says_its_size():
    networks = [ResidualMLP((2,), width=8, depth=1, embedding=8) for _ in range(3)]
    teacher, student, fake = (NetworkDenoiser(network, RectifiedFlow(), "flow") for network in networks)
    dmd = DMD(teacher=teacher, student=Student(student, (1.0,)), fake=fake, shape=(2,))
    dmd.check({"cond": {}, "size": 3})
    assert dmd.rollout({"cond": {}, "size": 3}, (), RNG)["x0"].shape == (3, 2)


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x_t, t, class_labels):
        return torch.cat([x_t, x_t], 1) * self.weight


@pytest.mark.parametrize("role", ["student", "teacher", "fake"])
def test_check_refuses_shapes_that_differ(role):
    wrong = NetworkDenoiser(Wide(), RectifiedFlow(), "flow")
    settings = {role: Student(wrong, (1.0,)) if role == "student" else wrong}
    with refused(r"must return the shape of x_t \(6, 2\); got \(6, 4\)"):
        make_dmd(RectifiedFlow(), **settings).check(batch_of(RNG))


@pytest.mark.parametrize(("method", "settings", "batch", "message"), [
    ("DMD", {"gan": GAN()}, {}, "network is a Critic; it returns no logits"),
    ("DMD", {"shape": (3,)}, {}, r"shape \(2,\); got \(3,\)"),
    ("GAN", {}, {"real": None}, "real"),  # found before any work starts rather than in the first fake update
    ("few-step", {"regression": Regression(pairs=make_pairs())}, {}, "needs teacher pairs with states"),
])  # fmt: skip
def test_check_refuses_parts_that_do_not_fit(method, settings, batch, message):
    dmd = replace(make_dmd(RectifiedFlow(), method), **settings)
    batch = {name: value for name, value in {**batch_of(RNG), **batch}.items() if value is not None}
    with refused(message):
        dmd.check(batch)
    for every in (0, -1):
        with refused(f"student_every must be at least 1; got {every}"):
            make_dmd(Karras(), student_every=every)


def one_iteration(dmd, rng):
    batch = dmd.rollout(batch_of(rng), ("student", "fake"), rng)
    return batch["x0"], {"student": dmd.student_loss(batch, rng), "fake": dmd.fake_loss(batch, rng)}


@each_method
@pytest.mark.parametrize("end", ["drawn", "t_min", "t_max"])
def test_contract_shape_dtype_finite_and_reproducible(schedule, method, end):
    settings = {}
    if end != "drawn":
        times = constant(getattr(schedule, end))
        settings = {"times": times, "fake_times": times}
        settings |= {"gan": GAN(times=times)} if method in WITH_GAN else {}
    dmd = make_dmd(schedule, method, **settings)
    x0, losses = one_iteration(dmd, RNG)
    assert (x0.shape, x0.dtype) == ((B, 2), torch.float32)
    assert bool(x0.isfinite().all())
    again, same = one_iteration(make_dmd(schedule, method, **settings), RNG)
    assert torch.equal(x0, again)
    for phase, terms in losses.items():
        assert {name: value.shape for name, value in terms.items()} == dict.fromkeys(terms, torch.Size([]))
        assert [name for name, value in terms.items() if not value.isfinite()] == [], phase
        assert all(torch.equal(value, same[phase][name]) for name, value in terms.items())
        weights = list(networks_of(dmd)[phase].parameters())
        gradients = torch.autograd.grad(terms["loss"], weights, retain_graph=True, allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    assert not torch.equal(x0, one_iteration(dmd, replace(RNG, seed=4))[0])


def test_distillation_moves_the_student_towards_the_teacher(accelerator, make_mixture):
    """One line of evidence that the sign is right: the student's mean goes to the data's."""
    schedule = Karras()
    dmd = make_dmd(
        schedule, teacher=make_mixture(schedule, shift=3.0), student_every=1, fake_weight=karras_weight()
    )

    def distance():
        noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(1))
        made = dmd.student.sample(noise, {"class_labels": torch.arange(256) % 2})
        return (made.mean(0) - 3.0).square().mean().item()

    before = distance()
    networks = (dmd.student.denoiser.network, dmd.fake.network)
    phases = dmd.phases(*(torch.optim.AdamW(network.parameters(), 2e-3) for network in networks))
    list(train(phases, batch_of, accelerator, steps=150, rollout=dmd.rollout))
    assert distance() < before / 2
