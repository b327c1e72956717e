"""Scalars of a run, read off TensorBoard's event files.

The files are read record by record: scalars have a hundred bytes, pictures a million, and what is large is passed
over. A record is a protobuf message, of which three fields are of interest (tensorflow/core/util/event.proto).
TensorBoard's own EventAccumulator sums up every byte in Python: 11 s for 22 MB, which no page should cost.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from scorefield.report.folder import Folder

Points = list[tuple[int, float]]

MOST_RECORD = 2**14
"""Bytes of the largest record that is looked at."""

MOST_BYTES = 2**31
"""Bytes of the event files of a run that are looked at."""

MOST_SCALARS = 300_000
"""Scalars of a run that are read."""

STARTED = 1
"""Status of a session log in an event: the run was started (again)."""

MOST_CURVES = 300
"""Curves of a run that are kept."""


def read_curves(folder: Folder, logs: str = "logs") -> dict[str, Points]:
    """Return (step, value) of each scalar by its name, in the order of steps; what cannot be read is noted.

    What an earlier start of the run logged beyond the step that a later one went on from is left out, as
    TensorBoard leaves it out.
    """
    found: dict[str, dict[int, float]] = {}
    seen, count = 0, 0
    for name in folder.names(logs, r"events\.out\.tfevents\..*"):
        if (path := folder.file(name)) is None:
            continue
        seen += path.stat().st_size
        if seen > MOST_BYTES:
            folder.notes.append(f"{logs} holds more than {MOST_BYTES:,} bytes; later curves are left out.")
            break
        try:
            for step, tag, value in _scalars(path):
                count += 1 if tag is not None else 1 + len(found)
                if tag is None:
                    for curve in found.values():
                        while curve and next(reversed(curve)) >= step:
                            curve.popitem()
                elif tag in found or len(found) < MOST_CURVES:
                    found.setdefault(tag[:200], {})[step] = value
                if count > MOST_SCALARS:
                    folder.notes.append(f"{name} holds more than {MOST_SCALARS:,} scalars; the rest is left out.")
                    break
        except (ValueError, OSError) as error:
            folder.notes.append(f"{name} is damaged: {error} Curves end there.")
    return {tag: sorted(curve.items()) for tag, curve in sorted(found.items()) if curve}


def _scalars(path: Path) -> Iterator[tuple[int, str | None, float]]:
    # (step, name, value); a name of None says that the run was started again at this step.
    for record in _records(path):
        event = dict(_fields(record))
        step, summary, session = event.get(2, 0), event.get(5), event.get(7)
        if not isinstance(step, int):
            raise ValueError("a record is no event.")
        if isinstance(session, bytes) and dict(_fields(session)).get(1) == STARTED:
            yield step, None, math.nan
        for number, value in _fields(summary) if isinstance(summary, bytes) else ():
            found = dict(_fields(value)) if number == 1 and isinstance(value, bytes) else {}
            tag, scalar = found.get(1), found.get(2)
            if isinstance(tag, bytes) and isinstance(scalar, bytes) and len(scalar) == 4:
                yield step, tag.decode(errors="replace"), struct.unpack("<f", scalar)[0]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    # Numbers and values of the fields of a protobuf message; a float is its bytes.
    place, size = 0, len(data)
    while place < size:
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            length, place = _varint(data, place)
        end = place + length
        if kind not in (1, 2, 5) or end > size:
            raise ValueError("a record is no event.")
        yield key >> 3, data[place:end]
        place = end


def _varint(data: bytes, place: int) -> tuple[int, int]:
    # A whole number of seven bits a byte, the lowest first, and where it ends.
    value = 0
    for number, byte in enumerate(data[place : place + 10]):
        value |= (byte & 127) << 7 * number
        if byte < 128:
            return value, place + number + 1
    raise ValueError("a record is no event.")


def _records(path: Path) -> Iterator[bytes]:
    # Each is its length (8 bytes), a sum of that (4), its bytes, and a sum of those (4).
    size, place = path.stat().st_size, 0
    if not size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
        while place < size:
            end = place + 12
            length = int.from_bytes(data[place : place + 8], "little")
            place = end + length + 4
            if end > size or place > size:
                raise ValueError("it ends within a record.")
            if length <= MOST_RECORD:
                yield data[end : end + length]
