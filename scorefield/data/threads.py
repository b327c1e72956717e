"""Threads that read and decode files, and fewer of them for large pictures."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

THREADS = 8
"""That read files: Pillow decodes outside of Python's lock."""

_here = threading.local()


class Threads:
    """A number of threads, started when they are first needed.

    Work that a thread hands to threads of its own level, or of a lower one, is done in that thread itself: if it
    waited for them, all of them might wait for each other. A process that was forked off starts its own.

    Args:
        number: of threads.
        level: work of this level may hand work to threads of higher ones.
    """

    def __init__(self, number: int, level: int) -> None:
        self.number, self.level = number, level
        self._start()
        os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self._pool = ThreadPoolExecutor(self.number, initializer=lambda: setattr(_here, "level", self.level))

    @property
    def _waited_for(self) -> bool:
        return getattr(_here, "level", 0) >= self.level

    def run(self, do: Callable[[], T]) -> T:
        """Return what ``do`` returns, in one of the threads."""
        return do() if self._waited_for else self._pool.submit(do).result()

    def map(self, do: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
        """Yield ``do`` of each item, in order. Threads are a few items ahead, never more: results may be large."""
        if self._waited_for:
            yield from map(do, items)
            return
        coming = deque[Future[T]]()
        try:
            for item in items:
                coming.append(self._pool.submit(do, item))
                if len(coming) > 2 * self.number:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:  # of an error nobody waits for what comes after it
            for future in coming:
                future.cancel()


READERS = Threads(THREADS, level=1)
"""Read files, and decode them."""

FEW = Threads(min(8, max(2, (os.cpu_count() or 1) // 4)), level=2)
"""Decode large pictures: much of what a thread has once needed stays its own."""


def in_threads(do: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield ``do`` of each item, in order; see :meth:`Threads.map`."""
    return READERS.map(do, items)
