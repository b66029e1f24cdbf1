"""Which VM each hypervisor process is.

Under `provider = "libvirt"` libvirt vouches (`hostd.measurer.directory`), and the process must be in the
control group of that very run of the domain: a pid may have been given to another process while libvirtd
was down. A process that libvirt does not vouch for is nobody: it is left out, and named in `unknown` if it
holds /dev/vhost-vsock. (libvirt itself runs QEMUs that are no domain, to learn what they can do.) What
libvirt said of (pid, start time) holds while the process lives, so VMs go on being served while libvirtd
restarts; it is asked again in every reading.

libvirt's calls may hang with its daemon; they are made in a thread of their own, and a reading waits
for it only when there is a process it has not vouched for, `WAIT_S` at most.

Under `provider = "proc"`, for development, a process says itself who it is.

Needs CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH (pid files), and access to libvirt's read-only socket.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.core.readings import GuestsReading, Hypervisor
from hostd.measurer.commandline import Said, parse_command_line
from hostd.measurer.directory import MAX_CGROUP_BYTES, Directory, Key, in_scope
from hostd.measurer.holders import Holders
from hostd.measurer.scan import Found, Scanner, descriptors
from hostd.platform.procfs import MAX_COMMAND_LINE_BYTES, MalformedProcError, ProcessGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hostd.config import Hypervisor as HypervisorConfig

VSOCK_DEVICE: Final = Path("/dev/vhost-vsock")
WAIT_S: Final = 0.25


class Guest(NamedTuple):
    """A hypervisor process that is somebody."""

    hypervisor: Hypervisor
    found: Found


class GuestsProbe:
    """Reads who is who, and finds one process by what is known of it."""

    def __init__(
        self,
        config: HypervisorConfig,
        *,
        vsock_device: Path = VSOCK_DEVICE,
        directory: Directory | None = None,
        runs_as: Callable[[Found, int], bool] | None = None,
    ) -> None:
        """`directory` and `runs_as` say, in place of libvirt and of the kernel, what a process is."""
        device = self._device = _device(vsock_device)
        self._scanner = Scanner(config.binaries, device)
        self._holders = None if device is None else Holders(device, time.monotonic)
        self._source = config.provider
        if directory is None and config.provider == "libvirt":
            directory = Directory(config.libvirt_uri)
        self.directory = directory
        self._runs_as = runs_as or _runs_as
        self._vouched: dict[Key, Said] = {}
        self._said: dict[Key, Said] = {}
        self._waited_for: frozenset[Key] = frozenset()
        self.guests: tuple[Guest, ...] = ()
        """As of the last `look`."""
        self.nobody: frozenset[int] = frozenset()
        """Pids of hypervisor processes that are no VM that anyone vouches for, as of the last `look`."""

    def read(self) -> GuestsReading:
        """All hypervisor processes now, and who holds vhost-vsock without being one."""
        guests = self.look()
        pids = {guest.hypervisor.pid for guest in guests}
        unknown = self._holders.unknown(pids) if self._holders is not None else ()
        return GuestsReading(tuple(guest.hypervisor for guest in guests), unknown)

    def look(self) -> tuple[Guest, ...]:
        """Finds all hypervisor processes, and who they are."""
        found = self._scanner.scan()
        said = self._ask(found) if self.directory is not None else _ask_themselves(found)
        guests: list[Guest] = []
        for process in found:
            word = said.get(process.key)
            if word is None:
                continue
            guest = Guest(self._hypervisor(process, word), process)
            if word.cid and not process.vsock:
                with contextlib.suppress(ProcessGoneError, MalformedProcError, OSError):
                    guest = self.refresh(guest, word)
            guests.append(guest)
        self.guests = tuple(guests)
        self.nobody = frozenset(process.key[0] for process in found if process.key not in said)
        self._said = said
        return self.guests

    def refresh(self, guest: Guest, said: Said | None = None) -> Guest:
        """The same process with all that may have changed read anew.

        Raises:
            ProcessGoneError: it has ended, or runs another program.
            MalformedProcError: /proc gave what it should not.
        """
        self._scanner.refresh(guest.found)
        return Guest(self._hypervisor(guest.found, said or self._said[guest.found.key]), guest.found)

    def recheck(self, guest: Guest) -> None:
        """Looks anew at what the process holds: a CID counts no longer once the vsock device is unplugged.

        Raises:
            ProcessGoneError: it has ended.
            MalformedProcError: /proc gave what it should not.
        """
        _, guest.found.vsock = descriptors(guest.found.handle, self._device)

    def alive(self) -> frozenset[Key]:
        """(pid, start time) of the hypervisor processes as of the last `look`."""
        return frozenset(guest.found.key for guest in self.guests)

    def _ask(self, found: list[Found]) -> dict[Key, Said]:
        assert self.directory is not None
        keys = frozenset(process.key for process in found)
        # A stranger is waited for once: some QEMUs are nobody's, and libvirt may hang.
        answer = self.directory.ask(keys, 0.0 if keys <= self._waited_for else WAIT_S)
        self._waited_for = keys
        said: dict[Key, Said] = {}
        for process in found:
            key = process.key
            before = self._vouched.get(key)
            word = answer.get(key, before)
            known = before is not None and word is not None and (before.vm, before.run) == (word.vm, word.run)
            if word is not None and (known or self._runs_as(process, word.run)):
                said[key] = word
        self._vouched = said
        return said

    def _hypervisor(self, process: Found, said: Said) -> Hypervisor:
        pid, start_time = process.key
        return Hypervisor(
            pid=pid,
            start_time=start_time,
            uid=process.uid,
            vm=said.vm,
            name=said.name,
            # A CID counts only for who holds the device: the kernel gives each CID to one holder.
            cid=said.cid if process.vsock else 0,
            executable=process.executable[:4096],
            accel="kvm" if process.kvm else "tcg",
            source=self._source,
        )

    def close(self) -> None:
        self._scanner.close()


def _runs_as(process: Found, run: int) -> bool:
    """Whether the kernel has the process in the control group that libvirt made for this run."""
    try:
        return in_scope(process.handle.read("cgroup", MAX_CGROUP_BYTES), run)
    except (ProcessGoneError, MalformedProcError, OSError):
        return False


def _ask_themselves(found: list[Found]) -> dict[Key, Said]:
    said: dict[Key, Said] = {}
    for process in found:
        if not isinstance(process.said, Said):
            try:
                process.said = parse_command_line(process.handle.read("cmdline", MAX_COMMAND_LINE_BYTES))
            except (ProcessGoneError, MalformedProcError):
                continue
        said[process.key] = process.said
    return said


def _device(path: Path) -> int | None:
    """Device number of a character device; None if this host has it not."""
    try:
        return os.stat(path).st_rdev or None
    except FileNotFoundError:
        return None
