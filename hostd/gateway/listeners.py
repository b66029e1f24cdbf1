"""Where guests knock, and who the kernel says they are.

A vsock caller is its CID; a unix caller is its process and user (SO_PEERCRED). Nothing is read from
the connection. Closed at once: the vsock CIDs that are no guest's (hypervisor 0, loopback 1, host 2,
the wildcard), and a unix peer that is gone already.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hostd.ipc.channel import peer_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BACKLOG: Final = 256
ACCEPTS_PER_TURN: Final = 64
"""Connections accepted in one wake-up, so that a flood does not keep the broker from its other work."""
_NOT_A_GUEST: Final = frozenset({0, 1, 2})
_CID_ANY: Final = 0xFFFFFFFF
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class ExhaustedError(Exception):
    """This host has no room for another connection now."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is connected. Exactly one of `cid` and `pid` is not 0."""

    cid: int
    pid: int
    uid: int


def listen_unix(path: Path) -> socket.socket:
    """The host-local socket, open to every user: who may do what is the policy's to say.

    A stale socket of an earlier run is replaced; anything else at that place is left and refused.

    Raises:
        OSError: it cannot be made, or something that is no socket is in the way.
    """
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        pass
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
        path.chmod(0o666)
        return _listening(sock)
    except OSError:
        sock.close()
        raise


def listen_vsock(port: int) -> socket.socket:
    """The guests' socket: `port` on every CID of this host.

    Raises:
        OSError: no vsock here, or the port is taken.
    """
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        sock.bind((socket.VMADDR_CID_ANY, port))
        return _listening(sock)
    except OSError:
        sock.close()
        raise


def _listening(sock: socket.socket) -> socket.socket:
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def accept(listener: socket.socket) -> Iterator[tuple[socket.socket, Caller]]:
    """The connections that wait, with their callers; those of nobody are closed here.

    Raises:
        ExhaustedError: no descriptor or memory for another connection; it still waits.
    """
    for _ in range(ACCEPTS_PER_TURN):
        try:
            sock, address = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise ExhaustedError(error.strerror) from error
            continue  # the peer went (ECONNABORTED)
        caller = unix_caller(sock) if sock.family == socket.AF_UNIX else vsock_caller(address)
        if caller is None:
            sock.close()
        else:
            yield sock, caller


def unix_caller(sock: socket.socket) -> Caller | None:
    try:
        peer = peer_of(sock)
    except OSError:
        return None
    # 0: a process outside this pid namespace.
    return Caller(cid=0, pid=peer.pid, uid=peer.uid) if peer.pid > 0 else None


def vsock_caller(address: tuple[int, int]) -> Caller | None:
    cid = address[0]
    if cid in _NOT_A_GUEST or not 0 <= cid < _CID_ANY:
        return None
    return Caller(cid=cid, pid=0, uid=0)


def watch_process(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends (pidfd_open(2)); None if it has."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
