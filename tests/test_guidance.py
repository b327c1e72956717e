"""Guidance in any units, in one call; rescaling (arXiv 2305.08891) and perpendicular negatives (2304.04968)."""

import pytest
import torch
from refusals import refused

from scorefield.denoiser import NetworkDenoiser
from scorefield.exact import GaussianMixture
from scorefield.guidance import guided, perpendicular
from scorefield.schedule import RectifiedFlow

NULL = {"class_labels": torch.tensor([2])}
close = torch.testing.assert_close


@pytest.fixture
def batch(schedule, ratios, generator):
    t = schedule.time(ratios)
    x_t = torch.randn(len(t), 2, generator=generator, dtype=torch.float64)
    return x_t, t, {"class_labels": torch.arange(len(t)) % 2}


def null_of(x_t):
    return {"class_labels": torch.full((len(x_t),), 2)}


def test_scale_one_is_the_denoiser_itself_and_any_other_one_call_on_both_halves(
    mixture, schedule, batch, exact_network
):
    denoiser = NetworkDenoiser(exact_network(mixture, "eps"), schedule)
    assert guided(denoiser, 1, NULL) is denoiser
    teacher = guided(denoiser, 7.5, NULL)
    assert teacher.schedule is schedule
    teacher(*batch)
    (x, t, cond), = denoiser.network.calls  # fmt: skip
    assert len(x) == len(t) == len(cond["class_labels"]) == 2 * len(batch[0])


