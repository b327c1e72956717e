"""The losses of sds against closed form, and against what was found wrong in other implementations."""

import math

import pytest
import torch
from torch import nn

from edit.delta import DDS
from scorefield.denoiser import NetworkDenoiser, freeze
from scorefield.exact import GaussianMixture
from scorefield.guidance import guided
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving
from scorefield.times import uniform
from sds.canvas import Canvas
from sds.losses import (
    TIMES,
    alpha_sigma_squared,
    csd,
    distillation_loss,
    noise_to_signal,
    sds,
    sigma_squared,
    unit,
    vsd,
    x0_reconstruction,
)

close = torch.testing.assert_close

# One Gaussian to a class, so that every denoiser is affine and the mean of its answer is its answer to the mean.
PROMPT, NEGATIVE, SOURCE = 0, 1, 2
MEANS = torch.tensor([[1.0, -0.5, 0.3], [-0.7, 0.4, -0.2], [0.2, 1.1, -0.9]], dtype=torch.float64)
STDS = torch.tensor([0.4, 0.6, 0.3], dtype=torch.float64)
PHI_MEAN, PHI_STD = torch.tensor([[0.4, 0.6, -0.6]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
X, SOURCE_X = torch.tensor([[1.6, 1.9, -2.1], [0.3, -1.0, 1.2]], dtype=torch.float64)

WEIGHTS = {
    "sigma^2": (sigma_squared, lambda alpha, sigma: sigma**2),
    "1": (unit, lambda alpha, sigma: torch.ones_like(sigma)),
    "alpha sigma^2": (alpha_sigma_squared, lambda alpha, sigma: alpha * sigma**2),
    "sigma / alpha": (noise_to_signal, lambda alpha, sigma: sigma / alpha),
}
SCALES = (1.0, 7.5, 101.0)
METHODS = ("SDS", "CSD", "VSD", "DDS", "x0-reconstruction")


def labels(k, n=1):
    return {"class_labels": torch.full((n,), k)}


def times_grid(low=0.05, high=0.95):
    """Evenly spaced instead of drawn, so that the mean over them is known; whatever the number of samples."""
    return lambda n, schedule, generator: schedule.at(torch.linspace(low, high, n, dtype=torch.float64))


def make_method(name, denoiser, phi, scale, **settings):
    teacher = guided(denoiser, scale, labels(NEGATIVE))
    if name == "DDS":
        return DDS(teacher=teacher, source=SOURCE_X[None], source_cond=labels(SOURCE), **settings)
    return {
        "SDS": lambda: sds(teacher, **settings),
        "CSD": lambda: csd(denoiser, labels(NEGATIVE), scale=scale, **settings),
        "VSD": lambda: vsd(teacher, phi, **settings),
        "x0-reconstruction": lambda: x0_reconstruction(teacher, **settings),
    }[name]()


def expected_gap(name, scale, alpha, sigma):
    """Mean of baseline - target over the noise: x - E D(x_t) = sigma^2 / (alpha^2 s^2 + sigma^2) (x - m)."""

    def pull(x, mean, std):
        return sigma**2 / (alpha**2 * std**2 + sigma**2) * (x - mean)

    def guided_pull(x, k):
        return (1 - scale) * pull(x, MEANS[NEGATIVE], STDS[NEGATIVE]) + scale * pull(x, MEANS[k], STDS[k])

    return {
        "SDS": lambda: guided_pull(X, PROMPT),
        "CSD": lambda: scale * (pull(X, MEANS[0], STDS[0]) - pull(X, MEANS[NEGATIVE], STDS[NEGATIVE])),
        "VSD": lambda: guided_pull(X, PROMPT) - pull(X, PHI_MEAN, PHI_STD),
        "DDS": lambda: guided_pull(X, PROMPT) - guided_pull(SOURCE_X, SOURCE),
        "x0-reconstruction": lambda: guided_pull(X, PROMPT),
    }[name]()


def expected_gradients(name, schedule, w, scale, t):
    """The gradient at each time: w (eps_hat - eps), with eps_hat - eps alpha / sigma times the gap of images."""
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    eps = 1.0 if name == "x0-reconstruction" else alpha / sigma
    return w(alpha, sigma) * eps * expected_gap(name, scale, alpha, sigma)


def measured_gradients(method, num_samples, num_draws, seed):
    """The gradient that reaches each of ``num_samples`` copies of the image by way of the loss."""
    x0 = X.repeat(num_samples, 1).requires_grad_()
    cond = labels(PROMPT, num_samples)
    generator = torch.Generator().manual_seed(seed)
    distillation_loss(method, x0, cond, num_draws=num_draws, generator=generator)["loss"].backward()
    return x0.grad * num_samples  # the loss is a mean over the batch


@pytest.mark.parametrize("name", METHODS)
def test_the_averaged_gradient_is_the_closed_form(name, schedule, kind, exact_network):
    """Within 5 standard errors for each w, scale and K: a right loss fails once in 400 runs of all cases.

    The standard error is that of what is left once each sample's own expectation is taken away, which noise alone
    explains. It must be small beside the gradient, and the usual mistakes must be far outside.
    """
    teacher = GaussianMixture(MEANS, STDS, torch.ones(3), schedule, torch.arange(3))
    phi = GaussianMixture(PHI_MEAN, PHI_STD, torch.ones(1), schedule)
    networks = [NetworkDenoiser(exact_network(truth, kind), schedule, kind) for truth in (teacher, phi)]
    total = 1200
    t = times_grid()(total, schedule, None)
    for w, by_hand in WEIGHTS.values():
        for scale in SCALES:
            expected = expected_gradients(name, schedule, by_hand, scale, t)
            for num_draws in (1, 4):
                method = make_method(name, *networks, scale, times=times_grid(), w=w)
                measured = measured_gradients(method, total // num_draws, num_draws, seed=num_draws)
                left = measured - expected.unflatten(0, (num_draws, -1)).mean(0)
                error = left.std(0) / math.sqrt(len(left))
                assert (left.mean(0).abs() < 5 * error).all(), (w, scale, num_draws, left.mean(0) / error)
                truth = expected.mean(0)
                assert 5 * error.max() < 0.35 * truth.abs().max()
                for factor in (-1.0, 0.5, 2.0):  # a sign, half a weight, a sum over two
                    assert ((factor * measured.mean(0) - truth).abs() > 5 * error).any()
                if not isinstance(schedule, Karras):  # there alpha is 1
                    without_alpha = (expected / schedule.alpha(t)[:, None]).mean(0)
                    assert ((measured.mean(0) - without_alpha).abs() > 5 * error).any()


def test_reconstruction_with_rescaled_guidance_is_the_closed_form(schedule, kind, exact_network):
    """A rescaled target is not affine in x_t, but where the teacher is all but certain it is a constant."""
    certain = GaussianMixture(MEANS, torch.full((3,), 1e-9), torch.ones(3), schedule, torch.arange(3))
    denoiser = NetworkDenoiser(exact_network(certain, kind), schedule, kind)
    for scale in (7.5, 50.0, 101.0):
        teacher = guided(denoiser, scale, labels(NEGATIVE), rescale=0.5)
        over = MEANS[NEGATIVE] + scale * (MEANS[PROMPT] - MEANS[NEGATIVE])
        target = over * (0.5 * MEANS[PROMPT].std() / over.std() + 0.5)
        value = measured_gradients(x0_reconstruction(teacher, times=times_grid()), 16, 2, seed=0)
        close(value, (X - target).expand(16, 3), rtol=1e-6, atol=1e-6)


def one_draw(method, x0, cond, seed=0):
    return method.gradient(x0, cond, generator=torch.Generator().manual_seed(seed)).value


@pytest.fixture
def teacher(schedule):
    return GaussianMixture(MEANS, STDS, torch.ones(3), schedule, torch.arange(3))


def test_the_losses_are_each_other_s_sums(teacher, schedule):
    """Draw by draw; CSD's decomposition is eps_s - eps = (eps_n - eps) + s (eps_c - eps_n) (arXiv 2310.19415)."""
    x0, cond = X.repeat(50, 1), labels(PROMPT, 50)
    phi = GaussianMixture(PHI_MEAN, PHI_STD, torch.ones(1), schedule)
    same = {"rtol": 1e-9, "atol": 1e-9}
    whole, rest = (one_draw(sds(guided(teacher, s, labels(NEGATIVE))), x0, cond) for s in (7.5, 0))
    close(one_draw(csd(teacher, labels(NEGATIVE), scale=7.5), x0, cond), whole - rest, **same)
    expected = one_draw(sds(teacher), x0, cond) - one_draw(sds(phi), x0, cond)
    close(one_draw(vsd(teacher, phi), x0, cond), expected, **same)
    source, given = X.flip(0).repeat(50, 1), labels(SOURCE, 50)
    dds = DDS(teacher=teacher, source=source, source_cond=given)
    plain = sds(teacher, times=dds.times, w=unit)
    close(one_draw(dds, x0, cond), one_draw(plain, x0, cond) - one_draw(plain, source, given), **same)
    assert one_draw(dds, source, given).abs().max() == 0, "nothing changes where image and prompt are the source's"
    guide = guided(teacher, 50, labels(NEGATIVE), rescale=0.5)
    settings = {"times": uniform(0.05, 0.95)}
    expected = one_draw(sds(guide, w=noise_to_signal, **settings), x0, cond)
    close(one_draw(x0_reconstruction(guide, **settings), x0, cond), expected, **same)


def test_times_are_dreamfusions_and_reconstruction_is_finite_where_alpha_is_zero():
    t = TIMES(5000, VariancePreserving.scaled_linear(), torch.Generator().manual_seed(0))
    assert (t.min(), t.max()) == (20, 979)
    table = VariancePreserving(torch.linspace(0.9, 0.0, 11, dtype=torch.float64))
    teacher = GaussianMixture(MEANS, STDS, torch.ones(3), table, torch.arange(3))
    value = one_draw(x0_reconstruction(teacher, times=uniform(1.0, 1.0)), X[None], labels(PROMPT))
    close(value, X[None] - MEANS[PROMPT])


# Editing.


def test_an_edit_takes_what_the_prompts_differ_in_and_leaves_the_rest():
    """Both prompts allow any second coordinate round 0. SDS forgets the source's own one; DDS keeps it."""
    means = torch.tensor([[-1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    teacher = GaussianMixture(means, torch.full((2,), 0.5), torch.ones(2), RectifiedFlow(), torch.arange(2))
    source = torch.tensor([[-0.8, 0.7]], dtype=torch.float64)

    def optimise(method):
        canvas, generator = Canvas(source), torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(canvas.parameters(), 0.3)
        for _ in range(150):
            optimizer.zero_grad()
            distillation_loss(method, canvas(), labels(1), num_draws=8, generator=generator)["loss"].backward()
            optimizer.step()
        return canvas().detach()

    edited = optimise(DDS(teacher=teacher, source=source, source_cond=labels(0)))
    close(edited, source + means[1] - means[0], rtol=0, atol=1e-3)
    assert (optimise(sds(teacher)) - means[1]).abs().max() < 0.2


def test_one_source_and_prompt_serve_the_whole_batch_in_one_call_and_others_are_named(exact_network, schedule):
    truth = GaussianMixture(MEANS, STDS, torch.ones(3), schedule, torch.arange(3))
    denoiser = NetworkDenoiser(exact_network(truth, "eps"), schedule)
    teacher, x0, cond = guided(denoiser, 7.5, labels(NEGATIVE)), X.repeat(6, 1), labels(PROMPT, 6)
    one = one_draw(DDS(teacher=teacher, source=SOURCE_X[None], source_cond=labels(SOURCE)), x0, cond)
    assert [len(x) for x, _, _ in denoiser.network.calls] == [4 * 6]
    close(
        one_draw(DDS(teacher=teacher, source=SOURCE_X.repeat(6, 1), source_cond=labels(SOURCE, 6)), x0, cond), one
    )
    for source, given, message in (
        (x0[:1, :1], labels(SOURCE), r"source must be images like x0 \(6, 3\); got \(1, 1\)"),
        (x0[:4], labels(SOURCE), r"cond\['source'\] must have batch 1 or 6; got \(4, 3\)"),
        (x0[:1], {"text": torch.zeros(1, 4)}, r"must have the keys of cond \['class_labels'\]; got \['text'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            one_draw(DDS(teacher=teacher, source=source, source_cond=given), x0, cond)


# Defects of other implementations.


class Watched(nn.Module):
    """A frozen network that notes how it is called."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.graphs, self.times = [], []

    def forward(self, x_t, t, **cond):
        self.graphs.append(torch.is_grad_enabled() or x_t.requires_grad)
        self.times.append(t)
        return (x_t * self.scale + cond["class_labels"][:, None]).to(self.scale.dtype)


def watched(name, dtype=torch.float32):
    denoiser = NetworkDenoiser(freeze(Watched(dtype)), VariancePreserving.scaled_linear())
    method = make_method(name, denoiser, denoiser, 7.5)
    return denoiser.network, method


@pytest.mark.parametrize("name", METHODS)
def test_no_network_is_run_with_a_graph(name):
    """One that is never used keeps all activations of the teacher alive."""
    network, method = watched(name)
    x0 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    distillation_loss(method, x0, labels(PROMPT, 4), num_draws=2, generator=torch.Generator())["loss"].backward()
    assert network.graphs
    assert not any(network.graphs)
    assert network.scale.grad is None
    assert x0.grad.abs().sum() > 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("autocast", [False, True])
def test_timesteps_survive_half_precision(name, autocast):
    """bf16 knows 256 integers exactly: timestep 979 would become 980."""
    network, method = watched(name, torch.bfloat16)
    x0 = torch.zeros(512, 3, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        distillation_loss(method, x0, labels(PROMPT, 512), generator=torch.Generator().manual_seed(0))
    t = torch.cat(network.times)
    assert t.dtype == torch.float32
    assert torch.equal(t, t.round())
    assert bool((t != t.bfloat16().float()).any())
    assert t.unique().numel() > 200


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("rank", [1, 4])
def test_every_sample_has_its_own_weight_whatever_the_rank_of_an_image(name, rank, schedule):
    """Where batch, channels and sides are equal, a weight of shape (b,) would multiply the last axis unnoticed."""
    generator = torch.Generator().manual_seed(0)
    shape, n = (4,) * rank, 4
    means, x0, source = torch.randn(3, n, *shape, generator=generator, dtype=torch.float64)
    truth = GaussianMixture(means[:3], STDS, torch.ones(3), schedule, torch.arange(3))
    phi = GaussianMixture(means[3:], PHI_STD, torch.ones(1), schedule)
    noise = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    cond = {"class_labels": torch.tensor([0, 1, 2, 0])}

    def value(rows):
        settings = {"times": lambda b, s, g: times_grid()(n, s, g)[rows], "noise": lambda *_: noise[rows]}
        method = make_method(name, truth, phi, 7.5, **settings)
        if name == "DDS":
            method = DDS(teacher=method.teacher, source=source[rows], source_cond=labels(SOURCE), **settings)
        return one_draw(method, x0[rows], {"class_labels": cond["class_labels"][rows]})

    alone = torch.cat([value(slice(i, i + 1)) for i in range(n)])
    close(value(slice(None)), alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_a_bad_sample_is_named_by_its_time(name, schedule):
    class Broken:
        def __call__(self, x_t, t, cond):
            return torch.where(t[:, None] == t.max(), torch.nan, x_t)

    broken = Broken()
    broken.schedule = schedule
    times = times_grid()
    x0 = torch.zeros(3, 3, dtype=torch.float64)
    method = make_method(name, broken, broken, 7.5, times=times)
    terms = distillation_loss(method, x0, labels(PROMPT, 3), generator=torch.Generator())
    assert not terms["loss"].isfinite()
    assert terms["t_not_finite_max"] == times(3, schedule, None).max()
