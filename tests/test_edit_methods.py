"""SDEdit by strength, delta denoising, posterior distillation and FlowEdit, against what can be computed by
hand."""

import pytest
import tiny_pipelines as tiny
import torch
from denoisers import Counting, normal, seeded
from refusals import refused

from edit.delta import DDS, PDS, ContrastiveDDS, attention_features, descend
from edit.flow_edit import as_flow, flow_edit
from edit.sdedit import last_times, sdedit
from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.grids import grid
from scorefield.guidance import guided
from scorefield.models.networks import DiffusersNetwork
from scorefield.sampling import sample
from scorefield.schedule import RectifiedFlow, VariancePreserving

close = torch.testing.assert_close
SD, FLOW = VariancePreserving.scaled_linear(), RectifiedFlow()
MEANS = torch.tensor([[-1.0, 0.2, 0.0], [0.5, -0.3, 1.0]], dtype=torch.float64)


def labels(number, batch=1):
    return {"class_labels": torch.full((batch,), number)}


def two(schedule, std=0.4):
    return GaussianMixture(MEANS, torch.full((2,), std), torch.ones(2), schedule, torch.arange(2))


def at(t):
    return lambda number, schedule, generator: torch.full((number,), t, dtype=torch.float64)


# SDEdit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "calls"), [(0.0, 0), (0.3, 3), (0.55, 6), (1.0, 10)])
def test_a_strength_is_a_share_of_the_steps_and_as_many_calls(strength, calls):
    times, image, counting = grid(SD, 10), normal(4, 3), Counting(two(SD))
    made = sdedit(counting, image, labels(1, 4), times=times, strength=strength, generator=seeded())
    assert len(counting.calls) == calls
    assert last_times(times, strength).tolist() == times.tolist()[10 - calls :]
    if not calls:
        assert torch.equal(made, image)
    else:
        x_t, t, _ = counting.calls[0]
        noise = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
        close(x_t, SD.diffuse(image, noise, t), rtol=0, atol=0)


def test_strengths_outside_the_steps_are_refused_and_a_mask_holds():
    for strength in (-0.1, 1.1):
        with refused(r"strength is a share of the steps in \[0, 1\]; got"):
            last_times(grid(SD, 10), strength)
    image, mask = normal(4, 3), torch.tensor([True, False, True]).expand(4, 3)
    made = sdedit(two(SD), image, labels(1, 4), times=grid(SD, 10), strength=0.5, generator=seeded(), mask=mask)
    assert torch.equal(made[:, 1], image[:, 1])


# Delta denoising -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [200.0, 700.0])
def test_pds_is_psi_times_the_images_plus_chi_times_the_noises(t):
    """Its two factors by Bayes' rule: std^2 = beta sigma_s^2 / sigma_t^2, and the mean's two weights."""
    teacher, x0, source = two(SD), normal(5, 3), normal(5, 3, seed=1)
    pds = PDS(teacher=teacher, source=source, source_cond=labels(0), gap=0.05, times=at(t))
    found = pds.gradient(x0, labels(1, 5), generator=seeded()).value
    now, then = torch.tensor([t]), SD.snap(torch.tensor([t - 0.05 * 999], dtype=torch.float64))
    a_t, a_s, v_t, v_s = SD.alpha(now), SD.alpha(then), SD.sigma(now) ** 2, SD.sigma(then) ** 2
    forward = v_t - (a_t / a_s) ** 2 * v_s
    std = (forward * v_s / v_t).sqrt()
    noise = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)
    each = torch.full((5,), t, dtype=torch.float64)
    answers = [teacher(SD.diffuse(x, noise, each), each, labels(k, 5)) for k, x in ((1, x0), (0, source))]
    keep, gain = a_t / a_s * v_s / v_t, a_s * forward / v_t
    wanted = ((a_s - keep * a_t) * (x0 - source) - gain * (answers[0] - answers[1])) / std
    close(found, wanted)
    same = PDS(teacher=teacher, source=source, source_cond=labels(0), times=at(t))
    assert same.gradient(source, labels(0, 5), generator=seeded()).value.abs().max() == 0


