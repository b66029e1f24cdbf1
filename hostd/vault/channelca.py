"""A channel CA: issues the TLS certificates of workers.

Which one is in force, and how one follows another, is `hostd.vault.channelkeeper`'s.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hostd.ipc.channel_ca import CaLine
from hostd.ipc.serving import ChannelIdentity
from hostd.vault.evidence import spki_digest
from hostd.vault.primitives import IntegrityError

SERVER_NAME: Final = "hostd.channel"
LEAF_LIFE: Final = timedelta(hours=24)
"""A worker has one certificate; the gateway starts another worker before it ends."""
CA_LIFE: Final = timedelta(days=365)
RENEW_AT: Final = 0.75
"""Of a CA's life: the vault rotates when this part of it is over."""
SKEW: Final = timedelta(minutes=5)
"""For guests whose clock is a little behind."""


class ChannelCa:
    """Issues channel certificates. Made by `make`, or by `read` from what the store keeps."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate_der = certificate.public_bytes(serialization.Encoding.DER)
        self.certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.digest = spki_digest(self.certificate_der)
        self._certificate = certificate

    def __repr__(self) -> str:
        return "<ChannelCa>"

    @classmethod
    def make(cls, now: datetime) -> ChannelCa:
        """A new one, valid from `now` on."""
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(key, _self_signed(key, now))

    @classmethod
    def read(cls, key_der: bytes | bytearray, certificate_der: bytes) -> ChannelCa:
        """Raises: IntegrityError, the certificate was not made by this key, for this key."""
        key = serialization.load_der_private_key(key_der, password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        try:
            certificate = x509.load_der_x509_certificate(certificate_der)
            # The store keeps it in the clear. By its own signature only the key's holder can have made it.
            certificate.verify_directly_issued_by(certificate)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise IntegrityError("the channel CA's certificate was altered") from error
        if certificate.public_key() != key.public_key():
            raise IntegrityError("the channel CA's certificate is another key's")
        return cls(key, certificate)

    @property
    def key_der(self) -> bytes:
        """PKCS #8, in the clear: to be wrapped."""
        return self._key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    @property
    def made(self) -> int:
        """When, by the host's clock; Unix seconds."""
        return int((self._certificate.not_valid_before_utc + SKEW).timestamp())

    def due(self, since: int) -> int:
        """When it is to be renewed, by a clock that showed `since` when it was made; Unix seconds."""
        return since + int(RENEW_AT * (self._certificate.not_valid_after_utc.timestamp() - self.made))

    @property
    def line(self) -> CaLine:
        certificate = self._certificate
        return CaLine(
            digest=self.digest.hex(),
            not_before=int(certificate.not_valid_before_utc.timestamp()),
            not_after=int(certificate.not_valid_after_utc.timestamp()),
        )

    def issue(self, now: datetime) -> ChannelIdentity:
        """A fresh key and a certificate for it: server authentication only, for one day, and not longer
        than the CA itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        not_after = min(now + LEAF_LIFE, self._certificate.not_valid_after_utc)
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(not_after)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return ChannelIdentity(
            certificate_chain=leaf.public_bytes(serialization.Encoding.PEM) + self.certificate_pem,
            private_key=key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
            not_after=int(not_after.timestamp()),
        )


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _self_signed(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"hostd channel CA {os.urandom(8).hex()}")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def utc_now() -> datetime:
    return datetime.now(UTC)
