"""Verifying a host's evidence, and that a connection ends in that host.

`verify_evidence` does the steps of `steps.Step`, in this order; every error carries its step:

 1. format: the document is in its one canonical form; so is everything inside it.
 2. nonce: it answers this verifier's challenge.
 3. attestation key: it is one of the bundle's, or a host certificate by one of the bundle's CAs is for it
    and for the EK that the quote says it is under; and it has the attributes of a key that only a TPM uses.
 4. endorsement: if the bundle names roots, the EK's certificate chains to one and is the EK's, and
    the attestation key says of itself that it is that EK's child.
 5. quote signature: a TPM structure, signed by that key with its own scheme.
 6. qualifying data: the quote was made for exactly this statement and nonce.
 7. PCR digest: the values shown are the signed ones.
 8. PCR values: those the bundle names are accepted ones.
 9. IMA log: entry by entry it leads to the quoted PCR 10. It may go on beyond that.
10. freshness: issued within `MAX_AGE` before and `MAX_SKEW` after now.
11. reference values: if the bundle names digests, those in force are among them.
12. claims: every required component is `verified`.
13. channel CA: the certificate is a CA's, valid now, and a pinned one if the bundle pins any.

`verify_channel` is step 14. No step is optional for the caller; what the bundle leaves out it leaves out in
writing. Pure: bytes, the bundle, nonce and time come in as arguments.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from cryptography import x509

from guestlib.attest import imalog
from guestlib.attest.binding import evidence_qualifying
from guestlib.attest.bundle import TrustBundle
from guestlib.attest.certs import UNREADABLE, load_certificate
from guestlib.attest.ekcert import verify_ek_certificate
from guestlib.attest.evidence import Evidence, Statement, Status, encode_statement, parse_evidence
from guestlib.attest.hostcert import HostCertificate, verify_host_certificate
from guestlib.attest.quote import VerifiedQuote, attestation_key, verify_quote
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import RH_ENDORSEMENT, parse_public, qualified_name
from guestlib.errors import ChannelChangedError, MalformedError, VerificationError

MAX_AGE: Final = datetime.timedelta(minutes=5)
"""The nonce proves that the quote is fresh; this bounds how far the two clocks may be apart."""
MAX_SKEW: Final = datetime.timedelta(minutes=5)
MAX_LOG_BYTES: Final = 256 << 20
IMA_COMPONENT: Final = "ima"


@dataclass(frozen=True, slots=True)
class VerifiedEvidence:
    """Evidence that holds: made by `verify_evidence` only."""

    statement: Statement
    quote: VerifiedQuote
    ima_entries: tuple[imalog.Entry, ...]
    """The entries that the quoted PCR 10 covers; empty if no log was verified."""
    digest: bytes
    """SHA-256 of the document."""
    channel_ca_key: bytes
    """SHA-256 of the channel CA's SubjectPublicKeyInfo."""
    certificate: HostCertificate | None
    """What vouches for the attestation key; None: the bundle pins it, and no certificate was looked at."""

    @property
    def key_trust(self) -> str:
        """What step 3 rests on, for people."""
        if self.certificate is None:
            return "pinned by the bundle"
        return (
            f"certified for {self.certificate.host} by {self.certificate.issuer} until "
            f"{self.certificate.not_after:%Y-%m-%d}"
        )


