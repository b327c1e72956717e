import math

import pytest
import torch
from diffusers import DDIMScheduler

from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

close = torch.testing.assert_close


def zero_terminal():
    """Stable Diffusion's table with zero terminal signal-to-noise (Lin et al. 2023, Algorithm 1)."""
    roots = VariancePreserving.scaled_linear().alphas_cumprod.sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return VariancePreserving(roots**2)


ALL = {
    "karras": Karras(),
    "karras_narrow": Karras(0.01, 50.0, rho=3.0),
    "flow": RectifiedFlow(),
    "vp_linear": VariancePreserving.linear(),
    "vp_scaled_linear": VariancePreserving.scaled_linear(),
    "vp_cosine": VariancePreserving.cosine(),
    "vp_short": VariancePreserving.linear(num_steps=7, beta_start=0.01, beta_end=0.5),
}
VP = {name: schedule for name, schedule in ALL.items() if name.startswith("vp")}


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


def test_time_inverts_ratio(any_schedule):
    t = times_of(any_schedule)
    close(any_schedule.time(any_schedule.ratio(t)), t, rtol=0, atol=1e-9)


def test_ratio_inverts_time(schedule, ratios):
    close(schedule.ratio(schedule.time(ratios)), ratios, rtol=1e-11, atol=0)


def test_time_inverts_ratio_at_integer_timesteps(vp):
    t = torch.arange(len(vp.alphas_cumprod), dtype=torch.float64)
    close(vp.time(vp.ratio(t)), t, rtol=0, atol=1e-9)


