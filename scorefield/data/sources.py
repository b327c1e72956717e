"""Samples from wherever they are: rows that say where a picture lies, its caption, its label and its maps.

    listing = read_rows("photos/", Columns(maps=("depth",)))
    picture = listing.rows[0].image.read()      # the bytes of a file, which nobody has decoded yet

Read are folders of pictures (class folders, captions in .txt files beside, metadata.jsonl, .csv or .parquet), their
train/ part where there are splits, jsonl, csv, tsv and parquet files, text files with a prompt a line, npz and idx
files, webdataset shards (.tar), folders of ``Dataset.save_to_disk``, and names of data sets on the Hugging Face Hub.

Every file that is seen is used, or counted in ``Listing.note``; a row that cannot be used says why in ``Row.fault``.
"""

import csv
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from scorefield.atomic import MARKER
from scorefield.data.arrays import is_idx, read_idx, read_npz
from scorefield.files import open_regular, printable, read_regular

OnBadData = Literal["stop", "skip"]

PICTURES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .avif .jp2 .tga".split()
)  # fmt: skip
"""Endings of pictures."""

TABLES = (".parquet", ".jsonl", ".csv", ".tsv", ".json", ".txt")
"""Endings of files with a row per sample; of a folder without pictures those of the first that is there are read."""

METADATA = tuple(f"metadata{ending}" for ending in (".jsonl", ".csv", ".parquet"))
"""Names of the files that say what the pictures of a folder are; the first that is there counts."""

SPLITS = frozenset(("train", "test", "val", "valid", "validation", "dev", "eval"))
"""Names of folders that are parts of one data set, and no classes, where all folders are called so."""

IMAGE_COLUMNS, TEXT_COLUMNS = ("file_name", "image"), ("prompt", "text", "caption")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
FILES = {*PICTURES, *TABLES, ".npz", ".npy", ".arrow", ".gz", ".zip", ".tar", ".tgz"}
LARGEST_TEXT = 2**20
"""Bytes of a caption or a label in a shard."""


class Picture(Protocol):
    """Where the bytes of a picture's file are."""

    @property
    def name(self) -> str:
        """To complain with."""
        ...

    def read(self) -> bytes:
        """The bytes. Raises ``ValueError`` whose message goes behind the name."""
        ...


@dataclass(frozen=True)
class File:
    """A file."""

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def read(self) -> bytes:
        """Raises ``ValueError`` if there is no such file, or it is no regular one."""
        try:
            return read_regular(self.path)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class Member:
    """A file in a tar archive, read where it lies."""

    archive: Path
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Archive and member."""
        return f"{self.archive}/{self.member}"

    def read(self) -> bytes:
        """Raises ``ValueError`` for an archive that was cut."""
        with open_regular(self.archive) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise ValueError(f"is cut: {len(content):,} of {self.size:,} bytes are there.")
        return content


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture in a table of ``datasets``, which reads it from its files when it is asked for."""

    table: Any
    number: int
    column: str
    folder: Path
    source: str

    @property
    def name(self) -> str:
        """Data set, row and column."""
        return f"{self.source}[{self.number}] {self.column!r}"

    def read(self) -> bytes:
        """Raises ``ValueError`` for an empty cell, and for one that is no picture."""
        value = self.table[self.number][self.column]
        if isinstance(value, Mapping):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ValueError("is missing.")
        return bytes(value) if isinstance(value, bytes) else _file(value, self.folder).read()


@dataclass(frozen=True, eq=False)
class Pixels:
    """A picture (c, h, w) of an array: bytes, or floats in [-1, 1]."""

    name: str
    pixels: np.ndarray

    def read(self) -> bytes:
        """As a PNG file."""
        array = self.pixels if self.pixels.dtype == np.uint8 else np.uint8(np.round((self.pixels + 1) * 127.5))
        content = io.BytesIO()
        Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0)).save(content, "png")
        return content.getvalue()