def verify_evidence(
    evidence: bytes,
    ima_log: bytes | None,
    *,
    bundle: TrustBundle,
    nonce: bytes,
    now: datetime.datetime,
) -> VerifiedEvidence:
    """Verifies an evidence document.

    `ima_log` is the host's binary measurement log from its first byte; None or empty if there is none at
    hand, which only a bundle that does not require `ima` accepts. `nonce` is the challenge that was sent,
    `now` is UTC.

    Raises:
        VerificationError: `step` and the text say what does not hold.
    """
    try:
        parsed = parse_evidence(evidence)
    except MalformedError as error:
        raise VerificationError(Step.FORMAT, error.message) from error
    statement = parsed.statement
    if not hmac.compare_digest(statement.nonce, nonce):
        raise VerificationError(Step.NONCE, "the evidence answers another challenge")
    certificate = _verify_key(statement, bundle, now)
    quote = _verify_quote(parsed, bundle, nonce, now, certified=certificate is not None)
    _verify_pcrs(quote, bundle)
    entries = _verify_ima(quote, statement, ima_log, bundle)
    if not -MAX_SKEW <= now - statement.issued <= MAX_AGE:
        raise VerificationError(Step.FRESHNESS, f"issued {statement.issued:%Y-%m-%dT%H:%M:%SZ}")
    if bundle.reference and statement.reference not in bundle.reference:
        seen = "none" if statement.reference is None else statement.reference.hex()
        raise VerificationError(Step.REFERENCE, f"the reference values in force are {seen}: not accepted")
    _verify_claims(statement, bundle)
    key = _verify_channel_ca(statement, bundle, now)
    return VerifiedEvidence(statement, quote, entries, hashlib.sha256(evidence).digest(), key, certificate)


def _verify_key(statement: Statement, bundle: TrustBundle, now: datetime.datetime) -> HostCertificate | None:
    """Whose key it is: None if the bundle pins it, else the certificate that says so."""
    if not bundle.aks and not bundle.host_roots:
        raise VerificationError(
            Step.KEY,
            "the trust bundle pins no attestation key (aks) and names no CA for host certificates "
            "(host_roots): nothing says whose quote this is",
        )
    if statement.tpm.ak_public in bundle.aks:
        return None
    if not bundle.host_roots:
        raise VerificationError(Step.KEY, "the attestation key is not one that the trust bundle pins")
    if statement.tpm.host_certificate is None:
        pinned = "is not pinned" if bundle.aks else "would have to be certified"
        raise VerificationError(Step.KEY, f"the attestation key {pinned}, and the host shows no certificate")
    return verify_host_certificate(
        statement.tpm.host_certificate,
        ak_public=statement.tpm.ak_public,
        ek_public=statement.tpm.ek_public,
        roots=bundle.host_roots,
        hosts=bundle.hosts,
        now=now,
    )


def _verify_quote(
    evidence: Evidence, bundle: TrustBundle, nonce: bytes, now: datetime.datetime, *, certified: bool
) -> VerifiedQuote:
    statement = evidence.statement
    try:
        public = parse_public(statement.tpm.ak_public)
        ek_name = parse_public(statement.tpm.ek_public).name
    except MalformedError as error:
        raise VerificationError(Step.KEY, error.message) from error
    ak = attestation_key(public)
    if bundle.ek_roots:
        _verify_endorsement(statement, bundle, now)
    qualifying = evidence_qualifying(nonce, encode_statement(statement))
    quote = verify_quote(ak, evidence.quote.attest, evidence.quote.signature, qualifying, evidence.pcrs)
    child = qualified_name(qualified_name(RH_ENDORSEMENT, ek_name), public.name)
    if (bundle.ek_roots or certified) and quote.attest.qualified_signer != child:
        step = Step.KEY if certified else Step.ENDORSEMENT
        raise VerificationError(step, "the attestation key is not a child of this EK")
    return quote


def _verify_endorsement(statement: Statement, bundle: TrustBundle, now: datetime.datetime) -> None:
    certificate = statement.tpm.ek_certificate
    if certificate is None:
        raise VerificationError(Step.ENDORSEMENT, "the host shows no EK certificate")
    verify_ek_certificate(
        certificate, statement.tpm.ek_public, roots=bundle.ek_roots, intermediates=(), now=now
    )


def _verify_pcrs(quote: VerifiedQuote, bundle: TrustBundle) -> None:
    for index, accepted in bundle.pcrs:
        seen = quote.pcrs.get(index)
        if seen is None:
            raise VerificationError(Step.PCRS, f"PCR {index} is not in the quote")
        if seen not in accepted:
            raise VerificationError(
                Step.PCRS,
                f"PCR {index}: expected {' or '.join(sorted(value.hex() for value in accepted))}, "
                f"seen {seen.hex()}",
            )


