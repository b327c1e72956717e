"""From renders to a loss: through the encoder once, whatever number of noises and times look at the result."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from scorefield.denoiser import Cond, expand_cond
from scorefield.gradient import ScoreGradient, inject
from scorefield.schedule import Images
from sds.losses import Distillation


def encoded(images: Float[Tensor, "b c h w"], encode: Callable[[Tensor], Tensor], size: tuple[int, int]) -> Tensor:
    """Renders as a teacher's x0, differentiable: resized to ``size`` (bilinear), then encoded.

    Args:
        images: in [-1, 1], of any size.
        encode: ``Teacher.encode``; latents for latent diffusion, the images for others.
        size: ``Teacher.size``, height and width in pixels.

    Raises:
        ValueError: not (b, c, h, w).
    """
    if images.ndim != 4:
        raise ValueError(f"images must be (b, c, h, w) in [-1, 1]; got {tuple(images.shape)}.")
    if images.shape[-2:] != size:
        images = interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    return encode(images)


def averaged_gradient(
    method: Distillation, x0: Images, cond: Cond, *, num_draws: int, generator: Generator
) -> ScoreGradient:
    """The method's gradient averaged over ``num_draws`` independent noises and times per sample.

    They are one batch of ``num_draws`` b to the networks: x0 and ``cond`` repeat as wholes.

    Args:
        method: any loss of this package.
        x0: (b, ...) encoded renders; no gradient flows into them here.
        cond: batch 1 or b.
        num_draws: K; the variance of the gradient falls as 1 / K.
        generator: draws all times and noises.

    Raises:
        ValueError: num_draws below 1, conditions of another batch.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1; got {num_draws}.")
    batch = len(x0)
    for name, given in cond.items():  # any divisor of K b would repeat, to the wrong renders
        if len(given) not in (1, batch):
            raise ValueError(f"cond[{name!r}] must have batch 1 or {batch}; got {tuple(given.shape)}.")
    repeated = x0.detach().repeat(num_draws, *[1] * (x0.ndim - 1))
    drawn = method.gradient(repeated, expand_cond(cond, num_draws * batch), generator=generator)
    value = drawn.value.unflatten(0, (num_draws, batch)).mean(0)
    return ScoreGradient(value, {**drawn.metrics, "gradient_rms": value.float().square().mean().sqrt()})


def distillation_loss(
    method: Distillation, x0: Images, cond: Cond, *, num_draws: int = 1, generator: Generator
) -> dict[str, Tensor]:
    """{"loss": scalar, metrics}: a loss whose gradient with respect to x0 is the averaged one over the batch size.

    One backward pass from here goes through the encoder and the scene once, for all draws. The value of the loss
    means nothing and does not fall; "gradient_rms" is the size of the gradient before the division.

    Args:
        method: any loss of this package.
        x0: (b, ...) encoded renders, with their graph.
        cond: batch 1 or b.
        num_draws: noises and times per render.
        generator: draws them.

    Raises:
        ValueError: num_draws below 1, conditions of another batch.
    """
    gradient = averaged_gradient(method, x0, cond, num_draws=num_draws, generator=generator)
    return {"loss": inject(x0, gradient.value) / len(x0), **gradient.metrics}
