"""The files of a run as its page reads them: regular ones below its folder, of bounded size, believed in nothing.

A run's folder may come from someone else. No link out of it is followed, nothing that waits or never ends is
opened, and what cannot be read is noted, so that the page says so.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

MOST_JSON = 2**22
"""Bytes of the largest JSON file that is read. A run's own have a few thousand."""

MOST_NAMES = 50_000
"""Entries of a folder that are looked at."""

MOST_TEXT = 600
"""Characters of a text from a file that are shown."""


@dataclass(frozen=True, eq=False)
class Folder:
    """A run's folder.

    Attributes:
        place: the folder, links resolved.
        shown: its path as whoever asks for the page writes it.
        notes: what could not be read, in words; each reader adds to it.
    """

    place: Path
    shown: str
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Last part of the path, for titles."""
        return Path(self.shown).name or self.place.name

    def holds(self, name: str) -> bool:
        """Return True for a name that is there, of whatever kind; a link is not followed."""
        return os.path.lexists(self.place / name)

    def file(self, name: str) -> Path | None:
        """Return the path of a regular file in the folder, or None; one that may not be read is noted."""
        if not self.holds(name):
            return None
        try:
            path = (self.place / name).resolve(strict=True)
            if not path.is_relative_to(self.place):
                self.notes.append(f"{name} is a link out of the folder, which is not followed.")
            elif not stat.S_ISREG(path.stat().st_mode):
                self.notes.append(f"{name} is no regular file.")
            else:
                return path
        except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
            self.notes.append(f"{name} cannot be read: {_why(error)}.")
        return None

    def read(self, name: str, most: int) -> bytes | None:
        """Return the bytes of a file, or None; one above ``most`` bytes is noted."""
        if (path := self.file(name)) is None:
            return None
        try:
            # Of what was exchanged for a pipe since it was looked at, opening does not wait.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(descriptor, "rb") as file:
                found = os.fstat(descriptor)
                if stat.S_ISREG(found.st_mode) and found.st_size <= most:
                    return file.read(most)
            self.notes.append(f"{name} has {found.st_size:,} bytes; at most {most:,} are read.")
        except OSError as error:
            self.notes.append(f"{name} cannot be read: {_why(error)}.")
        return None

    def json(self, name: str) -> Any:
        """Return the content of a JSON file, or None; a damaged one is noted."""
        return None if (data := self.read(name, MOST_JSON)) is None else self._parsed(name, data)

    def object(self, name: str) -> dict[str, Any]:
        """Return a JSON object, empty where there is none; anything else is noted."""
        if (data := self.read(name, MOST_JSON)) is None:
            return {}
        content = self._parsed(name, data)
        if content is not None and not isinstance(content, dict):
            self.notes.append(f"{name} holds no JSON object.")
        return content if isinstance(content, dict) else {}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the objects of a file with a JSON object a line; damaged lines are noted."""
        data = self.read(name, MOST_JSON)
        found = [] if data is None else [self._parsed(name, line) for line in data.splitlines() if line.strip()]
        return [one for one in found if isinstance(one, dict)]

    def _parsed(self, name: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            said = f"{name} is damaged: it is no JSON ({_why(error)})."
            if said not in self.notes:
                self.notes.append(said)
            return None

    def names(self, folder: str, pattern: str) -> list[str]:
        """Return sorted names in a folder below that match a regular expression, with the folder before them."""
        place = self.place / folder
        try:
            inside = place.resolve(strict=True).is_relative_to(self.place)
            entries = list(islice(_entries(place), MOST_NAMES)) if inside else []
        except (OSError, RuntimeError):
            return []
        if not inside:
            self.notes.append(f"{folder} is a link out of the folder, which is not followed.")
        return sorted(f"{folder}/{name}" for name in entries if re.fullmatch(pattern, name))


def _entries(place: Path) -> Iterator[str]:
    with os.scandir(place) as entries:
        for entry in entries:
            yield entry.name


def _why(error: Exception) -> str:
    return shortened(getattr(error, "strerror", None) or str(error) or type(error).__name__, 100).rstrip(".")


def number(value: Any) -> float | None:
    """Return a value of a file as a number, nan and infinities too; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def whole(value: Any) -> int | None:
    """Return a value of a file as a count; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        return None
    return value


def shortened(text: str, most: int = MOST_TEXT) -> str:
    """Return a text on one line, cut to ``most`` characters, without characters that cannot be printed."""
    line = "".join(c if c.isprintable() else " " for c in text[: most + 1])
    return line if len(text) <= most else line[:most] + "..."


def told(value: Any) -> str:
    """Return a value of a file in a few words."""
    if isinstance(value, str):
        return shortened(value)
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, list) and all(isinstance(one, str | int | float) for one in value[:40]):
        more = " ..." if len(value) > 40 else ""
        return shortened(" ".join(told(one) for one in value[:40])) + more
    try:
        return shortened(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        return "..."


def figure(value: float | None) -> str:
    """Return a number with four digits; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == round(value, 0) and abs(value) < 1e9 else f"{value:.4g}"
