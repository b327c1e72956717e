"""Guidance at noise levels of its own, against the coupled gradient of the guided teacher, in float64."""

from dataclasses import replace

import pytest
import torch
from denoisers import Counting, random_denoiser
from refusals import refused

from distill.decoupled import SeparateGuidance, decoupled_gradient
from distill.dmd import DMD, dmd_weight
from distill.f_distill import FDistill
from distill.sid import SiD
from distill.student import Student, times_by_ratio
from scorefield.exact import GaussianMixture
from scorefield.gradient import ScoreDistillation, ratio_weight
from scorefield.guidance import Guided, guided, perpendicular
from scorefield.randomness import Rng
from scorefield.schedule import RectifiedFlow, VariancePreserving
from scorefield.times import constant

close = torch.testing.assert_close
B = 6
LABELS = {"class_labels": torch.arange(B) % 2}
NULL = {"class_labels": torch.tensor([2])}


@pytest.fixture
def fake(make_mixture, schedule):
    return make_mixture(schedule, shift=0.3)


@pytest.fixture
def x0(generator):
    return torch.randn(B, 2, generator=generator, dtype=torch.float64)


def noised(schedule, x0, fraction, generator):
    t = schedule.at(torch.linspace(fraction, fraction + 0.1, B, dtype=torch.float64))
    return t, schedule.diffuse(x0, torch.randn(x0.shape, generator=generator, dtype=x0.dtype), t)


@pytest.mark.parametrize("weight", [dmd_weight(), dmd_weight(alpha_in_gradient=True), ratio_weight(2)])
@pytest.mark.parametrize("scale", [0.0, 3.0, 8.0])
@pytest.mark.parametrize("rows", [1, B])
def test_at_equal_times_and_noise_the_sum_is_the_coupled_gradient(
    mixture, fake, schedule, x0, generator, weight, scale, rows
):
    t, x_t = noised(schedule, x0, 0.4, generator)
    teacher = guided(mixture, scale, {"class_labels": NULL["class_labels"].expand(rows)})
    settings = {"matching": (t, x_t), "guidance": (t, x_t), "weight": weight}
    got = decoupled_gradient(teacher, fake, x0, LABELS, **settings)
    coupled = ScoreDistillation(
        teacher=teacher, baseline=fake, times=lambda n, s, g: t, weight=weight,
        noise=lambda x, c, t, g: (x_t - schedule.alpha(t)[:, None] * x) / schedule.sigma(t)[:, None],
    ).gradient(x0, LABELS, generator=generator)  # fmt: skip
    close(got.value, coupled.value, rtol=1e-9, atol=1e-11)
    assert got.metrics["gradient_rms"].item() == pytest.approx(coupled.metrics["gradient_rms"].item(), rel=1e-5)


def test_each_term_has_its_own_times_noise_and_weight(mixture, fake, schedule, x0, generator):
    (t, x_t), (s, x_s) = noised(schedule, x0, 0.5, generator), noised(schedule, x0, 0.2, generator)
    got = decoupled_gradient(
        guided(mixture, 4.0, NULL), fake, x0, LABELS, matching=(t, x_t), guidance=(s, x_s), weight=dmd_weight()
    )
    null = {"class_labels": NULL["class_labels"].expand(B)}

    def term(difference, t, x_t):
        pos, neg = mixture(x_t, t, LABELS), mixture(x_t, t, null)
        return difference(pos, neg) / (x0 - neg - 4 * (pos - neg)).abs().mean(1, keepdim=True)

    matching = term(lambda pos, neg: fake(x_t, t, LABELS) - pos, t, x_t)
    guidance = term(lambda pos, neg: 3 * (neg - pos), s, x_s)
    close(got.value, matching + guidance, rtol=1e-9, atol=1e-11)
    close(got.metrics["guidance_rms"].double(), guidance.square().mean().sqrt(), rtol=1e-5, atol=0)
    close(got.metrics["guidance_t_mean"], s.mean())
    close(got.metrics["t_mean"], t.mean())


