"""Prompt-to-Prompt on pictures that the shipped pipeline draws: swap, refine, re-weight, and what stays untouched.

python benchmarks/edit_attention.py --num-images 16 --seeds 0
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from edit_scenes import Measured, averaged, make_edits, psnr, recoloured
from edits import WINDOWS
from torch import Tensor

from edit.prompt_to_prompt import PromptToPrompt, early, prompt_to_prompt
from edit.words import align
from scorefield.grids import grid
from scorefield.guidance import guided
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.randomness import derived_generator
from scorefield.sampling import initial_noise, sample
from toyworld.captions import caption, describe
from toyworld.control import silhouettes
from toyworld.judge import ANSWERS, NOT_ASKED, Judge, labels_of, load_judge

FACTORS = (-2.0, 0.0, 0.5, 1.0, 3.0)
"""Of the colour's word."""


@dataclass(frozen=True)
class Config(Measured):
    """What is measured."""

    guidance: float = 3.0
    """Scale of guidance."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """What draws sources and targets from the noise of a seed."""

    teacher: Teacher
    config: Config
    x_t: Tensor
    times: Tensor

    def __call__(
        self, sources: Sequence[str], targets: Sequence[Sequence[str]], windows: tuple[float, float],
        weights: Sequence[Mapping[str, float]] = (),
    ) -> list[Tensor]:  # fmt: skip
        """Return latents of the sources and of each list of targets; ``weights`` has a mapping for each
        picture.
        """
        texts: Any = self.teacher.texts
        each = weights or [{} for _ in sources]
        factors = each if len(each) == len(targets) * len(sources) else list(each) * len(targets)
        words = [texts.words(one) for one in sources]
        alignments = tuple(
            tuple(
                align(word, texts.words(target), factors[number * len(words) + row])
                for row, (word, target) in enumerate(zip(words, one, strict=True))
            )
            for number, one in enumerate(targets)
        )
        cross, own = (early(self.times, share) for share in windows)
        negative, scale = self.teacher.negative(), self.config.guidance
        conds = [self.teacher.prompts(list(one)) for one in (sources, *targets)]
        return list(
            prompt_to_prompt(
                self.teacher.denoiser, self.x_t, conds, PromptToPrompt(alignments, len(sources), cross, own),
                times=self.times, guide=lambda inner: guided(inner, scale, negative),
            )
        )  # fmt: skip

    def pictures(self, latents: Tensor) -> Tensor:
        """Return the decoded pictures."""
        return self.teacher.decode(latents).clamp(-1, 1)


def drawn(teacher: Teacher, config: Config, seed: int) -> Drawn:
    """Return what draws from the noise of a seed."""
    times = grid(teacher.denoiser.schedule, config.steps)
    rows = [
        torch.randn(teacher.shape, generator=derived_generator("attention", seed, number))
        for number in range(config.num_images)
    ]
    return Drawn(
        teacher, config, initial_noise(teacher.denoiser.schedule, torch.stack(rows), float(times[0])), times
    )


def answers(judge: Judge, pictures: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the judge's answers to some questions."""
    return {name: judge(pictures)[name].argmax(1) for name in names}


def swaps(draw: Drawn, judge: Judge, kind: str, seed: int) -> dict[str, dict[str, float]]:
    """Return reached, kept, and, of colours, dB to the recoloured source, by windows."""
    edits = make_edits(kind, draw.config.num_images, seed)
    sources, targets = edits.prompts
    labels = labels_of([describe(scene) for scene in edits.after])
    rows = {}
    for windows in ((0.0, 0.0), WINDOWS[kind]):
        source, target = (draw.pictures(x) for x in draw(sources, [targets], windows))
        seen = answers(judge, target, list(ANSWERS))
        right = {name: (seen[name] == labels[name]) | (labels[name] == NOT_ASKED) for name in ANSWERS}
        kept = torch.stack([right[name] for name in ANSWERS if name != kind]).all(0)
        row = {"reached": float(right[kind].double().mean()), "kept": float(kept.double().mean())}
        if kind == "colour":
            pairs = zip(source, edits.before, edits.after, strict=True)
            truth = torch.stack([recoloured(one, before.colour, after.colour) for one, before, after in pairs])
            row["psnr"] = float(psnr(target, truth).mean())
        rows[f"{kind}, windows {windows[0]:g} {windows[1]:g}"] = row
    return rows