@pytest.mark.parametrize("scale", [-1.0, 0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_negative_to_positive_in_x0_and_in_any_output(
    mixture, schedule, batch, kind, scale
):
    x_t, t, cond = batch

    def output(x0):
        return schedule.from_x0(x0, x_t, t, kind)

    negative, positive = mixture(x_t, t, null_of(x_t)), mixture(x_t, t, cond)
    found = guided(mixture, scale, NULL)(x_t, t, cond)
    close(found, negative + scale * (positive - negative))
    wanted = output(negative) + scale * (output(positive) - output(negative))
    close(output(found), wanted, rtol=1e-9, atol=1e-9)


def test_each_sample_has_its_own_negative_also_in_a_batch_that_was_enlarged(mixture, batch):
    x_t, t, cond = batch
    negative = {"class_labels": 1 - cond["class_labels"]}
    teacher = guided(mixture, 3, negative)
    close(teacher(x_t, t, cond), 3 * mixture(x_t, t, cond) - 2 * mixture(x_t, t, negative))
    twice = teacher(torch.cat([x_t, x_t + 1]), t.repeat(2), {"class_labels": cond["class_labels"].repeat(2)})
    close(twice, torch.cat([teacher(x_t, t, cond), teacher(x_t + 1, t, cond)]))


@pytest.mark.parametrize(("negative", "message"), [
    ({"text": torch.zeros(1, 4)}, r"keys of cond \['class_labels'\]; got \['text'\]"),
    ({}, r"keys of cond \['class_labels'\]; got \[\]"),
    ({"class_labels": torch.full((4,), 2)}, r"cond\['class_labels'\] must have batch 1 or 9; got \(4,\)"),
])  # fmt: skip
def test_negatives_that_do_not_fit_are_refused(mixture, batch, negative, message):
    with refused(message):
        guided(mixture, 3, negative)(*batch)


class Images:
    """Answers that do not depend on x_t, so that their spreads are known: label k is spread k + 1 round k."""

    schedule = RectifiedFlow()

    def __call__(self, x_t, t, cond):
        label = cond["class_labels"].to(x_t).reshape(-1, *[1] * (x_t.ndim - 1))
        pattern = torch.linspace(-1, 1, x_t[0].numel(), dtype=x_t.dtype).view(x_t.shape[1:])
        return label + (label + 1) * pattern


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling_brings_the_spread_back_to_that_of_the_positive_image(rescale):
    pictures = torch.zeros(2, 3, 4, 4).double(), torch.full((2,), 0.5), {"class_labels": torch.tensor([1, 2])}
    null = {"class_labels": torch.tensor([0])}
    plain, rescaled = (guided(Images(), 5, null, **how)(*pictures) for how in ({}, {"rescale": rescale}))
    wanted, inflated, found = (x.flatten(1).std(1) for x in (Images()(*pictures), plain, rescaled))
    assert (inflated > 2 * wanted).all()
    close(found, rescale * wanted + (1 - rescale) * inflated)
    close(rescaled, plain * (found / inflated).reshape(-1, 1, 1, 1))


def test_rescaling_leaves_a_constant_image_alone_and_lies_between_0_and_1(mixture, batch):
    x_t, t, cond = batch
    one = GaussianMixture(torch.zeros(2, 1), torch.ones(2), torch.ones(2), mixture.schedule, torch.arange(2))
    asked = one, 3, {"class_labels": torch.tensor([1])}
    close(guided(*asked, rescale=1.0)(x_t[:, :1], t, cond), guided(*asked)(x_t[:, :1], t, cond))
    for rescale in (-0.1, 1.5):
        with refused(rf"rescale must lie in \[0, 1\]; got {rescale}"):
            guided(mixture, 3, NULL, rescale=rescale)


class Plane:
    """Answers with the point of the plane that the condition names."""

    schedule = RectifiedFlow()

    def __call__(self, x_t, t, cond):
        return cond["point"].to(x_t)


def points(*xy):
    return {"point": torch.tensor(xy, dtype=torch.float64)}


@pytest.mark.parametrize(("scale", "positive", "negatives", "weights", "expected"), [
    # Null (1, 1), wanted direction (2, 0), negative direction (3, 4): its perpendicular part is (0, 4).
    (10.0, (3, 1), [(4, 5)], [0.5], (1 + 10 * 2.0, 1 - 10 * 0.5 * 4.0)),
    (7.5, (3, 1), [(5, 1), (-2, 1)], [3.0, 1.0], (16.0, 1.0)),  # it says the same, and changes nothing
    (2.0, (1, 1), [(2, 3)], [1.0], (-1.0, -3.0)),  # the prompt says nothing: it is taken away whole
])  # fmt: skip
def test_only_the_perpendicular_part_of_a_negative_is_taken_away(scale, positive, negatives, weights, expected):
    guide = perpendicular(Plane(), scale, points((1, 1)), [points(one) for one in negatives], weights)
    found = guide(torch.zeros(1, 2, dtype=torch.float64), torch.full((1,), 0.5), points(positive))
    close(found, torch.tensor([expected]).double())


def test_perpendicular_guidance_without_negatives_is_guidance(mixture, batch):
    for negatives, weights in (([], []), ([{"class_labels": torch.tensor([1])}], [0.0])):
        found = perpendicular(mixture, 7.5, NULL, negatives, weights)(*batch)
        close(found, guided(mixture, 7.5, NULL)(*batch))


def test_perpendicular_guidance_is_the_same_in_x0_and_in_the_networks_output(mixture, schedule, batch, kind):
    """Differences of outputs are differences of x0 times a number per sample, which no projection notices."""
    x_t, t, cond = batch
    other = {"class_labels": 1 - cond["class_labels"]}
    null, pos, neg = (schedule.from_x0(mixture(x_t, t, labels), x_t, t, kind)
                      for labels in (null_of(x_t), cond, other))  # fmt: skip
    d, e = pos - null, neg - null
    part = e - (e * d).sum(1, keepdim=True) / (d * d).sum(1, keepdim=True) * d
    x0 = perpendicular(mixture, 7.5, NULL, [other], [0.7])(x_t, t, cond)
    differ = d.norm(dim=1) > 1e-3  # where the classes agree to the last digits, their difference has no direction
    assert differ.sum() >= 6
    found, wanted = schedule.from_x0(x0, x_t, t, kind), null + 7.5 * (d - 0.7 * part)
    close(found[differ], wanted[differ], rtol=1e-8, atol=1e-8)


def test_weights_may_depend_on_the_view_and_repeat_with_the_batch(mixture, batch):
    x_t, t, cond = batch
    negatives = [{"class_labels": 1 - cond["class_labels"]}, {"class_labels": torch.tensor([1])}]
    table = torch.rand(len(x_t), 2, generator=torch.Generator().manual_seed(0))
    whole = perpendicular(mixture, 3.0, NULL, negatives, table)
    expected = []
    for i in range(len(x_t)):
        row = slice(i, i + 1)
        own = [{"class_labels": negatives[0]["class_labels"][row]}, negatives[1]]
        guide = perpendicular(mixture, 3.0, NULL, own, table[i])
        expected.append(guide(x_t[row], t[row], {"class_labels": cond["class_labels"][row]}))
    close(whole(*batch), torch.cat(expected))
    twice = whole(x_t.repeat(2, 1), t.repeat(2), {"class_labels": cond["class_labels"].repeat(2)})
    close(twice, torch.cat(expected).repeat(2, 1))


def test_perpendicular_guidance_is_one_call_with_a_weight_per_negative(mixture, schedule, batch, exact_network):
    denoiser = NetworkDenoiser(exact_network(mixture, "eps"), schedule)
    negatives = [{"class_labels": torch.tensor([k])} for k in (0, 1)]
    guide = perpendicular(denoiser, 7.5, NULL, negatives, [1.0, 2.0])
    guide(*batch)
    assert [len(x) for x, _, _ in denoiser.network.calls] == [4 * len(batch[0])]
    assert guide.schedule is schedule
    for weights in ([1.0], torch.ones(3, 1), torch.ones(1, 2, 2), 1.0):
        with refused(r"weights must be \(2,\) or \(b, 2\), one per negative; got"):
            perpendicular(mixture, 3.0, NULL, negatives, weights)
