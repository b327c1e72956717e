"""Good teachers are wrapped with one deliberate mistake each, and the diagnosis must name it; good ones pass."""

import pytest
import torch
from denoisers import seeded
from torch import nn

from scorefield.denoiser import KarrasPreconditioning, NetworkDenoiser, karras_denoiser
from scorefield.diagnosis.baselines import best_without_network
from scorefield.diagnosis.check import diagnose
from scorefield.diagnosis.explanation import Asked
from scorefield.diagnosis.mistakes import mistakes, zero_snr
from scorefield.diagnosis.readings import coefficients, declared
from scorefield.diagnosis.trials import difference, errors, levels_of, make_trial
from scorefield.exact import EmpiricalDistribution, GaussianMixture
from scorefield.models.networks import ResidualMLP
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

LINEAR, SCALED = VariancePreserving.linear(), VariancePreserving.scaled_linear()
COSINE = VariancePreserving.cosine()
FLOW, EDM = RectifiedFlow(), Karras()


def pictures(n=40, seed=0):
    """(n, 3, 8, 8) rectangles of one colour on a ground of another, red above blue in the mean."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, 1, 1, generator=rng).repeat(1, 1, 8, 8) * 0.9 - 1
    for image in images:
        top, left = torch.randint(0, 4, (2,), generator=rng).tolist()
        high, wide = torch.randint(2, 6, (2,), generator=rng).tolist()
        colour = torch.rand(3, 1, 1, generator=rng) * torch.tensor([1.0, 0.7, 0.4]).view(3, 1, 1)
        image[:, top : top + high, left : left + wide] = 2 * colour - 0.6
    return images.clamp(-1, 1)


class Memory(nn.Module):
    """A perfect network for some images: what training to the end would give.

    ``known`` is what its training data were made of; ``time`` turns what it is told into its schedule's t.
    """

    def __init__(self, images, schedule, kind, time=lambda t: t, labels=None, dropout=0.0):
        super().__init__()
        self.exact = EmpiricalDistribution(images, schedule, labels)
        self.kind, self.time, self.dropout = kind, time, nn.Dropout(dropout)

    def forward(self, x, t, **cond):
        schedule = self.exact.schedule
        t = self.time(t).double().clamp(max(schedule.t_min, 1e-5 if schedule is FLOW else 0), schedule.t_max)
        x0 = self.dropout(self.exact(x, t, cond))
        return schedule.from_x0(x0, x, t, self.kind)


class Inner(nn.Module):
    """The network inside EDM's preconditioning that makes the whole perfect."""

    def __init__(self, images, sigma_data):
        super().__init__()
        self.exact, self.sigma_data = EmpiricalDistribution(images, EDM), sigma_data

    def forward(self, x, noise):
        sigma = (4 * noise).exp().clamp(1e-3, 100)
        skip, out, into = (c.to(x).view(-1, 1, 1, 1) for c in coefficients(sigma, self.sigma_data))
        noisy = x / into
        return (self.exact(noisy, sigma, {}) - skip * noisy) / out


class Wrapped(nn.Module):
    """A network behind changes of its input and output."""

    def __init__(self, network, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x, t, **cond):
        return self.after(self.network(self.before(x), t, **cond))


def last(x):
    return x.permute(0, 2, 3, 1).reshape(x.shape)


def first(x):
    return x.reshape(len(x), 8, 8, 3).permute(0, 3, 1, 2)


X = pictures()


def vp(images=X, schedule=LINEAR, kind="eps", wrapped_as=None, wrapped_on=None, **options):
    return NetworkDenoiser(Memory(images, schedule, kind, **options), wrapped_on or schedule, wrapped_as or kind)


