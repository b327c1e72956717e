"""From a request to pictures: functions of models, words and a seed, without a trace of earlier requests.

Pictures are bytes, (h, w) or (h, w, 3). Errors are ``ValueError`` of one line.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorefield.cli import found
from scorefield.models.draw import draw
from scorefield.models.prompts import PromptEncoder
from scorefield.models.teacher import Teacher
from scorefield.play.models import forgetful
from scorefield.solvers import plan

MOST_LETTERS = 500
"""Characters of a prompt. CLIP reads about 300 of them."""

MOST_STEPS = 100


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture, and what it cost.

    Attributes:
        pixels: bytes, (h, w) or (h, w, 3).
        seconds: of the clock, with the prompt's encoding and the autoencoder.
        calls: of the network.
    """

    pixels: np.ndarray
    seconds: float
    calls: int

    def cost(self) -> str:
        """Return the cost in words."""
        return f"{self.calls} network call{'s' * (self.calls > 1)}, {self.seconds:.2f} s"


def draw_picture(
    model: Teacher, words: str, *, seed: int = 0, steps: int = 50, guidance: float = 3.0
) -> Drawn:  # fmt: skip
    """Return the picture of a seed. Models of one shape begin with the same noise.

    Args:
        model: a teacher, or a student, which knows its own steps and has guidance built in.
        words: the prompt; the number of a class for models with classes, nothing for those without either.
        seed: of all noise.
        steps: network calls of a teacher.
        guidance: of a teacher.

    Raises:
        ValueError: words that the model does not know, more steps than its schedule has, or a picture that is
            not finite.
    """
    check_request(seed, steps, guidance)
    began = time.perf_counter()
    with forgetful(model) as own:
        asked, label = own, 0
        if own.texts is not None:
            asked = own.asked([checked_prompt(words)])
        elif own.num_classes:
            label = _label(own, words)
        chosen = None if own.times else plan(own.denoiser.schedule, steps, shift=own.shift)
        scale = 1.0 if own.times or not guidable(model) else guidance
        only, labels = [torch.tensor([0])], torch.tensor([label])
        (image,) = draw(asked, only, labels, seed=seed, guidance=scale, chosen=chosen)
    calls = len(own.times) if chosen is None else chosen.num_calls
    return Drawn(as_pixels(image), time.perf_counter() - began, calls)


def controlled_picture(
    teacher: Teacher, controller: Any, hint: Tensor, prompt: str, *, seed: int = 0, steps: int = 20,
    guidance: float = 3.0,
) -> Drawn:  # fmt: skip
    """Return the picture of a seed that follows a hint, (1, c, h, w) in [0, 1]; errors as :func:`draw_picture`."""
    check_request(seed, steps, guidance)
    began = time.perf_counter()
    with forgetful(teacher) as own:
        image = found("controlnet.play:draw_controlled")(
            own, controller, hint, checked_prompt(prompt), seed=seed, steps=steps, guidance=guidance
        )
    return Drawn(as_pixels(image), time.perf_counter() - began, steps)


def edited_pictures(
    teacher: Teacher, source: str, target: str, *, keep: float = 0.8, seed: int = 0, steps: int = 20,
    guidance: float = 3.0,
) -> tuple[Drawn, Drawn]:  # fmt: skip
    """Return the picture of a prompt and the same under another one, drawn together.

    ``keep`` in [0, 1]: how much of the first stays; see ``edit.play.windows``. Errors as :func:`draw_picture`.
    """
    check_request(seed, steps, guidance)
    if not 0 <= keep <= 1:
        raise ValueError(f"What stays must lie in [0, 1]; got {keep:g}.")
    began = time.perf_counter()
    with forgetful(teacher) as own:
        images = found("edit.play:edit_prompts")(
            own, checked_prompt(source), checked_prompt(target), keep=keep, seed=seed, steps=steps,
            guidance=guidance,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    before, after = (Drawn(as_pixels(image), seconds, steps) for image in images)
    return before, after


def guidable(model: Teacher) -> bool:
    """Return whether a teacher can be guided: it has prompts, or a class that stands for none."""
    return model.texts is not None or bool(model.num_classes and model.null_class)


def choices_of(model: Teacher) -> list[tuple[str, str]]:
    """Return names and numbers of a model's classes; none for a model of prompts, or without classes."""
    if model.texts is not None:
        return []
    names = list(model.facts.get("class_names", ()))
    return [(str(names[i]) if i < len(names) else str(i), str(i)) for i in range(model.num_classes)]


def note_on(model: Teacher, prompt: str) -> str:
    """Return a sentence where the text encoders do not read all of a prompt; empty where they do."""
    if not isinstance(model.texts, PromptEncoder) or not (cut := model.texts.num_cut([prompt])[0]):
        return ""
    return f"The model reads no prompt of this length: the last {cut} tokens were cut."


def checked_prompt(words: Any) -> str:
    """Return a prompt without white space around it. Raises ``ValueError`` for one that is empty or too long."""
    words = words.strip() if isinstance(words, str) else ""
    if not words:
        raise ValueError('The prompt is empty. Type one, such as "a red mug".')
    if len(words) > MOST_LETTERS:
        raise ValueError(f"The prompt has {len(words):,} characters; at most {MOST_LETTERS} are read. Shorten it.")
    return words


def check_request(seed: Any, steps: Any, guidance: Any) -> None:
    """Raise ``ValueError`` for numbers out of range: a page's own sliders cannot send them, others can."""
    if not _is_number(seed) or seed != int(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"The seed must be a whole number of at least 0; got {str(seed)[:40]}.")
    if not _is_number(steps) or steps != int(steps) or not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"Steps must be a whole number in [1, {MOST_STEPS}]; got {str(steps)[:40]}.")
    if not _is_number(guidance) or not 0 <= guidance <= 100:
        raise ValueError(f"Guidance must lie in [0, 100]; got {str(guidance)[:40]}.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # nan compares as false


def _label(model: Teacher, words: Any) -> int:
    known = {number for _, number in choices_of(model)}
    if words not in known:
        raise ValueError(f"Choose one of {len(known)} classes; got {str(words)[:40]!r}.")
    return int(words)


def as_pixels(image: Tensor) -> np.ndarray:
    """Return (c, h, w) in about [-1, 1] as bytes. Raises ``ValueError`` where it is not finite."""
    if not bool(image.isfinite().all()):
        raise ValueError("The model drew no finite numbers. Lower the guidance.")
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
