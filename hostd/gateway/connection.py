"""One guest connection in a worker: socket, TLS and session on the worker's loop.

Never blocks, never waits for a guest: what the guest does not read is bounded, what it does not
send has a deadline. It closes on garbage before TLS, on broken TLS, on a broken session, on a
deadline; a defect of our own is not caught here.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING

from hostd.gateway.limits import CLOSING_S, RECEIVE_BYTES, UNREAD_BYTES
from hostd.gateway.session import Phase, Session
from hostd.gateway.tls import Endpoint, PeerClosedError, TlsError

if TYPE_CHECKING:
    import socket
    import ssl
    from typing import Protocol

    from hostd.gateway.limits import Limits
    from hostd.gateway.requests import Request
    from hostd.ipc.loop import Loop

    class Host(Protocol):
        """What a connection needs of its worker."""

        @property
        def accepts(self) -> bool:
            """Whether the worker has room for another request."""

        def submit(self, connection: Connection, request: Request, credit: int) -> None: ...

        def touched(self, connection: Connection) -> None:
            """It has output, or room again: flush it at the end of this turn."""

        def starved(self, connection: Connection) -> None:
            """It waits for the worker to have room."""

        def closed(self, connection: Connection) -> None: ...


class Connection:
    """Owns the socket from the moment it is made."""

    __slots__ = (
        "_closing_since", "_frame_since", "_frames", "_host", "_last", "_limits", "_loop", "_made",
        "_reading", "_sent_at", "_sock", "_tls", "_unsent", "_watched", "alive", "session",
    )  # fmt: skip

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, limits: Limits, loop: Loop, host: Host, now: float
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._tls = Endpoint(context)
        self._limits = limits
        self._loop = loop
        self._host = host
        self.session = Session(limits)
        self.alive = True
        self._unsent = b""
        self._made = now
        self._last = now
        """When a frame last came or an answer last left."""
        self._frame_since: float | None = None
        """Since when a frame is incomplete."""
        self._frames = 0
        self._sent_at = now
        """When the guest last took bytes, or had none to take."""
        self._closing_since: float | None = None
        self._reading = True
        self._watched = (True, False)
        loop.watch(sock, self._ready)

    # ── Input ─────────────────────────────────────────────────────────────────────────────────────

    def _ready(self, events: int) -> None:
        if events & select.EPOLLIN and self._reading:
            self._receive()
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self.close()
        elif events & select.EPOLLOUT:
            self._host.touched(self)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if not data:
            self.close()
            return
        try:
            plaintext = self._tls.receive(data)
        except PeerClosedError:
            self.close()
            return
        except TlsError:
            # The alert that says why, if there is one.
            self._finish()
            return
        self._host.touched(self)
        if plaintext:
            self.session.feed(plaintext)

    def pump(self, now: float) -> None:
        """Gives the complete frames to the worker while there is room, and decides whether to read on."""
        session = self.session
        if not self.alive or self._closing_since is not None:
            return
        while self._host.accepts:
            taken = session.take()
            if taken is None:
                break
            self._host.submit(self, *taken)
        if session.phase is Phase.CLOSED:
            self._finish()
            return
        accepts = self._host.accepts
        if not accepts:
            self._host.starved(self)
        self._reading = accepts and session.room
        # The clock of an incomplete frame runs only while the guest is the one to act.
        if not (self._reading and session.partial):
            self._frame_since = None
        elif self._frame_since is None or session.frames != self._frames:
            self._frame_since = now
        if session.frames != self._frames:
            self._frames = session.frames
            self._last = now

    # ── Output ────────────────────────────────────────────────────────────────────────────────────

    def flush(self, now: float) -> None:
        """Sends what there is to send, in one call, and watches for what the connection waits for."""
        if not self.alive:
            return
        session = self.session
        if session.has_output:
            self._tls.encrypt(session.output())
            self._last = now
        if not self._unsent:
            self._sent_at = now
        if self._closing_since is not None:
            self._tls.close()
        data = self._unsent + self._tls.outgoing()
        if data:
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close()
                return
            if sent:
                self._sent_at = now
            self._unsent = data[sent:]
        session.unread = len(self._unsent)
        if len(self._unsent) > UNREAD_BYTES or (self._closing_since is not None and not self._unsent):
            self.close()
            return
        if not self._reading and session.room and self._host.accepts and self._closing_since is None:
            self._host.touched(self)
        watched = (self._reading, bool(self._unsent))
        if watched != self._watched:
            self._watched = watched
            self._loop.watch(self._sock, self._ready, read=watched[0], write=watched[1])

    # ── End ───────────────────────────────────────────────────────────────────────────────────────

    def _finish(self) -> None:
        """Says the last words, then closes."""
        if self._closing_since is None:
            self._closing_since = time.monotonic()
            self._reading = False
            self._host.touched(self)

    def expire(self, now: float) -> None:
        """Closes the connection if one of its deadlines has passed (module `limits`)."""
        limits, session = self._limits, self.session
        if self._closing_since is not None:
            late = now - self._closing_since > CLOSING_S
        elif session.phase is Phase.NEW:
            late = now - self._made > limits.handshake_s
        elif self._unsent:
            late = now - self._sent_at > limits.frame_s
        elif self._frame_since is not None:
            late = now - self._frame_since > limits.frame_s
        else:
            late = not session.in_flight and now - self._last > limits.idle_s
        if late:
            self.close()

    def retire(self) -> None:
        """Closes the connection as soon as nothing is in flight."""
        if not self.session.in_flight:
            self._finish()

    def close(self) -> None:
        if self.alive:
            self.alive = False
            self._loop.forget(self._sock)
            self._sock.close()
            self._host.closed(self)
