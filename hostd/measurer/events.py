"""What processes do, as the kernel tells it on the proc connector. Owns pyroute2.

Executions, ends, traces, changes of user (drivers/connector/cn_proc.c). They are hints and no more: an event
may be lost, and opening /proc/PID/mem gives none. So a reader that is behind may drop them, and says so.

Parsing one takes some 7 us and a fork storm brings tens of thousands a second, so at most `MAX_AT_ONCE` are
taken in one turn; the kernel drops what its buffer cannot hold.

Needs CAP_NET_ADMIN, in the first user and network namespace.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import sys
from typing import TYPE_CHECKING, Final, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType
    from typing import Any

MAX_AT_ONCE: Final = 16
MESSAGE_BYTES: Final = 4096
"""One event is 76 bytes (struct nlmsghdr, cn_msg, proc_event)."""
BUFFER_BYTES: Final = 256 << 10
_PACKAGE: Final = "pyroute2"
_SUBJECT: Final = {
    "PROC_EVENT_EXEC": "process",
    "PROC_EVENT_EXIT": "process",
    "PROC_EVENT_PTRACE": "process",
    "PROC_EVENT_UID": "process",
    "PROC_EVENT_GID": "process",
    "PROC_EVENT_COREDUMP": "process",
    "PROC_EVENT_FORK": "parent",
}


class EventsError(Exception):
    """This kernel, namespace or process has no proc connector."""


class Event(NamedTuple):
    """One event. `pid` is the process (thread group) that it is about."""

    what: str
    """`exec`, `exit` (of a whole process), `ptrace`, `uid`, `gid`, `coredump`, `fork` (of a process)."""
    pid: int


class Turn(NamedTuple):
    """What one turn of reading gave."""

    events: list[Event]
    lost: bool
    """Some before it were lost."""
    more: bool
    """There may be more."""


class ProcessEvents:
    """The subscription.

    Raises:
        EventsError: it cannot be had.
    """

    def __init__(self) -> None:
        try:
            connector = _connector()
        except ImportError as error:
            raise EventsError(f"pyroute2 is not installed: {error}") from error
        try:
            self._netlink: Any = connector.ProcEventSocket()
            self._netlink.bind()
            self._netlink.control(listen=True)
            # Its own reading waits for the socket; we have a loop of our own.
            self._socket = socket.socket(fileno=os.dup(self._netlink.fileno()))
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        except (OSError, ValueError) as error:
            raise EventsError(str(error)) from error
        self._marshal: Any = connector.ProcEventMarshal()

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> Turn:
        """What has come, of `MAX_AT_ONCE` messages at most; never blocks."""
        events: list[Event] = []
        lost = False
        for _ in range(MAX_AT_ONCE):
            try:
                data, sender = self._socket.recvfrom(MESSAGE_BYTES)
            except BlockingIOError:
                return Turn(events, lost, more=False)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                lost = True
                continue
            # Only the kernel's own (port 0): any process may send to a netlink socket.
            if sender[0] == 0:
                events += events_in(self._marshal.parse(data))
        return Turn(events, lost, more=True)

    def close(self) -> None:
        self._socket.close()
        self._netlink.close()


def _connector() -> ModuleType:
    """pyroute2's proc connector, without the rest of it: 8 MB instead of 17. The package's own `__init__`
    imports everything it has (a database, a test framework, psutil), so it is not run; a version of which the
    connector needs it is imported whole.

    Raises:
        ImportError: there is no pyroute2.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is not None and _PACKAGE not in sys.modules:
        sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
        try:
            import pyroute2.netlink.connector.cn_proc as alone

            return cast("ModuleType", alone)
        except (ImportError, AttributeError):
            for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
                del sys.modules[name]
    import pyroute2.netlink.connector.cn_proc as connector

    return cast("ModuleType", connector)


def events_in(messages: Iterable[Any]) -> Iterable[Event]:
    """The events that matter in parsed messages."""
    for message in messages:
        name = message.get("event", "")
        subject = _SUBJECT.get(name)
        if subject is None:
            continue
        pid, group = message.get(f"{subject}_pid"), message.get(f"{subject}_tgid")
        if not isinstance(pid, int) or not isinstance(group, int):
            continue
        if name == "PROC_EVENT_EXIT" and pid != group:
            continue
        if name == "PROC_EVENT_FORK" and message.get("child_tgid") == group:
            continue  # a thread
        yield Event(name.removeprefix("PROC_EVENT_").lower(), group)
