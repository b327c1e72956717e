"""Curves at fixed views, times and noise, against a teacher whose answer is known."""

import math
from dataclasses import dataclass

import pytest
import torch

from scorefield.gradient import ScoreGradient
from scorefield.schedule import RectifiedFlow, Schedule, VariancePreserving
from sds.canvas import Canvas
from sds.looks import Look
from sds.lora import CAMERA
from sds.losses import csd, sds
from sds.probe import FRACTIONS, Probe
from sds.vsd import Untold

close = torch.testing.assert_close
MEAN = 0.25


@dataclass(frozen=True)
class Point:
    """The denoiser of a distribution that is one image: it expects that image, whatever it is shown."""

    schedule: Schedule

    def __call__(self, x_t, t, cond):
        return torch.full_like(x_t, MEAN) + cond.get("shift", torch.zeros(1)).view(-1, 1, 1, 1)


def make_probe(canvas, schedule, penalty=0.0):
    def look(step):
        x0 = canvas()
        return Look(x0, {}, penalty * canvas.pixels.square().sum())

    return Probe(looks=[look], target=Point(schedule), decode=lambda x0: 2 * x0, network=canvas)


@pytest.fixture
def canvas(generator):
    return Canvas(torch.randn(2, 3, 4, 4, generator=generator))


@pytest.mark.parametrize("schedule", [VariancePreserving.scaled_linear(), RectifiedFlow()])
def test_residual_gradient_and_pictures_are_those_of_the_closed_form(canvas, schedule):
    gap = float((canvas.pixels.detach() - MEAN).square().mean().sqrt())
    figures, pictures = make_probe(canvas, schedule)(0, sds(Point(schedule)))
    for fraction in FRACTIONS:
        t = schedule.at(torch.tensor([fraction], dtype=torch.float64)).float()
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        assert figures[f"probe/residual/t_{fraction:g}"] == pytest.approx(gap, rel=1e-5)
        # w (eps_s - eps) = sigma^2 alpha / sigma (x0 - mean)
        assert figures[f"probe/gradient/t_{fraction:g}"] == pytest.approx(alpha * sigma * gap, rel=1e-4)
    assert figures["probe/residual"] == pytest.approx(gap, rel=1e-5)
    assert "probe/score_to_penalty" not in figures
    assert pictures.shape == (2 * (1 + len(FRACTIONS)), 3, 4, 4)
    close(pictures[:2], 2 * canvas().detach())
    close(pictures[2:], torch.full_like(pictures[2:], 2 * MEAN))


def test_the_balance_is_the_ratio_of_the_two_gradients(canvas):
    """From a time at which sigma^2 alpha / sigma is known: both gradients are known."""
    schedule = RectifiedFlow()
    half = sds(Point(schedule), times=lambda n, schedule, generator: torch.full((n,), 0.5))
    figures, _ = make_probe(canvas, schedule, penalty=0.3)(0, half)
    pixels = canvas.pixels.detach()
    score = 0.25 * (pixels - MEAN) / len(pixels)
    assert figures["probe/score_to_penalty"] == pytest.approx(
        float(score.norm() / (0.6 * pixels).norm()), rel=1e-4
    )
    assert canvas.pixels.grad is None


def test_the_same_scene_has_the_same_figures_and_a_better_one_a_smaller_residual(canvas):
    schedule = VariancePreserving.scaled_linear()
    probe, method = make_probe(canvas, schedule), sds(Point(schedule))
    first = probe(0, method)[0]
    assert probe(100, method)[0] == first
    with torch.no_grad():
        canvas.pixels.lerp_(torch.tensor(MEAN), 0.5)
    assert probe(200, method)[0]["probe/residual"] == pytest.approx(first["probe/residual"] / 2, rel=1e-5)


def test_other_losses_have_figures_too(canvas):
    schedule = VariancePreserving.scaled_linear()
    figures, _ = make_probe(canvas, schedule)(0, csd(Point(schedule), {"shift": torch.ones(1)}))
    t = schedule.at(torch.tensor([0.5], dtype=torch.float64)).float()
    expected = float(schedule.alpha(t) * schedule.sigma(t))  # the shift is 1 everywhere
    assert figures["probe/gradient/t_0.5"] == pytest.approx(expected, rel=1e-4)
    figures, _ = make_probe(canvas, schedule)(0, _Still())
    assert not any(name.startswith("probe/gradient") for name in figures)
    assert math.isfinite(figures["probe/residual"])


def views_of(canvas, asked, penalty=0.3):
    """A look at each particle alone, which writes down whether it was asked for a graph."""

    def look_at(number):
        def look(step):
            asked.append((number, step, torch.is_grad_enabled()))
            x0 = canvas()[number : number + 1]
            return Look(x0, {CAMERA: torch.ones(1, 3, 4)}, penalty * x0.square().sum())

        return look

    return [look_at(number) for number in range(len(canvas.pixels))]


def test_only_the_balance_has_a_graph_and_of_one_view_at_a_time(canvas):
    asked, shown = [], []
    schedule = RectifiedFlow()
    still = sds(Point(schedule), times=lambda n, schedule, generator: torch.full((n,), 0.5))

    def decode(x0):
        shown.append((len(x0), torch.is_grad_enabled()))
        return x0

    probe = Probe(looks=views_of(canvas, asked), target=Point(schedule), decode=decode, network=canvas)
    figures, pictures = probe(3, still)
    assert asked == [(0, 3, False), (1, 3, False), (0, 3, True), (1, 3, True)]
    assert set(shown) == {(1, False)}
    pixels = canvas.pixels.detach()
    score = 0.25 * (pixels - MEAN)
    assert figures["probe/score_to_penalty"] == pytest.approx(
        float(score.norm() / (0.6 * pixels).norm()), rel=1e-4
    )
    asked.clear()
    close(probe.pictures(3), pictures)
    assert asked == [(0, 3, False), (1, 3, False)]
    without = Probe(looks=views_of(canvas, asked, 0.0), target=Point(schedule), decode=decode, network=canvas)
    assert without.balance(3, still) == {}


def test_the_target_is_told_what_it_is_not_kept_from(canvas):
    """What VSD's phi alone is told is for the caller to say: a teacher may know cameras itself."""

    class Told(Point):
        def __call__(self, x_t, t, cond):
            told.append(set(cond))
            return super().__call__(x_t, t, cond)

    told, schedule = [], RectifiedFlow()
    for target, expected in ((Told(schedule), {CAMERA}), (Untold(Told(schedule), (CAMERA,)), set())):
        told.clear()
        Probe(looks=views_of(canvas, []), target=target, decode=lambda x0: x0, network=canvas).pictures(0)
        assert told == [expected] * len(FRACTIONS)


class _Still:
    """A loss of the reader's own."""

    def gradient(self, x0, cond, *, generator):
        return ScoreGradient(torch.zeros_like(x0), {"gradient_rms": torch.zeros(())})