@dataclass(frozen=True, eq=False)
class Row:
    """One sample.

    Attributes:
        name: of the picture, or of the line or row; to complain with.
        image: None where the row names none.
        caption: a string, or None, unless something is wrong.
        label: a class number, a class name or None, unless something is wrong.
        maps: further pictures that go with the image, by column.
        fault: why the row cannot be used, whatever it is needed for; the message goes behind the name.
    """

    name: str
    image: Picture | None = None
    caption: Any = None
    label: Any = None
    maps: Mapping[str, Picture] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Columns:
    """What is read of a table or a metadata file.

    Attributes:
        image: column of pictures; empty: file_name, image, or a data set's first column of pictures.
        text: column of captions; empty: prompt, text or caption; None: no captions are read.
        maps: columns of further pictures; of a folder that of "depth" may be called depth_file_name.
    """

    image: str = ""
    text: str | None = ""
    maps: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Listing:
    """The rows of a source.

    Attributes:
        source: as the user named it.
        rows: at least one.
        class_names: of the class numbers, where the source has them.
        note: what was passed over, and which part was taken, in one line; empty where all was used.
        arrays: images (n, c, h, w) and labels (n,), where they are kept as such.
    """

    source: str
    rows: Sequence[Row]
    class_names: tuple[str, ...] | None = None
    note: str = ""
    arrays: tuple[np.ndarray, np.ndarray] | None = None


def read_rows(source: Any, columns: Columns | None = None, option: str = "--data") -> Listing:
    """The rows of a file, a folder, or a data set of ``datasets`` or its name; no picture is opened.

    Args:
        source: what the user named.
        columns: what is read of each row; None for the usual names.
        option: that named the source, for messages.

    Raises:
        ValueError: a source that is not there or not understood, lacks a column, or holds nothing.
    """
    columns = columns or Columns()
    path, name = Path(source if isinstance(source, str | Path) else ""), str(source)
    try:
        if not isinstance(source, str | Path):
            listing = _table(source, "data set", columns, path)
        elif path.is_dir() and name:
            listing = _folder(path, columns)
        elif path.exists() and name:
            listing = _file_rows(path, columns)
        else:
            _check_hub_name(name)
            data, note = _loaded(name, lambda datasets: datasets.load_dataset(name, split="train"))
            listing = replace(_table(data, name, columns, path), note=note)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {'' if name in str(error) else f'{name}: '}{error}") from error
    if listing.rows:
        return listing
    note = f" ({listing.note})" if listing.note else ""
    raise ValueError(
        f"{option} {listing.source} holds no samples{note}. Expected are pictures in a folder or its class folders, "
        'with .txt captions beside them or a metadata.jsonl such as {"file_name": "1.png", "text": "a red mug", '
        '"label": 0}; a file of prompts; or a data set.'
    )


def _check_hub_name(name: str) -> None:
    # Asking the Hub for a path with a slip of the pen would take half a minute.
    owner = Path(name).parent
    file = Path(name).suffix.lower() in FILES or name.endswith("-ubyte")
    if file or not HUB_NAME.fullmatch(name) or (owner != Path(".") and owner.exists()):
        raise ValueError(
            f"{name or 'of no name'}: no such file or folder, and no data set: those of the Hugging Face Hub are "
            "called name or owner/name, where owner is no folder here. Correct the path."
        )


# Files.


def _file_rows(path: Path, columns: Columns) -> Listing:
    ending = path.suffix.lower()
    if ending == ".npz" or is_idx(path):
        return _array_rows(path, *(read_npz(path) if ending == ".npz" else read_idx(path)))
    if ending == ".tar":
        return _shards(path, [path], columns)
    if ending in FILES - set(TABLES):
        raise ValueError(
            f"expected a folder of pictures, or a file that ends in {', '.join(TABLES)}, .npz or .tar, or is idx."
        )
    return _tables(path, [path], columns)


def _array_rows(path: Path, images: np.ndarray, labels: np.ndarray, note: str = "") -> Listing:
    numbered = enumerate(zip(images, labels.tolist(), strict=True))
    pictures = [(Pixels(f"{path}[{number}]", image), label) for number, (image, label) in numbered]
    rows = [Row(picture.name, picture, label=label) for picture, label in pictures]
    return Listing(str(path), rows, note=note, arrays=(images, labels))


