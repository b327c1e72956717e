"""Scalars of a run, read off TensorBoard's event files.

The files are read record by record: scalars have a hundred bytes, pictures a million, and what is large is passed
over. TensorBoard's own EventAccumulator sums up every byte in Python, 11 s for 22 MB, which no page should cost.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from scorefield.report.folder import Folder

Points = list[tuple[int, float]]

MOST_RECORD = 2**14
"""Bytes of the largest record that is looked at."""

MOST_BYTES = 2**31
"""Bytes of the event files of a run that are looked at."""

MOST_SCALARS = 1_000_000
"""Scalars of a run that are read."""

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
                count += 1
                if tag is None:
                    for curve in found.values():
                        for later in [one for one in curve if one >= step]:
                            del curve[later]
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
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    with path.open("rb") as file:
        for record in _records(file):
            try:
                event: Any = Event.FromString(record)
            except Exception:  # protobuf's DecodeError, which is a dependency of TensorBoard's alone
                raise ValueError("a record is no event.") from None
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                yield event.step, None, math.nan
            for value in event.summary.value if event.HasField("summary") else ():
                if value.HasField("simple_value"):
                    yield event.step, value.tag, value.simple_value


def _records(file: BinaryIO) -> Iterator[bytes]:
    # Each is its length (8 bytes), a sum of that (4), its bytes, and a sum of those (4).
    size = file.seek(0, 2)
    place = file.seek(0)
    while place < size:
        head = file.read(12)
        if len(head) < 12:
            raise ValueError("it ends within a record.")
        (length,) = struct.unpack("<Q", head[:8])
        if length > size - place - 16:
            raise ValueError("it ends within a record.")
        if length <= MOST_RECORD:
            yield file.read(length)
        place = file.seek(place + 16 + length)
