"""libvirt's word: which process is which domain, and what a domain is made of. Owns libvirt.

libvirt vouches for an active domain's UUID and name, the CID of its live XML, and the pid that it wrote to
/run/libvirt/qemu/NAME.pid. libvirt's calls may hang with its daemon, so they are made in a thread of their
own, and whoever asks waits as long as it wants to.

A pid alone says little: while libvirtd is down a domain may end and its pid be given to another
process, which libvirtd, started again, takes for the domain's until it has looked. So `Said.run` names the
run of the domain, and `in_scope` asks the kernel for the control group that libvirt put that run into: one
of root's, which a process cannot enter by itself.
"""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from hostd.measurer.commandline import MAX_NAME, Said
from hostd.measurer.domain_xml import Definition, MalformedDomainError, parse_cid, parse_domain

if TYPE_CHECKING:
    from collections.abc import Callable

PID_FILES: Final = Path("/run/libvirt/qemu")
MAX_CGROUP_BYTES: Final = 16 << 10
"""A line for each hierarchy, 13 of them at most, of a path each."""
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PID: Final = re.compile(rb"([1-9][0-9]{0,9})\n?")
_SCOPE: Final = re.compile(
    rb"[0-9]{1,3}:[^:\n]*:/machine(?:\.slice)?/(?:[^\n]*/)?"
    rb"(?:machine-)?qemu(?:\\x2d|-)([0-9]{1,9})(?:\\x2d|-)[^/\n]*\.(?:scope|libvirt-qemu)(?:/[^\n]*)?"
)
"""`0::/machine.slice/machine-qemu\\x2d1\\x2dweb.scope/libvirt/emulator` under systemd, else
`/machine/qemu-1-web.libvirt-qemu/emulator` (libvirt's src/util/virsystemd.c and vircgroup.c)."""

T = TypeVar("T")
Key = tuple[int, int]
"""(pid, start time)."""


class DirectoryError(Exception):
    """libvirt cannot be asked, or did not answer in its own form."""


class Word(NamedTuple):
    """libvirt's answer about one domain."""

    pid: int
    definition: Definition


def in_scope(cgroup: bytes, run: int) -> bool:
    """Whether /proc/PID/cgroup says that the process belongs to run number `run` of a domain."""
    found = {int(match[1]) for line in cgroup.splitlines() if (match := _SCOPE.fullmatch(line))}
    return found == {run}


class Directory:
    """libvirt's word on processes and domains, asked for in a thread."""

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
        self._vm = ""
        self._vm_asked = self._vm_done = 0
        self._word: Word | None = None
        self._parsed: dict[str, tuple[str, Definition]] = {}
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

    def define(self, vm: str, wait_s: float) -> Word | None:
        """What the active domain with this UUID is made of; None if libvirt does not say within `wait_s`.

        The answer was given after the question was put. While an earlier question has no answer this one
        is not put, and nobody waits: a daemon that hangs costs one wait.
        """
        with self._answered:
            if self._vm_asked != self._vm_done:
                return None
            self._vm_asked += 1
            ticket = self._vm_asked
            self._vm, self._word = vm, None
            self._wanted.set()
            self._answered.wait_for(lambda: self._vm_done >= ticket, wait_s)
            return self._word if self._vm_done >= ticket else None

    def forget(self, vms: frozenset[str]) -> None:
        """Drops what is kept of domains that are not among these."""
        for vm in [vm for vm in self._parsed if vm not in vms]:
            self._parsed.pop(vm, None)

    def _serve(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._asked != self._done:
                listed = self._try(self._list) or {}
                answer = {key: listed.get(key[0]) for key in self._question} if not self.error else {}
                with self._answered:
                    self._answer, self._done = answer, self._asked
                    self._answered.notify_all()
            if self._vm_asked != self._vm_done:
                word = self._try(self._define)
                with self._answered:
                    self._word, self._vm_done = word, self._vm_asked
                    self._answered.notify_all()

    def _try(self, call: Callable[[], T]) -> T | None:
        try:
            import libvirt
        except ImportError:
            self.error = "libvirt-python is not installed"
            return None
        try:
            if self._connection is None:
                libvirt.registerErrorHandler(lambda *_: None, None)
                self._connection = libvirt.openReadOnly(self._uri)
            answer = call()
        except (libvirt.libvirtError, DirectoryError) as failure:
            self.error = f"libvirt: {failure}"
            self._disconnect()
            return None
        self.error = ""
        return answer

    def _list(self) -> dict[int, Said | None]:
        import libvirt

        domains = self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        cids: dict[tuple[str, int], int] = {}
        listed: dict[int, Said | None] = {}
        for domain in domains:
            uuid, name, run = domain.UUIDString().lower(), domain.name(), domain.ID()
            pid = self._pid_of(name)
            if run < 0 or pid is None or not _UUID.fullmatch(uuid):
                continue
            cid = self._cids.get((uuid, run))
            # 0 is not kept: libvirt fills in an automatic CID while it starts the domain.
            cids[uuid, run] = cid = cid or parse_cid(domain.XMLDesc(0))
            # Two domains cannot be one process: then it is neither's.
            listed[pid] = None if pid in listed else Said(uuid, name[:MAX_NAME], cid, run)
        self._cids = cids
        return listed

    def _define(self) -> Word:
        vm = self._vm
        domain = self._connection.lookupByUUIDString(vm)
        run, text = domain.ID(), domain.XMLDesc(0)
        known = self._parsed.get(vm)
        try:
            definition = known[1] if known is not None and known[0] == text else parse_domain(text)
        except MalformedDomainError as error:
            raise DirectoryError(f"{vm}: {error}") from None
        pid = self._pid_of(domain.name())
        if run < 0 or pid is None or definition.vm != vm or domain.ID() != run:
            raise DirectoryError(f"{vm} does not run")
        self._parsed[vm] = text, definition
        # A vsock device that was plugged in or out meanwhile: the listing follows.
        self._cids[vm, run] = definition.cid
        return Word(pid, definition)

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