def _tables(source: Path, files: Sequence[Path], columns: Columns) -> Listing:
    # The rows of files of one ending; pictures are named from a file's folder.
    ending = files[0].suffix.lower()
    if ending == ".parquet":
        names = [str(file) for file in files]
        load = lambda datasets: datasets.load_dataset("parquet", data_files=names, split="train")  # noqa: E731
        return _table(_loaded(str(source), load)[0], str(source), columns, files[0].parent)
    rows: list[Row] = []
    for file in files:
        if ending not in TABLES or ending == ".txt":
            lines = [(place, line.strip(), _fault(line, file)) for place, line in _lines(file)]
            rows += [Row(place, caption=None if fault else line, fault=fault) for place, line, fault in lines]
            continue
        parse = _csv_rows if ending in (".csv", ".tsv") else _json_rows
        for place, values, fault in parse(file):
            rows.append(Row(place, fault=fault) if fault else _row(values, columns, file.parent, place))
    return Listing(str(source), rows)


def _decoded(path: Path) -> str:
    # Bytes that are no UTF-8 become halves of characters, so that only the lines that hold them are spoilt.
    content = read_regular(path)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16. Save it as UTF-8, such as: iconv -f UTF-16 -t UTF-8 {path.name}")
    return content.decode("utf-8-sig", "surrogateescape")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    # splitlines would also split at characters that a caption may hold, such as U+2028.
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def _fault(text: str, path: Path) -> str:
    # Why a text cannot be used: what was no UTF-8, or a half of a character that JSON wrote as \ud800.
    for place, character in enumerate(text):
        if 0xDC80 <= ord(character) <= 0xDCFF:
            return (
                f"is not UTF-8: byte {ord(character) - 0xDC00:#04x} after {text[max(0, place - 20) : place]!r}. Save "
                f"the file as UTF-8, such as: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
            )
    return "holds half of a character, which no file can. Correct the text." if _broken(text) else ""


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _json_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    whole = path.suffix.lower() == ".json"
    for place, line in [(str(path), _decoded(path))] if whole else _lines(path):
        try:
            values, fault = None, _fault(line, path)
            values = None if fault else json.loads(line)
        except ValueError as error:
            fault = f"is no JSON: {error}. Got {line.strip()[:80]!r}."
        except RecursionError:
            fault = "is JSON that is nested too deep."
        if whole and isinstance(values, list):
            yield from ((f"{path}, item {number}", value, "") for number, value in enumerate(values, 1))
        else:
            yield place, values, fault


def _csv_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    table = csv.DictReader(io.StringIO(_decoded(path), newline=""), delimiter=delimiter)
    try:
        for values in table:
            cells = [cell for cell in values.values() if isinstance(cell, str)]
            fault = next((fault for cell in cells if (fault := _fault(cell, path))), "")
            if None in values:
                fault = f"has more cells than the header, which has {len(table.fieldnames or ())}."
            known = {str(key): cell or None for key, cell in values.items() if key is not None}
            yield f"{path}, line {table.line_num}", known, fault
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num}: {error}.") from error


def _row(values: Any, columns: Columns, folder: Path, place: str) -> Row:
    # A line of a table as a row.
    if not isinstance(values, Mapping):
        return Row(place, fault=f"must be an object such as {{\"file_name\": ...}}; got {str(values)[:80]!r}.")
    try:
        image = _named(values, (columns.image,) if columns.image else IMAGE_COLUMNS, folder)
        found = {name: _named(values, (f"{name}_file_name", name), folder) for name in columns.maps}
    except ValueError as error:
        return Row(place, fault=str(error))
    name = place if image is None else image.name
    if missing := [name for name, picture in found.items() if picture is None]:
        return Row(
            name,
            fault=f'has no {missing[0]}: expected "{missing[0]}_file_name" in {place}; it has {", ".join(values)}.',
        )
    maps = {name: picture for name, picture in found.items() if picture is not None}
    caption = _caption(values, columns)
    fault = "holds half of a character in its caption." if isinstance(caption, str) and _broken(caption) else ""
    return Row(name, image, caption, values.get("label"), maps, fault)


def _caption(values: Mapping[str, Any], columns: Columns) -> Any:
    if columns.text is None:
        return None
    keys = (columns.text,) if columns.text else TEXT_COLUMNS
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _named(values: Mapping[str, Any], keys: Sequence[str], folder: Path) -> Picture | None:
    value = next((values[key] for key in keys if values.get(key) is not None), None)
    if isinstance(value, Mapping):  # as `datasets` writes them
        value = value.get("path")
    return None if value is None else _file(value, folder)


