"""Finds hostd's own processes.

Under systemd a process belongs to a unit if the kernel has it in the unit's control group: only root can put
it there. So the roles are those groups beside the measurer's own, with every process in them. Under
`hostd run` they are the supervisor's descendants that run our own interpreter; that is for development.

A process that runs another program than our interpreter is a stranger, and reported after `GRACE_S`. Before
it executes the role systemd's own child is one too; a process that still runs what process 1 runs (since
systemd 254 its `systemd-executor`) is reported when its unit should long have started, or have failed.

Needs CAP_SYS_PTRACE (exe of other users' processes).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hostd.platform.procfs import (
    MAX_COMMAND_LINE_BYTES,
    MAX_STATUS_BYTES,
    MalformedProcError,
    ProcessGoneError,
    ProcessHandle,
    parse_uid,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROLES: Final = ("measurer", "vault", "gateway", "metrics")
GRACE_S: Final = 3.0
START_S: Final = 90.0
"""systemd's own limit for a unit to start (DefaultTimeoutStartSec)."""
MAX_PROCESSES: Final = 2048
"""512 workers, the roles, their children, and room."""
MAX_LIST_BYTES: Final = 64 << 10
MAX_GENERATIONS: Final = 4
CGROUPS: Final = Path("/sys/fs/cgroup")
DELETED: Final = " (deleted)"
_UNIT: Final = re.compile(rb"0::(/(?:[^\n]*/)?)hostd-measurer\.service\n")


@dataclass(frozen=True, slots=True)
class Own:
    """A process of hostd's."""

    role: str
    handle: ProcessHandle
    start_time: int
    executable: str
    uid: int
    since: float

    @property
    def key(self) -> tuple[int, int]:
        return self.handle.pid, self.start_time


class OwnProcesses:
    """Keeps handles of hostd's processes between readings."""

    def __init__(self, clock: Callable[[], float], *, cgroups: Path = CGROUPS) -> None:
        self._clock = clock
        self._starters = _starters()
        self._executable = _plain(os.readlink("/proc/self/exe"))
        self._groups = _groups(Path("/proc/self/cgroup").read_bytes(), cgroups)
        self._found: dict[int, Own] = {}

    @property
    def manager(self) -> str:
        return "systemd" if self._groups is not None else "supervisor"

    def look(self) -> tuple[list[Own], list[Own]]:
        """Processes that run hostd, by role and pid, and strangers among them."""
        found: dict[int, Own] = {}
        pids = self._by_group() if self._groups is not None else self._by_descent()
        for role, pid in pids:
            if len(found) >= MAX_PROCESSES:
                break
            own = self._known(role, pid)
            if own is not None:
                found[pid] = own
        for pid in self._found.keys() - found.keys():
            self._found[pid].handle.close()
        self._found = found
        order = sorted(found.values(), key=lambda own: (ROLES.index(own.role), own.key))
        ours = [own for own in order if _plain(own.executable) == self._executable]
        now = self._clock()
        others = (own for own in order if _plain(own.executable) != self._executable)
        return ours, [own for own in others if now - own.since >= self._grace(own)]

    def _grace(self, own: Own) -> float:
        return START_S if _plain(own.executable) in self._starters else GRACE_S

    def _known(self, role: str, pid: int) -> Own | None:
        known = self._found.get(pid)
        handle = None
        try:
            # Else the number is another process's by now, or it executed another program.
            if known is not None and (known.role, known.handle.link("exe")) == (role, known.executable):
                return known
            handle = ProcessHandle(pid)
            uid = parse_uid(handle.read("status", MAX_STATUS_BYTES))
            own = Own(role, handle, handle.stat().start_time, handle.link("exe"), uid, self._clock())
        except (ProcessGoneError, MalformedProcError, OSError):
            if handle is not None:
                handle.close()
            return None
        if known is not None:
            known.handle.close()
            del self._found[pid]
        self._found[pid] = own
        return own

    def _by_group(self) -> Iterator[tuple[str, int]]:
        assert self._groups is not None
        for role, path in self._groups.items():
            try:
                with path.open("rb") as file:
                    data = file.read(MAX_LIST_BYTES)
            except OSError:
                # A unit that does not run has no group.
                continue
            yield from ((role, int(line)) for line in data.split())

    def _by_descent(self) -> Iterator[tuple[str, int]]:
        own = os.getpid()
        yield "measurer", own
        supervisor = os.getppid()
        if "run" not in _arguments(supervisor):
            return
        for child in _children(supervisor):
            words = _arguments(child)
            role = words[-1] if words and words[-1] in ROLES else ""
            if role and child != own:
                yield role, child
                yield from ((role, pid) for pid in _descendants(child))

    def close(self) -> None:
        for own in self._found.values():
            own.handle.close()
        self._found.clear()


def _groups(cgroup: bytes, cgroups: Path) -> dict[str, Path] | None:
    """Lists of processes of the roles' control groups; None if this process is not the unit's. With
    the older hierarchies (v1) systemd's own one is beside them, named `unified`."""
    match = _UNIT.search(cgroup)
    if match is None:
        return None
    above = os.fsdecode(match[1]).strip("/")
    for base in (cgroups, cgroups / "unified"):
        groups = {role: base / above / f"hostd-{role}.service" / "cgroup.procs" for role in ROLES}
        if groups["measurer"].exists():
            return groups
    return None


def _descendants(pid: int) -> Iterator[int]:
    generation = [pid]
    for _ in range(MAX_GENERATIONS):
        generation = [child for parent in generation for child in _children(parent)]
        yield from generation


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            return [int(word) for word in file.read(MAX_LIST_BYTES).split()]
    except OSError:
        return []


def _arguments(pid: int) -> list[str]:
    try:
        handle = ProcessHandle(pid)
    except (ProcessGoneError, OSError):
        return []
    try:
        line = handle.read("cmdline", MAX_COMMAND_LINE_BYTES)
    except (ProcessGoneError, MalformedProcError, OSError):
        return []
    finally:
        handle.close()
    return line.decode("utf-8", "backslashreplace").rstrip("\0").split("\0")


def _starters(first: Path = Path("/proc/1/exe")) -> frozenset[str]:
    """What systemd's children run before they execute a unit's command: `first`, or what is beside it."""
    try:
        manager = Path(_plain(os.readlink(first)))
    except OSError:
        return frozenset()
    return frozenset({str(manager), str(manager.with_name("systemd-executor"))})


def _plain(path: str) -> str:
    return path.removesuffix(DELETED)
