"""Consistency distillation against closed forms: paths of Gaussians are known, in float64."""

from dataclasses import replace

import pytest
import tiny_pipelines as tiny
import torch
from refusals import refused
from torch import nn

from distill.consistency import Consistency, ContinuousConsistency, path_times, rate_of_change
from distill.regression import squared_error
from distill.student import Student
from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.randomness import Rng
from scorefield.sampling import heun
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving, per_sample
from scorefield.times import constant

close = torch.testing.assert_close
M, S = 0.3, 0.8


def gaussian(schedule):
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(M * one[:, None], S * one, one, schedule)


class End(nn.Module):
    """Where the path of N(M, S^2) ends: M + S (x - alpha M) / sqrt(alpha^2 S^2 + sigma^2), plus an error."""

    def __init__(self, schedule, error=lambda x, t: 0.0):
        super().__init__()
        self.schedule, self.error = schedule, error
        self.offset = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, t):
        alpha, sigma = (per_sample(value, x) for value in (self.schedule.alpha(t), self.schedule.sigma(t)))
        end = M + S * (x - alpha * M) / (alpha**2 * S**2 + sigma**2).sqrt()
        return end + self.error(x, t) + self.offset


def method(schedule, kind=Consistency, error=lambda x, t: 0.0, number=200, **settings):
    first = {Karras: 20.0, RectifiedFlow: 0.95}.get(type(schedule), 700.0)
    student = Student(NetworkDenoiser(End(schedule, error), schedule, "x0"), (first,))
    path = path_times(schedule, number, first)
    return kind(teacher=gaussian(schedule), student=student, shape=(1,), path=path, **settings)


