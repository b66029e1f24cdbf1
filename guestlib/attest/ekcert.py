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

from guestlib.attest.certs import UNREADABLE, load_certificate
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
    leaf = load_certificate(certificate, Step.ENDORSEMENT)
    accepted = [load_certificate(root, Step.ENDORSEMENT).certificate for root in roots]
    between = [load_certificate(der, Step.ENDORSEMENT).certificate for der in intermediates]
    try:
        ek = crypto_key(parse_public(ek_public))
    except MalformedError as error:
        raise VerificationError(Step.ENDORSEMENT, error.message) from error
    if leaf.spki != ek.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
        raise VerificationError(Step.ENDORSEMENT, "the certificate is of another key than the EK")
    policy = (
        verification.ExtensionPolicy.permit_all()
        .require_present(x509.ExtendedKeyUsage, verification.Criticality.AGNOSTIC, _check_usage)
        .require_present(x509.SubjectAlternativeName, verification.Criticality.AGNOSTIC, None)
    )
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(accepted))
        .time(now)
        .max_chain_depth(MAX_CHAIN_DEPTH)
        .extension_policies(ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(), ee_policy=policy)
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf.certificate, between)
    except (verification.VerificationError, *UNREADABLE) as error:
        raise VerificationError(Step.ENDORSEMENT, f"no accepted maker vouches for it: {error}") from error


def _check_usage(
    _policy: verification.Policy, _certificate: x509.Certificate, usage: x509.ExtendedKeyUsage | None
) -> None:
    if usage is None or EK_CERTIFICATE_USAGE not in usage:
        raise ValueError("not a certificate for an endorsement key")
