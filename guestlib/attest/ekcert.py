"""The endorsement key's certificate: does a TPM maker that we name vouch for this TPM?

X.509 by the field's own rules (TCG EK Credential Profile for TPM Family 2.0, 3.2): an empty subject and a
critical alternative name, extended key usage 2.23.133.8.1, not after 9999-12-31 allowed. What it does
**not** prove is that any attestation key lives in that TPM: the certificate is public.
"""

from __future__ import annotations

import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import verification

from guestlib.attest.quote import crypto_key
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import parse_public
from guestlib.errors import MalformedError, VerificationError

EK_CERTIFICATE_USAGE: Final = x509.ObjectIdentifier("2.23.133.8.1")
MAX_CHAIN_DEPTH: Final = 3


def verify_ek_certificate(
    certificate: bytes,
    ek_public: bytes,
    *,
    roots: tuple[bytes, ...],
    intermediates: tuple[bytes, ...],
    now: datetime.datetime,
) -> None:
    """Checks that a certificate (DER) of one of `roots` (DER) certifies the EK `ek_public` (TPM2B_PUBLIC).

    Raises:
        VerificationError: it does not chain, is not for an EK, is not valid now, or is another key's.
    """
    try:
        leaf = x509.load_der_x509_certificate(certificate)
        store = verification.Store([x509.load_der_x509_certificate(root) for root in roots])
        between = [x509.load_der_x509_certificate(der) for der in intermediates]
        spki = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        ek = crypto_key(parse_public(ek_public))
    except (ValueError, MalformedError) as error:
        raise VerificationError(Step.ENDORSEMENT, f"not readable: {error}") from error
    if spki != ek.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
        raise VerificationError(Step.ENDORSEMENT, "the certificate is of another key than the EK")
    policy = (
        verification.ExtensionPolicy.permit_all()
        .require_present(x509.ExtendedKeyUsage, verification.Criticality.AGNOSTIC, _check_usage)
        .require_present(x509.SubjectAlternativeName, verification.Criticality.AGNOSTIC, None)
    )
    verifier = (
        verification.PolicyBuilder()
        .store(store)
        .time(now)
        .max_chain_depth(MAX_CHAIN_DEPTH)
        .extension_policies(ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(), ee_policy=policy)
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, between)
    except verification.VerificationError as error:
        raise VerificationError(Step.ENDORSEMENT, f"no accepted maker vouches for it: {error}") from error


def _check_usage(
    _policy: verification.Policy, _certificate: x509.Certificate, usage: x509.ExtendedKeyUsage | None
) -> None:
    if usage is None or EK_CERTIFICATE_USAGE not in usage:
        raise ValueError("not a certificate for an endorsement key")
