"""Reads the relocated data of a hypervisor process: GOT, vtables, `.data.rel.ro`, lazily bound slots.

When a process is first seen, and when its files or their addresses change, everything is recomputed from
the ELF files and compared word by word. After that the same bytes are read at every reading and only their
keyed tag is compared; if it is another, all is recomputed. Nothing of the content is kept for a process but
tags and the words that only the process knows (`relro_compare`).

Parsing is cut into steps, so that other readings go on: until it is done a reading is `Missing`. So is one
of a process that the dynamic linker is still working on, which shows in what should be protected being
writable. If that is so later, it is a fact to report.

Whether the files are approved is said by component `process`; this reading has the digests of the bytes it
was computed from. Not covered: writable data, and files that are not linked dynamically.

Needs CAP_SYS_PTRACE (memory), and what `files` needs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from hostd.core.reading_relro import (
    MAX_ALTERED_SLOTS,
    MAX_RELRO_FILES,
    MAX_UNCOVERED,
    RelroFile,
    RelroReading,
)
from hostd.core.readings import Missing
from hostd.measurer.elf_relocations import WORD
from hostd.measurer.files import TooMuchError
from hostd.measurer.relro_compare import Comparison, Outcome, Pins
from hostd.measurer.relro_modules import Modules, Shape
from hostd.measurer.relro_names import Names
from hostd.platform.memory import MemoryReader, MemoryRefusedError, Places
from hostd.platform.procfs import ProcessGoneError
from hostd.platform.vmas import MapsReader

if TYPE_CHECKING:
    from hostd.core.readings import Hypervisor
    from hostd.measurer.files import Registry
    from hostd.measurer.lane import Lane
    from hostd.measurer.linking import Linking
    from hostd.measurer.tags import Tagger
    from hostd.platform.memory import Piece
    from hostd.platform.procfs import ProcessHandle, Vma

STEP_S: Final = 0.02
"""Spent in one reading on parsing and linking, and then what one file takes: up to 40 ms for QEMU's. A
hundredth of a reading's deadline as it is by default."""
RETRY_S: Final = (0.0, 0.0005, 0.002, 0.008, 0.03)
"""Waits before memory that differs is read again."""
Image = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to read, for one shape."""

    shape: Shape
    places: Places
    regions: tuple[int, ...]
    """Bytes of each module's region, which come first."""
    loose: tuple[int, ...]
    """Loose words of each module, which follow."""
    incomplete: tuple[str, ...]
    """What linking lacks."""


@dataclass(slots=True)
class _State:
    """What is kept of a process."""

    image: Image
    pins: Pins = field(default_factory=Pins)
    plan: Plan | None = None
    maps: bytes = b""
    """Tag of the mappings that the plan was made for."""
    good: bytes = b""
    """Tag of the memory that was last found good, and the reading that said so."""
    reading: RelroReading | None = None


class NotYetError(Exception):
    """More has to be done before there is a reading."""


