"""Rows of every kind of source: what is used, what is counted, and what is said of lines that cannot be used."""

import gzip
import io
import json
import os
import struct
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from scorefield.data.pictures import open_image
from scorefield.data.rows import Columns, Member, keep_good
from scorefield.data.sources import PICTURES, read_rows


def content(number=0, kind="png", **options):
    data, pixels = io.BytesIO(), np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content() if data is None else data.encode() if isinstance(data, str) else data)
    return path


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def said(listing):
    """What the rows hold: the name of each picture's file, its caption and its label."""
    names = [row.image and row.image.name.rpartition("/")[2] for row in listing.rows]
    return [(name, row.caption, row.label) for name, row in zip(names, listing.rows, strict=True)]


ROWS = [{"file_name": "a.png", "text": "a mug", "label": 1}, {"file_name": "b.png", "text": "a cone", "label": 0}]
READ = [("a.png", "a mug", 1), ("b.png", "a cone", 0)]
AS_TEXT = [("a.png", "a mug", "1"), ("b.png", "a cone", "0")]
NO = {"a.png": ..., "b.png": ...}
CSV = "file_name,text,label\na.png,a mug,1\nb.png,a cone,0\n"


@pytest.mark.parametrize(("files", "expected", "note"), [
    ({"metadata.csv": CSV}, AS_TEXT, ""), ({"metadata.jsonl": lines(*ROWS)}, READ, ""),
    ({"train/metadata.jsonl": lines(*ROWS), "train/a.png": None, "train/b.png": None, **NO}, READ, ""),
    ({"metadata.jsonl": lines(*ROWS), "metadata.csv": CSV}, READ, "passed over: 1 .csv files"),
    ({"metadata.jsonl": lines(*ROWS), "c.png": None}, READ,
     "passed over: 1 pictures that no row of metadata.jsonl uses"),
    ({"a.txt": "a mug\n", "notes.txt": "x", "x.svg": "x"}, [("a.png", "a mug", None), ("b.png", None, None)],
     "passed over: 1 .svg files, 1 .txt files without a picture"),
    ({**NO, "pairs.jsonl": lines(*ROWS)}, READ, ""),
    ({**NO, "x.txt": "a mug\n\na cone"}, [(None, "a mug", None), (None, "a cone", None)], ""),
    ({**NO, "rows.json": json.dumps(ROWS)}, READ, ""),
    ({**NO, "train.csv": CSV, "test.csv": CSV}, AS_TEXT,
     "passed over: 1 files of other parts than train"),
    ({"metadata.jsonl": lines({**ROWS[0], "file_name": "train/a.png"}, {**ROWS[1], "file_name": "test/b.png"}),
      **NO, "train/a.png": None, "test/b.png": None}, READ[:1],
     "passed over: 1 pictures that no row of metadata.jsonl uses, 1 rows of other parts than train/"),
])  # fmt: skip
def test_folders_are_read_as_they_are_described(tmp_path, files, expected, note):
    for name, data in {"a.png": None, "b.png": None, **files}.items():
        if data is not ...:
            put(tmp_path / name, data)
    listing = read_rows(tmp_path)
    assert said(listing) == expected
    assert listing.note == note


def test_of_train_and_test_folders_the_former_are_read(tmp_path):
    for name in ("train/cat/0.png", "train/dog/0.png", "test/cat/1.png", "README.md"):
        put(tmp_path / name)
    listing = read_rows(tmp_path)
    assert said(listing) == [("0.png", None, "cat"), ("0.png", None, "dog")]
    assert listing.note == "train/ is used, and not README.md, test/"
    (tmp_path / "train").rename(tmp_path / "val")
    with pytest.raises(ValueError, match=r"has the parts test, val, and no train. Pass one of them: .*/test"):
        read_rows(tmp_path)
    put(tmp_path / "boat" / "0.png")
    assert len(read_rows(tmp_path).rows) == 4  # words of splits beside others are classes