def refinement(draw: Drawn, judge: Judge, seed: int) -> dict[str, dict[str, float]]:
    """Return reached and kept where a background is added; kept are the judge's answers on the source itself."""
    after = [describe(scene) for scene in make_edits("background", draw.config.num_images, seed).after]
    sources, targets = [caption(replace(one, background=None)) for one in after], [caption(one) for one in after]
    wanted, rows = labels_of(after)["background"], {}
    others = [name for name in ANSWERS if name != "background"]
    asked = {name: labels_of(after)[name] != NOT_ASKED for name in others}
    for windows in ((0.0, 0.0), (0.4, 0.0), (0.8, 0.0)):
        source, target = (draw.pictures(x) for x in draw(sources, [targets], windows))
        before, seen = answers(judge, source, others), answers(judge, target, list(ANSWERS))
        kept = torch.stack([(seen[name] == before[name]) | ~asked[name] for name in others]).all(0)
        reached = (seen["background"] == wanted).double().mean()
        rows[f"refine, windows {windows[0]:g} {windows[1]:g}"] = {
            "reached": float(reached), "kept": float(kept.double().mean())
        }  # fmt: skip
    return rows


def reweighting(draw: Drawn, judge: Judge, seed: int) -> dict[str, dict[str, float]]:
    """Return the saturation of the solid, and the share of colours that the judge reads, for each factor."""
    scenes = make_edits("colour", draw.config.num_images, seed).before
    texts = [caption(describe(scene)) for scene in scenes]
    factors = [{scene.colour: factor} for factor in FACTORS for scene in scenes]
    made = draw(texts, [texts] * len(FACTORS), (1.0, 0.0), factors)
    source, labels = draw.pictures(made[0]), labels_of([describe(scene) for scene in scenes])
    mask, rows = silhouettes(source), {}
    for factor, latents in zip(FACTORS, made[1:], strict=True):
        pictures = draw.pictures(latents)
        rgb = (pictures + 1) / 2
        spread = (rgb.amax(1, keepdim=True) - rgb.amin(1, keepdim=True)) / rgb.amax(1, keepdim=True).clamp(
            min=1e-3
        )
        right = answers(judge, pictures, ["colour"])["colour"] == labels["colour"]
        rows[f"colour's word times {factor:g}"] = {
            "saturation": float((spread * mask).sum() / mask.sum()), "colour_read": float(right.double().mean()),
            "equal_to_source": float(torch.equal(latents, made[0])),
        }  # fmt: skip
    return rows


def untouched(draw: Drawn, seed: int) -> dict[str, dict[str, float]]:
    """Return whether windows of zero equal plain sampling, and whether the network is as before, bit for bit."""
    sources, targets = make_edits("colour", draw.config.num_images, seed).prompts
    teacher, negative = draw.teacher, draw.teacher.negative()
    cond = teacher.prompts([*sources, *targets])
    guide, twice = guided(teacher.denoiser, draw.config.guidance, negative), draw.x_t.repeat(2, 1, 1, 1)
    plain = sample(guide, twice, cond, times=draw.times)
    zero = torch.cat(draw(sources, [targets], (0.0, 0.0)))
    draw(sources, [targets], (1.0, 0.8))
    after = sample(guide, twice, cond, times=draw.times)
    return {
        "untouched": {
            "zero_windows_equal": float(torch.equal(plain, zero)),
            "network_equal": float(torch.equal(plain, after)),
        }
    }


@torch.no_grad()
def main(config: Config) -> dict[str, dict[str, float]]:
    """Print and return the mean over seeds of each row."""
    teacher, judge, tables = load_teacher("toyworld"), load_judge(), []
    for seed in config.seeds:
        draw = drawn(teacher, config, seed)
        table: dict[str, dict[str, float]] = untouched(draw, seed)
        for kind in ("colour", "background", "shape"):
            table |= swaps(draw, judge, kind, seed)
        table |= refinement(draw, judge, seed) | reweighting(draw, judge, seed)
        tables.append(table)
        print(f"seed {seed} is drawn")
    means = {name: averaged([table[name] for table in tables]) for name in tables[0]}
    for name, row in means.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    if config.out is not None:
        config.out.write_text(json.dumps(means, indent=1))
    return means


if __name__ == "__main__":
    main(tyro.cli(Config))
