"""Pictures of a run as data in its page: read strictly, made small enough, and written anew.

No byte of a file reaches the page: what the strict reader of :mod:`scorefield.data.pictures` gives is encoded
again, small pictures without loss, large ones as JPEG.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from scorefield.data.pictures import FORMATS, open_frames, open_image
from scorefield.report.folder import Folder

MOST_BYTES = 2**25
"""Bytes of the largest picture file that is read."""

MOST_PIXELS = 2**24
"""Pixels of the largest picture that is decoded."""

SIDE = 1400
"""Longest side in the page, in pixels."""

SMALL = 2**17
"""Pixels up to which a picture is encoded without loss."""

KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif"}
"""First bytes of the kinds of file that runs write."""


@dataclass(frozen=True)
class Shown:
    """A picture in a page.

    Attributes:
        label: under it.
        uri: the picture as a data address.
        width: in pixels, as it is encoded.
        height: in pixels.
    """

    label: str
    uri: str
    width: int
    height: int

    @property
    def scale(self) -> int:
        """Factor by which a tiny picture is enlarged, so that its pixels can be seen."""
        return max(1, min(16, 640 // self.width))


def load(folder: Folder, name: str) -> Image.Image | None:
    """Return a PNG of a run in mode L or RGB, or None; one that cannot be shown is noted."""
    if (data := folder.read(name, MOST_BYTES)) is None:
        return None
    try:
        _check(data, "png")
        return open_image(data)
    except ValueError as error:
        folder.notes.append(f"{name} {str(error).rstrip('.')}.")
        return None


def load_frames(folder: Folder, name: str, most: int) -> list[Image.Image]:
    """Return up to ``most`` frames of a GIF, evenly spaced, in RGB; empty where there is none to show."""
    if (data := folder.read(name, MOST_BYTES)) is None:
        return []
    try:
        _check(data, "gif")
        return open_frames(data, most, 4 * MOST_PIXELS)
    except ValueError as error:
        folder.notes.append(f"{name} {str(error).rstrip('.')}.")
        return []


def _check(data: bytes, kind: str) -> None:
    if not any(data.startswith(first) and found == kind for first, found in KINDS.items()):
        raise ValueError(f"is no {kind.upper()} file: it begins with {data[:8]!r}.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:  # of its header alone
            width, height = file.size
    except Exception as error:  # of Pillow, a dozen kinds
        raise ValueError(f"cannot be read as a picture: {error or type(error).__name__}.") from error
    if height * width > MOST_PIXELS or not height * width:
        raise ValueError(f"has {width} x {height} pixels; at most {MOST_PIXELS:,} are shown.")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """Return the picture with no side above ``side`` pixels."""
    factor = side / max(image.size)
    if factor >= 1:
        return image
    size = [max(1, round(factor * one)) for one in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BOX)


def encoded(image: Image.Image, label: str, lossless: bool | None = None) -> Shown:
    """Return a picture as it goes into the page."""
    target, small = io.BytesIO(), image.width * image.height <= SMALL if lossless is None else lossless
    image.save(target, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 88}))
    kind = "png" if small else "jpeg"
    return Shown(label, f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode()}", *image.size)


def within(images: Sequence[tuple[str, Image.Image]], room: int, side: int = SIDE) -> list[Shown]:
    """Return labelled pictures in at most ``room`` characters: smaller where they must be, or none."""
    while images and side >= 64:
        found = [encoded(shrunk(image, side), label) for label, image in images]
        if (taken := sum(len(one.uri) for one in found)) <= room:
            return found
        side = int(min(side, max(max(image.size) for _, image in images)) * max(0.3, 0.9 * (room / taken) ** 0.5))
    return []


def strip(frames: Sequence[Image.Image], label: str, room: int) -> tuple[Shown, int] | None:
    """Return frames of one size side by side as one picture, and how many they are, or None without room."""
    same = [frame for frame in frames if frame.size == frames[0].size]
    if len(same) < 2:
        return None
    side = 320
    while side >= 32:
        parts = [shrunk(frame, side) for frame in same]
        sheet = Image.new("RGB", (parts[0].width * len(parts), parts[0].height))
        for number, part in enumerate(parts):
            sheet.paste(part, (number * part.width, 0))
        if sheet.width <= 2**14 and len((found := encoded(sheet, label)).uri) <= room:
            return found, len(parts)
        side = side * 3 // 4
    return None


def evenly(names: Sequence[str], most: int) -> list[str]:
    """Return at most ``most`` of the names, evenly spaced, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]