def test_the_teacher_is_called_once_and_the_fake_score_for_matching_alone(mixture, fake, schedule, x0, generator):
    (t, x_t), (s, x_s) = noised(schedule, x0, 0.5, generator), noised(schedule, x0, 0.2, generator)
    teacher, follower = Counting(mixture), Counting(fake)
    decoupled_gradient(
        guided(teacher, 4.0, NULL), follower, x0, LABELS, matching=(t, x_t), guidance=(s, x_s), weight=dmd_weight()
    )
    [(images, times, cond)] = teacher.calls
    assert torch.equal(images, torch.cat([x_t, x_s, x_t, x_s]))
    assert torch.equal(times, torch.cat([t, s, t, s]))
    null = NULL["class_labels"].expand(2 * B)
    assert torch.equal(cond["class_labels"], torch.cat([null, LABELS["class_labels"], LABELS["class_labels"]]))
    [(images, times, cond)] = follower.calls
    assert torch.equal(images, x_t)
    assert torch.equal(times, t)
    assert cond is LABELS


def make_dmd(schedule, num_steps=1, scale=3.0, kind=DMD, **settings):
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)
    stds, labels = torch.tensor([0.3, 0.2], dtype=torch.float64), torch.arange(2)
    teacher = Counting(GaussianMixture(means, stds, torch.ones(2, dtype=torch.float64), schedule, labels))
    student, fake = (random_denoiser(schedule, seed, dtype=torch.float64) for seed in (1, 2))
    student = Student(student, times_by_ratio(schedule, num_steps))
    settings = {"guidance": SeparateGuidance(), **settings}
    return kind(teacher=guided(teacher, scale, NULL), student=student, fake=fake, shape=(2,), **settings)


def batch_of(x0, step=0):
    return {"x0": x0.clone().requires_grad_(), "cond": LABELS, "fake_cond": {}, "step": step}


def teacher_of(dmd):
    return dmd.teacher.denoiser if isinstance(dmd.teacher, Guided) else dmd.teacher


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_guidance_stays_below_the_students_step_and_matching_does_not(schedule, x0, step):
    """The first step's input is pure noise, which settles nothing: the whole range there."""
    dmd = make_dmd(schedule, num_steps=4)
    ratios = []
    for i in range(40):
        dmd.student_loss(batch_of(x0, step), Rng(1, i))
        ratios.append(schedule.ratio(teacher_of(dmd).calls[-1][1].double())[: 2 * B])
    matching, guidance = torch.stack(ratios).unflatten(1, (2, B)).unbind(1)
    level = float(schedule.ratio(torch.tensor(dmd.student.times[step], dtype=torch.float64)))
    high = min(20.0, float(schedule.ratio(torch.tensor(schedule.t_max)))) if step == 0 else level
    assert 0.15 * (1 - 1e-6) <= guidance.min() < 0.21
    assert 0.8 * high < guidance.max() <= high * (1 + 1e-6)
    assert matching.max() > 8
    free = replace(dmd, guidance=SeparateGuidance(below_step=False, high=9.0))
    teacher_of(free).calls.clear()
    for i in range(20):
        free.student_loss(batch_of(x0, step), Rng(2, i))
    drawn = torch.stack([schedule.ratio(t.double())[B : 2 * B] for _, t, _ in teacher_of(free).calls])
    assert 7 < drawn.max() <= 9 * (1 + 1e-6)


def test_the_gradient_reaches_the_image_alone_and_is_that_of_the_function(schedule, x0):
    dmd, batch, rng = make_dmd(schedule), batch_of(x0), Rng(7, 1)
    losses = dmd.student_loss(batch, rng)
    losses["loss"].backward()
    assert not any(p.grad is not None for d in (dmd.student.denoiser, dmd.fake) for p in d.network.parameters())
    generator = rng("gradient")
    noisy = [dmd.noisy(x0, LABELS, times, generator) for times in (dmd.times, dmd.guidance.times(dmd.student, 0))]
    weight = dmd_weight()
    expected = decoupled_gradient(
        dmd.teacher, dmd.fake, x0, LABELS, matching=noisy[0], guidance=noisy[1], weight=weight
    )
    close(batch["x0"].grad, expected.value / x0.numel(), rtol=1e-10, atol=1e-14)
    assert {"guidance_rms", "guidance_t_mean", "gradient_rms", "gap_rms"} <= losses.keys()


