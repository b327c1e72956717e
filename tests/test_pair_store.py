"""Teacher pairs are made once: whatever is killed, damaged or shared, the same pairs come back."""

from dataclasses import replace

import pytest
import torch

from distill.pair_store import PairsOf, default_pairs_folder, stored_pairs
from distill.regression import make_pairs
from scorefield import Karras
from scorefield.sampling import grid

NUM, SHARD = 23, 5  # five shards, the last two smaller


@pytest.fixture
def teacher(make_mixture):
    return make_mixture(Karras(0.02, 10.0))


@pytest.fixture
def labels():
    return {"class_labels": torch.arange(NUM) % 2}


@pytest.fixture
def make(teacher, labels):
    def shard(number, count):
        shard.made.append(number)
        if number == shard.dies_at:
            raise KeyboardInterrupt
        return make_pairs(
            teacher, labels, shape=(2,), times=grid(teacher.schedule, 4), rank=number, num_ranks=count, batch=4
        )

    shard.made, shard.dies_at = [], None
    return shard


def same(one, other):
    return (
        torch.equal(one.noise, other.noise)
        and torch.allclose(one.x0, other.x0)
        and all(torch.equal(one.cond[name], other.cond[name]) for name in other.cond)
        and one.cond.keys() == other.cond.keys()
    )


def whole(teacher, labels):
    return make_pairs(teacher, labels, shape=(2,), times=grid(teacher.schedule, 4))


def test_pairs_are_in_the_order_of_their_items_and_made_once(make, teacher, labels, tmp_path):
    for _ in range(2):
        assert same(stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD), whole(teacher, labels))
    assert make.made == [0, 1, 2, 3, 4]
    stored_pairs(make, "another", NUM, tmp_path, shard_size=SHARD)
    assert len(make.made) == 10


def test_a_killed_run_continues(make, teacher, labels, tmp_path):
    make.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD)
    make.dies_at, make.made = None, []
    assert same(stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD), whole(teacher, labels))
    assert make.made == [2, 3, 4]


def test_damaged_shards_are_made_again(make, teacher, labels, tmp_path):
    stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD)
    torn, flipped, empty, *_ = sorted(tmp_path.rglob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-9])
    flipped.write_bytes(flipped.read_bytes()[:-4] + b"\0\0\0\x01")
    empty.write_bytes(b"")
    make.made = []
    assert same(stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD), whole(teacher, labels))
    assert len(set(make.made)) == len(make.made) == 3
    make.made = []
    stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD)
    assert make.made == []


def test_ranks_share_the_work_and_all_read_all(make, teacher, labels, tmp_path):
    """Rank 1 works while rank 0 waits; shards do not depend on how many ranks there are."""
    got = []

    def other():
        got.append(stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD, rank=1, num_ranks=2, wait=finished))

    def finished():
        make.made.append("wait")

    got.append(stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD, num_ranks=2, wait=other))
    assert make.made == [0, 2, 4, 1, 3, "wait"]
    assert all(same(pairs, whole(teacher, labels)) for pairs in got)
    stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD, rank=2, num_ranks=3)
    assert make.made[-1] == "wait"


def test_a_rank_without_the_others_folder_makes_all_and_each_once(make, teacher, labels, tmp_path):
    pairs = stored_pairs(make, "key", NUM, tmp_path, shard_size=SHARD, rank=1, num_ranks=7)
    assert make.made == [1, 0, 2, 3, 4]
    assert same(pairs, whole(teacher, labels))


def test_a_folder_that_cannot_be_written_costs_a_warning(make, teacher, labels, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written"):
        pairs = stored_pairs(make, "key", NUM, tmp_path / "file", shard_size=SHARD)
    assert same(pairs, whole(teacher, labels))
    assert make.made == [0, 1, 2, 3, 4]


def test_nan_is_not_kept(make, tmp_path):
    def broken(number, count):
        pairs = make(number, count)
        return replace(pairs, x0=pairs.x0 * torch.nan)

    with pytest.raises(ValueError, match="images with nan or inf"):
        stored_pairs(broken, "key", NUM, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="at least 1"):
        stored_pairs(make, "key", 0, tmp_path)


def test_whatever_determines_the_pairs_is_in_their_key(labels):
    base = PairsOf(
        teacher="t", cond=labels, times=torch.tensor([2.0, 1.0]), num=NUM, shape=(1, 2, 2), seed=0, guidance=2
    )
    changes = {
        "teacher": "u", "cond": {"class_labels": 1 - labels["class_labels"]}, "times": torch.tensor([2.0, 1.5]),
        "num": 24, "shape": (2, 2, 1), "seed": 1, "guidance": 3.0, "negative": "blur", "solver": "heun",
        "precision": "bf16", "keep": (1.5,),
    }  # fmt: skip
    assert set(changes) == set(vars(base))
    keys = [base.key(), *(replace(base, **{name: value}).key() for name, value in changes.items())]
    keys += [replace(base, cond={"label": labels["class_labels"]}).key(), replace(base, cond={}).key()]
    assert len(set(keys)) == len(keys)
    assert replace(base, guidance=2.0).key() == base.key()


def test_states_on_the_way_survive_the_disk(teacher, labels, tmp_path):
    """In the order of the items, as all else; exactly at the times that a student will ask for."""
    keep = (2.7182818, 0.3)
    options = {"shape": (2,), "times": grid(teacher.schedule, 4), "keep": keep}

    def make(shard, count):
        return make_pairs(teacher, labels, **options, rank=shard, num_ranks=count)

    expected = make_pairs(teacher, labels, **options)
    for source in (make, lambda shard, count: pytest.fail("made again")):
        found = stored_pairs(source, "key", NUM, tmp_path, shard_size=SHARD)
        assert same(found, expected)
        assert found.states.keys() == set(keep)
        for time in keep:
            torch.testing.assert_close(found.states[time], expected.states[time])
    assert found.states[0.3].std() < found.states[2.7182818].std()


def test_pairs_are_kept_beside_the_prompts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_pairs_folder() == tmp_path / "scorefield" / "pairs"
