"""One connection of a client: socket, TLS 1.3, session, shared by many threads.

No thread of its own: a thread that waits for its answer reads for all the others meanwhile (one
reads at a time), and a thread that cannot send because the host is not reading reads too, so that a
pipeline never stands still. Once anything is wrong the link is dead for all of them, and says why.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from guestlib.attest.steps import Step
from guestlib.errors import ChannelChangedError, HostdError, TransportError, VerificationError
from guestlib.trust import SERVER_NAME
from guestlib.wire.session import ClientSession, Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guestlib.wire.messages import Hello, ReceiptWanted, Result

_OTHER_ISSUER: Final = frozenset({7, 18, 19, 20, 21, 30})
"""Results of X509_verify_cert(3) that say that no trusted CA issued it: a signature that is not the CA's, a
CA that is not known, a key identifier that is another's."""
HOST_CID: Final = 2
"""VMADDR_CID_HOST: the host, seen from a guest (vsock(7))."""
DEFAULT_PORT: Final = 7700
_RECEIVE_BYTES: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Address:
    """Where hostd listens: `vsock:CID:PORT` (default `vsock:2:7700`) or `unix:PATH`."""

    path: str
    """Empty for vsock."""
    cid: int = 0
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ValueError if `text` is no address."""
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls(path=rest)
        if kind == "vsock":
            cid, _, port = rest.partition(":")
            values = int(cid or HOST_CID), int(port or DEFAULT_PORT)
            if all(0 <= value < 2**32 for value in values):
                return cls("", *values)
        raise ValueError(f"not an address: {text!r} (vsock:CID:PORT or unix:PATH)")

    def connect(self, timeout_s: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX if self.path else socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(self.path or (self.cid, self.port))
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        return sock


class Pending:
    """A request on its way; `outcome` is set once, when it is decided."""

    __slots__ = ("id", "link", "outcome", "sent")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.id = 0
        self.outcome: Result | HostdError | None = None
        self.sent = False
        """Whether a byte of it may have reached the host."""


class Link:
    """An open connection. Made by `Link.open`; ends by `close` or by the first failure."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=SERVER_NAME)
        self._session = ClientSession()
        self._pending: dict[int, Pending] = {}
        self._state = threading.Condition(threading.Lock())
        """Guards TLS, the session, `_pending`, `_reading`, `_dead`; never held while waiting."""
        self._send = threading.Lock()
        """Held by the one that sends, so that requests leave in one piece."""
        self._reading = False
        self._dead: HostdError | None = None

    @classmethod
    def open(cls, address: Address, context: ssl.SSLContext, client: str, timeout_s: float) -> Link:
        """Connects, shakes hands and says hello.

        Raises:
            TransportError: any of it failed or took longer than `timeout_s`.
            VerificationError: the certificate is not one that `context` takes (`ChannelChangedError`: it is
                by another CA).
            HostdError: the host refused.
        """
        deadline = time.monotonic() + timeout_s
        try:
            link = cls(address.connect(timeout_s), context)
        except OSError as error:
            raise TransportError(f"cannot connect: {error.strerror or error}") from error
        try:
            link._handshake(deadline)
            with link._state:
                hello = link._session.send_hello(client)
                data = link._encrypt(hello)
            link._write(data, deadline)
            while link._session.phase is Phase.HELLO_SENT:
                link._read_turn(deadline)
        except HostdError:
            link.close()
            raise
        if link._dead is not None:
            raise link._dead
        return link

    @property
    def hello(self) -> Hello:
        hello = self._session.hello
        if hello is None:
            raise TransportError("the connection is not open")
        return hello

    @property
    def peer_certificate(self) -> bytes:
        """The leaf certificate that the host showed, DER."""
        leaf = self._tls.getpeercert(binary_form=True)
        if leaf is None:
            raise TransportError("the host showed no certificate")
        return leaf

    # ── Requests ──────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        operation: str,
        args: Mapping[str, Any],
        *,
        receipt: ReceiptWanted,
        deadline_ms: int,
        timeout_s: float,
    ) -> Pending:
        """Sends a request and does not wait for its answer.

        Raises:
            MalformedError: it does not fit a frame; nothing was sent.
            TransportError: the link is dead or the host does not read. `Pending` is of no use then.
        """
        deadline = time.monotonic() + timeout_s
        pending = Pending(self)
        with self._send:
            with self._state:
                self._raise_if_dead()
                pending.id, frame = self._session.send_request(
                    operation, args, receipt=receipt, deadline_ms=deadline_ms
                )
                self._pending[pending.id] = pending
                data = self._encrypt(frame)
            pending.sent = True
            self._write(data, deadline)
        return pending

    def wait(self, pending: Pending, timeout_s: float) -> Result:
        """The answer to `pending`; reads for everybody while it waits.

        Raises:
            HostdError: the host's error for this request, or the link's end.
            TransportError: it did not come in `timeout_s`; it may still come, and is then dropped.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with self._state:
                while pending.outcome is None and self._reading:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._state.wait(left):
                        break
                outcome = pending.outcome
                if outcome is None and time.monotonic() < deadline and not self._reading:
                    self._reading = True
                elif outcome is None:
                    raise TransportError("no answer in time")
            if outcome is not None:
                if isinstance(outcome, HostdError):
                    raise outcome
                return outcome
            try:
                self._read_turn(deadline, pending)
            finally:
                with self._state:
                    self._reading = False
                    self._state.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a request waits for its answer here."""
        with self._state:
            return bool(self._pending)

    @property
    def usable(self) -> bool:
        """Whether the next request may go here; notices an end that came while nobody read."""
        with self._state:
            if self._dead is not None or self._reading:
                return self._dead is None
            self._reading = True
        try:
            while self._dead is None and _ready(self._sock, select.POLLIN, 0):
                self._read()
        finally:
            with self._state:
                self._reading = False
                self._state.notify_all()
        return self._dead is None

    # ── Input ─────────────────────────────────────────────────────────────────────────────────────

    def _read_turn(self, deadline: float, pending: Pending | None = None) -> None:
        """Reads until `pending` is decided (or once, if there is none), the deadline, or the end."""
        while self._dead is None:
            if not _ready(self._sock, select.POLLIN, deadline - time.monotonic()):
                if pending is None:
                    raise TransportError("the host does not answer")
                return
            self._read()
            if pending is None or pending.outcome is not None:
                return

    def _read(self) -> None:
        """Takes what has arrived and decides the requests that it answers."""
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._die(TransportError(f"connection lost: {error.strerror}"))
            return
        try:
            with self._state:
                if not data:
                    raise TransportError("the host closed the connection")
                self._incoming.write(data)
                for answer in self._session.receive(self._decrypt()):
                    self._pending.pop(answer.id).outcome = answer.outcome
                self._state.notify_all()
        except ssl.SSLError as error:
            self._die(TransportError(f"TLS: {error.reason}"))
        except HostdError as error:
            self._die(error)

    def _decrypt(self) -> bytes:
        parts: list[bytes] = []
        try:
            while part := self._tls.read(_RECEIVE_BYTES):
                parts.append(part)
        except ssl.SSLWantReadError:
            return b"".join(parts)
        if not parts:
            raise TransportError("the host closed the connection")
        return b"".join(parts)

    # ── Output ────────────────────────────────────────────────────────────────────────────────────

    def _encrypt(self, data: bytes) -> bytes:
        self._tls.write(data)
        return self._outgoing.read()

    def _write(self, data: bytes, deadline: float) -> None:
        """Sends all of it; a part of a request would leave the connection useless."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
                continue
            except BlockingIOError:
                pass
            except OSError as error:
                self._die(TransportError(f"connection lost: {error.strerror}"))
            self._raise_if_dead()
            if not self._wait_to_send(deadline - time.monotonic()):
                self._die(TransportError("the host does not read"))

    def _wait_to_send(self, left: float) -> bool:
        """Until the socket takes bytes; reads meanwhile, if nobody else does."""
        with self._state:
            leads = not self._reading
            if leads:
                self._reading = True
        try:
            events = _ready(self._sock, select.POLLOUT | (select.POLLIN if leads else 0), left)
            if leads and events & ~select.POLLOUT:
                self._read()
            return bool(events)
        finally:
            if leads:
                with self._state:
                    self._reading = False
                    self._state.notify_all()

    def _handshake(self, deadline: float) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._write(self._outgoing.read(), deadline)
                if not _ready(self._sock, select.POLLIN, deadline - time.monotonic()):
                    raise TransportError("the host does not shake hands") from None
                try:
                    data = self._sock.recv(_RECEIVE_BYTES)
                except OSError as error:
                    raise TransportError(f"connection lost: {error.strerror}") from error
                if not data:
                    raise TransportError("the host closed the connection") from None
                self._incoming.write(data)
            except ssl.SSLCertVerificationError as error:
                raise _not_believed(error) from error
            except ssl.SSLError as error:
                raise TransportError(f"TLS: {error.reason or error}") from error
            else:
                self._write(self._outgoing.read(), deadline)
                return

    # ── End ───────────────────────────────────────────────────────────────────────────────────────

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise TransportError(f"the connection has ended: {self._dead.message}")

    def _die(self, reason: HostdError) -> None:
        """Decides every request that waits: whether the host acted on it is unknown."""
        with self._state:
            if self._dead is None:
                self._dead = reason
                self._session.phase = Phase.CLOSED
                for pending in self._pending.values():
                    pending.outcome = TransportError(f"unanswered: {reason.message}")
                self._pending.clear()
            self._state.notify_all()
        # Wakes a thread that waits in poll; the descriptor is closed by `close` alone.
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        self._die(TransportError("closed by this side"))
        self._sock.close()


def _not_believed(error: ssl.SSLCertVerificationError) -> VerificationError:
    if error.verify_code in _OTHER_ISSUER:
        return ChannelChangedError(
            Step.CHANNEL,
            "not issued by a pinned channel CA: the host's channel CA has changed since it was pinned, or it "
            f"is another host ({error.verify_message})",
        )
    return VerificationError(Step.CHANNEL, error.verify_message)


def _ready(sock: socket.socket, events: int, timeout_s: float) -> int:
    """The events that are there within `timeout_s`; 0 if none."""
    poll = select.poll()
    try:
        poll.register(sock, events)
    except ValueError:  # closed by another thread
        return select.POLLNVAL
    found = poll.poll(max(0.0, timeout_s) * 1000)
    return found[0][1] if found else 0
