import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from distill.adversarial import Critic, critic_accuracy, critic_loss, discriminator_head
from distill.diff_instruct import integral_kl
from distill.dmd import DMD, GAN, dmd_weight
from distill.f_distill import FDistill
from distill.regression import Pairs, Regression, squared_error
from distill.sid import SiD
from distill.student import Student, even_times
from scorefield.denoiser import KarrasPreconditioning, NetworkDenoiser
from scorefield.gradient import denoising_loss, karras_weight, prediction_weight
from scorefield.guidance import guided
from scorefield.models.networks import ResidualMLP
from scorefield.randomness import Rng
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.times import constant, uniform
from scorefield.training.loop import train

close = torch.testing.assert_close
B = 6
LABELS = {"class_labels": torch.arange(B) % 2}
KINDS = {Karras: "x0", RectifiedFlow: "flow", VariancePreserving: "eps"}
RNG = Rng(seed=3, step=2)


def make_denoiser(schedule, seed, critic=False, num_steps=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ResidualMLP((2,), num_classes=2, width=16, depth=2, embedding=8, num_steps=num_steps)
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.3)
        inner = Critic(network, network.bottleneck, discriminator_head(16)) if critic else network
    whole = KarrasPreconditioning(inner) if isinstance(schedule, Karras) else inner
    scale = 1e-3 if isinstance(schedule, VariancePreserving) else 1.0
    return NetworkDenoiser(whole.to(dtype), schedule, KINDS[type(schedule)], scale)


def mlp_of(denoiser):
    return next(module for module in denoiser.network.modules() if isinstance(module, ResidualMLP))


def make_pairs(dtype):
    noise, x0 = torch.randn(2, 8, 2, generator=torch.Generator().manual_seed(9), dtype=dtype).unbind()
    return Pairs(noise, x0, {"class_labels": torch.arange(8) % 2})


def make_dmd(schedule, method="DMD", dtype=torch.float32, **settings):
    """DMD, DMD + GAN, DMD + regression, a two-step student whose fake score is told the step, or a relative."""
    num_steps = 2 if method == "few-step" else 1
    listens = method in WITH_GAN
    parts = {
        "teacher": make_denoiser(schedule, 0, dtype=dtype),
        "student": Student(make_denoiser(schedule, 1, dtype=dtype), even_times(schedule, num_steps)),
        "fake": make_denoiser(schedule, 2, listens, 2 if num_steps == 2 else 0, dtype),
        "gan": GAN(generator_weight=0.3, critic_weight=0.2) if listens else None,
        "regression": Regression(pairs=make_pairs(dtype), batch=4) if method == "regression" else None,
        "step_key": "step" if num_steps == 2 else None,
    }
    parts |= {"weight": integral_kl()} if method == "Diff-Instruct" else {}
    kind = {"SiD": SiD, "f-distill": FDistill}.get(method, DMD)
    return kind(shape=(2,), **{**parts, **settings})


METHODS = ["DMD", "GAN", "regression", "few-step", "SiD", "f-distill", "Diff-Instruct"]
WITH_GAN = ("GAN", "f-distill")


