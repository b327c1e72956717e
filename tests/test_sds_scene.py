"""Pictures of a scene against closed forms, nerfstudio, finite differences and the toy world."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from sds import scene as module
from sds.cameras import CameraDistribution, orbit
from sds.field import DenseGrid, Field, cone_blob
from sds.scene import Scene, background_network, frequency_network, grid_scene, ray_weights
from sds.shading import Shading
from toyworld.camera import FIELD_OF_VIEW, focal_length
from toyworld.render import render
from toyworld.scene import Scene as ToyScene
from toyworld.solids import signed_distance

close = torch.testing.assert_close
FOCAL = focal_length(1, FIELD_OF_VIEW)
WHITE = torch.ones(3, dtype=torch.float64)


class Constant(nn.Module):
    """Raw density where ``inside`` says, far below 0 elsewhere, and one colour; cast to what a scene needs."""

    def __init__(self, inside=None, colour=0.8):
        super().__init__()
        self.inside, self.logit = inside, math.log(colour / (1 - colour))
        self.counts = []

    def forward(self, points):
        self.counts.append(len(points))
        inside = torch.ones(len(points), dtype=torch.bool) if self.inside is None else self.inside(points)
        raw = torch.where(inside, 0.0, -1.0).to(points)
        return torch.cat([raw[:, None], torch.full_like(points, self.logit)], 1)


def filled(density, inside=None, colour=0.8, half_size=1.0):
    """A field of constant density, in the whole cube or where ``inside`` says."""
    return Field(
        Constant(inside, colour), half_size=half_size, activation=lambda raw: density * (raw >= 0).to(raw)
    )


def around(azimuth, elevation, distance=3.0, dtype=torch.float64):
    columns = torch.broadcast_tensors(
        *(torch.as_tensor(x, dtype=dtype) for x in (azimuth, elevation, distance, FOCAL))
    )
    return orbit(*(column.reshape(-1) for column in columns))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def learner(network=None, dtype=torch.float64, **settings):
    """A scene that is transparent here and opaque there, with a background of its own."""
    network = network or DenseGrid((2, 4))
    for parameter in network.parameters():
        parameter.data += torch.randn(parameter.shape, generator=seeded(3))
    field = Field(network, half_size=0.9, blob=cone_blob(3.0, 0.6))
    return Scene(field, background=background_network(generator=seeded(4)), **{"num_samples": 6, **settings}).to(
        dtype
    )


def lit(views, textureless=(True, False)):
    b = len(views)
    return Shading(
        light=views.position * 0.4 + 0.3, ambient=torch.full((b,), 0.2), diffuse=torch.full((b,), 0.8),
        textureless=torch.tensor(textureless).repeat(b)[:b],
    )  # fmt: skip


def chord(views, size, half=1.0):
    """Length of each pixel's ray in the cube: (b, 1, h, w)."""
    origins, directions = views.position[:, None, None], views.directions(size, size)
    ends = torch.stack([(-half - origins) / directions, (half - origins) / directions])
    return (ends.amax(0).amin(-1) - ends.amin(0).amax(-1)).clamp(min=0)[:, None], ends.amin(0).amax(-1)[:, None]


def images(rendering):
    return {field.name: getattr(rendering, field.name) for field in fields(rendering)}


def test_a_cube_of_fog_is_as_opaque_as_beer_and_lambert_say():
    views = around([20.0, 200.0], [10.0, 60.0])
    length, near = chord(views, 9)
    assert 0 < (length == 0).sum() < length.numel() / 2
    for num_samples in (1, 5, 400):
        rendering = Scene(filled(0.7), num_samples=num_samples)(views, height=9, width=9, background=-WHITE)
        opacity = 1 - torch.exp(-0.7 * length)
        close(rendering.opacity, opacity, rtol=1e-6, atol=1e-7)
        close(rendering.rgb, (opacity * 0.8 * 2 - 1).expand(-1, 3, -1, -1), rtol=1e-6, atol=1e-7)
    # The mean of an exponential that is cut off at the length, for the finest sampling.
    left = torch.exp(-0.7 * length)
    depth = near + 1 / 0.7 - length * left / (1 - left)
    close(rendering.depth, torch.where(length > 0, depth, 0.0), rtol=0, atol=1e-4)
    assert rendering.normals is None
    assert rendering.orientation is None


