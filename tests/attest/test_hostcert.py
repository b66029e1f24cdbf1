"""Step 3 by certificate: whose quote it is, as a provider says it, and nothing that only looks like it."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from support_evidence import NONCE, NOW, Host, certificate

from guestlib.attest.bundle import TrustBundle, encode_bundle, parse_bundle
from guestlib.attest.evidence import (
    MAX_HOST_CERTIFICATE_BYTES,
    encode_evidence,
    encode_statement,
    parse_evidence,
)
from guestlib.attest.hostcert import IDENTITY, encode_identity, read_host_certificate
from guestlib.attest.quote import crypto_key
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import parse_public
from guestlib.attest.verifier import VerifiedEvidence, verify_evidence
from guestlib.errors import MalformedError, VerificationError
from hostd.platform import swtpm
from hostd.platform.tpm_files import TpmRecord
from hostd.platform.tpm_provision import provision
from hostd.platform.tpm_tcti import SocketLink
from tests.support.hostcerts import DAY, SERVER, STRANGE, Provider


@pytest.fixture(scope="module")
def provider() -> Provider:
    return Provider(NOW)


@pytest.fixture(scope="module")
def other_record(tmp_path_factory: pytest.TempPathFactory) -> TpmRecord:
    """The keys of another machine's TPM."""
    folder: Path = tmp_path_factory.mktemp("other")
    swtpm.manufacture(folder / "state", now=NOW)
    running = swtpm.start(folder / "state", folder / "sock")
    try:
        return provision(partial(SocketLink, running.socket), command_s=20)
    finally:
        running.stop()


def issued(host: Host, provider: Provider, /, **deviations: Any) -> bytes:
    record = host.tpm.record
    return provider.certificate(
        deviations.pop("ak", record.ak_public), deviations.pop("ek", record.ek_public), **deviations
    )


def with_certificate(host: Host, der: bytes | None, **tpm: Any) -> bytes:
    return host.evidence(tpm=replace(host.statement().tpm, host_certificate=der, **tpm))


def verify(host: Host, evidence: bytes, provider: Provider, **changes: Any) -> VerifiedEvidence:
    now = changes.pop("now", NOW)
    bundle = host.bundle(**({"aks": (), "host_roots": (provider.root,)} | changes))
    return verify_evidence(evidence, host.log, bundle=bundle, nonce=NONCE, now=now)


def refused(host: Host, der: bytes | None, provider: Provider, **changes: Any) -> str:
    """What step 3 says. The evidence itself is the host's, truly quoted."""
    with pytest.raises(VerificationError) as caught:
        verify(host, with_certificate(host, der), provider, **changes)
    assert caught.value.step == Step.KEY
    return str(caught.value)


def test_a_certified_key_is_accepted(host: Host, provider: Provider) -> None:
    evidence = with_certificate(host, issued(host, provider))
    verified = verify(host, evidence, provider)
    assert verified.certificate is not None
    assert verified.certificate.host == "host1.example"
    assert verified.certificate.ak_name == host.tpm.record.ak_name
    assert verified.key_trust == "certified for host1.example by CN=provider until 2026-02-01"
    # Whether makers are named too, or the host.
    verify(host, evidence, provider, ek_roots=())
    verify(host, evidence, provider, hosts=frozenset({"host1.example", "host2.example"}))
    # One of several CAs; the same CA with an older certificate before it.
    stranger = Provider(NOW)
    over = replace(provider, end=-DAY)
    verify(host, evidence, provider, host_roots=(stranger.root, over.root, provider.root))


def test_pinned_or_certified(host: Host, provider: Provider, other_record: TpmRecord) -> None:
    """Either is enough, and a certificate is not looked at where the key is pinned."""
    pinned = host.bundle().aks
    for der in (None, b"nonsense", issued(host, provider)):
        verified = verify(host, with_certificate(host, der), provider, aks=pinned)
        assert verified.certificate is None
        assert verified.key_trust == "pinned by the bundle"
    others = (other_record.ak_public,)
    assert verify(host, with_certificate(host, issued(host, provider)), provider, aks=others).certificate
    assert "is not pinned, and the host shows no certificate" in refused(host, None, provider, aks=others)
    assert "shows no certificate" in refused(host, None, provider)
    said = refused(host, issued(host, provider), provider, aks=others, host_roots=())
    assert "not one that the trust bundle pins" in said


