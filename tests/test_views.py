import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from sds import views as module
from sds.views import (
    WORDS,
    CameraDistribution,
    concatenated,
    orbit,
    view_conditions,
    view_prompts,
    word_bins,
    word_weights,
)
from toyworld import camera, captions

close = torch.testing.assert_close
STILL = CameraDistribution(position_jitter=0, target_jitter=0, up_jitter=0)
MANY = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def around(azimuth, elevation, distance=2.8, focal=1.2):
    columns = torch.broadcast_tensors(
        *(torch.as_tensor(x, dtype=torch.float64) for x in (azimuth, elevation, distance, focal))
    )
    return orbit(*(column.reshape(-1) for column in columns))


ANGLES = list(
    itertools.product((-180.0, -135.0, -90.0, -10.0, 0.0, 45.0, 90.0, 179.0), (-90.0, -30.0, 0.0, 59.9, 90.0))
)


def fits(values, cdf):
    """Whether so many values are likely of this distribution: a wrong one of any interest gives 0."""
    return stats.kstest(values.double().numpy(), cdf).pvalue > 1e-3


def uniform(low, high):
    return lambda x: (x - low) / (high - low)


def test_cameras_stand_where_the_toy_worlds_do():
    views = around(*torch.tensor(ANGLES, dtype=torch.float64).T)
    expected = torch.stack([camera.orbit(azimuth, elevation, 2.8) for azimuth, elevation in ANGLES])
    close(views.camera_to_world, expected, rtol=0, atol=1e-12)
    close(views.position, expected[:, :, 3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 4, 5])
def test_pixels_are_seen_along_the_rays_of_the_toy_world(size):
    views = around([30.0, -100.0], [20.0, 70.0], focal=camera.focal_length(1))
    row, column = (
        (torch.arange(size).double() + 0.5).repeat_interleave(size),
        (torch.arange(size).double() + 0.5).repeat(size),
    )
    for pose, directions in zip(views.camera_to_world, views.directions(size, size), strict=True):
        expected = camera.ray_directions(pose[None], column, row, camera.focal_length(size), size)
        close(directions.reshape(-1, 3), expected.T, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # why Views has directions of its own
def test_pixels_are_seen_along_the_rays_of_nerfstudio():
    views = CameraDistribution().draw(3, seeded())
    rays = views.cameras(4, 6).generate_rays(torch.arange(3)[:, None])
    close(views.directions(4, 6), rays.directions.permute(2, 0, 1, 3), rtol=0, atol=1e-6)
    close(views.position[:, None, None].expand(3, 4, 6, 3), rays.origins.permute(2, 0, 1, 3), rtol=0, atol=0)


def test_a_wide_picture_shows_more_to_the_sides():
    cameras = around(0.0, 0.0).cameras(4, 8)
    close([cameras.fx.item(), cameras.fy.item(), cameras.cx.item(), cameras.cy.item()], [4.8, 4.8, 4.0, 2.0])


@pytest.mark.parametrize(("height", "width"), [(0, 4), (4, 0)])
def test_a_picture_has_pixels(height, width):
    with pytest.raises(ValueError, match="at least 1 pixel"):
        around(0.0, 0.0).cameras(height, width)


def test_without_nerfstudio_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"scorefield\[nerf\]"):
        around(0.0, 0.0).cameras(4, 4)


def test_distance_and_focal_and_azimuth_are_uniform():
    views = STILL.draw(MANY, seeded())
    assert fits(views.position.norm(dim=1), uniform(1.0, 1.5))
    assert fits(views.focal, uniform(0.7, 1.35))
    assert fits(views.azimuth[torch.randperm(MANY, generator=seeded(1))], uniform(-180, 180))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ends", [(-10.0, 90.0), (20.0, 45.0)])
def test_elevations_are_the_mixture_of_equal_angles_and_equal_areas(share, ends):
    low, high = ends

    def cdf(x):
        bottom, top = math.sin(math.radians(low)), math.sin(math.radians(high))
        by_area = (torch.as_tensor(x).deg2rad().sin().numpy() - bottom) / (top - bottom)
        return share * (x - low) / (high - low) + (1 - share) * by_area

    views = replace(STILL, elevation=ends, uniform_angle=share).draw(MANY, seeded())
    assert fits(views.elevation, cdf)
    other = replace(STILL, elevation=ends, uniform_angle=1 - share if share != 0.5 else 0.0)
    assert not fits(other.draw(MANY, seeded()).elevation, cdf)


