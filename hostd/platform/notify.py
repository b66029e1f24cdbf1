"""Readiness and watchdog for systemd: sd_notify(3), without its library.

Silent where `NOTIFY_SOCKET` is not set. A notification that cannot be sent is dropped: systemd then
sees a unit that does not become ready, or a watchdog that runs out, and acts on that.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
WATCHDOG: Final = "WATCHDOG=1"


def notify(state: str) -> None:
    """Sends one state, `READY` say, to the service manager."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(address)
        sock.send(state.encode())


def watchdog_interval() -> float | None:
    """Seconds between two `WATCHDOG`s: half of what systemd allows; None if it does not watch us."""
    try:
        allowed = int(os.environ.get("WATCHDOG_USEC", ""))
        watched = int(os.environ.get("WATCHDOG_PID", "") or os.getpid())
    except ValueError:
        return None
    return allowed / 2e6 if allowed > 0 and watched == os.getpid() else None
