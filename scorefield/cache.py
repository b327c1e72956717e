"""Tensors on disk under a hash of what they were made from: prompt embeddings, latents.

An entry never goes stale. Whatever its tensors depend on is in its name, so a changed prompt, text encoder or
image means another entry, and every other one stays valid. Nothing is ever removed: delete the folder to free it.
"""

import hashlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scorefield.atomic import whole_file

UNFINISHED = "unfinished"
"""Folder of entries that are being written, in that of a cache."""

Content = str | bytes | Tensor
"""What an entry is made from: a prompt, a file's bytes, an image."""

Entry = dict[str, Tensor]
"""Named tensors, on the CPU."""


def cache_folder() -> Path:
    """Return where everything is kept unless a folder is named: ``~/.cache/scorefield``, or in $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scorefield"


def content_key(*contents: Content) -> str:
    """sha256 of ``contents``, 64 hexadecimal digits; ("ab", "c") and ("a", "bc") differ, as do "1" and b"1"."""
    return hash_of(contents)


def hash_of(contents: Iterable[Content]) -> str:
    """:func:`content_key` of contents that need not be in memory together."""
    digest = hashlib.sha256()
    for content in contents:
        if isinstance(content, Tensor):
            kind, data = f"{content.dtype} {tuple(content.shape)}", _bytes(content)
        else:
            kind = type(content).__name__
            data = memoryview(content.encode() if isinstance(content, str) else content)
        digest.update(f"{kind} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return short hash of some tensors' contents: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TensorCache:
    """A folder of entries that one maker wrote.

    Several processes may share it: an entry appears whole, and two that make the same one write the same.

    Attributes:
        folder: created when the first entry is stored.
        identity: everything but the content that determines the tensors, such as a fingerprint of the encoder.
    """

    folder: Path
    identity: str

    def path(self, content: Content) -> Path:
        """Return the file of an entry, there or not."""
        key = content_key(self.identity, content)
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, content: Content) -> Entry | None:
        """Return the entry of ``content``; None if there is none, or none that can be trusted."""
        return _read(self.path(content))

    def holds(self, content: Content) -> bool:
        """Return whether there is an entry of ``content`` that can be trusted; all of it is read."""
        return self.load(content) is not None

    def store(self, content: Content, tensors: Mapping[str, Tensor]) -> Entry:
        """Write an entry, replacing an older one, and return it."""
        entry = _entry(tensors)
        _write(self.path(content), entry)
        return entry

    def fetch(
        self, contents: Sequence[Content], make: Callable[[list[Content]], Sequence[Mapping[str, Tensor]]],
        batch_size: int = 16, kept: dict[Path, Entry] | None = None,
    ) -> list[Entry]:  # fmt: skip
        """One entry per content, in order; those that are missing are made and stored, each once.

        A folder that cannot be written costs a warning, and the entries are made again next time, unless they are
        ``kept``.

        Args:
            contents: may repeat.
            make: gets at most ``batch_size`` contents and returns the tensors of each.
            batch_size: contents per call of ``make``. What was stored stays if a later call fails.
            kept: entries that could not be written, by the files that they lack: looked at first, and added to.
        """
        paths = [self.path(content) for content in contents]
        kept = {} if kept is None else kept
        found = {path: kept[path] if path in kept else _read(path) for path in dict.fromkeys(paths)}
        missing = [
            content for path, content in dict(zip(paths, contents, strict=True)).items() if found[path] is None
        ]
        failed = False
        for start in range(0, len(missing), batch_size):
            some = missing[start : start + batch_size]
            for content, tensors in zip(some, make(some), strict=True):
                path = self.path(content)
                found[path] = entry = _entry(tensors)
                failed = failed or not self._try_to_write(path, entry)
                if failed:
                    kept[path] = entry
        return [dict(found[path] or {}) for path in paths]

    def _try_to_write(self, path: Path, entry: Entry) -> bool:
        try:
            _write(path, entry)
        except (OSError, SafetensorError) as error:
            message = f"the cache {self.folder} cannot be written ({error}); what is not in it is made each time."
            warnings.warn(message, stacklevel=3)
            return False
        return True


def _entry(tensors: Mapping[str, Tensor]) -> Entry:
    # safetensors refuses tensors that share memory, as the rows of one batch do.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _read(path: Path) -> Entry | None:
    try:
        with safe_open(path, "pt") as file:
            entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written = (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError) as error:
        if path.is_file():
            warnings.warn(f"{path} is damaged ({error}); it is made again.", stacklevel=4)
        return None
    # A damaged entry counts as missing: making it again costs one encoding, raising costs the run. The sum is
    # needed because safetensors checks sizes only, and blocks lost in a power cut read as zeros.
    if written == _checksum(entry):
        return entry
    warnings.warn(f"{path} is damaged (its checksum is another); it is made again.", stacklevel=4)
    return None


def _write(path: Path, entry: Entry) -> None:
    with whole_file(path, path.parent.parent / UNFINISHED) as temporary:
        save_file(entry, temporary, metadata={"crc32": _checksum(entry)})


def _checksum(entry: Entry) -> str:
    value = 0
    for name in sorted(entry):
        tensor = entry[name]
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        value = zlib.crc32(_bytes(tensor), zlib.crc32(header.encode(), value))
    return f"{value:08x}"


def _bytes(tensor: Tensor) -> memoryview:
    # bf16 has no numpy type; its bytes have.
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
