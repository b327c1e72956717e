"""The guard against closed forms, and a run that drifts, goes back and resumes."""

import math

import pytest
import torch
from refusals import refused
from torch import nn

from distill.guard import (
    GROUPS,
    Guard,
    Look,
    as_record,
    difference,
    distance,
    from_record,
    is_worse,
    left_out,
    middle_layer,
    pooled,
)
from distill.regression import Pairs
from distill.student import Student
from scorefield.denoiser import NetworkDenoiser
from scorefield.models.networks import ResidualMLP
from scorefield.schedule import RectifiedFlow

close = torch.testing.assert_close


class Affine(nn.Module):
    """x0 = scale * x_t + shift, through a layer that a guard can listen to."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(shift))
        self.middle = nn.Identity()

    def forward(self, x_t, t):
        return self.middle(self.scale * x_t + self.shift)


def look_of(values):
    mean = sum(values) / len(values)
    lacking = tuple((sum(values) - value) / (len(values) - 1) for value in values)
    return Look(mean, 0.0, 0.0, 0.0, lacking)


def make_guard(number=256, **changes):
    noise = torch.randn(number, 3, generator=torch.Generator().manual_seed(0))
    teacher = NetworkDenoiser(Affine(), RectifiedFlow(), "x0")
    return Guard(teacher=teacher, layer="middle", pairs=Pairs(noise, noise, {}), **changes)


def student_of(network):
    return Student(NetworkDenoiser(network, RectifiedFlow(), "x0"), (1.0,))


def test_distance_of_shifted_gaussians_is_their_shift_over_the_spread():
    wanted = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    size = wanted.var(0).sum()
    shift = torch.tensor([1.0, 0.0, -2.0, 0.0], dtype=torch.float64)
    close(distance([wanted + shift], [wanted]), float(5 / size))
    # Stretched by 2 about its mean, each principal axis adds its own variance: tr A (1 - 2)^2.
    stretched = (wanted - wanted.mean(0)) * 2 + wanted.mean(0)
    close(distance([stretched, wanted], [wanted, wanted]), 1.0)


def test_a_student_that_is_its_teacher_is_at_no_distance():
    look = make_guard().look(student_of(Affine()))
    assert look.error == 0
    assert look.brightness == 0
    assert abs(look.distance) < 1e-6
    assert max(map(abs, look.left_out)) < 1e-6


def test_halves_of_the_teachers_images_are_a_scale_that_falls_with_their_number():
    few, many = (make_guard(number).distance_of_halves() for number in (64, 4096))
    assert 0 < many < few / 4
    guard = make_guard()
    noise = guard.pairs.noise
    sorted_ = Guard(teacher=guard.teacher, layer="middle", pairs=Pairs(noise, noise.sort(0).values, {}))
    assert sorted_.distance_of_halves() < 0.3, "halves are drawn at random, whatever the order"


def test_teacher_and_student_are_shown_with_the_same_noise():
    guard = make_guard()
    theirs, ours = guard.beside(student_of(Affine(shift=0.5)), 20)
    assert torch.equal(theirs, guard.pairs.x0[:20])
    close(ours - theirs, torch.full((20, 3), 0.5))


@pytest.mark.parametrize("batch", [64, 100])
def test_brightness_and_error_say_by_how_much(batch):
    look = make_guard(batch=batch).look(student_of(Affine(shift=0.25)))
    assert look.brightness == pytest.approx(0.25, abs=1e-6)
    assert look.error == pytest.approx(0.25, abs=1e-6)
    assert look.distance > 0.02
    assert look.kernel > 0
    further = make_guard().look(student_of(Affine(shift=0.5)))
    assert further.distance > look.distance


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.6, 0.3)])
@pytest.mark.parametrize("at_once", [1, 24, 64])
def test_how_many_images_a_call_takes_changes_nothing(at_once, times):
    """A run that goes on in smaller passes compares with looks of larger ones."""
    student = Student(NetworkDenoiser(Affine(scale=0.8, shift=0.25), RectifiedFlow(), "x0"), times)
    whole, few = make_guard(number=100).look(student), make_guard(number=100, at_once=at_once).look(student)
    for name in ("distance", "kernel", "error", "brightness"):
        assert getattr(few, name) == pytest.approx(getattr(whole, name), rel=1e-5), name


def test_features_are_taken_at_the_noise_levels_asked_for():
    guard = make_guard(ratios=(0.5, 2.0))
    low, high = guard.features(torch.zeros(256, 3))
    # On a flow x_t = (1 - t) x0 + t eps with t = r / (1 + r): of zeros, the spread of the features is t.
    assert float(low.std()) == pytest.approx(1 / 3, rel=0.1)
    assert float(high.std()) == pytest.approx(2 / 3, rel=0.1)


def test_the_error_of_a_difference_is_the_jackknife_of_a_mean():
    """For a mean, the delete-one jackknife is the textbook's s / sqrt(n)."""
    values = torch.randn(GROUPS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gap, error = difference(look_of((values + 3).tolist()), look_of([0.0] * GROUPS))
    assert gap == pytest.approx(float(values.mean() + 3))
    assert error == pytest.approx(float(values.std() / math.sqrt(GROUPS)))


def test_scatter_that_both_looks_share_does_not_count_nor_what_lies_within_its_noise():
    scatter = torch.randn(GROUPS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    best, now = look_of(scatter.tolist()), look_of((scatter + 0.01).tolist())
    assert is_worse(now, best)
    assert not is_worse(best, now)
    assert not is_worse(best, best)
    noisy = Look(0.3, 0.0, 0.0, 0.0, look_of([1.0, -1.0] * (GROUPS // 2)).left_out)
    assert not is_worse(noisy, look_of([0.0] * GROUPS))
    nan = make_guard().look(student_of(Affine(scale=float("nan"))))
    assert math.isnan(nan.distance)
    assert is_worse(nan, make_guard().look(student_of(Affine())))


def test_each_group_is_left_out_once_and_a_record_holds_the_look():
    lacking = [sorted(set(range(20)) - set(kept.tolist())) for kept in left_out(20)]
    assert len(lacking) == GROUPS
    assert sorted(number for group in lacking for number in group) == list(range(20))
    look = look_of([0.1 * number for number in range(GROUPS)])
    assert from_record(as_record(look, 7)) == look
    assert as_record(look, 7)["step"] == 7
    with refused("at least 16 pairs; got 8"):
        make_guard(number=8)


def test_features_are_averaged_over_positions():
    grid = torch.arange(24.0).reshape(2, 3, 2, 2)
    close(pooled(grid), grid.mean((2, 3)))
    tokens = torch.arange(24.0).reshape(2, 4, 3)
    close(pooled(tokens), tokens.mean(1))
    close(pooled(grid[:, :, 0, 0]), grid[:, :, 0, 0])
    with refused("features must be"):
        pooled(torch.zeros(3))


class Small(nn.Module):
    """A UNet whose parts have names of their own, beside a time embedding longer than any of its stacks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))
        self.down, self.deep = nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 1, 4, 4)

    def forward(self, x_t, t):
        h = self.embedding(t[:, None].expand(-1, 8))[:, :, None, None]
        return self.up(self.deep(self.down(x_t) + h))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.leave = nn.Linear(6, 4)

    def forward(self, x_t, t):
        h = self.enter(x_t.reshape(len(x_t), 4, 4))
        for block in self.blocks:
            h = block(h)
        return self.leave(h).reshape(x_t.shape)


@pytest.mark.parametrize(("network", "shape", "expected"), [
    (ResidualMLP((2,), depth=4), (2,), ResidualMLP((2,), depth=4).bottleneck), (Small(), (1, 8, 8), "deep"),
    (Tokens(), (1, 4, 4), "blocks.2"),
])  # fmt: skip
def test_the_middle_of_a_network_depends_on_the_image_and_is_narrow(network, shape, expected):
    assert middle_layer(NetworkDenoiser(network, RectifiedFlow(), "x0"), shape, {}) == expected


def test_a_network_that_does_not_look_at_the_image_has_no_middle():
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, x_t, t):
            return self.layer(t[:, None])

    with refused("no part of a Blind depends on the image"):
        middle_layer(NetworkDenoiser(Blind(), RectifiedFlow(), "x0"), (2,), {})
