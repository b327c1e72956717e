"""A slider for size from pairs of renders, near and far, on the pipeline that ships.

python benchmarks/edit_sliders.py --num-images 16
"""

import time
from dataclasses import dataclass, replace

import torch
import tyro
from torch import Generator, Tensor

from edit.sliders import make_slider, pair_loss, train
from scorefield.grids import grid
from scorefield.guidance import guided
from scorefield.models.teacher import load_teacher
from scorefield.randomness import derived_generator
from scorefield.sampling import initial_noise, sample
from toyworld.captions import caption, describe
from toyworld.control import silhouettes
from toyworld.data import HELD_OUT, draw_scenes
from toyworld.judge import labels_of, load_judge
from toyworld.render import render

SCALES = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""At which pictures are drawn."""

NEAR, FAR = 2.3, 3.7
"""Distances of the camera in a pair; those that the pipeline was trained on lie between."""


@dataclass(frozen=True)
class Config:
    """What is measured."""

    num_images: int = 16
    """Pictures drawn at each scale, of captions that nothing was trained on."""
    num_pairs: int = 64
    """Pairs of renders."""
    updates: int = 100
    """Of batches of 8."""
    steps: int = 20
    """DDIM steps."""
    guidance: float = 3.0
    """Scale of guidance."""
    seed: int = 0
    """Seed of scenes, noise and weights."""


def main(config: Config) -> dict[float, dict[str, float]]:
    """Train the slider, print and return the mean area and what is kept at each scale."""
    teacher = load_teacher("toyworld")
    pairs = draw_scenes(range(config.num_pairs), config.seed)
    with torch.no_grad():
        near, far = (
            teacher.encode(render([replace(one, distance=away) for one in pairs]).rgb) for away in (NEAR, FAR)
        )
    cond = teacher.prompts([caption(describe(one)) for one in pairs])
    slider = make_slider(teacher.denoiser, rank=4, generator=derived_generator("slider", config.seed))

    def loss(generator: Generator) -> Tensor:
        chosen = torch.randint(config.num_pairs, (8,), generator=generator)
        own = {name: value[chosen] for name, value in cond.items()}
        return pair_loss(slider, near[chosen], far[chosen], own, generator=generator)

    start = time.process_time()
    generator = derived_generator("pairs", config.seed)
    losses = list(train(slider, loss, num_steps=config.updates, learning_rate=1e-3, generator=generator))
    print(f"trained in {time.process_time() - start:.0f} CPU s, loss {losses[0]:.3f} to {losses[-1]:.3f}")
    scenes = draw_scenes(range(HELD_OUT, HELD_OUT + config.num_images), config.seed)
    labels, judge = labels_of([describe(one) for one in scenes]), load_judge()
    asked = teacher.prompts([caption(describe(one)) for one in scenes])
    times = grid(teacher.denoiser.schedule, config.steps)
    rows = [
        torch.randn(teacher.shape, generator=derived_generator("size", config.seed, i)) for i in range(len(scenes))
    ]
    x_t = initial_noise(teacher.denoiser.schedule, torch.stack(rows), float(times[0]))
    table = {}
    with torch.no_grad():
        plain = sample(guided(teacher.denoiser, config.guidance, teacher.negative()), x_t, asked, times=times)
        for scale in SCALES:
            with slider.scaled(scale) as denoiser:
                x0 = sample(guided(denoiser, config.guidance, teacher.negative()), x_t, asked, times=times)
            pictures = teacher.decode(x0).clamp(-1, 1)
            answers = judge(pictures)
            kept = {
                name: float((answers[name].argmax(1) == labels[name]).double().mean())
                for name in ("shape", "colour")
            }
            table[scale] = {
                "area": float(silhouettes(pictures).mean()), **kept, "equal_to_base": float(torch.equal(x0, plain))
            }  # fmt: skip
            print(f"scale {scale:g}: " + ", ".join(f"{key} {value:.3f}" for key, value in table[scale].items()))
    return table


if __name__ == "__main__":
    main(tyro.cli(Config))