def test_pds_wants_a_time_before_its_own():
    teacher, source = two(SD), normal(2, 3)
    for gap in (0.0, 1.0):
        with refused(r"gap must lie in \(0, 1\); got"):
            PDS(teacher=teacher, source=source, source_cond=labels(0), gap=gap)
    with refused("PDS compares times 0.3 of the schedule apart; t = 200 has none before it"):
        PDS(teacher=teacher, source=source, source_cond=labels(0), gap=0.3, times=at(200.0)).gradient(
            source, labels(1, 2), generator=seeded()
        )


@pytest.mark.parametrize("kind", [DDS, PDS])
def test_an_edit_moves_by_what_the_prompts_differ_in_and_costs_one_call_a_step(kind):
    """Two Gaussians of one spread: the fixed point of both is the source, moved by the difference of the means."""
    source, teacher = MEANS[:1] + 0.3 * normal(6, 3), Counting(two(SD))
    method = kind(teacher=teacher, source=source, source_cond=labels(0))
    rate = 0.1 if kind is DDS else 0.02
    made = descend(method, source, labels(1, 6), num_steps=400, learning_rate=rate, generator=seeded())
    assert len(teacher.calls) == 400
    if kind is DDS:
        close(made, source + MEANS[1] - MEANS[0], rtol=0, atol=2e-2)
    else:  # which is drawn back to its source, too
        share = ((made - source) / (MEANS[1] - MEANS[0])).flatten()
        assert share.min() > 0.1
        assert share.max() < 1.0
    with refused("num_steps must be at least 0 and learning_rate above 0; got -1 and 0.1"):
        descend(method, source, labels(1, 6), num_steps=-1, learning_rate=0.1, generator=seeded())


@pytest.mark.parametrize("t", [200.0, 700.0])
def test_a_contrast_adds_the_gradient_of_its_softmax(t):
    """Features are the image's own numbers, in three places of two channels: all derivatives are known."""
    teacher, x0, source = (
        GaussianMixture(torch.zeros(1, 6).double(), torch.ones(1), torch.ones(1), SD),
        *(normal(4, 6, seed=seed) for seed in (0, 1)),
    )
    settings = {"teacher": teacher, "source": source, "source_cond": {}, "times": at(t)}
    method = ContrastiveDDS(
        **settings, features=lambda x, t, cond: [x.view(-1, 3, 2)], strength=2.0, temperature=0.5
    )
    found = method.gradient(x0, {}, generator=seeded())
    plain = DDS(**settings).gradient(x0, {}, generator=seeded()).value
    noise, each = torch.randn(4, 6, generator=seeded(), dtype=torch.float64), torch.full((4,), t).double()
    f, s = (SD.diffuse(x, noise, each).view(4, 3, 2) for x in (x0, source))
    length = f.norm(dim=2, keepdim=True)
    f, s = f / length, s / s.norm(dim=2, keepdim=True)
    shares = (f @ s.mT / 0.5).softmax(2)
    slope = (shares - torch.eye(3)) @ s / (3 * 0.5)
    slope = (slope - f * (f * slope).sum(2, keepdim=True)) / length
    close(found.value, plain + 2.0 * SD.alpha(each[:1]) * slope.view(4, 6))
    close(found.metrics["contrast"], -shares.diagonal(dim1=1, dim2=2).log().mean())
    none = ContrastiveDDS(**settings, features=method.features, strength=0.0)
    close(none.gradient(x0, {}, generator=seeded()).value, plain)
    few = ContrastiveDDS(**settings, features=method.features, num_places=1)
    close(few.gradient(x0, {}, generator=seeded()).value, plain)  # of one place there is nothing to tell it from
    with refused("temperature > 0"):
        ContrastiveDDS(**settings, features=method.features, temperature=0.0)


