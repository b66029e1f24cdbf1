"""One hypervisor process: its code and constants, and that each page of them is the file's own.

Kept in a reading: every executable mapping, and every mapping of a file range that is not loaded
writable, whatever its protection is now (a constant that became writable must show). For each page of
those the page table must give the very frame that our own mapping of the same file has; so hashing our
mapping once speaks for all processes. A copied page differs even if its content is the same. Pages the
process has not touched are not there yet, and will come from the same page cache.

Differences that are legal pass: our own page table may lack the page (it is brought in), a page may be
in migration, the process may be ending. So a difference is read again, a bounded number of times, and
only a page that differs every time is reported (a copied page after two times: it stays one); with the
bytes expected (the file's) and seen (the process's).

Every reading reads all mappings, and meanwhile, in a second thread, the page table of all that is kept:
0.35 ms. What follows from them is worked out again only if one of the two is not, by keyed tag over all
its bytes, what it was when it was last found good.

Not covered: relocated data (`hostd.measurer.relro`), writable data, a patch that is taken back.
Needs CAP_SYS_ADMIN (frames), CAP_SYS_PTRACE (maps, mem). Without access to /proc/PID/mem (ptrace_scope 3)
the bytes seen are empty and everything else stands.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

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
from hostd.measurer.copies import first_difference
from hostd.measurer.files import MAX_NAMED, Range, TooMuchError
from hostd.measurer.frames import OwnFrames, Shape, shape_of
from hostd.measurer.pagetable import PageTable, entries_of
from hostd.platform.pages import (
    ENTRY_BYTES,
    FILE,
    PAGE,
    PRESENT,
    SWAPPED,
    Run,
    Spans,
    differing,
    populate,
    whole_pages,
)
from hostd.platform.procfs import ProcessGoneError, parse_maps
from hostd.platform.vmas import MapsReader

if TYPE_CHECKING:
    from hostd.measurer.files import File, Registry
    from hostd.measurer.lane import Lane
    from hostd.measurer.tags import Tagger
    from hostd.platform.pages import OwnPages
    from hostd.platform.procfs import ProcessHandle, Stat, Vma

RETRY_S: Final = (0.0, 0.0002, 0.001, 0.004, 0.016)
"""Waits before a difference is read again. The first costs nothing: mostly our own table lacked a page."""
NAMES_S: Final = 120.0
"""How long names of mapped files are believed: a rename changes nothing else that is read (1.5 ms)."""
MAX_SHARED: Final = 256
MAX_NAME: Final = 4096
VDSO: Final = "[vdso]"
OWN: Final = "hostd"  # `Hypervisor.source` of hostd's own processes


@dataclass(frozen=True, slots=True)
class Plan:
    """What one state of a process's mappings asks to be compared, while the registry knows no better."""

    state: bytes
    """Tag of `MapsReader.state`."""
    generation: int
    executable: str
    named: float
    """When the names were read."""
    mappings: tuple[Mapping, ...]
    ranges: frozenset[Range]
    runs: tuple[Run, ...]
    """Sorted by our own address."""
    shape: Shape
    spans: Spans


@dataclass(slots=True)
class _Last:
    """What is kept of a process: the latest plan, and the tag of the page table last found good under it,
    with the version of our own frames that it was compared with."""

    plan: Plan
    good: tuple[bytes, int] | None = None


