"""Verifying a quote: that a TPM's attestation key signed exactly these PCR values and this data.

Needs `cryptography`, no TSS, no I/O. What is refused, in order: a key that could sign anything else
than what its TPM says; a structure that a TPM did not make; a signature of another key, hash or
scheme; other qualifying data; another selection of PCRs; values that are not the signed ones.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import (
    CURVE_P256,
    CURVE_P384,
    Alg,
    Attest,
    Attribute,
    EccKey,
    EcdsaSignature,
    Public,
    RsaKey,
    RsaSignature,
    parse_attest,
    parse_signature,
)
from guestlib.errors import MalformedError, VerificationError

PCR_BYTES: Final = 32
MIN_RSA_BITS: Final = 2048
_CURVES: Final[dict[int, ec.EllipticCurve]] = {CURVE_P256: ec.SECP256R1(), CURVE_P384: ec.SECP384R1()}
_HASHES: Final[dict[Alg, hashes.HashAlgorithm]] = {
    Alg.SHA256: hashes.SHA256(),
    Alg.SHA384: hashes.SHA384(),
    Alg.SHA512: hashes.SHA512(),
}
_AK_MUST: Final = (
    Attribute.FIXED_TPM
    | Attribute.FIXED_PARENT
    | Attribute.SENSITIVE_DATA_ORIGIN
    | Attribute.RESTRICTED
    | Attribute.SIGN
)


@dataclass(frozen=True, slots=True)
class AttestationKey:
    """A public area that was checked to be an attestation key's: made by `attestation_key` only."""

    public: Public
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """The TPM of `signer` (the key's Name) signed that its PCRs had these values."""

    signer: bytes
    attest: Attest
    pcrs: dict[int, bytes]


def crypto_key(public: Public) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    """The key of a public area.

    Raises:
        MalformedError: the point is not on the curve, or the numbers are no RSA key of 2048 bits or more.
    """
    key = public.key
    try:
        if isinstance(key, EccKey):
            x, y = int.from_bytes(key.x, "big"), int.from_bytes(key.y, "big")
            return ec.EllipticCurvePublicNumbers(x, y, _CURVES[key.curve]).public_key()
        assert isinstance(key, RsaKey)
        if len(key.modulus) * 8 < MIN_RSA_BITS:
            raise MalformedError(f"public area: an RSA key of less than {MIN_RSA_BITS} bits")
        return rsa.RSAPublicNumbers(key.exponent, int.from_bytes(key.modulus, "big")).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MalformedError(f"public area: not a key ({error})") from error


def attestation_key(public: Public) -> AttestationKey:
    """Checks that a public area is one that a TPM uses only to sign what the TPM itself says.

    Restricted, signing, not decrypting, made in the TPM and unable to leave it: without any of
    these somebody could have signed a forged attestation with the key.

    Raises:
        VerificationError: an attribute is missing, or the key is not a key.
    """
    attributes = Attribute(public.attributes & int(_AK_MUST | Attribute.DECRYPT))
    missing = _AK_MUST & ~attributes
    if missing:
        raise VerificationError(Step.KEY, f"the key lacks {missing.name}")
    if attributes & Attribute.DECRYPT:
        raise VerificationError(Step.KEY, "the key may decrypt")
    try:
        return AttestationKey(public, crypto_key(public))
    except MalformedError as error:
        raise VerificationError(Step.KEY, error.message) from error


def verify_quote(
    ak: AttestationKey, attest: bytes, signature: bytes, qualifying: bytes, pcrs: Mapping[int, bytes]
) -> VerifiedQuote:
    """Verifies a quote: TPMS_ATTEST and TPMT_SIGNATURE as the TPM gave them.

    `qualifying` is what the TPM was asked to sign along; `pcrs` are the values that are claimed, of the
    SHA-256 bank, 32 bytes each, exactly those that the quote selects.

    Raises:
        VerificationError: something does not hold; `step` tells what.
    """
    try:
        parsed = parse_attest(attest)
        parsed_signature = parse_signature(signature)
    except MalformedError as error:
        raise VerificationError(Step.SIGNATURE, error.message) from error
    _verify_signature(ak, attest, parsed_signature)
    if not hmac.compare_digest(parsed.extra_data, qualifying):
        raise VerificationError(Step.QUALIFYING, "the quote was made for other data")
    verify_pcr_values(parsed, pcrs)
    return VerifiedQuote(ak.public.name, parsed, dict(sorted(pcrs.items())))


def _verify_signature(ak: AttestationKey, attest: bytes, signature: EcdsaSignature | RsaSignature) -> None:
    scheme = Alg.ECDSA if isinstance(signature, EcdsaSignature) else signature.scheme
    public = ak.public
    if scheme is not public.scheme or signature.hash is not public.scheme_hash:
        raise VerificationError(Step.SIGNATURE, "signed with another scheme than the key's")
    algorithm = _HASHES[signature.hash]
    try:
        if isinstance(signature, EcdsaSignature) and isinstance(ak.key, ec.EllipticCurvePublicKey):
            encoded = encode_dss_signature(signature.r, signature.s)
            ak.key.verify(encoded, attest, ec.ECDSA(algorithm))
        elif isinstance(signature, RsaSignature) and isinstance(ak.key, rsa.RSAPublicKey):
            pad: padding.AsymmetricPadding = padding.PKCS1v15()
            if scheme is Alg.RSAPSS:
                pad = padding.PSS(padding.MGF1(algorithm), padding.PSS.AUTO)
            ak.key.verify(signature.signature, attest, pad, algorithm)
        else:
            raise VerificationError(Step.SIGNATURE, "the signature is not of the key's kind")
    except InvalidSignature as error:
        raise VerificationError(Step.SIGNATURE, "the signature is not the attestation key's") from error


def verify_pcr_values(attest: Attest, pcrs: Mapping[int, bytes]) -> None:
    """Checks that `pcrs` are exactly the PCRs and values that a (verified) quote speaks of.

    The digest in a quote is made with the hash of the signing scheme (TPM 2.0 part 3, section 18.4).

    Raises:
        VerificationError: another selection, or other values.
    """
    if tuple(sorted(pcrs)) != attest.selection:
        raise VerificationError(
            Step.DIGEST, f"quoted are PCRs {list(attest.selection)}, shown are {sorted(pcrs)}"
        )
    if any(len(value) != PCR_BYTES for value in pcrs.values()):
        raise VerificationError(Step.DIGEST, "a PCR value is not 32 bytes")
    algorithm = {32: "sha256", 48: "sha384", 64: "sha512"}.get(len(attest.pcr_digest))
    values = b"".join(pcrs[index] for index in attest.selection)
    if algorithm is None or hashlib.new(algorithm, values).digest() != attest.pcr_digest:
        raise VerificationError(Step.DIGEST, "the PCR values are not those that were signed")
