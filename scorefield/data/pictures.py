"""Picture files of every mode as pictures of 8 bits in grey or colour."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from scorefield.files import open_regular


def open_image(source: Any) -> Image.Image:
    """A path or bytes as an upright image of mode L or RGB; transparency is laid on white, 16 bits become 8.

    Raises ``ValueError`` for floats outside [0, 1], for 32-bit integers, whose white nobody knows, and for a path
    that is no regular file.
    """
    opened = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
    with opened, Image.open(opened) as file:
        kind, image = file.format, ImageOps.exif_transpose(file)
        image.load()
    # The scale comes from the file's type: one taken from its pixels would brighten the dark images of a set.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        return _in_bytes(np.asarray(image) / 65535)
    if image.mode == "F":
        return _in_bytes(np.asarray(image, dtype=np.float64))
    if image.mode.startswith("I"):
        raise ValueError(f"holds 32-bit integers (mode {image.mode}); expected 8 or 16 bits, or floats in [0, 1].")
    if image.mode in ("1", "L"):
        return image.convert("L")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _in_bytes(values: np.ndarray) -> Image.Image:
    # nan compares as false.
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"holds floats from {values.min():g} to {values.max():g}; expected [0, 1].")
    return Image.fromarray(np.round(values * 255).astype(np.uint8), "L")
