import pytest
import torch

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


def test_scale_one_is_the_denoiser_itself_and_one_call(mixture, schedule, batch, exact_network):
    denoiser = NetworkDenoiser(exact_network(mixture, "eps"), schedule)
    teacher = guided(denoiser, 1, NULL)
    assert teacher is denoiser
    teacher(*batch)
    assert [len(x) for x, _, _ in denoiser.network.calls] == [len(batch[0])]


def test_any_other_scale_is_one_call_on_both_halves(mixture, schedule, batch, exact_network):
    denoiser = NetworkDenoiser(exact_network(mixture, "eps"), schedule)
    guided(denoiser, 7.5, NULL)(*batch)
    (x, t, cond), = denoiser.network.calls  # fmt: skip
    assert len(x) == len(t) == len(cond["class_labels"]) == 2 * len(batch[0])


def test_scale_zero_is_the_negative(mixture, batch):
    x_t, t, cond = batch
    close(guided(mixture, 0, NULL)(x_t, t, cond), mixture(x_t, t, null_of(x_t)))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_negative_to_positive(mixture, batch, scale):
    x_t, t, cond = batch
    negative, positive = mixture(x_t, t, null_of(x_t)), mixture(x_t, t, cond)
    close(guided(mixture, scale, NULL)(x_t, t, cond), negative + scale * (positive - negative))


def test_guidance_in_x0_is_guidance_in_the_networks_output(mixture, schedule, batch, kind):
    x_t, t, cond = batch

    def output(x0):
        return schedule.from_x0(x0, x_t, t, kind)

    negative, positive = output(mixture(x_t, t, null_of(x_t))), output(mixture(x_t, t, cond))
    expected = negative + 7.5 * (positive - negative)
    close(output(guided(mixture, 7.5, NULL)(x_t, t, cond)), expected, rtol=1e-9, atol=1e-9)


def test_each_sample_has_its_own_negative(mixture, batch):
    x_t, t, cond = batch
    negative = {"class_labels": 1 - cond["class_labels"]}
    expected = 3 * mixture(x_t, t, cond) - 2 * mixture(x_t, t, negative)
    close(guided(mixture, 3, negative)(x_t, t, cond), expected)


def test_guidance_keeps_the_schedule(mixture, schedule):
    assert guided(mixture, 3, NULL).schedule is schedule


def test_negative_with_other_keys_raises(mixture, batch):
    with pytest.raises(ValueError, match=r"keys of cond \['class_labels'\]; got \['text'\]"):
        guided(mixture, 3, {"text": torch.zeros(1, 4)})(*batch)
    with pytest.raises(ValueError, match=r"keys of cond \['class_labels'\]; got \[\]"):
        guided(mixture, 3, {})(*batch)


def test_negative_of_another_batch_raises(mixture, batch):
    with pytest.raises(ValueError, match=r"cond\['class_labels'\] must have batch 1 or 9; got \(4,\)"):
        guided(mixture, 3, {"class_labels": torch.full((4,), 2)})(*batch)


def test_per_sample_negatives_repeat_with_a_batch_that_was_enlarged(mixture, batch):
    x_t, t, cond = batch
    negative = {"class_labels": 1 - cond["class_labels"]}
    teacher = guided(mixture, 3, negative)
    twice = teacher(torch.cat([x_t, x_t + 1]), t.repeat(2), {"class_labels": cond["class_labels"].repeat(2)})
    close(twice, torch.cat([teacher(x_t, t, cond), teacher(x_t + 1, t, cond)]))


# Rescaling (arXiv 2305.08891, Eq. 15 and 16).


class Images:
    """Answers that do not depend on x_t, so that their spreads are known: label k is spread k + 1 round k."""

    schedule = RectifiedFlow()

    def __call__(self, x_t, t, cond):
        label = cond["class_labels"].to(x_t).reshape(-1, *[1] * (x_t.ndim - 1))
        pattern = torch.linspace(-1, 1, x_t[0].numel(), dtype=x_t.dtype).view(x_t.shape[1:])
        return label + (label + 1) * pattern


def spread_of(x):
    return x.flatten(1).std(1)


@pytest.fixture
def pictures():
    return (
        torch.zeros(2, 3, 4, 4, dtype=torch.float64),
        torch.full((2,), 0.5),
        {"class_labels": torch.tensor([1, 2])},
    )


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaling_brings_the_spread_back_to_that_of_the_positive_image(pictures, rescale):
    null = {"class_labels": torch.tensor([0])}
    plain = guided(Images(), 5, null)(*pictures)
    rescaled = guided(Images(), 5, null, rescale=rescale)(*pictures)
    wanted, inflated = spread_of(Images()(*pictures)), spread_of(plain)
    assert (inflated > 2 * wanted).all()
    close(spread_of(rescaled), rescale * wanted + (1 - rescale) * inflated)
    close(rescaled, plain * (spread_of(rescaled) / inflated).reshape(-1, 1, 1, 1))


