"""Loading X.509 certificates so that nothing but a `VerificationError` comes of a bad one.

`cryptography` parses lazily and has an exception of its own for many things; here a certificate is
parsed to the end: dates, extensions and key, once.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from guestlib.attest.steps import Step
from guestlib.errors import VerificationError

UNREADABLE: Final = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` raises about a certificate that is not good."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that was parsed to the end. Nothing in it is verified."""

    certificate: x509.Certificate
    extensions: x509.Extensions
    spki: bytes
    """SubjectPublicKeyInfo, DER."""

    def check_valid(self, now: datetime.datetime, step: Step) -> None:
        """Checks the period of validity, ends included.

        Raises:
            VerificationError: it is not valid at `now`.
        """
        start, end = self.certificate.not_valid_before_utc, self.certificate.not_valid_after_utc
        if not start <= now <= end:
            raise VerificationError(
                step, f"valid from {start:%Y-%m-%dT%H:%M:%SZ} to {end:%Y-%m-%dT%H:%M:%SZ}, not now"
            )


def load_certificate(der: bytes, step: Step) -> Certificate:
    """Parses one certificate, DER.

    Raises:
        VerificationError: it is not one, or holds what cannot be read.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        if certificate.serial_number <= 0:
            raise ValueError("the serial number is not positive")
        # DER has the year 0, which `datetime` has not.
        _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        spki = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return Certificate(certificate, certificate.extensions, spki)
    except UNREADABLE as error:
        raise VerificationError(step, f"not a readable certificate: {error}") from error
