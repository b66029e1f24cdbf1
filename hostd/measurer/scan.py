"""Finds hypervisor processes in /proc.

A hypervisor process is one that runs a configured binary: /proc/PID/exe names it, ` (deleted)` ignored,
because an upgrade in place leaves old VMs running the old file. One that may not be looked into is left
out: it cannot be measured, so it is nobody. Every process is looked at in every scan
(about 2 us each): one may become a hypervisor by exec without any sign that could be trusted.

Needs CAP_SYS_PTRACE (exe of other users' processes).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hostd.core.readings import MAX_HYPERVISORS
from hostd.platform.procfs import (
    MAX_STATUS_BYTES,
    MalformedProcError,
    ProcessGoneError,
    ProcessHandle,
    parse_uid,
    readable,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

DELETED: Final = " (deleted)"
KVM_LINK: Final = "anon_inode:kvm-vm"
MAX_DESCRIPTORS: Final = 65536


@dataclass(slots=True)
class Found:
    """A hypervisor process. `kvm` and `vsock` stay true once seen: both are set up after the start."""

    handle: ProcessHandle
    start_time: int
    executable: str
    uid: int
    kvm: bool = False
    vsock: bool = False
    said: object = field(default=None)
    """Its command line, parsed by who asked for it."""

    @property
    def key(self) -> tuple[int, int]:
        return self.handle.pid, self.start_time


class Scanner:
    """Keeps handles of the hypervisor processes between scans."""

    def __init__(self, binaries: Iterable[str], vsock_device: int | None) -> None:
        self._binaries = frozenset(binaries) | {os.path.realpath(path) for path in binaries}
        self._vsock_device = vsock_device
        self._found: dict[int, Found] = {}

    def scan(self) -> list[Found]:
        """All hypervisor processes alive, by pid.

        Raises:
            MalformedProcError: more of them than the bound.
        """
        seen: set[int] = set()
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            pid = int(name)
            known = self._found.get(pid)
            if known is not None:
                if self._still(known):
                    seen.add(pid)
                    continue
                self._found.pop(pid).handle.close()
            try:
                executable = readable(os.fsencode(os.readlink(f"/proc/{name}/exe")))
            except OSError:
                continue
            if executable.removesuffix(DELETED) in self._binaries and self._look(pid, executable):
                seen.add(pid)
        for pid in self._found.keys() - seen:
            self._found.pop(pid).handle.close()
        if len(seen) > MAX_HYPERVISORS:
            raise MalformedProcError(f"over {MAX_HYPERVISORS} hypervisor processes")
        return [self._found[pid] for pid in sorted(seen)]

    def _still(self, known: Found) -> bool:
        """Whether a known process is one still. Its handle is of that process alone: once the process has
        ended, even as a zombie, its link `exe` leads nowhere."""
        try:
            known.executable = known.handle.link("exe")
        except (ProcessGoneError, OSError):
            return False
        return known.executable.removesuffix(DELETED) in self._binaries

    def _look(self, pid: int, executable: str) -> bool:
        """Takes a new one on; whether that went well."""
        handle = None
        try:
            handle = ProcessHandle(pid)
            found = Found(handle, handle.stat().start_time, executable, uid=0)
            self.refresh(found)
        except (ProcessGoneError, MalformedProcError, OSError):
            if handle is not None:
                handle.close()
            return False
        self._found[pid] = found
        return True

    def refresh(self, found: Found) -> None:
        """Reads anew what may change while a process lives: its file's name, its user, what it holds.

        Raises:
            ProcessGoneError: it has ended, or runs another program.
            MalformedProcError: /proc gave what it should not.
        """
        handle = found.handle
        if handle.stat().ended:
            raise ProcessGoneError("the process has ended")
        found.executable = handle.link("exe")
        if found.executable.removesuffix(DELETED) not in self._binaries:
            raise ProcessGoneError("it runs another program")
        found.uid = parse_uid(handle.read("status", MAX_STATUS_BYTES))
        if not (found.kvm and found.vsock):
            kvm, vsock = descriptors(handle, self._vsock_device)
            found.kvm |= kvm
            found.vsock |= vsock

    def close(self) -> None:
        for found in self._found.values():
            found.handle.close()
        self._found.clear()


def descriptors(handle: ProcessHandle, device: int | None) -> tuple[bool, bool]:
    """Whether the process holds a KVM virtual machine, and whether it holds character device `device`.

    Raises:
        ProcessGoneError: it has ended.
        MalformedProcError: more open descriptors than the bound.
    """
    numbers = handle.list("fd")
    if len(numbers) > MAX_DESCRIPTORS:
        raise MalformedProcError(f"over {MAX_DESCRIPTORS} open descriptors")
    kvm = holds = False
    for number in numbers:
        try:
            link = handle.link(f"fd/{number}")
            if link == KVM_LINK:
                kvm = True
            elif device is not None and link.startswith("/dev/"):
                holds |= handle.device_of(f"fd/{number}") == device
        except ProcessGoneError:
            continue
    return kvm, holds
