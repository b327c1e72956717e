"""Folders and files that appear whole or not at all, and that never replace what someone else wrote."""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARKER = ".scorefield.json"
"""In each folder of :func:`whole_folder`: what was written there. Only such files are ever replaced or removed."""

FORMAT = "scorefield-folder-1"
SAMPLE = 2**19
DAY = 86_400.0
_NUMBERS = itertools.count()


@contextmanager
def whole_folder(final: Path, own: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """A new folder to write in, renamed to ``final`` when the block ends; after an error ``final`` is as before.

    A link is followed: the folder that it leads to is replaced. A kill within the block leaves ``.writing-...``
    beside, which the next call removes. Replacing a folder takes two renames: a kill just between them leaves the
    older one as ``.replaced-...``, which the next call puts back. Processes that write one folder at once do not
    disturb each other: one of them is last.

    Args:
        final: not there, empty, or a folder that an earlier call wrote.
        own: says of a name in ``final`` whether it is one of ours. Default: files that :data:`MARKER` lists and
            that have not changed since; a new marker is written.

    Raises:
        ValueError: ``final`` is a file, or holds files that no call wrote, or that were changed since.
    """
    final = Path(os.path.realpath(final))
    with suppress(FileExistsError):  # a file, which cannot be listed below
        final.parent.mkdir(parents=True, exist_ok=True)
    replaced = final.with_name(f".replaced-{_short(final.name)}")
    with _alone_in(final.parent):
        if replaced.exists() and not final.exists():
            os.replace(replaced, final)
        check_replaceable(final, own)
    clear_unfinished(final.parent, re.escape(_short(final.name)))
    temporary = final.parent / unfinished_name(final.name)
    temporary.mkdir()
    try:
        yield temporary
        if own is None:
            _write_marker(temporary)
        _flush_to_disk(temporary)
        with _alone_in(final.parent):
            _replace(temporary, final, replaced, own)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, final: Path, replaced: Path, own: Callable[[str], bool] | None) -> None:
    shutil.rmtree(replaced, ignore_errors=True)
    check_replaceable(final, own)  # again: the block may have taken hours
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


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    # Between two renames a folder is not there, and another process would take it for what a kill has left.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_replaceable(folder: Path, own: Callable[[str], bool] | None = None) -> None:
    """Raise ``ValueError`` unless :func:`whole_folder` may replace ``folder``: it is not there, empty, or ours."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; a folder is to be written there. Move it, or write elsewhere.")
    if others := foreign(folder, own):
        name, why = others[0]
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise ValueError(
            f"{folder} would be replaced, but it holds {name}{more}, which {why}. Move it elsewhere, or "
            "write to another folder."
        )


def foreign(folder: Path, own: Callable[[str], bool] | None = None) -> list[tuple[str, str]]:
    """Files in a folder that must not be removed, each with the reason; empty if all are ours."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    if own is not None:
        return [(name, "no run wrote") for name in names if not own(name)]
    listed = _read_marker(folder)
    return [
        (name, "was changed since it was written" if name in listed else "no run wrote")
        for name in names
        if name != MARKER and (name not in listed or _fingerprint(folder / name) != listed[name])
    ]


def remove_folder(folder: Path) -> None:
    """Remove a folder of :func:`whole_folder`, if it is there. Raises ``ValueError`` where it is not all ours."""
    check_replaceable(folder)
    if folder.exists():
        shutil.rmtree(os.path.realpath(folder))


def note_written(path: Path) -> None:
    """Count a file as ours that was written into a folder of :func:`whole_folder` later; nothing in any other."""
    if listed := _read_marker(path.parent):
        with whole_file(path.parent / MARKER) as temporary:
            content = {"format": FORMAT, "files": {**listed, path.name: _fingerprint(path)}}
            temporary.write_text(json.dumps(content, indent=1))


def _write_marker(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    listed = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths}
    (folder / MARKER).write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1))


def _read_marker(folder: Path) -> dict[str, str]:
    try:
        marker = json.loads((folder / MARKER).read_text())
        return dict(marker["files"]) if marker["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _fingerprint(path: Path) -> str:
    # Size and sha256: of all bytes, or of three samples of a large file, since weights are gigabytes and another
    # tool's differ everywhere.
    if path.is_symlink() or not path.is_file():
        return "no file"
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, (size - SAMPLE) // 2, size - SAMPLE) if size > 3 * SAMPLE else (0,):
            file.seek(start)
            digest.update(file.read(3 * SAMPLE if size <= 3 * SAMPLE else SAMPLE))
    return f"{size} {digest.hexdigest()}"


@contextmanager
def whole_file(final: Path, unfinished: Path | None = None) -> Iterator[Path]:
    """A name to write a file under, renamed to ``final`` when the block ends.

    After an error ``final`` is as before. Processes that write one file at once do not disturb each other: one of
    them is last. What killed writers of the same file left is removed.

    Args:
        final: the file.
        unfinished: folder on the same file system to write in, for many files in folders too large to search each
            time: what killed writers of any file left there is removed. They are not flushed to the disk: whoever
            reads them must know a damaged one. Default: beside ``final``.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    place = final.parent if unfinished is None else unfinished
    place.mkdir(parents=True, exist_ok=True)
    clear_unfinished(place, ".+" if unfinished else re.escape(_short(final.name)))
    temporary = place / unfinished_name(final.name)
    try:
        yield temporary
        if unfinished is None:
            _sync(temporary)
        os.replace(temporary, final)
        if unfinished is None:
            _sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_full(error: BaseException | None) -> bool:
    """Return True for an error of a disk, or a quota, that is full, in whatever words its writer has it."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # Of safetensors, which is written in Rust, and of torch.save, which only notices how far it came.
        if "(os error 28)" in text or "(os error 122)" in text or "No space left on device" in text:
            return True
        if isinstance(error, RuntimeError) and "inline_container" in text and "unexpected pos" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def unfinished_name(name: str) -> str:
    """Return a name to write a file or folder under, which says who writes it and is given once."""
    return f".writing-{socket.gethostname()}-{os.getpid()}-{next(_NUMBERS)}-{_short(name)}"


def _short(name: str) -> str:
    # A file system's names have at most 255 bytes, and one that may be written must be one that may be begun.
    if len(os.fsencode(name)) <= 100:
        return name
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + Path(name).suffix[:8]


def clear_unfinished(place: Path, names: str) -> None:
    """Remove what killed writers left in a folder of files and folders whose names match a regular expression.

    A writer on another machine may be at work: what it writes is left for a day.
    """
    pattern = re.compile(rf"\.writing-(?:(.+)-)?(\d+)-\d+-{names}")
    for path in place.iterdir():
        if (found := pattern.fullmatch(path.name)) is None:
            continue
        with suppress(OSError):
            dead = found[1] == socket.gethostname() and not _runs(int(found[2]))
            if dead or time.time() - path.stat().st_mtime > DAY:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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
