"""The judges of adapters: what obeys passes, and nothing else does."""

import pytest
import torch

from controlnet import circles
from controlnet.evidence import Probe, Validation
from controlnet.hints import Precomputed, hint_generators
from controlnet.judges import judge_likeness, make_judge
from controlnet.tasks import ANNOTATORS, Task
from toyworld.circles import PALETTE
from toyworld.control import choose_scenes, known_solids, nearest_colour, render_world, silhouettes

NUMBER = 64


@pytest.fixture(scope="module")
def world():
    return render_world(choose_scenes(NUMBER, held_out=True))


def make_validation(world, hint):
    images = world.pictures["image"].float() / 127.5 - 1
    truth = {"mask": world.pictures["mask"].float() / 255, "number": torch.arange(NUMBER)}
    source = images if hint.source == "image" else world.pictures[hint.source].float() / 255
    made = hint(source, hint_generators(0, range(NUMBER), [0] * NUMBER, "hint 0"))
    task = Task(training=world, held_out=world, hint=hint, source="toyworld", made=known_solids(world, world))
    probe = Probe(x0=images, hint=made, cond={}, images=images, truth=truth)
    return Validation(probe=probe, judge=make_judge(task))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("canny", "tile") else pytest.mark.slow)
    for name in ANNOTATORS
])  # fmt: skip
def test_what_does_not_look_at_the_hint_does_not_pass(world, name):
    validation = make_validation(world, ANNOTATORS[name])
    images = validation.probe.images
    watched = next(iter(validation.ceiling))
    for strangers in (torch.zeros_like(images), images.roll(7, 0)):
        assert abs(validation.bounded_scores(strangers)[watched].relative) < 0.1
    assert validation.ceiling[watched] > 0.99


def test_inpainting_is_judged_by_what_was_kept(world):
    validation = make_validation(world, ANNOTATORS["inpaint"])
    probe = validation.probe
    missing = probe.hint[:, -1:] > 0
    painted = torch.where(missing, 1 - probe.images, probe.images)
    scores = validation.judge(painted, probe)
    assert torch.allclose(scores["ssim"], torch.ones(NUMBER), atol=1e-3)
    assert float(scores["rmse"].max()) < 1e-6
    spoilt = torch.where(missing, probe.images, 0.8 * probe.images - 0.2)
    assert (validation.judge(spoilt, probe)["rmse"] > 0.01).all()


@pytest.mark.parametrize("source", ["depth", "normals", "edges"])
def test_who_obeys_the_silhouette_alone_has_not_learned_depth(world, source):
    validation = make_validation(world, Precomputed(source, 3 if source == "normals" else 1))
    images, mask = validation.probe.images, validation.probe.truth["mask"]
    mean = (images * mask).flatten(2).sum(2) / mask.flatten(1).sum(1, keepdim=True)
    flat = torch.where(mask > 0, mean[:, :, None, None], images)
    other = torch.where(mask > 0, images.roll(7, 0), images)
    for filled, most in ((flat, 0.05), (other, 0.2)):
        assert validation.bounded_scores(filled)["shading"].relative < most
    assert validation.bounded_scores(flat)["mask_iou"].relative > 0.9
    recoloured = torch.where(mask > 0, 0.5 * images - 0.2, images)
    assert validation.bounded_scores(recoloured)["shading"].relative > 0.9


def test_a_mask_asks_for_a_silhouette_only(world):
    validation = make_validation(world, Precomputed("mask"))
    assert list(validation.ceiling) == ["mask_iou", "centre_error"]


def test_silhouettes_and_colours_of_true_circles_are_found():
    data = circles.Circles(32, 200, colours=PALETTE, distinct=True)
    drawn = [data.circle(index) for index in range(200)]
    images, masks = circles.pictures(drawn, 32), circles.masks(drawn, 32)
    found = silhouettes(images)
    assert torch.equal(found, masks)
    wanted = torch.tensor([PALETTE.index(circle.colour) for circle in drawn])
    assert torch.equal(nearest_colour(images, found), wanted)
    noisy = silhouettes(images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))
    assert (noisy == masks).float().mean() > 0.99
    plain = torch.zeros(3, 3, 32, 32)
    assert not silhouettes(plain).any()
    assert nearest_colour(plain, silhouettes(plain)).tolist() == [-1, -1, -1]


def test_likeness_prefers_the_own_image():
    images = circles.pictures([circles.draw_circle(n) for n in range(8)], 32)
    probe = Probe(x0=images, hint=images, cond={}, images=images)
    own = judge_likeness(images, probe)["likeness"]
    assert torch.allclose(own, torch.ones(8))
    assert (judge_likeness(images, probe.shuffled())["likeness"] < 0.95).all()
