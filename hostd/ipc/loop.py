"""The event loop of every role: one thread, epoll, timers, nothing else.

Handlers run to completion. An exception that leaves a handler ends the process: a defect must not
be survived in an unknown state (crash-only; systemd or `hostd run` starts the role again).
"""

from __future__ import annotations

import heapq
import itertools
import select
import signal
import socket
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class Timer:
    """A pending call; `cancel` is safe at any time."""

    __slots__ = ("_call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def fire(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()

    @property
    def cancelled(self) -> bool:
        return self._call is None

    @property
    def pending(self) -> bool:
        """Whether it is still to fire."""
        return self._call is not None


class Loop:
    """Watches descriptors and timers until `stop`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._running = False

    def watch(
        self, thing: HasFileno, handler: Callable[[int], None], *, read: bool = True, write: bool = False
    ) -> None:
        """Calls `handler(events)` when `thing` is readable if `read`, writable if `write`, or has hung up.

        Level-triggered. Watching a descriptor again changes what it is watched for.
        """
        fd = thing.fileno()
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write else 0)
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def forget(self, thing: HasFileno) -> None:
        """Stops watching; call it before closing the descriptor."""
        fd = thing.fileno()
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        """Calls once at `when` on the monotonic clock, in seconds."""
        timer = Timer(when, call)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_after(self, seconds: float, call: Callable[[], None]) -> Timer:
        return self.call_at(time.monotonic() + seconds, call)

    def every(self, seconds: float, call: Callable[[], None]) -> None:
        """Calls now and again every so many seconds, for as long as the loop runs."""
        call()
        self.call_after(seconds, lambda: self.every(seconds, call))

    def stop(self) -> None:
        self._running = False

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT end the loop after the handler that runs."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = (ours, theirs)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        self.watch(ours, lambda _events: _drain(ours))

    def run(self) -> None:
        """Serves until `stop`."""
        self._running = True
        while self._running:
            self.run_once(None)

    def run_once(self, at_most: float | None) -> None:
        """Waits for something to happen (at most `at_most` seconds) and handles all of it."""
        timeout = at_most
        while self._timers and self._timers[0][2].cancelled:
            heapq.heappop(self._timers)
        if self._timers:
            left = max(0.0, self._timers[0][0] - time.monotonic())
            timeout = left if timeout is None else min(timeout, left)
        for fd, events in self._epoll.poll(-1 if timeout is None else timeout):
            # A handler earlier in this round may have closed this descriptor.
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()

    def close(self) -> None:
        self._epoll.close()


def _drain(sock: socket.socket) -> None:
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return
