"""All methods of editing on the same edits of renders, against the render of the truth.

    python benchmarks/edits.py --num-images 8 --seeds 0

For each kind of edit and method: share of edits reached, share with everything else kept (both by the judge), dB
to the true picture, intersection over union of the silhouettes, and seconds an image.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import tyro
from edit_scenes import KINDS, Edits, Measured, averaged, figures, make_edits
from torch import Tensor
from torchvision.utils import make_grid, save_image

from edit.ddpm_inversion import invert_ddpm, noise_step
from edit.delta import DDS, PDS, descend
from edit.flow_edit import as_flow, flow_edit
from edit.inversion import Inversion, invert, negative_prompt, pinned
from edit.null_text import Fit, null_text
from edit.prompt_to_prompt import PromptToPrompt, early, prompt_to_prompt
from edit.sdedit import last_times, sdedit
from edit.words import align
from scorefield.denoiser import Cond, Denoiser
from scorefield.grids import grid
from scorefield.guidance import guided
from scorefield.models.teacher import Teacher, load_teacher
from scorefield.randomness import derived_generator
from scorefield.sampling import Step, ddim, initial_noise, sample
from toyworld.judge import load_judge

WINDOWS = {"colour": (1.0, 0.8), "background": (0.8, 0.4), "shape": (0.4, 0.0), "view": (0.4, 0.0)}
"""Shares of the steps under the source's attention to the prompt and to itself, for each kind of edit."""


@dataclass(frozen=True)
class Config(Measured):
    """What is measured."""

    kinds: tuple[str, ...] = KINDS
    """Kinds of edits."""
    methods: tuple[str, ...] = ()
    """Methods whose names begin so. By default all but null-text, which is slow."""
    guidance: float = 3.0
    """Scale of guidance, except for DDS, which has 7.5."""
    inner: int = 10
    """Updates of null-text inversion at each time."""
    picture: Path | None = None
    """PNG file for two edits of each kind: source, truth, and what the methods of PICTURED made."""


@dataclass(frozen=True, eq=False)
class Case:
    """Edits of one kind with all that a method needs."""

    teacher: Teacher
    edits: Edits
    config: Config
    seed: int
    x0: Tensor
    source: Cond
    target: Cond
    times: Tensor

    @property
    def denoiser(self) -> Any:
        """The teacher's, without guidance."""
        return self.teacher.denoiser

    def guided(self, scale: float | None = None) -> Denoiser:
        """Return the teacher under guidance, by default that of the options."""
        return guided(self.denoiser, self.config.guidance if scale is None else scale, self.teacher.negative())

    @cached_property
    def pivot(self) -> Inversion:
        """Return the inversion at guidance 1, three refinements."""
        return invert(self.denoiser, self.x0, self.source, times=self.times, iterations=3)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return a generator for each image."""
        return [derived_generator(purpose, self.seed, number) for number in range(len(self.x0))]

    def control(self, windows: tuple[float, float]) -> PromptToPrompt:
        """Return Prompt-to-Prompt with these windows."""
        texts: Any = self.teacher.texts
        pairs = zip(*self.edits.prompts, strict=True)
        alignments = tuple(align(texts.words(source), texts.words(target)) for source, target in pairs)
        cross, own = (early(self.times, share) for share in windows)
        return PromptToPrompt((alignments,), len(self.x0), cross, own)

    def controlled(
        self, x_t: Tensor, windows: tuple[float, float], step: Step | None = None,
        guide: Callable[[Denoiser], Denoiser] | None = None, times: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the targets of Prompt-to-Prompt."""
        scale, negative = self.config.guidance, self.teacher.negative()
        return prompt_to_prompt(
            self.denoiser, x_t, [self.source, self.target], self.control(windows),
            times=self.times if times is None else times, step=step,
            guide=guide or (lambda inner: guided(inner, scale, negative)),
        )[1]  # fmt: skip


def make_case(teacher: Teacher, kind: str, seed: int, config: Config) -> Case:
    """Return the edits of a kind, encoded."""
    edits = make_edits(kind, config.num_images, seed)
    source, target = (teacher.prompts(texts) for texts in edits.prompts)
    with torch.no_grad():
        x0 = teacher.encode(edits.source)
    return Case(teacher, edits, config, seed, x0, source, target, grid(teacher.denoiser.schedule, config.steps))


def fresh(case: Case) -> Tensor:
    """Draw the target's prompt from noise of its own."""
    rows = [torch.randn(case.x0.shape[1:], generator=one) for one in case.generators("fresh")]
    x_t = initial_noise(case.denoiser.schedule, torch.stack(rows), float(case.times[0]))
    return sample(case.guided(), x_t, case.target, times=case.times)


def without_control(case: Case) -> Tensor:
    """Draw the target's prompt from the inverted noise."""
    return sample(case.guided(), case.pivot.x_t, case.target, times=case.times)


def strength(share: float) -> Callable[[Case], Tensor]:
    """Return SDEdit at a strength."""

    def method(case: Case) -> Tensor:
        return sdedit(
            case.guided(), case.x0, case.target, times=case.times, strength=share,
            generator=case.generators("sdedit"),
        )  # fmt: skip

    return method


def delta(kind: Any, rate: float, scale: float) -> Callable[[Case], Tensor]:
    """Return 40 steps of gradient descent on DDS or PDS."""

    def method(case: Case) -> Tensor:
        loss = kind(teacher=case.guided(scale), source=case.x0, source_cond=case.source)
        generator = derived_generator("delta", case.seed)
        return descend(loss, case.x0, case.target, num_steps=40, learning_rate=rate, generator=generator)

    return method


