"""Students: steps, times on every schedule, gradients of the last step, folders."""

import copy
from itertools import pairwise

import pytest
import torch
from denoisers import random_denoiser
from refusals import refused
from torch import nn

from distill.student import Student, even_times, load_student, save_student, times_by_ratio
from scorefield.models.storage import read_facts, save_denoiser
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
LABELS = {"class_labels": torch.arange(6) % 2}


def make_student(schedule, num_steps=1, kind=None):
    return Student(random_denoiser(schedule, kind=kind), even_times(schedule, num_steps))


@pytest.fixture
def noise(generator):
    return torch.randn(6, 2, generator=generator)


@pytest.mark.parametrize(("name", "std"), [("karras", 80.0), ("vp", 1.0), ("flow", 1.0)])
def test_one_step_is_the_denoiser_at_t_max_on_scaled_noise(schedules, noise, name, std):
    schedule = schedules[name]
    student = make_student(schedule)
    t = torch.full((6,), schedule.t_max)
    assert student.num_steps == 1
    expected = student.denoiser(std * noise, t, LABELS)
    assert torch.equal(student.sample(noise, LABELS), expected)
    assert torch.equal(student.simulate(noise, LABELS, steps=1), expected)


@pytest.mark.parametrize("num_steps", [2, 4])
def test_few_step_sampling_is_predict_and_noise_again(schedule, noise, num_steps):
    student = make_student(schedule, num_steps)
    generator = torch.Generator().manual_seed(3)
    x_t = noise * (80.0 if isinstance(schedule, Karras) else 1.0)
    t = torch.full((6,), student.times[0])
    with torch.no_grad():
        for s in student.times[1:]:
            x0 = student.denoiser(x_t, t, LABELS)
            t = torch.full((6,), s)
            alpha, sigma = schedule.alpha(t)[:, None].float(), schedule.sigma(t)[:, None].float()
            x_t = alpha * x0 + sigma * torch.randn(6, 2, generator=generator)
        expected = student.denoiser(x_t, t, LABELS)
    got = student.sample(noise, LABELS, generator=torch.Generator().manual_seed(3))
    close(got, expected)
    other = student.sample(noise, LABELS, generator=torch.Generator().manual_seed(4))
    assert not torch.allclose(other, expected)


@pytest.mark.parametrize(
    ("kind", "prediction_type"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
def test_sampling_equals_diffusers_lcm_scheduler_without_boundary_scaling(noise, kind, prediction_type):
    from diffusers import LCMScheduler

    schedule = VariancePreserving.scaled_linear()
    student = Student(random_denoiser(schedule, kind=kind), (999.0, 759.0, 499.0, 259.0))
    scheduler = LCMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type,
        clip_sample=False, timestep_scaling=1e6,
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=[int(t) for t in student.times])
    assert [float(t) for t in scheduler.timesteps] == list(student.times)
    generator, x_t = torch.Generator().manual_seed(3), noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = student.denoiser.network(x_t, 1e-3 * t.float().expand(6), **LABELS)
            x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
    close(student.sample(noise, LABELS, generator=torch.Generator().manual_seed(3)), x_t, rtol=1e-4, atol=1e-4)


def test_sample_has_no_gradient_and_simulate_one_through_its_last_step(schedule, noise):
    student = make_student(schedule, 3)
    assert not student.sample(noise, LABELS).requires_grad
    seen = []
    student.denoiser.network.register_forward_pre_hook(
        lambda module, arguments: seen.append((arguments[0].detach().clone(), torch.is_grad_enabled()))
    )
    for steps in (1, 2, 3):
        seen.clear()
        generator = torch.Generator().manual_seed(steps)
        x0 = student.simulate(noise, LABELS, steps=steps, generator=generator)
        assert [grad for _, grad in seen] == [False] * (steps - 1) + [True]
        network = student.denoiser.network
        got = torch.autograd.grad(x0.square().sum(), list(network.parameters()))
        t = torch.full((6,), student.times[steps - 1])
        last = student.denoiser(seen[steps - 1][0], t, LABELS)
        assert torch.equal(last, x0)
        expected = torch.autograd.grad(last.square().sum(), list(network.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_stopping_early_gives_a_prefix_of_the_full_trajectory(schedule, noise):
    student = make_student(schedule, 3)
    prefix = Student(student.denoiser, student.times[:2])
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    stopped = student.simulate(noise, LABELS, steps=2, generator=generators[0])
    assert torch.equal(stopped, prefix.sample(noise, LABELS, generator=generators[1]))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 50])
def test_even_times_make_a_student_of_any_schedule(schedule, num_steps):
    ddpm = VariancePreserving.linear()
    assert (even_times(ddpm, 1), even_times(ddpm, 4)) == ((999.0,), (999.0, 749.0, 500.0, 250.0))
    assert even_times(RectifiedFlow(), 4) == (1.0, 0.75, 0.5, 0.25)
    times = even_times(schedule, num_steps)
    assert len(times) == num_steps
    assert times[0] == pytest.approx(schedule.t_max)
    assert all(a > b > schedule.t_min for a, b in pairwise(times))
    assert Student(random_denoiser(schedule), times).num_steps == num_steps


RATIOS = {1: [3.5], 2: [3.5, 0.7], 4: [3.5, 3.5**0.75 * 0.14**0.25, 0.7, 3.5**0.25 * 0.14**0.75]}


@pytest.mark.parametrize("num_steps", list(RATIOS))
def test_times_by_ratio_are_the_same_noise_on_every_schedule(schedule, num_steps):
    """One geometric sequence, solved for t by hand: r on EDM, r / (1 + r) on a flow, the nearest integer else."""
    wanted = torch.tensor(RATIOS[num_steps], dtype=torch.float64)
    times = torch.tensor(times_by_ratio(schedule, num_steps), dtype=torch.float64)
    if isinstance(schedule, VariancePreserving):
        bar = schedule.alphas_cumprod
        log_ratios = ((1 - bar) / bar).log() / 2
        close(times, (log_ratios[None] - wanted.log()[:, None]).abs().argmin(1).double())
    else:
        close(times, wanted if isinstance(schedule, Karras) else wanted / (1 + wanted))
    assert Student(random_denoiser(schedule), tuple(times.tolist())).num_steps == num_steps


def test_times_by_ratio_keep_an_eps_student_off_pure_noise_and_begin_at_t_max_of_a_short_schedule():
    ddpm = VariancePreserving.linear()
    assert 1 / ddpm.alpha(torch.tensor(ddpm.t_max)) > 150
    assert 1 / ddpm.alpha(torch.tensor(times_by_ratio(ddpm, 1)[0])) < 3.65
    assert times_by_ratio(ddpm, 1) == (503.0,)
    terminal, gentle = (
        VariancePreserving(torch.linspace(0.99, end, n, dtype=torch.float64)) for end, n in ((0.0, 100), (0.2, 50))
    )
    assert terminal.ratio(torch.tensor(times_by_ratio(terminal, 1)[0])) == pytest.approx(3.5, abs=0.3)
    first, second = times_by_ratio(gentle, 2)  # sigma / alpha up to 2
    assert first == 49.0
    close(gentle.ratio(torch.tensor(second)).item(), (2 * 0.14) ** 0.5, rtol=0.02, atol=0)
    assert times_by_ratio(Karras(), 1, highest=1000.0) == pytest.approx((80.0,))


@pytest.mark.parametrize(
    ("name", "wanted", "std"), [("karras", 3.640055, 3.5), ("vp", 1.0, 1.0), ("flow", 0.808901, 1.0)]
)
def test_the_first_input_has_the_spread_that_the_docstring_says(schedules, noise, name, wanted, std):
    schedule, seen = schedules[name], []
    student = Student(random_denoiser(schedule), times_by_ratio(schedule, 1))
    t = torch.tensor(times_by_ratio(schedule, 1)[0], dtype=torch.float64)
    close((schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).sqrt().item(), wanted, rtol=1e-5, atol=0)
    raw = student.denoiser.network
    raw.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    student.sample(noise, LABELS)
    close(seen[0], std * noise)


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_steps": 0}, "num_steps >= 1 .* got num_steps=0"), ({"num_steps": 1, "lowest": 0.0}, "lowest=0.0"),
    ({"num_steps": 1, "highest": 0.1}, "highest=0.1"), ({"num_steps": 1, "highest": float("inf")}, "highest=inf"),
    ({"num_steps": 999}, "has fewer than 999 distinct times"),
])  # fmt: skip
def test_times_by_ratio_that_do_not_exist_are_refused(settings, message):
    with refused(message):
        times_by_ratio(VariancePreserving.scaled_linear(), **settings)


