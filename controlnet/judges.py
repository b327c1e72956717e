"""The judges of an adapter: how it is read off images whether they obey their hints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from controlnet.canny import Canny
from controlnet.data import ControlBatches
from controlnet.degraded import Inpaint
from controlnet.evidence import Judge, Probe, hint_judge
from controlnet.hints import Hint, hint_generators, unit
from controlnet.lines import Scribble, SoftEdge
from controlnet.scores import DENSE_SCORES, EDGE_SCORES, rmse, ssim
from controlnet.tasks import Task

SOFT = SoftEdge(gain=(2.0, 2.0), levels=0)
"""By whose strengths two images are compared where a hint cannot be read off an image."""


def make_probe(batches: ControlBatches, task: Task, indices: range) -> Probe:
    """Held-out samples to judge by; their numbers, and the truth about circles and solids, come along."""
    examples = batches.examples(list(indices))
    truth = {"number": torch.tensor(list(indices))}
    if task.made is not None:
        masks = torch.stack([task.held_out.load(index)["mask"] for index in indices])
        truth["mask"] = masks.float().to(batches.device) / 255
        truth |= {name: rows.to(batches.device) for name, rows in task.made.truth(indices).items()}
    parts: dict[str, Any] = {name: examples[name] for name in ("x0", "hint", "cond", "images")}
    return Probe(**parts, truth=truth)


def make_judge(task: Task) -> Judge:
    """Return how obedience is read off images: see the functions below."""
    if task.hint.source != "image":
        return judge_likeness if task.made is None else task.made.judge(task.hint.source)
    return judge_inpainting if isinstance(task.hint, Inpaint) else annotation_judge(task.hint)


def annotation_judge(hint: Hint) -> Judge:
    """Return the judge of hints that are made of images.

    Each is made by the parameters that the hint to compare with had drawn, so that another sample's differs by
    what it shows, not by its parameters.
    """
    dense = not isinstance(hint, Canny | Scribble)
    scores = {"ssim": ssim, **DENSE_SCORES} if dense else EDGE_SCORES

    def judge(images: Tensor, probe: Probe) -> Mapping[str, Tensor]:
        """Does the same annotator find the hints in the images that were drawn?"""
        numbers = probe.truth["number"].tolist()
        generators = hint_generators(0, numbers, [0] * len(numbers), "hint 0")
        return hint_judge(lambda images: hint(images, generators), scores)(images, probe)

    return judge


def judge_inpainting(images: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Is what was kept still there? What is missing, and the mask itself, would agree in any image."""
    hint = probe.hint.to(images.device)
    wanted, kept = hint[:, :-1], 1 - hint[:, -1:]
    made = unit(images) * kept
    return {name: score(made, wanted, kept) for name, score in {"ssim": ssim, "rmse": rmse}.items()}


def judge_likeness(images: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Are the soft edges those of the hint's own image? Such hints cannot be read off an image."""
    generators = hint_generators(0, range(len(images)), [0] * len(images))
    made, wanted = (SOFT(some.cpu(), generators) for some in (images, probe.images))
    return {name: score(made, wanted) for name, score in {"likeness": ssim, "rmse": DENSE_SCORES["rmse"]}.items()}
