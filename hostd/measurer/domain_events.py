"""libvirt's domain events, as hints: a machine was started, stopped, or got another device.

On a connection of its own, in a thread with libvirt's event loop; a daemon that is not there, or goes away,
is tried again. Only which domain it was is passed on; what it is now is for a reading to say.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import deque
from typing import Any, Final

MAX_QUEUED: Final = 256
AGAIN_S: Final = 5.0
KEEPALIVE: Final = (5, 3)
"""Seconds, and how many of them without an answer."""
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class DomainEvents:
    """The subscription. Starts its thread at once."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._queue: deque[str] = deque(maxlen=MAX_QUEUED)
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        threading.Thread(target=self._serve, name="libvirt-events", daemon=True).start()

    def fileno(self) -> int:
        """Readable when something happened."""
        return self._event

    def take(self) -> list[str]:
        """UUIDs of the domains that something happened to, in order; the oldest may have been dropped."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        taken: list[str] = []
        while self._queue:
            taken.append(self._queue.popleft())
        return taken

    def _tell(self, uuid: str) -> None:
        self._queue.append(uuid if _UUID.fullmatch(uuid) else "")
        os.eventfd_write(self._event, 1)

    def _serve(self) -> None:
        try:
            import libvirt
        except ImportError:
            return
        libvirt.virEventRegisterDefaultImpl()
        connection: Any = None
        not_before = 0.0

        def on_event(_connection: Any, domain: Any, *_: Any) -> None:
            self._tell(domain.UUIDString().lower())

        while True:
            if connection is None and time.monotonic() >= not_before:
                connection = _subscribe(libvirt, self._uri, on_event)
                not_before = time.monotonic() + AGAIN_S
            if connection is None:
                time.sleep(AGAIN_S / 10)
                continue
            with contextlib.suppress(libvirt.libvirtError):
                libvirt.virEventRunDefaultImpl()
            if not connection.isAlive():
                with contextlib.suppress(libvirt.libvirtError):
                    connection.close()
                connection = None
                # What happened meanwhile was not told.
                self._tell("")


def _subscribe(libvirt: Any, uri: str, on_event: Any) -> Any:
    """A connection that tells of lifecycles and devices; None if there is none now."""
    connection = None
    try:
        connection = libvirt.openReadOnly(uri)
        connection.setKeepAlive(*KEEPALIVE)
        for kind in (
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
            libvirt.VIR_DOMAIN_EVENT_ID_DISK_CHANGE,
        ):
            connection.domainEventRegisterAny(None, kind, on_event, None)
    except libvirt.libvirtError:
        if connection is not None:
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()
        return None
    return connection
