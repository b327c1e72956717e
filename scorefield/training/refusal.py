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

PATIENCE = 20.0
"""Seconds that ranks wait for one another to have heard."""

BEGUN = "the run had begun"
"""Note of an error in a training: its input was not refused, and the run failed."""

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Refusal:
    """Which rank gave up first, and its exit code."""

    rank: int
    code: int


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
                self._wait_for_all(store)
            return first
        except (RuntimeError, OSError):  # nobody keeps the store: nobody waits either, or nobody can be told
            return True

    def close(self) -> None:
        """Listen no longer."""
        self._done.set()
        if self.several:
            self._thread.join(timeout=2)

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

    def _wait_for_all(self, store: Any) -> None:
        store.add("heard", 1)
        pause = threading.Event()
        for _ in range(int(PATIENCE / 0.01)):
            if store.add("heard", 0) >= self._size:
                return
            pause.wait(0.01)

    def _listen(self) -> None:
        while not self._done.wait(0.5):
            try:
                with self._lock:
                    if self._done.is_set() or not self._connected().check(["gave up"]):
                        continue
                    said = json.loads(self._connected().get("gave up"))
                    self._done.set()
                    self._wait_for_all(self._connected())
            except (RuntimeError, OSError):  # its keeper has not begun yet, or has ended
                continue
            self._leave(Refusal(said["rank"], said["code"]))
