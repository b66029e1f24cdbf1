"""Which ranges of an ELF file are code and constants, and which are loaded writable (pure).

Only the program headers are read (elf(5)), of 64-bit little-endian files. What is loaded writable
(`.data`, and RELRO, which the dynamic linker writes before it is protected) legitimately differs
between the file and memory. A file that is no such ELF, or whose headers are damaged, has no writable
range: everything of it that is mapped counts as constant.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from hostd.platform.pages import PAGE, whole_pages

HEADER_BYTES: Final = 64 << 10
"""What a caller gives to `parse_layout`: headers stand at the front of every file a linker makes."""
MAX_PROGRAM_HEADERS: Final = 128
_HEADER: Final = struct.Struct("<4sBBBxxxxxxxxxHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_CLASS64, _LITTLE, _PT_LOAD, _PF_W = 2, 1, 1, 2
_MAX_OFFSET: Final = 1 << 48


class MalformedElfError(Exception):
    """It says it is an ELF file, and its program headers cannot be read."""


@dataclass(frozen=True, slots=True)
class Layout:
    """File ranges that are loaded writable, in whole pages: (start, end) in bytes."""

    writable: tuple[tuple[int, int], ...]

    def constant(self, offset: int, length: int) -> bool:
        """Whether this range of the file must look in memory as it looks in the file."""
        return not any(start <= offset and offset + length <= end for start, end in self.writable)


ALL_CONSTANT: Final = Layout(())


def parse_layout(head: bytes) -> Layout | None:
    """Reads the program headers from the first `HEADER_BYTES` of a file; None: no ELF file.

    Raises:
        MalformedElfError: an ELF file with damaged or too many headers, or of another class.
    """
    if head[:4] != b"\x7fELF":
        return None
    if len(head) < _HEADER.size:
        raise MalformedElfError("shorter than its header")
    fields = _HEADER.unpack_from(head)
    if fields[1] != _CLASS64 or fields[2] != _LITTLE:
        raise MalformedElfError("not 64-bit little-endian")
    table, entry_size, count = fields[8], fields[12], fields[13]
    if entry_size != _PROGRAM.size or not 0 < count <= MAX_PROGRAM_HEADERS:
        raise MalformedElfError(f"{count} program headers of {entry_size} bytes")
    if table > len(head) - count * _PROGRAM.size:
        raise MalformedElfError("program headers lie outside the first bytes")
    writable: list[tuple[int, int]] = []
    for number in range(count):
        kind, flags, offset, _, _, size, _, _ = _PROGRAM.unpack_from(head, table + number * _PROGRAM.size)
        if kind != _PT_LOAD or not flags & _PF_W or not size:
            continue
        if offset > _MAX_OFFSET or size > _MAX_OFFSET:
            raise MalformedElfError("a segment is out of bounds")
        writable.append((offset // PAGE * PAGE, whole_pages(offset + size)))
    return Layout(tuple(writable))


def layout_of(head: bytes) -> Layout | None:
    """`parse_layout`; of a file with damaged headers all is constant."""
    try:
        return parse_layout(head)
    except MalformedElfError:
        return ALL_CONSTANT
