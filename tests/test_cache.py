"""The cache of tensors: what is made once, what counts as the same, what survives damage."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from scorefield.cache import TensorCache, content_key


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache", "encoder 1")


@pytest.fixture
def encoder():
    """Counts what it is asked for."""

    class Encoder:
        def __init__(self):
            self.calls = []

        def __call__(self, contents):
            self.calls.append(list(contents))
            return [{"length": torch.tensor(len(c)), "row": torch.arange(6.0)[len(c) :]} for c in contents]

    return Encoder()


def files(cache):
    return {path: path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_an_entry_comes_back_bit_by_bit(cache, dtype):
    tensor = torch.randn(3, 4).to(dtype)
    cache.store("a", {"x": tensor, "scalar": tensor[0, 0], "empty": tensor[:0], "turned": tensor.T})
    entry = cache.load("a")
    assert {name: value.dtype for name, value in entry.items()} == dict.fromkeys(entry, dtype)
    assert torch.equal(entry["x"], tensor)
    assert torch.equal(entry["scalar"], tensor[0, 0])
    assert torch.equal(entry["turned"], tensor.T)
    assert entry["empty"].shape == (0, 4)


def test_what_is_stored_is_not_tied_to_a_graph_or_to_its_neighbours(cache):
    assert cache.load("a") is None
    assert not cache.holds("a")
    assert not cache.folder.exists()
    batch = torch.randn(2, 8, requires_grad=True) * 2
    cache.store("first", {"x": batch[0]})
    assert not cache.load("first")["x"].requires_grad
    assert cache.path("first").stat().st_size < 300


def test_each_content_is_made_once_and_returned_in_order(cache, encoder):
    rows = cache.fetch(["ab", "a", "ab", "abc"], encoder)
    assert [int(row["length"]) for row in rows] == [2, 1, 2, 3]
    assert encoder.calls == [["ab", "a", "abc"]]
    cache.fetch(["abc", "new", "ab"], encoder)
    assert encoder.calls[1:] == [["new"]]


def test_contents_are_made_in_batches_and_those_before_a_failure_stay(cache, encoder):
    def failing(contents):
        if "e" in contents:
            raise RuntimeError("out of memory")
        return encoder(contents)

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fetch(list("abcde"), failing, batch_size=2)
    assert [list("ab"), list("cd")] == encoder.calls
    assert all(cache.load(c) for c in "abcd")


def test_what_a_folder_cannot_take_is_kept_by_whoever_asked(tmp_path, encoder):
    (tmp_path / "file").write_text("")
    cache, kept = TensorCache(tmp_path / "file" / "cache", "encoder 1"), {}
    with pytest.warns(UserWarning, match="cannot be written"):
        cache.fetch(["ab", "a"], encoder, kept=kept)
    assert [int(row["length"]) for row in cache.fetch(["a", "ab"], encoder, kept=kept)] == [1, 2]
    assert encoder.calls == [["ab", "a"]]


def test_a_changed_content_leaves_every_other_entry_alone(cache, encoder):
    cache.fetch(["a red mug", "a blue mug"], encoder)
    before = files(cache)
    cache.fetch(["a red cup", "a blue mug"], encoder)
    assert encoder.calls[1:] == [["a red cup"]]
    after = files(cache)
    assert before.items() <= after.items()
    assert len(after) == 3


def test_another_identity_shares_nothing(cache, encoder):
    cache.fetch(["a"], encoder)
    other = replace(cache, identity="encoder 2")
    assert other.load("a") is None
    other.fetch(["a"], encoder)
    assert len(encoder.calls) == 2
    assert cache.load("a") is not None


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:-1], lambda data: data[: len(data) // 2],
    lambda data: data[:-8] + bytes(8), lambda data: bytes(len(data)), lambda data: b"not a tensor",
], ids=["empty", "a byte short", "half", "zeroed end", "zeroed", "other file"])  # fmt: skip
def test_a_damaged_entry_is_made_again(cache, encoder, damage):
    cache.fetch(["a", "b"], encoder)
    path = cache.path("a")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="is damaged .*; it is made again"):
        assert not cache.holds("a")
    (row,) = cache.fetch(["a"], encoder)
    assert torch.equal(row["row"], torch.arange(1.0, 6.0))
    assert encoder.calls == [["a", "b"], ["a"]]
    assert path.read_bytes() == whole


def test_entries_of_another_writer_without_a_sum_and_links_in_circles_count_as_missing(cache):
    path = cache.path("a")
    path.parent.mkdir(parents=True)
    save_file({"row": torch.zeros(2)}, path)
    assert cache.load("a") is None
    path.unlink()
    path.symlink_to(path)
    assert cache.load("a") is None


def test_a_write_that_fails_leaves_neither_entry_nor_litter(cache, monkeypatch):
    cache.store("a", {"x": torch.ones(2)})
    before = files(cache)

    def full(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        cache.store("a", {"x": torch.zeros(2)})
    assert files(cache) == before


@pytest.mark.parametrize("broken", ["a file in place of the folder", "a folder in place of the entry"])
def test_a_cache_that_cannot_be_written_warns_once_and_answers_all_the_same(cache, encoder, broken):
    if "entry" in broken:
        cache.path("a").mkdir(parents=True)
    else:
        cache.folder.write_text("")
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        rows = cache.fetch(["a", "ab", "abc"], encoder, batch_size=1)
    assert len(caught) == 1
    assert [int(row["length"]) for row in rows] == [1, 2, 3]
    assert cache.load("a") is None


@pytest.mark.parametrize(("old", "new"), [(b"[2,3]", b"[3,2]"), (b'"F32"', b'"I32"')])
def test_another_shape_or_type_in_the_header_is_damage(cache, old, new):
    cache.store("a", {"x": torch.arange(6.0).reshape(2, 3)})
    path = cache.path("a")
    whole = path.read_bytes()
    assert whole.count(old) == 1
    path.write_bytes(whole.replace(old, new))
    assert cache.load("a") is None


def test_writers_at_the_same_time_leave_whole_entries(cache):
    value = torch.arange(50_000.0)

    def write(_):
        cache.store("a", {"x": value})
        return cache.load("a")

    with ThreadPoolExecutor(8) as pool:
        entries = list(pool.map(write, range(40)))
    assert all(torch.equal(entry["x"], value) for entry in entries)
    assert len(files(cache)) == 1


def test_keys_tell_apart_what_differs():
    contents = [
        ("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), ("",), (), ("", ""),
        (torch.zeros(4),), (torch.zeros(2, 2),), (torch.zeros(2, dtype=torch.float64),), (bytes(16),),
    ]  # fmt: skip
    assert len({content_key(*content) for content in contents}) == len(contents)
    image = torch.rand(3, 4, 4)
    assert content_key(image) == content_key(image.clone())
    assert len({content_key(image), content_key(image + 1e-6), content_key(image.half())}) == 3
