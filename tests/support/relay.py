"""Requests that come from a hypervisor process: what a guest's own connection is, where there is no vsock.

The process is made to connect to the socket, by ptrace; the kernel then names it as the peer. Its end is
taken over with pidfd_getfd(2), and what a client sends to the relay's own socket goes through it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from typing import TYPE_CHECKING, Final

from tests.support import tamper

if TYPE_CHECKING:
    from pathlib import Path

_SYS_CLOSE, _SYS_SOCKET, _SYS_CONNECT, _SYS_PIDFD_GETFD = 3, 41, 42, 438
_CHUNK: Final = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)


def connected_by(pid: int, path: Path) -> socket.socket:
    """A stream socket that process `pid` connected to `path`."""
    # struct sockaddr_un
    name = socket.AF_UNIX.to_bytes(2, "little") + str(path).encode() + b"\0"
    fd = tamper.syscall(pid, _SYS_SOCKET, socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC, 0)
    with tamper.scratch(pid, name) as address:
        tamper.syscall(pid, _SYS_CONNECT, fd, address, len(name))
    process = os.pidfd_open(pid)
    try:
        taken = int(_libc.syscall(_SYS_PIDFD_GETFD, process, fd, 0))
        if taken < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(process)
    tamper.syscall(pid, _SYS_CLOSE, fd)
    return socket.socket(fileno=taken)


class Relay:
    """Listens at `path`; every connection there is one of process `pid` to `target`."""

    def __init__(self, path: Path, pid: int, target: Path) -> None:
        self._pid = pid
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        pairs: list[_Pair] = []
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = connected_by(self._pid, self._target)
                except (OSError, StopIteration):  # it has ended
                    near.close()
                    continue
                pairs.append(_Pair(near, far))
        for pair in pairs:
            pair.close()

    def close(self) -> None:
        """Ends all connections and stops listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()


class _Pair:
    """Two sockets; what is read from one is written to the other."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self._ends = (near, far)
        self._threads = [
            threading.Thread(target=self._pump, args=ends) for ends in ((near, far), (far, near))
        ]
        for thread in self._threads:
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                sink.sendall(data)
        self._shut()

    def _shut(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._shut()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()
