"""Data sets larger than memory: the same numbers as in memory, from every kind of source, and little memory."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image
from safetensors.torch import load_file

import scorefield.commands.teacher as train_teacher
from scorefield.cache import cache_folder
from scorefield.commands.options import TrainTeacher
from scorefield.data.images import load_images
from scorefield.data.options import DataOptions
from scorefield.data.rows import Cell, Columns, Member
from scorefield.data.sources import read_rows
from scorefield.data.tables import read_data_set
from scorefield.data.threads import FEW, THREADS, in_threads
from scorefield.randomness import Rng, shuffled

GIB = 2**30
NUMBER, SIDE = 24, 18


def png(number, side=SIDE, level=-1):
    content = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(content, "png", compress_level=level)
    return content.getvalue()


def put(folder, kind, pictures, row_group=4):
    """A data set of some kind, of pictures in two classes; the path to it."""
    place = folder / kind
    place.mkdir(parents=True)
    rows = {"image": [{"bytes": data, "path": None} for data in pictures]}
    rows["label"] = [number % 2 for number in range(len(pictures))]
    if kind == "folder":
        for number, data in enumerate(pictures):
            (place / f"{number:03}.png").write_bytes(data)
        lines = [{"file_name": f"{number:03}.png", "label": label} for number, label in enumerate(rows["label"])]
        (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    elif kind == "shards":
        for shard in range(2):
            with tarfile.open(place / f"{shard}.tar", "w") as archive:
                for number in range(shard * len(pictures) // 2, (shard + 1) * len(pictures) // 2):
                    label = str(rows["label"][number]).encode()
                    for ending, data in (("png", pictures[number]), ("cls", label)):
                        info = tarfile.TarInfo(f"{number:03}.{ending}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
    else:
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        data = datasets.Dataset.from_dict(rows, features=features)
        if kind == "saved":
            data.save_to_disk(place, num_shards=2)
        else:
            table = data.with_format("arrow")[:].cast(features.arrow_schema)
            pyarrow.parquet.write_table(table, place / "train.parquet", row_group_size=row_group)
    return str(place)


KINDS = ("folder", "shards", "parquet", "saved")


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    return put(tmp_path_factory.mktemp("data"), request.param, [png(number) for number in range(NUMBER)])


def load(source, num_kept, **options):
    """The images, of which ``num_kept`` are in memory."""
    side = 18 if options.get("crop") == "random" else 16
    limit = num_kept * 3 * side * side / GIB
    return load_images(DataOptions(data=source, size=16, memory_limit=limit, **options))


def rng(index, seed=0):
    return Rng(seed, step=index, index=index)


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("num_kept", [0, 5])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_what_is_decoded_when_drawn_is_what_was_kept_in_memory(source, num_kept, crop):
    whole, streamed = (load(source, most, crop=crop, flip=True) for most in (NUMBER, num_kept))
    assert (len(whole.images), len(streamed.images), len(streamed)) == (NUMBER, num_kept, NUMBER)
    assert streamed.shape == whole.shape
    assert streamed.identity() == whole.identity(), "so a run resumes under another limit"
    kept, drawn = whole.batches(7), streamed.batches(7)
    for index in (0, 1, 2, 3, 4, 9, 1, 20):  # a restart, and a step back
        assert same(kept(rng(index)), drawn(rng(index)))
    assert same(kept(rng(2, seed=5)), drawn(rng(2, seed=5)))
    assert streamed.spread() == whole.spread()


def test_the_spread_is_that_of_all_pixels(source):
    images = load(source, 3)
    pixels = images.batch(torch.arange(NUMBER), torch.Generator()).images
    assert images.spread() == pytest.approx(float(pixels.double().std()), rel=1e-9)
    few = images.batch(images.some(10), torch.Generator()).images
    assert images.spread(10) == pytest.approx(float(few.double().std()), rel=1e-9)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_an_epoch_is_complete_on_any_number_of_ranks_and_after_a_restart(source, num_ranks):
    images = load(source, 0)
    number_of = {row.numpy().tobytes(): n for n, row in enumerate(load(source, NUMBER).images)}
    whole = load(source, NUMBER).batches(3)
    drawn = []
    for steps in (range(2 // num_ranks), range(2 // num_ranks, 8 // num_ranks)):
        ranks = [images.batches(3, num_ranks=num_ranks) for _ in range(num_ranks)]  # new processes
        for step in steps:
            for rank, batches in enumerate(ranks):
                at = Rng(0, step=step, rank=rank, index=step * num_ranks + rank)
                batch = batches(at)
                assert same(batch, whole(at))
                pixels = ((batch.images + 1) * 127.5).round().to(torch.uint8)
                drawn += [number_of[row.numpy().tobytes()] for row in pixels]
    assert sorted(drawn) == list(range(NUMBER))


def test_skipped_images_leave_no_gap(tmp_path):
    source = put(tmp_path, "folder", [png(number) if number % 5 else b"no" for number in range(NUMBER)])
    with pytest.raises(ValueError, match=r"5 of 24 samples .* cannot be used"):
        load(source, 2)
    for num_kept in (0, 2, 19, 30):
        images = load(source, num_kept, on_bad_data="skip")
        assert len(images) == len(images.images) + len(images.unread) == 19
        assert images.identity() == load(source, NUMBER, on_bad_data="skip").identity()
        assert same(images.batches(19)(rng(0)), load(source, NUMBER, on_bad_data="skip").batches(19)(rng(0)))


def test_a_picture_that_was_spoilt_since_is_named(tmp_path):
    source = put(tmp_path, "folder", [png(number) for number in range(4)])
    images = load(source, 0)
    (Path(source) / "002.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"002\.png cannot be read as a picture.* It has changed since the run"):
        images.batches(4)(rng(0))


def test_a_limit_below_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--memory-limit must be at least 0; got -1"):
        load_images(DataOptions(memory_limit=-1.0))


def test_a_teacher_learns_the_same_from_the_disk(tmp_path):
    source = put(tmp_path, "shards", [png(number) for number in range(NUMBER)])
    weights = []
    for name, limit in (("memory", 1.0), ("disk", 0.0)):
        config = TrainTeacher(
            data=source, size=16, memory_limit=limit, out=tmp_path / name, steps=4, batch_size=6, width=8,
            depth=1, flip=True, save_every=2,
        )  # fmt: skip
        if name == "disk":  # half of it with all in memory: the limit is no part of what a checkpoint belongs to
            train_teacher.main(dataclasses.replace(config, memory_limit=1.0))
            for after in (tmp_path / name / "checkpoints").glob("*4"):
                for file in after.iterdir():
                    file.write_bytes(b"")
        weights.append(load_file(train_teacher.main(config) / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


PROGRAM = """
import sys, torch
from pathlib import Path
from scorefield.data.images import load_images
from scorefield.data.options import DataOptions
from scorefield.randomness import Rng

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

