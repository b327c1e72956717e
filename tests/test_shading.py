import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from sds.shading import Shading, ShadingSchedule, random_background, shaded
from sds.views import CameraDistribution

close = torch.testing.assert_close


def light(n=1, ambient=0.1, diffuse=0.9, textureless=False, at=(0.0, 0.0, 2.0)):
    return Shading(
        torch.tensor(at, dtype=torch.float64).expand(n, 3), torch.full((n,), ambient), torch.full((n,), diffuse),
        torch.full((n,), textureless),
    )  # fmt: skip


def point(x, y, z):
    return torch.tensor([[[x, y, z]]], dtype=torch.float64)


@pytest.mark.parametrize("textureless", [False, True])
def test_a_point_light_shades_by_the_cosine(textureless):
    albedo = point(0.8, 0.5, 0.2)
    base = torch.ones_like(albedo) if textureless else albedo
    # From (1, 0, 1), the light at (0, 0, 2) is at 45 degrees from the upward normal.
    for normal, cosine in (
        ((0.0, 0.0, 1.0), math.sqrt(0.5)),
        ((1.0, 0.0, 0.0), 0.0),
        ((-1.0, 0.0, 0.0), math.sqrt(0.5)),
    ):
        colour = shaded(albedo, point(*normal), point(1.0, 0.0, 1.0), light(textureless=textureless))
        close(colour, base * (0.1 + 0.9 * cosine), rtol=1e-6, atol=1e-7)


def test_without_diffuse_light_the_albedo_is_shown():
    albedo = point(0.8, 0.5, 0.2)
    close(shaded(albedo, point(0.0, 0.0, 1.0), point(0.0, 0.0, 0.0), light(ambient=1.0, diffuse=0.0)), albedo)


def test_what_is_not_lit_needs_no_normals():
    albedo = point(0.8, 0.5, 0.2)
    dim = light(ambient=0.5, diffuse=0.0)
    assert not dim.needs_normals
    close(shaded(albedo, None, point(0.0, 0.0, 0.0), dim), albedo * 0.5)


def test_shading_moves_normals():
    normal = point(0.6, 0.0, 0.8).requires_grad_()
    shaded(point(0.5, 0.5, 0.5), normal, point(0.0, 0.0, 0.0), light()).sum().backward()
    close(normal.grad, point(0.0, 0.0, 0.9 * 1.5), rtol=1e-6, atol=1e-9)


def test_each_ray_has_the_light_of_its_view():
    views = Shading(*(torch.arange(6.0).view(3, 2)[:, :1].squeeze(1) for _ in range(4)))
    close(views.at(torch.tensor([2, 0, 2])).ambient, torch.tensor([4.0, 0.0, 4.0]))


@pytest.fixture
def views(generator):
    return CameraDistribution().draw(20_000, generator)


def test_albedo_alone_at_first(views, generator):
    schedule = ShadingSchedule(albedo_until=10)
    shading = schedule.draw(9, views, generator)
    assert bool((shading.ambient == 1).all())
    assert not shading.needs_normals
    assert not bool(shading.textureless.any())
    assert schedule.draw(10, views, generator).needs_normals


def test_later_the_published_shares(views, generator):
    shading = ShadingSchedule().draw(1000, views, generator)
    lit = shading.diffuse > 0
    close(shading.ambient[lit].unique(), torch.tensor([0.1]))
    close(shading.diffuse[lit].unique(), torch.tensor([0.9]))
    deviation = 4 * math.sqrt(0.25 / 20_000)
    assert lit.float().mean().item() == pytest.approx(0.75, abs=deviation)
    assert shading.textureless[lit].float().mean().item() == pytest.approx(0.5, abs=deviation)
    assert not bool(shading.textureless[~lit].any())


def test_the_light_comes_from_round_the_camera(views, generator):
    shading = ShadingSchedule(light_distance=(0.8, 1.5)).draw(1000, views, generator)
    distance = shading.light.norm(dim=1)
    assert 0.8 <= distance.min() < 0.81
    assert 1.49 < distance.max() <= 1.5
    assert distance.mean().item() == pytest.approx(1.15, abs=0.01)
    # Far cameras see the noise as small: the direction is theirs.
    far = replace(views, camera_to_world=views.camera_to_world * 1000)
    shading = ShadingSchedule().draw(1000, far, generator)
    cosine = torch.cosine_similarity(shading.light, far.position)
    assert cosine.min() > 0.99
    # Near ones hardly bound it.
    near = replace(views, camera_to_world=views.camera_to_world * 1e-3)
    assert (
        abs(torch.cosine_similarity(ShadingSchedule().draw(1000, near, generator).light, near.position).mean())
        < 0.02
    )


def test_the_same_numbers_are_drawn_at_every_step(views):
    early, late = (ShadingSchedule().draw(step, views, torch.Generator().manual_seed(1)) for step in (0, 5000))
    assert torch.equal(early.light, late.light)


@pytest.mark.parametrize("wrong", [{"lit": 1.1}, {"textureless": -0.1}, {"ambient": 2.0}])
def test_what_is_no_probability_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ShadingSchedule(**wrong)


def test_random_backgrounds_are_uniform_and_come_as_often_as_asked(generator):
    drawn = [random_background(3, generator, 0.3) for _ in range(2000)]
    given = [colours for colours in drawn if colours is not None]
    assert len(given) / 2000 == pytest.approx(0.3, abs=0.04)
    colours = torch.cat(given)
    assert colours.shape[1] == 3
    assert stats.kstest(colours.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert random_background(2, generator, 0.0) is None
    assert random_background(2, generator, 1.0) is not None
