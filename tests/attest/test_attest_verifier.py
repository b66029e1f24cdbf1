"""The numbered steps: for each, evidence that fails it alone; and the whole against real quotes."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from support_evidence import HOUR, NONCE, NOW, PCRS, Host, certificate, ima_entry

from guestlib.attest import verifier
from guestlib.attest.ekcert import verify_ek_certificate
from guestlib.attest.evidence import Status, encode_evidence, parse_evidence
from guestlib.attest.steps import Step
from guestlib.attest.verifier import VerifiedEvidence, verify_channel, verify_evidence
from guestlib.errors import ChannelChangedError, VerificationError


def verify(host: Host, evidence: bytes | None = None, **changes: Any) -> VerifiedEvidence:
    arguments = {"bundle": host.bundle(), "nonce": NONCE, "now": NOW} | changes
    log = arguments.pop("log", host.log)
    return verify_evidence(host.evidence() if evidence is None else evidence, log, **arguments)


def refused(step: Step, host: Host, evidence: bytes | None = None, **changes: Any) -> str:
    with pytest.raises(VerificationError) as caught:
        verify(host, evidence, **changes)
    assert caught.value.step == step
    return str(caught.value)


def test_good_evidence_holds(host: Host) -> None:
    evidence = host.evidence()
    verified = verify(host, evidence)
    assert verified.statement == host.statement()
    assert verified.digest == hashlib.sha256(evidence).digest()
    assert verified.ima_entries[0].path == "/usr/bin/qemu-system-x86_64"
    assert tuple(verified.quote.pcrs) == PCRS
    verify_channel(verified, host.leaf(), NOW)


def test_1_format(host: Host) -> None:
    refused(Step.FORMAT, host, b"")
    refused(Step.FORMAT, host, host.evidence() + b" ")


def test_2_nonce(host: Host) -> None:
    refused(Step.NONCE, host, nonce=NONCE[::-1])
    refused(Step.NONCE, host, nonce=b"")
    refused(Step.NONCE, host, host.evidence(nonce=bytes(32)))


def test_3_attestation_key(host: Host) -> None:
    refused(Step.KEY, host, bundle=host.bundle(aks=(host.tpm.record.ek_public,)))
    said = refused(Step.KEY, host, bundle=host.bundle(aks=()))
    assert "pins no attestation key" in said
    # A pinned key that could sign anything: refused for what it is.
    tpm = replace(host.statement().tpm, ak_public=host.tpm.record.srk_public)
    said = refused(
        Step.KEY, host, host.evidence(tpm=tpm), bundle=host.bundle(aks=(host.tpm.record.srk_public,))
    )
    assert "lacks SIGN" in said


def test_3_a_pinned_key_that_is_none(host: Host) -> None:
    tpm = replace(host.statement().tpm, ak_public=b"\0\1x")
    said = refused(Step.KEY, host, host.evidence(tpm=tpm), bundle=host.bundle(aks=(b"\0\1x",)))
    assert "truncated" in said


def test_4_endorsement(host: Host) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    stranger = certificate("maker", other, "maker", other, ca=True)
    said = refused(Step.ENDORSEMENT, host, bundle=host.bundle(ek_roots=(stranger,)))
    assert "no accepted maker" in said
    tpm = host.statement().tpm
    none = host.evidence(tpm=replace(tpm, ek_certificate=None))
    assert "no EK certificate" in refused(Step.ENDORSEMENT, host, none)
    # Without roots in the bundle nothing is asked of it.
    verify(host, none, bundle=host.bundle(ek_roots=()))
    swapped = host.evidence(tpm=replace(tpm, ek_public=host.tpm.record.srk_public))
    assert "another key than the EK" in refused(Step.ENDORSEMENT, host, swapped)
    later = {"now": NOW + datetime.timedelta(days=365 * 30)}
    refused(Step.ENDORSEMENT, host, host.evidence(issued=later["now"]), **later)


def test_4_the_key_must_be_the_eks_child(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of another EK with its public area: all true, but not of the TPM that signs."""
    ek = ec.generate_private_key(ec.SECP256R1())
    numbers = ek.public_key().public_numbers()
    public = bytearray(host.tpm.record.ek_public)
    public[-68:-34] = b"\0\x20" + numbers.x.to_bytes(32, "big")
    public[-34:] = b"\0\x20" + numbers.y.to_bytes(32, "big")
    tpm = replace(host.statement().tpm, ek_public=bytes(public))
    monkeypatch.setattr(verifier, "_verify_endorsement", lambda *_: None)
    assert "not a child of this EK" in refused(Step.ENDORSEMENT, host, host.evidence(tpm=tpm))


