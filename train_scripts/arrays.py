"""Images that come as arrays: npz files and the idx files of the MNIST family."""

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Arrays ``images`` (n, c, h, w) or (n, h, w, c), and ``labels`` (n,), or zeros where there are none.

    Raises ``ValueError`` naming the file for missing arrays, shapes, ranges or values that cannot be trained on.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays["labels"] if "labels" in arrays else np.zeros(len(images), np.int64)
    except (OSError, KeyError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} must be an npz file with an array 'images', and 'labels' if there are classes: {error}"
        ) from error
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape or labels.shape != (len(images),):
        raise ValueError(
            f"{path}: expected images (n, c, h, w) with 1 or 3 channels and labels (n,); got {images.shape} and "
            f"{labels.shape}."
        )
    wanted = "labels must be class numbers from 0, fewer than there are images"
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: {wanted}; got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= max(len(images), 10):
        raise ValueError(f"{path}: {wanted}; got numbers from {labels.min()} to {labels.max()}.")
    return check_values(images, str(path)), labels.astype(np.int64)


def check_values(images: np.ndarray, source: str) -> np.ndarray:
    """The images as uint8, or as float32 in [-1, 1]. Raises ``ValueError`` for any others, naming the first."""
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
    """Whether ``path`` is an idx file of images, by its name, or a folder that holds one."""
    return ("idx3-ubyte" in path.name and path.is_file()) or (
        path.is_dir() and any(path.glob("*images-idx3-ubyte*"))
    )


def read_idx(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 1, h, w) and labels (n,) of ``...images-idx3-ubyte`` and ``...labels-idx1-ubyte``, plain or .gz.

    A folder means its training part. Raises ``ValueError`` for files that are missing, cut or of other sizes.
    """
    if path.is_dir():
        found = sorted(path.glob("*images-idx3-ubyte*"))
        path = next((file for file in found if file.name.startswith("train")), found[0])
    images = _read_tensor(path, 3)[:, None]
    partner = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    labels = _read_tensor(partner, 1) if partner != path and partner.is_file() else np.zeros(len(images), np.uint8)
    if len(labels) != len(images) or 0 in images.shape:
        raise ValueError(f"{path} holds images {images.shape}, {partner.name} {len(labels)} labels.")
    return images, labels.astype(np.int64)


def _read_tensor(path: Path, ndim: int) -> np.ndarray:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{ndim + 1}I", content)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an idx file: {error}") from error
    offset = 4 * (ndim + 1)
    if magic != 0x800 + ndim or len(content) - offset != math.prod(shape):
        raise ValueError(
            f"{path} is no whole idx file of bytes in {ndim} dimensions: magic number {magic:#x}, sizes {shape}, "
            f"{len(content) - offset} bytes. Download it again."
        )
    return np.frombuffer(content, np.uint8, offset=offset).reshape(shape)
