"""Every method of ``scorefield edit`` on a batch of pictures and prompts."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from edit.ddpm_inversion import invert_ddpm, noise_step
from edit.delta import DDS, PDS, descend
from edit.flow_edit import as_flow, flow_edit
from edit.inversion import invert, negative_prompt, pinned, whiteness
from edit.null_text import EMBEDDING, Fit, null_text
from edit.options import Config, parse_weights
from edit.prompt_to_prompt import LocalBlend, PromptToPrompt, early, late, prompt_to_prompt
from edit.requests import Request
from edit.sdedit import last_times, sdedit
from edit.words import align, tokens_of
from scorefield.denoiser import Cond, Conditioned, Denoiser
from scorefield.grids import grid
from scorefield.guidance import guided
from scorefield.models.attention import Recorder, attention_layers, coarsest
from scorefield.models.prompts import PromptEncoder, Words
from scorefield.models.teacher import Teacher
from scorefield.randomness import derived_generator
from scorefield.sampling import Step, ddim, initial_noise, sample

Guide = Callable[[Denoiser], Denoiser]

BLEND_AFTER = 0.2
"""Share of the steps before a local blend begins, as in the authors' code."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Edits that are made together.

    Attributes:
        teacher: frozen, of prompts.
        config: the options.
        requests: n edits.
        numbers: theirs, which seed their noise.
        x0: (n, *shape) encoded pictures; None: sources are drawn.
        source: condition of the source prompts, batch n.
        target: of the target prompts, batch n.
        times: the sampling grid.
    """

    teacher: Teacher
    config: Config
    requests: tuple[Request, ...]
    numbers: tuple[int, ...]
    x0: Tensor | None
    source: Cond
    target: Cond
    times: Float[Tensor, " n"]

    def generators(self, purpose: str) -> list[torch.Generator]:
        """Return a generator for each edit, the same in any batch."""
        return [derived_generator(self.config.seed, purpose, number) for number in self.numbers]

    @property
    def pictures(self) -> Tensor:
        """The encoded pictures; asked for by methods that need them, which ``check`` has seen to."""
        assert self.x0 is not None
        return self.x0

    def words(self, prompt: str) -> Words:
        """Return a prompt's words. Raises ``ValueError`` for a model that cannot tell them."""
        if not isinstance(self.teacher.texts, PromptEncoder):
            raise ValueError(
                "attention control needs a diffusers model: a prompt's words are told by its tokenizer."
            )
        return self.teacher.texts.words(prompt)


@dataclass(frozen=True, eq=False)
class Made:
    """Result of a batch.

    Attributes:
        source: (n, *shape) of x0; what the method takes for the source.
        target: the edits.
        facts: figures of the whole batch, such as the spread of inverted noise.
        recorder: attention to the prompts, where it was read.
    """

    source: Tensor
    target: Tensor
    facts: dict[str, float] = field(default_factory=dict)
    recorder: Recorder | None = None


def make_batch(
    teacher: Teacher, config: Config, requests: tuple[Request, ...], numbers: tuple[int, ...], x0: Tensor | None
) -> Batch:
    """Return a batch with its conditions and times."""
    source, target = (teacher.prompts([getattr(one, name) for one in requests]) for name in ("source", "target"))
    times = grid(teacher.denoiser.schedule, config.steps, shift=teacher.shift)
    return Batch(teacher, config, requests, numbers, x0, source, target, times)


def needs_attention(config: Config) -> bool:
    """Return whether attention is read or changed; without windows, weights and words to blend it is not."""
    if config.method not in ("prompt-to-prompt", "edit-friendly"):
        return False
    return bool(config.cross_window or config.self_window or config.weights or config.blend)


def has_attention(teacher: Teacher) -> bool:
    """Return whether attention of the model can be read and changed, and the words of its prompts are known."""
    try:
        attention_layers(teacher.denoiser.network)
    except ValueError:
        return False
    return isinstance(teacher.texts, PromptEncoder)


