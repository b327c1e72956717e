"""An image as the scene; and the experiment it is for: SDS finds modes, VSD the distribution."""

import pytest
import torch

from score.denoiser import NetworkDenoiser
from score.exact import GaussianMixture
from score.metrics import mode_shares
from score.network import ResidualMLP
from score.schedule import VariancePreserving
from score.times import uniform
from score.training import Phase, train
from sds.canvas import Canvas
from sds.losses import sds, vsd
from sds.renders import distillation_loss
from sds.vsd import VSD

close = torch.testing.assert_close


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


# Four modes of unequal weight, far apart. The gradients are drawn at noise levels that do not blur them into one.

STD, SHARES, NUM_PARTICLES, STEPS = 0.3, (0.1, 0.2, 0.3, 0.4), 300, 600
NOISE = uniform(0.02, 0.15)


@pytest.fixture(scope="module")
def truth():
    angles = torch.arange(4) * torch.pi / 2
    means = 1.5 * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(means, torch.full((4,), STD), torch.tensor(SHARES), VariancePreserving.scaled_linear())


def particles():
    return Canvas.noise((2,), num_particles=NUM_PARTICLES, generator=seeded())


def judge(points, truth):
    """Share of each mode; spread within modes over the mixture's; largest distance of a cluster's mean."""
    points = points.detach()
    nearest = truth.component(points)
    inside = points - truth.means[nearest]
    spread = (inside.square().mean()).sqrt() / STD
    shift = max(inside[nearest == k].mean(0).norm().item() for k in range(4) if (nearest == k).any())
    return mode_shares(points, truth), spread.item(), shift


def optimise(method_for, rate=0.03, betas=(0.9, 0.999)):
    canvas, generator = particles(), seeded(1)
    optimizer = torch.optim.Adam(canvas.parameters(), rate, betas=betas)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        x0 = canvas()
        distillation_loss(method_for(x0.detach()), x0, {}, generator=generator)["loss"].backward()
        optimizer.step()
        falling.step()
    return canvas()


def test_true_samples_judge_themselves(truth):
    """The floor: what 300 draws of the mixture look like to the judge."""
    shares, spread, shift = judge(truth.sample(NUM_PARTICLES, seeded(3)), truth)
    assert (shares - torch.tensor(SHARES)).abs().max() < 0.05
    assert 0.9 < spread < 1.1
    assert shift < 0.15


def test_sds_collapses_to_the_modes(truth):
    """Each particle for itself: it ends at the mode whose basin it started in, and their weights do not matter."""
    shares, spread, shift = judge(optimise(lambda x0: sds(truth, times=NOISE)), truth)
    assert spread < 0.25
    assert shift < 0.1
    assert (shares - torch.tensor(SHARES)).abs().max() > 0.06


def test_vsd_with_the_particles_own_score_covers_the_mixture(truth):
    """Phi in closed form: the score of the particles, each a narrow Gaussian."""

    def method(x0):
        phi = GaussianMixture(x0, torch.full((len(x0),), 0.12), torch.ones(len(x0)), truth.schedule)
        return vsd(truth, phi, times=NOISE)

    shares, spread, shift = judge(optimise(method, betas=(0.0, 0.99)), truth)
    assert (shares - torch.tensor(SHARES)).abs().max() < 0.06
    assert 0.85 < spread < 1.15
    assert shift < 0.15


def test_vsd_with_a_phi_that_learns_covers_the_mixture(truth, accelerator):
    """As a run has it: two phases, and phi a network that starts from nothing."""
    canvas = particles()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ResidualMLP((2,), width=64, depth=2, embedding=32)
    phi = NetworkDenoiser(network, truth.schedule, "v", 1e-3)
    method = VSD(teacher=truth, phi=phi, times=uniform(0.02, 0.4), phi_times=uniform(0.02, 0.4))
    optimizers = [
        torch.optim.Adam(module.parameters(), rate, betas=(0.0, 0.99))
        for module, rate in ((canvas, 0.03), (network, 2e-3))
    ]
    falling = torch.optim.lr_scheduler.LinearLR(optimizers[0], 1.0, 0.0, STEPS)

    def scene_loss(batch, rng):
        return distillation_loss(method, batch["x0"], {}, generator=rng("gradient"))

    phases = [
        Phase(name="scene", network=canvas, optimizer=optimizers[0], loss=scene_loss, lr_schedule=falling),
        method.phase(optimizers[1]),
    ]

    def rollout(batch, due, rng):
        return {"x0": canvas(), "cond": {}}

    list(train(phases, lambda rng: None, accelerator, steps=STEPS, rollout=rollout))
    shares, spread, shift = judge(canvas(), truth)
    assert (shares - torch.tensor(SHARES)).abs().max() < 0.06
    assert 0.85 < spread < 1.15
    assert shift < 0.15
