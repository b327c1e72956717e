"""How well inversion finds its way back, on renders and the pipeline that ships.

    python benchmarks/edit_inversion.py --num-images 32 --seeds 0 1 2

PSNR is to the pictures; the ceiling is that of the autoencoder alone. Under guidance the pivot of scale 1 is lost,
and null-text inversion finds it again.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from edit_scenes import Measured, psnr
from torch import Tensor

from edit.inversion import Inversion, invert, whiteness
from edit.null_text import Fit, global_null_text, null_text
from scorefield.denoiser import Cond, Denoiser
from scorefield.grids import grid
from scorefield.guidance import guided
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.sampling import sample
from toyworld.data import HELD_OUT, captions_of, draw_scenes
from toyworld.render import render


@dataclass(frozen=True)
class Config(Measured):
    """What is measured."""

    steps: int = 50
    """Steps of sampling and inversion."""
    inner: int = 10
    """Updates of null-text inversion at each time. 0 leaves it out."""
    sweeps: int = 0
    """Sweeps of global null-text inversion. 0 leaves it out."""


@dataclass(frozen=True, eq=False)
class Case:
    """Pictures with all that every row of the table needs."""

    teacher: Teacher
    images: Tensor
    x0: Tensor
    cond: Cond
    negative: Cond
    times: Tensor

    def db(self, x0: Tensor) -> float:
        """Return the mean PSNR of decoded latents."""
        with torch.no_grad():
            return float(psnr(self.teacher.decode(x0), self.images).mean())

    def guided(self, scale: float) -> Denoiser:
        """Return the teacher under guidance."""
        return guided(self.teacher.denoiser, scale, self.negative)

    @torch.no_grad()
    def inverted(self, scale: float, iterations: int) -> Inversion:
        """Return the inversion of all pictures."""
        return invert(self.guided(scale), self.x0, self.cond, times=self.times, iterations=iterations)

    @torch.no_grad()
    def sampled(self, denoiser: Denoiser, x_t: Tensor) -> Tensor:
        """Return the latents that DDIM draws."""
        return sample(denoiser, x_t, self.cond, times=self.times)


def make_case(teacher: Teacher, config: Config, seed: int) -> Case:
    """Return the renders of a seed, encoded."""
    start = HELD_OUT + 100_000 * seed
    scenes = draw_scenes(range(start, start + config.num_images))
    images = render(scenes).rgb
    with torch.no_grad():
        x0 = teacher.encode(images)
    return Case(
        teacher, images, x0, teacher.prompts(captions_of(scenes)), teacher.negative(),
        grid(teacher.denoiser.schedule, config.steps),
    )  # fmt: skip


def inversions(case: Case) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield rows of DDIM inversion, both ways under one guidance."""
    for scale, iterations in ((1.0, 0), (1.0, 1), (1.0, 3), (1.0, 10), (3.0, 3), (7.5, 3), (7.5, 10)):
        start = time.perf_counter()
        found = case.inverted(scale, iterations)
        white = whiteness(found.x_t, case.teacher.denoiser.schedule, case.times[0])
        yield f"ddim, guidance {scale:g}, {iterations} refinements", {
            "psnr": case.db(case.sampled(case.guided(scale), found.x_t)), "std": white.std,
            "correlation": white.correlation, "seconds": time.perf_counter() - start,
        }  # fmt: skip


def null_texts(case: Case, config: Config) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield rows of sampling under guidance from the pivot of guidance 1."""
    pivot, denoiser = case.inverted(1.0, 3), case.teacher.denoiser
    methods: list[tuple[str, int, Callable[..., object]]] = [
        ("null-text", config.inner, null_text), ("global null-text", config.sweeps, global_null_text),
    ]  # fmt: skip
    for scale in (3.0, 7.5):
        alone = case.sampled(case.guided(scale), pivot.x_t)
        yield f"pivot alone, guidance {scale:g}", {"psnr": case.db(alone)}
        for name, updates, method in methods:
            if updates:
                start = time.perf_counter()
                null: Any = method(denoiser, pivot, case.cond, case.negative, Fit(scale=scale, num_inner=updates))
                back = case.sampled(null.guided(denoiser), pivot.x_t)
                yield f"{name}, guidance {scale:g}, {updates} updates", {
                    "psnr": case.db(back), "seconds": time.perf_counter() - start
                }  # fmt: skip


def main(config: Config) -> dict[str, dict[str, float]]:
    """Print and return the table of each seed."""
    teacher, every = load_teacher("toyworld"), {}
    for seed in config.seeds:
        case = make_case(teacher, config, seed)
        rows, ceiling = dict[str, dict[str, float]](), {"autoencoder": {"psnr": case.db(case.x0)}}
        for name, row in itertools.chain(ceiling.items(), inversions(case), null_texts(case, config)):
            rows[name] = row
            print(f"seed {seed}: {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        every[str(seed)] = rows
    if config.out is not None:
        config.out.write_text(json.dumps(every, indent=1))
    return every["0"] if "0" in every else next(iter(every.values()))


if __name__ == "__main__":
    main(tyro.cli(Config))
