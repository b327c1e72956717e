"""How well images obey their hints, per sample: maps in [0, 1], made against wanted, (b, c, h, w) each -> (b,).

Edges and masks are what lies above 0.5. A map of images comes from the annotator that made the hints.
"""

import functools
import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

Maps = Float[Tensor, "b c h w"]
Mask = Float[Tensor, "b 1 h w"]
"""1 inside, 0 outside."""

PerSample = Float[Tensor, " b"]

Score = Callable[[Maps, Maps], PerSample]
"""(made, wanted) -> (b,)."""


def edge_f1(made: Maps, wanted: Maps, tolerance: int = 0) -> PerSample:
    """Harmonic mean of precision and recall of edge pixels, each met within ``tolerance`` pixels (king's moves).

    1 if there are no edges in either, 0 if in one alone. Raises ``ValueError`` for maps of different shapes.
    """
    made, wanted = _binary(made, wanted)
    precision = _share(made, _dilated(wanted, tolerance))
    recall = _share(wanted, _dilated(made, tolerance))
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    empty = ~made.flatten(1).any(1) & ~wanted.flatten(1).any(1)
    return torch.where(empty, 1.0, f1)


def mask_iou(made: Maps, wanted: Maps) -> PerSample:
    """Intersection over union; 1 if both are empty. Raises ``ValueError`` for maps of different shapes."""
    made, wanted = _binary(made, wanted)
    both, either = (made & wanted).flatten(1).sum(1), (made | wanted).flatten(1).sum(1)
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def ssim(made: Maps, wanted: Maps, inside: Mask | None = None) -> PerSample:
    """Structural similarity (Wang et al. 2004), Gaussian window of 11 pixels; for soft maps.

    The mean over the picture, or over pixels ``inside``.
    """
    _check(made, wanted)
    _, values = structural_similarity_index_measure(
        made.float(), wanted.float(), data_range=1.0, reduction="none", return_full_image=True
    )
    return _mean(values, inside)


def rmse(made: Maps, wanted: Maps, inside: Mask | None = None) -> PerSample:
    """Root mean squared difference, of all pixels or those ``inside``: depth, normals, blurred images."""
    _check(made, wanted)
    return _mean((made.float() - wanted.float()).square(), inside).sqrt()


def shading(made: Maps, wanted: Maps, inside: Mask) -> PerSample:
    """Correlation of brightness ``inside``: 1 if light and shade lie alike, whatever their colour; 0 if flat.

    Contrasts below a hundredth of the range count less and less.
    """
    _check(made, wanted)
    inside = inside.expand_as(made)
    a, b = ((x - _mean(x, inside)[:, None, None, None]) * inside for x in (made.float(), wanted.float()))
    spread = (_mean(a.square(), inside) * _mean(b.square(), inside)).sqrt()
    return _mean(a * b, inside) / (spread + 1e-4)


def centre_error(made: Maps, wanted: Maps) -> PerSample:
    """Distance of the masks' centres of mass in pixels; the image's diagonal if one is empty, 0 if both are."""
    made, wanted = _binary(made, wanted)
    (a, a_empty), (b, b_empty) = _centre(made), _centre(wanted)
    distance = torch.where(a_empty | b_empty, math.hypot(*made.shape[2:]), (a - b).norm(dim=1))
    return torch.where(a_empty & b_empty, 0.0, distance)


def colour_error(images: Maps, colours: Float[Tensor, "b c"], mask: Maps) -> PerSample:
    """Distance from the mean colour of ``images`` inside ``mask`` to the colour asked for, 0 to 1.

    Root mean square over channels, in units of the range.

    Args:
        images: in [-1, 1].
        colours: in [-1, 1].
        mask: (b, 1, h, w), above 0.5 inside; an empty one counts as the largest error.
    """
    inside = (mask > 0.5).to(images)
    area = inside.flatten(1).sum(1)
    mean = (images.clamp(-1, 1) * inside).flatten(2).sum(2) / area.clamp(min=1)[:, None]
    error = ((mean - colours) / 2).square().mean(1).sqrt()
    return torch.where(area == 0, 1.0, error)


EDGE_SCORES: Mapping[str, Score] = {
    "edge_f1_1px": functools.partial(edge_f1, tolerance=1), "edge_f1": edge_f1, "ssim": ssim,
}  # fmt: skip
"""Of canny and other thin edges; the first is the one to watch."""

MASK_SCORES: Mapping[str, Score] = {"mask_iou": mask_iou, "centre_error": centre_error}
"""Of masks of one object."""

DENSE_SCORES: Mapping[str, Score] = {"rmse": rmse, "ssim": ssim}
"""Of depth, normals, soft edges."""

ERRORS = frozenset({"rmse", "centre_error", "colour_error"})
"""Names of those of which less is better; of all others more is."""


def _check(made: Tensor, wanted: Tensor) -> None:
    if made.shape != wanted.shape or made.ndim != 4:
        raise ValueError(
            f"maps must share a shape (b, c, h, w); got {tuple(made.shape)} and {tuple(wanted.shape)}."
        )


def _mean(values: Tensor, inside: Tensor | None = None) -> Tensor:
    # Over pixels and channels; 0 where nothing is inside.
    if inside is None:
        return values.flatten(1).mean(1)
    weight = inside.expand_as(values).flatten(1)
    return (values.flatten(1) * weight).sum(1) / weight.sum(1).clamp(min=1)


def _binary(made: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    _check(made, wanted)
    return made > 0.5, wanted > 0.5


def _dilated(mask: Tensor, radius: int) -> Tensor:
    return nn.functional.max_pool2d(mask.float(), 2 * radius + 1, 1, radius) > 0.5


def _share(mask: Tensor, of: Tensor) -> Tensor:
    return (mask & of).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def _centre(mask: Tensor) -> tuple[Tensor, Tensor]:
    weight = mask.any(1).float()
    area = weight.flatten(1).sum(1)
    rows, columns = (torch.arange(n, device=mask.device, dtype=torch.float32) for n in mask.shape[2:])
    centre = torch.stack([(weight * rows[:, None]).sum((1, 2)), (weight * columns).sum((1, 2))], 1)
    return centre / area.clamp(min=1)[:, None], area == 0
