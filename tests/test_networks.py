"""The residual MLP and the UNet: what they predict, start at, listen to and refuse."""

import pytest
import torch
from denoisers import random_mlp
from refusals import refused

from scorefield.models.networks import ResidualMLP, UNet

SHAPES = [(2,), (1, 8, 8), (3, 2, 4)]


def make(shape=(2,), **sizes):
    return ResidualMLP(shape, **{"width": 16, "depth": 3, "embedding": 8, **sizes})


@pytest.fixture
def inputs():
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.linspace(0.1, 0.9, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prediction_has_the_shape_of_its_input_and_is_zero_at_first(shape):
    prediction = random_mlp(shape=shape, num_classes=0)(torch.randn(5, *shape), torch.rand(5))
    assert prediction.shape == (5, *shape)
    assert prediction.abs().max() > 0
    network = make(shape, num_classes=2, num_steps=2)
    cond = {"class_labels": torch.tensor([0, 1, 2]), "step": torch.tensor([0, 1, 0])}
    prediction = network(torch.randn(3, *shape), torch.rand(3), **cond)
    assert torch.equal(prediction, torch.zeros(3, *shape))
    (prediction - 1).square().sum().backward()
    assert network.leave[-1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_unet_starts_at_zero_and_learns_its_condition(num_classes, patch):
    torch.manual_seed(0)
    unet = UNet((1, 16, 16), num_classes, channels=(8, 16), patch=patch)
    labels = torch.tensor([0, num_classes]) if num_classes else None
    x_t, t = torch.randn(2, 1, 16, 16), torch.tensor([-0.5, 0.7])
    assert torch.equal(unet(x_t, t, labels), torch.zeros_like(x_t))
    unet(x_t, t, labels).sub(1).square().mean().backward()
    assert unet.unet.conv_out.weight.grad.abs().max() > 0
    torch.nn.init.normal_(unet.unet.conv_out.weight)
    assert not torch.allclose(unet(x_t, t, labels), unet(x_t, t.flip(0), labels))


def test_each_sample_is_predicted_alone_from_its_time_class_and_input(inputs):
    x_t, t = (x.double() for x in inputs)
    network, labels = random_mlp(num_classes=3, depth=3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    whole = network(x_t, t, class_labels=labels)
    alone = [network(x_t[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(whole, torch.cat(alone))
    for other in (network(x_t, t + 0.05, labels), network(x_t, t, 3 - labels), network(x_t + 0.1, t, labels)):
        assert (whole - other).abs().amax(1).min() > 0


def test_the_step_embedding_starts_at_zero_and_is_optional(inputs):
    network, plain = make(num_steps=3), random_mlp(num_classes=0, depth=3)
    missing = network.load_state_dict(plain.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["step.weight"], [])
    expected = plain(*inputs)
    for step in (None, torch.tensor([0, 1, 2, 0, 1])):
        assert torch.equal(network(*inputs, step=step), expected)
    network.step.weight.data[1] = 1.0
    moved = (network(*inputs, step=torch.tensor([0, 1, 2, 0, 1])) != expected).any(1)
    assert moved.tolist() == [False, True, False, False, True]


def test_dropout_acts_in_training_only(inputs):
    network = random_mlp(num_classes=0, dropout=0.5)
    assert not torch.equal(network(*inputs), network(*inputs))
    network.eval()
    assert torch.equal(network(*inputs), network(*inputs))


@pytest.mark.parametrize(("depth", "name"), [(1, "blocks.0"), (2, "blocks.0"), (3, "blocks.1"), (6, "blocks.2")])
def test_the_bottleneck_is_the_middle_block(depth, name):
    network = make(depth=depth)
    assert network.bottleneck == name
    assert network.get_submodule(name) is network.blocks[(depth - 1) // 2]


IMPOSSIBLE, TWO, HALF = "need depth, width >= 1 and an even embedding", torch.zeros(2, 2), torch.rand(2)


@pytest.mark.parametrize(("call", "message"), [
    *((lambda sizes=sizes: make(**sizes), IMPOSSIBLE) for sizes in ({"depth": 0}, {"width": 0}, {"embedding": 7})),
    (lambda: UNet((1, 10, 10), channels=(8, 16)), "divisible by 4; got 10 x 10"),
    (lambda: make()(torch.zeros(2, 3), HALF), r"samples of shape \(2,\); got \(3,\)"),
    (lambda: make(num_classes=2)(TWO, HALF), r"class_labels are missing.*2 is null"),
    *((lambda label=label: make(num_classes=2)(TWO, HALF, torch.tensor([0, label])), "class_labels")
      for label in (3, -1)),
    *((lambda step=step: make(num_steps=2)(TWO, HALF, step=torch.tensor([0, step])), "step") for step in (2, -1)),
])  # fmt: skip
def test_impossible_sizes_shapes_and_conditions_are_refused(call, message):
    with refused(message):
        call()
