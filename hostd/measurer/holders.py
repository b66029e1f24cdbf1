"""Who else holds /dev/vhost-vsock: a process that is no known hypervisor and can be a guest on vsock.

Listing every process's descriptors in one reading would cost tens of milliseconds on a busy host, so each
reading looks at some processes in turn: new ones first, all of them again and again. libvirt's
own daemon opens the device for a moment when it starts a VM, and a QEMU is there before libvirt says
so; therefore a holder is reported only after it has been one for `GRACE_S`. A process that may not be
looked into (a security module forbids it) is passed over.

Needs CAP_SYS_PTRACE (descriptors of other users' processes).
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Final

from hostd.measurer.scan import descriptors
from hostd.platform.procfs import MalformedProcError, ProcessGoneError, ProcessHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

GRACE_S: Final = 3.0
PER_READING: Final = 8
"""Processes looked at in one reading: some 0.3 ms. At five readings a second 300 processes take 8 s."""
MAX_REPORTED: Final = 64
_MAX_TEXT: Final = 512


class Holders:
    """Watches for holders of one character device (its device number)."""

    def __init__(self, device: int, clock: Callable[[], float]) -> None:
        self._device = device
        self._clock = clock
        self._turn: deque[int] = deque()
        self._known: set[int] = set()
        self._since: dict[tuple[int, int], float] = {}

    def unknown(self, hypervisors: Collection[int]) -> tuple[str, ...]:
        """Holders that are none of the pids in `hypervisors`, as `pid 812 (/usr/bin/x)`."""
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._turn.extendleft(pids - self._known)
        self._known = pids
        now = self._clock()
        looked = [pid for pid, _ in self._since]
        while self._turn and len(looked) < PER_READING + len(self._since):
            pid = self._turn.popleft()
            if pid in pids:
                looked.append(pid)
                self._turn.append(pid)
        before, self._since = self._since, {}
        reported: list[str] = []
        for pid in dict.fromkeys(looked):
            if pid in hypervisors:
                continue
            held = self._look(pid)
            if held is None:
                continue
            start_time, executable = held
            since = before.get((pid, start_time), now)
            self._since[pid, start_time] = since
            if now - since >= GRACE_S and len(reported) < MAX_REPORTED:
                reported.append(f"pid {pid} ({executable})"[:_MAX_TEXT])
        return tuple(reported)

    def _look(self, pid: int) -> tuple[int, str] | None:
        try:
            handle = ProcessHandle(pid)
        except ProcessGoneError:
            return None
        try:
            if not descriptors(handle, self._device)[1]:
                return None
            return handle.stat().start_time, handle.link("exe")
        except (ProcessGoneError, MalformedProcError, OSError):
            return None
        finally:
            handle.close()
