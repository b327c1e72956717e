"""Pictures that a browser sent: bounded before they are decoded, and read as strictly as data.

No message names a path of this machine.
"""

import base64
import binascii
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from scorefield.data.pictures import as_floats, as_values, central, open_image, read_picture, resized
from scorefield.data.rows import File

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is read, told by content. Pillow knows more, of which some start other programs."""

MOST_BYTES = 2**23
"""Of a picture's file."""

MOST_PIXELS = 2**24
"""Of a picture, 4096 x 4096: decoded it takes 50 MB."""

MOST_SKETCH = 2**20
"""Characters of a drawing."""

DRAWING = "data:image/png;base64,"
"""How a drawing of the page's canvas begins."""


def read_upload(path: str, size: tuple[int, int]) -> Tensor:
    """Return the middle of an uploaded picture at (height, width): (1, 3, h, w) in [-1, 1].

    Raises ``ValueError`` for what is no picture, a damaged one, too large a one, or one smaller than half of
    ``size``.
    """
    return as_floats(_colour(_bytes_of(path), size))[None]


def read_map(path: str, size: tuple[int, int]) -> Tensor:
    """Return an uploaded picture as a hint (1, 3, h, w) in [0, 1]; errors as :func:`read_upload`."""
    return as_values(_colour(_bytes_of(path), size), "image")[None]


def read_drawing(url: str, size: tuple[int, int]) -> Tensor:
    """Return white lines of the page's canvas at (height, width): (1, 1, h, w) in [0, 1].

    Raises ``ValueError`` for what is no PNG in base64, or too large, and for a canvas on which nothing was drawn.
    """
    if not isinstance(url, str) or not url.startswith(DRAWING) or len(url) > MOST_SKETCH:
        raise ValueError("Draw something first, or upload a picture.")
    try:
        data = base64.b64decode(url[len(DRAWING) :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("The drawing cannot be read. Clear it, and draw again.") from error
    _check(data)
    picture = _told(lambda: read_picture(data, "lines", 1, convert=True))
    if not bool((picture > 127).any()):
        raise ValueError("Draw something first, or upload a picture.")
    lines = (picture > 127).to(picture.dtype) * 255  # edges are 0 or 1, and the canvas draws soft borders
    return as_values(resized(lines, "lines", size), "lines")[None]


def _bytes_of(path: str) -> bytes:
    if not isinstance(path, str) or not path:
        raise ValueError("Upload a picture first.")
    try:
        if Path(path).stat().st_size > MOST_BYTES:
            raise ValueError(f"The picture has more than {MOST_BYTES // 2**20} MB. Upload a smaller one.")
        data = File(path).read()
    except OSError as error:
        raise ValueError("The picture is no longer there. Upload it again.") from error
    _check(data)
    return data


def _check(data: bytes) -> None:
    """Raise ``ValueError`` for a file of another format, or more pixels than are decoded; by its header alone."""
    if not data:
        raise ValueError("The picture is empty: its file has no bytes.")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            pixels = file.width * file.height
            if pixels > MOST_PIXELS:
                raise ValueError(f"is {file.width} x {file.height}; at most {MOST_PIXELS:,} pixels are read.")
    except UnidentifiedImageError as error:
        raise ValueError(f"The picture is none of {', '.join(FORMATS)}. Save it as PNG.") from error
    except Exception as error:  # Pillow raises a dozen kinds, struct.error and SyntaxError among them
        raise ValueError(f"The picture {_reason(error)}") from error


def _colour(data: bytes, size: tuple[int, int]) -> Tensor:
    return _told(lambda: central(open_image(data).convert("RGB"), size))


def _told(read: Callable[[], Tensor]) -> Tensor:
    # The readers' messages go behind a name.
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"The picture {error}") from error


def _reason(error: Exception) -> str:
    told = str(error).partition("\n")[0]
    return told if isinstance(error, ValueError) and told.startswith("is ") else f"cannot be read: {told}"
