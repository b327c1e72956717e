"""Random views of an image, differentiable: what a camera does to a printed patch."""

import math

import torch
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import get_perspective_transform, warp_perspective
from torch import Tensor

from attack.pgd import Transform
from scorefield.randomness import Generators, normal_like
from scorefield.schedule import Images


def camera(
    *, perspective: float = 0.1, light: float = 0.2, blur: float = 1.0, printing: float = 0.05
) -> Transform:
    """Return a random view: printed, seen from a little aside, in another light, out of focus.

    Args:
        perspective: largest shift of a corner, as a share of the side; what comes into view repeats the edge.
        light: brightness is multiplied by 1 - light to 1 + light, and moved by half of that.
        blur: largest standard deviation of the blur, in pixels.
        printing: standard deviation of the error of each colour of the printer, the same over the image.

    Each image has a view of its own, and every strength 0 is the identity.

    Raises:
        ValueError: a strength below 0, or a perspective of 0.5 and more, which folds the image.
    """
    if min(perspective, light, blur, printing) < 0 or perspective >= 0.5:
        raise ValueError(
            f"strengths of a camera must be at least 0, perspective below 0.5; got perspective={perspective}, "
            f"light={light}, blur={blur}, printing={printing}."
        )

    def view(images: Tensor, generator: Generators) -> Tensor:
        number, channels = images.shape[:2]
        draw = normal_like(images.new_zeros(number, 11 + channels), generator)
        uniform = 2 * torch.special.ndtr(draw) - 1
        x = images + printing * draw[:, 11:, None, None]
        if perspective:
            x = _tilted(x, perspective * uniform[:, :8])
        x = x * (1 + light * uniform[:, 8, None, None, None]) + light / 2 * uniform[:, 9, None, None, None]
        if blur:
            x = _blurred(x, blur * uniform[:, 10].abs(), side=2 * math.ceil(3 * blur) + 1)
        return x.clamp(0, 1)

    return view


def _tilted(images: Images, shifts: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    sides = images.new_tensor([width - 1, height - 1])
    corners = images.new_tensor([[0, 0], [1, 0], [1, 1], [0, 1]]) * sides
    corners = corners.expand(len(images), 4, 2)
    matrix = get_perspective_transform(corners, corners + shifts.view(-1, 4, 2) * sides)
    return warp_perspective(images, matrix, (height, width), padding_mode="border", align_corners=True)


def _blurred(images: Images, sigma: Tensor, side: int) -> Tensor:
    # One window for all: the view of an image must not depend on who shares its batch.
    kept = sigma.clamp(min=1e-3)[:, None].expand(-1, 2)
    return gaussian_blur2d(images, (side, side), kept, border_type="replicate")
