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

TWO = [Circle(0.5, 0.5, 0.25, "red", "blue"), Circle(0.25, 0.625, 0.3, "pale golden rod", "old lace")]


def test_there_are_140_names_and_all_are_css_colours():
    assert len(COLOURS) == len(set(COLOURS)) == 140
    values = ((colour_values(COLOURS) + 1) * 127.5).round().int().tolist()
    known = dict(zip(COLOURS, values, strict=True))
    assert known["red"] == [255, 0, 0]
    assert known["pale golden rod"] == [238, 232, 170]
    assert known["light golden rod yellow"] == [250, 250, 210]
    assert known["burly wood"] == [222, 184, 135]
    assert known["aqua"] == known["cyan"]


def test_captions_are_those_of_the_tutorial():
    assert TWO[1].caption == "pale golden rod circle with old lace background"


@pytest.mark.parametrize("size", [16, 33, 64])
def test_a_mask_is_what_lies_within_the_radius(size):
    made = masks(TWO, size)
    for circle, mask in zip(TWO, made[:, 0], strict=True):
        for row in range(size):
            for column in range(size):
                away = math.hypot(column + 0.5 - size * circle.x, row + 0.5 - size * circle.y)
                assert mask[row, column] == (away <= size * circle.radius)


def test_area_and_centre_of_a_mask_are_the_circles():
    size = 256
    for circle, mask in zip(TWO[:1], masks(TWO, size)[:, 0], strict=False):
        rows, columns = mask.nonzero().T + 0.5
        assert float(mask.sum()) == pytest.approx(math.pi * (circle.radius * size) ** 2, rel=5e-3)
        assert float(rows.mean()) / size == pytest.approx(circle.y, abs=1e-3)
        assert float(columns.mean()) / size == pytest.approx(circle.x, abs=1e-3)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
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


def test_pictures_hold_two_flat_colours_the_right_way_round():
    made = pictures(TWO, 32)
    for circle, picture, mask in zip(TWO, made, masks(TWO, 32)[:, 0] > 0, strict=True):
        assert torch.equal(picture[:, mask].unique(dim=1)[:, 0], colour_values([circle.colour])[0])
        assert torch.equal(picture[:, ~mask].unique(dim=1)[:, 0], colour_values([circle.background])[0])
        assert picture.flatten(1).unique(dim=1).shape[1] == 2


def test_a_sample_follows_from_seed_and_index():
    # Fixed numbers: another version or machine must give the same data set.
    first = draw_circle(0)
    assert first == draw_circle(0)
    assert len({draw_circle(index, seed) for index in range(50) for seed in range(2)}) == 100
    assert Circles(32, start=7).circle(3) == draw_circle(10)
    assert Circles(512).circle(3) == Circles(32).circle(3)


def test_draws_fill_the_published_ranges_uniformly():
    circles = [draw_circle(index) for index in range(4000)]
    for values, (low, high) in (
        ([c.x for c in circles], CENTRES), ([c.y for c in circles], CENTRES), ([c.radius for c in circles], RADII)
    ):  # fmt: skip
        values = torch.tensor(values)
        assert low <= values.min()
        assert values.max() <= high
        counts = torch.histc(values, 8, low, high)
        assert ((counts - 500).abs() < 5 * 500**0.5).all()
    colours = torch.tensor([COLOURS.index(c.colour) for c in circles]).bincount(minlength=140)
    backgrounds = torch.tensor([COLOURS.index(c.background) for c in circles]).bincount(minlength=140)
    for counts in (colours, backgrounds):
        assert counts.min() > 5
        assert counts.max() < 70
    alike = sum(c.colour == c.background for c in circles)
    assert 5 < alike < 70  # no contrast rule


def test_a_few_colours_that_always_differ():
    few = ("red", "lime", "blue")
    samples = Circles(16, 300, colours=few, distinct=True)
    drawn = [samples.circle(index) for index in range(300)]
    pairs = torch.tensor([few.index(c.colour) * 3 + few.index(c.background) for c in drawn]).bincount(minlength=9)
    assert pairs[[0, 4, 8]].sum() == 0
    assert pairs[[1, 2, 3, 5, 6, 7]].min() > 25


def test_samples_are_bytes_of_what_the_functions_draw():
    samples = Circles(32, 5, start=HELD_OUT)
    assert len(samples) == 5
    circle, sample = samples.circle(2), samples.load(2)
    channels = {"image": 3, "outline": 1, "mask": 1}
    assert {name: tuple(t.shape) for name, t in sample.items()} == {n: (c, 32, 32) for n, c in channels.items()}
    assert {t.dtype for t in sample.values()} == {torch.uint8}
    assert torch.allclose(sample["image"] / 127.5 - 1, pictures([circle], 32)[0], atol=1e-6)
    assert torch.equal(sample["outline"] / 255, outlines([circle], 32)[0])
    assert torch.equal(sample["mask"] / 255, masks([circle], 32)[0])
    assert samples.caption(2) == circle.caption
    assert (
        len({Circles(size, 5, seed).identity(i) for size in (16, 32) for seed in (0, 1) for i in range(5)}) == 20
    )
    with pytest.raises(IndexError, match="sample 5 of 5"):
        samples.circle(5)


@pytest.mark.parametrize("arguments", [{"size": 4}, {"num_samples": 0}, {"start": -1}])
def test_settings_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match="need size >= 8"):
        Circles(**arguments)


@pytest.mark.parametrize("colours", [("red",), ("red", "rouge")])
def test_colours_without_a_name_are_refused(colours):
    with pytest.raises(ValueError, match="need at least 2 colours"):
        Circles(colours=colours)