def test_flow_ends_are_data_and_pure_noise():
    flow, ends = RectifiedFlow(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert flow.ratio(ends).tolist() == [0.0, math.inf]
    assert flow.time(torch.tensor([0.0, math.inf])).tolist() == [0.0, 1.0]


def test_noise_grows_with_time(any_schedule):
    t = times_of(any_schedule)[:2003]
    assert (any_schedule.ratio(t).diff() > 0).all()
    assert (any_schedule.sigma(t).diff() > 0).all()
    assert (any_schedule.alpha(t).diff() <= 0).all()


def test_coefficients_are_float64_of_the_shape_of_t(any_schedule):
    t = torch.full((2, 3), any_schedule.t_max / 2, dtype=torch.float32)
    for values in (
        any_schedule.alpha(t),
        any_schedule.sigma(t),
        any_schedule.ratio(t),
        any_schedule.time(t + 0.1),
    ):
        assert (values.shape, values.dtype) == ((2, 3), torch.float64)
    assert any_schedule.at(torch.zeros(2, 3)).dtype == torch.float64


def test_karras_and_flow_coefficients_are_their_definitions():
    t = torch.tensor([0.1, 0.6], dtype=torch.float64)
    close(Karras().alpha(t), torch.ones_like(t))
    close(Karras().sigma(t), t)
    close(RectifiedFlow().alpha(t), 1 - t)
    close(RectifiedFlow().sigma(t), t)


def test_variance_preserving_coefficients_are_the_table_at_integers(vp):
    t = torch.arange(len(vp.alphas_cumprod), dtype=torch.float64)
    close(vp.alpha(t) ** 2, vp.alphas_cumprod, rtol=1e-12, atol=1e-15)
    close(vp.sigma(t) ** 2, 1 - vp.alphas_cumprod, rtol=1e-10, atol=0)


def test_variance_is_preserved_between_integers(vp):
    t = times_of(vp)
    close(vp.alpha(t) ** 2 + vp.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


def test_log_ratio_is_linear_between_integers():
    vp = VariancePreserving.scaled_linear()
    low, mid, high = vp.ratio(torch.tensor([500.0, 500.25, 501.0], dtype=torch.float64)).log()
    close(mid, 0.75 * low + 0.25 * high)


def test_zero_terminal_table_reaches_infinite_noise_at_its_last_step():
    vp = zero_terminal()
    last = torch.tensor([998.0, 999.0])
    assert vp.alpha(last)[1] == 0
    assert vp.sigma(last)[1] == 1
    assert vp.ratio(last)[1] == math.inf
    assert vp.time(vp.ratio(last)).tolist() == [998.0, 999.0]
    t = torch.arange(1000, dtype=torch.float64)
    close(vp.time(vp.ratio(t)), t, rtol=0, atol=1e-9)


def test_only_the_last_step_of_a_zero_terminal_table_is_pure_noise():
    t = torch.tensor([998.0, 998.001, 998.5, 998.999], dtype=torch.float64)
    assert torch.isfinite(zero_terminal().ratio(t)).all()
    assert (zero_terminal().alpha(t) > 0).all()


@pytest.mark.parametrize("pure_noise", [(RectifiedFlow(), 1.0), (zero_terminal(), 999.0)], ids=["flow", "vp"])
def test_every_kind_but_eps_determines_x0_at_pure_noise(pure_noise, kind, generator):
    schedule, t = pure_noise[0], torch.full((3,), pure_noise[1], dtype=torch.float64)
    x0, noise = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    x_t = schedule.diffuse(x0, noise, t)
    output = schedule.from_x0(x0, x_t, t, kind)
    if kind == "eps":
        close(output, noise)
        with pytest.raises(ValueError, match=r"alpha\(t\) = 0; got t in"):
            schedule.to_x0(output, x_t, t, kind)
    else:
        close(schedule.to_x0(output, x_t, t, kind), x0)


def test_clean_images_hold_no_noise_to_read(kind):
    """At sigma = 0 the three kinds that contain noise are undefined, but each network output means x0 = x_t."""
    flow, x, t = RectifiedFlow(), torch.ones(2, 3, dtype=torch.float64), torch.zeros(2)
    if kind == "x0":
        assert flow.from_x0(x, x, t, kind) is x
    else:
        with pytest.raises(ValueError, match=rf"x0 to {kind} is undefined where sigma\(t\) = 0"):
            flow.from_x0(x, x, t, kind)
        close(flow.to_x0(torch.full_like(x, 7.0), x, t, kind), x)


def test_diffuse_mixes_each_sample_at_its_own_time(schedule, ratios, generator):
    t = schedule.time(ratios)
    x0, noise = torch.randn(2, len(t), 3, 4, 4, generator=generator, dtype=torch.float64)
    x_t = schedule.diffuse(x0, noise, t)
    for i in range(len(t)):
        close(x_t[i], schedule.alpha(t[i]) * x0[i] + schedule.sigma(t[i]) * noise[i])


def test_kinds_are_their_definitions(schedule, ratios, generator):
    t = schedule.time(ratios)
    x0, noise = torch.randn(2, len(t), 3, generator=generator, dtype=torch.float64)
    x_t = schedule.diffuse(x0, noise, t)
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
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
    assert VariancePreserving.linear().to_x0(x, x, t, kind).dtype == torch.float32
    assert VariancePreserving.linear().to_x0(x, x.double(), t, kind).dtype == torch.float32
    assert VariancePreserving.linear().to_x0(x.double(), x, t, kind).dtype == torch.float64


def test_customary_spacing_reaches_both_ends_and_grows(any_schedule):
    t = any_schedule.at(torch.linspace(0, 1, 7, dtype=torch.float64))
    close(t[[0, -1]], torch.tensor([any_schedule.t_min, any_schedule.t_max], dtype=torch.float64))
    assert (t.diff() > 0).all()


def test_customary_spacing_is_each_familys_own():
    fraction = torch.tensor([0.0, 0.2501, 0.5, 1.0], dtype=torch.float64)
    rho = (0.002 ** (1 / 7) + fraction * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    close(Karras().at(fraction), rho)
    close(RectifiedFlow().at(fraction), fraction)
    close(RectifiedFlow(0.2, 0.6).at(fraction), 0.2 + 0.4 * fraction)
    vp = VariancePreserving.scaled_linear()
    assert vp.at(fraction).tolist() == [0, 250, 500, 999]
    close(VariancePreserving(vp.alphas_cumprod, integer=False).at(fraction), fraction * 999)


def test_snap_rounds_only_integer_teachers():
    t = torch.tensor([0.4, 3.7])
    vp = VariancePreserving.scaled_linear()
    assert vp.snap(t).tolist() == [0, 4]
    for continuous in (Karras(), RectifiedFlow(), VariancePreserving(vp.alphas_cumprod, integer=False)):
        assert torch.equal(continuous.snap(t), t)


def test_samplers_start_from_unit_noise_except_for_karras(any_schedule):
    t = torch.tensor([any_schedule.t_max, any_schedule.t_max / 2], dtype=torch.float64)
    close(any_schedule.initial_std(t), t if isinstance(any_schedule, Karras) else torch.ones_like(t))


@pytest.mark.parametrize(
    ("name", "betas", "ours"),
    [
        ("linear", (1e-4, 0.02), VariancePreserving.linear()),
        ("scaled_linear", (0.00085, 0.012), VariancePreserving.scaled_linear()),
        ("squaredcos_cap_v2", (1e-4, 0.02), VariancePreserving.cosine()),
    ],
)
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


@pytest.mark.parametrize("call", ["to_x0", "from_x0"])
def test_unknown_kind_raises_naming_the_kinds(schedule, call):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="unknown prediction kind 'epsilon'; expected one of x0, eps, v, flow"):
        getattr(schedule, call)(x, x, torch.full((2,), 0.5), "epsilon")


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.full((3,), 0.5), torch.full((2, 1), 0.5)])
def test_time_of_another_shape_raises(schedule, t, kind):
    x = torch.zeros(2, 3)
    message = r"t must have shape \(2,\) to match x_t \(2, 3\); got "
    for call in (
        lambda: schedule.diffuse(x, x, t),
        lambda: schedule.to_x0(x, x, t, kind),
        lambda: schedule.from_x0(x, x, t, kind),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Karras(t_min=0.0), "0 < t_min < t_max < inf and 0 < rho < inf; got .*t_min=0.0"),
        (lambda: Karras(t_min=2.0, t_max=1.0), "got .*t_min=2.0, t_max=1.0"),
        (lambda: Karras(t_max=float("inf")), "got .*t_max=inf"),
        (lambda: Karras(rho=0.0), "got .*rho=0.0"),
        (lambda: RectifiedFlow(t_max=1000.0), "0 <= t_min < t_max <= 1; got .*1000"),
        (lambda: VariancePreserving(torch.tensor([0.1, 0.5])), "strictly decreasing"),
        (lambda: VariancePreserving(torch.tensor([[0.5, 0.1]])), r"got \(1, 2\)"),
        (lambda: VariancePreserving(torch.tensor([0.5])), "at least 2"),
        (lambda: VariancePreserving(torch.tensor([1.0, 0.5])), r"must lie in \[0, 1\); got 1 down to 0.5"),
        (lambda: VariancePreserving(torch.tensor([0.5, -0.1])), "got 0.5 down to -0.1"),
    ],
)
def test_impossible_schedules_raise(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_schedules_are_named_briefly_in_messages(any_schedule):
    """Error messages quote the schedule; a thousand numbers would bury what they say."""
    assert type(any_schedule).__name__ in repr(any_schedule)
    assert len(repr(any_schedule)) < 200