def test_of_another_provider(host: Host, provider: Provider) -> None:
    assert "no accepted CA issued" in refused(host, issued(host, Provider(NOW)), provider)
    key = ec.generate_private_key(ec.SECP256R1())
    impostor = Provider(NOW, name=provider.name, key=key)
    assert "no accepted CA issued" in refused(host, issued(host, impostor), provider)


def test_over_or_not_yet(host: Host, provider: Provider) -> None:
    """An expired host certificate; its last second is still good."""
    for start, end in ((-3 * DAY, -DAY), (DAY, 3 * DAY)):
        said = refused(host, issued(host, provider, start=start, end=end), provider)
        assert "the host certificate is valid from" in said
        assert "not now" in said
    last = with_certificate(host, issued(host, provider, end=datetime.timedelta()))
    verify(host, last, provider)
    with pytest.raises(VerificationError, match="not now"):
        verify(host, last, provider, now=NOW + datetime.timedelta(seconds=1))


def test_a_ca_that_is_over(host: Host, provider: Provider) -> None:
    over = replace(provider, end=-DAY)
    said = refused(host, issued(host, provider), provider, host_roots=(over.root,))
    assert "the CA of the host certificate is valid from" in said


def test_of_another_host(host: Host, provider: Provider, other_record: TpmRecord) -> None:
    """Another host's true certificate does not make its keys ours."""
    theirs = issued(
        host, provider, ak=other_record.ak_public, ek=other_record.ek_public, host="host2.example"
    )
    assert "of another key than the attestation key" in refused(host, theirs, provider)
    # Its own, under a name that the bundle does not have.
    named = {"hosts": frozenset({"host2.example"})}
    said = refused(host, issued(host, provider), provider, **named)
    assert "of host1.example, which the bundle does not name" in said


def test_over_another_key(host: Host, provider: Provider, other_record: TpmRecord) -> None:
    """The right names, and the public key of another: and the other way round."""
    said = refused(host, issued(host, provider, key_of=other_record.ak_public), provider)
    assert "of another key than the attestation key" in said
    identity = encode_identity(bytes(32), other_record.ak_name)
    said = refused(host, issued(host, provider, identity=identity), provider)
    assert "of another key than the attestation key" in said


def test_of_another_endorsement_key(host: Host, provider: Provider, other_record: TpmRecord) -> None:
    said = refused(host, issued(host, provider, ek=other_record.ek_public), provider)
    assert "names another endorsement key" in said
    # The host shows the EK that the certificate names: its quote says which one it is really under.
    lying = with_certificate(
        host, issued(host, provider, ek=other_record.ek_public), ek_public=other_record.ek_public
    )
    with pytest.raises(VerificationError, match="not a child of this EK") as caught:
        verify(host, lying, provider, ek_roots=())
    assert caught.value.step == Step.KEY


def test_a_ca_certificate_as_host_certificate(host: Host, provider: Provider) -> None:
    assert "it is a CA's" in refused(host, provider.root, provider)
    assert "it is a CA's" in refused(host, issued(host, provider, ca=True), provider)
    key = ec.generate_private_key(ec.SECP256R1())
    assert "it is a CA's" in refused(host, certificate("x", key, "x", key, ca=True), provider)