MISTAKES = {
    "half the size": ("data_scale", lambda: vp(X / 2)),
    "in 0 to 1": ("data_scale", lambda: vp((X + 1) / 2, kind="v")),
    "bytes": ("data_scale", lambda: vp(127.5 * (X + 1))),
    "centred": ("data_scale", lambda: vp(X - X.mean([0, 2, 3], keepdim=True), FLOW, "flow")),
    "input halved only": ("data_scale",
     lambda: NetworkDenoiser(Wrapped(Memory(X / 2, LINEAR, "eps"), lambda x: x / 2), LINEAR, "eps")),
    "v for eps": ("kind", lambda: vp(kind="v", wrapped_as="eps")),
    "eps for v": ("kind", lambda: vp(kind="eps", wrapped_as="v", schedule=SCALED)),
    "x0 for flow": ("kind", lambda: vp(schedule=FLOW, kind="x0", wrapped_as="flow")),
    "minus the flow": ("kind",
     lambda: NetworkDenoiser(Wrapped(Memory(X, FLOW, "flow"), after=torch.neg), FLOW, "flow")),
    "scaled for linear": ("schedule", lambda: vp(schedule=SCALED, wrapped_on=LINEAR)),
    "linear for cosine": ("schedule", lambda: vp(schedule=LINEAR, kind="v", wrapped_on=COSINE)),
    "t in 0 to 1": ("time_scale", lambda: vp(time=lambda t: 1000 * t)),
    "t in 0 to 1000": ("time_scale", lambda: vp(schedule=FLOW, kind="flow", time=lambda t: t / 1000)),
    "t from data to noise": ("time_reversed", lambda: vp(schedule=FLOW, kind="flow", time=lambda t: 1 - t)),
    "one later": ("off_by_one", lambda: vp(time=lambda t: t - 1)),
    "one earlier": ("off_by_one", lambda: vp(kind="v", schedule=COSINE, time=lambda t: t + 1)),
    "channels last": ("channels_last",
     lambda: NetworkDenoiser(Wrapped(Memory(last(X), LINEAR, "eps")), LINEAR, "eps")),
    "reshaped": ("channels_last", lambda: vp(first(X), FLOW, "flow")),
    "blue for red": ("channel_order", lambda: vp(X.flip(1), kind="v")),
    "rows for columns": ("orientation", lambda: vp(X.mT)),
    "no preconditioning": ("sigma_data", lambda: NetworkDenoiser(Inner(X, 0.5), EDM, "x0")),
    "another sigma_data": ("sigma_data", lambda: karras_denoiser(Inner(X, 1.0), EDM, 0.5)),
    "another sigma_data, hidden": ("sigma_data",
     lambda: NetworkDenoiser(Wrapped(KarrasPreconditioning(Inner(X, 0.5), 1.0)), EDM, "x0")),
    "dropout": ("random", lambda: vp(dropout=0.2)),
    "two heads": ("shape", lambda: NetworkDenoiser(Wrapped(Memory(X, LINEAR, "eps"), after=twice), LINEAR, "eps")),
    "nan": ("not_finite", lambda: NetworkDenoiser(Wrapped(Memory(X, FLOW, "v"), after=infinite), FLOW, "v")),
    "no weights": ("does_not_denoise", lambda: karras_denoiser(ResidualMLP((3, 8, 8), width=8, depth=1), EDM)),
}  # fmt: skip


def twice(x):
    return torch.cat([x, x], 1)


def infinite(x):
    return x / 0


def ask(denoiser, x0=X, cond=None, **options):
    return diagnose(denoiser, x0, cond or {}, generator=seeded(0), **options)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    name, teacher = MISTAKES[mistake]
    found = ask(teacher())
    assert found.names == (name,), found.findings
    assert found.findings[0].severity == ("warning" if name == "off_by_one" else "error")


