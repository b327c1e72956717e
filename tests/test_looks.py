"""What a teacher is shown: cameras, backdrops, words and light of a step; and a canvas."""

from types import SimpleNamespace

import pytest
import torch

from scorefield.randomness import Rng
from sds.canvas import Canvas
from sds.looks import Backdrop, CanvasLooks, SceneLooks
from sds.lora import CAMERA
from sds.regularisers import Penalties, distortion_loss, entropy_loss, opacity_loss, orientation_loss
from sds.scene import background_network, grid_scene
from sds.shading import ShadingSchedule
from sds.views import WORDS, CameraDistribution

close = torch.testing.assert_close

AROUND = CameraDistribution(
    distance=(2.7, 3.0), elevation=(0.0, 45.0), focal=(1.37, 1.37), position_jitter=0, target_jitter=0, up_jitter=0
)
COLOURS = ((1.0, 1.0, 1.0), (-1.0, 0.0, 0.5))


def numbered(offset):
    """Conditions whose number says which word they are of, and whose tens which backdrop."""
    return {"prompt": offset + torch.arange(4.0).view(4, 1)}


def make_looks(**changes):
    options = {
        "scene": grid_scene(resolutions=(6,), num_samples=8),
        "encode": lambda images: images,
        "size": (8, 8),
        "cameras": lambda step: [(AROUND, 4)],
        "backdrops": [Backdrop(numbered(0.0), COLOURS[0]), Backdrop(numbered(10.0), COLOURS[1])],
        "resolution": lambda step: 8,
    }
    return SceneLooks(**{**options, **changes})


def empty(scene):
    for parameter in scene.field.network.parameters():
        torch.nn.init.constant_(parameter, -1e4)
    return scene


def test_a_look_is_that_of_its_step_and_rank():
    looks = make_looks()
    first, again = looks.look(Rng(0, 3)), looks.look(Rng(0, 3))
    close(first.x0, again.x0, rtol=0, atol=0)
    close(first.cond, again.cond)
    for other in (Rng(0, 4), Rng(1, 3)):
        assert not torch.equal(first.x0, looks.look(other).x0)
    two = make_looks(num_ranks=2)
    assert not torch.equal(two.look(Rng(0, 3)).x0, two.look(Rng(0, 3, rank=1)).x0)
    assert first.x0.requires_grad
    assert first.x0.shape == (4, 3, 8, 8)


def test_every_view_has_the_words_of_its_backdrop_and_stands_before_its_colour():
    looks = make_looks(scene=empty(grid_scene(resolutions=(6,), num_samples=8)))
    seen = set()
    for step in range(30):
        look = looks.look(Rng(0, step))
        for image, number in zip(look.x0, look.cond["prompt"][:, 0].tolist(), strict=True):
            backdrop, word = divmod(number, 10)
            close(image.mean((1, 2)), torch.tensor(COLOURS[int(backdrop)]), rtol=0, atol=1e-3)
            seen.add((backdrop, word))
    # Elevations of at most 45 degrees are never overhead.
    assert seen == {(backdrop, word) for backdrop in (0, 1) for word in range(3)}


def test_words_follow_the_azimuth():
    looks = make_looks(backdrops=[Backdrop(numbered(0.0), COLOURS[0])])
    views = AROUND.draw(8, torch.Generator().manual_seed(0))
    cond = looks.conditions(views, torch.zeros(8, dtype=torch.long))
    off = views.azimuth.abs()
    expected = torch.where(off <= 45, 0.0, torch.where(off >= 135, 2.0, 1.0))
    close(cond["prompt"][:, 0], expected)
    assert WORDS[:3] == ("front", "side", "back")


def test_cameras_of_several_distributions_make_one_batch_and_ranks_share_the_sectors():
    above = CameraDistribution(
        distance=(2.8, 2.8), elevation=(80.0, 90.0), focal=(1.37, 1.37), position_jitter=0, target_jitter=0,
        up_jitter=0,
    )  # fmt: skip
    asked = []

    def cameras(step):
        asked.append(step)
        return [(AROUND, 3), (above, 1)]

    looks = make_looks(cameras=cameras, num_ranks=2, backdrops=[Backdrop(numbered(0.0), COLOURS[0])])
    words = [looks.look(Rng(0, 7, rank=rank)).cond["prompt"][:, 0] for rank in (0, 1)]
    assert asked == [7, 7]
    assert [float(word[3]) for word in words] == [3.0, 3.0]  # overhead
    for rank in (0, 1):
        azimuth = AROUND.draw(3, Rng(0, 7, rank=rank)("views"), rank=rank, num_ranks=2).azimuth
        sector = ((azimuth + 180) / 60).floor().long().tolist()
        assert sector == [rank, rank + 2, rank + 4]