FALL, INSIDE = "times must fall strictly, one per step", r"times must lie in \["


@pytest.mark.parametrize(("name", "times", "message"), [
    *(("flow", times, FALL) for times in ((), (0.5, 0.5), (0.25, 0.5), (1.0, 0.5, 0.7))),
    ("karras", (81.0,), INSIDE), ("karras", (80.0, 0.001), INSIDE), ("flow", (999.0,), INSIDE),
    ("vp", (1000.0,), INSIDE), ("vp", (999.0, -1.0), INSIDE), ("flow", (float("nan"),), INSIDE),
])  # fmt: skip
def test_times_that_do_not_fall_or_lie_outside_the_schedule_are_refused(schedules, name, times, message):
    with refused(message):
        Student(random_denoiser(schedules[name]), times)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_student_comes_back_with_its_times_schedule_and_kind(tmp_path, schedule, noise, num_steps):
    student = make_student(schedule, num_steps)
    assert save_student(student, tmp_path / "student", {"width": 16}) == tmp_path / "student"
    restored = load_student(tmp_path / "student", random_denoiser(schedule, seed=1).network)
    assert restored.times == student.times
    assert restored.denoiser.kind == student.denoiser.kind
    assert type(restored.denoiser.schedule) is type(schedule)
    samples = [
        each.sample(noise, LABELS, generator=torch.Generator().manual_seed(2)) for each in (student, restored)
    ]
    assert torch.equal(*samples)
    assert read_facts(tmp_path / "student")["width"] == 16


def test_folders_of_teachers_and_of_times_outside_the_schedule_are_refused(tmp_path):
    student = make_student(RectifiedFlow())
    save_denoiser(student.denoiser, tmp_path / "teacher")
    save_student(student, tmp_path / "student")
    path = tmp_path / "student" / "denoiser.json"
    path.write_text(path.read_text().replace("[\n      1.0\n    ]", "[999.0]"))
    for name, message in (("teacher", "holds a denoiser but no 'conditioning_times': a teacher, not a student"),
                          ("student", "times must lie in")):  # fmt: skip
        with refused(message):
            load_student(tmp_path / name, student.denoiser.network)
    for steps in (0, 3, -1):
        with refused(rf"steps must lie in \[1, 2\]; got {steps}"):
            make_student(RectifiedFlow(), 2).simulate(torch.zeros(6, 2), LABELS, steps=steps)


def test_a_copy_learns_alone(noise):
    student = make_student(RectifiedFlow())
    before = student.sample(noise, LABELS)
    other = copy.deepcopy(student)
    for parameter in other.denoiser.network.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(student.sample(noise, LABELS), before)
    assert not torch.equal(other.sample(noise, LABELS), before)
