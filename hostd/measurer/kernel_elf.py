"""Sections, symbols and relocations of 64-bit x86 ELF files: kernel images and modules (pure).

elf(5). Only what the kernel's own loader uses; names must be text, every section must lie in the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_SECTIONS: Final = 16384
"""Modules built with a section for each function have some thousands."""
MAX_SYMBOLS: Final = 1_000_000
NOBITS: Final = 8
WRITE, ALLOC, EXEC = 1, 2, 4
"""Section flags."""
RELA, SYMTAB = 4, 2
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_RELA: Final = struct.Struct("<QQq")


class MalformedElfError(Exception):
    """Not a 64-bit x86 ELF file, or one whose tables do not hold together."""


@dataclass(frozen=True, slots=True)
class Section:
    """One section header; `size` bytes at `offset` of the file (none of NOBITS are in it)."""

    index: int
    name: str
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int


class ElfSymbol(NamedTuple):
    """`section` is 0 for a symbol of elsewhere, 0xfff1 for an absolute value."""

    name: str
    section: int
    value: int
    size: int


class Relocation(NamedTuple):
    offset: int
    kind: int
    symbol: int
    addend: int


@dataclass(frozen=True, slots=True)
class Elf:
    """A file and its sections."""

    data: bytes
    sections: tuple[Section, ...]
    end: int
    """Of the last byte that belongs to the file's own structure; the kernel's relocations stand behind."""

    def named(self, name: str) -> Section | None:
        """The first section of a name."""
        return next((section for section in self.sections if section.name == name), None)

    def content(self, section: Section) -> bytes:
        """A section's bytes; zeros for one that has none in the file."""
        if section.kind == NOBITS:
            return bytes(section.size)
        return self.data[section.offset : section.offset + section.size]

    def at(self, address: int, size: int) -> bytes:
        """`size` bytes that the file has for a virtual address (of an image, not of a module).

        Raises:
            MalformedElfError: no section holds them.
        """
        for section in self.sections:
            inside = section.address <= address and address + size <= section.address + section.size
            if section.flags & ALLOC and section.kind != NOBITS and inside:
                start = section.offset + address - section.address
                return self.data[start : start + size]
        raise MalformedElfError(f"no section holds {address:#x}")

    def symbols(self) -> list[ElfSymbol]:
        """All symbols, by their number; none if the file has no table.

        Raises:
            MalformedElfError: the table is damaged or over the bound.
        """
        table = next((section for section in self.sections if section.kind == SYMTAB), None)
        if table is None:
            return []
        if table.size % _SYMBOL.size or table.size // _SYMBOL.size > MAX_SYMBOLS:
            raise MalformedElfError(f"a symbol table of {table.size} bytes")
        names = self.content(self._section(table.link))
        return [
            ElfSymbol(_text(names, name), section, value, size)
            for name, _, _, section, value, size in _SYMBOL.iter_unpack(self.content(table))
        ]

    def relocations(self, section: Section) -> Iterator[Relocation]:
        """What must be added to a section when its place is known.

        Raises:
            MalformedElfError: the table is cut short.
        """
        for table in self.sections:
            if table.kind == RELA and table.info == section.index:
                if table.size % _RELA.size:
                    raise MalformedElfError(f"{table.name} is cut short")
                for offset, info, addend in _RELA.iter_unpack(self.content(table)):
                    yield Relocation(offset, info & 0xFFFFFFFF, info >> 32, addend)

    def _section(self, index: int) -> Section:
        if index >= len(self.sections):
            raise MalformedElfError(f"no section {index}")
        return self.sections[index]


def parse_elf(data: bytes) -> Elf:
    """Reads the section headers.

    Raises:
        MalformedElfError: see there.
    """
    if len(data) < _HEADER.size:
        raise MalformedElfError("shorter than its header")
    ident, _, machine, _, _, _, table, _, _, _, _, size, count, names = _HEADER.unpack_from(data)
    if ident[:6] != b"\x7fELF\x02\x01" or machine != 62:
        raise MalformedElfError("not a 64-bit x86 ELF file")
    if size != _SECTION.size or not 0 < count <= MAX_SECTIONS or names >= count:
        raise MalformedElfError(f"{count} section headers of {size} bytes")
    if table + count * size > len(data):
        raise MalformedElfError("section headers lie outside the file")
    rows = list(_SECTION.iter_unpack(data[table : table + count * size]))
    for row in rows:
        if row[1] != NOBITS and row[4] + row[5] > len(data):
            raise MalformedElfError("a section lies outside the file")
        if row[5] > len(data) and row[1] == NOBITS and row[5] > 1 << 32:
            raise MalformedElfError("a section is too large")
    strings = data[rows[names][4] : rows[names][4] + rows[names][5]]
    sections = tuple(
        Section(number, _text(strings, row[0]), row[1], row[2], row[3], row[4], row[5], row[6], row[7])
        for number, row in enumerate(rows)
    )
    end = max([table + count * size, *(s.offset + s.size for s in sections if s.kind != NOBITS)])
    return Elf(data, sections, end)


def _text(strings: bytes, at: int) -> str:
    end = strings.find(b"\0", at)
    if at > len(strings) or end < 0:
        raise MalformedElfError("a name lies outside its table")
    return strings[at:end].decode("utf-8", "replace")


def build_id(notes: bytes) -> bytes:
    """The build id among ELF notes (name GNU, type 3); empty: there is none, or the notes are damaged."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_end = at + 12 + (name_size + 3) // 4 * 4
        end = name_end + (size + 3) // 4 * 4
        if end > len(notes):
            return b""
        if kind == 3 and notes[at + 12 : at + 12 + name_size] == b"GNU\0":
            return notes[name_end : name_end + size]
        at = end
    return b""