GOOD = {
    "eps": lambda: vp(), "eps, cosine": lambda: vp(schedule=COSINE), "v": lambda: vp(schedule=SCALED, kind="v"),
    "v, zero SNR": lambda: vp(schedule=zero_snr(SCALED), kind="v"),
    "flow": lambda: vp(schedule=FLOW, kind="flow"), "x0": lambda: vp(schedule=FLOW, kind="x0"),
    "EDM": lambda: karras_denoiser(Inner(X, 0.5), EDM, 0.5), "no network": lambda: EmpiricalDistribution(X, EDM),
}  # fmt: skip


@pytest.mark.parametrize("teacher", GOOD)
def test_a_good_teacher_passes(teacher):
    found = ask(GOOD[teacher]())
    assert not found.findings
    assert found.calls < 120
    assert len(found.rows) == 5
    assert not ask(GOOD[teacher](), None, noise=torch.randn(16, 3, 8, 8)).findings


def test_a_gaussian_that_no_one_beats_linearly_passes(schedule, generator):
    exact = GaussianMixture(torch.zeros(1, 1, 4, 4), torch.tensor([0.7]), torch.ones(1), schedule)
    assert not ask(exact, exact.sample(64, generator)).findings


def labelled(shift=0, null=None):
    labels = torch.arange(len(X)) % 5
    network = Memory(X, LINEAR, "eps", labels=labels)
    if shift:
        network.exact = EmpiricalDistribution(X, LINEAR, (labels + shift) % 5)
    return NetworkDenoiser(network, LINEAR, "eps"), {"class_labels": labels}


@pytest.mark.parametrize("wrong", [0, 1, -1, "shuffled"])
def test_labels_of_other_images_are_named_and_those_of_the_teacher_pass(wrong):
    teacher, cond = labelled(wrong if isinstance(wrong, int) else 0)
    if wrong == "shuffled":
        cond = {"class_labels": cond["class_labels"][torch.randperm(len(X), generator=seeded(3))]}
    found = ask(teacher, cond=cond, null={"class_labels": torch.tensor([5])})
    assert found.names == (("labels",) if wrong else ())
    how = {1: "raised", -1: "lowered", "shuffled": "left out"}
    assert not wrong or how[wrong] in found.findings[0].message


OWN = {
    "v for eps": "kind", "eps for v": "kind", "x0 for flow": "kind", "linear for cosine": "schedule",
    "minus the flow": "", "t in 0 to 1": "",  # minus the flow of x is a flow of -x
    "no weights": "does_not_denoise",
}  # fmt: skip


@pytest.mark.parametrize("mistake", [
    pytest.param(one, marks=() if one in ("eps for v", "minus the flow", "no weights") else pytest.mark.slow)
    for one in OWN
])  # fmt: skip
def test_without_data_the_own_samples_show_that_something_is_wrong(mistake):
    found = ask(MISTAKES[mistake][1](), None, noise=torch.randn(16, 3, 8, 8, generator=seeded(1)))
    assert found.own
    assert len(found.errors) == 1
    assert found.names == (OWN[mistake] or found.names[0],)


@pytest.mark.parametrize(("kind", "schedule"), [("eps", LINEAR), ("v", COSINE), ("x0", FLOW)])
def test_without_data_a_vague_teacher_is_no_mistake(kind, schedule):
    # Its output is off by 0.15 sin(40 x): at the highest level an eps teacher's x0 is worse than the mean image.
    vague = Wrapped(Memory(X, schedule, kind), after=lambda x: x + 0.15 * torch.sin(40 * x))
    found = ask(NetworkDenoiser(vague, schedule, kind), None, noise=torch.randn(16, 3, 8, 8, generator=seeded(1)))
    assert not found.errors
    assert kind != "eps" or found.rows[-1].teacher > found.rows[-1].constant


