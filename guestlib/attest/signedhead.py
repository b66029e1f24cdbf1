"""A head of the ledger and the TPM's quote that signs it.

As JSON: `{"attest":…,"evidence":…,"pass":7,"pcrs":{"0":…},"root":…,"signature":…,"size":42}`, bytes as
base64. The quote's qualifying data is `binding.pass_qualifying(pass, evidence, size, root)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from guestlib.attest.binding import pass_qualifying
from guestlib.attest.ledgerentry import count, unbase64
from guestlib.attest.quote import AttestationKey, VerifiedQuote, attestation_key, verify_quote
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import MAX_ATTEST_BYTES, MAX_SIGNATURE_BYTES, parse_public
from guestlib.errors import MalformedError, VerificationError

if TYPE_CHECKING:
    from guestlib.attest.bundle import TrustBundle

DIGEST_BYTES: Final = 32
_PCRS: Final = {str(index): index for index in range(24)}


@dataclass(frozen=True, slots=True)
class SignedHead:
    """Parsed and **not** verified.

    Raises:
        ValueError: a field breaks its limit.
    """

    size: int
    root: bytes
    passed: int
    """Number of the pass whose quote it is."""
    evidence: bytes
    attest: bytes
    signature: bytes
    pcrs: dict[int, bytes]

    def __post_init__(self) -> None:
        if not self.size:
            raise ValueError("the head of an empty ledger")
        digests = (self.root, self.evidence, *self.pcrs.values())
        if not self.pcrs or any(len(digest) != DIGEST_BYTES for digest in digests):
            raise ValueError(f"a digest is not {DIGEST_BYTES} bytes")

    @property
    def fields(self) -> dict[str, Any]:
        """As `canonical.canonical` encodes it."""
        return {
            "attest": self.attest,
            "evidence": self.evidence,
            "pass": self.passed,
            "pcrs": {str(index): value for index, value in self.pcrs.items()},
            "root": self.root,
            "signature": self.signature,
            "size": self.size,
        }


def head_of(fields: Any) -> SignedHead:
    """Raises: KeyError, TypeError, ValueError: they are not a head's."""
    if not isinstance(fields, dict) or not isinstance(fields["pcrs"], dict):
        raise TypeError("an object is missing")
    return SignedHead(
        size=count(fields["size"]),
        root=unbase64(fields["root"], DIGEST_BYTES),
        passed=count(fields["pass"]),
        evidence=unbase64(fields["evidence"], DIGEST_BYTES),
        attest=unbase64(fields["attest"], MAX_ATTEST_BYTES),
        signature=unbase64(fields["signature"], MAX_SIGNATURE_BYTES),
        pcrs={_PCRS[name]: unbase64(value, DIGEST_BYTES) for name, value in fields["pcrs"].items()},
    )


def verify_head(head: SignedHead, bundle: TrustBundle) -> VerifiedQuote:
    """One of the bundle's attestation keys quoted this head, with PCR values that the bundle accepts.

    Raises:
        VerificationError: `step` is one of `Step`: KEY, SIGNATURE, QUALIFYING, DIGEST, PCRS.
    """
    quote = _verified_quote(head, bundle)
    for index, accepted in bundle.pcrs:
        seen = quote.pcrs.get(index)
        if seen is None:
            raise VerificationError(Step.PCRS, f"PCR {index} is not in the quote")
        if seen not in accepted:
            raise VerificationError(Step.PCRS, f"PCR {index} is {seen.hex()}: not accepted")
    return quote


def _verified_quote(head: SignedHead, bundle: TrustBundle) -> VerifiedQuote:
    qualifying = pass_qualifying(head.passed, head.evidence, head.size, head.root)
    refused = VerificationError(Step.KEY, "the trust bundle pins no attestation key (aks)")
    for public in bundle.aks:
        try:
            return verify_quote(_key(public), head.attest, head.signature, qualifying, head.pcrs)
        except VerificationError as error:
            if error.step is not Step.SIGNATURE:
                raise
            refused = error  # perhaps it is another one's
    raise refused


@lru_cache(maxsize=64)
def _key(public: bytes) -> AttestationKey:
    """Raises: VerificationError, it is not an attestation key's."""
    try:
        return attestation_key(parse_public(public))
    except MalformedError as error:
        raise VerificationError(Step.KEY, error.message) from error
