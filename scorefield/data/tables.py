"""Rows of files with a line per sample (text, jsonl, csv, parquet), and of data sets of ``datasets``."""

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scorefield.data.parquet import read_parquet
from scorefield.data.rows import (
    IMAGE_COLUMNS,
    Cell,
    Columns,
    Listing,
    Member,
    Picture,
    Row,
    half_character,
    row_of,
)
from scorefield.files import check_regular, open_regular

TABLES = (".parquet", ".jsonl", ".csv", ".tsv", ".json", ".txt")
"""Endings of such files; of a folder without pictures those of the first that is there are read."""


def read_tables(source: Path, files: Sequence[Path], columns: Columns) -> Listing:
    """Return the rows of files of one ending; of an unknown one, lines of text.

    Pictures are named from a file's folder.

    Raises ``ValueError`` for a file that is none of its kind; a line that cannot be used has a fault.
    """
    ending = files[0].suffix.lower()
    if ending == ".parquet":
        for file in files:
            check_data_file(file)
        with reading_table(str(source)):
            data = read_parquet(files)
        return read_data_set(data, str(source), columns, files[0].parent)
    rows: list[Row] = []
    for file in files:
        if ending not in TABLES or ending == ".txt":
            lines = [(place, line.strip(), text_fault(line, file)) for place, line in _lines(file)]
            rows += [Row(place, caption=None if fault else line, fault=fault) for place, line, fault in lines]
            continue
        parse = _csv_rows if ending in (".csv", ".tsv") else _json_rows
        for place, values, fault in parse(file):
            rows.append(Row(place, fault=fault) if fault else row_of(values, columns, file.parent, place))
    return Listing(str(source), rows)


def decoded(path: Path) -> str:
    """Return the text of a file.

    Bytes that are no UTF-8 become halves of characters, for :func:`text_fault` to find.
    """
    with opened(path) as file:
        return file.read()


def opened(path: Path, newline: str = "\n") -> io.TextIOWrapper:
    """Return a file of text, open to be read line by line. Raises ``ValueError`` for UTF-16."""
    file = open_regular(path)
    if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise ValueError(f"{path} is UTF-16. Save it as UTF-8, such as: iconv -f UTF-16 -t UTF-8 {path.name}")
    return io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline)


def text_fault(text: str, path: Path) -> str:
    """Why a part of :func:`decoded` text cannot be used; empty if it can."""
    for place, character in enumerate(text if half_character(text) else ""):
        if 0xDC80 <= ord(character) <= 0xDCFF:
            return (
                f"is not UTF-8: byte {ord(character) - 0xDC00:#04x} after {text[max(0, place - 20) : place]!r}. "
                f"Save the file as UTF-8, such as: iconv -f WINDOWS-1252 -t UTF-8 {path.name}"
            )
    return ""


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    # Only line feeds end a line: a caption may hold other separators, such as U+2028.
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", line


def _json_rows(path: Path) -> Iterator[tuple[str, Any, str]]:
    whole = path.suffix.lower() == ".json"
    for place, line in [(str(path), decoded(path))] if whole else _lines(path):
        values, fault = None, text_fault(line, path)
        try:
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
    with opened(path, newline="") as file:
        table = csv.DictReader(file, delimiter=delimiter)
        try:
            for values in table:
                known = {str(name): cell or None for name, cell in values.items() if name is not None}
                fault = next((fault for cell in known.values() if cell and (fault := text_fault(cell, path))), "")
                if None in values:
                    fault = f"has more cells than the header, which has {len(known)}."
                yield f"{path}, line {table.line_num}", known, fault
        except csv.Error as error:
            raise ValueError(f"{path}, line {table.line_num}: {error}.") from error


def check_data_file(file: Path) -> None:
    """Raise ``ValueError``, naming it, unless a library may open the file: for a pipe it would wait for ever."""
    try:
        check_regular(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} {error}") from error


