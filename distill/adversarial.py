"""DMD2's adversarial term: a discriminator on the bottleneck of the fake score (arXiv 2405.14867, section 4.3).

The critic listens to the network while it denoises, so logits and denoised image come from one forward pass. Where
only logits are asked for, the pass ends at the bottleneck.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from scorefield.denoiser import Cond, NetworkDenoiser
from scorefield.models.networks import image_activations
from scorefield.schedule import Images, PerSample
from scorefield.training.sharding import sharding_of

WIDEST = 1280
"""Channels of a discriminator's head at most: the bottleneck of Stable Diffusion and SDXL."""


class Critic(nn.Module):
    """A network that also returns logits: forward(...) -> (prediction, logits).

    Args:
        network: predicts as before; a network that returns a tuple keeps its first item.
        bottleneck: name of the submodule whose output the head reads, such as "mid_block" in a diffusers UNet.
        head: bottleneck features -> (b,) logits; :func:`discriminator_head`.
    """

    def __init__(self, network: nn.Module, bottleneck: str, head: nn.Module) -> None:
        super().__init__()
        try:
            network.get_submodule(bottleneck)  # also finds what a property returns, such as a LoRA's backbone
        except AttributeError as error:
            names = [name for name, _ in network.named_modules() if name]
            raise ValueError(
                f"the network has no submodule {bottleneck!r}; it has {', '.join(names[:12])}, ..."
            ) from error
        self.network, self.bottleneck, self.head = network, bottleneck, head

    @property
    def heard(self) -> tuple[nn.Module, ...]:
        """Modules that it listens to, which ``compile_network`` leaves open."""
        return (self.network.get_submodule(self.bottleneck),)

    def forward(self, *args: Any, **cond: Tensor) -> tuple[Tensor, Float[Tensor, " b"]]:
        """Return the network's prediction and (b,) logits, positive for real."""
        kept: list[Tensor] = []
        owner = getattr(self.network, "backbone", self.network)
        # Hooked per call: a hook that stays would not survive copy.deepcopy or a wrapped network.
        hook = self.network.get_submodule(self.bottleneck).register_forward_hook(
            lambda module, inputs, output: kept.append(image_activations(owner, output, args[0], cond))
        )
        try:
            output = self.network(*args, **cond)
        finally:
            hook.remove()
        return _first(output), self.head(kept[0])


def logits_alone(denoiser: NetworkDenoiser, x_t: Images, t: PerSample, cond: Cond) -> Float[Tensor, " b"]:
    """Return the critic's logits, at the cost of the network up to the bottleneck: about half of it.

    A sharded network is asked as a whole.

    Args:
        denoiser: its network is, or holds, a :class:`Critic`; not wrapped in DDP, which would wait for the rest.
        x_t: noisy images.
        t: their times.
        cond: their conditions.

    Raises:
        ValueError: no critic in the network.
    """
    if sharding_of(denoiser.network) is not None:  # which a pass that ends early would leave half gathered
        last: Tensor = denoiser.with_extras(x_t, t, cond)[1][0]
        return last.to(torch.promote_types(last.dtype, torch.float32))
    critic = next((module for module in denoiser.network.modules() if isinstance(module, Critic)), None)
    if critic is None:
        raise ValueError("the GAN term needs a fake score whose network is a Critic; it returns no logits.")

    features = features_at(denoiser, critic.bottleneck, x_t, t, cond, network=critic.network)
    # A network that Accelerate prepared computes in bf16 on its own; its head may be asked outside autocast.
    logits: Tensor = critic.head(features.to(next(critic.head.parameters()).dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def features_at(
    denoiser: NetworkDenoiser, layer: str, x_t: Images, t: PerSample, cond: Cond, network: nn.Module | None = None
) -> Tensor:
    """Output of a submodule of the denoiser's network; the pass ends there, unless the network is sharded.

    Args:
        denoiser: not wrapped in DDP, which would wait for the rest of the pass.
        layer: name of the submodule, as ``get_submodule`` takes it.
        x_t: noisy images.
        t: their times.
        cond: their conditions.
        network: what ``layer`` is a part of; by default the denoiser's network.
    """
    holder = network or denoiser.network
    owner = getattr(holder, "backbone", holder)
    early, found = sharding_of(denoiser.network) is None, list[Tensor]()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(image_activations(owner, output, x_t, cond))
        if early:
            raise _Reached

    hook = holder.get_submodule(layer).register_forward_hook(note)
    try:
        denoiser(x_t, t, cond)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


class _Reached(Exception):  # noqa: N818
    """Ends a pass that has no reason to go on."""


def _first(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def discriminator_head(channels: int, size: int = 1) -> nn.Module:
    """Logits from bottleneck features: DMD2's stack of strided 4 x 4 convolutions, or an MLP for vectors.

    DMD2's is as wide as the features, which are 1,280 at most. Wider ones, a transformer's, are brought to that
    width first: at FLUX's 3,072 the stack would have 600 to 750 million weights, more than two LoRAs together.

    Args:
        channels: of the features, (b, channels) or (b, channels, height, width).
        size: the smaller of height and width; 1 means features without space.
    """
    if size == 1:
        return nn.Sequential(
            nn.Flatten(),
            nn.LayerNorm(channels),
            nn.Linear(channels, 128),
            nn.SiLU(),
            nn.Linear(128, 1),
            nn.Flatten(0),
        )
    layers: list[nn.Module] = [nn.Conv2d(channels, WIDEST, 1)] if channels > WIDEST else []
    channels = min(channels, WIDEST)
    while size >= 4:
        layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(1, channels), nn.SiLU()]
        size //= 2
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))