def test_rescaling_leaves_a_constant_image_alone(mixture, batch):
    x_t, t, cond = batch
    one = GaussianMixture(torch.zeros(2, 1), torch.ones(2), torch.ones(2), mixture.schedule, torch.arange(2))
    guide = guided(one, 3, {"class_labels": torch.tensor([1])}, rescale=1.0)
    close(guide(x_t[:, :1], t, cond), guided(one, 3, {"class_labels": torch.tensor([1])})(x_t[:, :1], t, cond))


@pytest.mark.parametrize("rescale", [-0.1, 1.5])
def test_rescaling_beyond_its_range_raises(mixture, rescale):
    with pytest.raises(ValueError, match=rf"rescale must lie in \[0, 1\]; got {rescale}"):
        guided(mixture, 3, NULL, rescale=rescale)


# Perpendicular negatives (arXiv 2304.04968).


class Plane:
    """Answers with the point of the plane that the condition names."""

    schedule = RectifiedFlow()

    def __call__(self, x_t, t, cond):
        return cond["point"].to(x_t)


def points(*xy):
    return {"point": torch.tensor(xy, dtype=torch.float64)}


ORIGIN = torch.zeros(1, 2, dtype=torch.float64), torch.full((1,), 0.5)


def test_only_the_perpendicular_part_of_a_negative_is_taken_away():
    """Null (1, 1), wanted direction (2, 0), negative direction (3, 4): its perpendicular part is (0, 4)."""
    guide = perpendicular(Plane(), 10.0, points((1, 1)), [points((4, 5))], [0.5])
    close(guide(*ORIGIN, points((3, 1))), torch.tensor([[1 + 10 * 2.0, 1 - 10 * 0.5 * 4.0]]).double())


def test_a_negative_that_says_the_same_changes_nothing():
    guide = perpendicular(Plane(), 7.5, points((1, 1)), [points((5, 1)), points((-2, 1))], [3.0, 1.0])
    close(guide(*ORIGIN, points((3, 1))), torch.tensor([[16.0, 1.0]]).double())


def test_a_negative_is_taken_away_whole_where_the_prompt_says_nothing():
    guide = perpendicular(Plane(), 2.0, points((1, 1)), [points((2, 3))], [1.0])
    close(guide(*ORIGIN, points((1, 1))), torch.tensor([[-1.0, -3.0]]).double())


def test_perpendicular_guidance_without_negatives_is_guidance(mixture, batch):
    close(perpendicular(mixture, 7.5, NULL, [], [])(*batch), guided(mixture, 7.5, NULL)(*batch))
    off = perpendicular(mixture, 7.5, NULL, [{"class_labels": torch.tensor([1])}], [0.0])
    close(off(*batch), guided(mixture, 7.5, NULL)(*batch))


def test_perpendicular_guidance_is_the_same_in_x0_and_in_the_networks_output(mixture, schedule, batch, kind):
    """Differences of outputs are differences of x0 times a number per sample, which no projection notices."""
    x_t, t, cond = batch
    other = {"class_labels": 1 - cond["class_labels"]}

    def output(labels):
        return schedule.from_x0(mixture(x_t, t, labels), x_t, t, kind)

    null, pos, neg = output(null_of(x_t)), output(cond), output(other)
    d, e = pos - null, neg - null
    part = e - (e * d).sum(1, keepdim=True) / (d * d).sum(1, keepdim=True) * d
    x0 = perpendicular(mixture, 7.5, NULL, [other], [0.7])(x_t, t, cond)
    differ = d.norm(dim=1) > 1e-3  # where the classes agree to the last digits, their difference has no direction
    assert differ.sum() >= 6
    close(
        schedule.from_x0(x0, x_t, t, kind)[differ], (null + 7.5 * (d - 0.7 * part))[differ], rtol=1e-8, atol=1e-8
    )


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


def test_perpendicular_guidance_is_one_call(mixture, schedule, batch, exact_network):
    denoiser = NetworkDenoiser(exact_network(mixture, "eps"), schedule)
    negatives = [{"class_labels": torch.tensor([k])} for k in (0, 1)]
    guide = perpendicular(denoiser, 7.5, NULL, negatives, [1.0, 2.0])
    guide(*batch)
    assert [len(x) for x, _, _ in denoiser.network.calls] == [4 * len(batch[0])]
    assert guide.schedule is schedule


@pytest.mark.parametrize("weights", [[1.0], torch.ones(3, 1), torch.ones(1, 2, 2), 1.0])
def test_a_negative_without_a_weight_raises(mixture, weights):
    negatives = [{"class_labels": torch.tensor([k])} for k in (0, 1)]
    with pytest.raises(ValueError, match=r"weights must be \(2,\) or \(b, 2\), one per negative; got"):
        perpendicular(mixture, 3.0, NULL, negatives, weights)
