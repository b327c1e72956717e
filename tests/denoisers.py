"""Denoisers that the tests of several files need, and random numbers for them."""

import torch
from torch import nn

from distill.adversarial import Critic, discriminator_head
from scorefield.denoiser import KarrasPreconditioning, NetworkDenoiser
from scorefield.models.networks import ResidualMLP
from scorefield.schedule import Karras, RectifiedFlow, VariancePreserving

KINDS = {Karras: "x0", RectifiedFlow: "flow", VariancePreserving: "eps"}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Counting:
    """Keeps what a denoiser is called with."""

    def __init__(self, denoiser, schedule=None):
        self.denoiser, self.schedule, self.calls = denoiser, schedule or denoiser.schedule, []

    def __call__(self, x_t, t, cond):
        self.calls.append((x_t, t, cond))
        return self.denoiser(x_t, t, cond)


class Eps(nn.Module):
    """A smooth noise prediction that diffusers can call, too, on Stable Diffusion's schedule."""

    def forward(self, x_t, t):
        return torch.tanh(x_t.flip(1) + t[:, None, None, None] / 1000) - 0.3 * x_t


def random_mlp(seed=0, shape=(2,), num_classes=2, dtype=torch.float32, **sizes):
    """Weights so large that all inputs matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"width": 16, "depth": 2, "embedding": 8, **sizes}
        network = ResidualMLP(shape, num_classes=num_classes, **sizes)
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.3)
    return network.to(dtype)


def random_denoiser(schedule, seed=0, kind=None, critic=False, dtype=torch.float32, **sizes):
    """A random network as its family has it: EDM's is preconditioned, a critic listens to its middle."""
    network = random_mlp(seed, **sizes)
    if critic:
        with torch.random.fork_rng():
            torch.manual_seed(seed + 100)
            network = Critic(network, network.bottleneck, discriminator_head(16))
    if isinstance(schedule, Karras):
        network = KarrasPreconditioning(network)
    scale = 1e-3 if isinstance(schedule, VariancePreserving) else 1.0
    return NetworkDenoiser(network.to(dtype), schedule, kind or KINDS[type(schedule)], scale)


def mlp_of(denoiser):
    """The network inside whatever is round it."""
    return next(module for module in denoiser.network.modules() if isinstance(module, ResidualMLP))
