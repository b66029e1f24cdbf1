"""The host certificate: a provider's word that an attestation key (AK) is in the TPM of its host.

An X.509 certificate over the AK's public key, issued by the provider's CA after the host has opened a
credential (`credential`): its TPM has shown that it holds this AK beside an endorsement key (EK) that a maker
certified. Besides the host's name it carries, in an extension of its own (`IDENTITY`), what ties it to that
TPM: a DER SEQUENCE of two OCTET STRINGs, SHA-256 of the EK's TPMT_PUBLIC (32 bytes) and the AK's Name (34).

It says nothing of what runs on the host: evidence does.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from guestlib.attest.certs import UNREADABLE, Certificate, load_certificate
from guestlib.attest.evidence import MAX_HOST_CERTIFICATE_BYTES
from guestlib.attest.hostname import HOST_NAME
from guestlib.attest.quote import crypto_key
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import parse_public
from guestlib.errors import MalformedError, VerificationError

IDENTITY: Final = x509.ObjectIdentifier("2.25.332324978781190706676737223379945270843")
"""Of the extension; the arc of UUIDs (ITU-T X.667) needs no registration."""
AK_CERTIFICATE_USAGE: Final = x509.ObjectIdentifier("2.23.133.8.3")
"""tcg-kp-AIKCertificate."""
_SIGNED_OVER: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
"""Older versions of `cryptography` verify others too."""
_DIGEST_BYTES: Final = 32
_NAME_BYTES: Final = 34
_HEAD: Final = bytes((0x30, 2 + _DIGEST_BYTES + 2 + _NAME_BYTES, 0x04, _DIGEST_BYTES))
_BETWEEN: Final = bytes((0x04, _NAME_BYTES))
_KNOWN_OF_CA: Final = frozenset({x509.BasicConstraints.oid, x509.KeyUsage.oid})
_KNOWN: Final = _KNOWN_OF_CA | {x509.ExtendedKeyUsage.oid, x509.SubjectAlternativeName.oid}
"""Extensions that are looked at: no other one may be critical."""


@dataclass(frozen=True, slots=True)
class HostCertificate:
    """What a host certificate says."""

    host: str
    ek_digest: bytes
    """SHA-256 of the EK's TPMT_PUBLIC."""
    ak_name: bytes
    issuer: str
    not_before: datetime.datetime
    not_after: datetime.datetime
    loaded: Certificate

    def check_valid(self, now: datetime.datetime) -> None:
        """Checks the period of validity, ends included.

        Raises:
            VerificationError: it is not valid at `now`.
        """
        _check_valid(self.loaded, "the host certificate", now)

    def check_keys(self, ak_public: bytes, ek_public: bytes) -> None:
        """Checks that it is for these keys, TPM2B_PUBLIC.

        Raises:
            VerificationError: it is not.
        """
        try:
            public = parse_public(ak_public)
            key = crypto_key(public)
        except MalformedError as error:
            raise VerificationError(Step.KEY, error.message) from error
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if self.loaded.spki != spki or self.ak_name != public.name:
            raise VerificationError(
                Step.KEY, "the host certificate is of another key than the attestation key"
            )
        if self.ek_digest != ek_digest(ek_public):
            raise VerificationError(Step.KEY, "the host certificate names another endorsement key")


def ek_digest(ek_public: bytes) -> bytes:
    """SHA-256 of the TPMT_PUBLIC in a TPM2B_PUBLIC."""
    return hashlib.sha256(ek_public[2:]).digest()


def encode_identity(digest: bytes, ak_name: bytes) -> bytes:
    """The extension's value.

    Raises:
        ValueError: not 32 bytes and a Name of 34.
    """
    if len(digest) != _DIGEST_BYTES or len(ak_name) != _NAME_BYTES:
        raise ValueError("a digest is 32 bytes and a Name made with SHA-256 is 34")
    return _HEAD + digest + _BETWEEN + ak_name