class RelroProbe:
    """Reads the relocated data of hypervisor processes."""

    def __init__(
        self,
        registry: Registry,
        tagger: Tagger,
        lane: Lane,
        *,
        maps: MapsReader | None = None,
        memory: MemoryReader | None = None,
        step_s: float = STEP_S,
    ) -> None:
        self._tagger = tagger
        self._lane = lane
        self._modules = Modules(registry)
        self._names = Names(registry)
        self._maps = maps or MapsReader()
        self._memory = memory or MemoryReader()
        self._step_s = step_s
        self._states: dict[tuple[int, int], _State] = {}

    def forget_ended(self, alive: frozenset[tuple[int, int]]) -> None:
        for key in self._states.keys() - alive:
            del self._states[key]
        self._modules.drop_idle()

    def read(
        self, hypervisor: Hypervisor, handle: ProcessHandle, since: int | None = None
    ) -> RelroReading | Missing:
        """One reading; Missing, not absent, while it cannot be said yet. Rests on mappings as they were at
        `since` (`time.monotonic_ns`) or later; None: as they are now.

        Raises:
            ProcessGoneError: it ended, or executed another program meanwhile.
            MalformedProcError: /proc gave what it should not.
            TooMuchError: it maps more than is measured.
        """
        before = handle.stat()
        if before.ended or before.start_time != hypervisor.start_time:
            raise ProcessGoneError("the process has ended")
        key = (hypervisor.pid, hypervisor.start_time)
        state = self._states.get(key)
        if state is None or state.image != before.image:
            state = self._states[key] = _State(before.image)
        try:
            reading = self._read(state, hypervisor, handle, since)
        except NotYetError as reason:
            return Missing(str(reason)[:512], absent=False)
        except MemoryRefusedError as error:
            return Missing(str(error)[:512], absent=True)
        after = handle.stat()
        if after.ended or (after.start_time, after.image) != (before.start_time, before.image):
            raise ProcessGoneError("the process ended or executed another program while it was read")
        return reading

    def _read(
        self, state: _State, hypervisor: Hypervisor, handle: ProcessHandle, since: int | None
    ) -> RelroReading:
        until = time.monotonic() + self._step_s
        for wait in RETRY_S:
            if wait:
                time.sleep(wait)
            mapped = self._maps.read(handle) if state.plan is None else None
            maps = self._tagger.tag(self._maps.state(handle, since) if mapped is None else mapped.state)
            # What is read again is read anew.
            since = None
            if state.plan is None or maps != state.maps:
                mapped = mapped or self._maps.read(handle)
                self._replan(state, hypervisor, handle, mapped.vmas, until)
                state.maps = self._tagger.tag(mapped.state)
            assert state.plan is not None
            places, last = state.plan.places, state.reading
            if last is not None and self._read_memory(handle, places) == state.good:
                return last if last.hypervisor == hypervisor else _renamed(last, hypervisor)
            # What is compared is kept, and is what the tag then stands for.
            data = self._memory.read(handle, places)
            tag = self._tag_of(data, places)
            # What has changed is named at once: this is no time for steps.
            linking = self._linked(handle, state.plan.shape, hypervisor, self._vmas(handle, mapped), 0.0)
            if linking is None:
                raise NotYetError("the mappings changed while they were read")
            reading, settled = self._compare(state, hypervisor, linking, data, tag)
            if settled and not reading.altered_total:
                state.good, state.reading = tag, reading
                return reading
        if not settled and state.reading is None:
            raise NotYetError("the dynamic linker has not protected everything yet")
        return reading

    def _read_memory(self, handle: ProcessHandle, places: Places) -> bytes:
        """Reads the memory; its tag, as `_tag_of` gives it. Both threads take the next piece until there is
        none."""
        left = list(enumerate(places.pieces))
        self._lane.start(self._tag_pieces, handle, left, 1)
        try:
            tags = self._tag_pieces(handle, left, 0)
        finally:
            others: dict[int, bytes] = self._lane.result()
        tags |= others
        return self._tagger.tag(b"".join(tags[number] for number in range(len(places.pieces))))

    def _tag_of(self, data: memoryview, places: Places) -> bytes:
        tag = self._tagger.tag
        return tag(b"".join(tag(data[piece.at : piece.at + piece.size]) for piece in places.pieces))

    def _tag_pieces(
        self, handle: ProcessHandle, left: list[tuple[int, Piece]], window: int
    ) -> dict[int, bytes]:
        tags: dict[int, bytes] = {}
        while True:
            try:
                number, piece = left.pop()
            except IndexError:
                return tags
            tags[number] = self._tagger.tag(self._memory.read_piece(handle, piece, window))

    def _vmas(self, handle: ProcessHandle, mapped: object) -> tuple[Vma, ...]:
        vmas: tuple[Vma, ...] = mapped.vmas if mapped is not None else self._maps.read(handle).vmas  # type: ignore[attr-defined]
        return vmas

    # ── What is mapped ────────────────────────────────────────────────────────────────────────────

    def _replan(
        self,
        state: _State,
        hypervisor: Hypervisor,
        handle: ProcessHandle,
        vmas: tuple[Vma, ...],
        until: float,
    ) -> None:
        """Makes the plan anew if the files, their addresses or their protection are others than before."""
        shape = self._shape(handle, vmas, until)
        if state.plan is not None and state.plan.shape._replace(execs=()) == shape._replace(execs=()):
            state.plan = replace(state.plan, shape=shape)
            return
        linking = self._linked(handle, shape, hypervisor, vmas, until)
        if linking is None:
            raise NotYetError("the mappings changed while they were read")
        state.plan = _plan(shape, linking)
        state.good = b""

    def _shape(self, handle: ProcessHandle, vmas: tuple[Vma, ...], until: float) -> Shape:
        for count, _ in enumerate(self._modules.steps(handle, vmas), 1):
            if until and time.monotonic() > until:
                raise NotYetError(f"its files are being recomputed: {count} in this step")
        return self._modules.shape(handle, vmas)

    def _linked(
        self,
        handle: ProcessHandle,
        shape: Shape,
        hypervisor: Hypervisor,
        vmas: tuple[Vma, ...],
        until: float,
    ) -> Linking | None:
        if until == 0.0:
            # The parsed files may have been dropped meanwhile.
            again = self._shape(handle, vmas, 0.0)
            if again._replace(execs=()) != shape._replace(execs=()):
                return None
        linking = self._modules.link(shape, hypervisor.executable)
        while linking.step():
            if until and time.monotonic() > until:
                raise NotYetError(f"{len(linking.slots)} of {len(linking.modules)} files are linked")
        return linking

    # ── Comparing ─────────────────────────────────────────────────────────────────────────────────

    def _compare(
        self, state: _State, hypervisor: Hypervisor, linking: Linking, data: memoryview, tag: bytes
    ) -> tuple[RelroReading, bool]:
        plan = state.plan
        assert plan is not None
        shape = plan.shape
        bases = [item.base for item in shape.loaded]
        regions, loose = _split(plan, data)
        comparison = Comparison(linking, bases, shape.vdso, list(shape.execs))
        writable = [n for n, item in enumerate(shape.loaded) if item.writable]
        outcome = comparison.run(regions, loose, state.pins, final=not writable)
        altered = tuple(self._names.slot(linking, shape, odd) for odd in outcome.odd[:MAX_ALTERED_SLOTS])
        total = outcome.total + len(writable)
        for number in writable[: MAX_ALTERED_SLOTS - len(altered)]:
            altered += (self._names.writable(linking, shape, number, regions[number]),)
        return (
            RelroReading(
                hypervisor=hypervisor,
                files=_files(linking, outcome),
                uncovered=tuple(text[:4096] for text in (*shape.uncovered, *plan.incomplete))[:MAX_UNCOVERED],
                tag=tag,
                altered=altered,
                altered_total=total,
                interposed=outcome.interposed,
            ),
            not writable,
        )

    def close(self) -> None:
        self._memory.close()


