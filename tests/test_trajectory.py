"""Warm-up of few-step students, against the linear map by which DDIM moves a single Gaussian."""

from itertools import pairwise

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn

from distill.regression import Pairs, Regression, absolute_error, make_pairs, squared_error
from distill.student import Student, times_by_ratio
from distill.trajectory import step_numbers, through
from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.randomness import Rng, shuffled
from scorefield.sampling import grid, heun
from scorefield.schedule import Karras

close = torch.testing.assert_close
MEAN, STD, N = 0.7, 0.4, 12
LABELS = {"class_labels": torch.arange(N) % 3}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def teacher(schedule):
    return GaussianMixture(torch.full((1, 2), MEAN), torch.tensor([STD]), torch.ones(1), schedule)


def start_of(schedule):
    return 80.0 if isinstance(schedule, Karras) else 1.0


def factors(schedule, times):
    """d_k: y_k - MEAN = d_k (y_0 - MEAN) for y = x / alpha on DDIM's path; the last of them is the clean image's.

    D(y) - MEAN = STD^2 / (STD^2 + r^2) (y - MEAN) at r = sigma / alpha, and DDIM is Euler in r.
    """
    ratios = [float(schedule.ratio(t)) for t in times] + [0.0]
    product, found = 1.0, [1.0]
    for r, s in pairwise(ratios):
        product *= 1 + (s - r) * r / (STD**2 + r**2)
        found.append(product)
    return found


def make(teacher, num_steps=3, **settings):
    schedule = teacher.schedule
    times = times_by_ratio(schedule, num_steps)
    inner = grid(schedule, 6, low=0.05, high=0.9)  # alpha is not 0 at its start, so that y exists
    pairs = make_pairs(teacher, LABELS, shape=(2,), times=inner, keep=times[1:], **settings)
    return pairs, times, through(inner, times[1:])


def test_states_and_images_are_those_of_the_closed_form(teacher, schedule):
    pairs, times, whole = make(teacher)
    alpha = schedule.alpha(whole)
    start = float(schedule.initial_std(whole[0])) * pairs.noise / alpha[0] - MEAN
    by_time = dict(zip(whole.tolist(), zip(alpha.tolist(), factors(schedule, whole), strict=False), strict=True))
    assert list(pairs.states) == list(times[1:])
    for t, state in pairs.states.items():
        a, factor = by_time[t]
        close(state, a * (MEAN + factor * start), rtol=1e-9, atol=1e-9)
    close(pairs.x0, MEAN + factors(schedule, whole)[-1] * start, rtol=1e-9, atol=1e-9)


def test_many_steps_come_to_the_flow_map(teacher, schedule):
    """Along the exact path (y - MEAN) / sqrt(STD^2 + r^2) is constant."""
    t = times_by_ratio(schedule, 2)[1]
    times = grid(schedule, 150, low=0.002, high=0.9)
    pairs = make_pairs(teacher, {}, num=3, shape=(2,), times=times, step=heun(), keep=(t,))
    noise = pairs.noise * float(schedule.initial_std(times[0])) / float(schedule.alpha(times[0])) - MEAN
    spread = (STD**2 + float(schedule.ratio(times[0])) ** 2) ** 0.5
    alpha, ratio = (float(f(torch.tensor(t))) for f in (schedule.alpha, schedule.ratio))
    close(pairs.states[t], alpha * (MEAN + noise * (STD**2 + ratio**2) ** 0.5 / spread), rtol=0, atol=2e-3)
    close(pairs.x0, MEAN + noise * STD / spread, rtol=0, atol=6e-3)


def test_the_grid_goes_through_the_points_and_stays_itself_without(schedule):
    times = grid(schedule, 6, low=0.05)
    assert through(times, ()) is times
    points = times_by_ratio(schedule, 4)[1:]
    whole = through(times, (*points, float(times[2])))
    assert set(whole.tolist()) == {*times.tolist(), *points}
    assert bool((whole.diff() < 0).all())
    with refused("states are kept below the first time"):
        through(times[1:], (float(times[0]),))


def test_states_do_not_depend_on_batches_and_ranks_and_survive_the_disk(teacher, tmp_path):
    whole, times, _ = make(teacher)
    small, shard = make(teacher, batch=5)[0], make(teacher, rank=1, num_ranks=3)[0]
    for t in times[1:]:
        assert torch.equal(small.states[t], whole.states[t])
        assert torch.equal(shard.states[t], whole.states[t][1::3])
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        whole.save(path)
    joined = Pairs.load(paths)
    assert joined.states.keys() == whole.states.keys()
    assert all(torch.equal(joined.states[t], torch.cat([x, x])) for t, x in whole.states.items())
    for path, t in zip(paths, (0.5, 0.25), strict=True):
        Pairs(torch.ones(2, 2), torch.ones(2, 2), {}, {t: torch.ones(2, 2)}).save(path)
    with refused("need shards of one set"):
        Pairs.load(paths)


