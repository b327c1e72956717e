"""Captions of scenes, such as "a red mug on a white background, side view", and their parser.

The grammar, in which background and view may be left out::

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
"""Every word and punctuation mark of the captions, in lower case, since tokenizers see only that."""


@dataclass(frozen=True)
class Attributes:
    """Attributes that a caption states.

    Attributes:
        shape: One of ``SHAPES``.
        colour: One of ``COLOURS``.
        background: One of ``BACKGROUNDS``, or None if the caption does not state it.
        view: One of ``VIEWS``, or None likewise.

    Raises ``ValueError`` for other words.
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
    """Return all attributes that a caption can state about a scene."""
    return Attributes(scene.shape, scene.colour, scene.background, view_word(scene.azimuth, scene.elevation))


def caption(attributes: Attributes) -> str:
    """Return the caption with these attributes; :func:`parse` is its inverse."""
    article = "an" if attributes.colour[0] in "aeiou" else "a"
    background = f" on a {attributes.background} background" if attributes.background else ""
    view = f", {attributes.view} view" if attributes.view else ""
    return f"{article} {attributes.colour} {attributes.shape}{background}{view}"


def parse(text: str) -> Attributes:
    """Return the attributes of a caption. The case of letters does not matter, nor which article is used.

    Raises ``ValueError`` if ``text`` is not a caption.
    """
    found = _CAPTION.fullmatch(" ".join(text.split()))
    if not found:
        raise ValueError(
            f"{text!r} is not a caption of the toy world. Write one such as 'a red mug on a white background, "
            f"side view'; background and view may be left out. Colours: {', '.join(COLOURS)}. Shapes: "
            f"{', '.join(SHAPES)}. Backgrounds: {', '.join(BACKGROUNDS)}. Views: {', '.join(VIEWS)}."
        )
    words = {name: word.lower() if word else None for name, word in found.groupdict().items()}
    shape = next(shape for shape in SHAPES if shape.lower() == words["shape"])
    return Attributes(shape, str(words["colour"]), words["background"], words["view"])


def unknown_words(text: str) -> list[str]:
    """Return the words of a prompt that are in no caption, each once, as they are written.

    >>> unknown_words("a corgi on a white background")
    ['corgi']
    """
    return list(dict.fromkeys(word for word in re.findall(r"\w+", text) if word.lower() not in WORDS))


def _either(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in words)


_CAPTION = re.compile(
    rf"an? (?P<colour>{_either(COLOURS)}) (?P<shape>{_either(SHAPES)})"
    rf"( on a (?P<background>{_either(BACKGROUNDS)}) background)?(, (?P<view>{_either(VIEWS)}) view)?",
    re.IGNORECASE | re.ASCII,
)
