"""Small folders and files of data of every kind that the reader takes, and what goes wrong with each."""

import gzip
import io
import json
import os
import struct
import tarfile
import zlib

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from hostile import DELETED, VALUES, mutated, spoilt
from PIL import Image

COUNT, SIDE = 24, 16
WORDS = ("a mug", "a chair", "two cones", "the sea")
CLASSES = ("cat", "dog")


def pixels(number, channels=3, side=SIDE):
    return np.random.default_rng(number).integers(0, 255, (side, side, channels), np.uint8)


def encoded(number, kind="png", mode="RGB", side=SIDE, **options):
    file = io.BytesIO()
    Image.fromarray(pixels(number, side=side)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# Sources: kind -> a function that writes one into a folder, and returns what a command is given.


def flat(folder):
    for number in range(COUNT):
        put(folder / f"{number}.png", encoded(number))
    return folder


def classes(folder, names=CLASSES):
    for number in range(COUNT):
        put(folder / names[number % len(names)] / f"{number}.png", encoded(number))
    return folder


def numbered(folder):
    return classes(folder, ("0", "1", "2"))


def splits(folder):
    classes(folder / "train")
    classes(folder / "test")
    return folder


def rows():
    return [
        {"file_name": f"{number}.png", "text": WORDS[number % 4], "label": number % 2} for number in range(COUNT)
    ]


def described(folder):
    flat(folder)
    put(folder / "metadata.jsonl", "\n".join(map(json.dumps, rows())))
    return folder


def cells(delimiter=","):
    names = list(rows()[0])
    return "\n".join(delimiter.join(map(str, row)) for row in (names, *(row.values() for row in rows()))) + "\n"


def described_in_csv(folder):
    flat(folder)
    put(folder / "metadata.csv", cells())
    return folder


def beside(folder):
    flat(folder)
    for number in range(COUNT):
        put(folder / f"{number}.txt", WORDS[number % 4])
    return folder


def lines(folder):
    flat(folder)
    return put(folder / "rows.jsonl", "\n".join(map(json.dumps, rows())))


def edits(folder):
    flat(folder)
    asked = [{"image": f"{number}.png", "source": WORDS[0], "target": WORDS[number % 4]} for number in range(4)]
    return put(folder / "edits.jsonl", "\n".join(map(json.dumps, asked)))


def whole_json(folder):
    flat(folder)
    return put(folder / "rows.json", json.dumps(rows()))


def table(folder):
    flat(folder)
    return put(folder / "rows.tsv", cells("\t"))


def prompts(folder):
    return put(folder / "prompts.txt", "\n".join(WORDS * 3) + "\n")


def arrays(number=COUNT):
    images = np.stack([pixels(i, 1).transpose(2, 0, 1) for i in range(number)])
    return {"images": images, "labels": np.arange(number) % 2}


def npz(folder):
    folder.mkdir(parents=True)
    np.savez(folder / "arrays.npz", **arrays())
    return folder / "arrays.npz"


def idx(folder):
    images, labels = arrays().values()
    head = struct.pack(">4I", 0x803, *images[:, 0].shape)
    put(folder / "train-images-idx3-ubyte.gz", gzip.compress(head + images.tobytes()))
    put(folder / "train-labels-idx1-ubyte", struct.pack(">2I", 0x801, len(labels)) + bytes(labels.tolist()))
    return folder


def shards(folder):
    folder.mkdir(parents=True)
    for part in range(2):
        with tarfile.open(folder / f"{part}.tar", "w") as archive:
            for number in range(part, COUNT, 2):
                label = {"text": WORDS[number % 4], "label": number % 2}
                for ending, data in (("png", encoded(number)), ("json", json.dumps(label).encode())):
                    info = tarfile.TarInfo(f"{number}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return folder


def a_data_set():
    pictures = [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(COUNT)]
    columns = {"image": pictures, "text": [row["text"] for row in rows()], "label": [n % 2 for n in range(COUNT)]}
    kinds = {"image": datasets.Image(), "text": datasets.Value("string")}
    kinds["label"] = datasets.ClassLabel(names=list(CLASSES))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def parquet(folder):
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(a_data_set().data.table, folder / "rows.parquet")
    return folder / "rows.parquet"


def saved(folder):
    datasets.disable_progress_bars()
    datasets.DatasetDict(train=a_data_set()).save_to_disk(folder)
    return folder


SOURCES = {
    source.__name__: source
    for source in (
        flat, classes, numbered, splits, described, described_in_csv, beside, lines, edits, whole_json, table,
        prompts, npz, idx, shards, parquet, saved,
    )
}  # fmt: skip
HIDDEN = ("parquet", "saved")
"""Kinds whose files are read by a library that no audit hook sees."""


# What goes wrong.


def entries(root):
    """All that is in a folder, however deep; links are not followed."""
    found, left = [], [root]
    while left:
        for path in left.pop().iterdir():
            found.append(path)
            left += [path] if path.is_dir() and not path.is_symlink() else []
    return sorted(found)


def files_of(folder):
    return [path for path in entries(folder) if path.is_file() and not path.is_symlink()]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def strange_png(chance):
    """A PNG with a hostile chunk, a size that it has not, or a rare mode."""
    mode = chance.choice(["RGB", "L", "P", "1", "LA", "RGBA", "I;16"])
    data = encoded(chance.randrange(9), mode=mode)
    kinds = (b"tRNS", b"eXIf", b"iCCP", b"gAMA", b"cHRM", b"pHYs", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"PLTE")
    kind = chance.random()
    if kind < 0.6:
        junk = b"x\0\0" + zlib.compress(bytes(chance.randint(0, 300))) if chance.random() < 0.4 else b""
        extra = chunk(chance.choice(kinds), junk + chance.randbytes(chance.choice([0, 1, 2, 6, 26, 300, 769])))
        return data[:33] + extra + data[33:]
    if kind < 0.8:
        size = chance.choice([0, 1, 2**31 - 1, 20_000, 100_000])
        head = struct.pack(">2I", size, chance.choice([1, size])) + data[24:29]
        return data[:8] + chunk(b"IHDR", head) + data[33:]
    return data


FORMATS = ("png", "jpeg", "gif", "webp", "tiff", "bmp", "jpeg2000", "tga", "ppm")


def strange_picture(chance):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + chance.randbytes(12) + bytes(4)
    turned = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + bytes(4)
    made = [
        lambda: b"", lambda: b"<html>no</html>", lambda: b"version https://git-lfs.github.com/spec/v1\n",
        lambda: chance.randbytes(500), lambda: spoilt(encoded(1, chance.choice(FORMATS)), chance),
        lambda: spoilt(encoded(1, chance.choice(FORMATS)), chance),
        lambda: encoded(1, "jpeg", exif=exif), lambda: encoded(1, "jpeg", exif=turned),
        lambda: encoded(1, "jpeg", "CMYK"), lambda: encoded(1, "tiff", "F"), lambda: encoded(1, "tiff", "LAB"),
        lambda: encoded(1, side=1), lambda: encoded(1, side=3), lambda: encoded(1, side=300),
        lambda: encoded(1, "gif", "P", transparency=3),
        *[lambda: strange_png(chance)] * 8,
    ]  # fmt: skip
    return chance.choice(made)()


def special(path, chance):
    """Something that is no regular file, in the place of ``path``."""
    path.unlink(missing_ok=True)
    kind = chance.randrange(7)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        to = ["/dev/zero", "/dev/tty", "nowhere", path.name, "/etc/passwd"][kind - 2]
        path.symlink_to(to)


NAMES = [
    "a\nerror: forged\x1b[2J", os.fsdecode(b"caf\xe9"), "x" * 240, ".hidden", "metadata", "état 模", "a b",
    "train", "test", "-x", "'; rm", "0", "007",
]  # fmt: skip
ENDINGS = [
    ".png",
    ".PNG",
    ".jpeg",
    ".txt",
    ".json",
    ".jsonl",
    ".csv",
    ".parquet",
    ".npz",
    ".tar",
    ".gz",
    ".svg",
    "",
]


def renamed(folder, chance):
    file = chance.choice(files_of(folder))
    name = chance.choice([chance.choice(NAMES), file.stem])
    ending = chance.choice([file.suffix, file.suffix, *ENDINGS])
    file.rename(file.with_name(name + ending))


def added(folder, chance):
    """A file, folder or link more, in some folder."""
    place = chance.choice([folder, *(path for path in entries(folder) if path.is_dir())])
    name, kind = chance.choice(NAMES), chance.randrange(9)
    path = place / (name + chance.choice(ENDINGS))
    if path.exists() or path.is_symlink():
        return
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(chance.choice([folder, "..", ".", place, "/proc/self", *files_of(folder)[:2]]))
    elif kind == 2:
        special(path, chance)
    elif kind == 3:  # deeper than Python calls functions
        path.mkdir()
        here = os.open(path, os.O_RDONLY)
        for _ in range(chance.choice([30, 1200])):
            os.mkdir("a", dir_fd=here)
            inner = os.open("a", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(here)
    elif kind == 4:  # each leads twice to the next: paths beyond number
        for number in range(40):
            (place / f"l{number}").mkdir(exist_ok=True)
            for twin in "ab":
                (place / f"l{number}" / twin).symlink_to(place / f"l{number + 1}")
    elif kind == 5:
        put(path, chance.choice(["", "\ufeff", "a mug\n", "{}", "[]", json.dumps(rows()[0]), cells()]))
    else:
        put(path, strange_picture(chance))


JUNK = [
    b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"\x92", b"\0", b"\r\n", "\u2028".encode(), b'"' * 3, b"\n\n",
    b"9" * 5000, b"NaN", b"x" * 200_000, b"\x1b[2J", b'{"file_name": "/dev/zero", "text": "a mug", "label": 1}\n',
    b"\xef\xbb\xbf", b"\t",
]  # fmt: skip


def spoil_text(file, chance):
    data = file.read_bytes()
    kind = chance.random()
    if kind < 0.3:
        place = chance.randrange(len(data) + 1)
        data = data[:place] + chance.choice(JUNK) + data[place:]
    elif kind < 0.4:
        data = spoilt(data, chance)
    elif kind < 0.45:
        data = data.decode("utf-8", "replace").encode("utf-16")
    elif file.suffix in (".json", ".jsonl"):
        data = _other_json(data, file.suffix, chance)
    else:
        some = data.split(b"\n")
        row = chance.randrange(len(some))
        separator = next((one for one in (b"\t", b",") if one in some[row]), b" ")
        parts = some[row].split(separator)
        value = chance.choice(VALUES)
        text = b"" if value is DELETED else str(value)[:3000].encode("utf-8", "surrogatepass")
        parts[chance.randrange(len(parts))] = text
        some[row] = separator.join(parts)
        data = b"\n".join(some)
    file.write_bytes(data)


def _other_json(data, ending, chance):
    try:
        content = [json.loads(line) for line in data.splitlines()] if ending == ".jsonl" else json.loads(data)
    except ValueError:
        return data
    content = mutated(content, chance)
    if ending == ".jsonl" and isinstance(content, list):
        return b"\n".join(json.dumps(row).encode() for row in content)
    return json.dumps(content).encode()


def other_arrays(file, chance):
    whole = arrays(chance.choice([1, 2, COUNT]))
    images, labels = whole["images"], whole["labels"]
    made = [
        {"images": images.astype(object)}, {"images": images.astype(np.float32)}, {"images": images / 1e3},
        {"images": np.full((9, 1, 8, 8), np.nan)}, {"images": images[0]}, {"images": images[:, :, :, :0]},
        {"images": images[:, 0]}, {"images": images.transpose(0, 2, 3, 1)}, {"images": images.astype(complex)},
        {"images": images.view([("a", np.uint8)])}, {"labels": labels}, {"images": images, "labels": labels[:1]},
        {"images": images, "labels": labels - 3}, {"images": images, "labels": labels + 10**12},
        {"images": images, "labels": labels.astype(np.uint64) + 2**63}, {"images": images, "labels": labels / 2},
        {"images": images, "labels": labels.astype(str)}, {"images": images > 9, "labels": labels},
        {"images": np.zeros((2, 3, 1, 4000), np.uint8)}, {"images": np.zeros((0, 1, 8, 8), np.uint8)},
        {"images": images[..., :3], "labels": labels},
    ]  # fmt: skip
    save = np.savez_compressed if chance.random() < 0.3 else np.savez
    save(file, **chance.choice(made))


def other_table(file, chance):
    """The parquet file with a column of another type, with holes, or with a schema that says something else."""
    content = pyarrow.parquet.read_table(file)
    number, name = content.num_rows, chance.choice(content.column_names)
    made = [
        [None] * number, [1.5] * number, [True] * number, ["x"] * number, [b"x"] * number, [[1, 2]] * number,
        [{"a": 1}] * number, [{"bytes": None, "path": "nowhere.png"}] * number, ["/dev/zero"] * number,
        [{"bytes": b"no", "path": None}] * number, [2**63 - 1] * number, [-1] * number, ["\x1b[2J\n"] * number,
        [{"path": "/etc/passwd"}] * number, [None, *[{"bytes": encoded(1), "path": None}] * (number - 1)],
        [1, *[None] * (number - 1)], [np.datetime64("2020-01-01")] * number,
    ]  # fmt: skip
    kind = chance.random()
    if kind < 0.5:
        place = content.column_names.index(name)
        content = content.set_column(place, name, pyarrow.array(chance.choice(made)))
    elif kind < 0.6:
        content = content.drop_columns([name])
    elif kind < 0.7:
        content = content.slice(0, chance.choice([0, 1]))
    if kind > 0.6:
        types = [
            {"_type": "Audio"}, {"_type": "Video"}, {"_type": "Pdf"}, {"_type": "Image", "decode": True},
            {"_type": "Value", "dtype": "int8"}, {"_type": "ClassLabel", "names": []},
            {"_type": "ClassLabel", "names": ["\x1b[2J", "b"]}, {"_type": "Nifti"}, {"_type": "payload"},
            {"_type": "Array2D", "shape": [2, 2], "dtype": "int8"}, {"_type": "Translation", "languages": ["a"]},
            {"_type": "List", "feature": {"_type": "Image"}}, 7, None,
        ]  # fmt: skip
        known = {"image": {"_type": "Image"}, "text": {"_type": "Value", "dtype": "string"}}
        known |= {"label": {"_type": "ClassLabel", "names": list(CLASSES)}, name: chance.choice(types)}
        told = json.dumps({"info": {"features": known}})
        content = content.replace_schema_metadata({"huggingface": told})
    pyarrow.parquet.write_table(content, file)


def other_shard(file, chance):
    """A tar archive whose headers lie: their sums are right."""
    data = bytearray(file.read_bytes())
    starts = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = chance.choice(starts)
    fields = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "kind": (156, 1), "link": (157, 100),
              "magic": (257, 8), "prefix": (345, 155)}  # fmt: skip
    begin, length = fields[chance.choice(["name", "size", "size", "kind", "kind", *fields])]
    values = [
        b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"77777777777", b"-1",
        b"0", b"", b"g", b"x", b"L", b"K", b"S", b"1", b"2", b"3", b"6", b"5", b"../../x.png", b"/etc/passwd",
        b"a\n\x1b[2J.png", b"\xff\xfe.png", b"x.json", b"x.cls", b"." * 100, chance.randbytes(length),
    ]  # fmt: skip
    data[at + begin : at + begin + length] = chance.choice(values)[:length].ljust(length, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    file.write_bytes(bytes(data))


def other_gzip(file, chance):
    data = gzip.decompress(file.read_bytes())
    if chance.random() < 0.8:
        size = struct.pack(">I", chance.choice([0, 1, 23, 25, 2**31, 2**32 - 1]))
        at = chance.choice([4, 4, 8, 12])
        data = data[:at] + size + data[at + 4 :]
    else:
        data = spoilt(data, chance)
    file.write_bytes(gzip.compress(data))


def spoil_bytes(file, chance):
    file.write_bytes(spoilt(file.read_bytes(), chance))


WAYS = {
    **dict.fromkeys((".png", ".jpeg"), lambda file, chance: file.write_bytes(strange_picture(chance))),
    ".npz": other_arrays, ".tar": other_shard, ".parquet": other_table, ".gz": other_gzip, ".arrow": spoil_bytes,
}  # fmt: skip
"""What is done to a file, by its ending; any other is a text."""


def spoil(folder, chance):
    """Change something about the source in ``folder``."""
    files, kind = files_of(folder), chance.random()
    if not files or kind < 0.25:
        added(folder, chance)
    elif kind < 0.35:
        renamed(folder, chance)
    else:
        firsts = {file.suffix: file for file in reversed(files)}
        file = firsts[chance.choice(sorted(firsts))]
        if kind < 0.4:
            special(chance.choice([file, chance.choice(files)]), chance)
        elif kind < 0.43:
            file.unlink()
        elif kind < 0.5:
            spoil_bytes(file, chance)
        else:
            try:
                WAYS.get(file.suffix, spoil_text)(file, chance)
            except Exception:  # it was spoilt before
                spoil_bytes(file, chance)