@pytest.mark.parametrize("ending", sorted(PICTURES - {".pgm"}))
def test_every_ending_is_read(tmp_path, ending):
    kinds = {".jpg": "jpeg", ".jpe": "jpeg", ".jfif": "jpeg", ".tif": "tiff", ".jp2": "jpeg2000"}
    put(tmp_path / f"a{ending.upper()}", content(kind=kinds.get(ending, ending[1:])))
    assert open_image(read_rows(tmp_path).rows[0].image.read()).size == (8, 8)


def test_links_are_followed_and_not_in_circles(tmp_path):
    put(tmp_path / "store" / "1.png")
    put(tmp_path / "data" / "cat" / "0.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    put(tmp_path / "data" / ".hidden")
    listing = read_rows(tmp_path / "data")
    assert said(listing) == [("0.png", None, "cat"), ("1.png", None, "dog")]
    links = "1 links to folders that are read already, or hold all of this"
    assert listing.note == f"passed over: 1 hidden files or folders, {links}, 1 links to nothing"


def test_links_to_more_paths_than_can_be_counted_are_each_followed_once(tmp_path):
    """Forty folders, of which each leads twice to the next: 2^40 paths; and one to all files of the machine."""
    for number in range(40):
        put(tmp_path / "data" / f"{number:02d}" / "a.png")
        for name in "xy":
            (tmp_path / "data" / f"{number:02d}" / name).symlink_to(tmp_path / "data" / f"{number + 1:02d}")
    (tmp_path / "data" / "all").symlink_to("/")
    listing = read_rows(tmp_path / "data")
    assert len(listing.rows) == 40
    assert listing.note == (
        "passed over: 79 links to folders that are read already, or hold all of this, 2 links to nothing"
    )


def test_folders_may_lie_deeper_than_python_calls(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("a", dir_fd=here)
        inner = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("0.png", os.O_CREAT, dir_fd=here))
    os.close(here)
    (row,) = read_rows(tmp_path).rows
    assert row.image.name.count("/a") == 1200
    subprocess.run(["rm", "-r", str(tmp_path / "a")], check=True)


def test_class_folders_without_pictures_are_named(tmp_path):
    for name in ("cat/0.png", "dog/.hidden", "fox/notes.md"):
        put(tmp_path / name)
    (tmp_path / "cow").mkdir()
    assert read_rows(tmp_path).note == (
        "no pictures in cow, dog, fox; passed over: 1 .md files, 1 hidden files or folders"
    )


IDX = struct.pack(">4I", 0x803, 2, 8, 8) + bytes(128)
LABELS = struct.pack(">2I", 0x801, 2) + b"\0\1"


@pytest.mark.parametrize(("files", "labels", "note"), [
    ({"train-images-idx3-ubyte": IDX, "train-labels-idx1-ubyte.gz": gzip.compress(LABELS)}, [0, 1], ""),
    ({"train-images-idx3-ubyte.gz": gzip.compress(IDX), "train-labels-idx1-ubyte": LABELS}, [0, 1], ""),
    ({"train-images-idx3-ubyte": IDX, "t10k-images-idx3-ubyte": b"", "t10k-labels-idx1-ubyte": b"", "a.md": b""},
     [0, 0], "train-images-idx3-ubyte has no labels beside it, so all are of one class; passed over: 1 .md files, "
     "2 idx files of other parts"),
])  # fmt: skip
def test_of_idx_files_all_are_used_or_counted(tmp_path, files, labels, note):
    for name, data in files.items():
        put(tmp_path / name, data)
    listing = read_rows(tmp_path)
    assert [row.label for row in listing.rows] == labels
    assert listing.note == note


@pytest.mark.parametrize("kind", [b"0", b"L"])
@pytest.mark.parametrize("size", [-1024, 2**63, 2**80])
def test_shards_whose_headers_lie_are_refused(tmp_path, size, kind):
    """The second member's size: below 0 it leads back to the first one, round in circles."""
    path = shard(tmp_path / "0.tar", {"0.png": b"", "1.png": content(1)})
    data = bytearray(path.read_bytes())
    data[512 + 124 : 512 + 136] = b"\xff" * (size < 0) + b"\x80" * (size > 0) + size.to_bytes(11, signed=True)
    data[512 + 156 : 512 + 157] = kind
    data[512 + 148 : 512 + 156] = b" " * 8
    data[512 + 148 : 512 + 156] = b"%06o\0 " % sum(data[512:1024])
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="is no tar archive, is cut, or is compressed"):
        read_rows(path)


