"""Files that somebody else named: only regular ones are opened, and their names cannot disturb a terminal."""

import io
import json
import math
import os
import stat
import sys
from pathlib import Path
from typing import Any

KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip

MOST_TEXT = 2**26
"""Bytes of the largest config or vocabulary that is read of a model's folder. Real ones have at most a quarter."""


def check_regular(path: Path | str) -> None:
    """Raise ``ValueError`` for anything but a regular file or a link to one, and ``OSError`` for nothing at all.

    A pipe that nobody writes to would wait for ever, and /dev/zero never ends. The message goes behind the name.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"is {KINDS.get(stat.S_IFMT(mode), 'no file')}; expected a regular file.")


def open_regular(path: Path | str) -> io.BufferedReader:
    """Return a regular file, opened to read bytes. Raises as :func:`check_regular` does."""
    check_regular(path)
    return open(path, "rb")


def check_small(path: Path | str) -> None:
    """Raise ``ValueError`` for a file of more than ``MOST_TEXT`` bytes. The message goes behind the name."""
    if (size := os.stat(path).st_size) > MOST_TEXT:
        raise ValueError(f"has {size:,} bytes; expected at most {MOST_TEXT:,}.")


def read_regular(path: Path | str) -> bytes:
    """Return the bytes of a regular file. Raises as :func:`check_regular` does."""
    with open_regular(path) as file:
        return file.read()


def read_text(path: Path | str) -> str:
    """UTF-8 text of a regular file, without a byte order mark. Raises as :func:`check_regular` does."""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
        return file.read()


def load_json(file: Path) -> Any:
    """Return the content of a JSON file, in which all numbers are finite.

    Python reads NaN, Infinity and 1e999 as numbers, which no check such as ``x <= 0`` would refuse later.
    Raises ``ValueError`` for them, for what is no JSON, nested too deep or larger than ``MOST_TEXT``; ``OSError``
    for no file.
    """
    check_regular(file)
    check_small(file)
    try:
        return json.loads(read_regular(file).decode(), parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("is nested too deep for a JSON file.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object. Raises ``ValueError`` for a file that is missing or holds something else."""
    try:
        content = load_json(file)
    except (OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"cannot read {file}: {reason}. Save the pipeline again with save_pretrained.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object; got {type(content).__name__}.")
    return content


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds the number {text}; expected finite ones")
    return value


def printable(text: str) -> str:
    r"""``text`` on one line, with escapes for what moves a cursor or forges a line: a line feed becomes "\n".

    Escaped is what ``str.isprintable`` says no to: control characters, separators of lines, marks that turn the
    direction of writing, and halves of characters, as names that are not UTF-8 have them.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(message: str) -> None:
    """Print a warning in one line on stderr, in the first process of a run only."""
    if not os.environ.get("RANK", "").strip("0"):
        print(f"warning: {printable(message)}", file=sys.stderr)