def test_features_of_a_unet_are_those_of_its_attention_and_draw_an_edit_to_its_source():
    torch.manual_seed(0)
    unet = tiny.text_unet().requires_grad_(False)
    denoiser = NetworkDenoiser(DiffusersNetwork(unet), SD)
    cond = {"encoder_hidden_states": normal(1, 6, 32, dtype=torch.float32)}
    source, x0 = (normal(1, 4, 8, 8, seed=seed, dtype=torch.float32) for seed in (1, 2))
    features = attention_features(denoiser)
    found = features(source, torch.full((1,), 500.0), cond)
    assert [tuple(one.shape) for one in found] == [(1, 64, 8)] * 2
    assert attention_features(denoiser, largest=63)(source, torch.full((1,), 500.0), cond) == []
    method = ContrastiveDDS(teacher=denoiser, source=source, source_cond=cond, features=features, times=at(200.0))
    first = method.gradient(x0, cond, generator=seeded())
    slope = (
        first.value
        - DDS(teacher=denoiser, source=source, source_cond=cond, times=at(200.0))
        .gradient(x0, cond, generator=seeded())
        .value
    )
    nearer = x0 - 0.3 * slope / slope.norm()
    assert method.gradient(nearer, cond, generator=seeded()).metrics["contrast"] < first.metrics["contrast"]
    assert not [module for module in unet.modules() if module._forward_hooks]


# FlowEdit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "num_draws"), [(1, 1), (7, 1), (7, 3)])
def test_between_gaussians_of_one_spread_flow_edit_is_a_shift_whatever_the_noise(num_steps, num_draws):
    """d(t) = (1 - t) (m' - m) solves its ODE, and is a line in t: any number of steps is exact."""
    teacher, image = two(FLOW), normal(5, 3)
    made = flow_edit(teacher, teacher, image, labels(0, 5), labels(1, 5), times=grid(FLOW, num_steps),
                     generator=seeded(), num_draws=num_draws)  # fmt: skip
    close(made, image + MEANS[1] - MEANS[0])
    same = flow_edit(teacher, teacher, image, labels(0, 5), labels(0, 5), times=grid(FLOW, num_steps),
                     generator=seeded())  # fmt: skip
    close(same, image, rtol=0, atol=1e-12)


def test_the_last_steps_may_sample_as_usual_and_a_guided_target_goes_further():
    teacher, image, times = two(FLOW), normal(5, 3), grid(FLOW, 8)
    settings = {"times": times, "generator": seeded(), "num_plain": 8}
    plain = flow_edit(teacher, teacher, image, labels(0, 5), labels(1, 5), **settings)
    noise = torch.randn(5, 3, generator=seeded(), dtype=torch.float64)
    close(plain, sample(teacher, noise, labels(1, 5), times=times))
    strong = guided(teacher, 3.0, labels(2))
    moved = [
        flow_edit(teacher, target, image, labels(0, 5), labels(1, 5), times=times, generator=seeded()) - image
        for target in (teacher, strong)
    ]
    assert (moved[1] @ (MEANS[1] - MEANS[0])).mean() > 1.2 * (moved[0] @ (MEANS[1] - MEANS[0])).mean()


def test_other_schedules_are_refused_or_wrapped():
    teacher, image = two(SD), normal(5, 3)
    with refused("FlowEdit needs a flow; got VariancePreserving"):
        flow_edit(teacher, teacher, image, labels(0, 5), labels(1, 5), times=grid(SD, 4), generator=seeded())
    flow = as_flow(teacher)
    assert as_flow(flow) is flow
    times = grid(flow.schedule, 40)
    made = flow_edit(flow, flow, image, labels(0, 5), labels(1, 5), times=times, generator=seeded())
    close(made, image + MEANS[1] - MEANS[0], rtol=0, atol=0.15)


def test_a_model_whose_last_time_is_pure_noise_is_a_flow_to_its_end():
    alphas = SD.alphas_cumprod.clone()
    alphas[-1] = 0.0
    flow = as_flow(two(VariancePreserving(alphas)))
    assert flow.schedule.t_max == 1
    image, noise, times = normal(2, 3), normal(2, 3, seed=1), grid(flow.schedule, 8)
    made = flow_edit(flow, flow, image, labels(0, 2), labels(1, 2), times=times, generator=seeded())
    close(made, image + MEANS[1] - MEANS[0], rtol=0, atol=0.15)
    each = torch.ones(2, dtype=torch.float64)
    close(flow(noise, each, labels(1, 2)), MEANS[1:].expand(2, 3))
    for changes in ({"num_draws": 0}, {"num_plain": 5}):
        with refused(r"num_draws must be at least 1 and num_plain in \[0, 4\]; got"):
            flow_edit(
                flow, flow, image, labels(0, 5), labels(1, 5), times=times[:4], generator=seeded(), **changes
            )
