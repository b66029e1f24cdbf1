"""What an attacker does to a process or to the page cache. For tests, on processes the tests started."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hostd.core.readings import READ
from hostd.platform.procfs import Vma, parse_maps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ATTACH, _DETACH, _POKETEXT, _PEEKTEXT, _GETREGS, _SETREGS, _SINGLESTEP = 16, 17, 4, 1, 12, 13, 9
SYS_MMAP, SYS_MPROTECT, SYS_OPEN, SYS_MADVISE, SYS_MEMFD_CREATE = 9, 10, 2, 28, 319
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


@contextmanager
def scratch(pid: int, data: bytes) -> Iterator[int]:
    """Address of `data` in the process while inside: at the unused end of its stack's mapping."""
    stack = next(vma for vma in _all(pid) if vma[2] == "[stack]")
    address = stack[0] + 64
    saved = read(pid, address, len(data))
    write(pid, address, data)
    try:
        yield address
    finally:
        write(pid, address, saved)


def map_memory_file(pid: int, content: bytes) -> int:
    """Code without a path: memfd_create(2), filled, and mapped executable; gives the address."""
    with scratch(pid, b"payload\0") as name:
        fd = syscall(pid, SYS_MEMFD_CREATE, name, 0)
    with open(f"/proc/{pid}/fd/{fd}", "r+b", buffering=0) as file:
        file.write(content)
    return syscall(pid, SYS_MMAP, 0, len(content), 5, mmap.MAP_PRIVATE, fd, 0)


def map_file(pid: int, path: Path, protection: int = 5, *, length: int | None = None) -> int:
    """Opens and maps a file in the process, as dlopen does; gives the address."""
    with scratch(pid, str(path).encode() + b"\0") as name:
        fd = syscall(pid, SYS_OPEN, name, os.O_RDONLY, 0)
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


def hook(pid: int, file: str, function: str) -> int:
    """Points the slot of a libc function in the GOT of `file` one byte further; gives the slot's address.

    The slot is found as an attacker finds it: by its value, in what the linker made read-only.
    """
    own = next(vma for vma in maps(os.getpid()) if "libc.so" in vma.name and vma.offset == 0)
    there = next(vma for vma in maps(pid) if "libc.so" in vma.name and vma.offset == 0)
    inside = ctypes.cast(getattr(_libc, function), ctypes.c_void_p).value
    assert inside is not None
    wanted = (inside - own.start + there.start).to_bytes(8, "little")
    for vma in maps(pid):
        if file in vma.name and vma.protection == READ and vma.offset:
            at = read(pid, vma.start, vma.end - vma.start).find(wanted)
            if at >= 0 and not at % 8:
                write(pid, vma.start + at, (int.from_bytes(wanted, "little") + 1).to_bytes(8, "little"))
                return vma.start + at
    raise AssertionError(f"no slot of {function} in {file}")


def execute(pid: int, *argv: str, env: dict[str, str]) -> None:
    """Has the process execute another program: same pid, same start time, another life."""
    words = [word.encode() + b"\0" for word in (*argv, *(f"{name}={value}" for name, value in env.items()))]
    text = b"".join(words)
    at = (-len(text)) % 8 + len(text)
    address = next(vma for vma in _all(pid) if vma[2] == "[stack]")[0] + 64
    places, place = [], address
    for word in words:
        places.append(place)
        place += len(word)
    table = [*places[: len(argv)], 0, *places[len(argv) :], 0]
    write(pid, address, text.ljust(at, b"\0") + b"".join(item.to_bytes(8, "little") for item in table))
    code = mapping(pid, "libc.so", 5)
    site = code.start + read(pid, code.start, code.end - code.start).index(SYSCALL)
    with attached(pid):
        wanted = Registers()
        _ptrace(_GETREGS, pid, 0, ctypes.byref(wanted))
        wanted.rax, wanted.rip, wanted.orig_rax = 59, site, (1 << 64) - 1
        wanted.rdi, wanted.rsi, wanted.rdx = address, address + at, address + at + 8 * (len(argv) + 1)
        _ptrace(_SETREGS, pid, 0, ctypes.byref(wanted))


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def process_madvise(pidfd: int, address: int, length: int, advice: int) -> None:
    """process_madvise(2): what the kernel does by itself under memory pressure. What is not there (any more)
    is passed over."""
    vector = _Vector(address, length)
    _libc.syscall(440, pidfd, ctypes.byref(vector), 1, advice, 0)
