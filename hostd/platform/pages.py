"""Page tables: /proc/PID/pagemap, and mappings of our own to compare with.

A pagemap entry is 8 bytes for each 4096-byte page (Documentation/admin-guide/mm/pagemap.rst): bit 63
present, bit 62 swapped (also a page in migration), bit 61 file page or shared memory, and the frame
number in the low 55 bits. A page copied on write is anonymous: bit 61 is off and the frame is another.

Needs CAP_SYS_ADMIN: without it the kernel shows every frame as 0, and `OwnPages` refuses to exist.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE: Final = 4096
ENTRY_BYTES: Final = 8
PRESENT: Final = 1 << 63
SWAPPED: Final = 1 << 62
FILE: Final = 1 << 61
FRAME: Final = (1 << 55) - 1
GAP_PAGES: Final = 64
"""Reading the entries of so many pages between two runs costs less than another call."""
PART_BYTES: Final = 8 << 10
"""1024 pages: some 0.03 ms."""
_IDENTITY: Final = PRESENT | SWAPPED | FILE | FRAME
_MADV_POPULATE_READ: Final = 22
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class PagesError(Exception):
    """This process may not see page frames, so it cannot tell one page from another."""


def whole_pages(length: int) -> int:
    """`length` bytes, rounded up to whole pages."""
    return -(-length // PAGE) * PAGE


@functools.lru_cache(maxsize=8)
def _lanes(count: int) -> tuple[int, int, int]:
    ones = int.from_bytes(b"\x01\0\0\0\0\0\0\0" * count, "little")
    return ones * PRESENT, ones * SWAPPED, ones * _IDENTITY


def differing(target: bytes, own: bytes) -> list[int]:
    """Indices of the target's pages that are not the own ones. `target`, `own`: pagemap entries.

    A page that the target has present must be the same frame, of the same kind, as the own page, which
    must be present too. A swapped page is a copy (pages of files are dropped, not swapped). A page that
    the target has not touched is not there to differ.

    Raises:
        ValueError: not the same number of whole entries.
    """
    if len(target) != len(own) or len(target) % ENTRY_BYTES:
        raise ValueError("entries do not pair up")
    # All entries at once, as one long integer: 10,000 pages take some 0.3 ms, a loop ten times that.
    present_bits, swapped_bits, identity_bits = _lanes(len(target) // ENTRY_BYTES)
    theirs = int.from_bytes(target, "little")
    present = theirs & present_bits
    lanes = present | (present - (present >> 63))
    if not (theirs ^ int.from_bytes(own, "little")) & lanes & identity_bits and not theirs & swapped_bits:
        return []
    return [
        index
        for index, (mine, other) in enumerate(zip(array("Q", own), array("Q", target), strict=True))
        if other & SWAPPED or (other & PRESENT and (mine ^ other) & _IDENTITY)
    ]


def populate(address: int, length: int) -> None:
    """Brings pages of ours into our page table; what cannot be brought in stays absent, and then differs."""
    _libc.madvise(address, length, _MADV_POPULATE_READ)


class OwnMapping:
    """A read-only shared mapping of a whole file: its page cache, as every other mapper sees it.

    Reading through `view` a page that the file no longer has ends this process (SIGBUS).
    """

    def __init__(self, fd: int, size: int) -> None:
        self.length = whole_pages(size)
        address = _libc.mmap(None, self.length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address in (None, _MAP_FAILED):
            raise OSError(ctypes.get_errno(), "mmap")
        self.address: int = address
        self.view = memoryview((ctypes.c_ubyte * self.length).from_address(address)).cast("B")

    def close(self) -> None:
        self.view.release()
        _libc.munmap(self.address, self.length)


class Run(NamedTuple):
    """Pages that are contiguous in a process and in our own memory."""

    start: int
    """Address in the process."""
    own: int
    """Address in ours; 0: we have no such pages."""
    pages: int


@dataclass(frozen=True, slots=True)
class Spans:
    """What is read of a page table at once: runs that lie close together come with one call."""

    reads: tuple[tuple[int, int], ...]
    """(bytes, offset) in pagemap."""
    cuts: tuple[tuple[int, int], ...]
    """For each run: from where to where in all that is read, in bytes."""

    @classmethod
    def over(cls, runs: Sequence[Run]) -> Spans:
        """For `runs` in any order; their entries come in the same."""
        reads: list[tuple[int, int]] = []
        cuts: dict[int, tuple[int, int]] = {}
        before = 0
        for index in sorted(range(len(runs)), key=lambda index: runs[index].start):
            run = runs[index]
            first, last = run.start // PAGE, run.start // PAGE + run.pages
            size, at = reads[-1] if reads else (0, 0)
            if reads and first - (at + size) // ENTRY_BYTES <= GAP_PAGES:
                reads[-1] = max(size, last * ENTRY_BYTES - at), at
            else:
                before += size
                at = first * ENTRY_BYTES
                reads.append(((last - first) * ENTRY_BYTES, at))
            cuts[index] = before + first * ENTRY_BYTES - at, before + last * ENTRY_BYTES - at
        return cls(tuple(reads), tuple(cuts[index] for index in range(len(runs))))

    def read(self, pagemap: int, part: tuple[int, int]) -> bytes:
        """One of `parts`, which different threads may read.

        Raises:
            OSError: it cannot be read.
        """
        size, at = part
        return os.pread(pagemap, size, at)

    def parts(self) -> list[tuple[int, int]]:
        """The reads, cut so that two threads end at about the same time."""
        return [
            (min(PART_BYTES, size - done), at + done)
            for size, at in self.reads
            for done in range(0, size, PART_BYTES)
        ]

    def joined(self, read: Sequence[bytes]) -> bytes | None:
        """The runs' entries, one after the other, from what was read of all `parts`; None if the page table
        is gone."""
        data = b"".join(read)
        if len(data) != sum(size for size, _ in self.reads):
            return None
        return b"".join([data[low:high] for low, high in self.cuts])

    def entries(self, pagemap: int) -> bytes | None:
        """`joined`, read here.

        Raises:
            OSError: it cannot be read.
        """
        return self.joined([self.read(pagemap, part) for part in self.parts()])


class OwnPages:
    """Our own page table and memory, through /proc/self: reading there never faults fatally.

    Raises:
        PagesError: frames are hidden from this process.
    """

    def __init__(self) -> None:
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        probe = ctypes.create_string_buffer(b"\x01" * PAGE, 2 * PAGE)
        entry = int.from_bytes(self.entries(ctypes.addressof(probe), 1), "little")
        if not entry & PRESENT or not entry & FRAME:
            self.close()
            raise PagesError("page frames are hidden: CAP_SYS_ADMIN is needed")

    def entries(self, address: int, count: int) -> bytes:
        """`count` pagemap entries from the page of `address` on; zero where there is no mapping."""
        data = os.pread(self._pagemap, count * ENTRY_BYTES, address // PAGE * ENTRY_BYTES)
        return data.ljust(count * ENTRY_BYTES, b"\0")

    def read(self, address: int, length: int) -> bytes:
        """Our memory, without the risk of a fatal fault.

        Raises:
            OSError: EIO or EFAULT: the page is not there.
        """
        return os.pread(self._memory, length, address)

    def close(self) -> None:
        os.close(self._pagemap)
        os.close(self._memory)
