"""A thread of its own for readings that take long: the kernel's.

They are mostly one system call and one tag over some 20 MB, both made without the interpreter's lock, so the
other readings go on meanwhile. Their probe belongs to this thread alone. What was read is taken out by the
server's thread when `fileno` is readable; what the probe raised is raised there, and ends the measurer.

A thread that hangs (in a read of /proc/kcore, say) answers nothing more: the vault's deadline does the
rest, and `stuck` keeps the watchdog from being told that all is well.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.core.readings import Reading


class Probe(Protocol):
    """What reads a part."""

    def read(self, part: int) -> Reading: ...

    def close(self) -> None: ...


class Done(NamedTuple):
    """One answer: for whom, what, and how long it took in nanoseconds."""

    ticket: tuple[int, int]
    reading: Reading
    cost_ns: int


class Apart:
    """Runs one probe in a thread that starts with the first question."""

    def __init__(self, make: Callable[[], Probe]) -> None:
        self._make = make
        self._asked: queue.SimpleQueue[tuple[tuple[int, int], int] | None] = queue.SimpleQueue()
        self._done: deque[Done | BaseException] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._began = 0.0
        """When the reading that is under way began; 0: none is."""

    def fileno(self) -> int:
        """Readable when there are answers."""
        return self._event

    def ask(self, ticket: tuple[int, int], part: int) -> None:
        """Has a part read; `ticket` comes back with it."""
        if self._thread is None:
            # A daemon: one that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._serve, name="kernel", daemon=True)
            self._thread.start()
        self._asked.put((ticket, part))

    def answers(self) -> list[Done]:
        """Takes out what there is; never blocks. Raises what the probe raised."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return []
        found: list[Done] = []
        while self._done:
            item = self._done.popleft()
            if isinstance(item, BaseException):
                raise item
            found.append(item)
        return found

    def stuck(self, now: float, after_s: float) -> bool:
        """Whether one reading has been under way for over `after_s` seconds at `now` (monotonic)."""
        began = self._began
        return began > 0.0 and now - began > after_s

    def close(self, wait_s: float = 1.0) -> None:
        """Ends the thread when it is done with what it does; one that hangs is left behind."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(wait_s)
            if self._thread.is_alive():
                return
            self._thread = None
        os.close(self._event)

    def _serve(self) -> None:
        try:
            probe = self._make()
            while (item := self._asked.get()) is not None:
                ticket, part = item
                self._began = time.monotonic()
                started = time.monotonic_ns()
                reading = probe.read(part)
                self._tell(Done(ticket, reading, time.monotonic_ns() - started))
                self._began = 0.0
            probe.close()
        except BaseException as error:  # noqa: BLE001 - it is raised again in the server's thread
            self._tell(error)

    def _tell(self, item: Done | BaseException) -> None:
        self._done.append(item)
        os.eventfd_write(self._event, 1)
