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


def test_noise_comes_from_the_generator():
    settings = {"num_particles": 500, "std": 0.5}
    first = Canvas.noise((3,), **settings, generator=seeded())()
    torch.manual_seed(1)
    assert torch.equal(first, Canvas.noise((3,), **settings, generator=seeded())())
    assert abs(first.std() - 0.5) < 0.05
    assert Canvas.noise((3,), num_particles=9, std=5.0, bounded=True, generator=seeded())().abs().max() < 1


@pytest.mark.parametrize(("start", "bounded", "message"), [
    (torch.zeros(3), False, r"start must be \(num_particles, \*shape\) with a particle; got"),
    (torch.zeros(0, 2), False, r"start must be \(num_particles, \*shape\) with a particle; got"),
    (torch.full((1, 2), 1.5), True, r"a bounded canvas starts from images in \[-1, 1\]; got"),
    (torch.full((1, 2), torch.nan), True, r"a bounded canvas starts from images in \[-1, 1\]; got"),
])  # fmt: skip
def test_a_start_that_cannot_be_raises(start, bounded, message):
    with pytest.raises(ValueError, match=message):
        Canvas(start, bounded=bounded)


# The experiment: the same particles, teacher and steps. Four modes of unequal weight, far apart.


@pytest.mark.slow
def test_sds_collapses_to_the_modes_and_vsd_covers_the_mixture(accelerator):
    """Each particle of SDS ends at the mode in whose basin it started, whatever the mode's weight."""
    mixture = canvas_modes.truth()
    found = canvas_modes.coverage(canvas_modes.by_sds(CONFIG, mixture), mixture)
    assert found.spread < 0.25
    assert found.shift < 0.1
    assert found.share_error > 0.07
    for points in (
        mixture.sample(300, seeded(3)), canvas_modes.by_vsd(CONFIG, mixture),
        canvas_modes.by_learned_vsd(CONFIG, mixture, accelerator),
    ):  # fmt: skip
        found = canvas_modes.coverage(points, mixture)
        assert found.share_error < 0.06
        assert 0.85 < found.spread < 1.15
        assert found.shift < 0.15


def test_the_benchmark_writes_results_and_a_picture_with_points_where_they_are(tmp_path, capsys, make_accelerator):
    """First axis to the right, second upwards, one panel beside the other."""
    make_accelerator()  # a fresh state for the accelerator that the benchmark makes
    found = canvas_modes.main(Config(steps=2, num_particles=20, out=tmp_path / "new" / "modes.png"))
    assert Image.open(tmp_path / "new" / "modes.png").size == (4 * 310 - 10, 300)
    assert capsys.readouterr().out.splitlines() == [f"{name}: {result}" for name, result in found.items()]
    assert list(found) == ["true samples", "SDS", "VSD, phi in closed form", "VSD, phi learned"]
    corners = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    sheet = np.asarray(canvas_modes.picture(corners, canvas_modes.truth(), side=100, reach=2.5)).astype(int)
    red = sheet[..., 0] - sheet[..., 2] > 100
    centres = [tuple(round(axis.mean()) for axis in part.nonzero()) for part in (red[:, :100], red[:, 110:])]
    assert np.allclose(centres, [(50, 90), (10, 50)], atol=1.5)
