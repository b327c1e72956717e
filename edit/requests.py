"""The edits that a command asks for: pictures and prompts, read strictly."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edit.options import OF_PICTURES, Config
from scorefield.choices import OnBadData
from scorefield.data.pictures import as_floats, read_central
from scorefield.data.rows import File
from scorefield.files import printable, read_text, warn


@dataclass(frozen=True)
class Request:
    """One edit.

    Attributes:
        source: prompt of the picture.
        target: prompt of the edit.
        image: path of the picture; empty: it is drawn.
        name: what errors call it.
    """

    source: str
    target: str
    image: str = ""
    name: str = "the edit"


def read_requests(config: Config) -> tuple[Request, ...]:
    """Return the edits that the options name.

    Raises ``ValueError`` for a file that cannot be read, and, unless they are skipped, for lines that cannot be
    used.
    """
    if not config.edits:
        return (Request(config.source, config.target, config.image),)
    file = Path(config.edits)
    try:
        lines = read_text(file).splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"--edits {file} cannot be read: {str(error).rstrip('.')}.") from error
    found, faults = list[Request](), list[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_request(line, f"{file}:{number}", file.parent, needs_image=config.method in OF_PICTURES))
        except ValueError as error:
            faults.append(f"{file}:{number} {error}")
    if faults and config.on_bad_data == "stop":
        raise ValueError(f"{faults[0]} Repair the line, or pass --on-bad-data skip.")
    for fault in faults:
        warn(f"{printable(fault)} Skipped.")
    if not found:
        raise ValueError(f"--edits {file} holds no edit that can be used.")
    return tuple(found)


def _request(line: str, name: str, folder: Path, *, needs_image: bool) -> Request:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {line[:60]!r}.") from error
    if not isinstance(row, dict) or not {"source", "target"} <= row.keys() <= {"source", "target", "image"}:
        raise ValueError(f"must be an object of source, target and image; got {line[:80]!r}.")
    for key, value in row.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"must say something in {key}; got {value!r}.")
    if needs_image and "image" not in row:
        raise ValueError("has no image, which this method edits.")
    image = str(folder / row["image"]) if "image" in row else ""
    return Request(row["source"], row["target"], image, name)


def read_images(
    requests: Sequence[Request], size: tuple[int, int], on_bad_data: OnBadData
) -> tuple[tuple[Request, ...], Tensor | None]:
    """Return the edits, and their pictures (n, 3, height, width) in [-1, 1], or None where they are to be drawn.

    Raises ``ValueError`` for a picture that cannot be read or is too small, unless it is skipped, and for some
    edits with and some without one.
    """
    if not any(one.image for one in requests):
        return tuple(requests), None
    bare = next((one for one in requests if not one.image), None)
    if bare is not None:
        raise ValueError(f"{bare.name} has no image, and others have; give all of them one, or none.")
    kept, pictures, fault = list[Request](), list[Tensor](), ""
    for one in requests:
        try:
            pictures.append(read_central(File(one.image).read(), "RGB", size))
            kept.append(one)
        except ValueError as error:
            fault = f"{printable(one.image)} {error}"
            if on_bad_data == "stop":
                raise ValueError(fault) from error
            warn(f"{fault} Skipped.")
    if not kept:
        raise ValueError(f"no picture can be used: {fault}")
    return tuple(kept), as_floats(torch.stack(pictures))
