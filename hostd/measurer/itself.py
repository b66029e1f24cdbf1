"""Reads hostd's own processes and files: a few files, and one process, in each reading.

A process is read as a hypervisor is (`hostd.measurer.process`): its files are taken on by the registry, under
(pid, start time) of the process, and hashed with all others. The measurer reads itself as well; who
changes the one that looks may make it say anything, so that only tells what was done without care.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from hostd.core.reading_hypervisor import Hypervisor
from hostd.core.reading_self import SelfReading
from hostd.measurer.files import TooMuchError
from hostd.measurer.own_files import OwnFiles, installation
from hostd.measurer.process import OWN
from hostd.measurer.roles import ROLES, OwnProcesses
from hostd.platform.procfs import MalformedProcError, ProcessGoneError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hostd.core.reading_process import ProcessReading
    from hostd.measurer.files import Registry
    from hostd.measurer.process import ProcessProbe
    from hostd.measurer.roles import Own

MAX_NAMED: Final = 64
LOOK_S: Final = 0.05
"""Processes are looked for no more often: while many requests wait a reading comes every few milliseconds."""
FILES_S: Final = 0.05
"""So long after the last one a reading has its whole part of the files; sooner, as much less. On an idle host
all are whole; on a busy one a round takes some three seconds, and no request pays for many files."""


class SelfProbe:
    """Reads hostd's own processes and files."""

    def __init__(
        self,
        registry: Registry,
        processes: ProcessProbe,
        *,
        own: OwnProcesses | None = None,
        files: OwnFiles | None = None,
        roots: tuple[str, ...] | None = None,
    ) -> None:
        self._registry = registry
        self._processes = processes
        self._roots = installation() if roots is None else roots
        self._own = own or OwnProcesses(time.monotonic)
        self._files = files or OwnFiles(self._roots)
        self._ours: list[Own] = []
        self._strangers: list[Own] = []
        self._looked = -LOOK_S
        self._read = -FILES_S
        self._turn = 0

    def read(self) -> SelfReading:
        """One reading."""
        self._look()
        now = time.monotonic()
        part = self._files.read(min(1.0, (now - self._read) / FILES_S))
        self._read = now
        counted = Counter(own.role for own in self._ours)
        return SelfReading(
            manager=self._own.manager,
            roots=self._roots,
            roles=tuple((role, counted[role]) for role in ROLES),
            strangers=tuple(_name(own) for own in self._strangers[:MAX_NAMED]),
            process=self._next(),
            number=part.number,
            position=part.position,
            files=part.files,
            complete=part.complete,
        )

    def alive(self) -> frozenset[tuple[int, int]]:
        """(pid, start time) of hostd's processes as they were last seen."""
        return frozenset(own.key for own in self._ours)

    def enroll(self) -> None:
        """Makes the registry know what these processes map: their files are hashed with the others."""
        self._look()
        for own in self._ours:
            if not self._registry.claimed(own.key):
                try:
                    self._processes.enroll(_as_hypervisor(own), own.handle)
                except (ProcessGoneError, MalformedProcError, TooMuchError, OSError):
                    # Its own reading says why.
                    continue

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._ours, self._strangers = self._own.look()

    def _next(self) -> ProcessReading | None:
        """The next process in turn; another one if that has just ended."""
        for own in self._in_turn():
            try:
                return self._processes.read(_as_hypervisor(own), own.handle)
            except ProcessGoneError:
                continue
        return None

    def _in_turn(self) -> Iterable[Own]:
        for _ in range(min(len(self._ours), 4)):
            self._turn += 1
            yield self._ours[self._turn % len(self._ours)]

    def close(self) -> None:
        self._own.close()


def _as_hypervisor(own: Own) -> Hypervisor:
    """The process in the words of `hostd.measurer.process`. `kvm`: no executable memory without a file."""
    return Hypervisor(
        pid=own.key[0],
        start_time=own.key[1],
        uid=own.uid,
        vm="",
        name=own.role,
        cid=0,
        executable=own.executable[:4096],
        accel="kvm",
        source=OWN,
    )


def _name(own: Own) -> str:
    return f"pid {own.key[0]} ({own.executable}) in hostd's {own.role}"[:512]