def test_5_signature(host: Host) -> None:
    evidence = parse_evidence(host.evidence())
    other = parse_evidence(host.evidence(findings=1))
    mixed = replace(evidence, quote=replace(evidence.quote, signature=other.quote.signature))
    refused(Step.SIGNATURE, host, encode_evidence(mixed))


def test_6_qualifying_data(host: Host) -> None:
    """A true quote of this TPM, for something else."""
    evidence = parse_evidence(host.evidence())
    other = parse_evidence(host.evidence(findings=1))
    refused(Step.QUALIFYING, host, encode_evidence(replace(evidence, quote=other.quote)))


def test_7_pcr_digest(host: Host) -> None:
    evidence = parse_evidence(host.evidence())
    refused(Step.DIGEST, host, encode_evidence(replace(evidence, pcrs=evidence.pcrs | {7: bytes([1]) * 32})))


def test_8_pcr_values(host: Host) -> None:
    seen = host.tpm.read_pcrs((7,))[7]
    wanted = bytes([9]) * 32
    said = refused(Step.PCRS, host, bundle=host.bundle(pcrs=((7, frozenset({wanted})),)))
    assert f"PCR 7: expected {wanted.hex()}, seen {seen.hex()}" in said
    said = refused(Step.PCRS, host, bundle=host.bundle(pcrs=((23, frozenset({wanted})),)))
    assert "PCR 23 is not in the quote" in said


def test_9_ima_log(host: Host) -> None:
    entry, _ = ima_entry("/tmp/rootkit")
    # Longer than the quote: what comes after is left for the next one.
    assert len(verify(host, log=host.log + entry).ima_entries) == 3
    assert len(verify(host, log=host.log + entry[:20]).ima_entries) == 3
    first = len(ima_entry("/usr/bin/qemu-system-x86_64")[0])
    for log in (
        None,
        b"",
        host.log[:first],
        host.log[first:],
        entry + host.log,
        host.log[:first] + entry + host.log[first:],
        host.log.replace(b"/usr/bin/bash", b"/usr/bin/dash"),
        bytes([7]) + host.log[1:],
        b"\xff" * 100,
    ):
        refused(Step.IMA, host, log=log)
    assert "PCR 10 is not in the quote" in refused(Step.IMA, host, host.evidence(selection=(0, 7)))
    assert "no measurement log" not in refused(Step.IMA, host, host.evidence(ima=None))
    # The host stated more entries than lead to the quote.
    ima = host.statement().ima
    assert ima is not None
    refused(Step.IMA, host, host.evidence(ima=replace(ima, entries=4)))


def test_9_the_log_is_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "MAX_LOG_BYTES", len(host.log))
    verify(host)
    refused(Step.IMA, host, log=host.log + b"\0")


def test_9_without_a_log_only_if_the_bundle_says_so(host: Host) -> None:
    bundle = host.bundle(require=frozenset({"files"}))
    for log in (None, b""):
        assert verify(host, log=log, bundle=bundle).ima_entries == ()
        assert verify(host, host.evidence(ima=None), log=log, bundle=bundle).ima_entries == ()
        refused(Step.IMA, host, host.evidence(ima=None), log=log)
    # A log that is shown is checked, whatever is required.
    refused(Step.IMA, host, log=host.log[1:], bundle=bundle)


def test_10_freshness(host: Host) -> None:
    evidence = host.evidence()
    minutes = datetime.timedelta(minutes=5)
    second = datetime.timedelta(seconds=1)
    for now in (NOW - minutes, NOW + minutes):
        verify(host, evidence, now=now)
    for now in (NOW - minutes - second, NOW + minutes + second):
        refused(Step.FRESHNESS, host, evidence, now=now)


def test_11_reference_values(host: Host) -> None:
    refused(Step.REFERENCE, host, host.evidence(reference=bytes(32)))
    assert "are none" in refused(Step.REFERENCE, host, host.evidence(reference=None))
    verify(host, host.evidence(reference=None), bundle=host.bundle(reference=frozenset()))