def make_batch(dtype=torch.float64, seed=5, grad=True):
    x0, real = torch.randn(2, B, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind()
    return {"x0": x0.clone().requires_grad_(grad), "real": real, "cond": LABELS, "fake_cond": {}}


def networks_of(dmd):
    return {"teacher": dmd.teacher.network, "student": dmd.student.denoiser.network, "fake": dmd.fake.network}


def flat(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def has_gradient(network):
    return [p.grad is not None for p in network.parameters()]


def draws(dmd, purpose, times, like):
    generator = RNG(purpose)
    t = times(len(like), dmd.fake.schedule, generator)
    return t, torch.randn(like.shape, generator=generator, dtype=like.dtype)


def optimise(dmd, accelerator, steps, **settings):
    networks = networks_of(dmd)
    optimizers = [torch.optim.AdamW(networks[name].parameters(), 1e-3) for name in ("student", "fake")]
    phases = dmd.phases(*optimizers)
    reports = list(
        train(phases, lambda rng: batch_of(rng), accelerator, steps=steps, rollout=dmd.rollout, **settings)
    )
    return phases, reports


def batch_of(rng):
    return {"cond": LABELS, "real": torch.randn(B, 2, generator=rng("real"))}


@pytest.fixture
def vector(generator):
    x0, target = torch.randn(2, B, 2, 2, generator=generator, dtype=torch.float64).unbind()
    return x0, target, torch.linspace(0.1, 0.9, B)


def test_the_weight_is_one_over_the_mean_distance_of_each_sample(schedule, vector):
    x0, target, t = vector
    weight = dmd_weight()(x0, target, t, schedule)
    assert weight.shape == (B, 1, 1)
    expected = [1 / (x - y).abs().mean() for x, y in zip(x0, target, strict=True)]
    close(weight.flatten(), torch.stack(expected))


def test_alpha_in_the_gradient_multiplies_by_alpha(schedules, vector):
    x0, target, t = vector
    for schedule in schedules.values():
        times = schedule.at(t)
        plain, scaled = (dmd_weight(on)(x0, target, times, schedule) for on in (False, True))
        close(scaled, plain * schedule.alpha(times)[:, None, None])
    assert bool((schedules["vp"].alpha(schedules["vp"].at(t)) < 1).all())


def test_the_divisor_is_clamped(vector):
    x0, _, t = vector
    target = x0 + torch.tensor([0.0, 1e-9, 1e-6, 1e-3, 1.0, 2.0])[:, None, None]
    weight = dmd_weight(eps=1e-3)(x0, target, t, Karras()).flatten()
    close(weight, torch.tensor([1e3, 1e3, 1e3, 1e3, 1.0, 0.5], dtype=torch.float64), rtol=1e-6, atol=0)


def test_two_batches_in_one_are_weighted_as_two(schedule, vector):
    x0, target, t = vector
    weigh = dmd_weight(alpha_in_gradient=True)
    parts = [weigh(x0[i], target[i], t[i], schedule) for i in (slice(0, 2), slice(2, B))]
    close(weigh(x0, target, t, schedule), torch.cat(parts), rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_students_gradient_is_weight_times_fake_minus_teacher(schedule, alpha, guidance):
    dmd = make_dmd(schedule, dtype=torch.float64, weight=dmd_weight(alpha), gradient_weight=0.7)
    null = {"class_labels": torch.tensor([2])}
    teacher = guided(dmd.teacher, guidance, null)
    dmd, batch = replace(dmd, teacher=teacher), make_batch()
    losses = dmd.student_loss(batch, RNG)
    losses["loss"].backward()
    x0 = batch["x0"].detach()
    t, noise = draws(dmd, "gradient", uniform(0.02, 0.98), x0)
    x_t = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * noise
    with torch.no_grad():
        real, fake = teacher(x_t, t, LABELS), dmd.fake(x_t, t, LABELS)
    weight = 1 / (x0 - real).abs().mean(1, keepdim=True) * (schedule.alpha(t)[:, None] if alpha else 1)
    expected = weight * (fake - real)
    close(batch["x0"].grad, 0.7 * expected / x0.numel(), rtol=1e-10, atol=1e-12)
    assert losses["gradient_rms"].item() == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-5)


def test_the_gan_adds_its_weight_times_the_generators_gradient(schedule):
    dmd = make_dmd(schedule, "GAN", dtype=torch.float64)
    with_gan, without = make_batch(), make_batch()
    losses = dmd.student_loss(with_gan, RNG)
    losses["loss"].backward()
    replace(dmd, gan=None).student_loss(without, RNG)["loss"].backward()
    x0 = make_batch()["x0"]
    t, noise = draws(dmd, "adversarial", dmd.gan.times, x0)
    x_t = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * noise
    logits = dmd.fake.with_extras(x_t, t, LABELS)[1][0]
    adversarial = softplus(-logits).mean()
    (gradient,) = torch.autograd.grad(adversarial, x0)
    assert gradient.abs().amax(1).min() > 0
    close(with_gan["x0"].grad, without["x0"].grad + 0.3 * gradient, rtol=1e-10, atol=1e-14)
    close(losses["adversarial"], adversarial)


def test_a_critic_of_weight_zero_is_not_asked_about_the_students_images(schedule, monkeypatch):
    dmd = make_dmd(schedule, "GAN", dtype=torch.float64)
    heard, without = make_batch(), make_batch()
    monkeypatch.delattr("distill.dmd.generator_loss")
    losses = replace(dmd, gan=GAN(generator_weight=0.0)).student_loss(heard, RNG)
    expected = replace(dmd, gan=None).student_loss(without, RNG)
    assert losses.keys() == expected.keys()
    assert torch.equal(losses["loss"], expected["loss"])


def test_regression_adds_its_weight_times_the_distance(schedule):
    dmd = make_dmd(schedule, "regression", dtype=torch.float64)
    batch = make_batch()
    losses = dmd.student_loss(batch, RNG)
    distance = dmd.regression.loss(dmd.student, RNG)
    plain = replace(dmd, regression=None).student_loss(batch, RNG)
    close(losses["regression"], distance)
    close(losses["loss"], plain["loss"] + 0.25 * distance)
    losses["loss"].backward()
    got = [p.grad for p in dmd.student.denoiser.network.parameters()]
    expected = torch.autograd.grad(0.25 * distance, list(dmd.student.denoiser.network.parameters()))
    close(got, list(expected))


@pytest.mark.parametrize("own_weight", [False, True])
def test_the_fake_score_without_gan_learns_by_denoising(schedule, own_weight):
    weight = karras_weight(0.3) if own_weight else None
    dmd = make_dmd(schedule, dtype=torch.float64, fake_weight=weight)
    batch = make_batch()
    losses = dmd.fake_loss(batch, RNG)
    expected = denoising_loss(
        dmd.fake, batch["x0"].detach(), LABELS, times=uniform(0.0, 1.0), generator=RNG("fake"),
        weight=weight or prediction_weight(KINDS[type(schedule)]),
    )  # fmt: skip
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
    t, noise = draws(dmd, "fake", dmd.fake_times, images)
    x_t = schedule.alpha(t)[:, None] * images + schedule.sigma(t)[:, None] * noise
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


@pytest.mark.parametrize("method", METHODS)
def test_each_phase_teaches_its_own_network_alone(accelerator, schedule, method):
    """Even a teacher and a fake score that were not frozen get no gradient from the student's loss."""
    dmd = make_dmd(schedule, method, student_every=1)
    networks, notes = networks_of(dmd), []
    phases = dmd.phases(*(torch.optim.SGD(networks[name].parameters(), 0.0) for name in ("student", "fake")))

    def spied(batch, rng, loss=phases[1].loss):
        notes.append({name: has_gradient(network) for name, network in networks.items()})
        student = [p.grad.clone() for p in networks["student"].parameters()]
        losses = loss(batch, rng)
        gradients = torch.autograd.grad(losses["loss"], list(networks["fake"].parameters()), retain_graph=True)
        assert any(bool((g != 0).any()) for g in gradients)
        unchanged = zip(student, networks["student"].parameters(), strict=True)
        notes.append(all(torch.equal(old, p.grad) for old, p in unchanged))
        assert all(not p.requires_grad for p in networks["student"].parameters())
        return losses

    list(train([phases[0], replace(phases[1], loss=spied)], batch_of, accelerator, steps=1, rollout=dmd.rollout))
    assert all(notes[0]["student"])
    assert not any(notes[0]["fake"] + notes[0]["teacher"])
    assert notes[1]
    assert not any(has_gradient(networks["teacher"]))


@pytest.mark.parametrize("method", METHODS)
def test_the_fake_loss_gives_the_student_no_gradient(schedule, method):
    dmd = make_dmd(schedule, method)
    batch = dmd.rollout(batch_of(RNG), ("student", "fake"), RNG)
    assert batch["x0"].requires_grad
    dmd.fake_loss(batch, RNG)["loss"].backward()
    assert not any(has_gradient(dmd.student.denoiser.network))
    assert any(has_gradient(dmd.fake.network))


@pytest.mark.parametrize("method", METHODS)
def test_the_teachers_bytes_do_not_change(accelerator, schedule, method):
    dmd = make_dmd(schedule, method, student_every=1)
    before = {name: flat(network) for name, network in networks_of(dmd).items()}
    optimise(dmd, accelerator, steps=3)
    changed = {name: not torch.equal(flat(network), before[name]) for name, network in networks_of(dmd).items()}
    assert changed == {"teacher": False, "student": True, "fake": True}


@pytest.mark.parametrize("critic", [False, True])
def test_nothing_moves_a_student_whose_fake_score_is_the_teacher(schedule, critic):
    teacher = make_denoiser(schedule, 2)
    fake = make_denoiser(schedule, 2, critic)
    dmd = make_dmd(
        schedule, teacher=teacher, fake=fake, student=Student(copy.deepcopy(teacher), (schedule.t_max,))
    )
    batch = dmd.rollout(batch_of(RNG), ("student",), RNG)
    batch["x0"].retain_grad()
    dmd.student_loss(batch, RNG)["loss"].backward()
    assert torch.equal(batch["x0"].grad, torch.zeros(B, 2))
    assert all(bool((p.grad == 0).all()) for p in dmd.student.denoiser.network.parameters())


@pytest.mark.parametrize(("student_every", "steps", "updates"), [(1, 4, 4), (3, 10, 3), (5, 10, 2), (5, 9, 1)])
def test_the_student_steps_once_for_so_many_fake_updates(accelerator, student_every, steps, updates):
    dmd = make_dmd(Karras(), student_every=student_every)
    phases, reports = optimise(dmd, accelerator, steps=steps)
    counts = [int(next(iter(phase.optimizer.state.values()))["step"]) for phase in phases]
    assert counts == [updates, steps]
    assert reports[student_every - 1].phases == ("student", "fake")
    assert Counter(name for report in reports for name in report.phases) == {"student": updates, "fake": steps}


def test_five_fake_updates_for_each_of_the_student_unless_told_otherwise(accelerator):
    phases, reports = optimise(make_dmd(Karras()), accelerator, steps=10)
    assert [phase.every for phase in phases] == [5, 1]
    assert [report.step for report in reports if "student" in report.phases] == [5, 10]


def test_phases_carry_their_ema_and_schedules():
    dmd, parts = make_dmd(Karras()), [object() for _ in range(5)]
    student, fake = dmd.phases(parts[0], parts[1], student_ema=parts[2], student_lr=parts[3], fake_lr=parts[4])
    assert (student.optimizer, student.ema, student.lr_schedule) == (parts[0], parts[2], parts[3])
    assert (fake.optimizer, fake.ema, fake.lr_schedule) == (parts[1], None, parts[4])
    assert (student.network, fake.network) == (dmd.student.denoiser.network, dmd.fake.network)


def listen(network):
    conds = []
    network.register_forward_pre_hook(lambda module, a, cond: conds.append(cond), with_kwargs=True)
    return conds


def test_the_fake_score_alone_is_told_which_step_made_an_image(schedule):
    dmd = make_dmd(schedule, "few-step", fake=make_denoiser(schedule, 2, True, 2), gan=GAN())
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
        assert [cond["step"].tolist() for cond in heard["fake"]] == [[made_in] * B] * 4
    assert steps_seen == {0, 1}


def test_without_a_step_key_nobody_is_told(schedule):
    dmd = make_dmd(schedule, "few-step", step_key=None)
    heard = listen(dmd.fake.network)
    batch = dmd.rollout(batch_of(RNG), ("student", "fake"), RNG)
    dmd.student_loss(batch, RNG)
    dmd.fake_loss(batch, RNG)
    assert [set(cond) for cond in heard] == [{"class_labels"}] * 2


def test_the_rollout_has_a_gradient_only_if_the_student_is_due(schedule):
    dmd = make_dmd(schedule)
    due, not_due = (dmd.rollout(batch_of(RNG), names, RNG)["x0"] for names in (("student", "fake"), ("fake",)))
    assert (due.requires_grad, not_due.requires_grad) == (True, False)
    assert torch.equal(due, not_due)


def test_the_rollout_is_the_student_at_its_own_noise(schedule):
    dmd = make_dmd(schedule, "few-step")
    for i in range(4):
        rng = Rng(0, i)
        batch = dmd.rollout({**batch_of(rng), "extra": 1}, ("fake",), rng)
        noise = torch.randn(B, 2, generator=rng("noise"))
        steps = int(batch["fake_cond"]["step"][0]) + 1
        with torch.no_grad():
            expected = dmd.student.simulate(noise, LABELS, steps=steps, generator=rng("simulation"))
        assert torch.equal(batch["x0"], expected)
        assert batch["extra"] == 1


def test_ranks_share_the_step_and_not_the_noise():
    dmd = make_dmd(RectifiedFlow(), "few-step")
    steps = []
    for i in range(12):
        first, second = (dmd.rollout({"cond": LABELS}, ("fake",), Rng(0, i, rank=rank)) for rank in (0, 1))
        assert torch.equal(first["fake_cond"]["step"], second["fake_cond"]["step"])
        assert not bool((first["x0"] == second["x0"]).any())
        steps.append(int(first["fake_cond"]["step"][0]))
    assert set(steps) == {0, 1}


def test_a_batch_without_conditions_says_its_size():
    schedule = RectifiedFlow()
    networks = [ResidualMLP((2,), width=8, depth=1, embedding=8) for _ in range(3)]
    teacher, student, fake = (NetworkDenoiser(network, schedule, "flow") for network in networks)
    dmd = DMD(teacher=teacher, student=Student(student, (1.0,)), fake=fake, shape=(2,))
    dmd.check({"cond": {}, "size": 3})
    assert dmd.rollout({"cond": {}, "size": 3}, (), RNG)["x0"].shape == (3, 2)


@pytest.mark.parametrize("method", METHODS)
def test_check_accepts_what_fits_and_leaves_no_gradient(schedule, method):
    dmd = make_dmd(schedule, method)
    assert dmd.check(batch_of(RNG)) is None
    assert not any(any(has_gradient(network)) for network in networks_of(dmd).values())


def test_check_refuses_a_gan_whose_fake_score_is_no_critic(schedule):
    dmd = make_dmd(schedule, gan=GAN())
    with pytest.raises(ValueError, match="network is a Critic; it returns no logits"):
        dmd.check(batch_of(RNG))


@pytest.mark.parametrize("method", METHODS)
def test_schedules_that_differ_are_refused(schedules, method):
    for schedule, teachers in ((schedules["karras"], schedules["flow"]), (Karras(), Karras(t_max=70.0))):
        with pytest.raises(ValueError, match="must share a schedule"):
            make_dmd(schedule, method, teacher=make_denoiser(teachers, 0))


@pytest.mark.parametrize("role", ["student", "teacher", "fake"])
def test_check_refuses_shapes_that_differ(role):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x_t, t, class_labels):
            return torch.cat([x_t, x_t], 1) * self.weight

    wrong = NetworkDenoiser(Wide(), RectifiedFlow(), "flow")
    settings = {role: Student(wrong, (1.0,)) if role == "student" else wrong}
    with pytest.raises(ValueError, match=r"must return the shape of x_t \(6, 2\); got \(6, 4\)"):
        make_dmd(RectifiedFlow(), **settings).check(batch_of(RNG))


def test_check_refuses_another_image_shape():
    with pytest.raises(ValueError, match=r"shape \(2,\); got \(3,\)"):
        replace(make_dmd(RectifiedFlow()), shape=(3,)).check(batch_of(RNG))


def test_check_refuses_a_gan_without_real_images():
    """Found before any work starts rather than in the first fake update."""
    with pytest.raises(ValueError, match="real"):
        make_dmd(RectifiedFlow(), "GAN").check({"cond": LABELS})


def test_check_refuses_regression_of_a_few_step_student_on_pairs_without_states():
    dmd = make_dmd(RectifiedFlow(), "few-step", regression=Regression(pairs=make_pairs(torch.float32)))
    with pytest.raises(ValueError, match="needs teacher pairs with states"):
        dmd.check(batch_of(RNG))


@pytest.mark.parametrize("student_every", [0, -1])
def test_an_impossible_ratio_is_refused(student_every):
    with pytest.raises(ValueError, match=f"student_every must be at least 1; got {student_every}"):
        make_dmd(Karras(), student_every=student_every)


def one_iteration(dmd, rng):
    batch = dmd.rollout(batch_of(rng), ("student", "fake"), rng)
    return batch["x0"], {"student": dmd.student_loss(batch, rng), "fake": dmd.fake_loss(batch, rng)}


@pytest.mark.parametrize("method", METHODS)
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
    for phase, terms in losses.items():
        assert {name: value.shape for name, value in terms.items()} == dict.fromkeys(terms, torch.Size([]))
        assert [name for name, value in terms.items() if not value.isfinite()] == [], phase
    networks = networks_of(dmd)
    for phase, terms in losses.items():
        gradients = torch.autograd.grad(
            terms["loss"], list(networks[phase].parameters()), retain_graph=True, allow_unused=True
        )
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    again, same = one_iteration(make_dmd(schedule, method, **settings), RNG)
    assert torch.equal(x0, again)
    for phase, terms in losses.items():
        assert all(torch.equal(value, same[phase][name]) for name, value in terms.items())
    other, _ = one_iteration(dmd, replace(RNG, seed=4))
    assert not torch.equal(x0, other)


def test_distillation_moves_the_student_towards_the_teacher(accelerator, make_mixture):
    """One line of evidence that the sign is right: the student's mean goes to the data's."""
    schedule = Karras()
    teacher = make_mixture(schedule, shift=3.0)
    dmd = replace(make_dmd(schedule), teacher=teacher, student_every=1, fake_weight=karras_weight())
    networks = networks_of(replace(dmd, teacher=dmd.student.denoiser))

    def distance():
        noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(1))
        made = dmd.student.sample(noise, {"class_labels": torch.arange(256) % 2})
        return squared_error(made.mean(0, keepdim=True), torch.tensor([[3.0, 3.0]])).item()

    before = distance()
    phases = dmd.phases(*(torch.optim.AdamW(networks[name].parameters(), 2e-3) for name in ("student", "fake")))
    list(train(phases, batch_of, accelerator, steps=150, rollout=dmd.rollout))
    assert distance() < before / 2