def test_an_output_of_zeros_is_worse_than_silence_nowhere_and_a_wrong_kind_is_somewhere():
    base, noise = vp(), torch.randn(16, 3, 8, 8, generator=seeded(1))
    network = Wrapped(base.network, after=torch.zeros_like)
    for denoiser, expected in ((NetworkDenoiser(network, LINEAR, "eps"), False), (vp(wrapped_as="v"), True)):
        asked = Asked.about(denoiser, noise / 2, {}, seeded(0), 64, own=True)
        assert bool(asked.worse_than_silence) == expected
    # x0 = (x_t - sigma 0) / alpha = x0 + r eps, whose error is r^2.
    ratios = asked.trial.ratios
    quiet = Asked.about(NetworkDenoiser(network, LINEAR, "eps"), noise / 2, {}, seeded(0), 64, own=True)
    torch.testing.assert_close(quiet.silent.mean(1), ratios**2, rtol=0.2, atol=0)


def test_without_data_a_teacher_of_half_the_size_is_suspected():
    noise = torch.randn(16, 3, 8, 8, generator=seeded(1))
    assert ask(vp(X / 2), None, noise=noise, bounded=True).names == ("data_scale",)
    assert not ask(vp(X / 2), None, noise=noise).findings


def test_the_linear_filter_is_the_best_one_for_a_gaussian(generator):
    # White data of variance 1: each number is shrunk by 1 / (1 + r^2), and the error is r^2 / (1 + r^2).
    x0 = torch.randn(40_000, 1, 2, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    found = best_without_network(x0, noise, 2.0)
    # Squares of 160 000 normal numbers: the mean has a standard error of sqrt(2 / 160 000) = 0.35 % of itself.
    five = 5 * (2 / x0.numel()) ** 0.5
    assert float(found["linear"].mean()) == pytest.approx(0.8, rel=five)
    assert float(found["constant"].mean()) == pytest.approx(1.0, rel=five)
    # The same numbers through the filter of the true power: what is left is its estimate from the other images.
    best = ((x0 + 2 * noise) / 5 - x0).square().mean()
    assert float(found["linear"].mean()) == pytest.approx(float(best), rel=1e-3)
    assert float(found["blurred"].mean()) > 0.8


def test_a_difference_is_the_log_ratio_of_mean_errors_with_its_standard_error(generator):
    b = torch.rand(2, 5000, generator=generator, dtype=torch.float64) + 1
    a = b * torch.tensor([[0.5], [0.25]], dtype=torch.float64)
    exact = difference(a, b, 0.0)
    assert exact.mean == pytest.approx(-1.5 * torch.tensor(2.0).log().item())
    assert exact.error == pytest.approx(0, abs=1e-12)
    # Independent errors: the variance of log(mean a / mean b) is a sum of two, over n.
    other = torch.rand(1, 5000, generator=generator, dtype=torch.float64) + 1
    expected = (2 * (1 / 12) / 1.5**2 / 5000) ** 0.5
    assert difference(other, b[:1], 0.0).error == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("denoiser", "size"), [(vp(), 1), (karras_denoiser(Inner(X, 0.5), EDM, 0.5), 1)])
def test_the_declared_reading_gives_the_denoisers_own_x0(denoiser, size, generator):
    base, output = declared(denoiser)
    ratios = levels_of(denoiser.schedule, (0.3, 2.0), 1.0)
    trial = make_trial(X[:6], {}, ratios, generator, batch_size=4)
    found = errors(base, trial)[output]
    for i, ratio in enumerate(ratios):
        t = denoiser.schedule.time(ratio).float().expand(6)
        x_t = denoiser.schedule.diffuse(X[:6], trial.noise[i], t)
        expected = (denoiser(x_t, t, {}) - X[:6]).flatten(1).square().mean(1)
        torch.testing.assert_close(found[i].float(), expected, rtol=1e-3, atol=1e-6)


def test_every_mistake_is_another_reading():
    for denoiser in (vp(), vp(schedule=FLOW, kind="flow"), karras_denoiser(Inner(X, 0.5), EDM, 0.5)):
        base, _ = declared(denoiser)
        names = [mistake.words for mistake in mistakes(base, X, 1.0)]
        assert len(names) == len(set(names))