def _verify_ima(
    quote: VerifiedQuote, statement: Statement, log: bytes | None, bundle: TrustBundle
) -> tuple[imalog.Entry, ...]:
    if not log:
        if IMA_COMPONENT in bundle.require:
            raise VerificationError(Step.IMA, "the measurement log is missing")
        return ()
    if statement.ima is None:
        raise VerificationError(Step.IMA, "a measurement log of a host that states that it has none")
    if len(log) > MAX_LOG_BYTES:
        raise VerificationError(Step.IMA, f"a measurement log of over {MAX_LOG_BYTES} bytes")
    quoted = quote.pcrs.get(imalog.PCR)
    if quoted is None:
        raise VerificationError(Step.IMA, f"PCR {imalog.PCR} is not in the quote")
    try:
        entries = imalog.parse_entries(log)
    except imalog.MalformedLogError as error:
        raise VerificationError(Step.IMA, str(error)) from error
    return _replayed(entries, quoted, statement.ima.entries)


def _replayed(entries: list[imalog.Entry], quoted: bytes, at_least: int) -> tuple[imalog.Entry, ...]:
    """The entries up to the one after which PCR 10 was quoted: not before those the host stated."""
    pcr = imalog.PCR_START
    if pcr == quoted and not at_least:
        return ()
    for count, entry in enumerate(entries, start=1):
        pcr = imalog.extend(pcr, entry)
        if pcr == quoted and count >= at_least:
            return tuple(entries[:count])
    raise VerificationError(
        Step.IMA, f"no prefix of the {len(entries)} entries leads to the quoted PCR {imalog.PCR}"
    )


def _verify_claims(statement: Statement, bundle: TrustBundle) -> None:
    for component in sorted(bundle.require):
        status = statement.claims.get(component)
        if status is not Status.VERIFIED:
            said = "not in the evidence" if status is None else str(status)
            raise VerificationError(Step.CLAIMS, f"{component}: {said}")


def _verify_channel_ca(statement: Statement, bundle: TrustBundle, now: datetime.datetime) -> bytes:
    if bundle.channel_cas and statement.channel_ca not in bundle.channel_cas:
        raise VerificationError(
            Step.CHANNEL_CA,
            "the channel CA is not the pinned one: the host's channel CA has changed since the trust "
            "bundle was made, or it is another host's",
        )
    ca = load_certificate(statement.channel_ca, Step.CHANNEL_CA)
    ca.check_valid(now, Step.CHANNEL_CA)
    try:
        constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        raise VerificationError(Step.CHANNEL_CA, f"not a CA certificate: {error}") from error
    if not constraints.ca or not usage.key_cert_sign:
        raise VerificationError(Step.CHANNEL_CA, "not a CA certificate")
    return hashlib.sha256(ca.spki).digest()


def verify_channel(verified: VerifiedEvidence, leaf_der: bytes, now: datetime.datetime) -> None:
    """Step 14: the certificate that the TLS peer presented (and proved to hold the key of) was issued by
    the evidence's channel CA, for a server, and is valid now.

    Raises:
        ChannelChangedError: another CA issued it: the connection does not end in the host that gave the
            evidence, or began before that host's channel CA changed. A new connection tells which.
        VerificationError: it is no server's certificate, or not valid now.
    """
    leaf = load_certificate(leaf_der, Step.CHANNEL)
    ca = load_certificate(verified.statement.channel_ca, Step.CHANNEL)
    try:
        leaf.certificate.verify_directly_issued_by(ca.certificate)
    except UNREADABLE as error:
        raise ChannelChangedError(
            Step.CHANNEL,
            "not issued by the channel CA of the evidence: the host's channel CA has changed since this "
            "connection began (connect again), or the connection does not end in that host",
        ) from error
    leaf.check_valid(now, Step.CHANNEL)
    ca.check_valid(now, Step.CHANNEL)
    try:
        constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound as error:
        raise VerificationError(Step.CHANNEL, f"not a server's certificate: {error}") from error
    if constraints.ca or x509.oid.ExtendedKeyUsageOID.SERVER_AUTH not in usage:
        raise VerificationError(Step.CHANNEL, "not a server's certificate")