def _renamed(reading: RelroReading, hypervisor: Hypervisor) -> RelroReading:
    """The same facts of a process that is called something else by now."""
    return RelroReading(
        hypervisor,
        reading.files,
        reading.uncovered,
        reading.tag,
        reading.altered,
        reading.altered_total,
        reading.interposed,
    )


def _plan(shape: Shape, linking: Linking) -> Plan:
    ranges: list[tuple[int, int]] = []
    regions: list[int] = []
    loose: list[int] = []
    for item, module in zip(shape.loaded, linking.modules, strict=True):
        relocated = module.relocated
        regions.append(relocated.size)
        if relocated.size:
            ranges.append((item.base + relocated.start, relocated.size))
    for number, (item, module) in enumerate(zip(shape.loaded, linking.modules, strict=True)):
        loose.append(len(linking.loose[number]))
        end = -1
        for slot in module.relocated.loose:
            address = item.base + slot.address
            if address == end:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + WORD)
            else:
                ranges.append((address, WORD))
            end = address + WORD
    try:
        places = Places(ranges)
    except ValueError as error:
        raise TooMuchError(str(error)) from None
    incomplete = tuple(f"{name}: needed, and not there" for name in dict.fromkeys(linking.unmet))
    return Plan(shape, places, tuple(regions), tuple(loose), incomplete)


def _split(plan: Plan, data: memoryview) -> tuple[list[memoryview], list[list[int]]]:
    """The bytes read, by module: regions, and loose words."""
    at = 0
    regions: list[memoryview] = []
    for size in plan.regions:
        regions.append(data[at : at + size])
        at += size
    words = data[at:].cast("Q")
    loose: list[list[int]] = []
    first = 0
    for count in plan.loose:
        loose.append(list(words[first : first + count]))
        first += count
    return regions, loose


def _files(linking: Linking, outcome: Outcome) -> tuple[RelroFile, ...]:
    """The files, each once."""
    found: dict[int, RelroFile] = {}
    for module, words, pinned in zip(linking.modules, outcome.words, outcome.pinned, strict=True):
        before = found.get(module.number)
        found[module.number] = RelroFile(
            module.number,
            module.path,
            module.sha256,
            words + (before.words if before else 0),
            pinned + (before.pinned if before else 0),
        )
    return tuple(found.values())[:MAX_RELRO_FILES]
