"""Curves at fixed views, times and noise, against a teacher whose answer is known."""

import math
from dataclasses import dataclass

import pytest
import torch

from scorefield.gradient import ScoreGradient
from scorefield.schedule import RectifiedFlow, Schedule, VariancePreserving
from sds.canvas import Canvas
from sds.losses import csd, sds
from sds.probe import FRACTIONS, Probe
from sds.training import Observation
from sds.vsd import CAMERA, WithoutConditions

close = torch.testing.assert_close
MEAN, VP = 0.25, VariancePreserving.scaled_linear()


@dataclass(frozen=True)
class Point:
    """The denoiser of a distribution that is one image: it expects that image, whatever it is shown."""

    schedule: Schedule

    def __call__(self, x_t, t, cond):
        return torch.full_like(x_t, MEAN) + cond.get("shift", torch.zeros(1)).view(-1, 1, 1, 1)


@pytest.fixture
def canvas(generator):
    return Canvas(torch.randn(2, 3, 4, 4, generator=generator))


def views_of(canvas, asked, penalty=0.3):
    """Each particle alone, and whether it was asked for a graph."""

    def alone(number):
        def observe(step):
            asked.append((number, step, torch.is_grad_enabled()))
            x0 = canvas()[number : number + 1]
            return Observation(x0, {CAMERA: torch.ones(1, 3, 4)}, penalty * x0.square().sum())

        return observe

    return [alone(number) for number in range(len(canvas.pixels))]


def make_probe(canvas, schedule, penalty=0.0, asked=None, **changes):
    views = views_of(canvas, [] if asked is None else asked, penalty)
    settings = {"views": views, "target": Point(schedule), "decode": lambda x0: 2 * x0, "network": canvas}
    return Probe(**{**settings, **changes})


@pytest.mark.parametrize("schedule", [VP, RectifiedFlow()])
def test_residual_gradient_and_pictures_are_those_of_the_closed_form(canvas, schedule):
    gap = float((canvas.pixels.detach() - MEAN).square().mean().sqrt())
    probe = make_probe(canvas, schedule)
    figures, pictures = probe(0, sds(Point(schedule)))
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
    assert probe(100, sds(Point(schedule)))[0] == figures, "of the same scene"
    canvas.pixels.data.lerp_(torch.tensor(MEAN), 0.5)
    assert probe(200, sds(Point(schedule)))[0]["probe/residual"] == pytest.approx(gap / 2, rel=1e-5)


def test_other_losses_have_figures_too(canvas):
    figures, _ = make_probe(canvas, VP)(0, csd(Point(VP), {"shift": torch.ones(1)}))
    t = VP.at(torch.tensor([0.5], dtype=torch.float64)).float()
    expected = float(VP.alpha(t) * VP.sigma(t))  # the shift is 1 everywhere
    assert figures["probe/gradient/t_0.5"] == pytest.approx(expected, rel=1e-4)

    class Still:
        """A loss of the reader's own."""

        def gradient(self, x0, cond, *, generator):
            return ScoreGradient(torch.zeros_like(x0), {"gradient_rms": torch.zeros(())})

    figures, _ = make_probe(canvas, VP)(0, Still())
    assert not any(name.startswith("probe/gradient") for name in figures)
    assert math.isfinite(figures["probe/residual"])


def test_only_the_balance_has_a_graph_and_of_one_view_at_a_time(canvas):
    """From a time at which sigma^2 alpha / sigma is known: the score's and the penalty's gradient are known."""
    asked, shown, schedule = [], [], RectifiedFlow()
    still = sds(Point(schedule), times=lambda n, schedule, generator: torch.full((n,), 0.5))
    decode = lambda x0: shown.append((len(x0), torch.is_grad_enabled())) or x0  # noqa: E731
    probe = make_probe(canvas, schedule, 0.3, asked, decode=decode)
    figures, pictures = probe(3, still)
    assert asked == [(0, 3, False), (1, 3, False), (0, 3, True), (1, 3, True)]
    assert set(shown) == {(1, False)}
    pixels = canvas.pixels.detach()
    expected = float((0.25 * (pixels - MEAN)).norm() / (0.6 * pixels).norm())
    assert figures["probe/score_to_penalty"] == pytest.approx(expected, rel=1e-4)
    assert canvas.pixels.grad is None
    asked.clear()
    close(probe.pictures(3), pictures)
    assert asked == [(0, 3, False), (1, 3, False)]
    assert make_probe(canvas, schedule).balance(3, still) == {}


def test_the_target_is_told_what_it_is_not_kept_from(canvas):
    """What VSD's phi alone is told is for the caller to say: a teacher may know cameras itself."""

    class Told(Point):
        def __call__(self, x_t, t, cond):
            told.append(set(cond))
            return super().__call__(x_t, t, cond)

    told = []
    for target, expected in ((Told(VP), {CAMERA}), (WithoutConditions(Told(VP), (CAMERA,)), set())):
        told.clear()
        make_probe(canvas, VP, target=target).pictures(0)
        assert told == [expected] * len(FRACTIONS)