def test_a_member_that_claims_more_than_its_archive_holds_is_cut(tmp_path):
    put(tmp_path / "0.tar", b"x" * 100)
    with pytest.raises(ValueError, match=r"is cut: 40 of 1,152,921,504,606,846,976 bytes are there"):
        Member(tmp_path / "0.tar", "a.png", 60, 2**60).read()


def test_a_member_too_large_for_a_picture_is_not_read(tmp_path):
    put(tmp_path / "0.tar", b"")
    os.truncate(tmp_path / "0.tar", 2**40)
    with pytest.raises(
        ValueError, match=r"has 549,755,813,888 bytes; expected a picture of at most 1,073,741,824"
    ):
        Member(tmp_path / "0.tar", "a.png", 512, 2**39).read()


@pytest.mark.parametrize("name", ["0.tar", "metadata.parquet", "rows.parquet"])
def test_pipes_in_the_place_of_tables_and_shards_are_refused_at_once(tmp_path, name):
    put(tmp_path / "a.png") if name.startswith("meta") else None
    os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="is a named pipe"):
            read_rows(source)


def test_a_pipe_in_a_saved_data_set_is_refused_at_once_and_other_files_are_counted(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a mug"]}).save_to_disk(tmp_path / "data")
    put(tmp_path / "data" / "notes.md")
    assert read_rows(tmp_path / "data").note == "passed over: 1 .md files"
    (arrow,) = (tmp_path / "data").glob("*.arrow")
    arrow.unlink()
    os.mkfifo(arrow)
    with pytest.raises(ValueError, match="is a named pipe"):
        read_rows(tmp_path / "data")


@pytest.mark.parametrize("kind", ["Audio", "Video", "Pdf", "Nifti"])
def test_columns_of_sounds_and_films_are_no_pictures(tmp_path, kind):
    """Their readers are libraries that need not be there."""
    pyarrow = pytest.importorskip("pyarrow")
    told = {"info": {"features": {"image": {"_type": kind}, "text": {"_type": "Value", "dtype": "string"}}}}
    cells = [{"bytes": b"no", "path": None}]
    table = pyarrow.table({"image": cells, "text": ["a mug"]})
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(told)}), tmp_path / "rows.parquet"
    )
    with pytest.raises(ValueError, match=r"cannot be read|cannot be loaded as a data set"):
        open_image(read_rows(tmp_path / "rows.parquet").rows[0].image.read())


def test_a_picture_or_caption_too_large_to_be_one_is_not_read(tmp_path):
    for name, size in (("a.png", 2**40), ("b.png", 100), ("b.txt", 2**40)):
        put(tmp_path / name, b"")
        os.truncate(tmp_path / name, size)
    big, long = read_rows(tmp_path).rows
    with pytest.raises(ValueError, match=r"has 1,099,511,627,776 bytes; expected a picture"):
        big.image.read()
    assert "it has 1,099,511,627,776 bytes; expected a text" in long.fault


def test_a_path_in_a_typed_column_begins_in_the_folder_of_its_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    put(tmp_path / "data" / "a.png", content(3))
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": "a.png"}]}, features=features)
    rows.to_parquet(tmp_path / "data" / "rows.parquet")
    (row,) = read_rows(tmp_path / "data" / "rows.parquet").rows
    assert row.image.read() == content(3)
    (tmp_path / "data" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"names .*data/a\.png, which cannot be read: No such file"):
        row.image.read()


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_shards_of_webdataset(tmp_path):
    shard(tmp_path / "0.tar", {
        "x/0.png": content(0), "x/0.txt": b"a mug\n", "x/0.depth.png": content(5), "x/0.cls": b"3",
        "1.jpg": content(1, "jpeg"), "1.json": b'{"text": "a cone", "label": 2}', "1.depth.png": content(6),
        "1.npy": b"",
    })  # fmt: skip
    shard(tmp_path / "1.tar", {"2.png": content(2), "2.txt": b"the cat\x92s", "2.depth.png": content(7)})
    listing = read_rows(tmp_path, Columns(maps=("depth",)))
    assert said(listing) == [("0.png", "a mug", 3), ("1.jpg", "a cone", 2), (None, None, None)]
    assert listing.rows[0].image.read() == content(0)
    assert listing.rows[1].maps["depth"].read() == content(6)
    assert "can't decode byte 0x92" in listing.rows[2].fault
    assert listing.note == "passed over: 1 .npy members"
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"--data .*1\.tar is no tar archive, is cut, or is compressed"):
        read_rows(tmp_path / "1.tar")
    whole = read_rows(shard(tmp_path / "2.tar", {"3.png": content(3)})).rows[0]
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:600])
    with pytest.raises(ValueError, match="is cut: 88 of"):
        whole.image.read()


