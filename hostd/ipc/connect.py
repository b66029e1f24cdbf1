"""Unix sockets between roles: making listeners, accepting and finding the right peer.

Who may connect is decided by the uid the kernel gives (SO_PEERCRED); the file mode is a second
fence, not the first.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, Final

from hostd.ipc.channel import Channel, Peer, peer_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hostd.ipc.loop import Loop

FIRST_DELAY_S: Final = 0.01
LAST_DELAY_S: Final = 2.0
BACKLOG: Final = 64


def listen(path: Path, *, mode: int, owner: int | None = None) -> socket.socket:
    """A listening unix socket at `path`, replacing a stale one.

    `owner` is the one uid that may connect. Root gives the socket to it; another user cannot, and
    opens the mode instead: the caller checks the peer's uid in any case. The socket appears under
    its name only when mode and owner are right.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        sock.bind(os.fspath(temporary))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.umask(before)
    sock.listen(BACKLOG)
    foreign = owner is not None and owner != os.geteuid()
    temporary.chmod(0o666 if foreign and os.geteuid() != 0 else mode)
    if owner is not None and foreign and os.geteuid() == 0:
        os.chown(temporary, owner, -1)
    temporary.replace(path)
    return sock


def accept(listener: socket.socket) -> tuple[socket.socket, Peer] | None:
    """The next connection and who it is; None if there is none (any more)."""
    try:
        sock, _ = listener.accept()
    except OSError:
        # Nobody there any more, or no descriptor to be had: the peer waits or gives up.
        return None
    try:
        return sock, peer_of(sock)
    except OSError:
        sock.close()
        return None


class Connector:
    """Connects to a role's socket, again and again with a growing, bounded delay.

    A listener of another uid is not the role: it is left, and tried again.
    """

    def __init__(
        self,
        loop: Loop,
        path: Path,
        *,
        uid: int,
        connected: Callable[[Channel[Any]], None],
        record_type: Any = None,
    ) -> None:
        self._loop = loop
        self._path = path
        self._uid = uid
        self._connected = connected
        self._type = record_type
        self._delay = FIRST_DELAY_S

    def start(self) -> None:
        """Tries after the current delay; call it again when the connection is lost."""
        self._loop.call_after(self._delay, self._try)
        self._delay = min(self._delay * 2, LAST_DELAY_S)

    def _try(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(0.2)
            sock.connect(os.fspath(self._path))
            right = peer_of(sock).uid == self._uid
        except OSError:
            right = False
        if not right:
            sock.close()
            self.start()
            return
        self._delay = FIRST_DELAY_S
        self._connected(Channel(sock, self._type))