def epoch(source, limit):
    images = load_images(DataOptions(data=source, memory_limit=limit))
    batches = images.batches(10)
    for index in range(len(images) // 10):
        batches(Rng(0, step=index, index=index))

small, large, limit = sys.argv[1], sys.argv[2], float(sys.argv[3])
epoch(small, 0.01)
before = peak()
epoch(large, limit)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_memory_does_not_grow_with_the_data_set(tmp_path, kind):
    """Pictures of 240 MB as pixels: read as they are drawn they take a fraction, in memory all of it."""
    pictures = [png(number, side=500, level=0) for number in range(40)] * 8
    small = put(tmp_path / "small", kind, pictures[:40], row_group=40)
    large = put(tmp_path / "large", kind, pictures, row_group=40)
    # What is freed goes back to the system at once, so that only what is held counts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def grown(limit):
        command = [sys.executable, "-c", PROGRAM, small, large, str(limit)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(result.stdout)

    streamed, whole = grown(0.01), grown(1.0)
    assert streamed < 60 < 180 < whole, (streamed, whole)


@pytest.mark.slow
def test_a_row_takes_a_few_hundred_bytes(tmp_path):
    """Millions of them have to fit; with a ``Path`` and a dictionary each it was twice as much."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number in range(3000):
            for ending, data in (("png", b"x"), ("txt", b"a red mug on a table, %d" % number), ("cls", b"3")):
                info = tarfile.TarInfo(f"{number:08}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    read_rows(tmp_path / "0.tar")
    tracemalloc.start()
    try:
        listing = read_rows(tmp_path / "0.tar")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert listing.rows[2999].caption == "a red mug on a table, 2999"
    assert held / 3000 < 450
    assert peak / 3000 < 1200


# Tables of datasets, read where they lie


def of(data, columns=None):
    return read_data_set(data, "data", columns or Columns(), Path())


def pictured(pictures):
    features = datasets.Features(text=datasets.Value("string"), image=datasets.Image())
    cells = [data if data is None else {"bytes": data, "path": None} for data in pictures]
    rows = {"text": [str(number) for number in range(len(pictures))], "image": cells}
    return datasets.Dataset.from_dict(rows, features=features)


def test_pictures_of_a_saved_table_are_read_by_their_place_in_its_file(tmp_path):
    pictures = [png(number) if number % 3 else None for number in range(10)]
    pictured(pictures).save_to_disk(tmp_path / "saved", num_shards=3)
    rows = of(datasets.load_from_disk(str(tmp_path / "saved"))).rows
    assert {type(row.image) for row in rows} == {Member, type(None)}
    assert [row.image and row.image.read() for row in rows] == pictures
    assert [row.name for row in rows[:2]] == ["data[0]", "data[1] 'image'"]


@pytest.mark.parametrize("change", [
    lambda data: data.select([4, 1, 7]), lambda data: data.select(range(2, 6)), lambda data: data.shuffle(seed=0),
    lambda data: datasets.concatenate_datasets([data.select(range(5, 10)), data.select(range(5))]),
    lambda data: data.filter(lambda row: int(row["text"]) > 3), lambda data: data.flatten_indices(),
])  # fmt: skip
def test_parts_of_a_table_are_their_own_rows(tmp_path, change):
    pictures = [png(number) for number in range(10)]
    pictured(pictures).save_to_disk(tmp_path / "saved")
    rows = of(change(datasets.load_from_disk(str(tmp_path / "saved")))).rows
    assert rows
    assert [row.image.read() for row in rows] == [pictures[int(row.caption)] for row in rows]


def test_pictures_in_memory_are_cells():
    pictures = [png(0), None, png(2)]
    rows = of(pictured(pictures)).rows
    assert {type(row.image) for row in rows} == {Cell, type(None)}
    assert [row.image and row.image.read() for row in rows] == pictures


def test_paths_and_plain_bytes_in_tables(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    features = datasets.Features(image=datasets.Image(), depth=datasets.Value("large_binary"))
    cells = [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": png(2), "path": "b.png"}]
    data = datasets.Dataset.from_dict({"image": cells, "depth": [png(3), png(4)]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    rows = of(datasets.load_from_disk(str(tmp_path / "saved")), Columns(maps=("depth",))).rows
    assert [row.image.read() for row in rows] == [png(1), png(2)]
    assert [row.maps["depth"].read() for row in rows] == [png(3), png(4)]


def test_a_data_set_that_was_downloaded_is_read_by_its_name_without_a_network(tmp_path, monkeypatch):
    """As ``datasets`` keeps a set of the Hub: its pictures are read where they lie."""
    pictured([png(number) for number in range(5)]).to_parquet(tmp_path / "train.parquet")
    builder = Parquet(cache_dir=str(tmp_path / "hub"), dataset_name="set", hash="0" * 40,
                      data_files={"train": str(tmp_path / "train.parquet")})  # fmt: skip
    builder.download_and_prepare()
    kept = tmp_path / "hub" / "someone___set" / "default" / "0.0.0"
    kept.mkdir(parents=True)
    os.rename(builder._output_dir, kept / ("0" * 40))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    for constants in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was asked"))
    rows = read_rows("someone/set").rows
    assert {type(row.image) for row in rows} == {Member}
    assert [(row.caption, row.image.read()) for row in rows] == [(str(n), png(n)) for n in range(5)]


# Parquet files, unpacked once


def a_parquet_file(path, number=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = path.parent / "plain"  # the library itself takes some names for addresses
    pictured([png(each) for each in range(number)]).to_parquet(plain)
    return plain.rename(path)


def pictures_of(path):
    return [row.image.read() for row in read_rows(path).rows]


def copies():
    return sorted(cache_folder().glob("tables/*"))


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["rows[1].parquet", "a*.parquet", "hf:%s.parquet", "b::c.parquet"])
def test_the_name_of_a_parquet_file_is_no_pattern_and_no_address(tmp_path, own_tables, monkeypatch, name):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was asked"))
    path = a_parquet_file(tmp_path / "data" / name)
    assert pictures_of(path) == pictures_of(path.parent) == [png(number) for number in range(6)]
    monkeypatch.chdir(path.parent)
    assert len(pictures_of(name)) == 6


def test_a_parquet_file_is_unpacked_once_and_again_when_it_changes(tmp_path, own_tables, monkeypatch):
    path = a_parquet_file(tmp_path / "rows.parquet")
    pictures_of(path)
    (first,) = copies()
    made = first.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert len(pictures_of("rows.parquet")) == 6
    assert copies() == [first]
    assert first.stat().st_mtime_ns == made
    a_parquet_file(path, number=4)
    assert pictures_of(path) == [png(number) for number in range(4)]
    assert len(copies()) == 2


def test_rows_of_several_parquet_files_are_in_the_order_of_their_names(tmp_path, own_tables):
    for number in range(3):
        pictured([png(number), None]).to_parquet(tmp_path / "data" / f"{number}.parquet")
    rows = read_rows(tmp_path / "data").rows
    assert [row.image and row.image.read() for row in rows] == [png(0), None, png(1), None, png(2), None]


def test_a_parquet_file_that_does_not_fit_on_the_disk_is_refused(tmp_path, own_tables, monkeypatch):
    path = a_parquet_file(tmp_path / "rows.parquet")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"rows\.parquet has [\d,]+ bytes unpacked; .*tables has 100 free"):
        read_rows(path)
    assert not copies()


def test_a_parquet_file_that_is_cut_leaves_no_copy(tmp_path, own_tables):
    path = a_parquet_file(tmp_path / "rows.parquet")
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be loaded as a data set"):
        read_rows(path)
    assert not copies()


# Threads and orders


def within(seconds, do):
    """What ``do`` returns; fails where it does not return."""
    found = []
    thread = threading.Thread(target=lambda: found.append(do()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it waits for ever"
    return found[0]


def test_threads_that_hand_on_work_do_not_wait_for_each_other():
    """Of every level, as deep as one likes, and more of them than there are threads."""

    def work(depth):
        if not depth:
            return 1
        number = FEW.number + 1 if depth == 2 else THREADS + 1
        inner = FEW.run(lambda: sum(in_threads(work, [depth - 1] * number)))
        return inner + sum(in_threads(work, [depth - 1] * number))

    assert within(60, lambda: sum(in_threads(work, [2] * (2 * THREADS + 2)))) == 18 * 2 * (FEW.number + 1) * 18


def test_a_process_that_was_forked_has_threads_of_its_own():
    assert list(in_threads(abs, [-1, -2])) == [1, 2]
    child = os.fork()
    if not child:
        os._exit(0 if list(in_threads(abs, [-3])) == [3] and FEW.run(lambda: True) else 1)
    assert within(60, lambda: os.waitpid(child, 0)[1]) == 0


def test_of_an_error_nothing_is_read_that_comes_long_after_it():
    begun = []

    def read(number):
        begun.append(number)
        if number == 3:
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        list(in_threads(read, range(1000)))
    assert len(begun) <= 4 + 2 * THREADS + 2


def test_threads_are_a_few_items_ahead_and_never_more():
    begun = []
    results = in_threads(lambda number: begun.append(number) or number, range(1000))
    for number in range(100):
        assert next(results) == number
        assert len(begun) <= number + 2 * THREADS + 2
    assert list(results) == list(range(100, 1000))


def test_an_order_that_is_kept_cannot_be_changed_by_whoever_asked():
    first = shuffled(10, 4, rng(0))
    first.zero_()
    assert torch.equal(shuffled(10, 4, rng(0)), shuffled(10, 10, rng(0))[:4])
    assert sorted(shuffled(10, 10, rng(0)).tolist()) == list(range(10))