def check_teacher(teacher: Teacher, config: Config) -> None:
    """Raise ``ValueError`` for a model that the method cannot edit with."""
    if teacher.texts is None or teacher.times:
        what = "takes no prompts" if teacher.texts is None else "is a student of few steps"
        raise ValueError(f"--teacher {config.teacher} {what}; expected a text-to-image model, such as toyworld.")
    try:
        grid(teacher.denoiser.schedule, config.steps, shift=teacher.shift)
    except ValueError as error:
        raise ValueError(f"--steps {config.steps} cannot be: {error}") from error
    if needs_attention(config):
        try:
            attention_layers(teacher.denoiser.network)
        except ValueError as error:
            raise ValueError(f"{error} Or pass --cross-window 0 --self-window 0.") from error
    if teacher.embedded is not None and config.negative_prompt and config.inversion != "negative-prompt":
        raise ValueError(
            f"--teacher {config.teacher} is told its scale of guidance and looks at no --negative-prompt. Leave "
            "it out."
        )
    if config.inversion == "null-text":
        what = "is told its scale of guidance" if teacher.embedded is not None else ""
        if EMBEDDING not in teacher.negative(config.negative_prompt):
            what = f"has no {EMBEDDING} to fit"
        elif teacher.norm != "none":
            what = "scales its guided predictions, which the fit does not"
        if what:
            raise ValueError(f"--inversion null-text fits a negative prompt; {config.teacher} {what}. Use direct.")


def run(batch: Batch) -> Made:
    """Return sources and targets of a batch."""
    method = {
        "prompt-to-prompt": of_prompts, "edit-friendly": of_noise_maps, "sdedit": of_sdedit,
        "dds": of_gradients, "pds": of_gradients, "flow-edit": of_flows,
    }[batch.config.method]  # fmt: skip
    with torch.no_grad():
        return method(batch)


def guide_of(batch: Batch, scale: float) -> Guide:
    """Return what puts guidance round a denoiser, as the model's family has it."""
    teacher = batch.teacher
    if teacher.embedded is not None:
        told = {"guidance": torch.tensor([scale], device=teacher.device)}
        return lambda inner: Conditioned(inner, told)
    negative = teacher.negative(batch.config.negative_prompt)
    return lambda inner: guided(inner, scale, negative, norm=teacher.norm)


def of_prompts(batch: Batch) -> Made:
    """Prompt-to-Prompt, of drawn or of inverted noise."""
    config, teacher, guide = batch.config, batch.teacher, guide_of(batch, batch.config.guidance)
    if batch.x0 is None:
        rows = [torch.randn(teacher.shape, generator=one) for one in batch.generators("edit")]
        noise = torch.stack(rows).to(teacher.device)
        x_t = initial_noise(teacher.denoiser.schedule, noise, float(batch.times[0]))
        return _side_by_side(batch, x_t, ddim(), guide, batch.times)
    found = invert(teacher.denoiser, batch.x0, batch.source, times=batch.times, iterations=config.refinements)
    step = pinned(ddim(), found.path) if config.inversion == "direct" else ddim()
    if config.inversion == "negative-prompt":
        guide = partial(negative_prompt, scale=config.guidance, source=batch.source, norm=teacher.norm)
    if config.inversion == "null-text":
        fit = Fit(scale=config.guidance, num_inner=config.inner)
        negative = teacher.negative(config.negative_prompt)
        guide = null_text(teacher.denoiser, found, batch.source, negative, fit).guided
    made = _side_by_side(batch, found.x_t, step, guide, batch.times)
    facts = {"inversion_residual": float(found.residual.max())}
    if found.x_t.ndim == 4:
        white = whiteness(found.x_t, teacher.denoiser.schedule, batch.times[0])
        facts |= {"noise_std": white.std, "noise_correlation": white.correlation}
    return replace(made, facts=facts)


def of_noise_maps(batch: Batch) -> Made:
    """Edit-friendly DDPM inversion, with attention control or without."""
    config = batch.config
    noise = invert_ddpm(
        batch.teacher.denoiser, batch.pictures, batch.source, times=batch.times,
        generator=batch.generators("edit"), eta=config.eta,
    ).since(round(config.skip * len(batch.times)))  # fmt: skip
    guide, path = guide_of(batch, config.guidance), noise.path
    if needs_attention(config):
        return _side_by_side(batch, path.points[0], noise_step(noise), guide, path.times)
    target = sample(
        guide(batch.teacher.denoiser), path.points[0], batch.target, times=path.times, step=noise_step(noise)
    )
    return Made(batch.pictures, target)


