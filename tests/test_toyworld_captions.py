"""The parser inverts the grammar for every combination of attributes."""

import itertools

import pytest

from toyworld.camera import VIEWS, view_word
from toyworld.captions import WORDS, Attributes, caption, describe, parse
from toyworld.scene import BACKGROUNDS, COLOURS, SHAPES, Scene

EVERY = [Attributes(*words) for words in itertools.product(SHAPES, COLOURS, (None, *BACKGROUNDS), (None, *VIEWS))]


def test_the_parser_inverts_the_grammar():
    assert len(EVERY) == 9 * 8 * 4 * 5
    texts = [caption(attributes) for attributes in EVERY]
    assert len(set(texts)) == len(EVERY)
    assert [parse(text) for text in texts] == EVERY
    assert [parse(text.upper()) for text in texts] == EVERY
    assert [parse("  " + text.replace(" ", "  ")) for text in texts] == EVERY
    scene = Scene(shape="mug", colour="red", background="black", azimuth=-100.0, elevation=20.0)
    assert describe(scene) == Attributes("mug", "red", "black", "side")
    assert caption(describe(scene)) == "a red mug on a black background, side view"
    assert caption(Attributes("letter L", "orange", None, "overhead")) == "an orange letter L, overhead view"


def test_the_vocabulary_is_exactly_the_words_of_the_captions():
    used = {word for one in EVERY for word in caption(one).lower().replace(",", " ,").split()}
    assert used == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize(
    "text",
    ["", "red mug", "a red duck", "a teal mug", "a red mug on a red background", "a red mug, top view", "a mug",
     "a red mug side view", "a red mug,", "a red mug, side view, front view", "a red mug!", "a red \u017fphere"],
)  # fmt: skip
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a caption of the toy world\. Write one such as 'a red mug"):
        parse(text)


def test_unknown_attributes_are_refused():
    for words, message in (
        (("duck", "red"), "shape must be one of"), (("mug", "Red"), "colour must be one of"),
        (("mug", "red", "pink"), "background must be one of"),
        (("mug", "red", None, "top"), "view must be one of front, side, back, overhead; got 'top'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Attributes(*words)


@pytest.mark.parametrize(
    ("azimuth", "elevation", "word"),
    [(0, 0, "front"), (45, 60, "front"), (-45, 20, "front"), (315, 20, "front"), (360, 0, "front"),
     (46, 0, "side"), (90, -20, "side"), (-134, 0, "side"), (270, 0, "side"),
     (135, 0, "back"), (180, 0, "back"), (-180, 0, "back"), (-136, 0, "back"), (540, 0, "back"),
     (0, 61, "overhead"), (180, 90, "overhead"), (90, 60, "side")],
)  # fmt: skip
def test_view_words_are_those_of_text_to_3d(azimuth, elevation, word):
    assert view_word(azimuth, elevation) == word
