"""Samples from wherever they are: each is a row that says where its picture lies, its caption, label and maps.

    listing = read_rows("photos/", Columns(maps=("depth",)))
    picture = listing.rows[0].image.read()      # the bytes of a file, which nobody has decoded yet

Read are folders of pictures (class folders, captions in .txt files beside, metadata.jsonl, .csv or .parquet), of
train/ and test/ the former; jsonl, csv, tsv, json and parquet files; text files with a prompt a line; npz and idx
files; webdataset shards (.tar); folders of ``Dataset.save_to_disk``; and data sets of the Hugging Face Hub. Every
file that is seen is used, or counted in ``Listing.note``; a row that cannot be used says why.
"""

import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scorefield.atomic import MARKER
from scorefield.data.arrays import idx_images, is_idx, labels_of, read_idx, read_npz
from scorefield.data.rows import Columns, File, Listing, Member, Pixels, Row, row_of
from scorefield.data.tables import TABLES, check_data_file, decoded, loaded, read_data_set, read_tables, text_fault
from scorefield.files import open_regular

ENDINGS = ".png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .gif .ppm .pgm .avif .jp2 .tga"
PICTURES = frozenset(ENDINGS.split())
"""Endings of pictures."""

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the files that say what the pictures of a folder are; the first that is there counts."""

SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What ``Dataset.save_to_disk`` writes beside its .arrow files."""

