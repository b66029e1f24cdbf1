"""Whom a client believes to be hostd: always said, never assumed.

`Trust.channel_ca(pem)`: the server's certificate must be issued by this host's channel CA (one of them: a
host's can change). Needs nothing but the standard library; whoever gave the PEM vouches for the host.
`Trust.attested(bundle)`: the host proves, before anything else is said on the connection, with a
TPM quote over its measurements, that the certificate belongs to a measured hostd. Needs `cryptography`.

There is no way to trust nobody in particular.
"""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from guestlib.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from guestlib.attest.bundle import TrustBundle

SERVER_NAME: Final = "hostd.channel"
"""The DNS name in every channel certificate: it names the role, not the host."""


class Trust(ABC):
    """How one connection's host is verified."""

    @abstractmethod
    def context(self) -> ssl.SSLContext:
        """The TLS side of it."""

    @abstractmethod
    def admit(self, leaf_der: bytes, evidence: Callable[[bytes], tuple[bytes, bytes]]) -> None:
        """Called on every new connection, before it is used for anything else.

        Raises:
            VerificationError: the host is not who it should be; the connection is closed.
        """

    @staticmethod
    def channel_ca(pem: str) -> Trust:
        """Pins the channel CA's certificate; of several in a row any will do."""
        return _ChannelCa(pem)

    @staticmethod
    def attested(bundle: TrustBundle) -> Trust:
        """Demands evidence that satisfies the bundle, on every connection."""
        return _Attested(bundle)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


@dataclass(frozen=True, slots=True)
class _ChannelCa(Trust):
    pem: str

    def context(self) -> ssl.SSLContext:
        context = _context()
        try:
            context.load_verify_locations(cadata=self.pem)
        except (ssl.SSLError, ValueError) as error:
            raise VerificationError("channel", f"the channel CA is no PEM certificate: {error}") from error
        return context

    def admit(self, leaf_der: bytes, evidence: Callable[[bytes], tuple[bytes, bytes]]) -> None:
        """TLS has verified the certificate already."""


@dataclass(frozen=True, slots=True)
class _Attested(Trust):
    bundle: TrustBundle

    def context(self) -> ssl.SSLContext:
        # The certificate is judged by `admit`, from the evidence, not by TLS.
        context = _context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def admit(self, leaf_der: bytes, evidence: Callable[[bytes], tuple[bytes, bytes]]) -> None:
        import datetime
        import secrets

        from guestlib.attest.verifier import verify_channel, verify_evidence

        nonce = secrets.token_bytes(32)
        document, log = evidence(nonce)
        now = datetime.datetime.now(datetime.UTC)
        verified = verify_evidence(document, log, bundle=self.bundle, nonce=nonce, now=now)
        verify_channel(verified, leaf_der, now)