@pytest.mark.parametrize("status", [Status.DRIFTED, Status.ABSENT, Status.PENDING, None])
def test_12_claims(host: Host, status: Status | None) -> None:
    claims = dict(host.statement().claims)
    if status is None:
        del claims["files"]
    else:
        claims["files"] = status
    assert "files: " in refused(Step.CLAIMS, host, host.evidence(claims=claims))
    verify(host, host.evidence(claims=claims), bundle=host.bundle(require=frozenset({"ima"})))


def test_13_channel_ca(host: Host) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    stranger = certificate("other CA", other, "other CA", other, ca=True)
    assert "not the pinned" in refused(Step.CHANNEL_CA, host, host.evidence(channel_ca=stranger))
    assert "channel CA has changed" in refused(Step.CHANNEL_CA, host, host.evidence(channel_ca=stranger))
    verify(host, host.evidence(channel_ca=stranger), bundle=host.bundle(channel_cas=()))
    for both in ((host.ca, stranger), (stranger, host.ca)):
        verify(host, host.evidence(channel_ca=stranger), bundle=host.bundle(channel_cas=both))
        verify(host, bundle=host.bundle(channel_cas=both))
    open_bundle = {"bundle": host.bundle(channel_cas=())}
    past = certificate("CA", other, "CA", other, ca=True, start=NOW - 2 * HOUR, end=NOW - HOUR)
    plain = certificate("CA", other, "CA", other, ca=True, extensions=False)
    for broken in (past, plain, host.leaf(), b"x", host.ca[:-1], host.ca + b"x"):
        refused(Step.CHANNEL_CA, host, host.evidence(channel_ca=broken), **open_bundle)


