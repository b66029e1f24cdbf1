"""One hypervisor process: its code and constants, and that each page of them is the file's own.

Kept in a reading: every executable mapping, and every mapping of a file range that is not loaded
writable, whatever its protection is now (a constant that became writable must show). For each page of
those the page table must give the very frame that our own mapping of the same file has; so hashing our
mapping once speaks for all processes. A copied page differs even if its content is the same. Pages the
process has not touched are not there yet, and will come from the same page cache.

Differences that are legal pass: our own page table may lack the page (it is brought in), a page may be
in migration, the process may be ending. So a difference is read again, a bounded number of times,
before it is reported (a copied page twice only: it stays one); then with the bytes expected (the file's)
and seen (the process's).

Not covered: relocated read-only data, writable data, a patch that is taken back between two readings.

Needs CAP_SYS_ADMIN (frames), CAP_SYS_PTRACE (maps, mem). Without access to /proc/PID/mem (ptrace_scope 3)
the bytes seen are empty and everything else stands.
"""

from __future__ import annotations

import bisect
import ctypes
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.core.reading_types import WINDOW_BYTES
from hostd.core.readings import (
    EXEC,
    MAX_ALTERED,
    MAX_MAPPINGS,
    READ,
    AlteredPage,
    Hypervisor,
    Mapping,
    ProcessReading,
)
from hostd.measurer.files import Range, TooMuchError, first_difference
from hostd.platform.pages import ENTRY_BYTES, FILE, PAGE, PRESENT, SWAPPED, differing, populate, whole_pages
from hostd.platform.procfs import MAX_MAPS_BYTES, ProcessGoneError, parse_maps

if TYPE_CHECKING:
    from hostd.measurer.files import File, Registry
    from hostd.platform.pages import OwnPages
    from hostd.platform.procfs import ProcessHandle, Stat, Vma

RETRY_S: Final = (0.0, 0.0002, 0.001, 0.004, 0.016)
"""Waits before a difference is read again. The first costs nothing: mostly our own table lacked a page."""
MAX_NAME: Final = 4096
VDSO: Final = "[vdso]"