def _file(value: Any, folder: Path) -> File:
    if not isinstance(value, str) or not value:
        raise ValueError(f"has no image: expected the path of one; got {value!r}.")
    return File(folder / value)


# Folders.


def _folder(path: Path, columns: Columns) -> Listing:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        data, note = _loaded(str(path), lambda datasets: datasets.load_from_disk(str(path)))
        return replace(_table(data, str(path), columns, path), note=note)
    if is_idx(path):
        names = sorted(file.name for file in path.glob("*images-idx3-ubyte*"))
        note = f"of {', '.join(names)} the training part is used" if len(names) > 1 else ""
        return _array_rows(path, *read_idx(path), note)
    root, said = _training_part(path)
    passed = Counter[str]()
    files = _walk(root, passed)
    best = {file.parent: file for name in reversed(METADATA) for file in files if file.name == name}
    endings = {file.suffix.lower() for file in files}
    if best:
        listing = _metadata_rows(root, sorted(best.values()), files, columns, passed)
    elif endings & PICTURES:
        listing = Listing(str(path), _picture_rows(root, files, columns, passed))
    else:
        ending = next((ending for ending in (".tar", *TABLES) if ending in endings), "")
        chosen = _train_files([file for file in files if file.suffix.lower() == ending], passed)
        passed.update(_ending(file) for file in files if file.suffix.lower() != ending or not ending)
        read = _shards if ending == ".tar" else _tables
        listing = read(path, chosen, columns) if ending else Listing(str(path), [])
    said += [listing.note] if listing.note else []
    return replace(listing, source=str(path), note="; ".join([*said, *_counts(passed)]))


def _counts(passed: Counter[str]) -> list[str]:
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(passed.items()) if number)
    return [f"passed over: {counts}"] if counts else []


def _train_files(files: Sequence[Path], passed: Counter[str]) -> list[Path]:
    # Of train.csv and test.csv, or train-00000-of-00001.parquet and so on.
    parts = {file: re.split(r"[-_.]", file.name.lower())[0] for file in files}
    if "train" not in parts.values() or not set(parts.values()) <= SPLITS:
        return list(files)
    passed["files of other parts than train"] += sum(part != "train" for part in parts.values())
    return [file for file, part in parts.items() if part == "train"]


