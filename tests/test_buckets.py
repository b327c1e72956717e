"""Buckets of aspect ratios: which shapes there are, which a picture takes, and what a batch draws."""

from collections import Counter

import pytest

from scorefield.data.buckets import Buckets, bucket_shapes, filled, nearest_shape

WIDE, SQUARE, TALL = (12, 20), (16, 16), (20, 12)


def test_shapes_have_about_the_area_of_the_square_and_never_more():
    found = bucket_shapes(1024, 64)
    assert found[0] == (1024, 1024)
    upright = {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344)}
    assert set(found) == upright | {(width, height) for height, width in upright}
    assert all(0.96 * 1024**2 < height * width <= 1024**2 for height, width in found)
    assert bucket_shapes(16, 4) == [SQUARE, WIDE, TALL]
    assert bucket_shapes(64, 64) == [(64, 64)]


def test_a_picture_takes_the_shape_in_which_least_of_it_is_lost():
    shapes = bucket_shapes(1024, 64)
    assert nearest_shape((3000, 3000), shapes) == (1024, 1024)
    assert nearest_shape((4000, 6000), shapes) == (832, 1216), "2 : 3"
    assert nearest_shape((6000, 4000), shapes) == (1216, 832)
    assert nearest_shape((100, 1000), shapes) == (768, 1344), "a panorama loses its ends"


def test_pictures_of_a_shape_without_a_batch_take_the_nearest_that_has_one():
    shapes = [WIDE] * 3 + [SQUARE] * 5 + [TALL] * 4
    assert filled(shapes, 3) == shapes
    assert filled(shapes, 4) == [SQUARE] * 8 + [TALL] * 4
    together = filled([WIDE] * 2 + [SQUARE] * 2 + [TALL] * 4, 4)
    assert together == [SQUARE] * 4 + [TALL] * 4, "two rare ones make a batch"
    assert len(set(filled(shapes, 8))) == 1
    assert len(set(filled(shapes, 100))) == 1
    for batch_size in range(1, 13):
        assert min(Counter(filled(shapes, batch_size)).values()) >= batch_size


NUMBERS = {WIDE: 7, SQUARE: 12, TALL: 5}
SHAPES = [shape for shape, number in NUMBERS.items() for _ in range(number)][::-1]


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_each_sample_is_drawn_once_in_each_epoch_of_its_bucket_in_batches_of_one_shape(batch_size):
    buckets, drawn = Buckets(SHAPES, batch_size), {shape: [] for shape in NUMBERS}
    for number in range(120):
        chosen, epochs = buckets.draw(number, 0)
        (shape,) = {SHAPES[index] for index in chosen.tolist()}
        assert {buckets.shape(index) for index in chosen.tolist()} == {shape}
        assert len(chosen) == len(epochs) == batch_size
        drawn[shape] += zip(chosen.tolist(), epochs.tolist(), strict=True)
    for shape, pairs in drawn.items():
        size, members = NUMBERS[shape], {index for index, one in enumerate(SHAPES) if one == shape}
        for epoch in range(len(pairs) // size):
            part = pairs[epoch * size : (epoch + 1) * size]
            assert {index for index, _ in part} == members, "none is lost, none is drawn twice"
            assert {told for _, told in part} == {epoch}
        assert abs(len(pairs) / (120 * batch_size) - size / len(SHAPES)) < 0.1, "in proportion to its pictures"
    first = [buckets.shape(int(buckets.draw(number, 0)[0][0])) for number in range(24 // batch_size)]
    assert batch_size == 5 or first != sorted(first), "the buckets' batches are mixed"


def test_a_batch_follows_from_its_number_and_the_seed_alone():
    """So that a run that is resumed, and any number of ranks, draw the same."""
    whole = [Buckets(SHAPES, 3).draw(number, 4)[0].tolist() for number in range(60)]
    at_once = Buckets(SHAPES, 3)
    for number in (59, 0, 31, 30, 8, 8, 1, 44):
        assert at_once.draw(number, 4)[0].tolist() == whole[number]
    assert at_once.draw(7, 5)[0].tolist() != whole[7]
    for num_ranks in (2, 4):
        ranks = [Buckets(SHAPES, 3) for _ in range(num_ranks)]
        assert [ranks[number % num_ranks].draw(number, 4)[0].tolist() for number in range(60)] == whole
