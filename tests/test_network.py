import pytest
import torch

from scorefield.models.networks import ResidualMLP

SHAPES = [(2,), (1, 8, 8), (3, 2, 4)]


def randomise(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return network


def make(shape=(2,), **sizes):
    return ResidualMLP(shape, **{"width": 16, "depth": 3, "embedding": 8, **sizes})


@pytest.fixture
def inputs():
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.linspace(0.1, 0.9, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prediction_has_the_shape_of_its_input(shape):
    network = randomise(make(shape))
    prediction = network(torch.randn(5, *shape), torch.rand(5))
    assert prediction.shape == (5, *shape)
    assert prediction.abs().max() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_network_outputs_zeros_and_learns(shape):
    network = make(shape, num_classes=2, num_steps=2)
    cond = {"class_labels": torch.tensor([0, 1, 2]), "step": torch.tensor([0, 1, 0])}
    prediction = network(torch.randn(3, *shape), torch.rand(3), **cond)
    assert torch.equal(prediction, torch.zeros(3, *shape))
    (prediction - 1).square().sum().backward()
    assert network.leave[-1].weight.grad.abs().max() > 0


def test_each_sample_is_predicted_alone(inputs):
    x_t, t = inputs
    network = randomise(make(num_classes=3)).double()
    labels = torch.tensor([0, 1, 2, 3, 0])
    whole = network(x_t.double(), t.double(), class_labels=labels)
    alone = [network(x_t[i : i + 1].double(), t[i : i + 1].double(), labels[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(whole, torch.cat(alone))


def test_time_class_and_input_all_matter(inputs):
    x_t, t = inputs
    network, labels = randomise(make(num_classes=2)), torch.zeros(5, dtype=torch.long)
    first = network(x_t, t, labels)
    for other in (network(x_t, t + 0.05, labels), network(x_t, t, labels + 2), network(x_t + 0.1, t, labels)):
        assert (first - other).abs().amax(1).min() > 0


def test_the_step_embedding_starts_at_zero_and_is_optional(inputs):
    network, plain = make(num_steps=3), make()
    randomise(plain)
    missing = network.load_state_dict(plain.state_dict(), strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["step.weight"], [])
    expected = plain(*inputs)
    for step in (None, torch.tensor([0, 1, 2, 0, 1])):
        assert torch.equal(network(*inputs, step=step), expected)
    network.step.weight.data[1] = 1.0
    moved = (network(*inputs, step=torch.tensor([0, 1, 2, 0, 1])) != expected).any(1)
    assert moved.tolist() == [False, True, False, False, True]


def test_dropout_acts_in_training_only(inputs):
    network = randomise(make(dropout=0.5))
    assert not torch.equal(network(*inputs), network(*inputs))
    network.eval()
    assert torch.equal(network(*inputs), network(*inputs))


@pytest.mark.parametrize(("depth", "name"), [(1, "blocks.0"), (2, "blocks.0"), (3, "blocks.1"), (6, "blocks.2")])
def test_the_bottleneck_is_the_middle_block(depth, name):
    network = make(depth=depth)
    assert network.bottleneck == name
    assert network.get_submodule(name) is network.blocks[(depth - 1) // 2]


@pytest.mark.parametrize("sizes", [{"depth": 0}, {"width": 0}, {"embedding": 7}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="need depth, width >= 1 and an even embedding"):
        make(**sizes)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"samples of shape \(2,\); got \(3,\)"):
        make()(torch.zeros(4, 3), torch.rand(4))


def test_missing_labels_are_refused():
    with pytest.raises(ValueError, match=r"class_labels are missing.*2 is null"):
        make(num_classes=2)(torch.zeros(4, 2), torch.rand(4))


@pytest.mark.parametrize("label", [3, -1])
def test_labels_out_of_range_are_refused(label):
    """As forward's docstring promises."""
    with pytest.raises(ValueError, match="class_labels"):
        make(num_classes=2)(torch.zeros(2, 2), torch.rand(2), torch.tensor([0, label]))


@pytest.mark.parametrize("step", [2, -1])
def test_steps_out_of_range_are_refused(step):
    with pytest.raises(ValueError, match="step"):
        make(num_steps=2)(torch.zeros(2, 2), torch.rand(2), step=torch.tensor([0, step]))
