"""A provider's CA and host certificates, good ones and such as differ in one thing."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from guestlib.attest.hostcert import AK_CERTIFICATE_USAGE, IDENTITY, ek_digest, encode_identity
from guestlib.attest.quote import crypto_key
from guestlib.attest.tpm2 import parse_public

DAY = datetime.timedelta(days=1)
STRANGE = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.1"), b"\5\0")


def _usage(*, signs: bool, certifies: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=signs,
        key_cert_sign=certifies,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


@dataclass
class Provider:
    """A CA that certifies hosts."""

    now: datetime.datetime
    name: str = "provider"
    end: datetime.timedelta = 1000 * DAY
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    more: tuple[tuple[x509.ExtensionType, bool], ...] = ()
    """Further extensions of its certificate, and whether they are critical."""
    root: bytes = field(init=False)
    """The CA's certificate, DER."""

    def __post_init__(self) -> None:
        builder = (
            self._builder(self._name, self.key.public_key(), self.now - 10 * DAY, self.now + self.end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=False, certifies=True), critical=True)
        )
        for extension, critical in self.more:
            builder = builder.add_extension(extension, critical=critical)
        self.root = builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)

    @property
    def _name(self) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def _builder(
        self,
        subject: x509.Name,
        key: object,
        start: datetime.datetime,
        end: datetime.datetime,
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)  # type: ignore[arg-type]
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )

    def certificate(
        self,
        ak_public: bytes,
        ek_public: bytes,
        *,
        host: str = "host1.example",
        names: tuple[str, ...] | None = None,
        key_of: bytes | None = None,
        ca: bool = False,
        usage: x509.ObjectIdentifier = AK_CERTIFICATE_USAGE,
        signs: bool = True,
        certifies: bool = False,
        identity: bytes | None = None,
        without: tuple[x509.ObjectIdentifier, ...] = (),
        strange: bool = False,
        filled: int = 0,
        start: datetime.timedelta = -DAY,
        end: datetime.timedelta = DAY,
    ) -> bytes:
        """A host certificate, DER, for these keys (TPM2B_PUBLIC); `key_of`: over the key of another;
        `filled`: with so many bytes that say nothing."""
        key = crypto_key(parse_public(key_of or ak_public))
        tied = encode_identity(ek_digest(ek_public), parse_public(ak_public).name)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        names = (host,) if names is None else names
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=ca, path_length=None), True),
            (_usage(signs=signs, certifies=certifies), True),
            (x509.ExtendedKeyUsage([usage]), False),
            (x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False),
            (x509.UnrecognizedExtension(IDENTITY, tied if identity is None else identity), False),
        ]
        if strange:
            extensions.append((STRANGE, True))
        if filled:
            extensions.append((x509.UnrecognizedExtension(STRANGE.oid, bytes(filled)), False))
        builder = self._builder(subject, key, self.now + start, self.now + end)
        for extension, critical in extensions:
            if extension.oid not in without:
                builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)


SERVER = ExtendedKeyUsageOID.SERVER_AUTH