def test_without_jitter_the_angles_are_those_of_the_camera():
    views = STILL.draw(50, seeded())
    x, y, z = (views.position / views.position.norm(dim=1, keepdim=True)).T
    close(torch.atan2(y, x).rad2deg(), views.azimuth, rtol=0, atol=1e-3)
    close(z.asin().rad2deg(), views.elevation, rtol=0, atol=2e-2)
    close(
        views.camera_to_world,
        orbit(views.azimuth, views.elevation, views.position.norm(dim=1), views.focal).camera_to_world,
        rtol=0,
        atol=1e-6,
    )


def test_the_position_is_moved_uniformly_in_a_cube():
    views = replace(STILL, position_jitter=0.1).draw(MANY, seeded())
    still = STILL.draw(MANY, seeded())
    assert torch.equal(views.azimuth, still.azimuth)
    for axis in (views.position - still.position).T:
        assert fits(axis, uniform(-0.1, 0.1))


def test_the_target_is_moved_normally():
    """From far away, the line of sight passes the origin at the target's offset across it."""
    views = replace(STILL, distance=(1000.0, 1000.0), target_jitter=0.2).draw(MANY, seeded())
    still = STILL.draw(MANY, seeded())
    back, right, up = (views.camera_to_world[:, :, 2].double(), *still.camera_to_world.double().unbind(2)[:2])
    for across in (right, up):
        assert fits(-1000 * (back * across).sum(1), stats.norm(0, 0.2).cdf)


def test_the_upward_vector_is_moved_normally():
    views = replace(STILL, up_jitter=0.02).draw(MANY, seeded())
    still = STILL.draw(MANY, seeded())
    right, up, back = still.camera_to_world.double().unbind(2)[:3]
    new = views.camera_to_world[:, :, 1].double()
    close(views.camera_to_world[:, :, 2].double(), back, rtol=0, atol=1e-6)
    tilt = (new * right).sum(1) / (new * up).sum(1)
    # The ratio of 0.02 a to 1 + 0.02 b for standard normal a and b.
    assert fits(tilt, lambda x: stats.norm.cdf(x / (0.02 * (1 + x**2) ** 0.5)))


def test_every_pose_is_a_rotation():
    views = CameraDistribution().draw(500, seeded())
    axes = views.camera_to_world[:, :, :3].double()
    close(axes @ axes.transpose(1, 2), torch.eye(3).double().expand(500, 3, 3), rtol=0, atol=1e-5)
    close(torch.linalg.det(axes), torch.ones(500).double(), rtol=0, atol=1e-5)


def test_the_azimuths_of_all_ranks_share_the_circle_evenly():
    ranks = [STILL.draw(3, seeded(rank), rank=rank, num_ranks=4) for rank in range(4)]
    whole = concatenated(ranks)
    assert len(whole) == 12
    assert sorted(((whole.azimuth + 180) / 30).floor().int().tolist()) == list(range(12))
    for views in ranks:
        assert sorted(((views.azimuth + 180) / 120).floor().int().tolist()) == [0, 1, 2]


def test_views_within_a_sector_are_uniform():
    azimuth = torch.stack([STILL.draw(4, seeded(seed)).azimuth for seed in range(500)])
    for sector in range(4):
        assert fits(azimuth[:, sector], uniform(90 * sector - 180, 90 * sector - 90))