def _flipped(der: bytes) -> list[bytes]:
    """The certificate with one bit turned: every byte but the one that counts the unused bits of the
    signature's BIT STRING. That may say that zero bits at the signature's end are unused: the same
    signature, spelled differently."""
    spelling = len(der) - len(x509.load_der_x509_certificate(der).signature) - 1
    return [
        der[:at] + bytes([der[at] ^ bit]) + der[at + 1 :]
        for at in range(len(der))
        for bit in (0x01, 0x08, 0x80)
        if at != spelling
    ]


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_13_a_serial_number_is_positive(host: Host) -> None:
    """The channel CA's own signature proves nothing; what it says must still be well formed."""
    serial = x509.load_der_x509_certificate(host.ca).serial_number
    at = host.ca.index(serial.to_bytes(-(-serial.bit_length() // 8), "big"))
    negative = host.ca[:at] + bytes([host.ca[at] | 0x80]) + host.ca[at + 1 :]
    said = refused(
        Step.CHANNEL_CA, host, host.evidence(channel_ca=negative), bundle=host.bundle(channel_cas=())
    )
    assert "serial" in said


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_14_channel(host: Host) -> None:
    verified = verify(host)
    other = ec.generate_private_key(ec.SECP256R1())
    leaves: dict[str, bytes] = {
        "another CA of that name": certificate("hostd.channel", other, "channel CA", other, ca=False),
        "another CA": certificate("hostd.channel", other, "other CA", other, ca=False),
        "self-signed": certificate("hostd.channel", other, "hostd.channel", other, ca=False),
        "a client's": host.leaf(server=False),
        "a CA's": host.leaf(ca=True),
        "anything's": host.leaf(extensions=False),
        "the CA itself": host.ca,
        "over": host.leaf(start=NOW - 2 * HOUR, end=NOW - HOUR),
        "not yet": host.leaf(start=NOW + HOUR, end=NOW + 2 * HOUR),
        "nothing": b"",
        "cut": host.leaf()[:-1],
    }
    leaf = host.leaf()
    verify_channel(verified, leaf, NOW)
    leaves |= {f"flip {number}": broken for number, broken in enumerate(_flipped(leaf))}
    for name, der in leaves.items():
        with pytest.raises(VerificationError) as caught:
            verify_channel(verified, der, NOW)
        assert caught.value.step == Step.CHANNEL, name
        if name in ("another CA of that name", "another CA", "self-signed"):
            assert isinstance(caught.value, ChannelChangedError), name
            assert "channel CA has changed" in str(caught.value)
        elif "flip" not in name and name != "the CA itself":
            assert not isinstance(caught.value, ChannelChangedError), name


def _paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [prefix]
    return [path for key in value for path in _paths(value[key], (*prefix, key))]


def test_no_field_can_be_altered(host: Host) -> None:
    """Each field, taken from another true evidence of the same host, or altered plausibly."""
    fields = json.loads(host.evidence())
    # A bundle that leaves out all it may: what is left is what the TPM signed.
    bundle = host.bundle(
        ek_roots=(), channel_cas=(), pcrs=(), reference=frozenset(), require=frozenset({"guests"})
    )
    verify(host, json.dumps(fields, sort_keys=True, separators=(",", ":")).encode(), bundle=bundle)
    count = 0
    for path in _paths(fields):
        for alter in ALTERATIONS:
            changed = json.loads(json.dumps(fields))
            inner = changed
            for step in path[:-1]:
                inner = inner[step]
            before = inner[path[-1]]
            inner[path[-1]] = alter(before)
            if inner[path[-1]] == before:
                continue
            count += 1
            with pytest.raises(VerificationError):
                verify(
                    host,
                    json.dumps(changed, sort_keys=True, separators=(",", ":")).encode(),
                    bundle=bundle,
                    log=None,
                )
    assert count > 60


def _character(value: Any, at: int) -> Any:
    if not isinstance(value, str) or len(value) <= abs(at):
        return value
    return value[:at] + ("1" if value[at] != "1" else "2") + value[at + 1 :]


ALTERATIONS: tuple[Callable[[Any], Any], ...] = (
    lambda value: None,
    lambda value: value + 1 if isinstance(value, int) else value,
    lambda value: {"verified": "drifted", "open": "closed"}.get(value, value),
    lambda value: _character(value, 0),
    lambda value: _character(value, 5),
    lambda value: _character(value, 20),
    lambda value: _character(value, 40),
)


# ── EK certificates ───────────────────────────────────────────────────────────────────────────────


def _ek(host: Host, **changes: Any) -> None:
    record = host.tpm.record
    arguments: dict[str, Any] = {"roots": (host.ek_root,), "intermediates": (), "now": NOW}
    certificate_, public = (
        changes.pop("certificate", record.ek_certificate),
        changes.pop("public", record.ek_public),
    )
    verify_ek_certificate(certificate_, public, **(arguments | changes))


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_ek_certificate(host: Host) -> None:
    _ek(host)
    der = host.tpm.record.ek_certificate
    assert der is not None
    key = ec.generate_private_key(ec.SECP256R1())
    broken: list[dict[str, Any]] = [
        {"certificate": b""},
        {"certificate": der[:-1]},
        {"certificate": der + b"\xff"},
        {"certificate": host.ek_root},
        {"certificate": host.ca},
        {"public": host.tpm.record.ak_public},
        {"public": b""},
        {"roots": (b"x",)},
        {"roots": (host.ca,)},
        {"roots": (certificate("hostd embedded TPM maker", key, "hostd embedded TPM maker", key, ca=True),)},
        {"now": NOW - datetime.timedelta(days=1)},
    ]
    broken += [{"certificate": flipped} for flipped in _flipped(der)]
    for changes in broken:
        with pytest.raises(VerificationError) as caught:
            _ek(host, **changes)
        assert caught.value.step == Step.ENDORSEMENT


def test_an_ek_certificate_needs_its_usage(host: Host) -> None:
    """A certificate for a server, of the same CA and the same key, is no EK certificate."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import ExtendedKeyUsageOID

    from guestlib.attest.quote import crypto_key
    from guestlib.attest.tpm2 import parse_public

    key = ec.generate_private_key(ec.SECP256R1())
    root = certificate("maker", key, "maker", key, ca=True)
    ca = x509.load_der_x509_certificate(root)
    for usage, holds in (("2.23.133.8.1", True), (ExtendedKeyUsageOID.SERVER_AUTH.dotted_string, False)):
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(ca.subject)
            .public_key(crypto_key(parse_public(host.tpm.record.ek_public)))
            .serial_number(1)
            .not_valid_before(NOW - HOUR)
            .not_valid_after(NOW + HOUR)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("tpm")]), critical=True)
            .add_extension(x509.ExtendedKeyUsage([x509.ObjectIdentifier(usage)]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
            .public_bytes(Encoding.DER)
        )
        if holds:
            _ek(host, certificate=leaf, roots=(root,))
            continue
        with pytest.raises(VerificationError, match="no accepted maker"):
            _ek(host, certificate=leaf, roots=(root,))