def of_sdedit(batch: Batch) -> Made:
    """SDEdit."""
    config = batch.config
    target = sdedit(
        guide_of(batch, config.guidance)(batch.teacher.denoiser), batch.pictures, batch.target, times=batch.times,
        strength=config.strength, generator=batch.generators("edit"),
    )  # fmt: skip
    return Made(batch.pictures, target)


def of_gradients(batch: Batch) -> Made:
    """Descend on DDS or PDS, one picture after the other: times are drawn for each."""
    config, rows = batch.config, list[Tensor]()
    teacher = guide_of(batch, config.guidance)(batch.teacher.denoiser)
    kind: Any = DDS if config.method == "dds" else PDS
    for row, generator in enumerate(batch.generators("edit")):
        image = batch.pictures[row : row + 1]
        source, target = ({name: x[row : row + 1] for name, x in c.items()} for c in (batch.source, batch.target))
        rows.append(
            descend(
                kind(teacher=teacher, source=image, source_cond=source), image, target,
                num_steps=config.iterations, learning_rate=config.learning_rate, generator=generator,
            )
        )  # fmt: skip
    return Made(batch.pictures, torch.cat(rows))


def of_flows(batch: Batch) -> Made:
    """FlowEdit, of a flow or of what was made one."""
    config, denoiser = batch.config, batch.teacher.denoiser
    source, target = (
        as_flow(guide_of(batch, scale)(denoiser)) for scale in (config.source_guidance, config.guidance)
    )
    times = grid(source.schedule, config.steps, shift=batch.teacher.shift)
    made = flow_edit(
        source, target, batch.pictures, batch.source, batch.target, times=last_times(times, 1 - config.skip),
        generator=batch.generators("edit"),
    )  # fmt: skip
    return Made(batch.pictures, made)


def _side_by_side(batch: Batch, x_t: Tensor, step: Step, guide: Guide, times: Tensor) -> Made:
    """Return sources and targets of one batched call, under the windows of the options."""
    config, denoiser, conds = batch.config, batch.teacher.denoiser, [batch.source, batch.target]
    n = len(x_t)
    if not needs_attention(config):
        joined = {name: torch.cat([cond[name] for cond in conds]) for name in batch.source}
        twice = x_t.repeat(2, *[1] * (x_t.ndim - 1))
        source, target = sample(guide(denoiser), twice, joined, times=times, step=step).split(n)
        return Made(source, target)
    prompts = [(batch.words(one.source), batch.words(one.target)) for one in batch.requests]
    weights = parse_weights(config.weights)
    recorder = make_recorder(batch.teacher, 2 * n) if config.blend or config.report else None
    edit = PromptToPrompt(
        (tuple(align(source, target, weights) for source, target in prompts),), n,
        early(times, config.cross_window), early(times, config.self_window), recorder=recorder,
    )  # fmt: skip
    blend = None
    if config.blend:
        tokens = torch.stack(
            [blended(words, config.blend) for side in zip(*prompts, strict=True) for words in side]
        )
        blend = LocalBlend(tokens, n, config.blend_threshold, late(times, BLEND_AFTER))
    source, target = prompt_to_prompt(denoiser, x_t, conds, edit, times=times, guide=guide, step=step, blend=blend)
    return Made(source, target, recorder=recorder)


def make_recorder(teacher: Teacher, rows: int) -> Recorder:
    """Return what reads the attention of a UNet to its prompts, at the coarsest layers at least."""
    size = (teacher.shape[1], teacher.shape[2])
    most = max(Recorder.largest, coarsest(teacher.denoiser.network, size))
    return Recorder(rows, most, size)


def blended(words: Words, wanted: tuple[str, ...]) -> Tensor:
    """Return which tokens are of words to blend; a prompt may lack some of them.

    Raises ``ValueError`` where it lacks all.
    """
    tokens = torch.zeros(words.length)
    for word in wanted:
        with suppress(ValueError):  # the other prompt may have it
            tokens[tokens_of(words, word)] = 1.0
    if not bool(tokens.any()):
        raise ValueError(f"--blend {' '.join(wanted)}: none of these is a word of {' '.join(words.words)!r}.")
    return tokens