def test_weights_are_those_of_nerfstudio_where_all_is_well_and_an_infinite_density_is_a_wall():
    from nerfstudio.cameras.rays import Frustums, RaySamples

    density, length = torch.rand(2, 5, 7, 1, generator=seeded(), dtype=torch.float64) * 3
    nothing = torch.zeros(5, 7, 3, dtype=torch.float64)
    frustums = Frustums(nothing, nothing, nothing[..., :1], nothing[..., :1], nothing[..., :1])
    expected = RaySamples(frustums, deltas=length).get_weights(density)
    close(ray_weights(density[..., 0], length[..., 0]), expected[..., 0])
    weights = ray_weights(torch.tensor([[0.0, torch.inf, 1.0, torch.inf]]), torch.ones(1, 4))
    close(weights, torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


def test_a_scene_that_diverged_does_not_look_empty():
    """nerfstudio's weights turn nan into 0."""
    scene = learner()
    scene.field.network.grids[0].data[0, 0] = torch.nan
    rendering = scene(around(0.0, 0.0), height=4, width=4)
    assert bool(rendering.opacity[:, :, 1:3, 1:3].isnan().all())
    assert bool(rendering.rgb[:, :, 1:3, 1:3].isnan().all())


@pytest.mark.parametrize("learned", [False, True])
def test_matter_meets_its_background_once(learned):
    """What is hidden of the background is the opacity, not its square: edges are not darkened."""
    views = around([20.0, 200.0], [10.0, 60.0])
    scene = Scene(filled(0.7, colour=0.3), background=background_network(generator=seeded()).double())
    dark, bright = (scene(views, height=8, width=8, background=c * WHITE) for c in (-1.0, 1.0))
    hidden = 1 - (bright.rgb - dark.rgb) / 2
    close(hidden, dark.opacity.expand_as(hidden), rtol=0, atol=1e-7)
    rendering = scene(views, height=8, width=8) if learned else bright
    sky = torch.ones_like(rendering.rgb)
    if learned:
        sky = scene.background(views.directions(8, 8).view(-1, 3)).view(2, 8, 8, 3).permute(0, 3, 1, 2)
    expected = rendering.opacity * 0.3 + (1 - rendering.opacity) * sky
    close(rendering.rgb, expected * 2 - 1, rtol=0, atol=1e-7)
    assert (rendering.opacity - 0.5).abs().min() < 0.1


def test_each_view_has_a_background_of_its_own_that_fits():
    views = around([0.0, 90.0], 10.0)
    colours = torch.tensor([[-1.0, 0.0, 0.5], [1.0, 0.2, -0.3]]).double()
    rendering = Scene(filled(0.0))(views, height=3, width=3, background=colours)
    close(rendering.rgb, colours[:, :, None, None].expand(2, 3, 3, 3))
    with pytest.raises(ValueError, match="no background of its own"):
        Scene(filled(0.0))(views, height=3, width=3)
    for wrong in (torch.ones(3, 3), torch.ones(1), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="background must be"):
            Scene(filled(0.0))(views, height=3, width=3, background=wrong)


def total(rendering, without=()):
    """A number that every picture has a part in."""
    parts = [
        (image * torch.randn(image.shape, generator=seeded(5), dtype=torch.float64).to(image)).sum()
        for name, image in images(rendering).items()
        if image is not None and name not in without
    ]
    return sum(parts[1:], parts[0])


def gradients(scene, *arguments, **settings):
    return torch.autograd.grad(total(scene(*arguments, **settings)), list(scene.parameters()))


@pytest.mark.parametrize("opaque", [False, True])
def test_the_gradient_is_that_of_finite_differences(opaque):
    """To every parameter, through colour, light, depth, normals, distortion, background and, opaque, orientation.

    Orientation does not differentiate its weights, which finite differences do unless they are constant.
    """
    scene, views = learner(DenseGrid((2,))), around([30.0, -100.0], [20.0, 60.0])
    if opaque:
        scene.field.activation = lambda raw: 2 * torch.ones_like(raw)
    names, values = zip(*scene.field.named_parameters(prefix="field"), *_sky(scene), strict=True)

    def changed(*parameters):
        named = dict(zip(names, parameters, strict=True))
        settings = {"height": 3, "width": 3, "shading": lit(views), "normals": True}
        rendering = torch.func.functional_call(scene, named, (views,), settings)
        return total(rendering, without=() if opaque else ("orientation",))

    assert torch.autograd.gradcheck(changed, values)
    assert all(bool((gradient != 0).any()) for gradient in torch.autograd.grad(changed(*values), values))


def _sky(scene):
    """The last layer of the background: as good as all, and quicker."""
    return list(scene.background.named_parameters(prefix="background"))[-2:]


def test_light_teaches_geometry():
    """Without colour, background and opacity, only the normals are left to learn."""
    scene, views = learner(), around([30.0, -100.0], [20.0, 60.0])
    scene.field.activation = lambda raw: 2 * torch.ones_like(raw)
    rendering = scene(views, height=4, width=4, background=WHITE, shading=lit(views, (True,)))
    (gradient, *_) = torch.autograd.grad(rendering.rgb.square().sum(), list(scene.field.parameters()))
    assert gradient[:, 0].abs().max() > 1e-3
    assert bool((gradient[:, 1:] == 0).all())


@pytest.mark.parametrize("network", ["grid", "frequency"])
@pytest.mark.parametrize("normals", [False, True])
def test_chunks_change_neither_pictures_nor_gradients(network, normals):
    def build(chunk):
        mlp = frequency_network(generator=seeded(1), num_frequencies=2, num_layers=2, width=8)
        return learner(DenseGrid((2, 4)) if network == "grid" else mlp, chunk=chunk)

    views = around([30.0, -100.0, 160.0], [20.0, 60.0, -20.0])
    settings = {"height": 5, "width": 7, "normals": normals, "shading": lit(views) if normals else None}
    whole, parts = (build(chunk) for chunk in (2**18, 60))
    for name, image in images(whole(views, **settings, generator=seeded(2))).items():
        other = getattr(parts(views, **settings, generator=seeded(2)), name)
        if image is None:
            assert other is None
        else:
            close(other, image, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(whole, views, **settings), gradients(parts, views, **settings), strict=True):
        close(a, b, rtol=1e-10, atol=1e-10)


def test_rays_that_miss_the_cube_cost_nothing_and_others_are_evaluated_in_chunks():
    views, field = around([0.0, 90.0], 0.0, distance=8.0), filled(1.0)
    rendering = Scene(field, num_samples=6, chunk=50)(views, height=8, width=8, background=-WHITE)
    seen = int((rendering.opacity > 0).sum())
    assert 0 < seen < 64
    assert sum(field.network.counts) == 6 * seen
    assert max(field.network.counts) == 48
    away = replace(views, camera_to_world=views.camera_to_world * torch.tensor([-1.0, 1.0, -1.0, 1.0]).double())
    rendering = learner()(away, height=8, width=8, background=-WHITE, normals=True)
    assert rendering.normals.abs().max() == 0
    close(rendering.rgb, -torch.ones(2, 3, 8, 8).double())
    within = Scene(filled(1.0), num_samples=64)(around(0.0, 0.0, 0.4), height=1, width=1, background=WHITE)
    assert within.opacity.item() == pytest.approx(1 - math.exp(-1.4)), "a camera may stand in the cube"
    for wrong in ({"num_samples": 0}, {"num_samples": 8, "chunk": 7}):
        with pytest.raises(ValueError, match="num_samples"):
            Scene(field, **wrong)


def test_every_view_is_rendered_as_if_alone():
    scene, views = learner(), around([30.0, -100.0, 160.0], [20.0, 60.0, -20.0])
    settings = {"height": 5, "width": 7, "normals": True}
    whole = images(scene(views, **settings, shading=lit(views)))
    for row in range(3):
        light = lit(views).at(torch.tensor([row]))
        alone = images(scene(views[row : row + 1], **settings, shading=light))
        for name, image in whole.items():
            assert image.shape[2:] == (5, 7)
            close(alone[name][0], image[row], rtol=1e-12, atol=1e-12)


def test_a_generator_moves_the_points_within_the_cube_and_is_the_only_chance():
    """A sheet between two points of a ray is missed without, and has its share of the opacity with a generator."""
    seen, state = [], torch.get_rng_state()

    def sheet(points):
        seen.append(points[:, 0])
        return points[:, 0].abs() < 0.05

    scene, views = Scene(filled(2.0, sheet), num_samples=4), around(torch.zeros(4000), 0.0)
    still, moved, again, other = (
        scene(views, height=1, width=1, background=WHITE, generator=generator).opacity
        for generator in (None, seeded(1), seeded(1), seeded(2))
    )
    assert not still.any()
    assert torch.equal(moved, again)
    assert not torch.equal(moved, other)
    assert torch.equal(torch.get_rng_state(), state)
    # Intervals of length 0.5 are hit with probability 0.1 / 0.5.
    expected = 0.2 * (1 - math.exp(-2.0 * 0.5))
    assert moved.mean().item() == pytest.approx(expected, abs=4 * moved.std().item() / 4000**0.5)
    assert -1 <= seen[1].min() < -0.99
    assert 0.99 < seen[1].max() <= 1


def test_hardly_any_matter_has_neither_depth_nor_normal():
    views = around([20.0, 200.0], [10.0, 60.0])
    rendering = Scene(filled(1e-4))(views, height=5, width=5, background=WHITE)
    assert 0 < rendering.opacity.max() < module.EMPTY
    assert rendering.depth.abs().max() == 0
    thin = learner()
    thin.field.activation = lambda raw: 1e-4 * raw.sigmoid()
    assert thin(views, height=5, width=5, normals=True).normals.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_without_light_show_albedo_in_the_scenes_precision(dtype):
    scene, views = learner(dtype=dtype), around([30.0, -100.0], 20.0, dtype=dtype)
    plain = scene(views, height=6, width=6)
    dark = replace(lit(views), ambient=torch.ones(2), diffuse=torch.zeros(2), textureless=torch.zeros(2).bool())
    with_normals = scene(views, height=6, width=6, normals=True)
    for rendering in (with_normals, scene(views, height=6, width=6, shading=dark)):
        close(rendering.rgb, plain.rgb, rtol=1e-5, atol=1e-6)
    lengths = with_normals.normals.norm(dim=1, keepdim=True)
    close(lengths, (plain.opacity > module.EMPTY).to(dtype), rtol=1e-3, atol=1e-6)
    assert {image.dtype for image in images(with_normals).values()} == {dtype}


def test_pictures_are_those_of_regularisers():
    """Uniform fog on one ray, seen along x: distortion as in its closed form, all normals across or away."""
    views = around(0.0, 0.0)
    rendering = Scene(filled(100.0), num_samples=50)(views, height=1, width=1, background=WHITE)
    wall = 2.0 / 50  # all light is lost in the first interval but exp(-4)
    assert rendering.distortion.item() == pytest.approx(wall / 3, rel=0.2)

    class Slope(nn.Module):
        def forward(self, points):
            return torch.cat([points[:, :1] * -5, torch.zeros_like(points)], 1)

    front = Scene(Field(Slope()))(views, height=1, width=1, background=WHITE, normals=True)
    behind = Scene(Field(Slope()))(around(180.0, 0.0), height=1, width=1, background=WHITE, normals=True)
    assert front.orientation.item() == 0
    close(behind.orientation, behind.opacity, rtol=1e-4, atol=0)
    close(behind.normals.flatten(), torch.tensor([1.0, 0.0, 0.0]).double(), rtol=0, atol=1e-5)


class Solid(nn.Module):
    """A solid of the toy world: raw density above 0 inside."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, points):
        return torch.cat([-signed_distance(self.shape, points)[:, None], torch.zeros_like(points)], 1)


@pytest.mark.parametrize("shape", ["mug", "letter L"])
def test_pictures_lie_on_those_of_the_toy_world(shape):
    """Pixel for pixel: mask, depth and normals of the true solid, from cameras all round."""
    angles = [(0.0, 20.0), (70.0, 45.0), (-130.0, 0.0), (180.0, 80.0)]
    toys = [
        ToyScene(shape=shape, colour="red", background="white", azimuth=a, elevation=e, distance=2.8)
        for a, e in angles
    ]
    truth = render(toys, size=32, dtype=torch.float64)
    views = around(*torch.tensor(angles, dtype=torch.float64).T, distance=2.8)
    scene = Scene(Field(Solid(shape), activation=lambda raw: 300 * (raw > 0).to(raw)), num_samples=384)
    with torch.no_grad():
        rendering = scene(views, height=32, width=32, background=WHITE, normals=True)
    seen = rendering.opacity > 0.5
    assert ((seen & truth.mask).sum() / (seen | truth.mask).sum()).item() > 0.985
    both = (seen & truth.mask & ~truth.edges)[:, 0]
    assert (rendering.depth - truth.depth)[:, 0][both].abs().median() < 0.01
    agreement = (rendering.normals * truth.normals).sum(1)[both]
    assert agreement.median() > 0.99
    # Shifted by a pixel, mirrored or turned, it would fit much worse than it does.
    for wrong in (truth.mask.roll(1, 3), truth.mask.roll(1, 2), truth.mask.flip(3), truth.mask.flip(2)):
        assert ((seen & wrong).sum() / (seen | wrong).sum()).item() < 0.95


def test_the_scene_for_a_cpu_starts_as_a_ball_of_matter(monkeypatch):
    scene = grid_scene(num_samples=32)
    views = CameraDistribution(distance=(2.6, 3.1), focal=(FOCAL, FOCAL), target_jitter=0).draw(3, seeded())
    with torch.no_grad():
        rendering = scene(views, height=17, width=17, background=WHITE)
    assert rendering.opacity[:, 0, 8, 8].min() > 0.99
    assert rendering.opacity[:, 0, [0, 0, 16, 16], [0, 16, 0, 16]].max() < 0.01
    assert 0.05 < rendering.opacity.mean() < 0.35
    monkeypatch.setattr("sds.scene.importlib.util.find_spec", lambda name: None)
    for make in (grid_scene, lambda: background_network(generator=seeded())):
        with pytest.raises(ImportError, match=r"scorefield\[nerf\]"):
            make()