def _training_part(path: Path) -> tuple[Path, list[str]]:
    folders = sorted(one.name for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    others = [name for name in folders if name != "train"]
    if any((path / name).is_file() for name in METADATA) or not set(folders) <= SPLITS or not folders:
        return path, []
    if "train" not in folders:
        if len(folders) == 1:
            return path, []
        raise ValueError(
            f"{path} has the parts {', '.join(folders)}, and no train. Pass one of them: {path / folders[0]}."
        )
    return path / "train", [f"train/ is used, {', '.join(f'{name}/' for name in others)} not"] if others else []


def _walk(root: Path, passed: Counter[str]) -> list[Path]:
    # All files, those in linked folders too, and no folder within itself.
    found: list[Path] = []

    def visit(folder: Path, above: frozenset[tuple[int, int]]) -> None:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            passed["folders that are links to a folder above them"] += 1
            return
        for entry in folder.iterdir():
            if entry.name.startswith("."):
                passed["hidden files or folders"] += entry.name != MARKER
            elif entry.is_dir():
                visit(entry, above | {here})
            else:
                found.append(entry)

    visit(root, frozenset())
    return sorted(found)


def _ending(file: Path) -> str:
    return f"{file.suffix or 'nameless'} files" if len(file.suffix) < 9 else "other files"


def _metadata_rows(
    root: Path, metadata: Sequence[Path], files: Sequence[Path], columns: Columns, passed: Counter[str]
) -> Listing:
    parts = [_tables(file, [file], columns) for file in metadata]
    rows = [row for part in parts for row in part.rows]
    first = [_first_folder(row, root) for row in rows]
    if "train" in first and set(first) <= SPLITS:
        passed["rows of other parts than train/"] += sum(name != "train" for name in first)
        rows = [row for row, name in zip(rows, first, strict=True) if name == "train"]
    used = {one.path for row in rows for one in (row.image, *row.maps.values()) if isinstance(one, File)}
    for file in files:
        if file.suffix.lower() in PICTURES and file not in used:
            passed[f"pictures that no row of {metadata[0].name} uses"] += 1
        elif file not in used and file not in metadata:
            passed[_ending(file)] += 1
    return Listing(str(root), rows, parts[0].class_names)


def _first_folder(row: Row, root: Path) -> str:
    inside = isinstance(row.image, File) and row.image.path.is_relative_to(root)
    return row.image.path.relative_to(root).parts[0] if inside and isinstance(row.image, File) else ""


def _picture_rows(root: Path, files: Sequence[Path], columns: Columns, passed: Counter[str]) -> list[Row]:
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    stray = next((file for file in pictures if file.parent == root), None)
    classes = {file.relative_to(root).parts[0] for file in pictures if file.parent != root}
    if stray and classes:
        raise ValueError(
            f"{root} holds images beside class subfolders such as {min(classes)}: {stray.name}, for one. "
            "Move them into their classes, or elsewhere."
        )
    texts = {file for file in files if file.suffix.lower() == ".txt"}
    rows = []
    for file in pictures:
        label = file.relative_to(root).parts[0] if classes else None
        beside = file.with_suffix(".txt")
        caption, fault = _beside(beside) if beside in texts and columns.text is not None else (None, "")
        rows.append(Row(str(file), File(file), caption, label, fault=fault))
        if columns.maps:
            rows[-1] = replace(rows[-1], fault=f"has no {columns.maps[0]}, which a metadata.jsonl must name.")
    captions = {file.with_suffix(".txt") for file in pictures} & texts
    if columns.text is None and captions:
        passed[".txt captions, which are not needed"] += len(captions)
    for file in files:
        if file not in captions and file.suffix.lower() not in PICTURES:
            passed[".txt files without a picture" if file in texts else _ending(file)] += 1
    return rows


def _beside(file: Path) -> tuple[str | None, str]:
    try:
        text = _decoded(file)
    except (OSError, ValueError) as error:
        return None, f"has a caption {file.name} that cannot be read: {error}"
    fault = _fault(text, file)
    return (None, f"has a caption {file.name} that {fault}") if fault else (text.strip(), "")


# Shards of webdataset.


def _shards(source: Path, shards: Sequence[Path], columns: Columns) -> Listing:
    rows: list[Row] = []
    passed = Counter[str]()
    for shard in shards:
        samples: dict[str, dict[str, Member]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for part in archive:
                    folder, _, base = part.name.rpartition("/")
                    key, _, kind = base.partition(".")
                    if part.isreg() and not part.issparse() and key:
                        member = Member(shard, part.name, part.offset_data, part.size)
                        samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[kind.lower()] = member
                    else:
                        passed["members that are no plain files"] += not part.isdir()
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"{shard.name} is no tar archive, is cut, or is compressed: {error}. Store it without compression."
            ) from error
        rows += [_sample(f"{shard}/{key}", parts, columns, passed) for key, parts in samples.items()]
    return Listing(str(source), rows, note="; ".join(_counts(passed)))


def _sample(name: str, parts: Mapping[str, Member], columns: Columns, passed: Counter[str]) -> Row:
    values: dict[str, Any] = {}
    image: Picture | None = None
    maps: dict[str, Picture] = {}
    for kind, member in parts.items():
        what, _, ending = kind.rpartition(".")
        if f".{ending}" in PICTURES and not what:
            image = member
        elif f".{ending}" in PICTURES and what in columns.maps:
            maps[what] = member
        elif kind in ("txt", "text", "caption", "json", "cls"):
            try:
                values |= _read_part(kind, member, columns)
            except (ValueError, RecursionError) as error:
                return Row(member.name, fault=f"cannot be used: {str(error) or 'it is nested too deep'}")
        else:
            passed[f".{kind} members"] += 1
    if missing := [column for column in columns.maps if column not in maps]:
        return Row(name, fault=f"has no {missing[0]}: expected a member {missing[0]}.png.")
    return Row(name if image is None else image.name, image, _caption(values, columns), values.get("label"), maps)


def _read_part(kind: str, member: Member, columns: Columns) -> dict[str, Any]:
    if member.size > LARGEST_TEXT:
        raise ValueError(f"it has {member.size:,} bytes; expected a text.")
    text = member.read().decode("utf-8-sig").strip()
    if kind == "json":
        content = json.loads(text)
        return dict(content) if isinstance(content, Mapping) else {}
    if kind == "cls":
        return {"label": int(text) if text.isdecimal() else text}
    return {columns.text or "text": text}


# Tables of `datasets`.


def _loaded(source: str, load: Callable[[Any], Any]) -> tuple[Any, str]:
    # A data set, its training part, and what is said of the others.
    import datasets

    try:
        data = load(datasets)
        if not isinstance(data, datasets.DatasetDict):
            return data, ""
        others = ", ".join(sorted(set(data) - {"train"}))
        return data["train"], f"train is used, {others} not" if others else ""
    except Exception as error:  # the library raises a dozen kinds, its own among them
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{source} cannot be loaded as a data set: {type(error).__name__}: {reason}") from error


def _table(data: Any, source: str, columns: Columns, folder: Path) -> Listing:
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"expected a folder, or a datasets.Dataset of one split; got {type(data).__name__}.")
    pictures = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    maps = {name: next((c for c in (name, f"{name}_file_name") if c in data.features), name) for name in columns.maps}
    usual = [*(name for name in pictures if name not in maps.values()), *IMAGE_COLUMNS]
    image = columns.image or next((name for name in usual if name in data.features), None)
    wanted = [*maps.values(), *([image] if image else [])]
    if missing := sorted(set(wanted) - set(data.features)):
        raise ValueError(f"{source} has no column {', '.join(missing)} of pictures; it has {list(data.features)}.")
    if columns.text and columns.text not in data.features:
        raise ValueError(f"{source} has no column {columns.text!r} of captions; it has {list(data.features)}.")
    keys = [key for key in (TEXT_COLUMNS if columns.text == "" else (columns.text,)) if key in data.features]
    known = data.select_columns(sorted({*keys, *({"label"} & set(data.features))}))
    empty = set() if image is None else _nulls(data, image)
    for name in set(wanted) & set(pictures):
        data = data.cast_column(name, datasets.Image(decode=False))
    table = data.select_columns(sorted(set(wanted)))
    cells = lambda number, column: Cell(table, number, column, folder, source)  # noqa: E731
    rows = []
    values: Iterable[Mapping[str, Any]] = known if known.column_names else ({} for _ in range(len(data)))
    for number, value in enumerate(values):
        rows.append(
            Row(
                f"{source}[{number}]", None if image is None or number in empty else cells(number, image),
                _caption(value, columns), value.get("label"), {key: cells(number, name) for key, name in maps.items()},
            )
        )  # fmt: skip
    names = getattr(data.features.get("label"), "names", None)
    return Listing(source, rows, names and tuple(names))