@pytest.mark.parametrize(
    "columns", [{"image": "typed", "depth": "typed"}, {"image": "path", "depth_file_name": "path"}]
)
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_of_data_sets_on_disk(tmp_path, columns, kind):
    datasets = pytest.importorskip("datasets")
    put(tmp_path / "data" / "a.png", content(1))
    put(tmp_path / "data" / "b.png", content(2))
    given = {name: ["a.png", "b.png"] for name in columns}
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["mug", "cone"])}
    for name, way in columns.items():
        features[name] = datasets.Image() if way == "typed" else datasets.Value("string")
        if way == "typed":
            given[name] = [{"bytes": content(1), "path": "a.png"}, {"bytes": content(2), "path": None}]
    data = datasets.Dataset.from_dict(
        {**given, "text": ["a mug", "a cone"], "label": [0, 1]}, features=datasets.Features(features)
    )
    if kind == "parquet":
        data.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
        data.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    else:
        datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path / "data")
    listing = read_rows(tmp_path / "data", Columns(maps=("depth",)))
    assert [(row.caption, row.label) for row in listing.rows] == [("a mug", 0), ("a cone", 1)]
    assert [row.image.read() for row in listing.rows] == [content(1), content(2)]
    assert [row.maps["depth"].read() for row in listing.rows] == [content(1), content(2)]
    assert listing.class_names == ("mug", "cone")
    assert ("test" in listing.note) == (kind == "saved")


def test_arrays_are_rows_of_pictures_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([0, 2, 1]))
    np.savez(tmp_path / "grey.npz", images=np.linspace(-1, 1, 3)[:, None, None, None] * np.ones((3, 1, 8, 8)))
    listing = read_rows(tmp_path / "a.npz")
    assert [row.label for row in listing.rows] == [0, 2, 1]
    assert np.array_equal(np.asarray(open_image(listing.rows[1].image.read())), pixels[1].transpose(1, 2, 0))
    greys = [np.unique(np.asarray(open_image(row.image.read()))) for row in read_rows(tmp_path / "grey.npz").rows]
    assert greys == [[0], [128], [255]]


@pytest.mark.parametrize("entry", [
    b"\x10\x01\x05\0\x01\0\0\0\x06\0\0\0",  # AttributeError
    b"\x1a\x01\x01\0\x01\0\0\0\x06\0\0\0",  # TypeError
    b"\x1a\x01\x06\0\x01\0\0\0\xff\xff\xff\xff",  # struct.error
])  # fmt: skip
def test_an_exif_block_that_raises_is_a_fault_of_its_picture(entry):
    turned = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + min(entry, turned) + max(entry, turned) + bytes(4)
    with pytest.raises(ValueError, match="has an Exif block that cannot be read; save it without: "):
        open_image(content(kind="jpeg", exif=exif))


def test_one_line_says_what_was_left_out_and_passed_over(tmp_path, capsys):
    put(tmp_path / "a.png")
    put(tmp_path / "b\n.svg")
    listing = read_rows(tmp_path)
    assert keep_good(listing, ["", "b.png is cut.", "", *[f"{n}.png is empty." for n in range(9)]], "skip") == [
        0,
        2,
    ]
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "left out 10 of 12 samples: b.png is cut; 0.png is empty; " in line
    assert line.endswith("; ...; passed over: 1 .svg files\n")