@pytest.mark.parametrize(
    ("deviations", "why"),
    [
        ({"usage": SERVER}, "another use"),
        ({"signs": False}, "another use"),
        ({"certifies": True}, "another use"),
        ({"strange": True}, "critical extension 2.25.1 is not known"),
        ({"names": ()}, "not a host certificate"),
        ({"names": ("one", "two")}, "not a host certificate"),
        ({"names": ("-x",)}, "not well formed"),
        ({"identity": b""}, "34"),
        ({"identity": bytes(72)}, "not well formed"),
        ({"identity": encode_identity(bytes(32), bytes(34)) + b"\0"}, "not well formed"),
        ({"without": (IDENTITY,)}, "not a host certificate"),
        ({"without": (x509.BasicConstraints.oid,)}, "not a host certificate"),
        ({"without": (x509.KeyUsage.oid,)}, "not a host certificate"),
        ({"without": (x509.ExtendedKeyUsage.oid,)}, "not a host certificate"),
        ({"without": (x509.SubjectAlternativeName.oid,)}, "not a host certificate"),
    ],
)
def test_what_is_no_host_certificate(
    host: Host, provider: Provider, deviations: dict[str, Any], why: str
) -> None:
    assert why in refused(host, issued(host, provider, **deviations), provider)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_every_flipped_byte(host: Host, provider: Provider) -> None:
    der = issued(host, provider)
    # The byte that counts the unused bits of the signature may say the same in another way.
    spelling = len(der) - len(x509.load_der_x509_certificate(der).signature) - 1
    record = host.tpm.record
    from guestlib.attest.hostcert import verify_host_certificate

    def check(data: bytes) -> None:
        verify_host_certificate(
            data,
            ak_public=record.ak_public,
            ek_public=record.ek_public,
            roots=(provider.root,),
            hosts=frozenset(),
            now=NOW,
        )

    check(der)
    for at in range(len(der)):
        for bit in (0x01, 0x80):
            if at != spelling:
                with pytest.raises(VerificationError) as caught:
                    check(der[:at] + bytes([der[at] ^ bit]) + der[at + 1 :])
                assert caught.value.step == Step.KEY
    for broken in (b"", der[:-1], der + b"\0"):
        with pytest.raises(VerificationError):
            check(broken)


def test_a_date_that_is_none(host: Host, provider: Provider) -> None:
    """The year 0: DER can say it, and no calendar has it. Nobody must have signed it for it to be shown."""
    start, end = 30 * 365 * DAY, 40 * 365 * DAY
    der = issued(host, provider, start=start, end=end)
    for date in (start, end):
        year = f"{(NOW + date).year}".encode()
        broken = der.replace(b"\x18\x0f" + year, b"\x18\x0f0000")
        assert broken != der
        assert "not a readable certificate" in refused(host, broken, provider)
        verify(host, with_certificate(host, broken), provider, aks=host.bundle().aks)
        # A channel CA comes from the host just so.
        with pytest.raises(VerificationError) as caught:
            verify(host, host.evidence(channel_ca=broken), provider, aks=host.bundle().aks, channel_cas=())
        assert caught.value.step == Step.CHANNEL_CA


def test_a_ca_that_is_bound_by_more_than_is_looked_at(host: Host, provider: Provider) -> None:
    """Its critical extensions bind it: a CA for other names certifies no host here."""
    constraints = x509.NameConstraints([x509.DNSName("elsewhere.example")], None)
    for extension, critical in ((constraints, True), (constraints, False), (STRANGE, True), (STRANGE, False)):
        bound = replace(provider, more=((extension, critical),))
        if critical:
            said = refused(host, issued(host, provider), provider, host_roots=(bound.root,))
            assert f"critical extension {extension.oid.dotted_string} is not known" in said
        else:
            verify(host, with_certificate(host, issued(host, provider)), provider, host_roots=(bound.root,))


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_signed_over_a_hash_that_is_not_enough(host: Host, provider: Provider) -> None:
    """A collision would be another host's certificate."""
    with_sha256, with_sha224 = (bytes.fromhex(f"06082a8648ce3d04030{last}") for last in (2, 1))
    der = issued(host, provider)
    assert der.count(with_sha256) == 2
    assert "signed over sha224" in refused(host, der.replace(with_sha256, with_sha224), provider)


def test_a_root_that_is_no_ca(host: Host, provider: Provider) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    for root in (issued(host, provider), certificate("x", key, "x", key, ca=True, extensions=False), b"x"):
        said = refused(host, issued(host, provider), provider, host_roots=(root,))
        assert "not a CA certificate" in said or "not a readable certificate" in said


