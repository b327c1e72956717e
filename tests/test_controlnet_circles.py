"""The circles: exact truth, the published description, index to sample on every machine."""

import math

import pytest
import torch

from controlnet.circles import (
    CENTRES,
    COLOURS,
    HELD_OUT,
    RADII,
    Circle,
    Circles,
    colour_values,
    draw_circle,
    masks,
    outlines,
    pictures,
)
from toyworld.circles import encode_captions

TWO = [Circle(0.5, 0.5, 0.25, "red", "blue"), Circle(0.25, 0.625, 0.3, "pale golden rod", "old lace")]


def test_there_are_140_names_and_all_are_css_colours():
    assert len(COLOURS) == len(set(COLOURS)) == 140
    values = ((colour_values(COLOURS) + 1) * 127.5).round().int().tolist()
    known = dict(zip(COLOURS, values, strict=True))
    assert known["red"] == [255, 0, 0]
    assert known["pale golden rod"] == [238, 232, 170]
    assert known["aqua"] == known["cyan"]
    assert TWO[1].caption == "pale golden rod circle with old lace background"


@pytest.mark.parametrize("size", [16, 33])
def test_a_mask_is_what_lies_within_the_radius(size):
    made = masks(TWO, size)
    for circle, mask in zip(TWO, made[:, 0], strict=True):
        for row in range(size):
            for column in range(size):
                away = math.hypot(column + 0.5 - size * circle.x, row + 0.5 - size * circle.y)
                assert mask[row, column] == (away <= size * circle.radius)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_an_outline_is_closed_thin_and_where_the_mask_ends(size):
    made, inside = outlines(TWO[:1], size)[0, 0], masks(TWO[:1], size)[0, 0]
    assert set(made.unique().tolist()) == {0.0, 1.0}
    stroke = max(1.0, 5 / 512 * size)
    assert float(made.sum()) == pytest.approx(2 * math.pi * 0.25 * size * stroke, rel=0.13)
    # No way from the centre to the corner but across it.
    reached = torch.zeros(1, 1, size, size)
    reached[0, 0, size // 2, size // 2] = 1
    for _ in range(size):
        cross = [torch.nn.functional.max_pool2d(reached, k, 1, p) for k, p in (((3, 1), (1, 0)), ((1, 3), (0, 1)))]
        reached = torch.maximum(*cross) * (1 - made)
    assert reached[0, 0, 0, 0] == 0
    assert (inside * (1 - made) - reached[0, 0]).abs().sum() <= 0.5 * made.sum()


def test_samples_are_bytes_of_two_flat_colours_the_right_way_round():
    samples = Circles(32, 5, start=HELD_OUT)
    circle, sample = samples.circle(2), samples.load(2)
    picture, mask = pictures([circle], 32)[0], masks([circle], 32)[0, 0] > 0
    assert torch.equal(picture[:, mask].unique(dim=1)[:, 0], colour_values([circle.colour])[0])
    assert torch.equal(picture[:, ~mask].unique(dim=1)[:, 0], colour_values([circle.background])[0])
    assert picture.flatten(1).unique(dim=1).shape[1] == 2
    assert {t.dtype for t in sample.values()} == {torch.uint8}
    assert torch.allclose(sample["image"] / 127.5 - 1, picture, atol=1e-6)
    assert torch.equal(sample["outline"] / 255, outlines([circle], 32)[0])
    assert torch.equal(sample["mask"] / 255, masks([circle], 32)[0])
    assert samples.caption(2) == circle.caption
    assert (len(samples), samples.kinds.keys()) == (5, sample.keys())


def test_a_sample_follows_from_seed_and_index():
    """Fixed numbers: another version or machine must give the same data set."""
    assert draw_circle(0) == draw_circle(0)
    assert len({draw_circle(index, seed) for index in range(50) for seed in range(2)}) == 100
    assert Circles(32, start=7).circle(3) == draw_circle(10)
    assert Circles(512).circle(3) == Circles(32).circle(3)
    names = {Circles(size, 5, seed).identity(i) for size in (16, 32) for seed in (0, 1) for i in range(5)}
    assert len(names) == 20


def test_draws_fill_the_published_ranges_uniformly():
    circles = [draw_circle(index) for index in range(4000)]
    for name, (low, high) in {"x": CENTRES, "y": CENTRES, "radius": RADII}.items():
        values = torch.tensor([getattr(circle, name) for circle in circles])
        assert low <= values.min() <= values.max() <= high
        assert ((torch.histc(values, 8, low, high) - 500).abs() < 5 * 500**0.5).all()
    for name in ("colour", "background"):
        counts = torch.tensor([COLOURS.index(getattr(c, name)) for c in circles]).bincount(minlength=140)
        assert 5 < counts.min() < counts.max() < 70
    assert 5 < sum(c.colour == c.background for c in circles) < 70  # no contrast rule


def test_a_few_colours_that_always_differ():
    few = ("red", "lime", "blue")
    samples = Circles(16, 300, colours=few, distinct=True)
    drawn = [samples.circle(index) for index in range(300)]
    pairs = torch.tensor([few.index(c.colour) * 3 + few.index(c.background) for c in drawn]).bincount(minlength=9)
    assert pairs[[0, 4, 8]].sum() == 0
    assert pairs[[1, 2, 3, 5, 6, 7]].min() > 25


def test_captions_become_two_tokens():
    captions = ["red circle with pale green background", "", "lime circle with red background"]
    states = encode_captions(captions)["encoder_hidden_states"]
    assert states.shape == (3, 2, 2 * len(COLOURS))
    assert states.sum((1, 2)).tolist() == [2, 0, 2]
    red = COLOURS.index("red")
    assert states[0, 0, red] == states[2, 1, len(COLOURS) + red] == 1
    with pytest.raises(ValueError, match="expected a caption such as"):
        encode_captions(["red square with blue background"])


@pytest.mark.parametrize(("arguments", "message"), [
    ({"size": 4}, "need size >= 8"), ({"num_samples": 0}, "need size >= 8"), ({"start": -1}, "need size >= 8"),
    ({"colours": ("red",)}, "need at least 2 colours"), ({"colours": ("red", "rouge")}, "need at least 2 colours"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Circles(**arguments)
    with pytest.raises(IndexError, match="sample 5 of 5"):
        Circles(16, 5).circle(5)
