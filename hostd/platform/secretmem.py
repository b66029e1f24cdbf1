"""Memory for the root key and tenants' key-encryption keys: locked, in no core dump, in no child, wiped.

Where the kernel has it (`memfd_secret`, Linux 5.14, `secretmem.enable=1` before 6.5) the pages are not
even in the kernel's own map: /proc/PID/mem and ptrace cannot read them. Elsewhere: an anonymous mapping,
locked, left out of core dumps and of forked children.

Its limits: whoever copies bytes out of a view has a copy that nobody here wipes, and a view is readable
while it is open. Root can attach to the process and run code in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from typing import Final, NoReturn

MAX_SECRET_BYTES: Final = 64 << 10
_PAGE: Final = mmap.PAGESIZE
_SYS_MEMFD_SECRET: Final = 447
"""The same number on every architecture (asm-generic/unistd.h)."""
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


class SecretMemoryError(Exception):
    """There is no memory to keep a secret in: RLIMIT_MEMLOCK, or no memory at all."""


class SecretBuffer:
    """A secret of 1 to 65536 bytes, until `wipe`. Not copied, not pickled, not shown."""

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
        address = _map_secret(self._mapped)
        self.hidden = address is not None
        """Whether the pages are hidden from the kernel's own map."""
        self._address = _map_locked(self._mapped) if address is None else address

    @classmethod
    def taking(cls, source: bytearray) -> SecretBuffer:
        """Moves a secret in: `source` is zeroed, whatever happens."""
        try:
            buffer = cls(len(source))
            with buffer.view() as view:
                view[:] = source
            return buffer
        finally:
            source[:] = bytes(len(source))

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
            ctypes.memset(address, 0, self._mapped)
            _libc.munmap(address, self._mapped)

    def __del__(self) -> None:
        if getattr(self, "_address", None) is not None and not self._views:
            self.wipe()


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
