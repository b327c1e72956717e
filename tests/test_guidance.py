import pytest
import torch

from score.denoiser import NetworkDenoiser
from score.guidance import guided

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