@contextmanager
def reading_table(source: str) -> Iterator[None]:
    """Turn whatever the library ``datasets`` raises of a damaged table into a ``ValueError`` that names it.

    It raises a dozen kinds, its own among them, and ``ImportError`` for sounds and films, whose readers are
    extras.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it prints names of files as they are; what it says is in the error, too
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ValueError(f"{source} cannot be loaded as a data set: {type(error).__name__}: {reason}") from error
    finally:
        logging.disable(disabled)


def loaded(source: str, load: Callable[[Any], Any]) -> tuple[Any, str]:
    """Return the training part of what ``load`` gets of the library ``datasets``, and what is said of other parts.

    Raises ``ValueError`` naming the source if it cannot be loaded.
    """
    import datasets

    # It would tell a server of each load, of a local file's too, and wait for it.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    with reading_table(source):
        data = load(datasets)
        if not isinstance(data, datasets.DatasetDict):
            return data, ""
        others = ", ".join(sorted(set(data) - {"train"}))
        return data["train"], f"train is used, {others} not" if others else ""


def read_data_set(data: Any, source: str, columns: Columns, folder: Path) -> Listing:
    """Return the rows of a ``datasets.Dataset``, whose paths begin in ``folder``.

    Its pictures stay where they are.

    Raises ``ValueError`` for anything else, and for columns that it lacks.
    """
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"expected a folder, or a datasets.Dataset of one split; got {type(data).__name__}.")
    typed = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    maps = {
        name: next((c for c in (name, f"{name}_file_name") if c in data.features), name) for name in columns.maps
    }
    usual = [*(name for name in typed if name not in maps.values()), *IMAGE_COLUMNS]
    image = columns.image or next((name for name in usual if name in data.features), "")
    wanted = sorted({*maps.values(), *([image] if image else [])})
    if missing := [name for name in wanted if name not in data.features]:
        raise ValueError(f"{source} has no column {', '.join(missing)} of pictures; it has {list(data.features)}.")
    if columns.text and columns.text not in data.features:
        raise ValueError(f"{source} has no column {columns.text!r} of captions; it has {list(data.features)}.")
    with reading_table(source):
        for name in set(wanted) & set(typed):
            data = data.cast_column(name, datasets.Image(decode=False))
        # Paths are few bytes, and are read at once; pictures one by one.
        large = [name for name in wanted if "string" not in str(getattr(data.features[name], "dtype", ""))]
        names = {*columns.texts, "label", *wanted} - set(large)
        pictures = [_pictures(data, name, source, folder) for name in large]
        columns, rows = replace(columns, image=image), list[Row]()
        small = _small(data, [name for name in data.features if name in names])
        for number, (values, *found) in enumerate(zip(small, *pictures, strict=True)):
            cells = dict(zip(large, found, strict=True))
            values = {**values, **cells, **{key: cells[name] for key, name in maps.items() if name in cells}}
            rows.append(row_of(values, columns, folder, f"{source}[{number}]"))
    labels = getattr(data.features.get("label"), "names", None)
    return Listing(source, rows, labels and tuple(labels))


def _pictures(data: Any, column: str, source: str, folder: Path) -> Iterator[Picture | None]:
    # The picture of each row, None where there is none. Pages that are mapped into memory would count as used.
    names = (f"{source}[{number}] {column!r}" for number in range(len(data)))
    places = None if data._indices is not None else _places(data.cache_files, column, len(data))
    if places is None:
        table, empty = data.select_columns([column]), _nulls(data, column)
        for number, name in enumerate(names):
            yield None if number in empty else Cell(table, number, column, name, folder)
        return
    table, row = data.select_columns([column]), 0
    for file, offsets, valid, named in places:
        starts, sizes = offsets.tolist(), np.diff(offsets).tolist()
        for number, there in enumerate(valid):
            name = next(names)
            if there:
                yield Member(file, name, starts[number], sizes[number])
            else:
                yield Cell(table, row, column, name, folder) if number in named else None
            row += 1


Places = tuple[Path, np.ndarray, list[bool], set[int]]
"""Of n cells: their arrow file, (n + 1,) offsets in it, whether each has bytes, and which others name a file."""


def _places(files: Sequence[Mapping[str, str]], column: str, num_rows: int) -> list[Places] | None:
    # Where the bytes of a column lie in arrow files; None where that cannot be told, as of parts of a table.
    import pyarrow as pa

    found: list[Places] = []
    for path in (Path(file["filename"]) for file in files):
        with pa.memory_map(os.fspath(path)) as mapped:
            start, size = mapped.read_buffer(1).address, mapped.size()
            mapped.seek(0)
            for batch in pa.ipc.open_stream(mapped):
                cells, paths = batch.column(column), set[int]()
                if pa.types.is_struct(cells.type):  # as ``datasets`` keeps pictures
                    parts = {kind.name: part for kind, part in zip(cells.type, cells.flatten(), strict=True)}
                    cells, named = parts.get("bytes", cells), parts.get("path", pa.nulls(len(cells)))
                    given = named.to_pylist() if cells.null_count else []
                    paths = {number for number, name in enumerate(given) if name}
                if cells.type not in (pa.binary(), pa.large_binary()):
                    return None
                _, ends, content = cells.buffers()
                width = np.int32 if cells.type == pa.binary() else np.int64
                offsets = np.frombuffer(ends, width)[cells.offset :][: len(cells) + 1].astype(np.int64)
                offsets += content.address - start if content else 0
                if offsets[0] < 0 or offsets[-1] > size or (np.diff(offsets) < 0).any():
                    return None
                found.append((path, offsets, cells.is_valid().to_pylist(), paths))
    return found if sum(len(valid) for _, _, valid, _ in found) == num_rows else None


def _small(data: Any, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    # Without columns a table has no rows.
    yield from data.select_columns(names) if names else ({} for _ in range(len(data)))


def _nulls(data: Any, column: str) -> set[int]:
    if not data.data.column(column).null_count:
        return set()
    place, found = 0, set[int]()
    for chunk in data.with_format("arrow").select_columns([column]).iter(1000):
        valid = chunk.column(0).is_valid().to_pylist()
        found |= {place + number for number, there in enumerate(valid) if not there}
        place += len(valid)
    return found