def read_host_certificate(der: bytes) -> HostCertificate:
    """Reads a certificate of at most one host; neither its signature nor its time is checked.

    Raises:
        VerificationError: it is not one: not readable, too large for evidence, a CA's, for another use, or
                without its extensions.
    """
    if len(der) > MAX_HOST_CERTIFICATE_BYTES:
        raise VerificationError(Step.KEY, f"not a host certificate: over {MAX_HOST_CERTIFICATE_BYTES} bytes")
    loaded = load_certificate(der, Step.KEY)
    try:
        hashed = loaded.certificate.signature_hash_algorithm
        if hashed is not None and not isinstance(hashed, _SIGNED_OVER):
            raise ValueError(f"signed over {hashed.name}")
        _check_use(loaded.extensions)
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (host,) = names.get_values_for_type(x509.DNSName)
        identity = loaded.extensions.get_extension_for_oid(IDENTITY).value
        assert isinstance(identity, x509.UnrecognizedExtension)
        value = identity.value
        digest = value[len(_HEAD) : len(_HEAD) + _DIGEST_BYTES]
        name = value[-_NAME_BYTES:]
        if encode_identity(digest, name) != value or not HOST_NAME.fullmatch(host):
            raise ValueError("its identity extension or its name is not well formed")
        issuer = loaded.certificate.issuer.rfc4514_string()
    except UNREADABLE as error:
        raise VerificationError(Step.KEY, f"not a host certificate: {error}") from error
    certificate = loaded.certificate
    return HostCertificate(
        host=host,
        ek_digest=digest,
        ak_name=name,
        issuer=issuer,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        loaded=loaded,
    )


def _check_use(extensions: x509.Extensions) -> None:
    """Raises: ValueError, ExtensionNotFound."""
    if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise ValueError("it is a CA's")
    usage = extensions.get_extension_for_class(x509.KeyUsage).value
    purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    if not usage.digital_signature or usage.key_cert_sign or list(purposes) != [AK_CERTIFICATE_USAGE]:
        raise ValueError("it is for another use")
    _check_critical(extensions, _KNOWN)


def _check_critical(extensions: x509.Extensions, known: frozenset[x509.ObjectIdentifier]) -> None:
    """Raises: ValueError."""
    strange = [e.oid.dotted_string for e in extensions if e.critical and e.oid not in known]
    if strange:
        raise ValueError(f"critical extension {strange[0]} is not known")


def verify_host_certificate(
    der: bytes,
    *,
    ak_public: bytes,
    ek_public: bytes,
    roots: tuple[bytes, ...],
    hosts: frozenset[str],
    now: datetime.datetime,
) -> HostCertificate:
    """Verifies that one of the CAs `roots` (DER) itself issued a certificate (DER) for these keys
    (TPM2B_PUBLIC), for one of `hosts`, valid now; empty `hosts`: for any.

    The caller has still to see that the EK is the one that the AK is under: a quote says so.

    Raises:
        VerificationError: step 3 does not hold; the text says why.
    """
    certificate = read_host_certificate(der)
    _check_issuer(certificate.loaded, roots, now)
    certificate.check_keys(ak_public, ek_public)
    certificate.check_valid(now)
    if hosts and certificate.host not in hosts:
        raise VerificationError(
            Step.KEY, f"the host certificate is of {certificate.host}, which the bundle does not name"
        )
    return certificate


def _check_issuer(leaf: Certificate, roots: tuple[bytes, ...], now: datetime.datetime) -> None:
    refused = VerificationError(Step.KEY, "no accepted CA issued the host certificate")
    for der in roots:
        root = load_ca(der)
        try:
            leaf.certificate.verify_directly_issued_by(root.certificate)
            _check_valid(root, "the CA of the host certificate", now)
        except UNREADABLE:
            continue
        except VerificationError as error:
            refused = error  # perhaps the same CA is there with a later certificate
            continue
        return
    raise refused


def load_ca(der: bytes) -> Certificate:
    """A certificate (DER) of a CA that may sign certificates for any host.

    Raises:
        VerificationError: it is none, or is bound by what is not looked at (constraints of names).
    """
    root = load_certificate(der, Step.KEY)
    try:
        constraints = root.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = root.extensions.get_extension_for_class(x509.KeyUsage).value
        _check_critical(root.extensions, _KNOWN_OF_CA)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise VerificationError(Step.KEY, f"not a CA certificate: {error}") from error
    if not constraints.ca or not usage.key_cert_sign:
        raise VerificationError(Step.KEY, "not a CA certificate")
    return root


def _check_valid(certificate: Certificate, what: str, now: datetime.datetime) -> None:
    start, end = certificate.certificate.not_valid_before_utc, certificate.certificate.not_valid_after_utc
    if not start <= now <= end:
        raise VerificationError(
            Step.KEY, f"{what} is valid from {start:%Y-%m-%dT%H:%M:%SZ} to {end:%Y-%m-%dT%H:%M:%SZ}, not now"
        )
