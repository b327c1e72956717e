"""Balls, steps and expectations against closed forms: linear classifiers, steps by hand, means of gradients."""

import pytest
import torch
from denoisers import normal, seeded
from refusals import refused
from torch.nn import functional

from attack.pgd import PGD, fgsm, margin
from attack.threat import Threat, check_images, size

close = torch.testing.assert_close
LABELS = torch.tensor([0, 1, 2, 0])


def pictures(number=4, seed=0):
    """Away from the ends of [0, 1], so that the box binds only where a test wants it to."""
    return 0.3 + 0.4 * torch.rand(number, 3, 4, 4, generator=seeded(seed), dtype=torch.float64)


def linear(classes=3, seed=1):
    weights = normal(classes, 48, seed=seed)
    return lambda images: images.flatten(1) @ weights.T


def curved(images):
    """A classifier without any symmetry."""
    x = images.flatten(1)
    return torch.tanh(3 * x @ normal(48, 12, seed=2) / 7) @ normal(12, 3, seed=3)


def test_projections_are_into_the_ball_and_then_the_box():
    center, far = pictures(), pictures() + normal(4, 3, 4, 4, seed=5)
    box = Threat(0.1).project(far, center)
    close(box, torch.maximum(torch.minimum(far, center + 0.1), center - 0.1).clamp(0, 1))
    ball = Threat(0.1, "l2").project(far, center)
    close(ball - center, 0.1 * (far - center) / (far - center).flatten(1).norm(dim=1)[:, None, None, None])
    near = center + 1e-3
    close(Threat(0.1, "l2").project(near, center), near)
    close(size(ball - center, "l2"), torch.full((4,), 0.1).double())
    corner = Threat(0.5).project(torch.full((1, 1, 1, 2), 3.0), torch.tensor([[[[0.9, 0.2]]]]))
    close(corner, torch.tensor([[[[1.0, 0.7]]]]))
    for norm in ("linf", "l2"):
        starts = Threat(0.2, norm).random(center.repeat(200, 1, 1, 1), seeded())
        lengths = size(starts - center.repeat(200, 1, 1, 1), norm)
        assert float(lengths.max()) <= 0.2 + 1e-12
        assert float(lengths.max()) > 0.19
    with refused("finite radius >= 0"):
        Threat(-1.0)
    for bad in (2 * center - 1, center * torch.nan):
        with refused(r"finite and in \[0, 1\]"):
            check_images(bad)


def test_on_a_linear_classifier_the_attack_reaches_the_optimum():
    """Two classes: the loss rises along one direction w, and the optimum of the ball is known."""
    w, images, labels = normal(48, seed=1), pictures(), torch.zeros(4, dtype=torch.long)
    direction = w.view(1, 3, 4, 4)

    def classifier(x):
        score = x.flatten(1) @ w
        return torch.stack([-score, score], 1)

    box = PGD(threat=Threat(0.05), step_size=0.01)(classifier, images, labels, generator=seeded())
    close(box, (images + 0.05 * direction.sign()).expand_as(images))
    ball = PGD(threat=Threat(0.2, "l2"), step_size=0.05, num_steps=20)
    found = ball(classifier, images, labels, generator=seeded())
    close(found, images + 0.2 * direction / w.norm(), rtol=0, atol=2e-3)
    back = PGD(threat=Threat(0.05), step_size=0.01, targeted=True)(classifier, images, labels, generator=seeded())
    close(back, (images - 0.05 * direction.sign()).expand_as(images))
    close(fgsm(classifier, images, labels, threat=Threat(0.05), generator=seeded()), box)


def test_every_step_is_the_papers():
    """x <- clip(x0 + clip(x + a sign(grad CE) - x0, -e, e), 0, 1), with images near the sides of the box."""
    images, radius, step = pictures() * 1.4, 0.1, 0.03
    images[0] = images[0].clamp(max=1)
    images = images.clamp(0, 1)
    x = images.clone()
    for _ in range(7):
        leaf = x.clone().requires_grad_()
        loss = functional.cross_entropy(curved(leaf), LABELS)
        (gradient,) = torch.autograd.grad(loss, leaf)
        delta = (x + step * gradient.sign() - images).clamp(-radius, radius)
        x = (images + delta).clamp(0, 1)
    attack = PGD(threat=Threat(radius), step_size=step, num_steps=7, random_start=False)
    close(attack(curved, images, LABELS, generator=seeded()), x, rtol=0, atol=1e-12)


def shaken(x, generator):
    """A random view: each number is multiplied by one of its own."""
    return x * (1 + 0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype))


def test_the_gradient_over_draws_is_the_mean_of_their_gradients_outside_the_softmax():
    attack, x, generator = PGD(threat=Threat(0.1), step_size=0.1, num_draws=3), pictures(), seeded(4)
    gradients, probabilities, leaf = [], [], x.clone().requires_grad_()
    for _ in range(3):
        logits = linear()(shaken(leaf, generator))
        probabilities.append(logits.softmax(1))
        gradients.append(torch.autograd.grad(functional.cross_entropy(logits, LABELS, reduction="sum"), leaf,
                                             retain_graph=True)[0])  # fmt: skip
    found = attack.gradient(linear(), x, LABELS, shaken, seeded(4))
    close(found, torch.stack(gradients).mean(0))
    inside = -torch.stack(probabilities).mean(0).gather(1, LABELS[:, None]).log().sum()
    assert not torch.allclose(found, torch.autograd.grad(inside, leaf)[0], rtol=0.05)


