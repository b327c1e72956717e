"""Prompts to distil with, and the real images that belong to them: files, ``datasets``, the toy world."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from captioned import rendered
from torch import Tensor

from scorefield import files
from scorefield.models.prompts import default_cache_folder
from scorefield.randomness import derived_generator
from toyworld.captions import Attributes, caption, describe
from toyworld.data import draw_scenes

PROMPT_KEYS = ("prompt", "text", "caption")
IMAGE_KEYS = ("image", "file_name")
NO_TEXT = (".csv", ".tsv", ".json", ".parquet", ".arrow", ".zip")
WORLD_SIZE = 4000

PART_DROPOUT = 0.2
"""Share of the toy world's captions without view, and of those without background, as its pipeline was trained."""


class Pictures(Protocol):
    """Images that are read when they are asked for: paths, the bytes of files, or bytes (3, h, w)."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Path | bytes | Tensor: ...


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts, and an image for each of them or for none.

    Attributes:
        prompts: at least one, none of them empty.
        images: as many, or none.
    """

    prompts: tuple[str, ...]
    images: Pictures = ()


def read_texts(source: str, num: int = 0, seed: int = 0) -> Texts:
    """What ``--prompts`` names, the first ``num`` of them, or all. No image is opened.

    Raises ``ValueError`` for a source that is not there, holds too few prompts, or images for some of them only.
    """
    if source == "toyworld":
        return world_texts(num or WORLD_SIZE, seed)
    texts = read_file(Path(source), num) if Path(source).is_file() else read_data_set(source, num)
    if not texts.prompts:
        raise ValueError(f"--prompts {source} holds no prompt; expected one a line, such as: a red mug.")
    if len(texts.prompts) < num:
        raise ValueError(f"--prompts {source} holds {len(texts.prompts)} prompts; got --num-prompts {num}.")
    return texts


def read_file(path: Path, num: int) -> Texts:
    """Prompts of a text file, one a line, or of a jsonl file, which may name images."""
    suffix = path.suffix.lower()
    if suffix in NO_TEXT:
        raise ValueError(
            f"--prompts {path} is no text: expected a prompt a line, or a jsonl file. `datasets` reads it where "
            "--prompts is a folder with the file in it."
        )
    # splitlines would also split at characters that a prompt may hold, such as U+2028.
    lines = [line.strip() for line in read_text(path).split("\n")]
    kept = [(number, line) for number, line in enumerate(lines, 1) if line][: num or None]
    if suffix != ".jsonl":
        return Texts(tuple(line for _, line in kept))
    rows = [read_row(line, f"{path}, line {number}", path.parent) for number, line in kept]
    images = [image for _, image in rows if image is not None]
    check_images(str(path), len(images), len(rows))
    return Texts(tuple(prompt for prompt, _ in rows), images)


def read_text(path: Path) -> str:
    """Text of a file, without a byte order mark. Raises ``ValueError`` for one that is none."""
    try:
        return files.read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"--prompts {path} cannot be read as text: {error}") from error


def read_row(line: str, place: str, folder: Path) -> tuple[str, Path | bytes | None]:
    """Prompt and image, or None, of a line of jsonl. Raises ``ValueError`` naming what is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}, is no JSON: {error}") from error
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} must be an object with {' or '.join(PROMPT_KEYS)}; got {row!r}.")
    image = next((row[key] for key in IMAGE_KEYS if row.get(key) is not None), None)
    return read_prompt(row, place), None if image is None else read_image(image, place, folder)


def read_prompt(row: Mapping[str, Any], place: str) -> str:
    """The prompt of a row. Raises ``ValueError`` where there is none, or it is empty."""
    prompt = next((row[key] for key in PROMPT_KEYS if row.get(key) is not None), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place} has no prompt: expected text under {' or '.join(PROMPT_KEYS)}; got {prompt!r}.")
    return prompt.strip()


def read_image(value: Any, place: str, folder: Path) -> Path | bytes:
    """An image's path, or the bytes of its file. Raises ``ValueError`` for anything else."""
    if isinstance(value, Mapping):  # as `datasets` has them
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return folder / value
    if not isinstance(value, bytes):
        raise ValueError(f"{place} has no image: expected the path of one; got {value!r}.")
    return value


def check_images(source: str, number: int, of: int) -> None:
    """Raise ``ValueError`` where some prompts have an image and others have none."""
    if number not in (0, of):
        raise ValueError(f"--prompts {source}: {number} of {of} prompts have an image; all must.")


@dataclass(frozen=True, eq=False)
class Column:
    """Images of a data set of ``datasets``, which reads them from its files one by one."""

    rows: Any
    name: str
    source: str
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int, /) -> Path | bytes:
        return read_image(self.rows[number][self.name], f"{self.source}, row {number + 1}", self.folder)


def read_data_set(source: str, num: int) -> Texts:
    """Prompts of a data set of ``datasets``, its "train" part, and its images, which stay where they are."""
    import datasets

    rows = load_rows(source)
    rows = rows.select(range(min(num or len(rows), len(rows))))
    keys = [key for key in PROMPT_KEYS if key in rows.column_names]
    if not keys:
        raise ValueError(
            f"--prompts {source} must have a column {' or '.join(PROMPT_KEYS)}; it has {rows.column_names}."
        )
    named = enumerate(rows.select_columns(keys), 1)
    prompts = tuple(read_prompt(row, f"{source}, row {number}") for number, row in named)
    name = next((key for key in IMAGE_KEYS if key in rows.column_names), None)
    found = 0 if name is None else len(rows) - rows.data.column(name).null_count
    check_images(source, found, len(rows))
    if not found:
        return Texts(prompts)
    if isinstance(rows.features[name], datasets.Image):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    path = Path(source)
    return Texts(prompts, Column(rows.select_columns([name]), str(name), source, path))


def load_rows(source: str) -> Any:
    """A data set of ``datasets``: its "train" part. Raises ``ValueError`` if there is none."""
    import datasets

    is_file = Path(source).suffix.lower() in (".txt", ".jsonl", *NO_TEXT)
    if not Path(source).exists() and (is_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source)):
        raise ValueError(f"--prompts {source}: no such file; expected a text or jsonl file, or a data set.")
    try:
        return datasets.load_dataset(source, split="train")
    except Exception as error:  # of its many libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--prompts {source}: no such file, and no data set ({reason}).") from error


@dataclass(frozen=True)
class Renders:
    """The toy world's first renders, which are made, or read from a file, a thousand at a time."""

    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, number: int, /) -> Tensor:
        start = number // 1000 * 1000
        folder = default_cache_folder().parent / "toyworld"
        return _renders(folder, start, min(start + 1000, self.num))[number - start]


@functools.lru_cache(maxsize=1)
def _renders(folder: Path, start: int, end: int) -> Tensor:
    return rendered(folder, start, end, 0)


def world_texts(num: int, seed: int) -> Texts:
    """Captions of the toy world's training scenes, some without view or background, and their renders."""
    described = [describe(scene) for scene in draw_scenes(range(num))]
    prompts = tuple(caption(thinned(one, number, seed)) for number, one in enumerate(described))
    return Texts(prompts, Renders(num))


def thinned(attributes: Attributes, number: int, seed: int) -> Attributes:
    """A caption's attributes without some of those that may be left out."""
    view, background = (
        torch.rand(2, generator=derived_generator(seed, "caption", number)) < PART_DROPOUT
    ).tolist()
    return Attributes(
        attributes.shape, attributes.colour, None if background else attributes.background,
        None if view else attributes.view,
    )  # fmt: skip
