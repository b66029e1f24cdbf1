"""What is read of the kernel, in which parts, and how what was read is held against what it first was.

A chunk (64 kB) whose tag is the last accepted one is as it was. Any other is compared byte by byte with
its copy; each difference must lie in a patch site and be one of its legal forms, or it is altered. What is
illegal is read again, `ATTEMPTS` times, a millisecond apart: the kernel patches by way of a trap (0xCC) that
stands for microseconds (arch/x86/kernel/alternative.c `text_poke_bp_batch`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from hostd.core.patchsites import branch, differences, settle
from hostd.core.reading_kernel import MAX_SITES, KernelAltered, KernelRange, KernelSite
from hostd.core.reading_types import WINDOW_BYTES
from hostd.measurer import kernel_operations as operations
from hostd.measurer.kernel_built import CHUNK, Sites
from hostd.measurer.kernel_explain import MAX_COUNTED, altered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hostd.core.patchsites import Site
    from hostd.measurer.kernel_built import BuiltArea, BuiltImage
    from hostd.measurer.tags import Tagger
    from hostd.platform.kallsyms import Symbols

PART_BYTES: Final = 20 * CHUNK
"""About a millisecond of reading."""
ATTEMPTS: Final = 10
RETRY_S: Final = 0.001
TABLE: Final = "table "


class SymbolBook:
    """The symbols at hand. They are read anew, at most every `PERIOD_S`, when one is missing: functions
    come and go with tracers and filters."""

    PERIOD_S: Final = 5.0

    def __init__(self, symbols: Symbols, read: Callable[[], Symbols]) -> None:
        self.symbols = symbols
        self._read = read
        self._next = 0.0

    def renew(self) -> bool:
        """Reads them; False if they were read just now."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.PERIOD_S
        self.symbols = self._read()
        return True


@dataclass(slots=True)
class Planned:
    """One image of the plan."""

    number: int
    built: BuiltImage
    sites: Sites


@dataclass(slots=True)
class Chunk:
    """Up to `CHUNK` bytes. `raw` is the tag of what was last read and judged, empty before that;
    `settled` that of the same bytes with its legal changes taken back."""

    image: Planned
    area: BuiltArea
    number: int
    raw: bytes = b""
    settled: bytes = b""
    sites: tuple[KernelSite, ...] = ()
    sites_total: int = 0
    altered: tuple[KernelAltered, ...] = ()
    altered_total: int = 0

    @property
    def address(self) -> int:
        return self.area.address + self.number * CHUNK

    @property
    def length(self) -> int:
        return min(CHUNK, self.area.length - self.number * CHUNK)


@dataclass(slots=True)
class Span:
    """Consecutive chunks of one area, read at once."""

    chunks: list[Chunk] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(slots=True)
class Plan:
    """All parts of a complete reading."""

    number: int
    images: list[Planned]
    parts: list[list[Span]]


def make_plan(number: int, images: list[Planned]) -> Plan:
    """Cuts all areas of all images into parts of at most `PART_BYTES`."""
    parts: list[list[Span]] = [[]]
    room = PART_BYTES
    for image in images:
        for area in image.built.areas:
            span = Span()
            for index in range(len(area.chunks)):
                chunk = Chunk(image, area, index)
                if chunk.length > room:
                    if span.chunks:
                        parts[-1].append(span)
                        span = Span()
                    parts.append([])
                    room = PART_BYTES
                span.chunks.append(chunk)
                room -= chunk.length
            if span.chunks:
                parts[-1].append(span)
    return Plan(number, images, parts)


def carry_over(old: Plan, new: Plan) -> None:
    """Keeps what was judged of images that are in both."""
    known = {
        (chunk.image.number, chunk.address): chunk
        for part in old.parts
        for span in part
        for chunk in span.chunks
    }
    for part in new.parts:
        for span in part:
            for at, chunk in enumerate(span.chunks):
                span.chunks[at] = known.get((chunk.image.number, chunk.address), chunk)


