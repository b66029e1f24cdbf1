"""Closes a process in: what a gateway worker may still ask of the kernel. Owns pyseccomp and prctl(2).

`compile_filter` makes the seccomp program once, in the broker; `confine` applies it, with resource
limits, in the worker before the first guest byte. After it there is no way to new privileges, no
debugger, no core dump, no new file, socket, program or process, no executable memory.

An unexpected call fails with EPERM, so that a defect shows as an error with a place; the calls that
only a process under foreign control makes (running a program, looking into another process,
loading code into the kernel) kill it. Root keeps its capabilities in development, where the filter is the
fence; in production the unit's user has none.
"""

from __future__ import annotations

import ctypes
import os
import resource
import tempfile
from typing import Final

ADDRESS_SPACE_BYTES: Final = 1 << 30
"""Interpreter and libraries take 100 MiB, the bounded buffers of 64 connections 40 MiB."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER: Final = 2
_SIGKILL: Final = 9
_PROT_EXEC: Final = 4
_FIONBIO: Final = 0x5421
_INSTRUCTION_BYTES: Final = 8
"""struct sock_filter."""

_ALLOWED: Final = (
    "read", "write", "readv", "writev", "recvfrom", "sendto", "recvmsg", "sendmsg", "close", "shutdown",
    "getsockname", "getsockopt", "epoll_wait", "epoll_pwait", "epoll_ctl", "poll", "ppoll", "select",
    "pselect6", "munmap", "mremap", "madvise", "brk", "futex", "sched_yield", "restart_syscall", "getrandom",
    "clock_gettime", "gettimeofday", "getpid", "gettid", "fstat", "lseek",
    "rt_sigreturn", "rt_sigaction", "rt_sigprocmask", "sigaltstack", "exit", "exit_group",
)  # fmt: skip
_FATAL: Final = (
    "execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "fork", "vfork", "clone",
    "clone3", "bpf", "init_module", "finit_module", "kexec_load", "userfaultfd", "perf_event_open", "mount",
    "setns", "unshare", "pidfd_getfd", "io_uring_setup",
)  # fmt: skip


class ConfineError(Exception):
    """The process could not be closed in; it must not go on."""


def compile_filter() -> bytes:
    """The seccomp program for `confine`, as the kernel's instructions.

    Raises:
        ConfineError: libseccomp is missing or does not know a call.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError) as error:
        raise ConfineError(f"libseccomp is not usable: {error}") from error
    try:
        rules = seccomp.SyscallFilter(seccomp.ERRNO(1))
        for name in _ALLOWED:
            rules.add_rule(seccomp.ALLOW, name)
        for name in ("mmap", "mprotect"):
            rules.add_rule(seccomp.ALLOW, name, seccomp.Arg(2, seccomp.MASKED_EQ, _PROT_EXEC, 0))
        rules.add_rule(seccomp.ALLOW, "ioctl", seccomp.Arg(1, seccomp.EQ, _FIONBIO))
        for name in _FATAL:
            rules.add_rule(seccomp.KILL_PROCESS, name)
        with tempfile.TemporaryFile() as file:
            rules.export_bpf(file)
            file.seek(0)
            return file.read()
    except (OSError, ValueError) as error:
        raise ConfineError(f"the filter does not compile: {error}") from error


def undumpable() -> None:
    """No core dump, no debugger of the same user, no new privileges through exec.

    Raises:
        ConfineError: the kernel refused.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def confine(program: bytes, *, descriptors: int) -> None:
    """Closes this (single-threaded) process in for good.

    Args:
        program: from `compile_filter`.
        descriptors: how many it may have open.

    Raises:
        ConfineError: any part of it failed.
    """
    undumpable()
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    try:
        for limit, value in (
            (resource.RLIMIT_NOFILE, descriptors),
            (resource.RLIMIT_AS, ADDRESS_SPACE_BYTES),
            (resource.RLIMIT_FSIZE, 0),
            (resource.RLIMIT_NPROC, 0),
            (resource.RLIMIT_MEMLOCK, 0),
        ):
            resource.setrlimit(limit, (value, value))
    except (OSError, ValueError) as error:
        raise ConfineError(f"resource limits: {error}") from error
    _load(program)


def _load(program: bytes) -> None:
    count, rest = divmod(len(program), _INSTRUCTION_BYTES)
    if rest or not 0 < count <= 4096:
        raise ConfineError("that is no seccomp program")
    instructions = ctypes.create_string_buffer(program, len(program))
    header = _SockFprog(count, ctypes.cast(instructions, ctypes.c_void_p))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


_libc: Final = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, pointer: int = 0) -> None:
    arguments = [ctypes.c_ulong(number) for number in (value, pointer, 0, 0)]
    if _libc.prctl(ctypes.c_int(option), *arguments) != 0:
        raise ConfineError(f"prctl({option}): {os.strerror(ctypes.get_errno())}")
