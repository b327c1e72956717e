"""How far a piece of work is: a bar on a terminal, in a log file a line every ten seconds.

    for part in progress(parts, "latents"):
        ...
    with Progress("teacher pairs", total=2000) as bar:
        bar.update(250)
    with working("teacher check"):
        ...

Work that ends within ten seconds leaves no line. A thread writes, so that one long item is not silent either; of
work within work it speaks of the innermost. Only the first rank speaks, and none where TQDM_DISABLE is set.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from typing import Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

EVERY = 10.0
"""Seconds between two lines."""

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}{postfix}]"


class Progress(AbstractContextManager["Progress"]):
    """A piece of work, shown from ``with`` to its end.

    Args:
        name: what is done, or what is made.
        total: items in all; None where nothing can be counted.
        start: items that were done before.
        unit: one item, for the bar.
    """

    def __init__(self, name: str, total: int | None = None, *, start: int = 0, unit: str = "it") -> None:
        self.name, self.total, self.start, self.count, self.unit = name, total, start, start, unit
        self._note, self._began = "", time.monotonic()
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Self:
        """Begin to show it."""
        self._began, self.count = time.monotonic(), self.start
        if self.total and _speaks() and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self.name, total=self.total, initial=self.start, unit=self.unit, bar_format=BAR,
                mininterval=0.5, leave=not any(outer.on_terminal for outer in _HEART.shown),
            )  # fmt: skip
        _HEART.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop to show it."""
        _HEART.remove(self)
        if self._bar is not None:
            self._bar.close()

    def update(self, number: int = 1) -> None:
        """Say that so many more items are done."""
        self.count += number
        if self._bar is not None:
            self._bar.update(number)

    def note(self, text: str) -> None:
        """Show ``text`` behind the numbers from now on, such as the latest loss."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    @property
    def seconds_each(self) -> float:
        """Mean seconds an item so far; nan before the first."""
        done = self.count - self.start
        return (time.monotonic() - self._began) / done if done else float("nan")

    def line(self) -> str:
        """Return the line for a log file: numbers, seconds per item, time left."""
        elapsed = duration(time.monotonic() - self._began)
        if not self.total:
            return f"{self.name}: {elapsed} so far"
        said = f"{self.name}: {self.count:,} of {self.total:,}"
        if self.count == self.start:
            said += f", {elapsed} so far"
        else:
            each, left = self.seconds_each, max(0, self.total - self.count)
            said += f", {each:{',.0f' if each >= 1000 else '.3g'}} s each, {duration(left * each)} left"
        return f"{said}; {self._note}" if self._note else said

    def beat(self) -> None:
        """Let the clock of a bar go on."""
        if self._bar is not None:
            self._bar.refresh()

    @property
    def on_terminal(self) -> bool:
        """Return whether it is shown as a bar."""
        return self._bar is not None


def working(name: str) -> Progress:
    """Return a piece of work in which nothing can be counted."""
    return Progress(name)


def progress(
    items: Iterable[T], name: str, total: int | None = None, *, start: int = 0, unit: str = "it"
) -> Iterator[T]:
    """Yield the items, and show how many of ``total`` are done; see :class:`Progress`.

    ``total`` is their number by default; where they do not know it, nothing is counted.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(name, total, start=start, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()


def duration(seconds: float) -> str:
    """Return a time to read: 8 s, 4 min 10 s, 2 h 5 min.

    >>> duration(8.4), duration(250), duration(7530)
    ('8 s', '4 min 10 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def is_first_rank() -> bool:
    """Return whether this process speaks for all; known before there is an Accelerator."""
    return not os.environ.get("RANK", "").strip("0")


def _speaks() -> bool:
    return is_first_rank() and "TQDM_DISABLE" not in os.environ


class _Heart:
    # What is being done, the innermost last, and the thread that speaks of it.
    def __init__(self) -> None:
        self.shown: list[Progress] = []
        self.said = 0.0
        self.lock = threading.RLock()
        self.ended = threading.Event()

    def add(self, work: Progress) -> None:
        with self.lock:
            first = not self.shown
            self.shown.append(work)
            if first and _speaks():
                self.said, self.ended = time.monotonic(), threading.Event()
                threading.Thread(target=self.run, args=(self.ended,), name="progress", daemon=True).start()

    def remove(self, work: Progress) -> None:
        with self.lock:
            if work in self.shown:
                self.shown.remove(work)
            if not self.shown:
                self.ended.set()

    def run(self, ended: threading.Event) -> None:
        while not ended.wait(EVERY / 20):
            with self.lock:
                if ended.is_set() or not self.shown:
                    return
                work = self.shown[-1]
                if work.on_terminal:
                    work.beat()
                    self.said = time.monotonic()
                elif time.monotonic() - self.said > 0.95 * EVERY:
                    self.said = time.monotonic()
                    tqdm.write(work.line(), file=sys.stderr)
                    sys.stderr.flush()


_HEART = _Heart()
