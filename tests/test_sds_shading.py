"""Light by the cosine, drawn for every view as published."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from sds.cameras import CameraDistribution
from sds.shading import Shading, ShadingSchedule, random_background, shaded

close = torch.testing.assert_close


def light(ambient=0.1, diffuse=0.9, textureless=False):
    at = torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64)
    return Shading(at, *(torch.tensor([value]) for value in (ambient, diffuse, textureless)))


def point(x, y, z):
    return torch.tensor([[[x, y, z]]], dtype=torch.float64)


ALBEDO = point(0.8, 0.5, 0.2)


@pytest.mark.parametrize("textureless", [False, True])
def test_a_point_light_shades_by_the_cosine(textureless):
    base = torch.ones_like(ALBEDO) if textureless else ALBEDO
    # From (1, 0, 1), the light at (0, 0, 2) is at 45 degrees from the upward normal.
    for normal, cosine in (
        ((0.0, 0.0, 1.0), math.sqrt(0.5)), ((1.0, 0.0, 0.0), 0.0), ((-1.0, 0.0, 0.0), math.sqrt(0.5)),
    ):  # fmt: skip
        colour = shaded(ALBEDO, point(*normal), point(1.0, 0.0, 1.0), light(textureless=textureless))
        close(colour, base * (0.1 + 0.9 * cosine), rtol=1e-6, atol=1e-7)


def test_without_diffuse_light_the_albedo_is_shown_and_no_normal_is_needed_and_with_it_normals_move():
    dim = light(ambient=0.5, diffuse=0.0)
    assert not dim.needs_normals
    for normals in (None, point(0.0, 0.0, 1.0)):
        close(shaded(ALBEDO, normals, point(0.0, 0.0, 0.0), dim), ALBEDO * 0.5)
    normal = point(0.6, 0.0, 0.8).requires_grad_()
    shaded(point(0.5, 0.5, 0.5), normal, point(0.0, 0.0, 0.0), light()).sum().backward()
    close(normal.grad, point(0.0, 0.0, 0.9 * 1.5), rtol=1e-6, atol=1e-9)
    three = Shading(*[torch.tensor([0.0, 2.0, 4.0])] * 4)
    assert three.at(torch.tensor([2, 0, 2])).ambient.tolist() == [4.0, 0.0, 4.0]


@pytest.fixture
def views(generator):
    return CameraDistribution().draw(20_000, generator)


def test_albedo_alone_at_first_and_later_the_published_shares_by_the_same_numbers(views):
    early, late = (ShadingSchedule().draw(step, views, torch.Generator().manual_seed(1)) for step in (999, 1000))
    assert bool((early.ambient == 1).all())
    assert not early.needs_normals
    assert not bool(early.textureless.any())
    assert torch.equal(early.light, late.light)
    lit, deviation = late.diffuse > 0, 4 * math.sqrt(0.25 / 20_000)
    close(late.ambient[lit].unique(), torch.tensor([0.1]))
    close(late.diffuse[lit].unique(), torch.tensor([0.9]))
    assert lit.float().mean().item() == pytest.approx(0.75, abs=deviation)
    assert late.textureless[lit].float().mean().item() == pytest.approx(0.5, abs=deviation)
    assert not bool(late.textureless[~lit].any())


def test_the_light_comes_from_round_the_camera(views, generator):
    def seen_from(factor):
        moved = replace(views, camera_to_world=views.camera_to_world * factor)
        drawn = ShadingSchedule(light_distance=(0.8, 1.5)).draw(1000, moved, generator).light
        return drawn.norm(dim=1), torch.cosine_similarity(drawn, moved.position)

    distance, far = seen_from(1000)
    assert 0.8 <= distance.min() < 0.81
    assert 1.49 < distance.max() <= 1.5
    assert distance.mean().item() == pytest.approx(1.15, abs=0.01)
    # Far cameras see the noise as small: the direction is theirs. Near ones hardly bound it.
    assert far.min() > 0.99
    assert abs(seen_from(1e-3)[1].mean()) < 0.02


def test_random_backgrounds_are_uniform_and_come_as_often_as_asked(generator):
    drawn = [random_background(3, generator, 0.3) for _ in range(2000)]
    given = [colours for colours in drawn if colours is not None]
    assert len(given) / 2000 == pytest.approx(0.3, abs=0.04)
    assert stats.kstest(torch.cat(given).flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert random_background(2, generator, 0.0) is None
    assert random_background(2, generator, 1.0).shape == (2, 3)
    for wrong in ({"lit": 1.1}, {"textureless": -0.1}, {"ambient": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ShadingSchedule(**wrong)
