"""A rank that gives up tells the others, which would wait for it for hours.

Ranks meet in collectives only, and one that refused its input never gets there. So each rank listens, on the store
that ``torch.distributed`` itself begins with, from before it reads its first file.
"""

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from scorefield.training.lifelines import Lifelines, Peer

PATIENCE = 20.0
"""Seconds that ranks wait for one another to have heard."""

BEGUN = "the run had begun"
"""Note of an error in a training: its input was not refused, and the run failed."""

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


LOST = 2.0
"""Seconds that are waited for word of a rank that is gone."""


@dataclass(frozen=True)
class Refusal:
    """Why all ranks end.

    Attributes:
        rank: that gave up first, or is gone.
        code: to exit with.
        why: what this rank should say; empty where another one says it.
    """

    rank: int
    code: int
    why: str = ""


class Ranks:
    """What the ranks of a launch say to each other beside their collectives. One process alone says nothing.

    Args:
        leave: called on a rank when another one gave up, in a thread, with what it said. It must end the process:
            the main thread may be waiting where no exception reaches it.
        environment: of the launcher: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; by default this process's.

    Attributes:
        several: there are others.
    """

    def __init__(self, leave: Callable[[Refusal], None], environment: Mapping[str, str] | None = None) -> None:
        told = os.environ if environment is None else environment
        self._leave, self._done = leave, threading.Event()
        self.several = all(told.get(name) for name in NEEDED) and int(told["WORLD_SIZE"]) > 1
        self._lock = threading.Lock()
        self._store: Any = None
        self._lines: Lifelines | None = None
        if not self.several:
            return
        self._rank, self._size = int(told["RANK"]), int(told["WORLD_SIZE"])
        # torchrun keeps the store in a process of its own; without it the first rank does.
        keeps = self._rank == 0 and told.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._place = (told["MASTER_ADDR"], int(told["MASTER_PORT"]), keeps)
        self._attempt = told.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def give_up(self, code: int) -> bool:
        """Tell the others to exit with ``code``; True where no other rank was first, and this one says why.

        Returns when all have heard, or after ``PATIENCE`` seconds.
        """
        self._done.set()
        if not self.several:
            return True
        try:
            with self._lock:
                store = self._connected()
                mine = json.dumps({"rank": self._rank, "code": code}).encode()
                first = store.compare_set("gave up", "", mine.decode()) == mine
                self._wait_for_all(store, self._size, PATIENCE)
                self._part()
            return first
        except (RuntimeError, OSError):  # nobody keeps the store: nobody waits either, or nobody can be told
            return True

    def wait_for_word(self) -> None:
        """Give the others time to say that one is gone, of which a failed collective was only a consequence."""
        if self.several:
            self._done.wait(LOST)

    def close(self) -> None:
        """Listen no longer."""
        self._done.set()
        if self.several:
            self._thread.join(timeout=2)
            self._part()

    def _part(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def _connected(self) -> Any:
        if self._store is None:
            from torch import distributed  # which takes seconds; a typo is answered before

            host, port, keeps = self._place
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=keeps, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE),
                multi_tenant=True,
            )  # fmt: skip
            name = f"scorefield/{self._attempt}"
            self._store = distributed.PrefixStore(name, store)  # type: ignore[attr-defined]
        return self._store

    def _wait_for_all(self, store: Any, number: int, patience: float) -> None:
        store.add("heard", 1)
        pause = threading.Event()
        for _ in range(int(patience / 0.01)):
            if store.add("heard", 0) >= number:
                return
            pause.wait(0.01)

    def _listen(self) -> None:
        while not self._done.is_set():
            if (gone := self._gone(0.5)) is not None:
                self._leave(self._missed(gone))
                return
            try:
                with self._lock:
                    if self._done.is_set() or not self._connected().check(["gave up"]):
                        continue
                    said = json.loads(self._connected().get("gave up"))
                    self._done.set()
                    missing = said.get("gone", 0)
                    self._wait_for_all(self._connected(), self._size - missing, LOST if missing else PATIENCE)
                    self._part()
            except (RuntimeError, OSError):  # its keeper has not begun yet, or has ended
                continue
            self._leave(Refusal(said["rank"], said["code"]))

    def _gone(self, seconds: float) -> Peer | None:
        """Wait so long, at most, and return a rank that ended without a word, if one did."""
        try:
            if self._lines is None:
                self._lines = self._open_lines()
            gone = self._lines.lost(seconds)
        except (RuntimeError, OSError, ValueError):  # no store yet, or closed meanwhile
            gone = None
            self._done.wait(seconds)
        return None if self._done.is_set() else gone

    def _open_lines(self) -> Lifelines:
        with self._lock:
            store = self._connected()
        return Lifelines(
            self._rank, self._place[0], publish=lambda told: store.set("lifeline", told),
            published=lambda: store.get("lifeline").decode() if store.check(["lifeline"]) else None,
        )  # fmt: skip

    def _missed(self, gone: Peer) -> Refusal:
        """Tell the others that a rank is gone, unless one of them has said why all end."""
        self._done.set()
        mine = {"rank": gone.rank, "code": 1, "gone": 1, "by": self._rank}
        why = (
            f"{gone} is gone: it was killed, ran out of memory, or its machine went down. The other ranks end, "
            "too. Start the same command again, and it goes on from the last checkpoint; torchrun does so by "
            "itself where restarts are allowed."
        )
        try:
            with self._lock:
                store = self._connected()
                said = json.loads(store.compare_set("gave up", "", json.dumps(mine)))
                self._wait_for_all(store, self._size - 1, LOST)
        except (RuntimeError, OSError):  # the rank that is gone kept the store
            said = mine
        self._part()
        return Refusal(said["rank"], said["code"], why if said == mine else "")
