"""The judges of an adapter: how it is read off images whether they obey their hints."""

from collections.abc import Mapping
from typing import Any

import torch
from control_tasks import MADE, Task
from torch import Tensor

from controlnet.canny import Canny
from controlnet.circles import Circles, colour_values
from controlnet.data import ControlBatches
from controlnet.degraded import Inpaint
from controlnet.evidence import Judge, Probe, hint_judge
from controlnet.hints import Hint, brightness, hint_generators, unit
from controlnet.lines import Scribble, SoftEdge
from controlnet.scores import DENSE_SCORES, EDGE_SCORES, MASK_SCORES, colour_error, rmse, shading, ssim
from toyworld.circles import PALETTE

SOFT = SoftEdge(gain=(2.0, 2.0), levels=0)
"""By whose strengths two images are compared where a hint cannot be read off an image."""


def make_probe(batches: ControlBatches, task: Task, indices: range) -> Probe:
    """Held-out samples to judge by; their numbers, and the truth about circles and solids, come along."""
    examples = batches.examples(list(indices))
    truth = {"number": torch.tensor(list(indices))}
    if task.source in MADE:
        masks = torch.stack([task.held_out.load(index)["mask"] for index in indices])
        truth["mask"] = masks.float().to(batches.device) / 255
    if isinstance(task.held_out, Circles):
        names = [task.held_out.circle(index).colour for index in indices]
        truth["colour"] = torch.tensor([PALETTE.index(name) for name in names], device=batches.device)
    parts: dict[str, Any] = {name: examples[name] for name in ("x0", "hint", "cond", "images")}
    return Probe(**parts, truth=truth)


def make_judge(task: Task) -> Judge:
    """How obedience is read off images: see the functions below."""
    if task.hint.source != "image":
        if task.source not in MADE:
            return judge_likeness
        # A mask does not say how the surface inside it lies.
        return judge_silhouettes if task.source == "circles" or task.hint.source == "mask" else judge_solids
    return judge_inpainting if isinstance(task.hint, Inpaint) else annotation_judge(task.hint)


def annotation_judge(hint: Hint) -> Judge:
    """The judge of hints that are made of images.

    Each is made by the parameters that the hint to compare with had drawn, so that another sample's differs by
    what it shows, not by its parameters.
    """
    dense = not isinstance(hint, Canny | Scribble)
    scores = {"ssim": ssim, **DENSE_SCORES} if dense else EDGE_SCORES

    def judge(images: Tensor, probe: Probe) -> Mapping[str, Tensor]:
        """Of hints that are made of images: does the same annotator find them in what was drawn?"""
        numbers = probe.truth["number"].tolist()
        generators = hint_generators(0, numbers, [0] * len(numbers), "hint 0")
        return hint_judge(lambda images: hint(images, generators), scores)(images, probe)

    return judge


def judge_inpainting(images: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Of what was kept: is it still there? What is missing, and the mask itself, would agree in any image."""
    hint = probe.hint.to(images.device)
    wanted, kept = hint[:, :-1], 1 - hint[:, -1:]
    made = unit(images) * kept
    return {name: score(made, wanted, kept) for name, score in {"ssim": ssim, "rmse": rmse}.items()}


def judge_likeness(images: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Of hints that cannot be read off an image: are its soft edges those of the image that the hint is of?"""
    generators = hint_generators(0, range(len(images)), [0] * len(images))
    made, wanted = (SOFT(some.cpu(), generators) for some in (images, probe.images))
    return {name: score(made, wanted) for name, score in {"likeness": ssim, "rmse": DENSE_SCORES["rmse"]}.items()}


def judge_silhouettes(images: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Of one object on a plain ground: does it cover what it should, and has a circle its colour?

    What the hint says beyond the silhouette is not judged; see :func:`judge_solids`.
    """
    made = silhouettes(images)
    wanted = probe.truth["mask"].to(made.device)
    scores = {name: score(made, wanted) for name, score in MASK_SCORES.items()}
    if "colour" in probe.truth:
        colours = probe.truth["colour"].to(made.device)
        scores["colour_right"] = (nearest_colour(images, made) == colours).float()
        scores["colour_error"] = colour_error(images, colour_values(PALETTE).to(images)[colours], made)
    return scores


def judge_solids(images: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Of a solid in the toy world's light: its silhouette, and "shading", which shows how its surface lies.

    Within the true silhouette, brightness is compared with the true image's; an adapter that obeys the silhouette
    alone, and fills it flatly or by another solid's surface, does not reach it.
    """
    mask = probe.truth["mask"].to(images.device)
    made, wanted = (brightness(some.to(images.device)) for some in (images, probe.images))
    return {**judge_silhouettes(images, probe), "shading": shading(made, wanted, mask)}


def silhouettes(images: Tensor, least: float = 0.1) -> Tensor:
    """(b, 1, h, w): 1 where an image in [-1, 1] differs from its ground, the median colour of its corners.

    A pixel differs if it is nearer to the largest difference of the image than to none; smaller ones than
    ``least``, of a range of 1, are noise. A circle of ``controlnet.circles`` covers one corner at most.
    """
    pixels = (images.clamp(-1, 1).float() + 1) / 2
    corners = torch.stack(_corners(pixels))
    ground = corners.median(0).values
    distance = (pixels - ground[:, :, None, None]).square().mean(1, keepdim=True).sqrt()
    largest = distance.flatten(1).quantile(0.95, dim=1).clamp(min=2 * least)
    return (distance > largest[:, None, None, None] / 2).float()


def _corners(pixels: Tensor, side: int = 2) -> list[Tensor]:
    rows = pixels[:, :, :side], pixels[:, :, -side:]
    return [part.mean((2, 3)) for row in rows for part in (row[..., :side], row[..., -side:])]


def nearest_colour(images: Tensor, mask: Tensor) -> Tensor:
    """(b,) number in ``PALETTE`` of the mean colour within a mask (b, 1, h, w); -1 where that is empty."""
    area = mask.flatten(1).sum(1)
    mean = (images.clamp(-1, 1).float() * mask).flatten(2).sum(2) / area.clamp(min=1)[:, None]
    nearest = torch.cdist(mean, colour_values(PALETTE).to(mean)).argmin(1)
    return torch.where(area > 0, nearest, -1)
