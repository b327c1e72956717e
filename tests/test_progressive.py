"""Progressive distillation against closed forms, in float64: one step does what two of an exact teacher do."""

import math
from dataclasses import replace

import pytest
import torch
from refusals import refused
from torch import nn

from distill.progressive import Progressive, StageTeacher, angle_times, moved, rate_of_stages
from distill.student import Student
from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.randomness import Rng
from scorefield.sampling import ddim
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
M, S = 0.3, 0.8
FIRST = {"karras": 20.0, "flow": 1.0, "vp": 700.0}


def gaussian(schedule):
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(M * one[:, None], S * one, one, schedule)


class InOneStep(nn.Module):
    """The image with which one DDIM step does what ``2^halvings`` steps of the exact teacher do, plus an error."""

    def __init__(self, schedule, path, halvings, error=0.0):
        super().__init__()
        self.schedule, self.path, self.halvings = schedule, path.float().double(), halvings
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t):
        out = torch.empty_like(x)
        for time in t.unique():
            here = int((self.path - time.double()).abs().argmin())
            rows = t == time
            x_t, teacher, step = x[rows], gaussian(self.schedule), ddim()
            end = here + 2**self.halvings
            moving = x_t
            for k in range(here, end):
                u = self.path[k : k + 1].expand(len(x_t))
                if k + 1 == len(self.path):
                    moving = teacher(moving, u, {})  # the last step lands on the clean image
                else:
                    moving = step(teacher, moving, u, self.path[k + 1 : k + 2].expand(len(x_t)), {}, None)
            alpha, sigma = float(self.schedule.alpha(self.path[here])), float(self.schedule.sigma(self.path[here]))
            clean = end == len(self.path)
            alpha_s = 1.0 if clean else float(self.schedule.alpha(self.path[end]))
            sigma_s = 0.0 if clean else float(self.schedule.sigma(self.path[end]))
            out[rows] = (moving - sigma_s / sigma * x_t) / (alpha_s - sigma_s / sigma * alpha)
        return out + self.error


def method(name, schedules, halvings, error=0.0, number=8, stage_steps=10):
    schedule = schedules[name]
    path = angle_times(schedule, number, FIRST[name])
    denoiser = NetworkDenoiser(InOneStep(schedule, path, halvings, error), schedule, "x0")
    before = NetworkDenoiser(InOneStep(schedule, path, halvings - 1), schedule, "x0")
    return Progressive(
        teacher=gaussian(schedule), student=Student(denoiser, (FIRST[name],)), shape=(1,), path=path,
        stage_steps=stage_steps, average=before,
    )  # fmt: skip


def batch(n=64):
    generator = torch.Generator().manual_seed(0)
    return {"cond": {}, "real": M + S * torch.randn(n, 1, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", FIRST)
def test_who_does_two_steps_of_the_stage_before_in_one_has_no_loss(name, stage, schedules):
    """Nobody else has none: not the stage before, nor an image that is off; that costs max(SNR, 1) its square."""
    rng = Rng(0, 10 * stage)

    def loss(halvings, error=0.0):
        made = method(name, schedules, stage + 1)
        wrong = method(name, schedules, halvings, error)
        found = replace(made, student=wrong.student).student_loss(batch(), rng)
        return float(found["loss"].detach()), made

    right, made = loss(stage + 1)
    assert right < 1e-10
    assert loss(stage)[0] > 1e-4
    stride = 2**stage
    places = torch.randint(len(made.path) // (2 * stride), (64,), generator=rng("points")) * 2 * stride
    t = made.path[places].float().double()
    schedule = schedules[name]
    weight = (schedule.alpha(t) / schedule.sigma(t)).square().clamp(min=1).mean()
    assert loss(stage + 1, error=0.1)[0] == pytest.approx(float(weight) * 0.01, rel=1e-3)


@pytest.mark.parametrize("name", FIRST)
def test_a_step_is_that_of_ddim(name, schedules):
    schedule = schedules[name]
    path = angle_times(schedule, 8, FIRST[name])
    t, s = path[1:2], path[3:4]
    x_t, teacher = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], gaussian(schedule)
    t, s = t.expand(5), s.expand(5)
    found = moved(x_t, teacher(x_t, t, {}), *(((schedule.alpha(u), schedule.sigma(u))) for u in (t, s)))
    close(found, ddim()(teacher, x_t, t, s, {}, None), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", FIRST)
def test_times_are_even_in_the_angle_and_fall_from_the_first(name, schedules):
    schedule = schedules[name]
    times = angle_times(schedule, 4, FIRST[name])
    assert float(times[0]) == FIRST[name]
    angles = schedule.ratio(times).atan()
    even = float(angles[0]) * torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    close(angles, even, atol=2e-3 if name == "vp" else 1e-6, rtol=0)  # integer timesteps


def test_the_teacher_of_a_stage_stands_still_and_follows_at_its_end():
    network = nn.Linear(1, 1, bias=False)
    follower, seen = StageTeacher(network, stage_steps=3, num_stages=2, steps=7), []
    for update in range(1, 8):
        network.weight.data.fill_(float(update))
        follower.update()
        seen.append(float(follower.network.weight))
    assert seen[:2] == [seen[0]] * 2
    assert seen[2:] == [3.0, 3.0, 3.0, 3.0, 7.0]
    assert follower.num_updates == 7


def test_stages_and_their_rates(schedules):
    made = method("karras", schedules, 1, number=8, stage_steps=100)
    assert [made.stage(step) for step in (0, 99, 100, 199, 200, 350)] == [0, 0, 1, 1, 2, 2]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = rate_of_stages(optimizer, made, steps=350, constant=False)
    rates = []
    for _ in range(350):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) <= 1
    assert rates[99] == pytest.approx(0.01)
    assert rates[110] > 0.85
    assert rates[275] == pytest.approx(0.5, abs=0.01)
    assert rates[0] == rates[100] == pytest.approx(0.1)


def test_the_first_stage_asks_the_teacher_and_the_others_the_one_before(schedules):
    made = method("karras", schedules, 1)
    x_t, ends = torch.ones(2, 1, dtype=torch.float64), torch.tensor([False, True])
    t, mid, s = (made.path[place].expand(2) for place in (4, 5, 6))
    fooled = replace(made, average=NetworkDenoiser(InOneStep(schedules["karras"], made.path, 0, 5.0),
                                                   schedules["karras"], "x0"))  # fmt: skip
    first = [one.two_steps(x_t, (t, mid, s), ends, {}, 0) for one in (made, fooled)]
    later = [one.two_steps(x_t, (t, mid, s), ends, {}, 1) for one in (made, fooled)]
    assert torch.equal(*first)
    assert float((later[0] - later[1]).abs().min()) > 1
    assert not later[0].requires_grad
    with pytest.raises(ValueError, match="needs the student of the stage before"):
        replace(made, average=None).two_steps(x_t, (t, mid, s), ends, {}, 1)


def test_halvings_need_a_power_of_two_and_room():
    for number in (0, 1, 3, 12):
        with refused("progressive distillation halves a number of steps"):
            angle_times(Karras(), number, 20.0)
    with refused("has no 1024 distinct times below 20"):
        angle_times(VariancePreserving.scaled_linear(), 1024, 20.0)
    assert float(angle_times(RectifiedFlow(), 2, 1.0)[1]) == pytest.approx(0.5), "sigma / alpha = tan(pi / 4) = 1"
    assert math.isfinite(float(angle_times(RectifiedFlow(), 16, 1.0).sum()))
