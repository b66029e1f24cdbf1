"""Which VM each hypervisor process is. Owns libvirt.

Under `provider = "libvirt"` libvirt vouches: an active domain's UUID and name, the CID of its live XML,
and the pid that libvirt wrote to /run/libvirt/qemu/NAME.pid. A process that it does not vouch for is
nobody: it is left out, and named in `unknown` if it holds /dev/vhost-vsock. (libvirt itself runs QEMUs
that are no domain, to learn what they can do.) What libvirt said of (pid, start time) holds while the
process lives, so VMs go on being served while libvirtd restarts; it is asked again in every reading.

libvirt's calls may hang with its daemon; they are made in a thread of their own, and a reading waits
for it only when there is a process it has not vouched for, `WAIT_S` at most.

Under `provider = "proc"`, for development, a process says itself who it is.

Needs CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH (pid files), and access to libvirt's read-only socket.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from xml.etree import ElementTree

from hostd.core.readings import GuestsReading, Hypervisor
from hostd.measurer.commandline import MAX_NAME, Said, parse_command_line
from hostd.measurer.holders import Holders
from hostd.measurer.scan import Found, Scanner
from hostd.platform.procfs import MAX_COMMAND_LINE_BYTES, MalformedProcError, ProcessGoneError

if TYPE_CHECKING:
    from hostd.config import Hypervisor as HypervisorConfig

VSOCK_DEVICE: Final = Path("/dev/vhost-vsock")
PID_FILES: Final = Path("/run/libvirt/qemu")
WAIT_S: Final = 0.25
MAX_XML_BYTES: Final = 1 << 20
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PID: Final = re.compile(rb"([1-9][0-9]{0,9})\n?")


Key = tuple[int, int]
"""(pid, start time)."""


class DirectoryError(Exception):
    """libvirt cannot be asked, or did not answer in its own form."""


class Directory:
    """libvirt's word on processes, asked for in a thread."""

    def __init__(self, uri: str, pid_files: Path = PID_FILES) -> None:
        self._uri = uri
        self._pid_files = pid_files
        self._connection: Any = None
        self._cids: dict[tuple[str, int], int] = {}
        self._wanted = threading.Event()
        self._answered = threading.Condition()
        self._asked = self._done = 0
        self._question: frozenset[Key] = frozenset()
        self._answer: dict[Key, Said | None] = {}
        self.error = "not asked yet"
        """Why the last question had no answer; empty if it had one."""
        threading.Thread(target=self._serve, name="libvirt", daemon=True).start()

    def ask(self, processes: frozenset[Key], wait_s: float) -> dict[Key, Said | None]:
        """Asks about processes that are alive; waits at most `wait_s` for the answer.

        Gives the latest answer there is: None for a process that is no domain's, and no entry for one
        that it is not about. An answer is about the processes alive when the question was put, never
        about whoever has their number later.
        """
        with self._answered:
            if self._asked == self._done:
                self._asked += 1
                self._question = processes
                self._wanted.set()
            ticket = self._asked
            self._answered.wait_for(lambda: self._done >= ticket, wait_s)
            return self._answer

    def _serve(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            answer: dict[Key, Said | None] = {}
            try:
                domains, error = self._list(), ""
                answer = {key: domains.get(key[0]) for key in self._question}
            except DirectoryError as failure:
                error = str(failure)
                self._disconnect()
            with self._answered:
                self._answer, self.error = answer, error
                self._done = self._asked
                self._answered.notify_all()

    def _list(self) -> dict[int, Said]:
        try:
            import libvirt
        except ImportError as error:
            raise DirectoryError("libvirt-python is not installed") from error
        try:
            if self._connection is None:
                libvirt.registerErrorHandler(lambda *_: None, None)
                self._connection = libvirt.openReadOnly(self._uri)
            domains = self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            cids: dict[tuple[str, int], int] = {}
            listed: dict[int, Said] = {}
            for domain in domains:
                uuid, name, run = domain.UUIDString().lower(), domain.name(), domain.ID()
                pid = self._pid_of(name)
                if run < 0 or pid is None or not _UUID.fullmatch(uuid):
                    continue
                cid = self._cids.get((uuid, run))
                # 0 is not kept: libvirt fills in an automatic CID while it starts the domain.
                cids[uuid, run] = cid = cid or parse_cid(domain.XMLDesc(0))
                listed[pid] = Said(uuid, name[:MAX_NAME], cid)
            self._cids = cids
            return listed
        except libvirt.libvirtError as error:
            raise DirectoryError(f"libvirt: {error}") from error

    def _pid_of(self, name: str) -> int | None:
        if not name or "/" in name:
            return None
        try:
            with (self._pid_files / f"{name}.pid").open("rb") as file:
                match = _PID.fullmatch(file.read(16))
        except OSError:
            return None
        return None if match is None else int(match[1])

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            import libvirt

            with contextlib.suppress(libvirt.libvirtError):
                connection.close()


def parse_cid(xml: str) -> int:
    """The vsock CID in a domain's live XML; 0 if it has none, or the XML is not what libvirt writes."""
    if len(xml) > MAX_XML_BYTES:
        return 0
    try:
        # libvirt's own output; no entities of a stranger's.
        root = ElementTree.fromstring(xml)  # noqa: S314
    except ElementTree.ParseError:
        return 0
    addresses = {cid.get("address", "") for cid in root.findall("./devices/vsock/cid")}
    address = addresses.pop() if len(addresses) == 1 else ""
    return int(address) if re.fullmatch("[0-9]{1,10}", address) and 2 < int(address) < 2**32 - 1 else 0


class Guest(NamedTuple):
    """A hypervisor process that is somebody."""

    hypervisor: Hypervisor
    found: Found


class GuestsProbe:
    """Reads who is who, and finds one process by what is known of it."""

    def __init__(self, config: HypervisorConfig, *, vsock_device: Path = VSOCK_DEVICE) -> None:
        device = _device(vsock_device)
        self._scanner = Scanner(config.binaries, device)
        self._holders = None if device is None else Holders(device, time.monotonic)
        self._source = config.provider
        self._directory = Directory(config.libvirt_uri) if config.provider == "libvirt" else None
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
        said = self._ask(found) if self._directory is not None else _ask_themselves(found)
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

    def alive(self) -> frozenset[Key]:
        """(pid, start time) of the hypervisor processes as of the last `look`."""
        return frozenset(guest.found.key for guest in self.guests)

    def _ask(self, found: list[Found]) -> dict[Key, Said]:
        assert self._directory is not None
        keys = frozenset(process.key for process in found)
        # A stranger is waited for once: some QEMUs are nobody's, and libvirt may hang.
        answer = self._directory.ask(keys, 0.0 if keys <= self._waited_for else WAIT_S)
        self._waited_for = keys
        said: dict[Key, Said] = {}
        for key in keys:
            word = answer[key] if key in answer else self._vouched.get(key)
            if word is not None:
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
