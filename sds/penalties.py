"""Penalties on a scene: they keep its matter together, its empty space empty, and its faces outside.

Each loss gives one value per view, and nothing in it is random.
"""

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

PerView = Float[Tensor, " b"]
PerPixel = Float[Tensor, "b 1 h w"]


class Penalised(Protocol):
    """The parts of a :class:`sds.scene.Render` that the penalties read."""

    @property
    def opacity(self) -> PerPixel:
        """Opacity in [0, 1]."""

    @property
    def distortion(self) -> PerPixel:
        """:func:`ray_distortion` of each pixel."""

    @property
    def orientation(self) -> PerPixel | None:
        """:func:`ray_orientation` of each pixel; needed by its penalty alone."""


@dataclass(frozen=True, kw_only=True)
class Penalties:
    """Weights of the penalties. Calling it returns their weighted sum, averaged over the views.

    They are balanced against a score whose gradient is summed over all elements of x0 (see
    :func:`sds.losses.distillation_loss`), while the penalties are means over pixels. Weights published for other
    reductions do not carry over.

    Raises ``ValueError`` for a weight that is negative or not finite.
    """

    opacity: float = 0.0
    entropy: float = 0.0
    orientation: float = 0.0
    distortion: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {name} must be at least 0 and finite; got {weight}.")

    def __call__(self, render: Penalised) -> Float[Tensor, ""]:
        """Return the penalty. Terms of weight 0 are not computed.

        Raises ``ValueError`` if the orientation has a weight and the render no normals.
        """
        total = render.opacity.new_zeros(())
        if self.opacity:
            total = total + self.opacity * opacity_loss(render.opacity).mean()
        if self.entropy:
            total = total + self.entropy * entropy_loss(render.opacity).mean()
        if self.orientation:
            if render.orientation is None:
                raise ValueError("the orientation penalty needs a render with normals=True.")
            total = total + self.orientation * orientation_loss(render.orientation).mean()
        if self.distortion:
            total = total + self.distortion * distortion_loss(render.distortion).mean()
        return total


def opacity_loss(opacity: PerPixel, floor: float = 0.01) -> PerView:
    """Return the mean over the pixels of sqrt(opacity^2 + floor), which favours little matter.

    Source: DreamFusion (arXiv 2209.14988, Appendix A.2).
    """
    return _mean((opacity.square() + floor).sqrt())


def entropy_loss(opacity: PerPixel, margin: float = 1e-5) -> PerView:
    """Return the mean over the pixels of the binary entropy of the opacity, in nats: no half-transparent pixels.

    Within ``margin`` of 0 and 1 there is no gradient, since the slope of the entropy is infinite at both ends.
    """
    p = opacity.clamp(margin, 1 - margin)
    return _mean(-p * p.log() - (1 - p) * (1 - p).log())


def orientation_loss(orientation: PerPixel) -> PerView:
    """Return the mean over the pixels of :func:`ray_orientation`."""
    return _mean(orientation)


def distortion_loss(distortion: PerPixel) -> PerView:
    """Return the mean over the pixels of :func:`ray_distortion`."""
    return _mean(distortion)


def ray_orientation(weights: Float[Tensor, "n s"], facing: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """Return sum_i sg(w_i) max(0, n_i . v)^2 for rays of direction v: visible normals must face the camera.

    It is Ref-NeRF's loss (arXiv 2112.03907, Eq. 11) with DreamFusion's stop-gradient sg on the weights. Without it
    matter becomes transparent instead of turning (arXiv 2209.14988, Appendix A.2).

    Args:
        weights: Weights of s samples on each of n rays.
        facing: n_i . v, positive where the normal points away from the camera.
    """
    return (weights.detach() * facing.clamp(min=0).square()).sum(-1)


def ray_distortion(weights: Float[Tensor, "n s"], edges: Float[Tensor, "n s+1"]) -> Float[Tensor, " n"]:
    """Return sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 d_i / 3 for intervals of middle m and length d: no floaters.

    It is mip-NeRF 360's loss (arXiv 2111.12077, Eq. 15), in one pass over the sorted samples instead of over all
    pairs.

    Args:
        weights: Weights of s intervals on each of n rays.
        edges: Ends of the intervals along the ray, increasing.
    """
    edges = edges - edges[:, :1]  # numbers near 0 lose fewer digits below
    middle, length = (edges[:, 1:] + edges[:, :-1]) / 2, edges.diff(dim=-1)
    before = weights.cumsum(-1) - weights
    moment = (weights * middle).cumsum(-1) - weights * middle
    between = 2 * (weights * (middle * before - moment)).sum(-1)
    return between + (weights.square() * length).sum(-1) / 3


def _mean(image: PerPixel) -> PerView:
    return image.flatten(1).mean(1)
