"""Where own samples come from: a folder with metadata.jsonl, or a Hugging Face data set, row by row."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scorefield.cache import content_key
from scorefield.files import read_regular, read_text

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


class Row(Protocol):
    """Where one sample comes from."""

    @property
    def caption(self) -> Any:
        """A string, unless something is wrong."""
        ...

    def name(self, key: str) -> str:
        """Of the file behind "image" or a map, to complain with."""
        ...

    def read(self, key: str) -> bytes:
        """The file's bytes."""
        ...

    def stamp(self) -> str:
        """Something that changes whenever a file does; empty if one is missing."""
        ...


@dataclass(frozen=True)
class FolderRow:
    """A line of metadata.jsonl."""

    files: Mapping[str, Path]
    caption: Any

    def name(self, key: str) -> str:
        """The path."""
        return str(self.files[key])

    def read(self, key: str) -> bytes:
        """Raises ``ValueError`` if there is no such file, or it is no regular one."""
        try:
            return read_regular(self.files[key])
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error

    def stamp(self) -> str:
        """Paths, sizes and times of change."""
        facts = []
        for path in self.files.values():
            try:
                status = path.stat()
            except OSError:
                return ""
            facts.append((str(path.absolute()), status.st_size, status.st_mtime_ns))
        return repr(facts)


@dataclass(frozen=True)
class DatasetRow:
    """A row of a Hugging Face data set."""

    dataset: Any
    number: int
    columns: Mapping[str, str]
    caption: Any
    label: str

    def name(self, key: str) -> str:
        """Data set, row and column."""
        return f"{self.label}[{self.number}] {self.columns[key]!r}"

    def read(self, key: str) -> bytes:
        """Raises ``ValueError`` for an empty cell."""
        picture = self.dataset[self.number][self.columns[key]]
        if picture is None:
            raise ValueError("is missing")
        if picture["bytes"] is None:
            return FolderRow({key: Path(picture["path"])}, None).read(key)
        return bytes(picture["bytes"])

    def stamp(self) -> str:
        """A hash of the bytes: they may come from files that change behind the table."""
        try:
            return content_key(*(self.read(key) for key in self.columns))
        except ValueError:
            return ""


def read_rows(data: Any, *, text: str | None, image: str | None, maps: Sequence[str]) -> Sequence[Row]:
    """The rows of a folder or data set; arguments as of :func:`controlnet.samples.load_pictures`.

    Raises ``ValueError`` for a source that is not there, or columns that it lacks.
    """
    if not isinstance(data, str | Path):
        return _dataset_rows(data, "data set", text, image, maps)
    path = Path(data)
    if (path / "metadata.jsonl").is_file():
        return _folder_rows(path, text, image or "file_name", maps)
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if not saved and (path.exists() or not HUB_NAME.fullmatch(str(data))):
        what = "holds no metadata.jsonl" if path.is_dir() else "is no folder"
        raise ValueError(
            f'{path} {what}. Pass a folder whose metadata.jsonl has a line {{"file_name": ..., "text": ...}} for '
            "each image, or a Hugging Face data set."
        )
    return _dataset_rows(_load_dataset(str(data), saved), str(data), text, image, maps)


def _folder_rows(folder: Path, text: str | None, image: str, maps: Sequence[str]) -> list[Row]:
    file, rows = folder / "metadata.jsonl", list[Row]()
    columns = {"image": image, **{name: f"{name}_file_name" for name in maps}}
    # Not splitlines(): U+2028 and its like end no line of JSON. Some editors put a byte order mark first.
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            files = {key: folder / values[column] for key, column in columns.items()}
            rows.append(FolderRow(files, "" if text is None else values.get(text)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = ", ".join(f'"{column}": ...' for column in (*columns.values(), *([text] if text else [])))
            raise ValueError(
                f"{file}, line {number}: expected {{{expected}}}; got {line[:100]!r} ({error!r})."
            ) from error
    return rows


def _load_dataset(name: str, saved: bool) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises a dozen kinds, its own among them
        raise ValueError(
            f"{name} is no folder here, and no data set that can be loaded: {type(error).__name__}: {error}"
        ) from error
    return data["train"] if isinstance(data, datasets.DatasetDict) else data


def _dataset_rows(data: Any, label: str, text: str | None, image: str | None, maps: Sequence[str]) -> list[Row]:
    import datasets

    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"expected a folder, or a datasets.Dataset of one split; got {type(data).__name__}.")
    pictures = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    images = [name for name in pictures if name not in maps]
    columns = {"image": image or (images[0] if images else "image"), **{name: name for name in maps}}
    if missing := sorted(set(columns.values()) - set(pictures)):
        raise ValueError(f"{label} has no column of images called {', '.join(missing)}; it has {pictures}.")
    if text is not None and text not in data.features:
        raise ValueError(f"{label} has no column {text!r} of captions; its columns are {list(data.features)}.")
    captions = [""] * len(data) if text is None else list(data[text])
    for column in columns.values():
        data = data.cast_column(column, datasets.Image(decode=False))
    data = data.select_columns(list(columns.values()))
    return [DatasetRow(data, number, columns, caption, label) for number, caption in enumerate(captions)]
