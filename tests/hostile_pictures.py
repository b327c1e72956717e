"""Picture files that nobody should send, and some that are merely unusual."""

import base64
import io
import pickle
import struct
import zlib

import numpy as np
from PIL import Image

from scorefield.play.uploads import DRAWING, MOST_BYTES


def png(image, **settings):
    content = io.BytesIO()
    image.save(content, **{"format": "png", **settings})
    return content.getvalue()


def noise(size=(80, 60), mode="RGB", dtype=np.uint8):
    shape = size[::-1] if mode in ("L", "I;16") else (*size[::-1], len(mode))
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)
    return Image.fromarray(values, mode if mode in ("CMYK", "RGBA", "RGB") else None)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(side):
    """A small PNG that says it is very large, and unpacks to that."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(side * (side + 1), 2**26)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script>alert(1)</script></svg>'

HOSTILE = {
    "a cut PNG": (png(noise())[:-400], "The picture cannot be read"),
    "a zip bomb": (bomb(20_000), "at most 16,777,216 pixels|decompression bomb"),
    "huge dimensions": (bomb(2**31 - 1), "at most 16,777,216 pixels|decompression bomb"),
    "an SVG": (SVG, "is none of PNG, JPEG"),
    "text": (b"hello", "is none of PNG, JPEG"),
    "nothing": (b"", "is empty"),
    "a pickle": (pickle.dumps(print), "is none of PNG, JPEG"),
    "PostScript, which Pillow would start a program for": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "is none of PNG, JPEG",
    ),
    "a few pixels": (png(Image.new("RGB", (8, 8))), "is 8 x 8, smaller than half of 64 x 64"),
    "many bytes": (b"\x89PNG\r\n\x1a\n" + bytes(MOST_BYTES), "more than 8 MB"),
    "a page": (b"<!doctype html><script>alert(1)</script>", "is none of PNG, JPEG"),
}  # fmt: skip


def url(image):
    return DRAWING + base64.b64encode(png(image)).decode()
