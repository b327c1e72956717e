"""Cameras, their distribution, and the words a teacher is told about a view."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from scipy import stats

from sds.cameras import (
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


def fits(values, cdf):
    """Whether so many values are likely of this distribution: a wrong one of any interest gives 0."""
    return stats.kstest(values.double().numpy(), cdf).pvalue > 1e-3


def uniform(low, high):
    return lambda x: (x - low) / (high - low)


def test_cameras_stand_where_the_toy_worlds_do():
    azimuths, elevations = (-180.0, -135.0, -90.0, -10.0, 0.0, 45.0, 179.0), (-90.0, -30.0, 0.0, 59.9, 90.0)
    angles = list(itertools.product(azimuths, elevations))
    views = around(*torch.tensor(angles, dtype=torch.float64).T)
    expected = torch.stack([camera.orbit(azimuth, elevation, 2.8) for azimuth, elevation in angles])
    close(views.camera_to_world, expected, rtol=0, atol=1e-12)
    close(views.position, expected[:, :, 3], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # why Views has directions of its own
def test_pixels_are_seen_along_the_rays_of_the_toy_world_and_of_nerfstudio():
    views = around([30.0, -100.0], [20.0, 70.0], focal=camera.focal_length(1))
    for size in (1, 4, 5):
        row, column = (torch.cartesian_prod(*[torch.arange(size).double() + 0.5] * 2) if size > 1 else
                       torch.full((1, 2), 0.5).double()).T  # fmt: skip
        for pose, directions in zip(views.camera_to_world, views.directions(size, size), strict=True):
            expected = camera.ray_directions(pose[None], column, row, camera.focal_length(size), size)
            close(directions.reshape(-1, 3), expected.T, rtol=0, atol=1e-12)
    views = CameraDistribution().draw(3, seeded())
    focal = views.focal[:, None] * 4
    size = {"cx": 3.0, "cy": 2.0, "width": 6, "height": 4}
    rays = Cameras(views.camera_to_world, fx=focal, fy=focal, **size).generate_rays(torch.arange(3)[:, None])
    close(views.directions(4, 6), rays.directions.permute(2, 0, 1, 3), rtol=0, atol=1e-6)
    close(views.position[:, None, None].expand(3, 4, 6, 3), rays.origins.permute(2, 0, 1, 3), rtol=0, atol=0)
    for height, width in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 1 pixel"):
            views.directions(height, width)


# The distribution.


def test_distance_focal_and_azimuth_are_uniform_and_angles_those_of_the_camera():
    views = STILL.draw(MANY, seeded())
    assert fits(views.position.norm(dim=1), uniform(1.0, 1.5))
    assert fits(views.focal, uniform(0.7, 1.35))
    assert fits(views.azimuth[torch.randperm(MANY, generator=seeded(1))], uniform(-180, 180))
    expected = orbit(views.azimuth, views.elevation, views.position.norm(dim=1), views.focal).camera_to_world
    close(views.camera_to_world, expected, rtol=0, atol=1e-5)


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


def test_position_target_and_upward_vector_are_moved_as_published():
    still = STILL.draw(MANY, seeded())
    moved = replace(STILL, position_jitter=0.1).draw(MANY, seeded())
    assert torch.equal(moved.azimuth, still.azimuth)
    assert all(fits(axis, uniform(-0.1, 0.1)) for axis in (moved.position - still.position).T)
    right, up, back = still.camera_to_world.double().unbind(2)[:3]
    # From far away, the line of sight passes the origin at the target's offset across it.
    moved = replace(STILL, distance=(1000.0, 1000.0), target_jitter=0.2).draw(MANY, seeded())
    sight = moved.camera_to_world[:, :, 2].double()
    assert all(fits(-1000 * (sight * across).sum(1), stats.norm(0, 0.2).cdf) for across in (right, up))
    moved = replace(STILL, up_jitter=0.02).draw(MANY, seeded()).camera_to_world.double()
    close(moved[:, :, 2], back, rtol=0, atol=1e-6)
    tilt = (moved[:, :, 1] * right).sum(1) / (moved[:, :, 1] * up).sum(1)
    # The ratio of 0.02 a to 1 + 0.02 b for standard normal a and b.
    assert fits(tilt, lambda x: stats.norm.cdf(x / (0.02 * (1 + x**2) ** 0.5)))


def test_every_pose_is_a_rotation_and_the_generator_decides_and_nothing_else():
    state = torch.get_rng_state()
    first, again, other = (CameraDistribution().draw(500, seeded(seed)) for seed in (3, 3, 4))
    axes = first.camera_to_world[:, :, :3].double()
    close(axes @ axes.transpose(1, 2), torch.eye(3).double().expand(500, 3, 3), rtol=0, atol=1e-5)
    close(torch.linalg.det(axes), torch.ones(500).double(), rtol=0, atol=1e-5)
    assert torch.equal(first.camera_to_world, again.camera_to_world)
    assert not torch.equal(first.camera_to_world, other.camera_to_world)
    assert torch.equal(torch.get_rng_state(), state)
    joined = concatenated([first[:1], first[1:]])
    assert all(torch.equal(a, b) for a, b in zip(vars(joined).values(), vars(first).values(), strict=True))


def test_the_azimuths_of_all_ranks_share_the_circle_evenly():
    ranks = [STILL.draw(3, seeded(rank), rank=rank, num_ranks=4) for rank in range(4)]
    whole = concatenated(ranks).azimuth
    assert sorted(((whole + 180) / 30).floor().int().tolist()) == list(range(12))
    for views in ranks:
        assert sorted(((views.azimuth + 180) / 120).floor().int().tolist()) == [0, 1, 2]
    azimuth = torch.stack([STILL.draw(4, seeded(seed)).azimuth for seed in range(500)])
    for sector in range(4):  # uniform within
        assert fits(azimuth[:, sector], uniform(90 * sector - 180, 90 * sector - 90))


def test_quarters_go_from_four_directions_to_all_round():
    for middle, cameras in zip((0, 90, 180, 270), STILL.quarters(0.2), strict=True):
        azimuth = cameras.draw(50, seeded()).azimuth
        assert float((azimuth - middle).abs().max()) <= 9
        assert float(azimuth.max() - azimuth.min()) > 15
    whole = torch.cat([cameras.draw(9, seeded()).azimuth for cameras in STILL.quarters(1.0)])
    assert sorted(((whole + 45) // 10).long().tolist()) == list(range(36))  # one in each sector of 10 degrees


def test_the_range_of_views_widens():
    start, half, end = (STILL.widened(progress, azimuth=0.0, elevation=15.0) for progress in (0.0, 0.5, 1.0))
    views = start.draw(10, seeded())
    expected = torch.tensor([[0.0, 15.0]]).expand(10, 2)
    close(torch.stack([views.azimuth, views.elevation]).T, expected, rtol=0, atol=1e-5)
    assert (half.azimuth, half.elevation) == ((-90.0, 90.0), (2.5, 52.5))
    assert end == STILL


@pytest.mark.parametrize(("make", "said"), [
    (lambda: CameraDistribution(distance=(1.5, 1.0)), "distance must be a range"),
    (lambda: CameraDistribution(distance=(0.0, 1.0)), "above 0"),
    (lambda: CameraDistribution(focal=(-1.0, 1.0)), "above 0"),
    (lambda: CameraDistribution(elevation=(-10.0, 95.0)), "elevation must lie in"),
    (lambda: CameraDistribution(uniform_angle=1.5), "uniform_angle is a probability"),
    *((lambda wrong=wrong: STILL.draw(wrong[0], seeded(), rank=wrong[1], num_ranks=wrong[2]), "num_views >= 1")
      for wrong in ((0, 0, 1), (1, 1, 1), (1, -1, 2))),
    (lambda: STILL.quarters(1.5), "spread must lie"), (lambda: STILL.widened(1.5), "progress must lie"),
    (lambda: view_prompts(" "), "prompt is empty"),
])  # fmt: skip
def test_cameras_and_prompts_that_cannot_be_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# Words.


def test_bins_and_prompts_are_the_words_of_the_toy_world():
    angles = list(itertools.product(range(-360, 361, 5), (-90, 0, 59, 60, 61, 90)))
    bins = word_bins(around(*torch.tensor(angles).T))
    assert bool((bins.sum(1) == 1).all())
    words = [WORDS[row] for row in bins.argmax(1)]
    assert words == [camera.view_word(azimuth, elevation) for azimuth, elevation in angles]
    assert WORDS == camera.VIEWS
    prompts = view_prompts(" a red mug ")
    assert [captions.parse(prompt).view for prompt in prompts] == list(WORDS)
    assert prompts[0] == "a red mug, front view"


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
