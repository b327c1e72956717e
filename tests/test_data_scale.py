"""Networks of data in other units: exact mixtures in both units say what is right."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from denoisers import normal
from refusals import refused
from torch import nn

from scorefield import GaussianMixture, Karras, NetworkDenoiser, RectifiedFlow, VariancePreserving, rescaled_data
from scorefield.data_scale import RescaledData
from scorefield.models.storage import load_denoiser, save_denoiser

close = torch.testing.assert_close

UNITS = [(0.5, 0.0), (0.5, 0.5), (1 / 0.35, -0.4 / 0.35), (0.5, torch.tensor([0.5, -2.0]))]
TERMINAL = VariancePreserving(torch.tensor([0.99, 0.7, 0.3, 0.0], dtype=torch.float64))


def in_units(mixture, scale, mean):
    """The distribution of scale x + mean: the teacher that the user has."""
    moved = replace(mixture, means=scale * mixture.means + mean, stds=scale * mixture.stds)
    return replace(moved, stds=moved.stds.double())


def cases(schedule, n=40):
    generator = torch.Generator().manual_seed(0)
    t = schedule.at(torch.linspace(0.02, 0.98, n, dtype=torch.float64))
    return t, torch.randn(n, 2, generator=generator, dtype=torch.float64), {"class_labels": torch.arange(n) % 3}


@pytest.mark.parametrize("units", UNITS)
def test_a_network_of_other_units_is_the_exact_teacher(units, schedule, kind, make_mixture, exact_network):
    mixture = make_mixture(schedule)
    network = exact_network(in_units(mixture, *units), kind)
    ours = rescaled_data(NetworkDenoiser(network, schedule, kind), *units)
    assert ours.kind == kind
    t, x_t, cond = cases(ours.schedule)
    exact = replace(mixture, schedule=ours.schedule)
    close(ours(x_t, t, cond), exact(x_t, t, cond), rtol=1e-8, atol=1e-8)
    wanted = ours.schedule.from_x0(exact(x_t, t, cond), x_t, t, kind)
    close(ours.network(x_t, t, **cond), wanted, rtol=1e-7, atol=1e-7)


class Seen(nn.Module):
    """Keeps what it is called with, and answers with it."""

    def forward(self, y_t, t):
        self.y_t, self.t = y_t, t
        return y_t


def test_the_schedule_of_half_the_data():
    """alphas_cumprod' = 1 / (1 + 4 (1 - a) / a), and the network sees x_t sqrt(a / a') / 2 at the same t."""
    network, old = Seen(), VariancePreserving.linear()
    ours = rescaled_data(NetworkDenoiser(network, old), 0.5)
    a = old.alphas_cumprod
    close(ours.schedule.alphas_cumprod, 1 / (1 + 4 * (1 - a) / a), rtol=1e-12, atol=0)
    assert ours.schedule.integer
    t, x_t = torch.arange(1000), normal(1000, 2)
    ours(x_t, t, {})
    assert torch.equal(network.t, t.double())
    close(network.y_t, x_t * (a / ours.schedule.alphas_cumprod).sqrt()[:, None] / 2)


def test_the_noise_levels_are_those_of_the_data(schedule):
    """The schedule's sigma / alpha over the scale, at the time that the network is asked."""
    network = Seen()
    ours = rescaled_data(NetworkDenoiser(network, schedule), 0.25)
    t = ours.schedule.at(torch.linspace(0.02, 0.98, 9, dtype=torch.float64))
    ours(torch.zeros(9, 2, dtype=torch.float64), t, {})
    close(ours.schedule.ratio(t), schedule.ratio(network.t) / 0.25, rtol=1e-9, atol=0)
    ends = torch.tensor([[s.t_min, s.t_max] for s in (schedule, ours.schedule)], dtype=torch.float64)
    close(ours.schedule.ratio(ends[1]), schedule.ratio(ends[0]) / 0.25)


@pytest.mark.parametrize("units", UNITS)
def test_there_and_back_is_where_it_was(units, schedule, kind, make_mixture, exact_network):
    scale, mean = units
    plain = NetworkDenoiser(exact_network(make_mixture(schedule), kind), schedule, kind)
    again = rescaled_data(rescaled_data(plain, scale, mean), 1 / scale, -mean / scale)
    t, x_t, cond = cases(schedule)
    close(again(x_t, t, cond), plain(x_t, t, cond), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["v", "flow", "x0"])
@pytest.mark.parametrize("schedule", [TERMINAL, RectifiedFlow()], ids=["vp", "flow"])
def test_pure_noise_gives_the_mean_of_the_data(schedule, kind, make_mixture, exact_network):
    """At alpha = 0 a quotient of alphas is 0 / 0."""
    mixture = make_mixture(schedule, labelled=False)
    network = exact_network(in_units(mixture, 0.5, 0.5), kind)
    ours = rescaled_data(NetworkDenoiser(network, schedule, kind), 0.5, 0.5)
    x_t = torch.randn(3, 2, dtype=torch.float64)
    mean = (mixture.weights[:, None] * mixture.means).sum(0)
    close(ours(x_t, torch.full((3,), schedule.t_max), {}), mean.expand(3, 2))
    assert ours.schedule.t_max == schedule.t_max


