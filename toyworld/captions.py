"""Captions of scenes: "a red mug on a white background, side view", and back.

The grammar, whose view and background may be left out::

    caption := article colour shape [" on a " background " background"] [", " view " view"]
    article := "a", or "an" before a vowel
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from toyworld.camera import VIEWS, view_word
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, check_word

WORDS = (
    *("a", "an", "on", "background", "view", ","),
    *(word.lower() for name in (*COLOURS, *BACKGROUNDS, *VIEWS, *SHAPES) for word in name.split()),
)
"""Every word and mark of the captions, in lower case, which is all that tokenizers see."""


@dataclass(frozen=True)
class Attributes:
    """What a caption says.

    Attributes:
        shape: one of ``SHAPES``.
        colour: one of ``COLOURS``.
        background: one of ``BACKGROUNDS``, or None where nothing is said about it.
        view: one of ``VIEWS``, or None.
    """

    shape: str
    colour: str
    background: str | None = None
    view: str | None = None

    def __post_init__(self) -> None:
        check_word("shape", self.shape, SHAPES)
        check_word("colour", self.colour, COLOURS)
        if self.background is not None:
            check_word("background", self.background, BACKGROUNDS)
        if self.view is not None:
            check_word("view", self.view, VIEWS)


def describe(scene: Scene) -> Attributes:
    """All that a caption can say about a scene."""
    return Attributes(scene.shape, scene.colour, scene.background, view_word(scene.azimuth, scene.elevation))


def caption(attributes: Attributes) -> str:
    """The caption of these attributes; :func:`parse` gives them back."""
    article = "an" if attributes.colour[0] in "aeiou" else "a"
    background = f" on a {attributes.background} background" if attributes.background else ""
    view = f", {attributes.view} view" if attributes.view else ""
    return f"{article} {attributes.colour} {attributes.shape}{background}{view}"


def parse(text: str) -> Attributes:
    """The attributes of a caption, in any case of letters, with either article.

    Raises ``ValueError`` for what is no caption.
    """
    found = _CAPTION.fullmatch(" ".join(text.split()))
    if not found:
        raise ValueError(
            f"no caption of the toy world: {text!r}. Expected, for example, 'a red mug on a white background, "
            f"side view', with or without background and view; colours: {', '.join(COLOURS)}; shapes: "
            f"{', '.join(SHAPES)}; backgrounds: {', '.join(BACKGROUNDS)}; views: {', '.join(VIEWS)}."
        )
    words = {name: word.lower() if word else None for name, word in found.groupdict().items()}
    shape = next(shape for shape in SHAPES if shape.lower() == words["shape"])
    return Attributes(shape, str(words["colour"]), words["background"], words["view"])


def _either(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in words)


_CAPTION = re.compile(
    rf"an? (?P<colour>{_either(COLOURS)}) (?P<shape>{_either(SHAPES)})"
    rf"( on a (?P<background>{_either(BACKGROUNDS)}) background)?(, (?P<view>{_either(VIEWS)}) view)?",
    re.IGNORECASE | re.ASCII,
)
