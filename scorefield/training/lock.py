"""One run in a folder at a time.

The lock is ``flock`` on ``.lock`` in the folder: the kernel drops it with the process that holds it, so that a run
that was killed leaves none behind. On NFS it holds between machines if the server passes locks on (NFSv4; v3 with
``lockd``); where a file system has no locks at all, a warning says so and the run goes on.
"""

import fcntl
import json
import os
import socket
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

NAME = ".lock"


class FolderInUseError(ValueError):
    """Another run holds the folder."""


@dataclass
class FolderLock:
    """A folder that this process holds until :meth:`release`, or its end.

    Attributes:
        folder: made if it is not there.
    """

    folder: Path
    _descriptor: int | None = field(default=None, repr=False)
    _made: list[Path] = field(default_factory=list, repr=False)

    def acquire(self) -> None:
        """Take the lock. Raises :class:`FolderInUseError`, naming who holds it; nothing is written then."""
        absolute = Path(os.path.realpath(self.folder))
        tries = 0
        while self._descriptor is None:
            self._made += [path for path in (absolute, *absolute.parents) if not path.exists()]
            try:
                absolute.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(absolute / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # a run that left nothing may have removed its folder just now
                tries += 1
                if tries == 5:
                    raise
                continue
            try:
                if not self._lock(descriptor):
                    (absolute / NAME).unlink(missing_ok=True)
                    return
                # A run that ended a moment ago may have removed this very file after we opened it.
                if _is_at(descriptor, absolute / NAME):
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(
                f"--out {self.folder} is in use by another run: {_describe(descriptor)}. Wait until it has ended, "
                "or choose another --out."
            ) from None
        except OSError as error:
            warnings.warn(
                f"{self.folder} is on a file system without locks ({error}): start no second run in it.",
                stacklevel=3,
            )
            return False
        return True

    def release(self) -> None:
        """Give the folder back; leave nothing of it if nothing was written there."""
        absolute = Path(os.path.realpath(self.folder))
        if self._descriptor is not None:
            if _is_at(self._descriptor, absolute / NAME):
                (absolute / NAME).unlink()
            os.close(self._descriptor)
            self._descriptor = None
        with suppress(OSError):
            for path in self._made:
                path.rmdir()
        self._made.clear()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _describe(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {int(holder['process'])} on {str(holder['host'])!r} since {holder['since']!s}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process has not said which it is"
