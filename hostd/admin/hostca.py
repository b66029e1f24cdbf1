"""The provider's side of an enrolment: who may have a host certificate, and its issuing.

It needs no vault, no TPM and no configuration, and belongs on the machine that has the CA's key. A host is
challenged only if a maker certified its EK, and if its AK is a key that only a TPM can use, under that EK. It
gets a certificate only if its TPM has opened the challenge: once, and within `MAX_AGE`.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from guestlib.attest.credential import make_credential
from guestlib.attest.ekcert import verify_ek_certificate
from guestlib.attest.hostcert import (
    AK_CERTIFICATE_USAGE,
    IDENTITY,
    ek_digest,
    encode_identity,
    load_ca,
    read_host_certificate,
)
from guestlib.attest.hostname import HOST_NAME
from guestlib.attest.quote import attestation_key, crypto_key, verify_quote
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import RH_ENDORSEMENT, Alg, name_hash, parse_public, qualified_name
from guestlib.errors import ConflictError, DeniedError, MalformedError, VerificationError
from hostd.core import enrolment as docs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestlib.attest.tpm2 import Public

MAX_AGE: Final = timedelta(days=7)
"""From challenge to answer."""
SKEW: Final = timedelta(minutes=5)
"""For verifiers whose clock is a little behind."""


@dataclass(frozen=True, slots=True)
class Ca:
    """The provider's CA. `repr` shows no key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

    def __repr__(self) -> str:
        return "<Ca>"


def certificates(data: bytes) -> tuple[bytes, ...]:
    """The certificates of a file, DER: PEM, one or more, or one in DER.

    Raises:
        MalformedError: it is neither.
    """
    try:
        if b"-----BEGIN" not in data:
            return (x509.load_der_x509_certificate(data).public_bytes(Encoding.DER),)
        return tuple(c.public_bytes(Encoding.DER) for c in x509.load_pem_x509_certificates(data))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MalformedError(f"not certificates: {error}") from error


def is_encrypted(key: bytes) -> bool:
    """Whether a PEM private key needs a passphrase."""
    return b"ENCRYPTED" in key


