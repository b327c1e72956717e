"""The critic that listens to the fake score, its heads and losses against their closed forms."""

import copy
import math

import pytest
import torch
from denoisers import random_mlp
from refusals import refused
from torch import nn

from distill.adversarial import (
    Critic,
    critic_accuracy,
    critic_loss,
    discriminator_head,
    generator_loss,
    logits_alone,
)
from scorefield.denoiser import KarrasPreconditioning, NetworkDenoiser
from scorefield.models.networks import ResidualMLP
from scorefield.schedule import Karras, RectifiedFlow

close = torch.testing.assert_close
LABELS = torch.arange(5) % 2


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return module


@pytest.fixture
def network():
    return random_mlp(depth=3)


@pytest.fixture
def critic(network):
    return Critic(network, network.bottleneck, randomise(discriminator_head(16), 1))


@pytest.fixture
def inputs(generator):
    return torch.randn(5, 2, generator=generator), torch.linspace(0.1, 0.9, 5)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *arguments: calls.append(1))
    return calls


def hooks_of(module):
    return [name for name, inner in module.named_modules() if inner._forward_hooks]


def test_the_prediction_is_the_networks_and_logits_come_from_the_same_pass(network, critic, inputs):
    """Logits teach head and network up to the bottleneck only, and have a gradient to the image."""
    expected, calls = network(*inputs, class_labels=LABELS), count_calls(network)
    x_t = inputs[0].requires_grad_()
    prediction, logits = critic(x_t, inputs[1], class_labels=LABELS)
    assert len(calls) == 1
    assert torch.equal(prediction, expected)
    kept = []
    network.get_submodule("blocks.1").register_forward_hook(lambda m, i, output: kept.append(output))
    network(*inputs, class_labels=LABELS)
    assert torch.equal(logits, critic.head(kept[0]))
    assert logits.shape == (5,)
    logits.sum().backward()
    assert critic.head[2].weight.grad.abs().max() > 0
    assert network.enter.weight.grad.abs().max() > 0
    assert network.blocks[2].first.weight.grad is None
    assert x_t.grad.abs().amax(1).min() > 0


def test_logits_alone_have_the_same_gradients_and_run_nothing_past_the_bottleneck(network, critic, inputs):
    denoiser = NetworkDenoiser(critic, Karras(), "x0")
    calls = [count_calls(block) for block in network.blocks]
    gradients = []
    for logits in (
        critic(*inputs, class_labels=LABELS)[1],
        logits_alone(denoiser, *inputs, {"class_labels": LABELS}),
    ):
        logits.sum().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in critic.parameters()])
        critic.zero_grad()
    assert [len(c) for c in calls] == [2, 2, 1]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_it_works_inside_and_round_karras_preconditioning(network, inputs):
    head = randomise(discriminator_head(16), 1)
    inside = KarrasPreconditioning(Critic(network, network.bottleneck, head))
    outside = Critic(KarrasPreconditioning(network), f"network.{network.bottleneck}", head)
    plain = NetworkDenoiser(KarrasPreconditioning(network), Karras(), "x0")
    cond = {"class_labels": LABELS}
    expected = plain(*inputs, cond)
    results = []
    for wrapped in (inside, outside):
        denoiser = NetworkDenoiser(wrapped, Karras(), "x0")
        prediction, (logits,) = denoiser.with_extras(*inputs, cond)
        assert torch.equal(prediction, expected)
        assert torch.equal(denoiser(*inputs, cond), expected)
        results.append(logits)
        assert torch.equal(logits_alone(denoiser, *inputs, cond), logits)
    assert torch.equal(*results)
    assert results[0].abs().max() > 0


def test_a_deep_copy_works_and_is_independent(critic, inputs):
    before = critic(*inputs, class_labels=LABELS)
    other = copy.deepcopy(critic)
    assert all(torch.equal(a, b) for a, b in zip(before, other(*inputs, class_labels=LABELS), strict=True))
    randomise(other, 7)
    changed = other(*inputs, class_labels=LABELS)
    assert not any(torch.equal(a, b) for a, b in zip(before, changed, strict=True))
    after = critic(*inputs, class_labels=LABELS)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_hook_stays_behind_even_after_an_error(critic, inputs):
    critic(*inputs, class_labels=LABELS)
    denoiser = NetworkDenoiser(critic, Karras(), "x0")
    logits_alone(denoiser, *inputs, {"class_labels": LABELS})
    assert hooks_of(critic) == []
    with refused("class_labels are missing"):
        logits_alone(denoiser, *inputs, {})
    assert hooks_of(critic) == []
    with refused("class_labels are missing"):
        critic(*inputs)
    assert hooks_of(critic) == []


class Several(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.middle, self.wrap = nn.Linear(2, 2), wrap

    def forward(self, x_t, t):
        return self.wrap(self.middle(x_t))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: [x]])