SPLITS = frozenset(("train", "test", "val", "valid", "validation", "dev", "eval"))
"""Names of folders that are parts of one data set, and no classes, where all folders are called so."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
FILMS = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"))
"""Endings of films, which are no data: without them here a film would be read as lines of prompts."""

FILES = {*PICTURES, *FILMS, *TABLES, ".npz", ".npy", ".arrow", ".gz", ".zip", ".tar", ".tgz"}
LARGEST_TEXT = 2**20
"""Bytes of a caption or a label in a file of its own."""


def read_rows(source: Any, columns: Columns | None = None, option: str = "--data") -> Listing:
    """Return the rows of a file, a folder, or a data set of ``datasets`` or its name; no picture is opened.

    Args:
        source: what the user named.
        columns: what is read of each row; None for the usual names.
        option: that named the source, for messages.

    Raises:
        ValueError: a source that is not there or not understood, lacks a column, or holds nothing.
    """
    columns = columns or Columns()
    named = isinstance(source, str | Path)
    path, name = Path(source if named else ""), str(source) if named else "data set"
    try:
        if not named:
            listing = read_data_set(source, name, columns, Path())
        elif path.is_dir() and name:
            listing = _folder(path, columns)
        elif path.exists() and name:
            listing = _file_rows(path, columns)
        else:
            _check_hub_name(name)
            data, note = loaded(name, lambda library: library.load_dataset(name, split="train"))
            listing = replace(read_data_set(data, name, columns, path), note=note)
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {'' if name in str(error) else f'{name}: '}{error}") from error
    if listing.rows:
        return listing
    note = f" ({listing.note})" if listing.note else ""
    raise ValueError(
        f"{option} {listing.source} holds no samples{note}. Expected are pictures in a folder or its class "
        'folders, with .txt captions beside them or a metadata.jsonl such as {"file_name": "1.png", "text": '
        '"a red mug", "label": 0}; a file of prompts; or a data set.'
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
    if ending == ".npz":
        return _array_rows(path, *read_npz(path))
    if is_idx(path):
        return _idx_rows(path, [path])
    if ending == ".tar":
        return _shards(path, [path], columns)
    if ending in FILES - set(TABLES):
        raise ValueError(
            f"expected a folder of pictures, or a file that ends in {', '.join(TABLES)}, .npz or .tar, or is idx."
        )
    return read_tables(path, [path], columns)


def _array_rows(path: Path, images: np.ndarray, labels: np.ndarray, note: str = "") -> Listing:
    numbered = enumerate(zip(images, labels.tolist(), strict=True))
    pictures = [(Pixels(f"{path}[{number}]", image), label) for number, (image, label) in numbered]
    rows = [Row(picture.name, picture, label=label) for picture, label in pictures]
    return Listing(str(path), rows, note=note, arrays=(images, labels))


def _idx_rows(path: Path, files: Sequence[Path], passed: Counter[str] | None = None) -> Listing:
    images, passed = idx_images(path), Counter() if passed is None else passed
    labels, notes = labels_of(images), []
    if labels is None:
        notes.append(f"{images.name} has no labels beside it, so all are of one class")
    for file in files:
        if file not in (images, labels):
            passed["idx files of other parts" if "-ubyte" in file.name else _kind(str(file))] += 1
    return _array_rows(path, *read_idx(images), "; ".join([*notes, *_counts(passed)]))


# Folders.


def _folder(path: Path, columns: Columns) -> Listing:
    passed = Counter[str]()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        for file in _walk(path, passed):
            if _ending(file) != ".arrow" and os.path.basename(file) not in SAVED:
                passed[_kind(file)] += 1
            else:
                check_data_file(Path(file))
        data, note = loaded(str(path), lambda library: library.load_from_disk(str(path)))
        notes = [note] if note else []
        return replace(read_data_set(data, str(path), columns, path), note="; ".join([*notes, *_counts(passed)]))
    if is_idx(path):
        return _idx_rows(path, [Path(file) for file in _walk(path, passed)], passed)
    root, said = _training_part(path)
    files = _walk(root, passed)
    named = [file for name in METADATA for file in files if os.path.basename(file) == name]
    best = {os.path.dirname(file): file for file in reversed(named)}
    endings = {_ending(file) for file in files}
    if not best and {".parquet"} < endings and endings & PICTURES:
        best = {file: file for file in _train_files([f for f in files if _ending(f) == ".parquet"], Counter())}
    if best:
        chosen = set(best.values())
        listing = _metadata_rows(root, [file for file in files if file in chosen], files, columns, passed)
    elif endings & PICTURES:
        rows = _picture_rows(root, files, columns, passed)
        listing = Listing(str(path), rows)
        said += _empty_classes(root, {row.label for row in rows})
    else:
        ending = next((ending for ending in (".tar", *TABLES) if ending in endings), "")
        used = _train_files([file for file in files if _ending(file) == ending], passed)
        passed.update(_kind(file) for file in files if _ending(file) != ending or not ending)
        read = _shards if ending == ".tar" else read_tables
        listing = read(path, [Path(file) for file in used], columns) if ending else Listing(str(path), [])
    said += [listing.note] if listing.note else []
    return replace(listing, source=str(path), note="; ".join([*said, *_counts(passed)]))


def _counts(passed: Counter[str]) -> list[str]:
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(passed.items()) if number)
    return [f"passed over: {counts}"] if counts else []


def _train_files(files: Sequence[str], passed: Counter[str]) -> list[str]:
    # Of train.csv and test.csv, or train-00000-of-00001.parquet and so on.
    parts = {file: re.split(r"[-_.]", os.path.basename(file).lower())[0] for file in files}
    if "train" not in parts.values() or not set(parts.values()) <= SPLITS:
        return list(files)
    passed["files of other parts than train"] += sum(part != "train" for part in parts.values())
    return [file for file, part in parts.items() if part == "train"]


def _training_part(path: Path) -> tuple[Path, list[str]]:
    folders = sorted(one.name for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
    if any((path / name).is_file() for name in METADATA) or not set(folders) <= SPLITS or not folders:
        return path, []
    if "train" not in folders:
        if len(folders) == 1:
            return path, []
        raise ValueError(
            f"{path} has the parts {', '.join(folders)}, and no train. Pass one of them: {path / folders[0]}."
        )
    others = sorted(one.name + "/" * one.is_dir() for one in path.iterdir() if one.name not in ("train", MARKER))
    return path / "train", [f"train/ is used, and not {', '.join(others)}"] if others else []


def _start(root: Path) -> str:
    # How the paths of all files below a folder begin.
    return "" if root == Path() else os.path.join(root, "")


def _walk(root: Path, passed: Counter[str]) -> list[str]:
    # Paths of all files, those in linked folders too. Each folder is read once, and rather where it lies than by a
    # link: links may lead in circles, to more paths than can be counted, and to the root of the file system.
    found, links, left = list[str](), list[str](), [_start(root)]
    known = {_identity(os.fspath(folder)) for folder in root.resolve().parents}
    while left or links:
        folder = left.pop() if left else links.pop(0)
        if _identity(folder) in known:
            passed["links to folders that are read already, or hold all of this"] += 1
            continue
        known.add(_identity(folder))
        with os.scandir(folder or ".") as entries:
            inside = sorted((entry.name, _is_folder(entry), entry.is_symlink()) for entry in entries)
        for name, is_folder, is_link in inside:
            if name.startswith("."):
                passed["hidden files or folders"] += name != MARKER
            elif is_folder:
                (links if is_link else left).append(os.path.join(folder, name, ""))
            else:
                found.append(folder + name)
    return sorted(found, key=lambda file: file.replace(os.sep, "\0"))  # by the names on the path, one by one


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A link in a circle is none, where the entry itself would raise.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder or ".")
    return status.st_dev, status.st_ino


def _ending(file: str) -> str:
    # Of its name, in small letters: ".png"; empty where there is none.
    ending = os.path.splitext(file)[1].lower()
    return ending if len(ending) > 1 else ""


def _kind(file: str) -> str:
    # What the note calls a file that is passed over.
    if not os.path.exists(file):
        return "links to nothing"
    ending = os.path.splitext(file)[1]
    return f"{ending} files" if 1 < len(ending) < 9 else "files without an ending"


def _metadata_rows(
    root: Path, metadata: Sequence[str], files: Sequence[str], columns: Columns, passed: Counter[str]
) -> Listing:
    parts = [read_tables(Path(file), [Path(file)], columns) for file in metadata]
    rows = [row for part in parts for row in part.rows]
    first = {_first_folder(row, root) for row in rows}
    if "train" in first and first <= SPLITS:
        chosen = [row for row in rows if _first_folder(row, root) == "train"]
        passed["rows of other parts than train/"] += len(rows) - len(chosen)
        rows = chosen
    used = {one.name for row in rows for one in (row.image, *row.maps.values()) if isinstance(one, File)}
    for file in files:
        if file in used or file in metadata:
            continue
        pictured = _ending(file) in PICTURES
        passed[f"pictures that no row of {Path(metadata[0]).name} uses" if pictured else _kind(file)] += 1
    return Listing(str(root), rows, parts[0].class_names)


def _first_folder(row: Row, root: Path) -> str:
    # Of the path of a row's picture, counted from ``root``.
    start = _start(root)
    inside = isinstance(row.image, File) and row.image.name.startswith(start)
    return row.image.name[len(start) :].split(os.sep)[0] if row.image and inside else ""


def _picture_rows(root: Path, files: Sequence[str], columns: Columns, passed: Counter[str]) -> list[Row]:
    pictures = [file for file in files if _ending(file) in PICTURES]
    stray, labels = None, list[str | None]()
    for file in pictures:
        folder, *deeper = file[len(_start(root)) :].split(os.sep)
        stray = stray or (None if deeper else file)
        labels.append(sys.intern(folder) if deeper else None)
    if stray and any(labels):
        raise ValueError(
            f"{root} holds images beside class subfolders such as {min(label for label in labels if label)}: "
            f"{os.path.basename(stray)}, for one. Move them into their classes, or elsewhere."
        )
    texts = {file for file in files if _ending(file) == ".txt"}
    alone = set(texts)
    missing = f"has no {columns.maps[0]}, which a metadata.jsonl must name." if columns.maps else ""
    rows = []
    for file, label in zip(pictures, labels, strict=True):
        beside, caption, fault = f"{os.path.splitext(file)[0]}.txt", None, ""
        if beside in texts and columns.text is not None:
            caption, fault = _beside(Path(beside))
        alone.discard(beside)
        rows.append(Row(file, File(file), caption, label, fault=missing or fault))
    if columns.text is None and alone != texts:
        passed[".txt captions, which are not needed"] += len(texts) - len(alone)
    for file in files:
        if file in texts and file in alone:
            passed[".txt files without a picture"] += 1
        elif file not in texts and _ending(file) not in PICTURES:
            passed[_kind(file)] += 1
    return rows


def _empty_classes(root: Path, classes: Collection[Any]) -> list[str]:
    # A class folder without pictures is no class.
    if None in classes:
        return []
    folders = [one for one in root.iterdir() if one.is_dir() and one.name[0] != "." and one.name not in classes]
    names = sorted(one.name for one in folders if not one.is_symlink() or not any(one.iterdir()))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"no pictures in {', '.join(names[:5])}{more}"] if names else []


def _beside(file: Path) -> tuple[str | None, str]:
    try:
        if (size := file.stat().st_size) > LARGEST_TEXT:
            raise ValueError(f"it has {size:,} bytes; expected a text.")
        text = decoded(file)
    except (OSError, ValueError) as error:
        return None, f"has a caption {file.name} that cannot be read: {error}"
    fault = text_fault(text, file)
    return (None, f"has a caption {file.name} that {fault}") if fault else (text.strip(), "")


# Shards of webdataset.


def _shards(source: Path, shards: Sequence[Path], columns: Columns) -> Listing:
    rows: list[Row] = []
    passed = Counter[str]()
    for shard in shards:
        samples: dict[str, dict[str, Member]] = {}
        for part in _members(shard):
            folder, _, base = part.name.rpartition("/")
            key, _, kind = base.partition(".")
            if part.isreg() and not part.issparse() and key:
                member = Member(shard, f"{shard}/{part.name}", part.offset_data, part.size)
                samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[sys.intern(kind.lower())] = member
            else:
                passed["members that are no plain files"] += not part.isdir()
        rows += [_sample(f"{shard}/{key}", parts, columns, passed) for key, parts in samples.items()]
    return Listing(str(source), rows, note="; ".join(_counts(passed)))


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    last = -1
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for part in archive:
                if part.size < 0 or part.offset <= last:  # tarfile would go round in circles
                    raise ValueError(f"{part.name!r} says that it has {part.size} bytes")
                last = part.offset
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep a thousand bytes for each
                yield part
    except Exception as error:  # of any kind: tarfile trusts the sizes and texts of its headers
        reason = str(error)[:200] or type(error).__name__
        raise ValueError(
            f"{shard} is no tar archive, is cut, or is compressed: {reason}. Store it without compression."
        ) from error


def _sample(name: str, parts: Mapping[str, Member], columns: Columns, passed: Counter[str]) -> Row:
    values: dict[str, Any] = {}
    for kind, member in parts.items():
        what, _, ending = kind.rpartition(".")
        if f".{ending}" in PICTURES and what in ("", *columns.maps):
            values[what or columns.image or "image"] = member
        elif kind in ("txt", "text", "caption", "json", "cls"):
            try:
                values |= _read_part(kind, member, columns)
            except (ValueError, RecursionError) as error:
                return Row(member.name, fault=f"cannot be used: {str(error) or 'it is nested too deep'}")
        else:
            passed[f".{kind} members"] += 1
    return row_of(values, columns, Path(), name)


def _read_part(kind: str, member: Member, columns: Columns) -> dict[str, Any]:
    if member.size > LARGEST_TEXT:
        raise ValueError(f"it has {member.size:,} bytes; expected a text.")
    text = member.read().decode("utf-8-sig").strip()
    if kind == "json":
        content = json.loads(text)
        return dict(content) if isinstance(content, Mapping) else {}
    if kind == "cls":
        return {"label": int(text) if text.isdecimal() else text}
    return {(columns.texts or ("text",))[0]: text}