def critic_loss(real: Float[Tensor, " b"], fake: Float[Tensor, " b"]) -> Tensor:
    """Non-saturating discriminator loss: softplus(-D(real)) + softplus(D(fake)), averaged."""
    return softplus(-real).mean() + softplus(fake).mean()


def generator_loss(fake: Float[Tensor, " b"]) -> Tensor:
    """Non-saturating generator loss: softplus(-D(fake)), averaged."""
    return softplus(-fake).mean()


@torch.no_grad()
def critic_accuracy(real: Float[Tensor, " b"], fake: Float[Tensor, " b"]) -> Tensor:
    """Share of logits on the right side; 0.5 means that the critic cannot tell."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2


LISTENS = "the GAN term listens to activations (b, c) or (b, c, h, w)"


def find_bottleneck(network: nn.Module, name: str | None) -> str:
    """Return the name of the submodule a critic reads: ``name``, the network's own choice, or its mid_block.

    Raises ``ValueError`` where there is no such submodule, or none is known and none is named: a transformer has
    none.
    """
    modules = dict(network.named_modules())
    if name is None:
        owners = [(prefix, module) for prefix, module in modules.items() if hasattr(module, "bottleneck")]
        known = [f"{prefix}.{module.bottleneck}".lstrip(".") for prefix, module in owners]
        name = next(iter([*known, *(key for key in modules if key.split(".")[-1] == "mid_block")]), None)
    if name is None or name not in modules:
        raise ValueError(
            f"the GAN term needs a submodule to listen to; got --bottleneck {name}. The network has "
            f"{', '.join(list(modules)[1:8])}, ... Or pass --gan-weight 0."
        )
    return name


def probe_bottleneck(
    denoiser: NetworkDenoiser, shape: Sequence[int], cond: Cond, name: str | None
) -> tuple[str, int, int]:
    """Return the name, channels and shorter side of the activations of :func:`find_bottleneck`; 1 means no space.

    Args:
        denoiser: whose network is asked once.
        shape: of one x0.
        cond: of batch 1.
        name: as there.

    Raises ``ValueError`` for those that no critic can read, such as a transformer's tokens.
    """
    network = denoiser.network
    name = find_bottleneck(network, name)
    kept: list[Tensor] = []
    device = next(network.parameters()).device
    x_t = torch.zeros(1, *shape, device=device)
    hook = network.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: kept.append(image_activations(network, output, x_t, cond))
    )
    t = torch.full((1,), denoiser.schedule.t_max, device=device)
    with torch.no_grad():
        denoiser(x_t, t, {key: value.to(device) for key, value in cond.items()})
    hook.remove()
    found = tuple(kept[0].shape)
    if len(found) not in (2, 4):
        raise ValueError(f"{LISTENS}; those of --bottleneck {name} are {found}. Pass --gan-weight 0.")
    sides = found[2:]
    return name, found[1], max(min(sides), 2) if any(side > 1 for side in sides) else 1