def batch(schedule, n=4096):
    generator = torch.Generator().manual_seed(0)
    return {"cond": {}, "real": M + S * torch.randn(n, 1, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("name", ["karras", "flow", "vp"])
def test_the_ends_of_the_teachers_paths_agree_and_nothing_else_does(name, schedules):
    schedule = schedules[name]

    def loss(error):
        part = method(schedule, distance=squared_error, error=error)
        return float(part.student_loss(batch(schedule), Rng(0, 0))["loss"].detach()), 1 / len(part.path)

    right, _ = loss(lambda x, t: 0.0)
    assert right < 2e-4
    constant_error, share = loss(lambda x, t: 0.3 * torch.ones_like(x))
    assert constant_error - right == pytest.approx(0.09 * share, rel=0.5), "seen at the end of time alone"
    assert loss(lambda x, t: 0.3 * per_sample(schedule.ratio(t).log(), x))[0] > 5 * right


@pytest.mark.parametrize("name", ["karras", "flow", "vp"])
def test_steps_of_second_order_and_finer_paths_agree_better(name, schedules):
    schedule = schedules[name]

    def loss(number, **settings):
        found = method(schedule, distance=squared_error, number=number, **settings)
        return float(found.student_loss(batch(schedule), Rng(0, 0))["loss"].detach())

    coarse, fine = loss(20), loss(80)
    assert fine < coarse / 4
    assert loss(20, step=heun()) < coarse / 2


@pytest.mark.parametrize("name", ["karras", "flow", "vp"])
def test_the_rate_of_change_is_that_of_the_path(name, schedules):
    """0 for the ends of paths; of an error e(x, t) its own change along the exact path, by differences."""
    schedule = schedules[name]
    t = {"karras": 1.5, "flow": 0.6, "vp": 300.25}[name] * torch.ones(5, dtype=torch.float64)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]

    def denoiser(error):
        return NetworkDenoiser(End(schedule, error), schedule, "x0")

    exact = rate_of_change(denoiser(lambda x, t: 0.0), gaussian(schedule), x, t, {})
    close(exact, torch.zeros_like(x), atol=1e-9, rtol=0)

    def error(x, t):
        return torch.sin(x) * per_sample(schedule.ratio(t).log(), x) + x**2

    found = rate_of_change(denoiser(error), gaussian(schedule), x, t, {})
    h, log_ratio = 1e-4, schedule.ratio(t).log()

    def along(shift):
        """The error at the point of the same path where log(sigma / alpha) is larger by ``shift``."""
        u = schedule.time((log_ratio + shift).exp())
        spread = [(schedule.alpha(v) ** 2 * S**2 + schedule.sigma(v) ** 2).sqrt()[:, None] for v in (t, u)]
        moved = schedule.alpha(u)[:, None] * M + (x - schedule.alpha(t)[:, None] * M) / spread[0] * spread[1]
        return error(moved, u)

    close(found, (along(h) - along(-h)) / (2 * h), atol=1e-6, rtol=1e-6)


def test_the_gradient_moves_the_image_towards_the_less_noisy_end(schedules):
    """An image that grows with the noise has to shrink, by less where the softening is larger."""
    schedule = schedules["karras"]
    found = {}
    for sign in (1, -1):
        part = method(
            schedule, ContinuousConsistency, times=constant(2.0), softening=0.5,
            error=lambda x, t, sign=sign: sign * per_sample(schedule.ratio(t).log(), x) * torch.ones_like(x),
        )  # fmt: skip
        part.student_loss(batch(schedule, 64), Rng(0, 0))["loss"].backward()
        found[sign] = float(part.student.denoiser.network.offset.grad)
    # g = +-1 exactly: its normalised size is 1 / (1 + 0.5), and the loss is a mean over images.
    assert found[1] == pytest.approx(1 / 1.5, rel=1e-6)
    assert found[-1] == pytest.approx(-1 / 1.5, rel=1e-6)


def test_pure_noise_has_no_rate_of_change_and_is_left_out():
    """A flow begins there, and a schedule of zero terminal signal-to-noise."""
    betas = VariancePreserving.scaled_linear().alphas_cumprod.sqrt()
    zero = VariancePreserving(((betas - betas[-1]) * betas[0] / (betas[0] - betas[-1])) ** 2)
    for schedule, first in ((zero, 999.0), (RectifiedFlow(), 1.0)):
        student = Student(NetworkDenoiser(End(schedule), schedule, "x0"), (first,))
        part = ContinuousConsistency(
            teacher=gaussian(schedule), student=student, shape=(1,), path=path_times(schedule, 20, first),
            times=constant(first),
        )  # fmt: skip
        assert bool(part.student_loss(batch(schedule, 8), Rng(0, 0))["consistency"].isfinite())


def test_no_gradient_reaches_the_target_and_the_teacher_speaks_at_the_end(schedules):
    schedule = schedules["karras"]
    part = method(schedule, number=2, distance=squared_error, error=lambda x, t: 10.0)
    x_t, last = torch.ones(2, 1, dtype=torch.float64), torch.tensor([False, True])
    t, s = torch.tensor([2.0, 0.02]), torch.tensor([1.0, 0.02])
    target = part.target(x_t, t, s, last, {})
    assert not target.requires_grad
    shifted = NetworkDenoiser(End(schedule, lambda x, t: -5.0), schedule, "x0")
    averaged = replace(part, average=shifted).target(x_t, t, s, last, {})
    close(averaged[0] - target[0], torch.full((1,), -15.0, dtype=torch.float64), atol=1e-9, rtol=0)
    close(averaged[1], target[1], msg="the teacher's in any case")
    close(target[1:], gaussian(schedule)(x_t[1:], t[1:].double(), {}), atol=1e-6, rtol=0)
    assert float(target[0, 0]) > 9, "the student's own, further on"


def test_a_path_falls_from_the_first_time_and_keeps_integer_timesteps():
    for schedule, highest in ((Karras(), 80.0), (RectifiedFlow(), 1.0), (VariancePreserving.linear(), 999.0)):
        times = path_times(schedule, 40, highest)
        assert times[0] == highest
        assert bool((times.diff() < 0).all())
        assert len(times) <= 40
        assert float(schedule.ratio(times[-1])) < 0.03
        if schedule.cell:
            close(times, times.round())
    assert len(path_times(VariancePreserving.linear(num_steps=10), 40, 9.0)) <= 10
    with refused("a path needs at least 2 times"):
        path_times(Karras(), 1, 80.0)


def test_images_of_another_shape_and_another_schedule_are_refused(schedules):
    part = method(schedules["karras"])
    with refused(r'consistency needs "real" images of shape \(1,\) in the batch; got none.'):
        part.check({"cond": {}})
    with refused(r'consistency needs "real" images of shape \(1,\) in the batch; got \(2,\).'):
        part.check({"cond": {}, "real": torch.zeros(3, 2)})
    with refused("teacher and student must be on one schedule"):
        replace(part, teacher=gaussian(schedules["flow"])).check(batch(schedules["karras"], 2))


def test_networks_with_attention_have_a_rate_of_change():
    """Fused attention has no forward-mode derivative: without its own kernels a UNet's equals differences."""
    pipeline = tiny.sd()
    schedule = VariancePreserving.scaled_linear()
    student = NetworkDenoiser(pipeline.unet.double(), schedule, "eps")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
    cond = {"encoder_hidden_states": torch.randn(1, 16, 32, generator=generator, dtype=torch.float64)}
    one = torch.ones(1, dtype=torch.float64)
    teacher = GaussianMixture(torch.zeros(1, 4, 8, 8, dtype=torch.float64), S * one, one, schedule)
    t, h = 300.5 * one, 1e-4
    found = rate_of_change(student, teacher, x, t, cond)
    sides, log_ratio = [], schedule.ratio(t).log()
    for shift in (h, -h):
        u = schedule.time((log_ratio + shift).exp())
        spread = [(schedule.alpha(v) ** 2 * S**2 + schedule.sigma(v) ** 2).sqrt() for v in (t, u)]
        sides.append(student(x / spread[0] * spread[1], u, cond).detach())
    close(found, (sides[0] - sides[1]) / (2 * h), atol=2e-2, rtol=0)  # of 2.2: the embedding of t is float32
