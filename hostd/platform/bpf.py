"""Owner of bpf(2): which programs are loaded. Loads and attaches nothing.

A program does not change, and its number is not given to another before 2^31 loads (kernel/bpf/syscall.c,
`idr_alloc_cyclic`), so what is known of a number holds for `KNOWN_S`. A number may go away while the list is
walked, and is then not in it. Needs CAP_SYS_ADMIN.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import time
from dataclasses import dataclass
from typing import Final

MAX_PROGRAMS: Final = 4096
"""A systemd host has some 10 to 100; one with a BPF network some hundreds."""
KNOWN_S: Final = 30.0
"""Seconds. 2^31 loads take a CPU hours."""
_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280}
_PROG_GET_NEXT_ID, _PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD = 11, 13, 15
_UNAVAILABLE: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
_NUMBERS: Final = struct.Struct("=III4x")
"""start_id or prog_id | next_id | open_flags."""
_INFO_OF: Final = struct.Struct("=IIQ")
"""bpf_fd | info_len | address of info."""
_INFO: Final = struct.Struct("=II8s48x16s")
"""struct bpf_prog_info up to its name: type | id | tag | … | name."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)
_libc.syscall.restype = ctypes.c_long


class TooManyProgramsError(Exception):
    """More programs are loaded than are listed."""


@dataclass(frozen=True, slots=True)
class Program:
    """One loaded program."""

    number: int
    type: int
    tag: bytes
    name: str


class Programs:
    """Lists loaded programs. Buffers are kept between calls; not for use from two threads at once."""

    def __init__(self) -> None:
        self._attributes = ctypes.create_string_buffer(_NUMBERS.size)
        self._info = ctypes.create_string_buffer(_INFO.size)
        self._known: dict[int, Program] = {}
        self._known_until = 0.0
        self._number = _SYS_BPF.get(platform.machine())

    def read(self) -> tuple[Program, ...] | None:
        """All programs, by number; None: this kernel has no bpf(2), or does not let us use it.

        Raises:
            OSError: another error of the kernel.
            TooManyProgramsError: over `MAX_PROGRAMS`.
        """
        now = time.monotonic()
        if now > self._known_until:
            self._known, self._known_until = {}, now + KNOWN_S
        found: dict[int, Program] = {}
        number = 0
        while True:
            try:
                number = self._next(number)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    break
                if error.errno in _UNAVAILABLE and not number:
                    return None
                raise
            program = self._known.get(number) or self._program(number)
            if program is not None:
                found[number] = program
            if len(found) > MAX_PROGRAMS:
                raise TooManyProgramsError(f"over {MAX_PROGRAMS} BPF programs")
        self._known = found
        return tuple(found.values())

    def _next(self, number: int) -> int:
        _NUMBERS.pack_into(self._attributes, 0, number, 0, 0)
        self._call(_PROG_GET_NEXT_ID)
        following: int = _NUMBERS.unpack_from(self._attributes)[1]
        if following <= number:
            raise OSError(errno.EPROTO, "the kernel counts programs down")
        return following

    def _program(self, number: int) -> Program | None:
        _NUMBERS.pack_into(self._attributes, 0, number, 0, 0)
        try:
            fd = self._call(_PROG_GET_FD_BY_ID)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        try:
            ctypes.memset(self._info, 0, _INFO.size)
            _INFO_OF.pack_into(self._attributes, 0, fd, _INFO.size, ctypes.addressof(self._info))
            self._call(_OBJ_GET_INFO_BY_FD)
        finally:
            os.close(fd)
        kind, _id, tag, name = _INFO.unpack_from(self._info)
        return Program(number, kind, tag, name.partition(b"\0")[0].decode("utf-8", "backslashreplace"))

    def _call(self, command: int) -> int:
        if self._number is None:
            raise OSError(errno.ENOSYS, "no bpf(2) on this machine")
        result: int = _libc.syscall(self._number, command, self._attributes, _NUMBERS.size)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result
