"""What an image of kernel code should look like in memory: areas, and the sites that patch them (pure).

`vmlinux_image` makes it of an unpacked kernel with the running kernel's symbols; `kernel_module` of a
module file. Bytes are relocated to where the running kernel is, and otherwise as they were compiled.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

from hostd.core.patchsites import Site, SiteKind
from hostd.measurer import kernel_tables as tables
from hostd.measurer.kernel_elf import ALLOC, NOBITS, MalformedElfError, parse_elf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from hostd.measurer.kernel_elf import Elf

T = TypeVar("T")
LINKED_TEXT: Final = 0xFFFFFFFF81000000
"""Where `_text` is linked to be (__START_KERNEL); the running kernel is somewhere above."""
_LENGTH: Final = {0xEB: 2, 0x66: 2, 0xE9: 5, 0x0F: 5}
"""Of a jump label, by its first byte as compiled."""
_SKIPPED: Final = frozenset({".BTF", ".BTF_ids"})
"""Type descriptions: 4 MB that nothing jumps through."""


@dataclass(frozen=True, slots=True)
class Area:
    """A range of read-only memory. `golden` None: no file says what it holds."""

    name: str
    address: int
    length: int
    golden: bytearray | None


@dataclass(slots=True)
class Image:
    """Areas and sites, sites in the order in which the kernel patches them."""

    name: str
    areas: list[Area]
    sites: list[Site] = field(default_factory=list)

    def bytes_at(self, address: int, size: int) -> bytes:
        """Golden bytes, empty where no area has them all."""
        for area in self.areas:
            at = address - area.address
            if area.golden is not None and at >= 0 and at + size <= area.length:
                return bytes(area.golden[at : at + size])
        return b""


class SiteTables:
    """Collects sites of one image. `table(name)` gives (address, bytes) of a table, or None."""

    def __init__(
        self,
        image: Image,
        table: Callable[[str], tuple[int, bytes] | None],
        replacement: Callable[[int, int], bytes],
    ) -> None:
        self._image = image
        self._table = table
        self._replacement = replacement

    def collect(self, trampolines: Iterable[int], ftrace_calls: Iterable[int]) -> None:
        """Appends all sites, those first that are patched first (6.1's alternative_instructions())."""
        add = self._add
        for address, length in self._read("paravirt", lambda _, data: tables.paravirt(data)):
            add(SiteKind.PARAVIRT, address, length)
        for address in self._read("retpolines", lambda at, data: tables.offsets(data, at, "retpolines")):
            self._add_branch(SiteKind.RETPOLINE, address)
        for address in self._read("returns", lambda at, data: tables.offsets(data, at, "returns")):
            add(SiteKind.RETURN, address, 5)
        self._alternatives()
        for address in self._read("locks", lambda at, data: tables.offsets(data, at, "locks")):
            add(SiteKind.LOCK, address, 1)
        for address in self._read("ftrace", lambda _, data: tables.addresses(data)):
            add(SiteKind.FTRACE, address, 5)
        for address in ftrace_calls:
            add(SiteKind.FTRACE_CALL, address, 5)
        for address, target in self._read("jumps", lambda at, data: tables.jumps(data, at)):
            first = self._image.bytes_at(address, 1)
            if first:
                add(SiteKind.JUMP, address, _LENGTH.get(first[0], 5), target)
        for address in self._read("calls", lambda at, data: tables.calls(data, at)):
            self._add_branch(SiteKind.CALL, address)
        for address in trampolines:
            add(SiteKind.TRAMPOLINE, address, 8)

    def _read(self, name: str, reader: Callable[[int, bytes], Iterable[T]]) -> Iterable[T]:
        found = self._table(name)
        return () if found is None else reader(*found)

    def _add(self, kind: SiteKind, address: int, length: int, target: int = 0) -> None:
        compiled = self._image.bytes_at(address, length)
        if compiled:
            self._image.sites.append(Site(kind, address, compiled, target))

    def _add_branch(self, kind: SiteKind, address: int) -> None:
        """A call or jump: six bytes with a condition or a prefix, else five."""
        first = self._image.bytes_at(address, 1)
        if first:
            self._add(kind, address, 6 if first[0] in (0x0F, 0x2E) and len(first) else 5)

    def _alternatives(self) -> None:
        found = self._table("alternatives")
        if found is None:
            return
        place, data = found
        variants: dict[tuple[int, int], list[tuple[int, bytes]]] = {}
        for item in tables.alternatives(data, place, lambda at, size: bool(self._replacement(at, size))):
            code = self._replacement(item.replacement, item.new_length) if item.new_length else b""
            variants.setdefault((item.address, item.length), []).append((item.replacement, code))
        for (address, length), codes in variants.items():
            compiled = self._image.bytes_at(address, length)
            if compiled:
                self._image.sites.append(Site(SiteKind.ALTERNATIVE, address, compiled, variants=tuple(codes)))


def parse_relocations(data: bytes) -> tuple[array[int], array[int], array[int]]:
    """The kernel's relocations as (64-bit, inverse 32-bit, 32-bit) lists of linked addresses.

    `data` is what stands behind the ELF file: lists of 32-bit numbers, each list behind a 0
    (arch/x86/boot/compressed/misc.c `handle_relocations`); since 6.15 there is no inverse list.

    Raises:
        MalformedElfError: not lists of that form.
    """
    if len(data) % 4:
        data = data[: len(data) // 4 * 4]
    words = array("I", data)
    if not len(words) or words[0] != 0:
        raise MalformedElfError("relocations do not begin with 0")
    starts = [at for at, word in enumerate(words) if word == 0]
    if len(starts) not in (2, 3):
        raise MalformedElfError(f"{len(starts)} lists of relocations")
    ends = [*starts[1:], len(words)]
    lists = [words[start + 1 : end] for start, end in zip(starts, ends, strict=True)]
    if len(lists) == 2:
        lists.insert(1, array("I"))
    return lists[0], lists[1], lists[2]


def vmlinux_image(
    unpacked: bytes, symbols: Mapping[str, int], trampolines: Iterable[int], ftrace_calls: Iterable[int]
) -> Image:
    """The kernel's image. `symbols` are the running kernel's own, by name.

    Raises:
        MalformedElfError: the image, or a symbol that is needed, is not there.
        MalformedTableError: a table of sites is not of its form.
    """
    elf = parse_elf(unpacked)
    text = elf.named(".text")
    if text is None or "_text" not in symbols:
        raise MalformedElfError("no text")
    slide = symbols["_text"] - text.address
    image = Image("vmlinux", _areas(elf, symbols, slide))
    _relocate(image, unpacked[elf.end :], slide)

    def table(name: str) -> tuple[int, bytes] | None:
        section_name, start, stop = _TABLES[name]
        section = elf.named(section_name) if section_name else None
        if section is not None:
            found = section.address, elf.content(section)
        elif start in symbols and stop in symbols:
            address = symbols[start] - slide
            found = address, elf.at(address, max(0, symbols[stop] - symbols[start]))
        else:
            return None
        if name in ("ftrace", "paravirt"):
            found = found[0], _slid(found[1], slide, 8 if name == "ftrace" else 16)
        return found[0] + slide, found[1]

    def replacement(address: int, size: int) -> bytes:
        try:
            return elf.at(address - slide, size)
        except MalformedElfError:
            return b""

    SiteTables(image, table, replacement).collect(trampolines, ftrace_calls)
    return image


_TABLES: Final = {
    "paravirt": (".parainstructions", "__parainstructions", "__parainstructions_end"),
    "retpolines": (".retpoline_sites", "__retpoline_sites", "__retpoline_sites_end"),
    "returns": (".return_sites", "__return_sites", "__return_sites_end"),
    "alternatives": (".altinstructions", "__alt_instructions", "__alt_instructions_end"),
    "locks": ("", "__smp_locks", "__smp_locks_end"),
    "ftrace": ("", "__start_mcount_loc", "__stop_mcount_loc"),
    "jumps": ("", "__start___jump_table", "__stop___jump_table"),
    "calls": ("", "__start_static_call_sites", "__stop_static_call_sites"),
}
"""Table → section of the image if it has one of its own, and the symbols around it otherwise."""


def _slid(data: bytes, slide: int, stride: int) -> bytes:
    """Addresses at every `stride` bytes, moved to where the kernel runs."""
    moved = bytearray(data)
    for at in range(0, len(data) - 7, stride):
        address = int.from_bytes(data[at : at + 8], "little") + slide
        moved[at : at + 8] = (address & (1 << 64) - 1).to_bytes(8, "little")
    return bytes(moved)


def _areas(elf: Elf, symbols: Mapping[str, int], slide: int) -> list[Area]:
    """Text, and everything read-only before the writable data, split where boot writes once."""
    try:
        once = symbols["__start_ro_after_init"] - slide, symbols["__end_ro_after_init"] - slide
    except KeyError as error:
        raise MalformedElfError(f"no symbol {error.args[0]}") from None
    data = elf.named(".data")
    areas: list[Area] = []
    for section in elf.sections:
        if not section.flags & ALLOC or section.kind == NOBITS or section.name in _SKIPPED:
            continue
        if section.address < LINKED_TEXT or (data is not None and section.address >= data.address):
            continue
        low, high = section.address, section.address + section.size
        content = elf.content(section)
        if low <= once[0] and once[1] <= high:
            areas.append(_area(section.name, low, content[: once[0] - low], slide))
            areas.append(Area("ro_after_init", once[0] + slide, once[1] - once[0], None))
            low, content = once[1], content[once[1] - low :]
        if content:
            # Names are unique: readings and their judge know an area by its name.
            name = section.name if low == section.address else f"{section.name} after boot's"
            areas.append(_area(name, low, content, slide))
    return areas


def _area(name: str, address: int, content: bytes, slide: int) -> Area:
    return Area(name, address + slide, len(content), bytearray(content))


def _relocate(image: Image, table: bytes, slide: int) -> None:
    if not slide:
        return
    wide, inverse, narrow = parse_relocations(table)
    _move(image, wide, slide, 8, slide)
    _move(image, inverse, slide, 4, -slide)
    _move(image, narrow, slide, 4, slide)


def _move(image: Image, places: array[int], slide: int, size: int, by: int) -> None:
    mask = (1 << 8 * size) - 1
    ordered = sorted(places)
    for area in image.areas:
        if area.golden is None:
            continue
        golden, base = area.golden, (area.address - slide) & 0xFFFFFFFF
        for place in ordered[bisect_left(ordered, base) : bisect_right(ordered, base + area.length - size)]:
            at = place - base
            value = int.from_bytes(golden[at : at + size], "little") + by
            golden[at : at + size] = (value & mask).to_bytes(size, "little")
