"""Data with known ground truth for ControlNets: solids of the toy world, and the circles of fill50k."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from controlnet.circles import HELD_OUT, Circles, colour_values
from controlnet.evidence import Probe
from controlnet.hints import Hint, brightness, check_source
from controlnet.scores import MASK_SCORES, colour_error, shading
from controlnet.tasks import Made
from scorefield.cache import content_key
from scorefield.data.pictures import Kind
from scorefield.progress import progress
from toyworld import data as toyworld
from toyworld.captions import parse
from toyworld.circles import PALETTE
from toyworld.judge import accuracies, load_judge
from toyworld.render import render
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES, Scene


@dataclass(frozen=True, eq=False)
class ToyWorld:
    """Rendered solids as ``controlnet.samples.Samples``; see :func:`render_world`.

    Attributes:
        scenes: The rendered scenes; see :func:`choose_scenes`.
        pictures: Image and maps by name, (n, c, 64, 64) bytes.
    """

    scenes: Sequence[Scene]
    pictures: Mapping[str, Tensor]
    kinds: ClassVar[Mapping[str, Kind]] = {
        "image": "image", "depth": "image", "normals": "normals", "mask": "mask", "edges": "lines",
    }  # fmt: skip

    def __len__(self) -> int:
        return len(self.scenes)

    def caption(self, index: int) -> str:
        """Return the prompt of a sample."""
        return toyworld.captions_of([self.scenes[index]])[0]

    def identity(self, index: int) -> str:
        """Return the hash of a sample's picture."""
        return content_key(self.pictures["image"][index])

    def load(self, index: int) -> dict[str, Tensor]:
        """Return the picture and the maps of a sample."""
        return {name: part[index] for name, part in self.pictures.items()}


def solids(hint: Hint, size: tuple[int, int], num_samples: int, num_held_out: int) -> Made:
    """Return rendered solids, 64 x 64 pixels, with their ground truth.

    Raises:
        ValueError: The size is another, or the samples have no such hint.
    """
    check_source(hint, ToyWorld.kinds)
    if size != (64, 64):
        raise ValueError(f"the toy world's pictures are 64 x 64; --teacher draws {size[1]} x {size[0]}.")
    training = render_world(choose_scenes(num_samples, held_out=False))
    return known_solids(training, render_world(choose_scenes(num_held_out, held_out=True)))


def known_solids(training: ToyWorld, held_out: ToyWorld) -> Made:
    """Return samples with the functions that score images against them."""

    def shown(images: Tensor, indices: Sequence[int]) -> Mapping[str, float]:
        captions = [parse(held_out.caption(index)) for index in indices]
        return accuracies(load_judge(), images.cpu(), captions)

    return Made(
        training=training, held_out=held_out, truth=lambda indices: {}, accuracies=shown,
        # A mask says nothing about the surface inside it.
        judge=lambda source: judge_silhouettes if source == "mask" else judge_solids,
    )  # fmt: skip


def circles(hint: Hint, size: tuple[int, int], num_samples: int, num_held_out: int) -> Made:
    """Return circles in the painter's colours, with the colour of each.

    Raises:
        ValueError: The samples have no such hint.
    """
    check_source(hint, Circles.kinds)
    training = Circles(size[0], num_samples, colours=PALETTE, distinct=True)
    held_out = replace(training, start=HELD_OUT, num_samples=num_held_out)

    def truth(indices: Sequence[int]) -> Mapping[str, Tensor]:
        return {"colour": torch.tensor([PALETTE.index(held_out.circle(index).colour) for index in indices])}

    return Made(
        training=training, held_out=held_out, truth=truth, judge=lambda source: judge_silhouettes,
        accuracies=lambda images, indices: {},
    )  # fmt: skip


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene's combination is held out: one solid in nine for each colour and background.

    Adapters are not trained on the captions of such scenes.
    """
    solid, colour, ground = (
        list(words).index(word)
        for words, word in ((SHAPES, scene.shape), (COLOURS, scene.colour), (BACKGROUNDS, scene.background))
    )
    return (solid + colour + len(BACKGROUNDS) * ground) % len(SHAPES) == 0


def choose_scenes(num_samples: int, *, held_out: bool) -> list[Scene]:
    """Return scenes for training, or held-out ones.

    The two sets share no pictures, and no combination of shape, colour and background.
    """
    drawn = map(toyworld.draw_scene, itertools.count(toyworld.HELD_OUT if held_out else 0))
    return list(itertools.islice((scene for scene in drawn if is_held_out(scene) == held_out), num_samples))


def render_world(scenes: Sequence[Scene]) -> ToyWorld:
    """Return scenes with their pictures. 5,000 take a minute, and 40 kB each."""
    parts = []
    for first in progress(range(0, len(scenes), 100), "renders, in hundreds"):
        rendering = render(scenes[first : first + 100])
        image = toyworld.as_bytes((rendering.rgb + 1) / 2)
        parts.append({"image": image, **toyworld.hint_images(rendering)})
    return ToyWorld(scenes, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def judge_silhouettes(images: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Return scores of images of one object on a plain background: does its silhouette fit, and a circle's colour?

    Whatever else the hint says about the object is not scored here; see :func:`judge_solids`.
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
    """Return the scores of a solid's silhouette, and "shading", which shows how its surface is oriented.

    Within the true silhouette, brightness is compared with the true image's. An adapter that follows only the
    silhouette, and fills it with a flat colour or with another solid's surface, does not reach the true image's
    score.
    """
    mask = probe.truth["mask"].to(images.device)
    made, wanted = (brightness(some.to(images.device)) for some in (images, probe.images))
    return {**judge_silhouettes(images, probe), "shading": shading(made, wanted, mask)}


def silhouettes(images: Tensor, least: float = 0.1) -> Tensor:
    """Return (b, 1, h, w): 1 where an image in [-1, 1] differs from its background, the median of its corners.

    A pixel differs if its colour distance is above half of the largest distance in the image. Distances up to
    ``least``, in a range of 1, are noise. A circle of ``controlnet.circles`` covers at most one corner.
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
    """Return (b,) the number in ``PALETTE`` of the mean colour within a mask (b, 1, h, w); -1 if it is empty."""
    area = mask.flatten(1).sum(1)
    mean = (images.clamp(-1, 1).float() * mask).flatten(2).sum(2) / area.clamp(min=1)[:, None]
    nearest = torch.cdist(mean, colour_values(PALETTE).to(mean)).argmin(1)
    return torch.where(area > 0, nearest, -1)
