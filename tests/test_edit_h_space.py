"""h-space: what is shifted and what is not, directions that were planted, and singular vectors beside dense
ones."""

import pytest
import tiny_pipelines as tiny
import torch
from denoisers import normal, random_mlp, seeded
from refusals import refused

from edit.h_space import (
    activations_to_x0,
    along,
    asymmetric,
    difference_of_means,
    disentangled,
    jacobian_svd,
    linear_probe,
    middle,
    principal_components,
    recorded,
    shifted,
)
from scorefield.denoiser import NetworkDenoiser
from scorefield.grids import grid
from scorefield.models.networks import DiffusersNetwork
from scorefield.sampling import sample
from scorefield.schedule import VariancePreserving

close = torch.testing.assert_close
SD = VariancePreserving.scaled_linear()


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    return NetworkDenoiser(DiffusersNetwork(tiny.text_unet().double()), SD)


@pytest.fixture
def asked():
    cond = {"encoder_hidden_states": normal(3, 6, 32, seed=1)}
    return normal(3, 4, 8, 8), torch.full((3,), 500.0), cond


@torch.no_grad()
def test_a_shift_of_zero_and_the_network_behind_a_shift_are_equal_bit_for_bit(denoiser, asked):
    plain = denoiser(*asked)
    with shifted(denoiser, along(torch.ones(16, 4, 4), 0.0)) as inner:
        assert torch.equal(inner(*asked), plain)
    with shifted(denoiser, along(torch.ones(16, 4, 4), 1.0, high=400.0)) as inner:
        assert torch.equal(inner(*asked), plain), "outside of its times"
    with shifted(denoiser, along(torch.ones(16, 4, 4), 1.0)) as inner:
        assert (inner(*asked) - plain).abs().max() > 1e-3
    with pytest.raises(RuntimeError), shifted(denoiser, along(torch.ones(16, 4, 4), 1.0)):
        raise RuntimeError
    assert torch.equal(denoiser(*asked), plain)
    assert middle(denoiser.network) == "model.mid_block"
    assert middle(random_mlp()) == "blocks.0"
    with refused("Linear has no middle block; name a module"):
        middle(torch.nn.Linear(2, 2))
    with refused("has no module 'nowhere'"), shifted(denoiser, along(torch.ones(1), 1.0), "nowhere"):
        pass
    with shifted(denoiser, along(torch.ones(1), 1.0)) as inner, refused("at one time for all samples; got t ="):
        inner(asked[0], torch.tensor([1.0, 2.0, 3.0]), asked[2])


@torch.no_grad()
def test_what_is_recorded_at_one_image_makes_it_of_another_with_its_skips(denoiser, asked):
    x_t, t, cond = asked
    other = {"encoder_hidden_states": normal(3, 6, 32, seed=2)}
    with recorded(denoiser) as (inner, record):
        sample(inner, x_t, cond, times=grid(SD, 4))
    assert list(record.activations) == grid(SD, 4).tolist()
    assert record.joint().shape == (3, 4, 16, 4, 4)
    with recorded(denoiser) as (inner, own):
        inner(x_t, t, cond)
    with recorded(denoiser) as (inner, theirs):
        inner(x_t, t, other)
    delta = theirs.activations[500.0] - own.activations[500.0]
    function, h = activations_to_x0(denoiser, x_t, t, cond)
    close(h, own.activations[500.0])
    close(function(h), denoiser(x_t, t, cond))
    with shifted(denoiser, along(delta, 1.0)) as inner:
        close(inner(x_t, t, cond), function(theirs.activations[500.0]))


@torch.no_grad()
def test_the_asymmetric_step_moves_the_image_and_not_the_noise(denoiser, asked):
    x_t, _, cond = asked
    times = grid(SD, 3)
    with shifted(denoiser, along(torch.ones(16, 4, 4), 0.0)) as inner:
        close(
            sample(inner, x_t, cond, times=times, step=asymmetric(denoiser)),
            sample(denoiser, x_t, cond, times=times),
        )
    t, s = (time.expand(3) for time in times[:2])
    with shifted(denoiser, along(torch.ones(16, 4, 4), 2.0)) as inner:
        made = asymmetric(denoiser)(inner, x_t, t, s, cond, None)
        moved = inner(x_t, t, cond)
        within = denoiser(x_t, t, cond)
    assert torch.equal(within, denoiser(x_t, t, cond)), "only the block's own denoiser is shifted"
    noise = SD.from_x0(within, x_t, t, "eps")
    assert (moved - within).abs().max() > 1e-3
    close(made, SD.alpha(s)[:, None, None, None] * moved + SD.sigma(s)[:, None, None, None] * noise)


