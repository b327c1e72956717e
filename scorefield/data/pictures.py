"""Picture files as tensors: read strictly, made to fit, cut and mirrored together, each as its kind demands."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Generator, Tensor
from torch.nn.functional import adaptive_max_pool2d, interpolate

from scorefield.choices import Kind as Kind
from scorefield.data.threads import FEW

T = TypeVar("T")

ROOM = 9 / 8
"""Sides of what random crops are taken from, in units of the crop's."""

PLAIN = {1: ("L", "1"), 3: ("RGB", "P")}
"""Modes of Pillow that lose nothing as 8 bits of one or three channels."""

NUMBERS = ("1", "L", "P", "I", "F")
"""Modes of one number a pixel; those of 16 bits all begin with I;16."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")
"""What is read, told by content and never by a name. Pillow knows more, of which EPS starts another program."""

MEANING = {
    "L": "greyscale", "1": "black and white", "P": "of a palette", "RGB": "in colour", "F": "of 32-bit floats",
    "I": "of 32-bit integers",
}  # fmt: skip

ORIENTATION = 0x0112
"""Exif tag that says how a picture is turned; 1 is upright."""


LARGE = 2**22
"""Pixels above which a picture is decoded in one of few threads: a pixel takes a dozen bytes meanwhile."""


def check_kind(kind: str) -> None:
    """Raise ``ValueError`` unless ``kind`` is one of :data:`Kind`."""
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of picture {kind!r}; expected one of {', '.join(get_args(Kind))}.")


def _opened(data: bytes) -> tuple[str | None, Image.Image]:
    # Format and upright picture.
    what = "cannot be read as a picture"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            file.load()
            what = "has an Exif block that cannot be read; save it without"
            ImageOps.exif_transpose(file, in_place=True)  # a copy of a photograph takes 50 MB
            return file.format, file
    except UnidentifiedImageError as error:
        why = f"begins with {data[:12]!r}, as no format does that is known" if data else "is empty"
        raise ValueError(f"{what}: it {why}.") from error
    except Exception as error:  # Pillow raises a dozen kinds, struct.error and SyntaxError among them
        raise ValueError(f"{what}: {error or type(error).__name__}.") from error


def is_turned(data: bytes) -> bool:
    """Return whether a picture's Exif tag says that it lies otherwise than its pixels do."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        return file.getexif().get(ORIENTATION) in range(2, 9)


def in_few_threads(decode: Callable[[], T], *files: bytes) -> T:
    """Return what ``decode`` makes of picture files: here, or, of large ones, in one of few threads."""
    return FEW.run(decode) if sum(map(_num_pixels, files)) > LARGE else decode()


def _num_pixels(data: bytes) -> int:
    # By its header; 0 for what is no picture, of which whoever decodes it will tell.
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            return file.width * file.height
    except Exception:
        return 0


def size_of(data: bytes) -> tuple[int, int]:
    """Height and width of a picture as it lies by its Exif tag; read of its header alone."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:
        width, height = file.size
        return (width, height) if file.getexif().get(ORIENTATION) in range(5, 9) else (height, width)


def open_image(data: bytes) -> Image.Image:
    """Return a picture file as an upright image of mode L or RGB; transparency is laid on white, 16 bits become 8.

    Raises ``ValueError`` for what is no picture or a damaged one, for floats outside [0, 1], and for 32-bit
    integers, whose white nobody knows; the message goes behind the file's name.
    """
    return _plain(*_opened(data))


def open_frames(data: bytes, most: int, pixels: int) -> list[Image.Image]:
    """Return up to ``most`` frames of an animated file, evenly spaced over its length, in mode RGB.

    Raises ``ValueError`` for what is no picture or a damaged one, and for frames of more than ``pixels`` pixels
    together.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            number = getattr(file, "n_frames", 1)
            if number * file.width * file.height > pixels:
                raise ValueError(f"{number} frames of {file.width} x {file.height}, above {pixels:,} pixels")
            chosen = sorted({round(i * number / min(most, number)) for i in range(min(most, number))})
            frames = list[Image.Image]()
            for frame in chosen:
                file.seek(frame)
                frames.append(file.convert("RGB"))
            return frames
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError(f"cannot be read as a film: {error or type(error).__name__}.") from error