def test_files_without_states_are_as_they_always_were(tmp_path):
    path = tmp_path / "a.safetensors"
    Pairs(torch.ones(2, 2), torch.zeros(2, 2), {"class_labels": torch.ones(2)}).save(path)
    assert load_file(str(path)).keys() == {"noise", "x0", "cond.class_labels"}
    save_file({"noise": torch.ones(2, 2), "x0": torch.zeros(2, 2)}, str(path))
    assert dict(Pairs.load([path]).states) == {}


class FlowMap(nn.Module):
    """The exact student of a Gaussian: where DDIM's path ends from x_t, spread by ``gain`` about the mean."""

    def __init__(self, schedule, times, whole):
        super().__init__()
        self.gain, self.calls = nn.Parameter(torch.ones(())), []
        found = dict(zip(whole.tolist(), factors(schedule, whole), strict=False))
        end = factors(schedule, whole)[-1]
        # The first step sees its noise at its own scale, which is the path's start at another.
        first = float(schedule.initial_std(whole[0]) / schedule.alpha(whole[0]))
        own = float(schedule.initial_std(torch.tensor(times[0])))
        self.rows = {times[0]: (first / own, end)}
        self.rows |= {t: (1 / float(schedule.alpha(torch.tensor(t))), end / found[t]) for t in times[1:]}

    def forward(self, x_t, t, class_labels):
        self.calls.append((t, class_labels))
        scale, factor = torch.tensor([self.rows[float(time)] for time in t]).unbind(1)
        return MEAN + self.gain * factor[:, None] * (scale[:, None] * x_t - MEAN)


@pytest.fixture
def taught(teacher, schedule):
    pairs, times, whole = make(teacher)
    return pairs, Student(NetworkDenoiser(FlowMap(schedule, times, whole), schedule, "x0"), times)


@pytest.mark.parametrize("shares", [(), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_the_exact_flow_map_has_no_loss_and_a_gradient_back_to_itself(taught, shares):
    pairs, student = taught
    regression, gain = Regression(pairs=pairs, batch=6, shares=shares), student.denoiser.network.gain
    assert regression.loss(student, Rng(0, 1)).item() < 1e-18
    for value, sign in ((1.1, 1), (0.9, -1)):
        gain.data.fill_(value)
        (gradient,) = torch.autograd.grad(regression.loss(student, Rng(0, 1)), gain)
        assert gradient.item() * sign > 1e-4


def test_a_batch_teaches_every_step_its_share_under_the_right_conditions(taught):
    pairs, student = taught
    rng = Rng(3, 4, index=2)
    loss = Regression(pairs=pairs, batch=8, shares=(2, 1, 1), distance=absolute_error).loss(student, rng)
    t, labels = student.denoiser.network.calls[-1]
    assert [int((t == time).sum()) for time in student.times] == [4, 2, 2]
    assert torch.equal(labels, LABELS["class_labels"][shuffled(N, 8, rng)])
    assert len(student.denoiser.network.calls) == 1
    assert loss.item() < 1e-9


def test_the_loss_is_that_of_each_step_on_what_it_is_shown(taught):
    pairs, student = taught
    student.denoiser.network.gain.data.fill_(1.3)
    rng = Rng(3, 4)
    rows = shuffled(N, 9, rng)
    cond = {"class_labels": LABELS["class_labels"][rows]}
    shown = [float(start_of_student(student)) * pairs.noise, *pairs.states.values()]
    for k, (t, x_t) in enumerate(zip(student.times, shown, strict=True)):
        shares = tuple(float(i == k) for i in range(3))
        loss = Regression(pairs=pairs, batch=9, shares=shares).loss(student, rng)
        made = student.denoiser(x_t[rows], torch.full((9,), t), cond)
        close(loss, squared_error(made, pairs.x0[rows]).mean())
        assert loss.item() > 1e-4


def start_of_student(student):
    return student.times[0] if isinstance(student.denoiser.schedule, Karras) else 1.0


def test_shares_hold_in_every_batch_and_vary_over_them():
    counts = torch.stack([torch.bincount(step_numbers((1, 3), 6, Rng(0, i)), minlength=2) for i in range(40)])
    assert set(counts[:, 0].tolist()) == {1, 2}
    assert counts[:, 0].double().mean().item() == pytest.approx(1.5, abs=0.25)
    assert torch.equal(step_numbers((1, 0, 1), 4, Rng(1, 2)), torch.tensor([0, 0, 2, 2]))


@pytest.mark.parametrize("shares", [(-1.0, 2.0), (0.0, 0.0)])
def test_impossible_shares_are_refused(shares):
    with refused("shares must be at least 0, and one of them more"):
        Regression(pairs=Pairs(torch.ones(2, 2), torch.ones(2, 2), {}), shares=shares)
