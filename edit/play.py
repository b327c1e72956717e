"""What a page in the browser asks of edits: one picture under two prompts, and one number for how much stays."""

from torch import Tensor

from edit.methods import has_attention
from edit.options import Config
from edit.recipe import check_words, make_edits
from edit.requests import Request
from scorefield.models.teacher import Teacher


def unfit(teacher: Teacher) -> str:
    """Return why the attention of a teacher cannot be edited, in a sentence; empty where it can."""
    if teacher.texts is None:
        return "This model takes no prompts, whose words could be changed."
    if not has_attention(teacher):
        return "Prompt-to-Prompt edits the attention of UNets of diffusers, and this model has none of those."
    return ""


def windows(keep: float) -> tuple[float, float]:
    """Return the windows of attention to the prompt, and of the picture to itself, for a share that stays.

    They pass through the presets: 1 is ``recolour``, 0.8 ``prompt-to-prompt``, 0.4 ``reshape``, 0 no control.

    >>> [tuple(round(share, 2) for share in windows(keep)) for keep in (1.0, 0.8, 0.4, 0.0)]
    [(1.0, 0.8), (0.8, 0.4), (0.4, 0.0), (0.0, 0.0)]
    """
    return keep, min(1.0, max(0.0, keep - 0.4) + max(0.0, keep - 0.8))


def edit_prompts(
    teacher: Teacher, source: str, target: str, *, keep: float, seed: int, steps: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """Return the picture of ``source`` and its edit, (3, h, w) each in [-1, 1].

    Args:
        teacher: one that is not :func:`unfit`.
        source: prompt of the picture that is drawn.
        target: prompt of the edit.
        keep: see :func:`windows`.
        seed: of the noise that both begin with.
        steps: network calls, on both pictures at once.
        guidance: scale of classifier-free guidance.
    """
    cross, own = windows(keep)
    config = Config(
        source=source, target=target, cross_window=cross, self_window=own, seed=seed, steps=steps,
        guidance=guidance, batch_size=1,
    )  # fmt: skip
    requests = (Request(source, target),)
    check_words(teacher, config, requests)
    (edit,) = make_edits(teacher, config, requests, None)
    return edit.source, edit.target