def test_renders_have_the_resolution_of_the_step_and_the_teachers_proportions():
    looks = make_looks(resolution=lambda step: 4 if step < 2 else 8, size=(8, 16))
    views = AROUND.draw(2, torch.Generator().manual_seed(0))
    chosen = torch.zeros(2, dtype=torch.long)
    assert looks.render(views, chosen, 1, None, None).rgb.shape == (2, 3, 4, 8)
    assert looks.render(views, chosen, 2, None, None).rgb.shape == (2, 3, 8, 16)
    assert looks.look(Rng(0, 0)).x0.shape == (4, 3, 8, 16)  # the teacher's size, whatever was rendered


def test_phi_is_told_the_camera_and_the_teacher_is_not():
    assert CAMERA not in make_looks().look(Rng(0, 0)).cond
    looks = make_looks(tell_camera=True)
    expected = AROUND.draw(4, Rng(0, 0)("views")).camera_to_world
    close(looks.look(Rng(0, 0)).cond[CAMERA], expected)


def test_a_scene_stands_before_its_own_background_or_a_random_colour(generator):
    scene = empty(grid_scene(resolutions=(6,), num_samples=8, background=background_network(generator=generator)))
    plain = [Backdrop(numbered(0.0))]
    own = make_looks(scene=scene, backdrops=plain, own_background=1.0).look(Rng(0, 0)).x0
    assert own[0].flatten(1).std(1).min() > 0  # a network of directions
    coloured = make_looks(scene=scene, backdrops=plain, own_background=0.0).look(Rng(0, 0)).x0
    assert coloured[0].flatten(1).std(1).max() < 1e-3
    with pytest.raises(ValueError, match="background of its own"):
        make_looks(backdrops=plain).look(Rng(0, 0))


@pytest.mark.parametrize(
    "backdrops", [[], [Backdrop({}), Backdrop({})], [Backdrop({}), Backdrop({}, (0.0, 0.0, 0.0))]]
)
def test_backdrops_that_cannot_be_told_apart_are_refused(backdrops):
    with pytest.raises(ValueError, match="all have a colour, or be one without"):
        make_looks(backdrops=backdrops)


def test_light_is_drawn_for_every_view_of_a_step():
    scene = grid_scene(resolutions=(6,), num_samples=8)
    schedule = ShadingSchedule(albedo_until=5, lit=1.0, textureless=0.0)
    plain, lit = make_looks(scene=scene), make_looks(scene=scene, shading=schedule.draw)
    close(plain.look(Rng(0, 4)).x0, lit.look(Rng(0, 4)).x0)
    assert (plain.look(Rng(0, 5)).x0 - lit.look(Rng(0, 5)).x0).abs().max() > 0.05


def test_penalties_are_the_weighted_means_of_their_views(generator):
    opacity = torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    distortion, orientation = torch.rand(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    render = SimpleNamespace(opacity=opacity, distortion=distortion, orientation=orientation)
    weights = {"opacity": 2.0, "entropy": 3.0, "orientation": 5.0, "distortion": 7.0}
    expected = (
        2 * opacity_loss(opacity) + 3 * entropy_loss(opacity) + 5 * orientation_loss(orientation)
        + 7 * distortion_loss(distortion)
    ).mean()  # fmt: skip
    close(Penalties(**weights)(render), expected)
    assert Penalties()(render) == 0
    for name, loss in (("opacity", opacity_loss), ("entropy", entropy_loss)):
        close(Penalties(**{name: 2.0})(render), 2 * loss(opacity).mean())
    with pytest.raises(ValueError, match="normals=True"):
        Penalties(orientation=1.0)(SimpleNamespace(opacity=opacity, orientation=None))
    with pytest.raises(ValueError, match="weight of entropy"):
        Penalties(entropy=-1.0)


def test_the_orientation_penalty_asks_for_normals():
    looks = make_looks(penalties=lambda step: Penalties(orientation=float(step)))
    assert looks.look(Rng(0, 0)).penalty == 0
    look = looks.look(Rng(0, 1))
    assert look.penalty > 0
    look.penalty.backward()
    assert looks.scene.field.network.grids[-1].grad.abs().sum() > 0


def test_a_canvas_is_looked_at_as_it_is():
    canvas = Canvas(torch.arange(12.0).view(3, 4))
    look = CanvasLooks(canvas=canvas, conditions={"prompt": torch.ones(1, 2)}).look(Rng(0, 0))
    close(look.x0, canvas())
    assert look.x0.requires_grad
    assert look.cond["prompt"].shape == (3, 2)
    assert look.penalty == 0