def test_a_certified_key_must_be_a_tpms(host: Host, provider: Provider) -> None:
    """Even a provider's word does not make a key that could sign anything an attestation key."""
    record = host.tpm.record
    der = issued(host, provider, ak=record.srk_public)
    evidence = with_certificate(host, der, ak_public=record.srk_public)
    with pytest.raises(VerificationError, match="lacks SIGN") as caught:
        verify(host, evidence, provider)
    assert caught.value.step == Step.KEY


def test_the_certificate_is_signed_along(host: Host, provider: Provider) -> None:
    """It is in the statement: one that was put in, exchanged or taken away is found out."""
    one, two = issued(host, provider), issued(host, provider)
    evidence = parse_evidence(with_certificate(host, one))
    for other in (None, two):
        tpm = replace(evidence.statement.tpm, host_certificate=other)
        swapped = replace(evidence, statement=replace(evidence.statement, tpm=tpm))
        with pytest.raises(VerificationError) as caught:
            verify(host, encode_evidence(swapped), provider, aks=host.bundle().aks)
        assert caught.value.step == Step.QUALIFYING


# ── Forms ─────────────────────────────────────────────────────────────────────────────────────────


def test_documents_without_a_certificate_are_what_they_were(host: Host) -> None:
    assert b"host_certificate" not in encode_statement(host.statement())
    fields = json.loads(host.evidence())
    for wrong in (None, "", 1, [], "*"):
        changed = fields | {"tpm": fields["tpm"] | {"host_certificate": wrong}}
        with pytest.raises(MalformedError):
            parse_evidence(json.dumps(changed, sort_keys=True, separators=(",", ":")).encode())


def test_a_documents_certificate_comes_back(host: Host, provider: Provider) -> None:
    der = issued(host, provider)
    data = with_certificate(host, der)
    parsed = parse_evidence(data)
    assert parsed.statement.tpm.host_certificate == der
    assert encode_evidence(parsed) == data
    tpm = host.statement().tpm
    for size in (0, MAX_HOST_CERTIFICATE_BYTES + 1):
        with pytest.raises(ValueError, match=r"host_certificate breaks its limit"):
            replace(host.statement(), tpm=replace(tpm, host_certificate=bytes(size)))


def test_bundles_with_roots(host: Host, provider: Provider) -> None:
    made = TrustBundle(
        require=frozenset({"files"}), host_roots=(provider.root,), hosts=frozenset({"b.example", "a"})
    )
    assert parse_bundle(encode_bundle(made)) == made
    fields = json.loads(encode_bundle(made))
    assert fields["hosts"] == ["a", "b.example"]
    wrong: tuple[dict[str, Any], ...] = (
        {"host_roots": []},
        {"host_roots": ["no PEM"]},
        {"hosts": []},
        {"hosts": ["a b"]},
        {"hosts": ["a."]},
        {"hosts": [""]},
        {"hosts": "a"},
    )
    for change in wrong:
        with pytest.raises(MalformedError, match="trust bundle"):
            parse_bundle(json.dumps(fields | change).encode())
    del fields["host_roots"]
    fields["channel_ca"] = json.loads(encode_bundle(host.bundle()))["channel_ca"]
    with pytest.raises(MalformedError, match="hosts without host_roots"):
        parse_bundle(json.dumps(fields).encode())


def test_the_identity_extension_is_der(host: Host, provider: Provider) -> None:
    read = read_host_certificate(issued(host, provider))
    record = host.tpm.record
    value = encode_identity(read.ek_digest, read.ak_name)
    assert (
        value
        == bytes.fromhex("30460420")
        + parse_public(record.ek_public).name[2:]
        + bytes.fromhex("0422")
        + parse_public(record.ak_public).name
    )
    for digest, name in ((bytes(31), bytes(34)), (bytes(32), bytes(50))):
        with pytest.raises(ValueError, match="32 bytes"):
            encode_identity(digest, name)
    key = crypto_key(parse_public(record.ak_public))
    assert read.loaded.certificate.public_key() == key