def test_the_ends_of_time(make_mixture, exact_network):
    """An eps network says nothing at pure noise; a flow at time 0 is the image, whatever its network says."""
    ours = rescaled_data(NetworkDenoiser(exact_network(make_mixture(TERMINAL), "eps"), TERMINAL), 0.5)
    with refused("undefined where alpha"):
        ours(torch.zeros(1, 2), torch.tensor([3.0]), {})
    ours = rescaled_data(NetworkDenoiser(lambda y, t: torch.full_like(y, 7.0), RectifiedFlow(), "flow"), 0.5, 0.5)
    x = normal(2, 2)
    close(ours(x, torch.zeros(2, dtype=torch.float64), {}), x)


def test_images_have_a_mean_for_each_channel(exact_network):
    schedule = RectifiedFlow()
    data = GaussianMixture(torch.zeros(1, 3, 2, 2).double(), torch.ones(1).double(), torch.ones(1), schedule)
    mean = [0.1, 0.5, 0.9]
    moved = in_units(data, 0.5, torch.tensor(mean).double()[:, None, None])
    ours = rescaled_data(NetworkDenoiser(exact_network(moved, "v"), schedule, "v"), 0.5, mean)
    x_t, t = normal(4, 3, 2, 2), torch.full((4,), 0.6, dtype=torch.float64)
    close(ours(x_t, t, {}), data(x_t, t, {}))  # its schedule is RectifiedFlow, too


def test_time_scale_extras_and_conditions_pass_through():
    seen = {}

    class Net(nn.Module):
        def forward(self, y_t, t, class_labels):
            seen.update(t=t, labels=class_labels)
            return y_t, "logits"

    ours = rescaled_data(NetworkDenoiser(Net(), RectifiedFlow(), "flow", 1000.0), 0.5, 0.5)
    labels = torch.tensor([1, 2])
    _, extras = ours.with_extras(torch.zeros(2, 3), torch.tensor([0.5, 1.0]), {"class_labels": labels})
    assert extras == ("logits",)
    assert seen["labels"] is labels
    assert seen["t"].dtype == torch.float32
    close(seen["t"], torch.tensor([1000 / 3, 1000.0]))  # ratio 1 of x is ratio 1/2 of y: t = 1/3
    assert ours.time_scale == 1


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, y_t, t):
        return self.line(y_t)


def test_copies_learn_and_are_saved_with_their_units(tmp_path):
    """What a student is: a copy of the network in the same denoiser."""

    def build(scale=0.5, mean=0.3):
        return rescaled_data(NetworkDenoiser(Line(), VariancePreserving.linear()), scale, mean)

    teacher = build()
    student = replace(teacher, network=deepcopy(teacher.network))
    student.network.network.line.weight.data.mul_(2)
    x_t, t = torch.randn(2, 2), torch.tensor([3.0, 900.0])
    assert not torch.allclose(student(x_t, t, {}), teacher(x_t, t, {}))
    save_denoiser(student, tmp_path / "student")
    loaded = load_denoiser(tmp_path / "student", build().network)
    assert torch.equal(loaded(x_t, t, {}), student(x_t, t, {}))
    half = deepcopy(teacher.network).to(torch.bfloat16)
    assert torch.equal(half.mean, teacher.network.mean)
    for scale, mean in ((0.25, 0.3), (0.5, 0.0)):
        with refused(r"belong to rescaled_data\(\.\.\., scale=0\.5, mean=0\.3\)"):
            load_denoiser(tmp_path / "student", build(scale, mean).network)


def test_what_is_no_unit_no_schedule_or_no_denoiser_is_refused():
    for scale, mean in ((0, 0), (-1, 0), (float("nan"), 0), (float("inf"), 0), (1, [0, float("nan")])):
        with refused("finite scale above 0 and a finite mean"):
            rescaled_data(NetworkDenoiser(nn.Identity(), Karras()), scale, mean)

    class Other(Karras):
        pass

    assert isinstance(rescaled_data(NetworkDenoiser(nn.Identity(), Other()), 1.0).network, RescaledData)
    with refused(r"knows the schedules of scorefield\.schedule; got a object"):
        rescaled_data(NetworkDenoiser(nn.Identity(), object()), 1.0)
    wide = NetworkDenoiser(lambda y_t, t: torch.cat([y_t, y_t], 1), VariancePreserving.linear(), "v")
    with refused("Split off a variance head"):
        rescaled_data(wide, 0.5)(torch.zeros(2, 3), torch.full((2,), 5.0), {})