def direct(windows: tuple[float, float] | None) -> Callable[[Case], Tensor]:
    """Return Direct Inversion under Prompt-to-Prompt; None: the windows of the edit's kind."""

    def method(case: Case) -> Tensor:
        path = case.pivot.path
        chosen = WINDOWS[case.edits.kind] if windows is None else windows
        return case.controlled(path.points[0], chosen, pinned(ddim(), path))

    return method


def plain_inversion(case: Case) -> Tensor:
    """Prompt-to-Prompt from plain DDIM inversion."""
    return case.controlled(case.pivot.x_t, WINDOWS[case.edits.kind])


def negative(case: Case) -> Tensor:
    """Negative-prompt inversion, without attention control."""
    guide = negative_prompt(case.denoiser, case.config.guidance, case.source)
    return sample(guide, case.pivot.x_t, case.target, times=case.times)


def negative_controlled(case: Case) -> Tensor:
    """Negative-prompt inversion under Prompt-to-Prompt."""
    scale = case.config.guidance
    return case.controlled(
        case.pivot.x_t, WINDOWS[case.edits.kind], guide=lambda inner: negative_prompt(inner, scale, case.source)
    )


def nulls(case: Case) -> Tensor:
    """Null-text inversion under Prompt-to-Prompt."""
    pivot, fit = case.pivot, Fit(scale=case.config.guidance, num_inner=case.config.inner)
    null = null_text(case.denoiser, pivot, case.source, case.teacher.negative(), fit)
    return case.controlled(pivot.x_t, WINDOWS[case.edits.kind], guide=null.guided)


def edit_friendly(skip: float, windows: tuple[float, float] | None) -> Callable[[Case], Tensor]:
    """Return edit-friendly DDPM inversion from a share of the steps on, with or without attention control."""

    def method(case: Case) -> Tensor:
        noise = invert_ddpm(
            case.denoiser, case.x0, case.source, times=case.times, generator=case.generators("ddpm")
        ).since(round(skip * len(case.times)))
        start, times = noise.path.points[0], noise.path.times
        if windows is None:
            return sample(case.guided(), start, case.target, times=times, step=noise_step(noise))
        return case.controlled(start, windows, noise_step(noise), times=times)

    return method


def flow(skip: float) -> Callable[[Case], Tensor]:
    """Return FlowEdit on the rescheduled teacher."""

    def method(case: Case) -> Tensor:
        source, target = as_flow(case.guided(1.5)), as_flow(case.guided(5.5))
        times = last_times(grid(source.schedule, case.config.steps), 1 - skip)
        return flow_edit(
            source, target, case.x0, case.source, case.target, times=times, generator=case.generators("flow")
        )

    return method


METHODS: dict[str, Callable[[Case], Tensor]] = {
    "autoencoder of the truth": lambda case: case.teacher.encode(case.edits.truth), "source": lambda case: case.x0,
    "fresh noise": fresh, "same noise": without_control,
    **{f"SDEdit {share:g}": strength(share) for share in (0.2, 0.3, 0.5, 0.65, 0.8)},
    "DDS": delta(DDS, 0.1, 7.5), "PDS": delta(PDS, 0.02, 7.5),
    "prompt-to-prompt, plain": plain_inversion, "prompt-to-prompt, direct": direct(None),
    "windows 0.8 0.4, direct": direct((0.8, 0.4)),
    "negative-prompt": negative, "negative-prompt, controlled": negative_controlled,
    "edit-friendly 0.36": edit_friendly(0.36, None), "edit-friendly 0": edit_friendly(0.0, None),
    "FlowEdit 0.33": flow(0.33), "null-text": nulls,
}  # fmt: skip


PICTURED = (
    "same noise", "SDEdit 0.5", "DDS", "prompt-to-prompt, direct", "negative-prompt", "edit-friendly 0.36",
    "FlowEdit 0.33",
)  # fmt: skip
"""Methods of the picture, from left to right."""


def chosen(config: Config) -> Iterator[str]:
    """Yield the names of the methods that are asked for."""
    for name in METHODS:
        if any(name.startswith(one) for one in config.methods) or (not config.methods and name != "null-text"):
            yield name


@torch.no_grad()
def main(config: Config) -> dict[str, dict[str, dict[str, float]]]:
    """Print and return the table: kind, method, figure."""
    teacher, judge, table = load_teacher("toyworld"), load_judge(), dict[str, dict[str, dict[str, float]]]()
    lines = list[Tensor]()
    for kind in config.kinds:
        cases = [make_case(teacher, kind, seed, config) for seed in config.seeds]
        table[kind], shown = {}, dict[str, Tensor]()
        for name in chosen(config):
            rows = []
            for case in cases:
                start = time.perf_counter()
                made = METHODS[name](case)
                seconds = (time.perf_counter() - start) / len(case.x0)
                pictures = teacher.decode(made).clamp(-1, 1)
                rows.append({**figures(judge, pictures, case.edits), "seconds": seconds})
                if case is cases[0]:
                    shown[name] = pictures[:2]
            table[kind][name] = averaged(rows)
            print(f"{kind}: {name}: " + ", ".join(f"{key} {x:.2f}" for key, x in table[kind][name].items()))
        first = cases[0].edits
        lines += [
            torch.stack(
                [first.source[row], first.truth[row], *(shown[name][row] for name in PICTURED if name in shown)]
            )
            for row in range(min(2, config.num_images))
        ]
        if config.out is not None:
            config.out.write_text(json.dumps(table, indent=1))
        if config.picture is not None:
            sheet = make_grid(torch.cat(lines), nrow=len(lines[0]), padding=2, pad_value=1.0)
            save_image(sheet, config.picture, normalize=True, value_range=(-1, 1))
    return table


if __name__ == "__main__":
    main(tyro.cli(Config))
