"""What a client asks of the host itself: how it is, and who it is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from guestlib.errors import ChannelChangedError, TransportError
from guestlib.wire import messages

if TYPE_CHECKING:
    from guestlib.link import Link
    from guestlib.trust import Trust

MAX_LOG_BYTES: Final = 256 << 20
"""The longest IMA log taken from a host."""

R = TypeVar("R", bound=messages.Result)


class HostOperations:
    """Needs what is named here of `Client`."""

    _trust: Trust
    _timeout_s: float

    def _call(self, kind: type[R], operation: str, **args: Any) -> R:
        raise NotImplementedError

    def _connected(self, until: float) -> Link:
        raise NotImplementedError

    def _leave(self, link: Link) -> None:
        raise NotImplementedError

    def health(self) -> messages.Health:
        """Works when the host has drifted, to say why."""
        return self._call(messages.Health, "Health")

    def attest(self) -> None:
        """Has the host prove itself anew, as it did when the connection began.

        If its channel CA has changed since, this connection is given up for a new one, which proves itself
        from the start; requests that wait on the old one are answered there. A pinned channel CA proves
        nothing more once the connection stands: then this does nothing.

        Raises:
            VerificationError: the host is not who it should be.
            TransportError: no connection, or no answer in time.
        """
        until = time.monotonic() + self._timeout_s
        link = self._connected(until)
        try:
            self._trust.admit(link.peer_certificate, lambda nonce: fetch_evidence(link, nonce, until))
        except ChannelChangedError:
            self._leave(link)
            self._connected(until)

    def evidence(self, nonce: bytes) -> tuple[bytes, bytes]:
        """Fresh evidence over `nonce` and the IMA log it speaks of, unverified (`guestlib.attest`)."""
        until = time.monotonic() + self._timeout_s
        return fetch_evidence(self._connected(until), nonce, until)

    def peer_certificate(self) -> bytes:
        """The leaf certificate of the present connection, DER. Fresh evidence may name a later channel CA
        than the one that issued it (`ChannelChangedError`): `attest` connects again then."""
        return self._connected(time.monotonic() + self._timeout_s).peer_certificate


def fetch_evidence(link: Link, nonce: bytes, until: float) -> tuple[bytes, bytes]:
    """Evidence and log over one connection.

    Raises:
        TransportError: the log is over the limit, or shorter than the evidence says.
    """

    def ask(kind: type[R], operation: str, **args: Any) -> R:
        left = until - time.monotonic()
        if left <= 0:
            raise TransportError("no answer in time")
        pending = link.submit(operation, args, receipt="none", deadline_ms=0, timeout_s=left)
        result = link.wait(pending, left)
        if not isinstance(result, kind):
            raise TransportError("the host's answer has an unexpected shape")
        return result

    evidence = ask(messages.Evidence, "GetEvidence", nonce=nonce)
    if evidence.log_bytes > MAX_LOG_BYTES:
        raise TransportError("the host's measurement log is over the limit")
    log = bytearray()
    while len(log) < evidence.log_bytes:
        chunk = ask(messages.EvidenceChunk, "GetEvidenceLog", offset=len(log))
        if not chunk.data:
            raise TransportError("the host's measurement log ends before its length")
        log += chunk.data
    # The log grows while it is fetched; the evidence speaks of its first part.
    return evidence.evidence, bytes(log[: evidence.log_bytes])
