"""What an attacker does to a process or to the page cache. For tests, on processes the tests started."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hostd.platform.procfs import Vma, parse_maps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ATTACH, _DETACH, _POKETEXT, _PEEKTEXT, _GETREGS, _SETREGS, _SINGLESTEP = 16, 17, 4, 1, 12, 13, 9
SYS_MMAP, SYS_MPROTECT, SYS_OPEN, SYS_MADVISE = 9, 10, 2, 28
SYSCALL = b"\x0f\x05"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


_REGISTERS = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
    "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs",
)  # fmt: skip


class Registers(ctypes.Structure):
    """struct user_regs_struct, x86-64."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS]


def maps(pid: int) -> list[Vma]:
    with open(f"/proc/{pid}/maps", "rb") as lines:
        return parse_maps(lines.read())


def mapping(pid: int, name: str, protection: int) -> Vma:
    """The first mapping whose path holds `name`, with exactly this protection."""
    return next(vma for vma in maps(pid) if name in vma.name and vma.protection == protection)


def address_of(vma: Vma, file_offset: int) -> int:
    return vma.start + file_offset - vma.offset


def read(pid: int, address: int, length: int) -> bytes:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        return os.pread(memory.fileno(), length, address)


def write(pid: int, address: int, data: bytes) -> None:
    """Through /proc/PID/mem, which writes to read-only memory too."""
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        assert os.pwrite(memory.fileno(), data, address) == len(data)


def _ptrace(request: int, pid: int, address: int = 0, data: object = None) -> int:
    ctypes.set_errno(0)
    result = int(_libc.ptrace(request, pid, address, data))
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), f"ptrace {request}")
    return result


@contextmanager
def attached(pid: int) -> Iterator[None]:
    _ptrace(_ATTACH, pid)
    os.waitpid(pid, 0x40000000)
    try:
        yield
    finally:
        _ptrace(_DETACH, pid)


def poke(pid: int, address: int, word: int) -> None:
    """PTRACE_POKETEXT of 8 bytes."""
    with attached(pid):
        _ptrace(_POKETEXT, pid, address, word)


def syscall(pid: int, number: int, *arguments: int) -> int:
    """Makes the process do a system call, at a `syscall` instruction it has anyway."""
    text = mapping(pid, "libc.so", 5)
    site = text.start + read(pid, text.start, text.end - text.start).index(SYSCALL)
    with attached(pid):
        saved, wanted = Registers(), Registers()
        _ptrace(_GETREGS, pid, 0, ctypes.byref(saved))
        ctypes.pointer(wanted)[0] = saved
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(wanted, name, value & (1 << 64) - 1)
        # orig_rax -1: the interrupted system call is not restarted over ours.
        wanted.rax, wanted.rip, wanted.orig_rax = number, site, (1 << 64) - 1
        _ptrace(_SETREGS, pid, 0, ctypes.byref(wanted))
        _ptrace(_SINGLESTEP, pid)
        os.waitpid(pid, 0x40000000)
        _ptrace(_GETREGS, pid, 0, ctypes.byref(wanted))
        _ptrace(_SETREGS, pid, 0, ctypes.byref(saved))
    result = ctypes.c_longlong(wanted.rax).value
    if -4096 < result < 0:
        raise OSError(-result, f"system call {number} in the process")
    return result


def inject_anonymous_code(pid: int) -> int:
    """An anonymous r-x mapping of one page; gives its address."""
    return syscall(pid, SYS_MMAP, 0, 4096, 5, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)


def map_file(pid: int, path: Path, protection: int = 5, *, length: int | None = None) -> int:
    """Opens and maps a file in the process, as dlopen does; gives the address."""
    stack = next(vma for vma in _all(pid) if vma[2] == "[stack]")
    scratch = stack[0] + 64
    saved = read(pid, scratch, 512)
    write(pid, scratch, str(path).encode() + b"\0")
    try:
        fd = syscall(pid, SYS_OPEN, scratch, os.O_RDONLY, 0)
    finally:
        write(pid, scratch, saved)
    return syscall(pid, SYS_MMAP, 0, length or path.stat().st_size, protection, mmap.MAP_PRIVATE, fd, 0)


def _all(pid: int) -> list[tuple[int, int, str]]:
    found = []
    with open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            addresses, *_, name = line.split()
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16), name))
    return found


def flip_page_cache(path: Path, offset: int) -> tuple[int, int]:
    """Changes one byte through a shared mapping: on tmpfs nothing of the inode tells. Gives (was, is)."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        was = shared[offset]
        shared[offset] = was ^ 0xFF
        return was, was ^ 0xFF
