"""Edits whose truth can be drawn: scenes of the toy world before and after, and how near an edit comes.

An edit changes one attribute of a caption. The scene after it is rendered, so that an edited picture has a
distance in dB to the right answer; an edit of a picture that the model drew itself has one only where it changes
a colour, since a render is shade times colour plus background, pixel by pixel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scorefield.randomness import derived_generator
from toyworld.camera import VIEWS
from toyworld.captions import caption, describe
from toyworld.control import silhouettes
from toyworld.data import ELEVATIONS, HELD_OUT, draw_azimuth, draw_scenes
from toyworld.judge import ANSWERS, NOT_ASKED, Judge, labels_of
from toyworld.render import render
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES, Scene
from toyworld.solids import VIEWED_SHAPES

KINDS = ("colour", "shape", "background", "view")
"""What an edit changes."""


@dataclass(frozen=True)
class Measured:
    """What is measured: options of every benchmark of edits."""

    seeds: tuple[int, ...] = (0,)
    """Seeds: each has other scenes and other noise."""
    num_images: int = 8
    """Pictures of each seed, and of each kind of edit."""
    steps: int = 20
    """Steps of sampling and inversion."""
    out: Path | None = None
    """JSON file for the figures."""


@dataclass(frozen=True, eq=False)
class Edits:
    """Scenes before and after an edit.

    Attributes:
        kind: one of :data:`KINDS`.
        before: scenes that no training has seen.
        after: the same with another word.
        source: (n, 3, 64, 64) renders of ``before``.
        truth: (n, 3, 64, 64) renders of ``after``.
    """

    kind: str
    before: tuple[Scene, ...]
    after: tuple[Scene, ...]
    source: Tensor
    truth: Tensor

    @property
    def prompts(self) -> tuple[list[str], list[str]]:
        """Captions of both."""
        before, after = ([caption(describe(scene)) for scene in scenes] for scenes in (self.before, self.after))
        return before, after


def make_edits(kind: str, number: int, seed: int) -> Edits:
    """Return ``number`` edits of held-out scenes; a view is changed of solids only that look different from it."""
    start, before = HELD_OUT + 100_000 * seed, list[Scene]()
    while len(before) < number:
        found = draw_scenes(range(start, start + number))
        before += [scene for scene in found if kind != "view" or scene.shape in VIEWED_SHAPES]
        start += number
    before = before[:number]
    after = [_changed(kind, scene, number, seed) for number, scene in enumerate(before)]
    return Edits(kind, tuple(before), tuple(after), render(before).rgb, render(after).rgb)


def _changed(kind: str, scene: Scene, number: int, seed: int) -> Scene:
    generator = derived_generator("edit", kind, seed, number)

    def another(words: Sequence[str], own: str) -> str:
        others = [word for word in words if word != own]
        return others[int(torch.randint(len(others), (), generator=generator))]

    if kind == "colour":
        return replace(scene, colour=another(list(COLOURS), scene.colour))
    if kind == "shape":
        return replace(scene, shape=another(SHAPES, scene.shape))
    if kind == "background":
        return replace(scene, background=another(list(BACKGROUNDS), scene.background))
    view = another(VIEWS, describe(scene).view or "")
    low, high = ELEVATIONS["overhead" if view == "overhead" else "other"]
    return replace(scene, azimuth=draw_azimuth(view, generator), elevation=(low + high) / 2)


@torch.no_grad()
def figures(judge: Judge, made: Tensor, edits: Edits) -> dict[str, float]:
    """Return how an edit came out.

    reached: share of pictures in which the judge sees the new word. kept: share in which it sees all other words
    of the caption. psnr: mean over pictures of the dB to the render of the truth. iou: of the silhouettes with
    its.
    """
    labels, answers = labels_of([describe(scene) for scene in edits.after]), judge(made.clamp(-1, 1))
    right = {name: (answers[name].argmax(1) == labels[name]) | (labels[name] == NOT_ASKED) for name in ANSWERS}
    kept = torch.stack([right[name] for name in ANSWERS if name != edits.kind]).all(0)
    return {
        "reached": float(right[edits.kind].double().mean()), "kept": float(kept.double().mean()),
        "psnr": float(psnr(made, edits.truth).mean()), "iou": overlap(made, edits.truth),
    }  # fmt: skip


def psnr(made: Tensor, wanted: Tensor) -> Tensor:
    """Return (n,) peak signal-to-noise ratios in dB of pictures in [-1, 1]."""
    return 10 * (4 / (made.clamp(-1, 1) - wanted).square().flatten(1).mean(1)).log10()


def overlap(made: Tensor, wanted: Tensor) -> float:
    """Return the mean intersection over union of the silhouettes."""
    a, b = (silhouettes(images).bool().flatten(1) for images in (made, wanted))
    return float(((a & b).sum(1) / (a | b).sum(1).clamp(min=1)).double().mean())


def averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def recoloured(image: Tensor, before: str, after: str) -> Tensor:
    """Return a picture of the toy world (3, h, w) in another colour, also one that a model drew.

    A pixel is u times the colour plus v times grey: u and v by least squares, and u keeps its place.
    """
    own, other = (torch.tensor(COLOURS[name], dtype=torch.float64) for name in (before, after))
    basis = torch.stack([own, torch.ones(3, dtype=torch.float64)], 1)
    pixels = (image.double().flatten(1) + 1) / 2
    u, v = torch.linalg.lstsq(basis, pixels).solution
    rest = pixels - basis @ torch.stack([u, v])
    return ((other[:, None] * u + v + rest) * 2 - 1).view_as(image).to(image.dtype)
