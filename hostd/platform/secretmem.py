"""Memory for keys: locked, in no core dump, in no child, wiped.

Where the kernel has it (`memfd_secret`, Linux 5.14, `secretmem.enable=1` before 6.5) the pages are not
even in the kernel's own map: /proc/PID/mem and ptrace cannot read them. Elsewhere: an anonymous mapping,
locked, left out of core dumps and of forked children.

`SecretBuffer` is one secret in pages of its own; `SecretSlots` are many small ones. `scrubbed` is for what a
library leaves of a secret outside of them.

Its limits: whoever copies bytes out of a view has a copy that nobody here wipes, and a view is readable
while it is open. Root can attach to the process and run code in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from typing import Final, NoReturn

MAX_SECRET_BYTES: Final = 64 << 10
BLOCK_BYTES: Final = 16 << 10
"""What `SecretSlots` map at a time."""
STACK_BYTES: Final = 64 << 10
"""Of the stack that `scrubbed` overwrites: several times what OpenSSL's calls were seen to need."""
FREED_SIZES: Final = (24, 40, 72)
"""Usable sizes of the blocks that a number of 17 to 66 bytes is kept in (glibc's, 64 bits)."""
FREED_BLOCKS: Final = 8
"""Of each size; a thread keeps seven."""
_PAGE: Final = mmap.PAGESIZE
_SYS_MEMFD_SECRET: Final = 447
"""The same number on every architecture (asm-generic/unistd.h)."""
_M_PERTURB: Final = -6
"""malloc.h: freed memory is overwritten with this byte, and allocated memory with its complement."""
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.getrandom.restype = ctypes.c_ssize_t
_libc.getrandom.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.free.argtypes = (ctypes.c_void_p,)


class _Zeros(ctypes.Structure):
    """An argument that is passed by value, so that the call copies it onto the stack."""

    _fields_ = (("zeros", ctypes.c_ubyte * STACK_BYTES),)


_ZEROS: Final = _Zeros()
_libc.getppid.argtypes = (_Zeros,)


class SecretMemoryError(Exception):
    """There is no memory to keep a secret in: RLIMIT_MEMLOCK, or no memory at all."""


class SecretBuffer:
    """A secret of 1 to 65536 bytes, until `wipe`. Not copied, not pickled, not shown.

    `hidden`: its pages are not in the kernel's own map.
    """

    __slots__ = ("_address", "_mapped", "_size", "_views", "hidden")

    def __init__(self, size: int) -> None:
        """`size` zero bytes.

        Raises:
            SecretMemoryError: no such memory.
        """
        if not 0 < size <= MAX_SECRET_BYTES:
            raise ValueError(f"1 to {MAX_SECRET_BYTES} bytes")
        self._address: int | None = None
        self._views = 0
        self._size = size
        self._mapped = -(-size // _PAGE) * _PAGE
        self._address, self.hidden = _map(self._mapped)

    @classmethod
    def taking(cls, source: bytearray) -> SecretBuffer:
        """Moves a secret in: `source` is zeroed, whatever happens."""
        try:
            buffer = cls(len(source))
            with buffer.view() as view:
                view[:] = source
            return buffer
        finally:
            wipe(source)

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"<SecretBuffer of {self._size} bytes{'' if self._address else ', wiped'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")

    def __copy__(self) -> NoReturn:
        raise TypeError("a secret is not copied")

    def __deepcopy__(self, _memo: object) -> NoReturn:
        raise TypeError("a secret is not copied")

    @property
    def wiped(self) -> bool:
        return self._address is None

    @contextlib.contextmanager
    def view(self) -> Iterator[memoryview]:
        """The bytes themselves, for as long as the block runs; the view is dead afterwards.

        Raises:
            ValueError: it was wiped.
            BufferError: a slice of the view outlives the block; it would come to point at nothing.
        """
        if self._address is None:
            raise ValueError("the secret was wiped")
        array = (ctypes.c_ubyte * self._size).from_address(self._address)
        self._views += 1
        try:
            with memoryview(array) as raw, raw.cast("B") as view:
                yield view
        finally:
            self._views -= 1
        # Every slice holds a reference; left are `array` and the argument.
        if sys.getrefcount(array) > 2:
            raise BufferError("a slice of the secret's view was kept")

    def wipe(self) -> None:
        """Overwrites the secret with zeros and gives the memory back; doing it again does nothing.

        Raises:
            ValueError: a view is open.
        """
        if self._views:
            raise ValueError("a view of the secret is open")
        address, self._address = self._address, None
        if address is not None:
            _unmap(address, self._mapped)

    def __del__(self) -> None:
        if getattr(self, "_address", None) is not None and not self._views:
            self.wipe()


class _Block:
    """A mapping for slots of one size. It is wiped and unmapped when no view into it is left."""

    def __init__(self, slot: int) -> None:
        address, self.hidden = _map(BLOCK_BYTES)
        array = (ctypes.c_ubyte * BLOCK_BYTES).from_address(address)
        # Every view holds the array: none can come to point at nothing.
        weakref.finalize(array, _unmap, address, BLOCK_BYTES).atexit = False
        self.view = memoryview(array).cast("B")
        self.free = list(range(0, BLOCK_BYTES - slot + 1, slot))


