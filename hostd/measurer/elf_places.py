"""Names a place in an ELF file: `main+0x12`, or `.text+0x3a0` where no symbol says more (pure).

For findings, so only after something was found: function and object symbols of `.symtab` and `.dynsym`
(elf(5)), else the section. A file that is no 64-bit little-endian ELF, or is damaged, has no names: a
finding stands without.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SECTIONS: Final = 1024
MAX_TABLE_BYTES: Final = 24 << 20
"""A million symbols; QEMU has 20,024."""
MAX_LABEL: Final = 256
_HEADER: Final = struct.Struct("<4sBBBxxxxxxxxxHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_SYMTAB, _STRTAB, _NOBITS, _DYNSYM = 2, 3, 8, 11
_ALLOC: Final = 2
_OBJECT, _FUNC, _IFUNC = 1, 2, 10
_NAME_BYTES: Final = 512


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int


def place(read: Callable[[int, int], bytes], offset: int) -> str:
    """What stands at `offset` of a file; empty if it does not say. `read(offset, length)` gives the file's
    bytes, fewer where there are none."""
    head = read(0, _HEADER.size)
    if len(head) < _HEADER.size or head[:6] != b"\x7fELF\x02\x01":
        return ""
    fields = _HEADER.unpack(head)
    table, entry_size, count, names_at = fields[9], fields[14], fields[15], fields[16]
    if entry_size != _SECTION.size or not 0 < count <= MAX_SECTIONS:
        return ""
    data = read(table, count * _SECTION.size)
    if len(data) != count * _SECTION.size:
        return ""
    sections = [_Section(*row[:7]) for row in _SECTION.iter_unpack(data)]
    inside = next((item for item in sections if _holds(item, offset)), None)
    if inside is None:
        return ""
    address = inside.address + offset - inside.offset
    for item in sections:
        if item.kind in (_SYMTAB, _DYNSYM) and (label := _symbol(read, sections, item, address)):
            return label
    if names_at >= count:
        return ""
    name = _text(read, sections[names_at], inside.name)
    return _label(name, offset - inside.offset)


def _holds(section: _Section, offset: int) -> bool:
    return (
        bool(section.flags & _ALLOC)
        and section.kind != _NOBITS
        and section.offset <= offset < section.offset + section.size
    )


def _symbol(
    read: Callable[[int, int], bytes], sections: list[_Section], table: _Section, address: int
) -> str:
    if table.size > MAX_TABLE_BYTES or table.link >= len(sections):
        return ""
    data = read(table.offset, table.size // _SYMBOL.size * _SYMBOL.size)
    whole = data[: len(data) // _SYMBOL.size * _SYMBOL.size]
    for name, info, _, section, value, size in _SYMBOL.iter_unpack(whole):
        if value <= address < value + size and section and info & 15 in (_OBJECT, _FUNC, _IFUNC):
            text = _text(read, sections[table.link], name)
            if text:
                return _label(text, address - value)
    return ""


def _text(read: Callable[[int, int], bytes], strings: _Section, at: int) -> str:
    if at >= strings.size:
        return ""
    raw, end, _ = read(strings.offset + at, min(_NAME_BYTES, strings.size - at)).partition(b"\0")
    return raw.decode("utf-8", "backslashreplace") if end else ""


def _label(name: str, offset: int) -> str:
    return f"{name[: MAX_LABEL - 24]}+{offset:#x}" if name else ""