# Directions ----------------------------------------------------------------------------------------------------


def planted():
    """Samples along three orthonormal directions of falling variance, labelled by the first."""
    axes = torch.linalg.qr(normal(24, 3)).Q.T.view(3, 6, 4)
    amounts = normal(200, 3, seed=1) * torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)
    return axes, amounts, (amounts @ axes.flatten(1)).view(200, 6, 4)


def test_planted_directions_are_found():
    axes, amounts, h = planted()
    components, shares = principal_components(h, 3)
    for one, axis in zip(components, axes, strict=True):
        assert abs((one * axis).sum()) > 0.95
    variances = torch.linalg.eigvalsh(torch.cov(amounts.T)).flip(0)
    close(shares, variances / variances.sum())
    labels = (amounts[:, 0] > 0).long()
    mean = difference_of_means(h, labels)
    assert (mean * axes[0]).sum() / mean.norm() > 0.95
    normal_, accuracy = linear_probe(h, labels)
    assert accuracy > 0.9
    assert (normal_ * axes[0]).sum() > 0.8
    x, sign = h.flatten(1) - h.flatten(1).mean(0), 2.0 * labels.double() - 1
    primal = torch.linalg.solve(x.T @ x + torch.eye(24, dtype=torch.float64), x.T @ (sign - sign.mean()))
    close(normal_.flatten(), primal / primal.norm())
    for number in (0, 200):
        with refused("200 samples have 1 to 199 components; got"):
            principal_components(h, number)
    with refused("needs samples of both labels; got 0 of 200"):
        linear_probe(h, torch.zeros(200, dtype=torch.int64))
    with refused("ridge must be above 0; got 0"):
        linear_probe(h, labels, ridge=0)


def test_disentangling_takes_off_all_others_at_once():
    v, first, second = normal(6, 4), normal(6, 4, seed=1), normal(6, 4, seed=2)
    second = second + 2 * first  # far from orthogonal, so that one after the other leaves a rest
    rest = disentangled(v, [first, second])
    for other in (first, second):
        assert abs((rest * other).sum()) < 1e-12
    close(disentangled(v, [first]), v - (v * first).sum() / first.square().sum() * first)
    assert disentangled(v, []) is v
    assert disentangled(v.float(), [first.float(), second.float()]).dtype == torch.float32


def test_singular_vectors_are_those_of_the_dense_jacobian():
    weights = [normal(10, 8), normal(7, 10, seed=1)]

    def function(h):
        return torch.tanh(h.flatten(1) @ weights[0].T) @ weights[1].T

    h = 0.3 * normal(3, 2, 4, seed=2)
    values, vectors = jacobian_svd(function, h, 3, num_iterations=60, generator=seeded())
    for row in range(3):
        dense = torch.func.jacrev(lambda one: function(one[None])[0])(h[row]).flatten(1)
        _, sizes, right = torch.linalg.svd(dense, full_matrices=False)
        close(values[row], sizes[:3], rtol=1e-6, atol=0)
        cosines = (vectors[row].flatten(1) * right[:3]).sum(1).abs()
        close(cosines, torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    with refused("a Jacobian in 8 dimensions has 1 to 8 directions; got 9"):
        jacobian_svd(function, h, 9)


def test_singular_vectors_of_a_unet_pass_its_attention(denoiser, asked):
    function, h = activations_to_x0(denoiser, *asked)
    values, vectors = jacobian_svd(function, h, 2, num_iterations=2, generator=seeded())
    step = 1e-5 * vectors[:, 0]
    change = (function(h + step) - function(h - step)).flatten(1).norm(dim=1) / 2e-5
    close(change, values[:, 0], rtol=1e-4, atol=1e-6)
    assert (values[:, 0] >= values[:, 1]).all()