class Slot:
    """One secret of `SecretSlots`, until `wipe`. One that is lost keeps its bytes and its place until its
    mapping ends: the collector may end that first, so nothing here touches it unasked."""

    __slots__ = ("_at", "_block", "view")

    def __init__(self, block: _Block, at: int, size: int) -> None:
        self._block: _Block | None = block
        self._at = at
        self.view = block.view[at : at + size]
        """Its bytes; dead after `wipe`. No slice of it may be kept."""

    def __repr__(self) -> str:
        return f"<Slot{'' if self._block else ', wiped'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")

    @property
    def wiped(self) -> bool:
        return self._block is None

    def wipe(self) -> None:
        """Overwrites the secret with zeros and gives its place back; doing it again does nothing.

        Raises:
            BufferError: something is at work on the view. The bytes are gone, the place is not used again.
        """
        block, self._block = self._block, None
        if block is not None:
            wipe(self.view)
            self.view.release()
            block.free.append(self._at)


class SecretSlots:
    """Secrets of one size, many to a mapping: a page for each of thousands of keys would be too much."""

    def __init__(self, size: int) -> None:
        """For secrets of `size` bytes, 1 to `BLOCK_BYTES`. Nothing is mapped before the first."""
        if not 0 < size <= BLOCK_BYTES:
            raise ValueError(f"1 to {BLOCK_BYTES} bytes")
        self._size = size
        self._blocks: list[_Block] = []

    def take(self, source: bytearray) -> Slot:
        """Moves a secret in: `source` is zeroed, whatever happens.

        Raises:
            SecretMemoryError: no such memory.
            ValueError: a secret of another size.
        """
        try:
            if len(source) != self._size:
                raise ValueError(f"a secret of {self._size} bytes")
            block = next((block for block in self._blocks if block.free), None)
            if block is None:
                block = _Block(self._size)
                self._blocks.append(block)
            slot = Slot(block, block.free.pop(), self._size)
            slot.view[:] = source
            return slot
        finally:
            wipe(source)

    def release(self) -> None:
        """Gives all memory back, as soon as the slots in it are gone."""
        self._blocks.clear()


def wipe(secret: bytearray | memoryview) -> None:
    """Overwrites bytes with zeros."""
    secret[:] = bytes(len(secret))


def random(size: int) -> bytearray:
    """Random bytes from the kernel, 1 to 256, that can be wiped."""
    made = bytearray(size)
    view = (ctypes.c_ubyte * size).from_buffer(made)
    # Up to 256 bytes come whole or not at all (getrandom(2)).
    if _libc.getrandom(ctypes.addressof(view), size, 0) != size:
        raise OSError(ctypes.get_errno(), "getrandom")
    return made


@contextlib.contextmanager
def scrubbed() -> Iterator[None]:
    """Around calls of a library that leaves pieces of a secret behind: the stack below here, and what was
    freed of the heap meanwhile, are overwritten. What the library still uses is not touched.

    It is no promise: it undoes what was seen to remain (tests/vault/test_wiping.py).
    """
    # glibc overwrites what is freed if it is told to, but not the few blocks of each size that a thread keeps
    # for itself. So it has none of these sizes to begin with, and those that it has in the end are taken.
    before = _blocks()
    _libc.mallopt(_M_PERTURB, 0xA5)
    try:
        yield
    finally:
        _libc.mallopt(_M_PERTURB, 0)
        _libc.getppid(_ZEROS)
        for block, size in (*before, *_blocks()):
            ctypes.memset(block, 0, size)
            _libc.free(block)


def _blocks() -> list[tuple[int, int]]:
    made = [(_libc.malloc(size), size) for size in FREED_SIZES for _ in range(FREED_BLOCKS)]
    return [(block, size) for block, size in made if block]


def _map(size: int) -> tuple[int, bool]:
    """Address of so many zero bytes (whole pages), and whether they are hidden from the kernel's own map."""
    address = _map_secret(size)
    return (_map_locked(size), False) if address is None else (address, True)


def _unmap(address: int, size: int) -> None:
    ctypes.memset(address, 0, size)
    _libc.munmap(address, size)


def _map_secret(size: int) -> int | None:
    fd = _libc.syscall(_SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if fd < 0:
        return None
    try:
        os.ftruncate(fd, size)
        # Not mmap.mmap: it keeps a duplicate of the descriptor, through which another process could map it.
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    finally:
        os.close(fd)
    if address == _MAP_FAILED:
        return None
    _not_inherited(address, size)
    return int(address)


def _map_locked(size: int) -> int:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address == _MAP_FAILED:
        raise SecretMemoryError(f"mmap: {os.strerror(ctypes.get_errno())}")
    if _libc.mlock(address, size):
        reason = os.strerror(ctypes.get_errno())
        _libc.munmap(address, size)
        raise SecretMemoryError(f"mlock: {reason} (RLIMIT_MEMLOCK)")
    _advise(address, size, mmap.MADV_DONTDUMP)
    _not_inherited(address, size)
    return int(address)


def _not_inherited(address: int, size: int) -> None:
    _advise(address, size, mmap.MADV_DONTFORK)


def _advise(address: int, size: int, advice: int) -> None:
    if _libc.madvise(address, size, advice):
        reason = os.strerror(ctypes.get_errno())
        _libc.munmap(address, size)
        raise SecretMemoryError(f"madvise: {reason}")
