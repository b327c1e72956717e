"""What keeps matter in one place, out of the empty space and with its faces outside; all per view, none random."""

from jaxtyping import Float
from torch import Tensor

PerView = Float[Tensor, " b"]
PerPixel = Float[Tensor, "b 1 h w"]


def opacity_loss(opacity: PerPixel, floor: float = 0.01) -> PerView:
    """Mean over the pixels of sqrt(opacity^2 + floor): little matter (arXiv 2209.14988, Appendix A.2)."""
    return _mean((opacity.square() + floor).sqrt())


def entropy_loss(opacity: PerPixel, margin: float = 1e-5) -> PerView:
    """Mean over the pixels of the binary entropy of the opacity, in nats: no half-transparent pixels.

    Within ``margin`` of 0 and 1 there is no gradient, as its slope is infinite at the ends.
    """
    p = opacity.clamp(margin, 1 - margin)
    return _mean(-p * p.log() - (1 - p) * (1 - p).log())


def orientation_loss(orientation: PerPixel) -> PerView:
    """Mean over the pixels of :func:`ray_orientation`."""
    return _mean(orientation)


def distortion_loss(distortion: PerPixel) -> PerView:
    """Mean over the pixels of :func:`ray_distortion`."""
    return _mean(distortion)


def ray_orientation(weights: Float[Tensor, "n s"], facing: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """sum_i sg(w_i) max(0, n_i . v)^2 for the direction v of the ray: seen matter must not turn its back.

    Ref-NeRF's loss (arXiv 2112.03907, Eq. 11) with DreamFusion's stop-gradient on the weights, without which
    matter becomes transparent instead of turning (arXiv 2209.14988, Appendix A.2).

    Args:
        weights: of s samples on each of n rays.
        facing: n_i . v, above 0 where the normal points away from the camera.
    """
    return (weights.detach() * facing.clamp(min=0).square()).sum(-1)


def ray_distortion(weights: Float[Tensor, "n s"], edges: Float[Tensor, "n s+1"]) -> Float[Tensor, " n"]:
    """sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 d_i / 3 for intervals of middle m and length d: no floaters.

    Mip-NeRF 360's loss (arXiv 2111.12077, Eq. 15), in one pass over the sorted samples instead of over all pairs.
    """
    edges = edges - edges[:, :1]  # numbers near 0 lose fewer digits below
    middle, length = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=-1)
    before = weights.cumsum(-1) - weights
    moment = (weights * middle).cumsum(-1) - weights * middle
    between = 2 * (weights * (middle * before - moment)).sum(-1)
    return between + (weights.square() * length).sum(-1) / 3


def _mean(image: PerPixel) -> PerView:
    return image.flatten(1).mean(1)
