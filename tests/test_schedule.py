"""Noise schedules: inverse maps, definitions, what a network's output means on each, and diffusers' numbers."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from refusals import refused
from schedules import ZERO_SNR

from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
SD = VariancePreserving.scaled_linear()
VP = {
    "vp_linear": VariancePreserving.linear(), "vp_scaled_linear": SD, "vp_cosine": VariancePreserving.cosine(),
    "vp_short": VariancePreserving.linear(num_steps=7, beta_start=0.01, beta_end=0.5),
}  # fmt: skip
ALL = {"karras": Karras(), "karras_narrow": Karras(0.01, 50.0, rho=3.0), "flow": RectifiedFlow(), **VP}
KINDS = ("x0", "eps", "v", "flow")


@pytest.fixture(params=list(ALL))
def any_schedule(request):
    return ALL[request.param]


@pytest.fixture(params=list(VP))
def vp(request):
    return VP[request.param]


def times_of(schedule, num=2003):
    """A dense grid, both ends included, and random points between."""
    dense = torch.linspace(schedule.t_min, schedule.t_max, num, dtype=torch.float64)
    random = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat([dense, schedule.t_min + (schedule.t_max - schedule.t_min) * random])


def test_time_and_ratio_are_inverse(any_schedule, schedule, ratios):
    t = times_of(any_schedule)
    close(any_schedule.time(any_schedule.ratio(t)), t, rtol=0, atol=1e-9)
    close(schedule.ratio(schedule.time(ratios)), ratios, rtol=1e-11, atol=0)


def test_both_ends_of_a_flow_and_a_terminal_step_without_signal():
    flow, ends = RectifiedFlow(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert flow.ratio(ends).tolist() == [0.0, math.inf]
    assert flow.time(torch.tensor([0.0, math.inf])).tolist() == [0.0, 1.0]
    assert (ZERO_SNR.alpha(torch.tensor(999.0)), ZERO_SNR.sigma(torch.tensor(999.0))) == (0, 1)
    assert ZERO_SNR.ratio(torch.tensor(999.0)) == math.inf
    t = torch.arange(1000, dtype=torch.float64)
    close(ZERO_SNR.time(ZERO_SNR.ratio(t)), t, rtol=0, atol=1e-9)
    below = torch.tensor([998.0, 998.001, 998.5, 998.999], dtype=torch.float64)
    assert torch.isfinite(ZERO_SNR.ratio(below)).all()
    assert (ZERO_SNR.alpha(below) > 0).all()


def test_every_schedule_grows_noisier_in_float64_and_is_named_briefly(any_schedule):
    """Error messages quote the schedule; a thousand numbers would bury what they say."""
    t = times_of(any_schedule)[:2003]
    assert (any_schedule.ratio(t).diff() > 0).all()
    assert (any_schedule.sigma(t).diff() > 0).all()
    assert (any_schedule.alpha(t).diff() <= 0).all()
    t = torch.full((2, 3), any_schedule.t_max / 2, dtype=torch.float32)
    for values in (*(getattr(any_schedule, name)(t) for name in ("alpha", "sigma", "ratio")),
                   any_schedule.time(t + 0.1)):  # fmt: skip
        assert (values.shape, values.dtype) == ((2, 3), torch.float64)
    assert any_schedule.at(torch.zeros(2, 3)).dtype == torch.float64
    assert type(any_schedule).__name__ in repr(any_schedule)
    assert len(repr(any_schedule)) < 200


def test_coefficients_are_their_definitions(vp):
    t = torch.tensor([0.1, 0.6], dtype=torch.float64)
    for schedule, alpha, sigma in ((Karras(), torch.ones_like(t), t), (RectifiedFlow(), 1 - t, t)):
        close((schedule.alpha(t), schedule.sigma(t)), (alpha, sigma))
    t = torch.arange(len(vp.alphas_cumprod), dtype=torch.float64)
    close(vp.alpha(t) ** 2, vp.alphas_cumprod, rtol=1e-12, atol=1e-15)
    close(vp.sigma(t) ** 2, 1 - vp.alphas_cumprod, rtol=1e-10, atol=0)
    t = times_of(vp)
    close(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)
    low, mid, high = SD.ratio(torch.tensor([500.0, 500.25, 501.0], dtype=torch.float64)).log()
    close(mid, 0.75 * low + 0.25 * high)


@pytest.mark.parametrize("pure_noise", [(RectifiedFlow(), 1.0), (ZERO_SNR, 999.0)], ids=["flow", "vp"])
def test_every_kind_but_eps_determines_x0_at_pure_noise(pure_noise, kind, generator):
    schedule, t = pure_noise[0], torch.full((3,), pure_noise[1], dtype=torch.float64)
    x0, noise = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    x_t = schedule.diffuse(x0, noise, t)
    output = schedule.from_x0(x0, x_t, t, kind)
    if kind == "eps":
        close(output, noise)
        with refused(r"alpha\(t\) = 0; got t in"):
            schedule.to_x0(output, x_t, t, kind)
    else:
        close(schedule.to_x0(output, x_t, t, kind), x0)


def test_clean_images_hold_no_noise_to_read(kind):
    """At sigma = 0 the three kinds that contain noise are undefined, but each network output means x0 = x_t."""
    flow, x, t = RectifiedFlow(), torch.ones(2, 3, dtype=torch.float64), torch.zeros(2)
    if kind == "x0":
        assert flow.from_x0(x, x, t, kind) is x
    else:
        with refused(rf"x0 to {kind} is undefined where sigma\(t\) = 0"):
            flow.from_x0(x, x, t, kind)
        close(flow.to_x0(torch.full_like(x, 7.0), x, t, kind), x)


def test_kinds_are_their_definitions_at_each_samples_own_time(schedule, ratios, generator):
    t = schedule.time(ratios)
    x0, noise = torch.randn(2, len(t), 3, 4, 4, generator=generator, dtype=torch.float64)
    x_t = schedule.diffuse(x0, noise, t)
    for i in range(len(t)):
        close(x_t[i], schedule.alpha(t[i]) * x0[i] + schedule.sigma(t[i]) * noise[i])
    alpha, sigma = schedule.alpha(t).view(-1, 1, 1, 1), schedule.sigma(t).view(-1, 1, 1, 1)
    expected = {"x0": x0, "eps": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0}
    for kind, output in expected.items():
        close(schedule.from_x0(x0, x_t, t, kind), output, rtol=1e-10, atol=1e-10)
        close(schedule.to_x0(output, x_t, t, kind), x0, rtol=1e-10, atol=1e-10)


def test_conversion_round_trips_for_any_output(any_schedule, kind, generator):
    """Also for an x_t that has nothing to do with x0: the two maps are inverse of each other, not just on data."""
    fraction = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=torch.float64)
    t = any_schedule.t_min + fraction * (any_schedule.t_max - any_schedule.t_min)
    x0, x_t = torch.randn(2, len(t), 5, generator=generator, dtype=torch.float64)
    close(any_schedule.to_x0(any_schedule.from_x0(x0, x_t, t, kind), x_t, t, kind), x0, rtol=1e-9, atol=1e-9)
    close(any_schedule.from_x0(any_schedule.to_x0(x0, x_t, t, kind), x_t, t, kind), x0, rtol=1e-9, atol=1e-9)


def test_half_precision_outputs_are_converted_in_float32(kind):
    x, t = torch.ones(2, 3, dtype=torch.bfloat16), torch.full((2,), 500.0)
    assert SD.to_x0(x, x, t, kind).dtype == SD.to_x0(x, x.double(), t, kind).dtype == torch.float32
    assert SD.to_x0(x.double(), x, t, kind).dtype == torch.float64


def test_customary_spacing_is_each_familys_own(any_schedule):
    t = any_schedule.at(torch.linspace(0, 1, 7, dtype=torch.float64))
    close(t[[0, -1]], torch.tensor([any_schedule.t_min, any_schedule.t_max], dtype=torch.float64))
    assert (t.diff() > 0).all()
    fraction = torch.tensor([0.0, 0.2501, 0.5, 1.0], dtype=torch.float64)
    close(Karras().at(fraction), (0.002 ** (1 / 7) + fraction * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7)
    close(RectifiedFlow().at(fraction), fraction)
    close(RectifiedFlow(0.2, 0.6).at(fraction), 0.2 + 0.4 * fraction)
    assert SD.at(fraction).tolist() == [0, 250, 500, 999]
    close(VariancePreserving(SD.alphas_cumprod, integer=False).at(fraction), fraction * 999)


def test_snap_rounds_only_integer_teachers_and_only_karras_scales_its_first_noise(any_schedule):
    t = torch.tensor([0.4, 3.7])
    assert SD.snap(t).tolist() == [0, 4]
    for continuous in (Karras(), RectifiedFlow(), VariancePreserving(SD.alphas_cumprod, integer=False)):
        assert torch.equal(continuous.snap(t), t)
    t = torch.tensor([any_schedule.t_max, any_schedule.t_max / 2], dtype=torch.float64)
    close(any_schedule.initial_std(t), t if isinstance(any_schedule, Karras) else torch.ones_like(t))


@pytest.mark.parametrize(("name", "betas", "ours"), [
    ("linear", (1e-4, 0.02), VP["vp_linear"]), ("scaled_linear", (0.00085, 0.012), SD),
    ("squaredcos_cap_v2", (1e-4, 0.02), VP["vp_cosine"]),
])  # fmt: skip
def test_diffusers_agrees_on_tables_add_noise_and_velocity(name, betas, ours, generator):
    theirs = DDIMScheduler(beta_schedule=name, beta_start=betas[0], beta_end=betas[1])
    close(ours.alphas_cumprod, torch.cumprod(1 - theirs.betas.double(), 0), rtol=0, atol=1e-7)
    close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=0, atol=1e-6)  # their product is float32
    t = torch.tensor([1, 250, 700, 999])
    x0, noise = torch.randn(2, 4, 3, 4, 4, generator=generator)
    x_t = theirs.add_noise(x0, noise, t)
    close(ours.diffuse(x0, noise, t.float()), x_t, rtol=1e-5, atol=1e-5)
    velocity = theirs.get_velocity(x0, noise, t)
    close(ours.to_x0(velocity, x_t, t.float(), "v"), x0, rtol=1e-5, atol=1e-5)
    exact = ours.diffuse(x0.double(), noise.double(), t.float())
    close(ours.from_x0(x0.double(), exact, t.float(), "v").float(), velocity, rtol=1e-5, atol=1e-5)


def test_unknown_kinds_and_times_of_another_shape_are_refused(schedule):
    x = torch.zeros(2, 3)
    for call in (schedule.to_x0, schedule.from_x0):
        with refused("unknown prediction kind 'epsilon'; expected one of x0, eps, v, flow"):
            call(x, x, torch.full((2,), 0.5), "epsilon")
    for t in (torch.tensor(0.5), torch.full((3,), 0.5), torch.full((2, 1), 0.5)):
        calls = [lambda t: schedule.diffuse(x, x, t)]
        calls += [lambda t, kind=kind: schedule.to_x0(x, x, t, kind) for kind in KINDS]
        calls += [lambda t, kind=kind: schedule.from_x0(x, x, t, kind) for kind in KINDS]
        for call in calls:
            with refused(r"t must have shape \(2,\) to match x_t \(2, 3\); got "):
                call(t)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Karras(t_min=0.0), "0 < t_min < t_max < inf and 0 < rho < inf; got .*t_min=0.0"),
    (lambda: Karras(t_min=2.0, t_max=1.0), "got .*t_min=2.0, t_max=1.0"),
    (lambda: Karras(t_max=float("inf")), "got .*t_max=inf"), (lambda: Karras(rho=0.0), "got .*rho=0.0"),
    (lambda: RectifiedFlow(t_max=1000.0), "0 <= t_min < t_max <= 1; got .*1000"),
    (lambda: VariancePreserving(torch.tensor([0.1, 0.5])), "strictly decreasing"),
    (lambda: VariancePreserving(torch.tensor([[0.5, 0.1]])), r"got \(1, 2\)"),
    (lambda: VariancePreserving(torch.tensor([0.5])), "at least 2"),
    (lambda: VariancePreserving(torch.tensor([1.0, 0.5])), r"must lie in \[0, 1\); got 1 down to 0.5"),
    (lambda: VariancePreserving(torch.tensor([0.5, -0.1])), "got 0.5 down to -0.1"),
])  # fmt: skip
def test_impossible_schedules_raise(build, message):
    with refused(message):
        build()