def read_ca(certificate: bytes, key: bytes, passphrase: bytes | None) -> Ca:
    """The CA of a certificate (PEM or DER) and its private key (PEM).

    Raises:
        MalformedError: they do not read, are not a CA's, or do not belong together.
    """
    found = certificates(certificate)
    if len(found) != 1:
        raise MalformedError("not exactly one CA certificate")
    try:
        loaded = load_ca(found[0])
        private = load_pem_private_key(key, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise MalformedError(f"the CA's key does not read: {error}") from error
    except VerificationError as error:
        raise MalformedError(error.message) from error
    if not isinstance(private, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise MalformedError("the CA's key is neither EC nor RSA")
    if private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) != loaded.spki:
        raise MalformedError("the CA's key is not that of its certificate")
    return Ca(loaded.certificate, private)


def challenge(
    document: bytes,
    *,
    name: str | None,
    ek_roots: Sequence[bytes],
    intermediates: Sequence[bytes],
    now: datetime,
) -> tuple[docs.Challenge, docs.Pending]:
    """Checks a request and makes a challenge: the document for the host, and what is kept for `certify`.

    `name` is the host's in its certificate, as it calls itself if left out. Certificates of makers are DER.

    Raises:
        MalformedError: it is no request, or the name is no host's name.
        VerificationError: no maker vouches for the EK, or the AK is not a TPM's or not under that EK.
    """
    request = docs.parse(document, docs.Request)
    identity = request.identity
    host = identity.host if name is None else name
    if not HOST_NAME.fullmatch(host):
        raise MalformedError(f"{host!r} is no name for a certificate: at most 64 of A-Za-z0-9._-")
    if identity.ek_certificate is None:
        raise VerificationError(Step.ENDORSEMENT, "the host's TPM has no EK certificate")
    verify_ek_certificate(
        identity.ek_certificate,
        identity.ek_public,
        roots=tuple(ek_roots),
        intermediates=tuple(intermediates),
        now=now,
    )
    ek, ak = parse_public(identity.ek_public), parse_public(identity.ak_public)
    _check_key(request, ek, ak)
    secret = os.urandom(docs.SECRET_BYTES)
    credential = make_credential(ek, ak.name, secret)
    made = docs.Challenge(
        format="hostd-host-challenge/1",
        host=host,
        ak_name=ak.name,
        request=docs.digest(document),
        credential=credential.id_object,
        secret=credential.encrypted_secret,
    )
    pending = docs.Pending(
        format="hostd-host-pending/1",
        challenge=docs.digest(docs.encode(made)),
        secret=secret,
        host=host,
        ak_public=identity.ak_public,
        ek_public=identity.ek_public,
        made=int(now.timestamp()),
    )
    return made, pending


def _check_key(request: docs.Request, ek: Public, ak: Public) -> None:
    """The AK is one that only a TPM can use, and it says of itself whose child it is. What it says counts
    once the credential has shown that it is in that TPM: there is no certificate before."""
    key = attestation_key(ak)
    if name_hash(ak.name) is not Alg.SHA256:
        raise VerificationError(Step.KEY, "the attestation key's Name is not made with SHA-256")
    pcrs = {index: request.pcrs[str(index)] for index in range(24) if str(index) in request.pcrs}
    if len(pcrs) != len(request.pcrs):
        raise MalformedError("host request: pcrs: no such PCR")
    quote = verify_quote(key, request.attest, request.signature, request.identity.qualifying(), pcrs)
    child = qualified_name(qualified_name(RH_ENDORSEMENT, ek.name), ak.name)
    if quote.attest.qualified_signer != child:
        raise VerificationError(Step.KEY, "the attestation key is not a child of this EK")


def certify(document: bytes, pending: docs.Pending, ca: Ca, *, days: int, now: datetime) -> bytes:
    """Checks an answer and issues the host certificate, DER. That an answer counts once is the caller's.

    Raises:
        MalformedError: it is no answer.
        ConflictError: it answers another challenge, comes too late, or the CA's certificate ends before.
        DeniedError: it does not show the challenge's secret.
    """
    answer = docs.parse(document, docs.Answer)
    if answer.challenge != pending.challenge:
        raise ConflictError("the answer is to another challenge")
    if not hmac.compare_digest(answer.proof, docs.proof(pending.secret, pending.challenge)):
        raise DeniedError("the answer does not show the challenge's secret")
    made = datetime.fromtimestamp(pending.made, UTC)
    if not -SKEW <= now - made <= MAX_AGE:
        raise ConflictError(f"the challenge is of {made:%Y-%m-%d %H:%M} UTC: make another")
    return _issue(pending, ca, days=days, now=now)


def _issue(pending: docs.Pending, ca: Ca, *, days: int, now: datetime) -> bytes:
    end, last = now + timedelta(days=days), ca.certificate.not_valid_after_utc
    if end > last:
        raise ConflictError(f"the CA's certificate ends on {last:%Y-%m-%d}, before the host's would")
    ak = parse_public(pending.ak_public)
    identity = encode_identity(ek_digest(pending.ek_public), ak.name)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, pending.host)]))
        .issuer_name(ca.certificate.subject)
        .public_key(crypto_key(ak))
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_USAGE, critical=True)
        .add_extension(x509.ExtendedKeyUsage([AK_CERTIFICATE_USAGE]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(pending.host)]), critical=False)
        .add_extension(x509.UnrecognizedExtension(IDENTITY, identity), critical=False)
        .add_extension(_authority(ca), critical=False)
        .sign(ca.key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    read_host_certificate(certificate).check_keys(pending.ak_public, pending.ek_public)
    return certificate


def _authority(ca: Ca) -> x509.AuthorityKeyIdentifier:
    """As the CA's certificate names its key, if it does: other tools compare the two."""
    try:
        named = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(named)


_USAGE: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