class ProcessProbe:
    """Reads hypervisor processes against the registry's files."""

    def __init__(
        self,
        registry: Registry,
        tagger: Tagger,
        own_pages: OwnPages,
        lane: Lane,
        *,
        maps: MapsReader | None = None,
    ) -> None:
        self._registry = registry
        self._tagger = tagger
        self._own_pages = own_pages
        self._lane = lane
        self._maps = maps or MapsReader()
        self._frames = OwnFrames(own_pages, time.monotonic)
        self._vdso = _own_vdso()
        self._last: dict[tuple[int, int], _Last] = {}
        self._ranges: dict[frozenset[Range], frozenset[Range]] = {}
        self._shapes: dict[Shape, Shape] = {}

    def forget_ended(self, alive: frozenset[tuple[int, int]]) -> None:
        for key in self._last.keys() - alive:
            del self._last[key]
        if len(self._ranges) > MAX_SHARED or len(self._shapes) > MAX_SHARED:
            self._ranges.clear()
            self._shapes.clear()

    def enroll(self, hypervisor: Hypervisor, handle: ProcessHandle) -> None:
        """Makes the registry know what the process maps.

        Raises:
            ProcessGoneError, MalformedProcError, TooMuchError: as `read`.
        """
        self._keep(hypervisor, self._plan(hypervisor, handle))

    def read(self, hypervisor: Hypervisor, handle: ProcessHandle, since: int | None = None) -> ProcessReading:
        """Reads the process, with mappings as they were at `since` (`monotonic_ns`) or later; None: now.

        Raises:
            ProcessGoneError: it ended, is another process, or executed another program meanwhile.
            MalformedProcError: /proc gave what it should not.
            TooMuchError: it maps more than is measured.
        """
        before = handle.stat()
        if before.ended or before.start_time != hypervisor.start_time:
            raise ProcessGoneError("the process has ended")
        plan, altered, total = self._compare(hypervisor, handle, since)
        _same_program(before, handle.stat())
        return ProcessReading(hypervisor, plan.mappings, altered, total)

    # ── Mappings ──────────────────────────────────────────────────────────────────────────────────

    def _look(self, hypervisor: Hypervisor, handle: ProcessHandle, since: int | None) -> tuple[_Last, bytes]:
        """The plan as the mappings are now, and the page table's entries for it."""
        last = self._last.get((hypervisor.pid, hypervisor.start_time))
        if last is not None:
            with PageTable(handle, last.plan.spans) as table:
                self._lane.start(table.read)
                try:
                    state = self._tagger.tag(self._maps.state(handle, since))
                    table.read()
                except BaseException:
                    with contextlib.suppress(Exception):
                        self._lane.result()
                    raise
                self._lane.result()
                target = table.entries()
            if self._holds(last.plan, hypervisor, state):
                if not self._registry.claimed((hypervisor.pid, hypervisor.start_time)):
                    self._keep(hypervisor, last.plan)
                return last, target
        plan = self._plan(hypervisor, handle)
        return self._keep(hypervisor, plan), entries_of(handle, plan.spans)

    def _holds(self, plan: Plan, hypervisor: Hypervisor, state: bytes) -> bool:
        return (
            plan.state == state
            and plan.generation == self._registry.generation
            and plan.executable == hypervisor.executable
            and time.monotonic() - plan.named < NAMES_S
        )

    def _keep(self, hypervisor: Hypervisor, plan: Plan) -> _Last:
        key = (hypervisor.pid, hypervisor.start_time)
        self._registry.claim(key, plan.ranges, own=hypervisor.source == OWN)
        last = self._last.get(key)
        if last is None or last.plan is not plan:
            last = self._last[key] = _Last(plan)
        return last

    def _plan(self, hypervisor: Hypervisor, handle: ProcessHandle) -> Plan:
        generation = self._registry.generation
        mapped = self._maps.read(handle)
        mappings: list[Mapping] = []
        ranges: set[Range] = set()
        runs: list[Run] = []
        of_interest = {(vma.device, vma.inode) for vma in mapped.vmas if vma.inode and _may_hold_code(vma)}
        own = handle.pid == os.getpid()
        for vma in mapped.vmas:
            named = (vma.device, vma.inode) in of_interest
            if vma.inode and not named:
                continue
            file = self._registry.resolve(handle, vma) if named else None
            if not _kept(vma, file) or (own and _is_ours(vma, file)):
                continue
            if len(mappings) == MAX_MAPPINGS:
                raise TooMuchError(f"over {MAX_MAPPINGS} mappings of code and constants")
            number = None if file is None else file.number
            name = vma.name if file is None else file.path
            mappings.append(Mapping(vma.start, vma.end, vma.protection, number, vma.offset, name[:MAX_NAME]))
            self._add(runs, ranges, vma, file)
        if not mappings:
            raise ProcessGoneError("the process has no mappings (any more)")
        # A hundred machines that run the same files share these.
        runs.sort(key=lambda run: run.own)
        kept, shape = frozenset(ranges), shape_of(runs)
        return Plan(
            self._tagger.tag(mapped.state),
            generation,
            hypervisor.executable,
            time.monotonic(),
            tuple(mappings),
            self._ranges.setdefault(kept, kept),
            tuple(runs),
            self._shapes.setdefault(shape, shape),
            Spans.over(runs),
        )

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

    # ── Pages ─────────────────────────────────────────────────────────────────────────────────────

    def _compare(
        self, hypervisor: Hypervisor, handle: ProcessHandle, since: int | None
    ) -> tuple[Plan, tuple[AlteredPage, ...], int]:
        odd: list[int] = []
        plan: Plan | None = None
        for wait in (None, *RETRY_S):
            if wait:
                time.sleep(wait)
            last, target = self._look(hypervisor, handle, since if wait is None else None)
            if last.plan is not plan:
                plan, odd = last.plan, []
            if odd:
                _populate(plan, odd)
            frames = self._frames.of(plan.shape, anew=bool(odd))
            seen = self._tagger.tag(target), frames.version
            now = [] if last.good == seen else differing(target, frames.entries)
            if not now:
                last.good = seen
                return plan, (), 0
            # While the kernel compacts memory some pages are in migration at any moment, and others at the
            # next. A page that was the file's own at one look has been found good by this reading.
            odd = sorted(set(odd).intersection(now)) if odd else now
            if not odd:
                return plan, (), 0
            if wait is not None and all(_copied(target, index) for index in odd):
                break
        last.good = None
        if handle.stat().ended:
            raise ProcessGoneError("the process ended while it was read")
        return last.plan, self._describe(handle, last.plan, odd[:MAX_ALTERED], target), len(odd)

    # ── What differs ──────────────────────────────────────────────────────────────────────────────

    def _describe(
        self, handle: ProcessHandle, plan: Plan, odd: list[int], target: bytes
    ) -> tuple[AlteredPage, ...]:
        try:
            memory = handle.open("mem")
        except OSError:
            memory = -1
        try:
            return tuple(
                self._page(plan, index, memory, target, named=count < MAX_NAMED)
                for count, index in enumerate(odd)
            )
        finally:
            if memory >= 0:
                os.close(memory)

    def _page(self, plan: Plan, index: int, memory: int, target: bytes, *, named: bool) -> AlteredPage:
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
        at, was, is_now = first_difference(expected, seen) if seen else (0, expected[:WINDOW_BYTES], b"")
        symbol = file.place(offset + at) if file is not None and named else ""
        return AlteredPage(address + at, mapping.file, mapping.name, offset + at, was, is_now, reason, symbol)

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


def _is_ours(vma: Vma, file: File | None) -> bool:
    """In the measurer itself: the registry's own mapping of a file, which nobody executes."""
    return file is not None and file.own is not None and vma.start == file.own.address


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
