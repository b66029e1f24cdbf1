"""What the dynamic linker reads of an ELF file: segments, the dynamic section, names (pure).

64-bit little-endian x86-64 files only. Follows the gABI (chapters "Program Header", "Dynamic Section"),
and glibc elf/get-dynamic-info.h for which entries matter. Addresses are the file's own (before the load
address is added). Every table must lie inside the file and below a bound, or the file is malformed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from hostd.measurer.elf import MAX_PROGRAM_HEADERS, MalformedElfError
from hostd.platform.pages import PAGE, whole_pages

MAX_DYNAMIC: Final = 1024
"""Entries of a dynamic section; QEMU's has 61."""
MAX_TABLE_BYTES: Final = 64 << 20
"""One table of relocations or symbols. QEMU's largest has 2.9 MB."""
MAX_RELRO_BYTES: Final = 16 << 20
"""Protected data of one file: recomputing so much takes 0.2 s, during which nothing else is read. QEMU has
1.4 MB; of what it may load libLLVM has the most, 8.5 MB."""
MAX_STRING: Final = 4096
"""Bytes of one name. C++ names reach some hundreds."""
MAX_ADDRESS: Final = 1 << 47
"""User space ends there."""

_HEADER: Final = struct.Struct("<4sBBBxxxxxxxxxHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_ET_EXEC, _ET_DYN, _EM_X86_64 = 2, 3, 62
_PT_LOAD, _PT_DYNAMIC, _PT_RELRO = 1, 2, 0x6474E552
PF_X, PF_W = 1, 2

DT_NEEDED, DT_PLTRELSZ, DT_PLTGOT, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_RELA, DT_RELASZ = 1, 2, 3, 4, 5, 6, 7, 8
DT_STRSZ, DT_SONAME, DT_SYMBOLIC, DT_REL, DT_RELSZ, DT_PLTREL = 10, 14, 16, 17, 18, 20
DT_DEBUG, DT_TEXTREL, DT_JMPREL, DT_FLAGS, DT_RELRSZ, DT_RELR = 21, 22, 23, 30, 35, 36
DT_VERSYM, DT_GNU_HASH = 0x6FFFFFF0, 0x6FFFFEF5
DT_VERDEF, DT_VERDEFNUM, DT_VERNEED, DT_VERNEEDNUM = 0x6FFFFFFC, 0x6FFFFFFD, 0x6FFFFFFE, 0x6FFFFFFF
_DF_SYMBOLIC: Final = 2


@dataclass(frozen=True, slots=True)
class Load:
    """A PT_LOAD segment."""

    offset: int
    address: int
    file_size: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class Image:
    """The parts of a file that loading it depends on."""

    loads: tuple[Load, ...]
    relro: tuple[int, int]
    """(address, end) of what is protected after relocation, in whole 8-byte words; (0, 0): nothing."""
    dynamic_address: int
    dynamic: tuple[tuple[int, int], ...]
    """(tag, value) in the file's order, without the closing DT_NULL."""
    needed: tuple[bytes, ...]
    soname: bytes
    symbolic: bool
    """Its own definitions come first for its own references."""

    def value(self, tag: int) -> int | None:
        """Value of the last entry with this tag, as the dynamic linker takes it."""
        return next((value for found, value in reversed(self.dynamic) if found == tag), None)

    def offset_of(self, address: int, length: int = 1) -> int:
        """File offset of an address range.

        Raises:
            MalformedElfError: it is not inside one segment's part of the file.
        """
        for load in self.loads:
            if load.address <= address and address + length <= load.address + load.file_size:
                return address - load.address + load.offset
        raise MalformedElfError(f"{length} bytes at {address:#x} are not in the file")

    def address_of(self, offset: int) -> int | None:
        """Address of a file offset; None if it is not loaded."""
        for load in self.loads:
            if load.offset <= offset < load.offset + load.file_size:
                return offset - load.offset + load.address
        return None

    def table(self, data: memoryview, address_tag: int, size_tag: int, entry: int) -> memoryview:
        """The table that two entries of the dynamic section describe; empty if there is none.

        Raises:
            MalformedElfError: not inside the file, not whole entries, or over `MAX_TABLE_BYTES`.
        """
        address, size = self.value(address_tag), self.value(size_tag)
        if address is None or not size:
            return data[:0]
        if size % entry or size > MAX_TABLE_BYTES:
            raise MalformedElfError(f"a table of {size} bytes")
        at = self.offset_of(address, size)
        return data[at : at + size]


def parse_image(data: memoryview) -> Image | None:
    """Parses a whole file; None: it is no ELF file, or has no dynamic section.

    Raises:
        MalformedElfError: damaged, out of bounds, or not for this machine.
    """
    if bytes(data[:4]) != b"\x7fELF":
        return None
    loads, dynamic, relro = _segments(data)
    if dynamic is None:
        return None
    if not loads:
        raise MalformedElfError("nothing is loaded")
    entries = _entries(data, loads, dynamic)
    bare = Image(loads, relro, dynamic.address, entries, (), b"", False)
    strings = bare.table(data, DT_STRTAB, DT_STRSZ, 1)
    needed = tuple(string(strings, value) for tag, value in entries if tag == DT_NEEDED)
    name = bare.value(DT_SONAME)
    soname = b"" if name is None else string(strings, name)
    symbolic = bare.value(DT_SYMBOLIC) is not None or bool((bare.value(DT_FLAGS) or 0) & _DF_SYMBOLIC)
    return Image(loads, relro, dynamic.address, entries, needed, soname, symbolic)


def _segments(data: memoryview) -> tuple[tuple[Load, ...], Load | None, tuple[int, int]]:
    if len(data) < _HEADER.size:
        raise MalformedElfError("shorter than its header")
    fields = _HEADER.unpack_from(data)
    if fields[1:3] != (2, 1) or fields[4] not in (_ET_EXEC, _ET_DYN) or fields[5] != _EM_X86_64:
        raise MalformedElfError("no program or library for x86-64")
    table, entry_size, count = fields[8], fields[12], fields[13]
    if entry_size != _PROGRAM.size or not 0 < count <= MAX_PROGRAM_HEADERS:
        raise MalformedElfError(f"{count} program headers of {entry_size} bytes")
    if table > len(data) - count * _PROGRAM.size:
        raise MalformedElfError("program headers lie outside the file")
    loads: list[Load] = []
    dynamic: Load | None = None
    relro = (0, 0)
    for number in range(count):
        kind, flags, offset, address, _, file_size, size, _ = _PROGRAM.unpack_from(
            data, table + number * _PROGRAM.size
        )
        if kind not in (_PT_LOAD, _PT_DYNAMIC, _PT_RELRO):
            continue
        if file_size > size or address + size > MAX_ADDRESS or offset + file_size > len(data):
            raise MalformedElfError("a segment is out of bounds")
        if kind == _PT_LOAD:
            if loads and address < loads[-1].address + loads[-1].size:
                raise MalformedElfError("segments are not in order")
            if (address - offset) % PAGE:
                raise MalformedElfError("a segment is not aligned with its place in the file")
            loads.append(Load(offset, address, file_size, size, flags))
        elif kind == _PT_DYNAMIC:
            dynamic = Load(offset, address, file_size, size, flags)
        else:
            relro = (address & ~7, -(-(address + size) // 8) * 8)
    if relro[1] - relro[0] > MAX_RELRO_BYTES:
        raise MalformedElfError(f"{relro[1] - relro[0]} bytes are relocated")
    if relro[1] and not any(
        a.address // PAGE * PAGE <= relro[0] and relro[1] <= whole_pages(a.address + a.size) for a in loads
    ):
        raise MalformedElfError("what is protected is not loaded")
    return tuple(loads), dynamic, relro


def _entries(data: memoryview, loads: tuple[Load, ...], dynamic: Load) -> tuple[tuple[int, int], ...]:
    if dynamic.file_size > MAX_DYNAMIC * _DYNAMIC.size or dynamic.file_size % _DYNAMIC.size:
        raise MalformedElfError(f"a dynamic section of {dynamic.file_size} bytes")
    if not any(a.address - a.offset == dynamic.address - dynamic.offset for a in loads):
        raise MalformedElfError("the dynamic section is not loaded")
    found: list[tuple[int, int]] = []
    for tag, value in _DYNAMIC.iter_unpack(data[dynamic.offset : dynamic.offset + dynamic.file_size]):
        if not tag:
            break
        found.append((tag, value))
    return tuple(found)


def string(strings: memoryview | bytes, at: int) -> bytes:
    """The NUL-terminated string at an offset of a string table.

    Raises:
        MalformedElfError: outside the table, not terminated, or over `MAX_STRING`.
    """
    if at >= len(strings):
        raise MalformedElfError("a name is outside the string table")
    name, end, _ = bytes(strings[at : at + MAX_STRING + 1]).partition(b"\0")
    if not end:
        raise MalformedElfError(f"a name has no end, or over {MAX_STRING} bytes")
    return name