def test_of_several_restarts_the_one_that_is_furthest_wrong_is_kept():
    one = PGD(threat=Threat(0.1), step_size=0.05, num_steps=1)
    three = PGD(threat=Threat(0.1), step_size=0.05, num_steps=1, num_restarts=3)
    images, generator = pictures(), seeded(2)
    runs = [one(curved, images, LABELS, generator=generator) for _ in range(3)]
    margins = torch.stack([margin(curved(run), LABELS) for run in runs])
    wanted = torch.stack(runs)[margins.argmin(0), torch.arange(4)]
    assert len(margins.argmin(0).unique()) > 1, "not the same one for all"
    close(three(curved, images, LABELS, generator=seeded(2)), wanted)
    close(margin(torch.tensor([[1.0, 5.0, 3.0]]), torch.tensor([1])), torch.tensor([2.0]))


def test_outside_the_mask_not_a_bit_changes():
    images, mask = pictures(), torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 1:3, 2:] = True
    attack = PGD(threat=Threat(0.1), step_size=0.05, num_restarts=2)
    found = attack(curved, images, LABELS, generator=seeded(), mask=mask)
    outside = ~mask.expand_as(images)
    assert torch.equal(found[outside], images[outside])
    assert not torch.equal(found, images)


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-30])
def test_a_step_has_its_length_however_small_the_gradient_is(scale):
    gradient = scale * normal(3, 1, 2, 2, dtype=torch.float32)
    gradient[1] = 0
    for norm in ("linf", "l2"):
        lengths = size(Threat(0.1, norm).steepest(gradient), norm)
        close(lengths, torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_under_a_mask_has_its_whole_length_inside(norm):
    """What the classifier looks at most lies outside: in l2 it must not take its share of steps and starts."""
    images, mask = pictures(), torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 1:3, 2:] = True
    weights = normal(3, 3, 4, 4, seed=1) * torch.where(mask[0], 0.1, 10.0)

    def classifier(x):
        return torch.einsum("bchw,kchw->bk", x, weights)

    one = PGD(threat=Threat(0.2, norm), step_size=0.1, num_steps=1, random_start=False)
    found = one(classifier, images, LABELS, generator=seeded(), mask=mask)
    close(size(found - images, norm), torch.full((4,), 0.1).double())
    many = images.repeat(100, 1, 1, 1)
    starts = Threat(0.2, norm).random(many, seeded(), mask.repeat(100, 1, 1, 1))
    lengths = size(torch.where(mask.repeat(100, 1, 1, 1), starts - many, 0.0), norm)
    assert 0.19 < float(lengths.max()) <= 0.2 + 1e-12


def test_one_step_may_be_targeted_and_a_radius_of_zero_changes_nothing():
    images, wanted = pictures(), torch.tensor([1, 2, 0, 1])
    for targeted, labels in ((False, LABELS), (True, wanted)):
        one = PGD(threat=Threat(0.1), step_size=0.1, num_steps=1, random_start=False, targeted=targeted)
        made = fgsm(curved, images, labels, threat=Threat(0.1), generator=seeded(), targeted=targeted)
        assert torch.equal(made, one(curved, images, labels, generator=seeded()))
    assert torch.equal(fgsm(curved, images, LABELS, threat=Threat(0.0), generator=seeded()), images)


def test_an_image_with_a_generator_of_its_own_does_not_depend_on_its_batch():
    images, attack = pictures(), PGD(threat=Threat(0.1), step_size=0.05, num_draws=2)

    def view(x, generators):
        return torch.cat([shaken(row[None], generator) for row, generator in zip(x, generators, strict=True)])

    def run(rows):
        generators = [seeded(number) for number in rows]
        return attack(curved, images[rows], LABELS[rows], generator=generators, transform=view)

    close(run([0, 1, 2, 3]), torch.cat([run([0, 1]), run([2]), run([3])]))


@pytest.mark.parametrize(("options", "message"), [
    ({"step_size": 0.0}, "step_size of PGD must be above 0; got 0"),
    ({"num_draws": 0}, "num_draws of PGD must be above 0"),
    ({"num_restarts": 2, "random_start": False}, "restarts without a random start"),
])  # fmt: skip
def test_options_that_cannot_work_are_refused(options, message):
    with refused(message):
        PGD(**{"threat": Threat(0.1), "step_size": 0.1, **options})


def test_classifiers_that_are_none_are_refused():
    attack = PGD(threat=Threat(0.1), step_size=0.1)
    for bad in (lambda x: x, lambda x: x.flatten(1)[:, :1], lambda x: {"shape": x}):
        with refused(r"must return logits \(4, classes\)"):
            attack(bad, pictures(), LABELS, generator=seeded())
    with refused("not finite"):
        attack(lambda x: linear()(x) / 0, pictures(), LABELS, generator=seeded())
