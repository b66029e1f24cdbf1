"""The channel CA: issues the TLS certificate of every worker.

Its key is made once, kept in the store wrapped under ROOT, and its public key's digest is in the
evidence that the TPM signs: that ties the channel a guest sees to the measured host. It stays in memory
when the keys are locked, because a guest must be able to ask why it is refused.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hostd.ipc.serving import ChannelIdentity

if TYPE_CHECKING:
    from hostd.vault.keyring import Keyring
    from hostd.vault.store import Store

SERVER_NAME: Final = "hostd.channel"
LEAF_LIFE: Final = timedelta(hours=24)
"""A worker has one certificate; the gateway starts another worker before it ends."""
CA_LIFE: Final = timedelta(days=3650)
SKEW: Final = timedelta(minutes=5)
"""For guests whose clock is a little behind."""


class ChannelCa:
    """Issues channel certificates; made by `load` when the keys are unlocked."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate_der = certificate.public_bytes(serialization.Encoding.DER)
        self.certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)
        self._certificate = certificate

    def __repr__(self) -> str:
        return "<ChannelCa>"

    @classmethod
    def load(cls, store: Store, keyring: Keyring, now: datetime) -> ChannelCa:
        """The store's CA; made and stored (not yet committed) if there is none.

        Raises:
            primitives.IntegrityError: the stored key was altered or is another host's.
        """
        wrapped, certificate = store.meta("channel_ca_key"), store.meta("channel_ca_certificate")
        if wrapped is not None and certificate is not None:
            der = keyring.unwrap_service_key("channel-ca", wrapped)
            key = serialization.load_der_private_key(der, password=None)
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            return cls(key, x509.load_der_x509_certificate(certificate))
        key = ec.generate_private_key(ec.SECP256R1())
        made = cls(key, _self_signed(key, now))
        der = key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        store.set_meta("channel_ca_key", keyring.wrap_service_key("channel-ca", der))
        store.set_meta("channel_ca_certificate", made.certificate_der)
        return made

    def issue(self, now: datetime) -> ChannelIdentity:
        """A fresh key and a certificate for it: server authentication only, for one day."""
        key = ec.generate_private_key(ec.SECP256R1())
        not_after = now + LEAF_LIFE
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