def test_a_network_that_returns_more_keeps_its_first_item(wrap):
    network = Several(wrap)
    prediction, logits = Critic(network, "middle", nn.Flatten(0))(torch.ones(1, 2), torch.ones(1))
    assert torch.equal(prediction, network.middle(torch.ones(1, 2)))
    assert torch.equal(logits, prediction.flatten())


def test_it_listens_to_a_diffusers_unet(generator):
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    critic = Critic(unet, "mid_block", discriminator_head(8, 4))
    x_t, t = torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([1.0, 2.0, 3.0])
    expected, calls = unet(x_t, t).sample, count_calls(unet)
    for module in (critic, copy.deepcopy(critic)):
        prediction, logits = module(x_t, t)
        assert torch.equal(prediction, expected)
        assert logits.shape == (3,)
    assert len(calls) == 2


def test_an_unknown_bottleneck_is_refused_naming_those_there_are(network):
    with refused(r"no submodule 'mid_block'; it has time, time\.0"):
        Critic(network, "mid_block", discriminator_head(16))


@pytest.mark.parametrize(("size", "num_strided"), [(1, 0), (2, 0), (4, 1), (7, None), (8, 2), (16, 3)])
def test_heads_stride_down_to_two_by_two_and_give_one_logit_per_sample(size, num_strided, generator):
    head = discriminator_head(6, size)
    logits = head(features := torch.randn(3, 6, size, size, generator=generator))
    assert logits.shape == (3,)
    close(torch.cat([head(part) for part in features.split(1)]), logits)
    assert logits.unique().numel() == 3
    strided = [m for m in head.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert num_strided is None or len(strided) == num_strided
    assert discriminator_head(6)(torch.randn(3, 6, generator=generator)).shape == (3,), "vectors have one, too"


def test_losses_are_their_closed_forms_push_the_right_way_and_stay_finite(generator):
    real, fake = torch.randn(2, 50, generator=generator, dtype=torch.float64, requires_grad=True)
    p_real, p_fake = torch.sigmoid(real), torch.sigmoid(fake)
    close(critic_loss(real, fake), -p_real.log().mean() - (1 - p_fake).log().mean())
    close(generator_loss(fake), -p_fake.log().mean())
    assert bool((torch.autograd.grad(generator_loss(fake), fake)[0] < 0).all())
    by_real, by_fake = torch.autograd.grad(critic_loss(real, fake), (real, fake))
    assert bool((by_real < 0).all())
    assert bool((by_fake > 0).all())
    far = torch.tensor([1e4])
    for loss, expected in (
        (critic_loss(-far, far), 2e4),
        (critic_loss(far, -far), 0.0),
        (generator_loss(-far), 1e4),
    ):
        close(loss, torch.tensor(expected))


def test_equal_distributions_cost_log_four_at_least_at_logit_zero(generator):
    zero = torch.zeros(30, dtype=torch.float64)
    assert critic_loss(zero, zero).item() == pytest.approx(math.log(4))
    for scale in (0.01, 0.1, 1.0):
        logits = scale * torch.randn(30, generator=generator, dtype=torch.float64)
        assert critic_loss(logits, logits) > math.log(4)


def test_the_best_critic_is_the_log_density_ratio():
    """For N(1, 1) against N(-1, 1) that is 2 x."""
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(4000).double() + 0.5) / 4000)
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = critic_loss(weights[0] + weights[1] * (quantiles + 1), weights[0] + weights[1] * (quantiles - 1))
        loss.backward()
        return loss

    optimizer.step(closure)
    close(weights.detach(), torch.tensor([0.0, 2.0], dtype=torch.float64), rtol=0, atol=0.02)


def test_accuracy_is_the_share_on_the_right_side():
    real, fake = torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([-1.0, 1.0, -2.0, 5.0], requires_grad=True)
    accuracy = critic_accuracy(real, fake)
    assert accuracy.item() == (3 / 4 + 2 / 4) / 2
    assert not accuracy.requires_grad
    assert critic_accuracy(torch.ones(3), -torch.ones(3)).item() == 1


def test_a_head_in_float32_is_asked_about_features_in_bf16():
    """A prepared network computes in bf16 whether or not there is autocast round the call."""
    network = ResidualMLP((2,), width=16, depth=2)
    critic = Critic(network, network.bottleneck, nn.Sequential(nn.Linear(16, 1), nn.Flatten(0)))
    forward = critic.forward

    def in_bf16(*args, **cond):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **cond)

    critic.forward = in_bf16
    denoiser = NetworkDenoiser(critic, RectifiedFlow(), "x0")
    logits = logits_alone(denoiser, torch.randn(4, 2), torch.full((4,), 0.5), {})
    assert logits.dtype == torch.float32
