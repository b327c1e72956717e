"""An image as the scene; and the experiment it is for: SDS finds modes, VSD the distribution."""

import canvas_modes
import numpy as np
import pytest
import torch
from canvas_modes import Config
from PIL import Image

from sds.canvas import Canvas

close = torch.testing.assert_close
CONFIG = Config()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bounded", [False, True])
def test_a_canvas_shows_what_it_started_from(bounded):
    start = torch.rand(3, 2, 4, 4, generator=seeded()) * 1.98 - 0.99
    canvas = Canvas(start, bounded=bounded)
    assert canvas.num_particles == 3
    close(canvas(), 0.99 * start if bounded else start)
    start.zero_()
    assert canvas().abs().max() > 0


def test_a_bounded_canvas_stays_inside_and_learns_at_the_ends():
    canvas = Canvas(torch.tensor([[[[-1.0, 1.0]]]]), bounded=True)
    canvas().sum().backward()
    close(canvas.pixels.grad, torch.full((1, 1, 1, 2), 1 - 0.99**2))
    canvas.pixels.data *= 50
    assert canvas().abs().max() <= 1


def test_an_unbounded_canvas_is_its_parameters():
    canvas = Canvas(torch.full((1, 4, 2, 2), 7.0))
    canvas().sum().backward()
    assert torch.equal(canvas.pixels.grad, torch.ones(1, 4, 2, 2))


def test_only_chosen_particles_learn():
    canvas = Canvas(torch.zeros(4, 2))
    images = canvas(torch.tensor([2, 0, 2]))
    assert images.shape == (3, 2)
    images.sum().backward()
    assert canvas.pixels.grad[:, 0].tolist() == [1, 0, 2, 0]


def test_noise_comes_from_the_generator():
    settings = {"num_particles": 500, "std": 0.5}
    first = Canvas.noise((3,), **settings, generator=seeded())()
    torch.manual_seed(1)
    assert torch.equal(first, Canvas.noise((3,), **settings, generator=seeded())())
    assert abs(first.std() - 0.5) < 0.05
    assert Canvas.noise((3,), num_particles=9, std=5.0, bounded=True, generator=seeded())().abs().max() < 1


@pytest.mark.parametrize("start", [torch.zeros(3), torch.zeros(0, 2), torch.tensor(1.0)])
def test_a_start_without_particles_raises(start):
    with pytest.raises(ValueError, match=r"start must be \(num_particles, \*shape\) with a particle; got"):
        Canvas(start)


@pytest.mark.parametrize("value", [1.5, torch.nan])
def test_a_bounded_start_out_of_range_raises(value):
    with pytest.raises(ValueError, match=r"a bounded canvas starts from images in \[-1, 1\]; got"):
        Canvas(torch.full((1, 2), value), bounded=True)


# The experiment: the same particles, teacher and steps. Four modes of unequal weight, far apart.


@pytest.fixture(scope="module")
def mixture():
    return canvas_modes.truth()


def verdict(points, mixture):
    return canvas_modes.judge(points, mixture)


def covers(found):
    return found.share_error < 0.06 and 0.85 < found.spread < 1.15 and found.shift < 0.15


def test_true_samples_pass(mixture):
    assert covers(verdict(mixture.sample(300, seeded(3)), mixture))


def test_sds_collapses_to_the_modes(mixture):
    """Each particle ends at the mode in whose basin it started, whatever the mode's weight."""
    found = verdict(canvas_modes.by_sds(CONFIG, mixture), mixture)
    assert found.spread < 0.25
    assert found.shift < 0.1
    assert found.share_error > 0.07
    assert not covers(found)


def test_vsd_with_the_particles_own_score_covers_the_mixture(mixture):
    assert covers(verdict(canvas_modes.by_vsd(CONFIG, mixture), mixture))


def test_vsd_with_a_phi_that_learns_covers_the_mixture(mixture, accelerator):
    assert covers(verdict(canvas_modes.by_learned_vsd(CONFIG, mixture, accelerator), mixture))


def test_the_picture_shows_points_where_they_are(tmp_path):
    """First axis to the right, second upwards, one panel beside the other."""
    corners = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    sheet = np.asarray(canvas_modes.picture(list(corners), canvas_modes.truth(), side=100, reach=2.5)).astype(int)
    assert sheet.shape == (100, 210, 3)
    red = sheet[..., 0] - sheet[..., 2] > 100
    centres = [tuple(round(axis.mean()) for axis in part.nonzero()) for part in (red[:, :100], red[:, 110:])]
    assert np.allclose(centres, [(50, 90), (10, 50)], atol=1.5)


def test_the_benchmark_writes_its_picture_and_its_verdicts(tmp_path, capsys, make_accelerator):
    make_accelerator()  # a fresh state for the accelerator that the benchmark makes
    path = tmp_path / "new" / "modes.png"
    found = canvas_modes.main(Config(steps=2, num_particles=20, out=path))
    assert Image.open(path).size == (4 * 310 - 10, 300)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: {verdict}" for name, verdict in found.items()]
    assert list(found) == ["true samples", "SDS", "VSD, phi in closed form", "VSD, phi learned"]
