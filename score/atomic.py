"""Folders and files that appear whole or not at all."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A new folder to write in, renamed to ``final`` when the block ends; after an error ``final`` is as before.

    A kill within the block leaves ``.writing-...`` beside, which the next call removes. Replacing a folder takes
    two renames: a kill just between them leaves the older one as ``.replaced-...``, which the next call puts back.
    """
    temporary, replaced = (final.with_name(f".{what}-{final.name}") for what in ("writing", "replaced"))
    if replaced.exists() and not final.exists():
        os.replace(replaced, final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _flush_to_disk(temporary)
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            os.replace(final, replaced)
        try:
            os.replace(temporary, final)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, final)
            raise
        _sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """A name to write a file under, renamed to ``final`` when the block ends.

    After an error ``final`` is as before. Processes that write one file at once do not disturb each other: one of
    them is last.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".writing-{os.getpid()}-{threading.get_ident()}-{final.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, final)
        _sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_to_disk(folder: Path) -> None:
    # A rename may reach the disk before the data do; a power cut would then leave a whole name round no data.
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
