from dataclasses import replace
from itertools import product

import pytest
import torch

from scorefield.randomness import Rng, derived_generator, shuffled

RNG = Rng(seed=1, step=2, micro=3, rank=4, index=5)


def draw(generator):
    return torch.randn(8, generator=generator)


def test_the_same_identity_gives_the_same_numbers():
    again = Rng(seed=1, step=2, micro=3, rank=4, index=5)
    assert torch.equal(draw(RNG("noise")), draw(again("noise")))
    assert torch.equal(draw(RNG.shared("noise")), draw(again.shared("noise")))
    assert torch.equal(draw(derived_generator(1, "epoch", 0)), draw(derived_generator(1, "epoch", 0)))


def test_numbers_are_the_same_in_every_process_and_release():
    """Python's hash is salted per process: a checkpoint resumed tomorrow needs numbers that are not."""
    assert Rng(0, 0)("noise").initial_seed() == 3153504133298823726


def test_drawing_does_not_touch_later_draws_or_the_global_generator():
    before = torch.get_rng_state()
    draw(RNG("noise"))
    assert torch.equal(draw(RNG("noise")), draw(RNG("noise")))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("field", ["seed", "step", "micro", "rank"])
def test_every_field_changes_the_numbers(field):
    other = replace(RNG, **{field: getattr(RNG, field) + 1})
    assert not torch.equal(draw(RNG("noise")), draw(other("noise")))


def test_purposes_have_numbers_of_their_own():
    seeds = {RNG(purpose).initial_seed() for purpose in ("noise", "gradient", "fake", "adversarial", "")}
    assert len(seeds) == 5


def test_identities_do_not_run_into_each_other():
    grid = product(range(3), range(12), range(3), range(3))
    identities = [Rng(seed, step, micro, rank) for seed, step, micro, rank in grid]
    seeds = {rng(purpose).initial_seed() for rng in identities for purpose in ("a", "b")}
    assert len(seeds) == 2 * len(identities)


def test_shared_draws_are_equal_on_all_ranks_and_differ_otherwise():
    assert torch.equal(draw(RNG.shared("steps")), draw(replace(RNG, rank=0, index=9).shared("steps")))
    for field in ("seed", "step", "micro"):
        other = replace(RNG, **{field: getattr(RNG, field) + 1})
        assert not torch.equal(draw(RNG.shared("steps")), draw(other.shared("steps")))
    assert not torch.equal(draw(RNG.shared("steps")), draw(RNG.shared("noise")))


def stream(num_items, batch_size, num_ranks, accumulate, num_steps, seed=0):
    """Item numbers in the order of index, as ``scorefield.training.loop.train`` numbers the micro-batches."""
    chunks = {}
    for step, micro, rank in product(range(num_steps), range(accumulate), range(num_ranks)):
        index = (step * accumulate + micro) * num_ranks + rank
        chunks[index] = shuffled(num_items, batch_size, Rng(seed, step, micro, rank, index))
    assert sorted(chunks) == list(range(len(chunks)))
    return torch.cat([chunks[i] for i in range(len(chunks))])


@pytest.mark.parametrize("num_items", [1, 7, 12])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 30])
@pytest.mark.parametrize(("num_ranks", "accumulate"), [(1, 1), (2, 1), (1, 3), (3, 2)])
def test_every_epoch_visits_every_item_exactly_once(num_items, batch_size, num_ranks, accumulate):
    num_steps = -(-3 * num_items // (batch_size * num_ranks * accumulate))
    epochs = stream(num_items, batch_size, num_ranks, accumulate, num_steps)[: 3 * num_items].view(3, num_items)
    assert torch.equal(epochs.sort(1).values, torch.arange(num_items).expand(3, -1))


def test_the_stream_does_not_depend_on_ranks_accumulation_or_batch_size():
    expected = stream(11, 4, 1, 1, 12)
    for batch_size, num_ranks, accumulate, num_steps in ((4, 2, 1, 6), (2, 1, 2, 12), (1, 2, 2, 12), (2, 3, 2, 4)):
        assert torch.equal(stream(11, batch_size, num_ranks, accumulate, num_steps), expected)


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = stream(50, 50, 1, 1, 2).view(2, 50)
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50))
    assert not torch.equal(first, stream(50, 50, 1, 1, 1, seed=1))
