"""Owner of /proc/kcore: the running kernel's memory as an ELF core file, read-only.

Program headers say where each range of kernel addresses is in the file (fs/proc/kcore.c); offsets go
beyond what ls shows. What is not mapped reads as zeros. Under lockdown `confidentiality` the kernel
refuses every open.

Needs CAP_SYS_RAWIO (`open_kcore`).
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

MAX_RANGES: Final = 1024
"""One for each bank of memory besides the few fixed ones."""
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_LOAD: Final = 1
_MAX_OFFSET: Final = (1 << 63) - 1


class MalformedKcoreError(Exception):
    """The headers are not those of a kernel core file."""


class KcoreError(Exception):
    """The range is not in the file, or could not be read whole."""


class Range(NamedTuple):
    """Kernel addresses [start, start + length) stand at `offset` of the file."""

    start: int
    length: int
    offset: int


def parse_header(head: bytes) -> tuple[int, int]:
    """(offset, number) of the program headers, from the first 64 bytes.

    Raises:
        MalformedKcoreError: not a 64-bit x86 core file, or too many ranges.
    """
    if len(head) < _HEADER.size:
        raise MalformedKcoreError("shorter than its header")
    ident, kind, machine, _, _, table, _, _, _, size, count, _, _, _ = _HEADER.unpack_from(head)
    if ident[:6] != b"\x7fELF\x02\x01" or (kind, machine) != (4, 62):
        raise MalformedKcoreError("not a 64-bit x86 core file")
    if size != _PROGRAM.size or not 0 < count <= MAX_RANGES or table > 1 << 20:
        raise MalformedKcoreError(f"{count} program headers of {size} bytes at {table}")
    return table, count


def parse_ranges(table: bytes, count: int) -> tuple[Range, ...]:
    """Ranges that are memory, from `count` program headers.

    Raises:
        MalformedKcoreError: cut short, or a range is out of bounds.
    """
    if len(table) != count * _PROGRAM.size:
        raise MalformedKcoreError("program headers are cut short")
    found: list[Range] = []
    for kind, _, offset, start, _, length, _, _ in _PROGRAM.iter_unpack(table):
        if kind != _LOAD:
            continue
        if start + length > 1 << 64 or offset + length > _MAX_OFFSET:
            raise MalformedKcoreError("a range is out of bounds")
        found.append(Range(start, length, offset))
    return tuple(found)


class Kcore:
    """The open file.

    Raises:
        OSError: it is not there, or may not be opened.
        MalformedKcoreError: see there.
    """

    def __init__(self, path: str = "/proc/kcore") -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.refresh()
        except BaseException:
            os.close(self._fd)
            raise

    def refresh(self) -> None:
        """Reads the headers again: memory may have been added."""
        table, count = parse_header(os.pread(self._fd, _HEADER.size, 0))
        self._ranges = parse_ranges(os.pread(self._fd, count * _PROGRAM.size, table), count)

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fills `buffer` with kernel memory from `address` on.

        Raises:
            KcoreError: no range holds it, or it could not be read whole.
        """
        size = len(buffer)
        for item in self._ranges:
            if item.start <= address and address + size <= item.start + item.length:
                break
        else:
            raise KcoreError(f"{address:#x} is in no range of /proc/kcore")
        done, offset = 0, item.offset + address - item.start
        while done < size:
            try:
                got = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise KcoreError(f"{address + done:#x}: {error.strerror}") from error
            if not got:
                raise KcoreError(f"{address + done:#x} cannot be read")
            done += got

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes of kernel memory.

        Raises:
            KcoreError: see `read_into`.
        """
        data = bytearray(size)
        self.read_into(address, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        os.close(self._fd)