def test_in_the_mean_nothing_changes_where_both_terms_have_the_same_times(schedule, x0):
    """Linearity: the expectation of a sum does not care whether its terms share their noise."""
    t = float(schedule.at(torch.tensor(0.5)))
    dmd = make_dmd(schedule, times=constant(t))
    same = lambda student, step: constant(t)  # noqa: E731
    object.__setattr__(dmd, "guidance", type("Same", (), {"times": staticmethod(same)})())
    many = 2000
    images = x0[:1].expand(many, 2)
    batch = {"x0": images, "cond": {"class_labels": torch.ones(many, dtype=torch.long)}, "fake_cond": {}}
    got = dmd._gradient(batch, Rng(0, 0)("a")).value
    coupled = replace(dmd, guidance=None)._gradient(batch, Rng(0, 0)("b")).value
    error = ((got.var(0) + coupled.var(0)) / many).sqrt()
    assert bool(((got.mean(0) - coupled.mean(0)).abs() < 4 * error).all())
    assert bool((coupled.mean(0).abs() > 4 * error).any())


def test_scale_one_has_no_guidance_term_and_no_call_for_it(schedule, x0):
    dmd = make_dmd(schedule, scale=1.0)
    plain = replace(dmd, guidance=None)
    batches = [batch_of(x0), batch_of(x0)]
    for method, batch in zip((dmd, plain), batches, strict=True):
        method.student_loss(batch, Rng(0, 3))["loss"].backward()
    assert torch.equal(batches[0]["x0"].grad, batches[1]["x0"].grad)
    assert [len(x_t) for x_t, _, _ in teacher_of(dmd).calls] == [B, B]


def test_rollout_says_which_step_made_the_images(schedule):
    dmd = make_dmd(schedule, num_steps=4)
    dmd = replace(dmd, student=replace(dmd.student, denoiser=make_dmd(schedule).student.denoiser))
    dmd.student.denoiser.network.float()
    steps = []
    for i in range(24):
        rng = Rng(0, i)
        batch = dmd.rollout({"cond": LABELS}, (), rng)
        expected = dmd.student.simulate(
            torch.randn(B, 2, generator=rng("noise")), LABELS, steps=batch["step"] + 1, generator=rng("simulation")
        )
        close(batch["x0"], expected)
        steps.append(batch["step"])
    assert set(steps) == {0, 1, 2, 3}


@pytest.mark.parametrize(("settings", "message"), [
    ({"guidance": SeparateGuidance(low=0.35), "num_steps": 4}, r"below that of step 4, .* = 0\.31\d*; .*=0\.35"),
    ({"guidance": SeparateGuidance(low=3.0, high=2.0)}, "0 <= low < high; got low=3.0, high=2.0"),
    ({"guidance": SeparateGuidance(low=1e4, high=1e5)}, "has no time with sigma / alpha in"),
    ({"kind": SiD}, "the gradient of SiD has no guidance term"),
    ({"kind": FDistill}, "gradient of FDistill has no guidance term|critic"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused(settings, message):
    with refused(message):
        make_dmd(VariancePreserving.scaled_linear(), **settings)


def test_teachers_that_are_not_a_sum_of_two_terms_are_refused():
    dmd = make_dmd(RectifiedFlow())
    inner = teacher_of(dmd)
    for teacher in (guided(inner, 3.0, NULL, rescale=0.5), perpendicular(inner, 3.0, NULL, [NULL], [1.0])):
        with refused("does not split into two terms"):
            replace(dmd, teacher=teacher)
