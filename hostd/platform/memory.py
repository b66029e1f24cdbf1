"""Reads scattered words of another process's memory with few system calls.

process_vm_readv(2) takes up to 1024 ranges at once: 3.6 MB in 0.25 to 0.45 ms. They are cut into pieces,
which two threads can read at the same time. Where it is refused (ptrace_scope 3 refuses it to root too) the
pages are read through /proc/kcore by their frames: its segments of the direct map carry physical addresses
(fs/proc/kcore.c, `get_kcore_size`).

Needs CAP_SYS_PTRACE; for kcore CAP_SYS_RAWIO, and CAP_SYS_ADMIN for the frames.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from hostd.platform.pages import ENTRY_BYTES, FRAME, PAGE, PRESENT
from hostd.platform.procfs import ProcessGoneError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hostd.platform.procfs import ProcessHandle

MAX_BYTES: Final = 64 << 20
"""Read at once; QEMU has 3.6 MB."""
MAX_VECTOR: Final = 1024
"""UIO_MAXIOV."""
PIECE_BYTES: Final = 512 << 10
"""Read in 0.05 ms: calls cost little beside it, and two threads end at about the same time."""
WINDOWS: Final = 2
"""One for each thread that reads."""
MAX_SEGMENTS: Final = 4096
_HEADER: Final = struct.Struct("<4s28xQ14xHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_NO_PHYSICAL: Final = (1 << 64) - 1
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_libc.process_vm_readv.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class MemoryRefusedError(Exception):
    """No way that this host has leads to the memory of other processes."""


class Piece(NamedTuple):
    """Ranges for one system call, at most `MAX_VECTOR` of `PIECE_BYTES` in all."""

    vector: ctypes.Array[_Iovec]
    at: int
    """Where in the buffer they begin."""
    size: int


class Places:
    """Ranges of one process's memory, packed for the system call.

    Raises:
        ValueError: over `MAX_BYTES`.
    """

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self.size = sum(length for _, length in ranges)
        if self.size > MAX_BYTES:
            raise ValueError(f"{self.size} bytes of memory")
        self.pieces = tuple(_pieces(ranges))


def _pieces(ranges: list[tuple[int, int]]) -> Iterator[Piece]:
    at = size = 0
    taken: list[_Iovec] = []
    for start, length in ranges:
        while length:
            part = min(length, PIECE_BYTES - size)
            taken.append(_Iovec(start, part))
            start, length, size = start + part, length - part, size + part
            if size == PIECE_BYTES or len(taken) == MAX_VECTOR:
                yield Piece((_Iovec * len(taken))(*taken), at, size)
                at, size, taken = at + size, 0, []
    if taken:
        yield Piece((_Iovec * len(taken))(*taken), at, size)


class MemoryReader:
    """Reads all ranges into memory of their own, or piece by piece into windows that are used again."""

    def __init__(self) -> None:
        buffer = mmap.mmap(-1, WINDOWS * PIECE_BYTES)
        self._windows = [memoryview(buffer)[n * PIECE_BYTES : (n + 1) * PIECE_BYTES] for n in range(WINDOWS)]

    def read(self, handle: ProcessHandle, places: Places) -> memoryview:
        """The bytes of all ranges, one after another. That `handle` is still the process whose number was
        read is for the caller to check afterwards.

        Raises:
            ProcessGoneError: it ended, or does not have that memory (any more), or not where it can be read.
            MemoryRefusedError: it may not be read.
        """
        # Given back to the system with the last reference.
        view = memoryview(mmap.mmap(-1, max(places.size, 1)))[: places.size]
        for piece in places.pieces:
            self._read(handle, piece, view[piece.at : piece.at + piece.size])
        return view

    def read_piece(self, handle: ProcessHandle, piece: Piece, window: int = 0) -> memoryview:
        """The bytes of one piece, until the next one is read into the same window. Two threads may read, each
        into its own.

        Raises:
            As `read`.
        """
        view = self._windows[window][: piece.size]
        self._read(handle, piece, view)
        return view

    def _read(self, handle: ProcessHandle, piece: Piece, view: memoryview) -> None:
        local = _Iovec(ctypes.addressof(ctypes.c_char.from_buffer(view)), piece.size)
        got = _libc.process_vm_readv(handle.pid, ctypes.byref(local), 1, piece.vector, len(piece.vector), 0)
        if got < 0 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS):
            self._through_kcore(handle, piece, view)
        elif got != piece.size:
            raise ProcessGoneError("its memory is not there (any more)")

    def _through_kcore(self, handle: ProcessHandle, piece: Piece, view: memoryview) -> None:
        with contextlib.ExitStack() as stack:
            try:
                kcore = os.open("/proc/kcore", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, kcore)
                pagemap = handle.open("pagemap")
                stack.callback(os.close, pagemap)
                segments = _segments(kcore)
                done = 0
                for place in piece.vector:
                    base, length = place.base or 0, place.length
                    _range(kcore, pagemap, segments, base, view[done : done + length])
                    done += length
            except OSError as error:
                raise MemoryRefusedError("neither process_vm_readv nor /proc/kcore may be used") from error

    def close(self) -> None:
        self._windows.clear()


def _range(
    kcore: int, pagemap: int, segments: list[tuple[int, int, int]], address: int, view: memoryview
) -> None:
    """Fills `view` from `address` on, page by page."""
    end, done = address + len(view), 0
    while address < end:
        entry = int.from_bytes(os.pread(pagemap, ENTRY_BYTES, address // PAGE * ENTRY_BYTES), "little")
        # The process has a say in what of it is in memory, so this is no fault of the host.
        if not entry & PRESENT or not entry & FRAME:
            raise ProcessGoneError("a page is not in memory, and cannot be brought in from here")
        physical = (entry & FRAME) * PAGE + address % PAGE
        size = min(end - address, PAGE - address % PAGE)
        offset = next((o + physical - s for s, e, o in segments if s <= physical < e), None)
        if offset is None:
            raise ProcessGoneError("/proc/kcore does not show that page")
        if os.preadv(kcore, [view[done : done + size]], offset) != size:
            raise MemoryRefusedError("/proc/kcore gives less than it says")
        address, done = address + size, done + size


def _segments(kcore: int) -> list[tuple[int, int, int]]:
    """(physical start, end, file offset) of what kcore shows of memory."""
    magic, table, entry, count = _HEADER.unpack(os.pread(kcore, _HEADER.size, 0))
    if magic != b"\x7fELF" or entry != _PROGRAM.size or not 0 < count <= MAX_SEGMENTS:
        raise MemoryRefusedError("/proc/kcore is not an ELF file")
    data = os.pread(kcore, count * _PROGRAM.size, table)
    if len(data) != count * _PROGRAM.size:
        raise MemoryRefusedError("/proc/kcore is cut")
    segments = [
        (physical, physical + size, offset)
        for kind, _, offset, _, physical, size, _, _ in _PROGRAM.iter_unpack(data)
        if kind == 1 and physical != _NO_PHYSICAL and size
    ]
    if not segments:
        raise MemoryRefusedError("/proc/kcore shows no memory")
    return segments
