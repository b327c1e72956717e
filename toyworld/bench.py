"""Figures of generated toy-world pictures: answers of the judge, and distances to renders never trained on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.student import Student
from scorefield.metrics import extract_features, frechet_distance, kernel_distance
from scorefield.models.prompts import default_cache_folder
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.randomness import derived_generator
from scorefield.training.launcher import is_first_rank
from toyworld.captions import Attributes, caption, describe
from toyworld.data import HELD_OUT, draw_scenes
from toyworld.judge import Judge, accuracies, as_pictures, load_judge
from toyworld.renders import rendered

SIZE = (64, 64)
"""Height and width of the judge's input."""

NUM_RENDERS = 2000
"""Renders with which a training compares its student's pictures."""


@dataclass(frozen=True, eq=False)
class Bench:
    """Captions to draw, and the judge and reference features that their pictures are measured with.

    Attributes:
        judge: The toy world's judge.
        attributes: Attributes of held-out scenes, one per picture.
        reference: Features of renders of other held-out scenes.
    """

    judge: Judge
    attributes: tuple[Attributes, ...]
    reference: Tensor

    @property
    def prompts(self) -> list[str]:
        """A full caption per picture."""
        return [caption(one) for one in self.attributes]

    def figures(self, pictures: Tensor) -> dict[str, float]:
        """Return Fréchet distance, KID and the shares of right answers for pictures (n, 3, 64, 64) in [-1, 1]."""
        features = extract_features(self.judge.features, pictures)
        right = accuracies(self.judge, pictures, self.attributes)
        return {
            "frechet_distance": frechet_distance(features, self.reference),
            "kid": kernel_distance(features, self.reference), **right,
        }  # fmt: skip


def make_bench(num_prompts: int, num_renders: int, seed: int) -> Bench:
    """Return the bench of ``scorefield toyworld evaluate``. Its renders are kept in the cache."""
    attributes = [describe(scene) for scene in draw_scenes(range(HELD_OUT, HELD_OUT + num_prompts), seed)]
    folder, first = default_cache_folder().parent / "toyworld", 2 * HELD_OUT
    starts = range(first, first + num_renders, 1000)
    renders = [rendered(folder, start, min(start + 1000, first + num_renders), seed) for start in starts]
    judge = load_judge()
    reference = extract_features(judge.features, as_pictures(torch.cat(renders)))
    return Bench(judge, tuple(attributes), reference)


def text_watch(config: Any, student: Student, source: Teacher) -> Callable[[int], Mapping[str, float]]:
    """Return a function that measures a student of the toy world every ``--eval-every`` steps and at the last.

    It takes a step and returns its figures; between those steps there are none. Its scenes have seed 1.
    ``scorefield toyworld students``, which makes the final report, measures on others.
    """
    if not config.eval_every or not is_first_rank():
        return lambda step: {}
    bench = make_bench(config.eval_images, NUM_RENDERS, seed=1)
    device = source.device
    # The text encoders have been dropped, so the teacher is loaded again to encode these prompts.
    cond = {name: value.to(device) for name, value in encoded(config, bench.prompts).items()}

    def watch(step: int) -> dict[str, float]:
        if step % config.eval_every and step != config.steps:
            return {}
        pictures = draw_pictures(student, source, cond, config.eval_images)
        return {f"eval/{name}": value for name, value in bench.figures(pictures).items()}

    return watch


def encoded(config: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    """Return the conditions of prompts, encoded by the text encoder of ``--teacher``."""
    teacher = load_teacher(
        config.teacher, size=config.size or None, allow_pickle=config.allow_pickle,
        variant=config.variant or None,
    )  # fmt: skip
    return teacher.prompts(prompts)


@torch.no_grad()
def draw_pictures(
    student: Student, source: Teacher, cond: Mapping[str, Tensor], number: int, batch_size: int = 50
) -> Tensor:
    """Return pictures (n, 3, h, w) in [-1, 1] on the CPU, each from noise of its own."""
    made = []
    for part in torch.arange(number).split(batch_size):
        generators = [derived_generator(1, "picture", int(row)) for row in part]
        noise = torch.stack([torch.randn(source.shape, generator=generator) for generator in generators])
        own = {name: value[part.to(value.device)] for name, value in cond.items()}
        x0 = student.sample(noise.to(source.device), own, generator=generators)
        made.append(source.decode(x0).float().clamp(-1, 1).cpu())
    return torch.cat(made)