def _nulls(data: Any, column: str) -> set[int]:
    if not data.data.column(column).null_count:
        return set()
    place, found = 0, set[int]()
    for chunk in data.with_format("arrow").select_columns([column]).iter(1000):
        valid = chunk.column(0).is_valid().to_pylist()
        found |= {place + number for number, there in enumerate(valid) if not there}
        place += len(valid)
    return found


# What is said.


def keep_good(listing: Listing, faults: Sequence[str], on_bad_data: str) -> list[int]:
    """Numbers of the samples that have no fault; one line on stderr says what was left out and passed over.

    Args:
        listing: of the samples.
        faults: of each sample its name and what is wrong with it; empty where nothing is.
        on_bad_data: "stop" raises for any fault, "skip" leaves such samples out.

    Raises:
        ValueError: under "stop", and where no sample is left.
    """
    bad, good = [fault for fault in faults if fault], [number for number, fault in enumerate(faults) if not fault]
    some = "; ".join(fault.rstrip(".") for fault in bad[:5]) + ("; ..." if len(bad) > 5 else "")
    if bad and (on_bad_data == "stop" or not good):
        fix = "Repair them, or leave them out: --on-bad-data skip." if good else "None is left. Repair them."
        raise ValueError(f"{len(bad)} of {len(faults)} samples of {listing.source} cannot be used: {some}. {fix}")
    said = [f"left out {len(bad)} of {len(faults)} samples: {some}"] if bad else []
    if said := [*said, *([listing.note] if listing.note else [])]:
        warn(f"{listing.source}: {'; '.join(said)}")
    return good


def warn(message: str) -> None:
    """Print a warning in one line on stderr, in the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"warning: {printable(message)}", file=sys.stderr)