class Run(NamedTuple):
    """Pages that are contiguous in the process and in our own memory."""

    start: int
    own: int
    pages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What one content of /proc/PID/maps asks to be compared, while the registry knows no better."""

    maps: bytes
    generation: int
    mappings: tuple[Mapping, ...]
    ranges: frozenset[Range]
    runs: tuple[Run, ...]


@dataclass(slots=True)
class _Last:
    """The last good comparison: the same entries again need no new one."""

    plan: Plan
    target: bytes
    own: bytes


class ProcessProbe:
    """Reads hypervisor processes against the registry's files."""

    def __init__(self, registry: Registry, own_pages: OwnPages) -> None:
        self._registry = registry
        self._own_pages = own_pages
        self._vdso = _own_vdso()
        self._last: dict[tuple[int, int], _Last] = {}

    def forget_ended(self, alive: frozenset[tuple[int, int]]) -> None:
        for key in [key for key in self._last if key not in alive]:
            del self._last[key]

    def enroll(self, hypervisor: Hypervisor, handle: ProcessHandle) -> None:
        """Makes the registry know what the process maps.

        Raises:
            ProcessGoneError, MalformedProcError, TooMuchError: as `read`.
        """
        self._claim(hypervisor, self._plan(hypervisor, handle))

    def read(self, hypervisor: Hypervisor, handle: ProcessHandle) -> ProcessReading:
        """Reads the process.

        Raises:
            ProcessGoneError: it ended, is another process, or executed another program meanwhile.
            MalformedProcError: /proc gave what it should not.
            TooMuchError: it maps more than is measured.
        """
        before = handle.stat()
        if before.ended or before.start_time != hypervisor.start_time:
            raise ProcessGoneError("the process has ended")
        plan, altered, total = self._compare(hypervisor, handle)
        _same_program(before, handle.stat())
        return ProcessReading(hypervisor, plan.mappings, altered, total)

    # ── Mappings ──────────────────────────────────────────────────────────────────────────────────

    def _plan(self, hypervisor: Hypervisor, handle: ProcessHandle) -> Plan:
        maps = handle.read("maps", MAX_MAPS_BYTES)
        last = self._last.get((hypervisor.pid, hypervisor.start_time))
        generation = self._registry.generation
        if last is not None and last.plan.maps == maps and last.plan.generation == generation:
            return last.plan
        mappings: list[Mapping] = []
        ranges: set[Range] = set()
        runs: list[Run] = []
        vmas = parse_maps(maps)
        of_interest = {(vma.device, vma.inode) for vma in vmas if vma.inode and _may_hold_code(vma)}
        for vma in vmas:
            named = (vma.device, vma.inode) in of_interest
            if vma.inode and not named:
                continue
            file = self._registry.resolve(handle, vma) if named else None
            if not _kept(vma, file):
                continue
            if len(mappings) == MAX_MAPPINGS:
                raise TooMuchError(f"over {MAX_MAPPINGS} mappings of code and constants")
            number = None if file is None else file.number
            mappings.append(
                Mapping(vma.start, vma.end, vma.protection, number, vma.offset, vma.name[:MAX_NAME])
            )
            self._add(runs, ranges, vma, file)
        if not mappings:
            raise ProcessGoneError("the process has no mappings (any more)")
        return Plan(maps, generation, tuple(mappings), frozenset(ranges), tuple(runs))

    def _add(self, runs: list[Run], ranges: set[Range], vma: Vma, file: File | None) -> None:
        if file is None:
            if vma.name == VDSO:
                address, size = self._vdso
                own = address if size == vma.end - vma.start else 0
                runs.append(Run(vma.start, own, (vma.end - vma.start) // PAGE))
            return
        length = min(vma.end - vma.start, whole_pages(file.size) - vma.offset)
        if file.own is None or length <= 0:
            return
        ranges.add(Range(file.number, vma.offset, length))
        run = Run(vma.start, file.own.address + vma.offset, length // PAGE)
        if runs:
            last = runs[-1]
            size = last.pages * PAGE
            if last.start + size == run.start and last.own + size == run.own:
                runs[-1] = Run(last.start, last.own, last.pages + run.pages)
                return
        runs.append(run)

    def _claim(self, hypervisor: Hypervisor, plan: Plan) -> None:
        self._registry.claim((hypervisor.pid, hypervisor.start_time), plan.ranges)

    # ── Pages ─────────────────────────────────────────────────────────────────────────────────────

    def _compare(
        self, hypervisor: Hypervisor, handle: ProcessHandle
    ) -> tuple[Plan, tuple[AlteredPage, ...], int]:
        key = (hypervisor.pid, hypervisor.start_time)
        odd: list[int] = []
        for wait in (None, *RETRY_S):
            if wait:
                time.sleep(wait)
            plan = self._plan(hypervisor, handle)
            self._claim(hypervisor, plan)
            if odd:
                _populate(plan, odd)
            target, own = self._entries(handle, plan)
            last = self._last.get(key)
            if last is not None and last.plan is plan and (last.target, last.own) == (target, own):
                return plan, (), 0
            odd = differing(target, own)
            if not odd:
                self._last[key] = _Last(plan, target, own)
                return plan, (), 0
            if wait is not None and all(_copied(target, index) for index in odd):
                break
        self._last.pop(key, None)
        if handle.stat().ended:
            raise ProcessGoneError("the process ended while it was read")
        return plan, self._describe(handle, plan, odd[:MAX_ALTERED], target), len(odd)

    def _entries(self, handle: ProcessHandle, plan: Plan) -> tuple[bytes, bytes]:
        fd = handle.open("pagemap")
        try:
            theirs = [
                os.pread(fd, run.pages * ENTRY_BYTES, run.start // PAGE * ENTRY_BYTES) for run in plan.runs
            ]
        except OSError as error:
            raise ProcessGoneError("its page table cannot be read") from error
        finally:
            os.close(fd)
        if sum(map(len, theirs)) != sum(run.pages for run in plan.runs) * ENTRY_BYTES:
            raise ProcessGoneError("its page table is gone")
        ours = [
            self._own_pages.entries(run.own, run.pages) if run.own else bytes(run.pages * ENTRY_BYTES)
            for run in plan.runs
        ]
        return b"".join(theirs), b"".join(ours)

    # ── What differs ──────────────────────────────────────────────────────────────────────────────

    def _describe(
        self, handle: ProcessHandle, plan: Plan, odd: list[int], target: bytes
    ) -> tuple[AlteredPage, ...]:
        try:
            memory = handle.open("mem")
        except OSError:
            memory = -1
        try:
            return tuple(self._page(plan, index, memory, target) for index in odd)
        finally:
            if memory >= 0:
                os.close(memory)

    def _page(self, plan: Plan, index: int, memory: int, target: bytes) -> AlteredPage:
        entry = int.from_bytes(target[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES], "little")
        reason = "swapped" if entry & SWAPPED else "frame" if entry & FILE else "private"
        for run in plan.runs:
            if index < run.pages:
                break
            index -= run.pages
        address = run.start + index * PAGE
        mapping = next(item for item in plan.mappings if item.start <= address < item.end)
        offset = mapping.offset + address - mapping.start
        file = None if mapping.file is None else self._registry.get(mapping.file)
        expected = self._expected(run, index, file, offset)
        seen = _read_memory(memory, address)
        if not seen:
            return AlteredPage(
                address, mapping.file, mapping.name, offset, expected[:WINDOW_BYTES], b"", reason
            )
        at, was, is_now = first_difference(expected, seen)
        return AlteredPage(address + at, mapping.file, mapping.name, offset + at, was, is_now, reason)

    def _expected(self, run: Run, index: int, file: File | None, offset: int) -> bytes:
        try:
            if file is not None:
                return os.pread(file.fd, PAGE, offset).ljust(PAGE, b"\0")
            return self._own_pages.read(run.own + index * PAGE, PAGE) if run.own else b""
        except OSError:
            return b""


def _populate(plan: Plan, odd: list[int]) -> None:
    """Brings into our own page table what differs because it may only be absent there."""
    first = 0
    for run in plan.runs:
        position = bisect.bisect_left(odd, first)
        if run.own and position < len(odd) and odd[position] < first + run.pages:
            populate(run.own, run.pages * PAGE)
        first += run.pages


def _copied(target: bytes, index: int) -> bool:
    """A page that is there and anonymous. That does not pass: a page in migration is not present."""
    entry = int.from_bytes(target[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES], "little")
    return bool(entry & PRESENT) and not entry & FILE


def _may_hold_code(vma: Vma) -> bool:
    """A file that is only ever mapped writable is data: the guest's memory, say."""
    return bool(vma.protection & EXEC) or vma.protection == READ


def _kept(vma: Vma, file: File | None) -> bool:
    if vma.protection & EXEC:
        return True
    return (
        file is not None
        and bool(vma.protection)
        and file.layout is not None
        and file.layout.constant(vma.offset, vma.end - vma.start)
    )


def _same_program(before: Stat, after: Stat) -> None:
    if after.ended or (before.start_time, before.image) != (after.start_time, after.image):
        raise ProcessGoneError("the process ended or executed another program while it was read")


def _read_memory(memory: int, address: int) -> bytes:
    try:
        return os.pread(memory, PAGE, address) if memory >= 0 else b""
    except OSError:
        return b""


def _own_vdso() -> tuple[int, int]:
    """Address and size of the vDSO in this process, its pages present; (0, 0) if there is none."""
    with open("/proc/self/maps", "rb") as lines:
        for vma in parse_maps(lines.read()):
            if vma.name == VDSO:
                ctypes.string_at(vma.start, vma.end - vma.start)
                return vma.start, vma.end - vma.start
    return 0, 0