def test_the_generator_decides_and_nothing_else():
    state = torch.get_rng_state()
    first, again, other = (CameraDistribution().draw(4, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.camera_to_world, again.camera_to_world)
    assert not torch.equal(first.camera_to_world, other.camera_to_world)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_part_of_the_views_is_views():
    views = CameraDistribution().draw(4, seeded())
    joined = concatenated([views[:1], views[1:]])
    assert len(views[1:]) == 3
    assert all(torch.equal(a, b) for a, b in zip(vars(joined).values(), vars(views).values(), strict=True))


def test_quarters_go_from_four_directions_to_all_round():
    for middle, cameras in zip((0, 90, 180, 270), STILL.quarters(0.2), strict=True):
        azimuth = cameras.draw(50, seeded()).azimuth
        assert float((azimuth - middle).abs().max()) <= 9
        assert float(azimuth.max() - azimuth.min()) > 15
    whole = torch.cat([cameras.draw(9, seeded()).azimuth for cameras in STILL.quarters(1.0)])
    assert sorted(((whole + 45) // 10).long().tolist()) == list(range(36))  # one in each sector of 10 degrees
    words = [word_bins(cameras.draw(20, seeded())).argmax(1) for cameras in STILL.quarters(0.9)]
    below = [STILL.quarters(0.9)[0].draw(20, seeded()).elevation <= 60][0]
    assert [sorted(set(word[below].tolist())) for word in words] == [[0], [1], [2], [1]]
    with pytest.raises(ValueError, match="spread must lie"):
        STILL.quarters(1.5)


def test_the_range_of_views_widens():
    start, half, end = (STILL.widened(progress, azimuth=0.0, elevation=15.0) for progress in (0.0, 0.5, 1.0))
    views = start.draw(10, seeded())
    close(
        torch.stack([views.azimuth, views.elevation]).T,
        torch.tensor([[0.0, 15.0]]).expand(10, 2),
        rtol=0,
        atol=1e-5,
    )
    assert half.azimuth == (-90.0, 90.0)
    assert half.elevation == (2.5, 52.5)
    assert end == STILL
    with pytest.raises(ValueError, match="progress"):
        STILL.widened(1.5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"distance": (1.5, 1.0)}, "distance"),
        ({"distance": (0.0, 1.0)}, "above 0"),
        ({"focal": (-1.0, 1.0)}, "above 0"),
        ({"elevation": (-10.0, 95.0)}, "elevation"),
        ({"uniform_angle": 1.5}, "uniform_angle"),
    ],
)
def test_impossible_cameras_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        CameraDistribution(**wrong)


@pytest.mark.parametrize("wrong", [(0, 0, 1), (1, 1, 1), (1, -1, 2)])
def test_impossible_draws_are_refused(wrong):
    with pytest.raises(ValueError, match="num_views"):
        STILL.draw(wrong[0], seeded(), rank=wrong[1], num_ranks=wrong[2])


def test_prompts_say_the_view_as_captions_do():
    prompts = view_prompts(" a red mug ")
    assert [captions.parse(prompt).view for prompt in prompts] == list(WORDS)
    assert prompts[0] == "a red mug, front view"
    with pytest.raises(ValueError, match="prompt is empty"):
        view_prompts(" ")


def test_bins_are_the_words_of_the_toy_world():
    angles = list(itertools.product(range(-360, 361, 5), (-90, 0, 59, 60, 61, 90)))
    bins = word_bins(around(*torch.tensor(angles).T))
    assert bool((bins.sum(1) == 1).all())
    words = [WORDS[row] for row in bins.argmax(1)]
    assert words == [camera.view_word(azimuth, elevation) for azimuth, elevation in angles]
    assert WORDS == camera.VIEWS


def test_weights_are_linear_between_the_words():
    views = around([0.0, 45.0, 90.0, -90.0, 135.0, 180.0, -22.5, 10.0], [0.0] * 7 + [90.0])
    expected = [
        [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1, 0],
        [0.75, 0.25, 0, 0], [0, 0, 0, 1],
    ]  # fmt: skip
    close(word_weights(views), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    above = word_weights(around(45.0, [30.0, 45.0, 60.0]))
    close(above[:, 3], torch.tensor([0.0, 0.25, 0.5]).double())
    everywhere = word_weights(around(torch.linspace(-180, 180, 73), 50.0))
    close(everywhere.sum(1), torch.ones(73).double())
    assert everywhere.min() >= 0
    assert everywhere.diff(dim=0).abs().max() < 0.06


def test_conditions_are_mixed_by_the_weights():
    embeddings = torch.arange(24.0).view(4, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]])
    weights = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.75, 0.25, 0.0, 0.0]])
    mixed = view_conditions({"embeddings": embeddings, "mask": mask}, weights)
    close(mixed["embeddings"], torch.stack([embeddings[2], 0.75 * embeddings[0] + 0.25 * embeddings[1]]))
    close(mixed["mask"], mask[[2, 0]])
    with pytest.raises(ValueError, match="front, side, back, overhead"):
        view_conditions({"embeddings": embeddings[:3]}, weights)
