"""Classifier guidance (arXiv 2105.05233): Bayes' rule in closed form, on every schedule, at every scale."""

import pytest
import torch
from denoisers import Counting
from refusals import refused

from scorefield.denoiser import Conditioned
from scorefield.guidance import class_log_probability, classifier_guided, guided
from scorefield.sampling import grid, initial_noise, sample
from scorefield.schedule import RectifiedFlow

NULL = {"class_labels": torch.tensor([2])}
close = torch.testing.assert_close


@pytest.fixture
def batch(schedule, ratios, generator):
    t = schedule.time(ratios)
    x_t = torch.randn(len(t), 2, generator=generator, dtype=torch.float64)
    return x_t, t, {"class_labels": torch.arange(len(t)) % 2}


def true_classifier(mixture):
    """log p(y | x_t) up to the constant log p(y), from the densities of the mixture."""

    def log_probability(x_t, t, cond):
        return mixture.log_density(x_t, t, cond) - mixture.log_density(x_t, t)

    return log_probability


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.0, 4.0])
def test_with_the_true_classifier_it_is_bayes_rule_and_guidance_without_one(mixture, batch, scale):
    unconditional = Conditioned(mixture, NULL)
    found = classifier_guided(unconditional, true_classifier(mixture), scale)(*batch)
    close(found, guided(mixture, scale, NULL)(*batch), rtol=0, atol=1e-10)
    if scale == 1:
        close(found, mixture(*batch), rtol=0, atol=1e-10)


def test_scale_zero_is_the_denoiser_itself_and_the_classifier_is_asked_once(mixture, batch):
    assert classifier_guided(mixture, true_classifier(mixture), 0) is mixture
    counting = Counting(mixture)
    teacher = classifier_guided(counting, true_classifier(mixture), 2.0)
    with torch.no_grad():
        assert not teacher(*batch).requires_grad
    assert teacher.schedule is mixture.schedule
    assert len(counting.calls) == 1


def test_sampling_under_it_can_be_differentiated(mixture, batch):
    x_t, t, cond = batch
    teacher = classifier_guided(Conditioned(mixture, NULL), true_classifier(mixture), 1.0)
    x = x_t.clone().requires_grad_()
    (found,) = torch.autograd.grad(teacher(x, t, cond).sum(), x)
    y = x_t.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(mixture(y, t, cond).sum(), y)
    close(found, wanted, rtol=0, atol=1e-9)


def test_logits_are_turned_into_the_log_probability_of_the_label():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([4, 0, 2])
    found = class_log_probability(lambda x_t, t: logits)(
        torch.zeros(3, 1), torch.zeros(3), {"class_labels": labels}
    )
    close(found, logits.softmax(1)[torch.arange(3), labels].log())
    one = class_log_probability(lambda x_t, t: logits)(
        torch.zeros(3, 1), torch.zeros(3), {"class_labels": labels[:1]}
    )
    close(one, logits.softmax(1)[:, 4].log())


def test_pure_noise_and_a_classifier_without_an_answer_for_each_sample_are_refused(make_mixture):
    mixture = make_mixture(RectifiedFlow())
    teacher = classifier_guided(mixture, true_classifier(mixture), 1.0)
    cond, x = {"class_labels": torch.tensor([0])}, torch.zeros(1, 2).double()
    with refused(r"undefined where alpha\(t\) = 0.*high=0.99"):
        teacher(x, torch.ones(1), cond)
    times = grid(mixture.schedule, 8, high=0.99)
    made = sample(teacher, initial_noise(mixture.schedule, x + 1, times[0]), cond, times=times)
    assert made.isfinite().all()
    with refused(r"log p\(y \| x_t\) of each sample, \(1,\); got \(1, 2\)"):
        classifier_guided(mixture, lambda x_t, t, cond: x_t, 1.0)(x, torch.full((1,), 0.5), cond)
