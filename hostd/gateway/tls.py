"""TLS 1.3 without a socket: the standard library's `ssl` over memory buffers.

The context takes TLS 1.3 only, no session tickets, no client certificates. The private key comes
from the vault, is loaded through a memory file that is closed at once, and is held by OpenSSL in
this worker alone. One certificate serves one worker for its whole life: its sandbox opens no files,
so a new certificate means a new worker.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from hostd.ipc.serving import ChannelIdentity

_RECORD_BYTES: Final = 16 << 10
"""Plaintext of one TLS record (RFC 8446, section 5.1)."""


class TlsError(Exception):
    """The peer does not speak TLS 1.3 as it should. The connection is of no more use."""


class PeerClosedError(TlsError):
    """The peer ended the TLS session in order."""


def server_context(identity: ChannelIdentity) -> ssl.SSLContext:
    """A context that shows the identity's certificate.

    Raises:
        ssl.SSLError: certificate and key do not load or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    chain = _memory_file(identity.certificate_chain)
    key = _memory_file(identity.private_key)
    try:
        context.load_cert_chain(f"/proc/self/fd/{chain}", f"/proc/self/fd/{key}", password=_no_password)
    finally:
        os.close(chain)
        os.close(key)
    return context


def _no_password() -> str:
    """OpenSSL would ask on the terminal."""
    raise ValueError("the channel key is encrypted")


def _memory_file(content: bytes) -> int:
    fd = os.memfd_create("hostd-channel", os.MFD_CLOEXEC)
    os.write(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


class Endpoint:
    """The server end of one TLS connection: ciphertext in and out, plaintext out and in."""

    __slots__ = ("_buffer", "_incoming", "_outgoing", "_tls", "established")

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._buffer = bytearray(_RECORD_BYTES)
        self.established = False

    def receive(self, ciphertext: bytes | memoryview) -> bytes:
        """Takes bytes from the peer and gives the plaintext that they complete.

        Handshake answers collect in `outgoing`.

        Raises:
            PeerClosedError: close_notify came.
            TlsError: not TLS 1.3, or it was tampered with.
        """
        self._incoming.write(ciphertext)
        try:
            if not self.established:
                self._tls.do_handshake()
                self.established = True
            return self._read()
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLError as error:
            raise TlsError(error.reason or "TLS failed") from None

    def _read(self) -> bytes:
        parts: list[bytes] = []
        view = memoryview(self._buffer)
        while True:
            try:
                # With a buffer it gives a count (the stub says bytes).
                count = cast("int", self._tls.read(_RECORD_BYTES, self._buffer))
            except ssl.SSLWantReadError:
                break
            if not count:
                raise PeerClosedError("closed by the peer")
            parts.append(bytes(view[:count]))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def encrypt(self, plaintext: bytes) -> None:
        """Adds `plaintext` to `outgoing`. Only once established."""
        self._tls.write(plaintext)

    def close(self) -> None:
        """Adds close_notify to `outgoing`, if there is a session to close."""
        if self.established:
            self.established = False
            try:
                self._tls.unwrap()
            except ssl.SSLError:
                return

    def outgoing(self) -> bytes:
        """Ciphertext to be sent."""
        return self._outgoing.read()


def rehearse(context: ssl.SSLContext) -> None:
    """One handshake and one message with itself, in memory: whatever OpenSSL and Python load on
    first use is loaded before the sandbox closes. What it checks is that the key fits the certificate.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.minimum_version = ssl.TLSVersion.TLSv1_3
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    guest = client.wrap_bio(incoming, outgoing, server_hostname="hostd.channel")
    host = Endpoint(context)
    for _ in range(2):
        with contextlib.suppress(ssl.SSLWantReadError):
            guest.do_handshake()
        host.receive(outgoing.read())
        incoming.write(host.outgoing())
    guest.write(b"rehearsal")
    host.receive(outgoing.read())
    host.encrypt(b"rehearsal")
    incoming.write(host.outgoing())
    guest.read(_RECORD_BYTES)
    try:
        Endpoint(context).receive(b"GET / HTTP/1.0\r\n\r\n")
    except TlsError:
        return