def _plain(kind: str | None, image: Image.Image) -> Image.Image:
    # The scale comes from the file's type: one taken from its pixels would brighten the dark images of a set.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        return _in_bytes(np.asarray(image) / 65535)
    if image.mode == "F":
        return _in_bytes(np.asarray(image, dtype=np.float64))
    if image.mode.startswith("I"):
        raise ValueError(f"holds 32-bit integers (mode {image.mode}); expected 8 or 16 bits, or floats in [0, 1].")
    if image.mode in ("1", "L"):
        return converted(image, "L")
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return converted(image, "RGB")


def converted(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in a mode of Pillow: itself, where it has that, and no copy."""
    return image if image.mode == mode else image.convert(mode)


def _in_bytes(values: np.ndarray) -> Image.Image:
    # nan compares as false.
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"holds floats from {values.min():g} to {values.max():g}; expected [0, 1].")
    return Image.fromarray(np.round(values * 255).astype(np.uint8), "L")


def central(image: Image.Image, size: tuple[int, int], least: tuple[int, int] | None = None) -> Tensor:
    """Return the central part of a picture in the proportions of ``size``, resized to it: (c, height, width) of
    bytes.

    Raises ``ValueError`` for a picture below half of ``least``, (height, width), by default ``size``.
    """
    least = least or size
    if 2 * min(image.height / least[0], image.width / least[1]) < 1:
        raise ValueError(f"is {image.width} x {image.height}, smaller than half of {least[1]} x {least[0]}.")
    scale = min(image.height / size[0], image.width / size[1])
    height, width = round(size[0] * scale), round(size[1] * scale)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    # Cut first: the filter must not see beyond the part.
    part = channels_first(np.asarray(image)[top : top + height, left : left + width])
    return resized(part, "image", size)


def read_central(data: bytes, mode: str, size: tuple[int, int], least: tuple[int, int] | None = None) -> Tensor:
    """:func:`central` of a picture file in mode L or RGB.

    Raises ``ValueError`` as :func:`open_image` and :func:`central` do.
    """
    return in_few_threads(lambda: central(converted(open_image(data), mode), size, least), data)


def read_picture(data: bytes, kind: Kind, channels: int | None = None, *, convert: bool = False) -> Tensor:
    """Return a picture file as (c, h, w): uint8, or float32 for depth and int64 for labels; upright by its Exif
    tag.

    Args:
        data: the file.
        kind: labels and depth may have 16 bits, and are read as they are; a palette's labels are its indices.
        channels: 1 or 3 that it must have; None takes either.
        convert: take other modes too: transparency is laid on white, 16 bits become 8, grey becomes colour or
            colour grey.

    Raises:
        ValueError: no picture, a damaged one, or one of another mode; the message goes behind the file's name.
    """
    format_, image = _opened(data)
    if kind in ("labels", "depth"):
        if image.mode not in NUMBERS and not image.mode.startswith("I;16"):
            raise ValueError(f"is {_describe(image, format_)}; expected one channel of numbers for {kind}.")
        return _numbers(np.asarray(image), kind)
    wanted = PLAIN[channels] if channels else (*PLAIN[1], *PLAIN[3])
    if image.mode not in wanted or "transparency" in image.info:
        if not convert:
            expected = "8 bits in " + {1: "grey", 3: "colour", None: "grey or colour"}[channels]
            fix = ", or read it as numbers: kind depth" if channels is None and image.mode[0] in "IF" else ""
            raise ValueError(
                f"is {_describe(image, format_)}; expected {expected}. Save it so, or pass --convert{fix}."
            )
        image = _plain(format_, image)
    grey = channels == 1 or (channels is None and image.mode in PLAIN[1])
    return channels_first(np.asarray(converted(image, "L" if grey else "RGB")))


def _describe(image: Image.Image, format_: str | None) -> str:
    if "A" in image.mode or "transparency" in image.info:
        return f"partly transparent ({image.mode})"
    if image.mode.startswith("I;16") or (image.mode == "I" and format_ in ("PNG", "PPM")):
        return "of 16 bits"
    return MEANING.get(image.mode, f"of mode {image.mode}")


def _numbers(values: np.ndarray, kind: Kind) -> Tensor:
    if not np.isfinite(values).all():
        raise ValueError(f"holds nan or inf; expected numbers for {kind}.")
    if kind == "labels" and (values != np.round(values)).any():
        raise ValueError("holds numbers that are not whole; expected labels.")
    return channels_first(values.astype(np.int64 if kind == "labels" else np.float32))


def channels_first(array: np.ndarray) -> Tensor:
    """Return (h, w) or (h, w, c) as (c, h, w): a copy, since Pillow's memory is read-only."""
    return torch.from_numpy(np.array(np.atleast_3d(array).transpose(2, 0, 1), order="C"))


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest height and width of these proportions that cover ``size``."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def resized(picture: Tensor, kind: Kind, size: tuple[int, int]) -> Tensor:
    """Return (c, h, w) or (n, c, h, w) at another height and width, of the same dtype; see :data:`Kind` for how.

    Images are bytes, or floats in [-1, 1].
    """
    if tuple(picture.shape[-2:]) == size:
        return picture
    if kind == "image":
        # Channel by channel: as floats the three of a photograph would take 150 MB at once.
        channels = (picture if picture.ndim == 4 else picture[None]).split(1, dim=1)
        x = torch.cat([interpolate(one.float(), size, mode="bicubic", antialias=True) for one in channels], 1)
        x = x.round().clamp(0, 255) if picture.dtype == torch.uint8 else x.clamp(-1, 1)
        return x.reshape(*picture.shape[:-2], *size).to(picture.dtype)
    x = picture.double() if picture.dtype == torch.int64 else picture.float()
    x = x if x.ndim == 4 else x[None]
    if kind == "lines":
        smaller = [min(side, wanted) for side, wanted in zip(x.shape[2:], size, strict=True)]
        x = interpolate(adaptive_max_pool2d(x, smaller), size, mode="nearest-exact")
    else:
        x = interpolate(x, size, mode="nearest-exact")
    return x.reshape(*picture.shape[:-2], *size).to(picture.dtype)


@dataclass(frozen=True)
class View:
    """The part of a sample that is looked at: the same for all of its pictures.

    Attributes:
        top: first row.
        left: first column.
        size: height and width.
        mirrored: left and right exchanged, after cutting.
    """

    top: int
    left: int
    size: tuple[int, int]
    mirrored: bool = False

    def cut(self, picture: Tensor, kind: Kind) -> Tensor:
        """Cut it out of a picture (c, h, w)."""
        height, width = self.size
        part = picture[:, self.top : self.top + height, self.left : self.left + width]
        if not self.mirrored:
            return part
        part = part.flip(2)
        if kind != "normals":
            return part
        nothing = (part == 0).all(0, keepdim=True)
        return torch.where(nothing, part, torch.cat([255 - part[:1], part[1:]]))


def choose_view(
    height: int, width: int, size: tuple[int, int], *, mirrored: bool = False, generator: Generator | None = None
) -> View:
    """Return the middle of a picture, or a random part of it if there is a generator.

    Raises ``ValueError`` for a picture smaller than ``size``.
    """
    rooms = height - size[0], width - size[1]
    if min(rooms) < 0:
        raise ValueError(f"a picture of {height} x {width} has no part of {size[0]} x {size[1]} pixels.")
    if generator is None:
        return View(rooms[0] // 2, rooms[1] // 2, size, mirrored)
    top, left = (int(torch.randint(room + 1, (), generator=generator)) for room in rooms)
    return View(top, left, size, mirrored)


def as_values(picture: Tensor, kind: Kind) -> Tensor:
    """Maps as hints want them: bytes to [0, 1], numbers as they are."""
    return picture if kind in ("labels", "depth") else picture.float() / 255


def as_floats(images: Tensor) -> Tensor:
    """Return the bytes to [-1, 1]; floats as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
