"""Style by Gram matrices (Gatys et al. 2015, arXiv 1508.06576): texture without place."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attack.threat import Mask, check_images, inside
from scorefield.schedule import Images

Features = Callable[[Tensor], Sequence[Tensor]]
"""Images in [0, 1] -> activations (b, c, h, w) of some layers."""


def gram(activations: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c c"]:
    """Return the products of channels, averaged over places and channels."""
    flat = activations.flatten(2)
    return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


def gram_loss(made: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the sum over layers of the mean squared differences of Gram matrices, (b,)."""
    layers = [(gram(a) - gram(b)).square().flatten(1).mean(1) for a, b in zip(made, wanted, strict=True)]
    return torch.stack(layers).sum(0)


def stylised(
    images: Images, style: Images, features: Features, *, mask: Mask | None = None, num_steps: int = 200,
    learning_rate: float = 0.02, style_weight: float = 4000.0,
) -> Tensor:  # fmt: skip
    """Return images with the texture of ``style`` inside the mask, by Adam on their pixels.

    The loss is style_weight times :func:`gram_loss` plus the squared difference of the last layer to that of the
    image, the content. Outside the mask images stay as they are, bit by bit.

    Args:
        images: (b, c, h, w) in [0, 1].
        style: (1 or b, c, h, w) in [0, 1].
        features: of both.
        mask: where images may change.
        num_steps: of Adam.
        learning_rate: of Adam.
        style_weight: beside a content loss of weight 1.
    """
    check_images(images)
    check_images(style)
    with torch.no_grad():
        wanted = [layer.expand(len(images), -1, -1, -1) for layer in features(style)]
        content = features(images)[-1]
    x = images.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], learning_rate)
    for _ in range(num_steps):
        with torch.enable_grad():
            found = features(inside(mask, x, images))
            away = (found[-1] - content).square().flatten(1).mean(1)
            (x.grad,) = torch.autograd.grad((style_weight * gram_loss(found, wanted) + away).sum(), x)
        optimizer.step()
        x.data.clamp_(0, 1)
    return inside(mask, x.detach(), images)


def activations(network: nn.Sequential, layers: Sequence[int]) -> Features:
    """Return the features of a chain of modules after those with these numbers, in order.

    Raises ``ValueError`` for a number that it does not have.
    """
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= len(network):
        raise ValueError(f"layers must be numbers of the {len(network)} modules; got {list(layers)}.")

    def features(images: Tensor) -> list[Tensor]:
        x, found = images, []
        for number, module in enumerate(network[: wanted[-1] + 1]):
            x = module(x)
            if number in wanted:
                found.append(x)
        return found

    return features
