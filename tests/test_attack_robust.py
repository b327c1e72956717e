"""Adversarial training against closed forms: losses, routes of gradients, averages, mixtures, folders."""

import json
import struct

import numpy as np
import pytest
import torch
from denoisers import normal, seeded
from refusals import refused
from torch import nn

from attack.networks import FUNCTION, WEIGHTS, Facts, build_classifier, load_classifier, save_classifier
from attack.pgd import PGD
from attack.robust import Mixture, divergence, in_mode, part_of, pgd_loss, trades_loss, worst
from attack.threat import Threat
from scorefield.data.images import ImageSet
from scorefield.randomness import Rng
from scorefield.training.loop import EMA

close = torch.testing.assert_close
EPSILON = 0.05
ATTACK = PGD(threat=Threat(EPSILON), step_size=0.02, num_steps=6)


def pictures(number=4, seed=0):
    """Away from the ends of [0, 1]."""
    return 0.3 + 0.4 * torch.rand(number, 1, 3, 3, generator=seeded(seed), dtype=torch.float64)


def linear(classes=2, seed=1):
    """A linear classifier in float64."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, classes)).double()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + number))
    return network


def test_on_a_linear_classifier_the_loss_is_that_of_the_worst_case():
    """Of two classes the worst image is x - e sign(w_y - w_other), whatever the random start."""
    network, images, labels = linear(), pictures(), torch.tensor([0, 1, 1, 0])
    weight = network[1].weight
    away = (weight[1 - labels] - weight[labels]).sign().view(-1, 1, 3, 3)
    found = worst(network, images, labels, attack=ATTACK, generator=seeded(3))
    close(found, images + EPSILON * away)
    logits = network(images + EPSILON * away).detach()
    wanted = (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]).mean()
    losses = pgd_loss(network, images, labels, attack=ATTACK, generator=seeded(5))
    close(losses["loss"].detach(), wanted)
    close(losses["accuracy_attacked"].double(), (logits.argmax(1) == labels).double().mean())
    margin = (network(images)[torch.arange(4), labels] - network(images)[torch.arange(4), 1 - labels]).detach()
    lost = EPSILON * (weight[0] - weight[1]).abs().sum().detach()
    close(wanted, torch.log1p(torch.exp(lost - margin)).mean(), msg="in closed form: e times the 1-norm is lost")
    plain = pgd_loss(network, images, labels, attack=None, generator=seeded())
    close(plain["loss"].detach(), torch.log1p(torch.exp(-margin)).mean())


def test_the_divergence_is_that_of_two_known_distributions():
    p = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64)
    wanted = (0.5 * np.log(2) - 0.25 * np.log(2) + (np.log(4 / 3) * 2 + np.log(2 / 3)) / 3) / 2
    close(divergence(p.log() + 3.0, q.log().expand(2, 3)), torch.tensor(wanted, dtype=torch.float64))
    close(divergence(p.log(), p.log()), torch.tensor(0.0, dtype=torch.float64))


class Fixed:
    """An attack that answers a given image, and remembers what it was told to lead away from."""

    def __init__(self, images):
        self.images = images

    def __call__(self, network, images, answers, generator):
        self.answers, self.training = answers, network.training
        return self.images


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades_is_the_natural_loss_plus_beta_times_the_divergence_with_gradients_through_both_sides(beta):
    network, images, labels, seen = linear(3), pictures(), torch.tensor([0, 2, 1, 0]), pictures(seed=9)
    attack = Fixed(seen)
    losses = trades_loss(network, images, labels, attack=attack, generator=seeded(), beta=beta)
    p, q = (network(x).softmax(1) for x in (images, seen))
    wanted = -p.gather(1, labels[:, None]).log().mean() + beta * (p * (p / q).log()).sum(1).mean()
    close(losses["loss"], wanted)
    close(losses["loss"].detach(), losses["natural"] + beta * losses["divergence"])
    gradients = [torch.autograd.grad(loss, network.parameters()) for loss in (losses["loss"], wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)
    assert not attack.answers.requires_grad
    close(attack.answers.double(), p.detach(), rtol=0, atol=1e-6)


def test_the_attack_of_trades_climbs_the_divergence():
    network, images = linear(3), pictures()
    held = network(images).detach().softmax(1)
    found = worst(network, images, held, attack=ATTACK, generator=seeded(2))
    start = worst(network, images, held, attack=PGD(threat=Threat(EPSILON), step_size=1e-9, num_steps=1),
                  generator=seeded(2))  # fmt: skip
    far, near = (divergence(network(images), network(x)) for x in (found, start))
    assert float(far.detach()) > 1.5 * float(near.detach())
    assert float((found - images).abs().max()) <= EPSILON + 1e-12
    leaf = images.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(len(images) * divergence(network(images).detach(), network(leaf)), leaf)
    other = pictures(seed=4)
    ours = ATTACK.gradient(network, other, held, None, seeded())
    leaf = other.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(len(other) * divergence(network(images).detach(), network(leaf)), leaf)
    close(ours, theirs)
    with refused("an attack on probabilities has one restart; got num_restarts=2"):
        PGD(threat=Threat(0.1), step_size=0.1, num_restarts=2)(network, images, held, generator=seeded())


@pytest.mark.parametrize("loss", [pgd_loss, trades_loss])
def test_the_attacks_gradients_reach_no_parameter(loss):
    network, images, labels = linear(3), pictures(), torch.tensor([0, 2, 1, 0])
    found = loss(network, images, labels, attack=ATTACK, generator=seeded())
    assert all(p.grad is None for p in network.parameters())
    for p in network.parameters():
        p.grad = torch.full_like(p, 7.0)
    again = loss(network, images, labels, attack=ATTACK, generator=seeded())
    assert all(bool((p.grad == 7).all()) for p in network.parameters())
    close(again["loss"], found["loss"])
    assert all(p.requires_grad for p in network.parameters())
    seen = worst(network, images, labels, attack=ATTACK, generator=seeded())
    assert not seen.requires_grad


def test_the_network_is_attacked_in_eval_mode_or_as_it_learns_and_keeps_its_modes():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(9, 3)).double().train()
    network[0].eval()  # statistics that its owner keeps
    modes, images, labels = [], pictures().float().double(), torch.tensor([0, 2, 1, 0])
    network[3].register_forward_pre_hook(lambda *given: modes.append([m.training for m in network.modules()]))
    for mode in ("eval", "train"):
        modes.clear()
        for loss in (pgd_loss, trades_loss):
            loss(network, images, labels, attack=ATTACK, generator=seeded(), mode=mode)
        learning = [True, False, True, True, True]
        inside = [False] * 5 if mode == "eval" else learning
        assert modes == [inside] * 6 + [learning] + [inside] * 7 + [learning]
        assert [module.training for module in network.modules()] == learning
    with pytest.raises(KeyError), in_mode(network, "eval"):
        raise KeyError
    assert network.training, "after an error, too"


def test_the_average_is_the_exponential_one_of_the_weights():
    network = linear()
    ema, wanted = EMA(network, 0.9), network[1].weight.detach().clone()
    for number in range(1, 5):
        with torch.no_grad():
            network[1].weight.add_(1.0)
        ema.update()
        decay = min(0.9, (1 + number) / (10 + number))
        wanted = decay * wanted + (1 - decay) * network[1].weight.detach()
    close(ema.network[1].weight, wanted)


def images_of(number, shade, classes=3):
    images = torch.full((number, 1, 2, 2), shade, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(number)
    return ImageSet(images, torch.arange(number) % classes, tuple(map(str, range(classes))), 2)


@pytest.mark.parametrize(("share", "counts"), [(0.5, (5, 5)), (0.25, (8, 2)), (0.7, (3, 7)), (1.0, (0, 10))])
def test_every_batch_has_exactly_its_share_of_generated_images(share, counts):
    mixture = Mixture(images_of(20, 100), images_of(30, 200), share)
    assert mixture.counts(10) == counts
    make, seen = mixture.batches(10), {100: [], 200: []}
    for number in range(12):
        batch = make(Rng(0, step=number, index=number))
        shades = (255 * batch.images[:, 0, 1, 1]).round().long()
        assert ((shades == 100).sum(), (shades == 200).sum()) == counts
        assert batch.images.min() >= 0
        assert batch.images.max() <= 1
        rows = (255 * batch.images[:, 0, 0, 0]).round().long()
        assert torch.equal(batch.labels, rows % 3), "each with its own label"
        for shade, of in seen.items():
            of += rows[shades == shade].tolist()
    for shade, number in ((100, 20), (200, 30)):
        for start in range(0, len(seen[shade]) - number + 1, number):
            assert sorted(seen[shade][start : start + number]) == list(range(number)), "whole epochs"
    again = mixture.batches(10)(Rng(0, step=11, index=11))
    assert torch.equal(again.images, batch.images), "a batch is a function of its number"


def test_without_generated_images_a_batch_is_real_and_sets_of_one_length_have_orders_of_their_own():
    alone = Mixture(images_of(20, 100), None, 0.5)
    assert alone.counts(10) == (10, 0)
    assert len(alone.batches(10)(Rng(0, 0)).images) == 10
    batch = Mixture(images_of(20, 100), images_of(20, 200), 0.5).batches(20)(Rng(0, 0))
    assert not torch.equal(batch.images[:10, 0, 0, 0], batch.images[10:, 0, 0, 0])


def test_a_part_of_a_set_holds_the_images_of_its_numbers():
    data = images_of(10, 100)
    part = part_of(data, torch.tensor([7, 2, 5]))
    assert part.images[:, 0, 0, 0].tolist() == [2, 5, 7]
    assert part.labels.tolist() == [2, 2, 1]
    half = ImageSet(data.images[:4], data.labels, data.class_names, 2, unread=list("456789"), pixel_hash="a")
    part = part_of(half, torch.tensor([7, 2, 5]))
    assert (part.images[:, 0, 0, 0].tolist(), part.unread, len(part)) == ([2], ["5", "7"], 3)
    assert part.identity() != part_of(half, torch.tensor([1, 2, 5, 6])).identity()


# The folder of a classifier.


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    facts = Facts(
        network="cnn", channels=1, resolution=8, num_classes=10, width=4, class_names=tuple("abcdefghij")
    )
    return save_classifier(build_classifier(facts), facts, tmp_path / "classifier")


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_a_folder_gives_back_its_classifier_bit_by_bit(tmp_path, kind):
    facts = Facts(network=kind, channels=3, resolution=8, num_classes=4, width=12, training={"epsilon": 8.0})
    network = build_classifier(facts)
    found = load_classifier(save_classifier(network, facts, tmp_path / "classifier"))
    images = torch.rand(5, 3, 8, 8)
    assert torch.equal(found(images), network.eval()(images))
    assert not found.training
    assert not any(p.requires_grad for p in found.parameters())
    close(found(images[:1]), found(images)[:1], msg="an image does not depend on its batch")
    with refused(r"sees images \(3, 8, 8\); got \(3, 9, 9\)"):
        found(torch.rand(1, 3, 9, 9))


@pytest.mark.parametrize(("change", "message"), [
    ({"network": "os:system"}, r"network must be one of cnn, mlp, function; got 'os:system'"),
    ({"network": ["a"]}, "network must be one of"),
    ({"width": 10**9}, r"width must be a whole number in \[1, 16384\]; got 1000000000"),
    ({"depth": True}, r"depth must be a whole number in \[1, 64\]; got True"),
    ({"depth": 9}, "a cnn of depth 9 halves images 8 times; 8 pixels are too few"),
    ({"num_classes": 1}, r"num_classes must be a whole number in \[2,"),
    ({"num_classes": 4, "class_names": []}, "the weights in .* do not fit the ConvNet"),
    ({"width": 8}, "the weights in .* do not fit the ConvNet"),
    ({"network": "mlp"}, "the weights in .* do not fit the MLP"),
    ({"class_names": ["a"]}, "class_names must be 10 names, or none"),
    ({"auto_map": {"AutoModel": "payload.Model"}}, "'auto_map' is no fact of a classifier"),
    ({"format": "scorefield-judge-1"}, "its format must be 'scorefield-classifier-1'"),
    ({"network": FUNCTION}, "a network that its owner's code builds, which no folder can name"),
])  # fmt: skip
def test_a_folder_that_was_changed_is_refused(saved, change, message):
    file = saved / "classifier.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with refused(message):
        load_classifier(saved)


def test_weights_that_are_damaged_or_not_finite_are_refused(saved, tmp_path):
    weights = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(weights[:-4] + struct.pack("<f", float("nan")))
    with refused("hold nan or inf"):
        load_classifier(saved)
    (saved / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with refused("cannot read the weights"):
        load_classifier(saved)
    with refused("holds no classifier of `scorefield robust`"):
        load_classifier(tmp_path)
