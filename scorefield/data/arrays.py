"""Images and labels as arrays: npz files, and the idx files of the MNIST family."""

import gzip
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from scorefield.files import open_regular

MOST_CLASSES = 1000
"""That a set may number whatever its size: samples of one class of ImageNet's are a set of their own."""


MOST_PACKED = 100
"""Times that arrays may be larger than their compressed file, if they are above a GiB: photographs reach 3, one
colour 1,000."""


def check_class_numbers(smallest: int, largest: int, num_images: int) -> None:
    """Raise ``ValueError`` for class numbers below 0, or larger than any of ``num_images`` would need."""
    if smallest < 0 or largest >= max(num_images, MOST_CLASSES):
        raise ValueError(
            f"labels must be class numbers from 0, fewer than there are images or {MOST_CLASSES:,}; got numbers "
            f"from {smallest} to {largest} of {num_images:,} images."
        )


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Arrays ``images`` (n, c, h, w) or (n, h, w, c), and ``labels`` (n,), or zeros where there are none.

    Raises ``ValueError`` naming the file for missing arrays, shapes, ranges or values that cannot be trained on.
    """
    try:
        with open_regular(path) as file, np.load(check_archive(file), allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays["labels"] if "labels" in arrays else np.zeros(len(images), np.int64)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: numpy and zipfile believe what headers say
        raise ValueError(
            f"{path} must be an npz file with an array 'images', and 'labels' if there are classes: "
            f"{str(error)[:300] or type(error).__name__}"
        ) from error
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape or labels.shape != (len(images),):
        raise ValueError(
            f"{path}: expected images (n, c, h, w) with 1 or 3 channels and labels (n,); got {images.shape} and "
            f"{labels.shape}."
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels must be class numbers from 0; got {labels.dtype}.")
    try:
        check_class_numbers(int(labels.min()), int(labels.max()), len(images))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return check_values(images, str(path)), labels.astype(np.int64)


def check_archive(file: IO[bytes]) -> IO[bytes]:
    """Return the npz file, at its start, if reading its arrays takes no more memory than it should.

    Raises ``ValueError`` for sizes in the archive's directory out of proportion to the file, and for an array
    whose header promises more than its member holds: numpy would first make room for it.
    """
    packed = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        used = [info for info in archive.infolist() if info.filename in ("images.npy", "labels.npy")]
        check_packing(sum(info.file_size for info in used), packed)
        for info in used:
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _header_2_0
                shape, _, dtype = read(member)
            if math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError(f"{info.filename} says it has shape {shape}, and holds {info.file_size:,} bytes")
    file.seek(0)
    return file


def _header_2_0(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    return np.lib.format.read_array_header_2_0(member)


def check_packing(size: int, packed: int) -> None:
    """Raise ``ValueError`` for a compressed file of ``packed`` bytes that would fill the memory with ``size``."""
    if size > max(2**30, MOST_PACKED * packed):
        raise ValueError(
            f"its {packed:,} bytes would become {size:,}, more than {MOST_PACKED} times as many and than a GiB; "
            "store it without compression if that is right"
        )


def check_values(images: np.ndarray, source: str) -> np.ndarray:
    """Return the images as uint8, or as float32 in [-1, 1].

    Raises ``ValueError`` for any others, naming the first.
    """
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise ValueError(f"{source}: images must be uint8, or floats in [-1, 1]; got {images.dtype}.")
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    if not finite.all():
        bad = int(np.flatnonzero(~finite)[0])
        raise ValueError(
            f"{source}: image {bad} holds nan or inf; expected values in [-1, 1]. Remove or repair it."
        )
    if np.abs(images).max() > 1 + 1e-6:
        raise ValueError(f"{source}: images reach {np.abs(images).max():g}; expected [-1, 1], or uint8.")
    return images.astype(np.float32)


def is_idx(path: Path) -> bool:
    """Return whether ``path`` is an idx file of images, by its name, or a folder that holds one."""
    return ("idx3-ubyte" in path.name and path.is_file()) or (
        path.is_dir() and any(path.glob("*images-idx3-ubyte*"))
    )


def idx_images(path: Path) -> Path:
    """Return the idx file of images that ``path`` names, in a folder that of the training part."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("*images-idx3-ubyte*"))
    return next((file for file in found if file.name.startswith("train")), found[0])


def read_idx(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 1, h, w) and labels (n,) of ``...images-idx3-ubyte`` and ``...labels-idx1-ubyte``, plain
    or .gz.

    Raises ``ValueError`` for files that are missing, cut or of other sizes.
    """
    images = _read_tensor(path, 3)[:, None]
    partner = labels_of(path)
    labels = np.zeros(len(images), np.uint8) if partner is None else _read_tensor(partner, 1)
    if len(labels) != len(images) or 0 in images.shape:
        held = "no file" if partner is None else partner.name
        raise ValueError(f"{path} holds images {images.shape}, {held} {len(labels)} labels.")
    return images, labels.astype(np.int64)


def labels_of(images: Path) -> Path | None:
    """Return the labels beside an idx file of images, either of them packed or not; None if there are none."""
    name = images.name.replace("images-idx3", "labels-idx1")
    names = (name, name.removesuffix(".gz") if name.endswith(".gz") else f"{name}.gz")
    found = [images.with_name(one) for one in names if one != images.name]
    return next((file for file in found if file.exists()), None)


def _read_tensor(path: Path, ndim: int) -> np.ndarray:
    offset = 4 * (ndim + 1)
    try:
        with open_regular(path) as file:
            size, packed = os.fstat(file.fileno()).st_size, path.suffix == ".gz"
            opened: Any = gzip.GzipFile(fileobj=file) if packed else file
            content = opened.read(offset)
            magic, *shape = struct.unpack(f">{ndim + 1}I", content)
            if packed:
                check_packing(math.prod(shape), size)
            # One byte more than there should be, to see whether there are more.
            content += opened.read(math.prod(shape) + 1 if packed else size)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: gzip believes what a file says
        raise ValueError(f"{path} cannot be read as an idx file: {error}") from error
    if magic != 0x800 + ndim or len(content) - offset != math.prod(shape):
        raise ValueError(
            f"{path} is no whole idx file of bytes in {ndim} dimensions: magic number {magic:#x}, sizes {shape}, "
            f"{len(content) - offset} bytes. Download it again."
        )
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)