class Comparer:
    """Holds what is read against what it was.

    `read_into(address, buffer)` reads kernel memory.
    """

    def __init__(
        self, tagger: Tagger, read_into: Callable[[int, memoryview], None], book: SymbolBook
    ) -> None:
        self._tagger = tagger
        self._read_into = read_into
        self.book = book
        self._buffer = memoryview(bytearray(PART_BYTES))

    def look(self, span: Span) -> KernelRange:
        """Reads a span; its chunks say afterwards what changed.

        Raises:
            KcoreError: it cannot be read.
        """
        first = span.chunks[0]
        view = self._buffer[: span.length]
        self._read(first, view)
        at = 0
        for chunk in span.chunks:
            data = view[at : at + chunk.length]
            at += chunk.length
            if self._tagger.tag(data) != chunk.raw:
                self._compare(chunk, data)
        tags = [chunk.settled for chunk in span.chunks]
        tag = tags[0] if len(tags) == 1 else self._tagger.tag(b"".join(tags))
        offset = first.number * CHUNK
        return KernelRange(first.image.number, first.area.name, offset, span.length, tag)

    def _read(self, chunk: Chunk, view: memoryview) -> None:
        self._read_into(chunk.address, view)
        for offset, length in chunk.area.ignored:
            view[offset : offset + length] = bytes(length)

    def _compare(self, chunk: Chunk, data: memoryview) -> None:
        copy = chunk.area.chunk(chunk.number)
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(RETRY_S)
                self._read(chunk, data)
            work = bytearray(data)
            self._judge(chunk, copy, bytes(data), work)
            if not chunk.altered_total:
                break
            if attempt == ATTEMPTS // 2:
                self.book.renew()
        chunk.raw = self._tagger.tag(data)
        chunk.settled = self._tagger.tag(work)

    def _judge(self, chunk: Chunk, copy: bytes, seen: bytes, work: bytearray) -> None:
        """Sets what the chunk says, and takes legal changes back in `work`."""
        sites: list[KernelSite] = []
        found: list[KernelAltered] = []
        total, free_from, changed = 0, 0, 0
        for at in differences(copy, seen, limit=CHUNK):
            if at < free_from:
                continue
            if total >= MAX_COUNTED:
                break
            site = chunk.image.sites.holding(chunk.address + at)
            if site is not None:
                now = self._site_bytes(chunk, site, seen)
                if settle(site, now, self.book.symbols):
                    start = max(0, site.address - chunk.address)
                    free_from = site.address + len(now) - chunk.address
                    work[start:free_from] = copy[start:free_from]
                    changed += 1
                    if len(sites) < MAX_SITES:
                        sites.append(self._changed(chunk, site, now))
                    continue
            free_from = at + WINDOW_BYTES
            total += 1
            if len(found) < 16:
                found.append(self._altered(chunk, at, copy, seen, site))
        chunk.sites, chunk.sites_total = tuple(sites), changed
        chunk.altered, chunk.altered_total = tuple(found), total

    def _site_bytes(self, chunk: Chunk, site: Site, seen: bytes) -> bytes:
        """A site's bytes; one that a chunk's end cuts in two is read for itself."""
        at = site.address - chunk.address
        if at >= 0 and at + len(site.compiled) <= len(seen):
            return seen[at : at + len(site.compiled)]
        buffer = bytearray(len(site.compiled))
        self._read_into(site.address, memoryview(buffer))
        return bytes(buffer)

    def _changed(self, chunk: Chunk, site: Site, now: bytes) -> KernelSite:
        symbols = self.book.symbols
        if len(now) == 6:
            target: int | None = site.address + 6 + int.from_bytes(now[2:], "little", signed=True)
        else:
            target = branch(now, site.address)
        callee = "" if target is None else symbols.function(target & (1 << 64) - 1)
        return KernelSite(
            image=chunk.image.number,
            kind=site.kind.value,
            symbol=symbols.near(site.address)[:256],
            address=site.address,
            compiled=site.compiled,
            seen=now,
            target=site.target,
            callee=callee[:256],
        )

    def _altered(self, chunk: Chunk, at: int, copy: bytes, seen: bytes, site: Site | None) -> KernelAltered:
        symbols, name = self.book.symbols, chunk.area.name
        if name.startswith(TABLE):
            start = at // 8 * 8
            was = operations.slots(copy[start : start + 8], symbols, lambda _: True)
            now = operations.slots(seen[start : start + 8], symbols, lambda _: True)
            if was and now:
                item = operations.altered_slot(
                    name.removeprefix(TABLE),
                    now[0]._replace(offset=start),
                    was[0].leads,
                    chunk.address,
                    copy,
                    seen,
                )
                return replace(item, image=chunk.image.number)
        item = altered(name, chunk.address, at, copy, seen, symbols, site)
        return replace(item, image=chunk.image.number)


def numbered(items: Iterable[KernelAltered], number: int) -> list[KernelAltered]:
    """What the builder found, under its image's number."""
    return [replace(item, image=number) for item in items]
