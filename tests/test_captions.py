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


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (Attributes("mug", "red", "white", "side"), "a red mug on a white background, side view"),
        (Attributes("letter L", "orange", None, "overhead"), "an orange letter L, overhead view"),
        (Attributes("chair", "blue", "grey"), "a blue chair on a grey background"),
        (Attributes("arrow", "pink"), "a pink arrow"),
    ],
)
def test_captions_read_as_documented(attributes, text):
    assert caption(attributes) == text


def test_the_vocabulary_is_exactly_the_words_of_the_captions():
    used = {word for one in EVERY for word in caption(one).lower().replace(",", " ,").split()}
    assert used == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize(
    "text",
    ["", "red mug", "a red duck", "a teal mug", "a red mug on a red background", "a red mug, top view", "a mug",
     "a red mug side view", "a red mug,", "a red mug, side view, front view", "a red mug!"],
)  # fmt: skip
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match=r"no caption of the toy world: .*Expected, for example, 'a red mug"):
        parse(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("duck", "red"), "shape must be one of"),
        (("mug", "Red"), "colour must be one of"),
        (("mug", "red", "pink"), "background must be one of"),
        (("mug", "red", None, "top"), "view must be one of front, side, back, overhead; got 'top'"),
    ],
)
def test_unknown_attributes_are_refused(words, message):
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


def test_a_scene_is_described_by_all_it_shows():
    scene = Scene(shape="mug", colour="red", background="black", azimuth=-100.0, elevation=20.0)
    assert describe(scene) == Attributes("mug", "red", "black", "side")
    assert parse(caption(describe(scene))) == describe(scene)


def test_letters_that_only_look_alike_are_no_caption():
    with pytest.raises(ValueError, match="no caption"):
        parse("a red \u017fphere")
