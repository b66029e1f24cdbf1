"""An enrolment from request to certificate: the vault's desk and its TPM on one side, the provider on the
other; and each way in which one of them could be deceived."""

from __future__ import annotations

import base64
import datetime
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from support_enrolment import NAME, OFFICER, Desk, certified, challenged, maker, now
from support_tpm import Embedded

from guestlib.attest.credential import make_credential
from guestlib.attest.evidence import MAX_HOST_CERTIFICATE_BYTES
from guestlib.attest.hostcert import read_host_certificate, verify_host_certificate
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import parse_public
from guestlib.errors import (
    ConflictError,
    DeniedError,
    MalformedError,
    UnavailableError,
    VerificationError,
)
from hostd.admin import hostca
from hostd.core import enrolment as docs
from hostd.ipc import enrolling as enr
from hostd.platform.hostname import this_host
from hostd.platform.tpm_errors import TpmBlobError
from hostd.platform.tpm_esys import ESYS_TR, Esys
from hostd.platform.tpm_files import write_file
from hostd.platform.tpm_provision import provision
from hostd.vault.enrolment import EnrolmentDesk
from tests.support.hostcerts import DAY, SERVER, Provider


@pytest.fixture(scope="module")
def provider() -> Provider:
    return Provider(now())


@pytest.fixture
def ca(provider: Provider) -> hostca.Ca:
    return hostca.read_ca(provider.root, provider.key_pem, None)


@pytest.fixture
def desk(tmp_path: Path, host: Embedded) -> Iterator[Desk]:
    made = Desk(tmp_path / "state", host)
    yield made
    made.close()


def test_from_request_to_certificate(desk: Desk, ca: hostca.Ca, provider: Provider, tmp_path: Path) -> None:
    record = desk.host.record
    before = desk.ask(enr.ShowHost())
    assert before == enr.HostReport(
        this_host(), record.ak_name.hex(), parse_public(record.ek_public).name[2:].hex(), maker=True
    )
    made = challenged(desk.host, desk.request())
    answer = desk.answer(made.document)
    assert base64.b64encode(made.pending.secret) not in answer
    assert docs.parse(answer, docs.Answer).proof != made.pending.secret
    der = hostca.certify(answer, made.pending, ca, days=30, now=now())
    report = desk.install(der)
    assert (report.certificate, report.certified, report.issuer) == (der, NAME, "CN=provider")
    assert report.valid
    assert report == desk.ask(enr.ShowHost())
    assert 29 * 86_400 < report.not_after - time.time() < 30 * 86_400 + 1
    certificate = verify_host_certificate(
        der,
        ak_public=record.ak_public,
        ek_public=record.ek_public,
        roots=(provider.root,),
        hosts=frozenset({NAME}),
        now=now(),
    )
    assert certificate.ak_name == record.ak_name
    # Who asked, for what, and which certificate came of it.
    answered, installed = desk.recorded
    digest = docs.digest(made.document).hex()
    assert answered == {
        "event": "enrol",
        "principal": OFFICER,
        "subject": "answer",
        "detail": f"challenge {digest}, to certify {NAME}",
    }
    assert (installed["event"], installed["principal"], installed["subject"]) == ("enrol", OFFICER, "install")
    assert docs.digest(der).hex() in installed["detail"]
    # It outlives the vault.
    again = Desk(desk.folder, desk.host)
    assert again.link.host_certificate == der
    again.close()


def test_by_every_kind_of_ca(desk: Desk) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    usage = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    record = desk.host.record
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        root = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now() - DAY)
            .not_valid_after(now() + 100 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(key_cert_sign=True, **usage), critical=True)
            .sign(key, hashes.SHA256())
            .public_bytes(Encoding.PEM)
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        der = certified(desk, hostca.read_ca(root, pem, None))
        verify_host_certificate(
            der,
            ak_public=record.ak_public,
            ek_public=record.ek_public,
            roots=hostca.certificates(root),
            hosts=frozenset(),
            now=now(),
        )


def test_the_hosts_own_name(desk: Desk) -> None:
    request = desk.request()
    if hostca.HOST_NAME.fullmatch(this_host()):
        assert challenged(desk.host, request, name=None).pending.host == this_host()
    for wrong in ("", "a b", "-x", "x-", "ü", "x" * 65):
        with pytest.raises(MalformedError, match="no name for a certificate"):
            challenged(desk.host, request, name=wrong)


# ── Requests that are not challenged ──────────────────────────────────────────────────────────────


def changed(request: bytes, **identity: Any) -> bytes:
    parsed = docs.parse(request, docs.Request)
    return docs.encode(
        msgspec.structs.replace(parsed, identity=msgspec.structs.replace(parsed.identity, **identity))
    )


def refused(step: Step, host: Embedded, request: bytes, **changes: Any) -> str:
    with pytest.raises(VerificationError) as caught:
        challenged(host, request, **changes)
    assert caught.value.step == step
    return str(caught.value)


def test_the_attestation_key_of_another_tpm(desk: Desk, other: Embedded, tmp_path: Path) -> None:
    request = desk.request()
    theirs = changed(request, ak_public=other.record.ak_public)
    assert "not the attestation key's" in refused(Step.SIGNATURE, desk.host, theirs)
    # Truly quoted by the other key, over an identity that names our endorsement key.
    identity = docs.Identity(
        "host", other.record.ak_public, desk.host.record.ek_public, desk.host.record.ek_certificate
    )
    tpm = other.open()
    quote, pcrs = tpm.quote_with_pcrs(identity.qualifying(), (0, 7))
    tpm.close()
    lying = docs.Request(
        "hostd-host-request/1",
        identity,
        {str(index): value for index, value in pcrs.items()},
        quote.attest,
        quote.signature,
    )
    assert "not a child of this EK" in refused(Step.KEY, desk.host, docs.encode(lying))


def test_a_provider_that_is_deceived_about_the_key(desk: Desk, other: Embedded, ca: hostca.Ca) -> None:
    """Whatever the provider believed: the TPM opens nothing for a key that it does not hold."""
    made = challenged(desk.host, desk.request())
    ek = parse_public(desk.host.record.ek_public)
    credential = make_credential(ek, other.record.ak_name, made.pending.secret)
    parsed = docs.parse(made.document, docs.Challenge)
    forged = msgspec.structs.replace(
        parsed, credential=credential.id_object, secret=credential.encrypted_secret
    )
    with pytest.raises(DeniedError, match="made for other keys, or altered"):
        desk.answer(docs.encode(forged))
    assert desk.recorded == []


def test_another_name_in_the_challenge(desk: Desk, other: Embedded) -> None:
    parsed = docs.parse(challenged(desk.host, desk.request()).document, docs.Challenge)
    wrong = msgspec.structs.replace(parsed, ak_name=other.record.ak_name)
    with pytest.raises(ConflictError, match=f"for the attestation key {other.record.ak_name.hex()}"):
        desk.answer(docs.encode(wrong))
    assert desk.recorded == []


def test_the_challenge_of_another_host(desk: Desk, other: Embedded, tmp_path: Path) -> None:
    theirs = Desk(tmp_path / "other", other)
    challenge = challenged(other, theirs.request())
    theirs.close()
    with pytest.raises(ConflictError, match="and this host's is"):
        desk.answer(challenge.document)
    renamed = msgspec.structs.replace(
        docs.parse(challenge.document, docs.Challenge), ak_name=desk.host.record.ak_name
    )
    with pytest.raises(DeniedError):
        desk.answer(docs.encode(renamed))


def test_an_endorsement_certificate_of_another_maker(desk: Desk, other: Embedded) -> None:
    request = desk.request()
    said = refused(Step.ENDORSEMENT, desk.host, request, ek_roots=[maker(other)])
    assert "no accepted maker vouches for it" in said
    # Theirs, which is genuine, is of another key; with their key the quote is of no child of it.
    theirs = {"ek_certificate": other.record.ek_certificate}
    roots = [maker(desk.host), maker(other)]
    said = refused(Step.ENDORSEMENT, desk.host, changed(request, **theirs), ek_roots=roots)
    assert "another key than the EK" in said
    swapped = changed(request, **theirs, ek_public=other.record.ek_public)
    refused(Step.QUALIFYING, desk.host, swapped, ek_roots=roots)
    assert "no EK certificate" in refused(Step.ENDORSEMENT, desk.host, changed(request, ek_certificate=None))


def test_every_altered_byte_of_a_request(desk: Desk) -> None:
    request = desk.request()
    challenged(desk.host, request)
    for at in range(0, len(request), 3):
        altered = request[:at] + bytes([request[at] ^ 1]) + request[at + 1 :]
        with pytest.raises((VerificationError, MalformedError)):
            challenged(desk.host, altered)


def test_a_key_that_could_sign_anything(desk: Desk) -> None:
    said = refused(Step.KEY, desk.host, changed(desk.request(), ak_public=desk.host.record.srk_public))
    assert "lacks SIGN" in said


def test_a_key_whose_name_is_of_another_hash(desk: Desk) -> None:
    """There is no room for its Name in a certificate."""
    record = desk.host.record
    longer = record.ak_public[:4] + bytes.fromhex("000c") + record.ak_public[6:]
    said = refused(Step.KEY, desk.host, changed(desk.request(), ak_public=longer))
    assert "not made with SHA-256" in said


def test_pcrs_that_are_none(desk: Desk) -> None:
    parsed = docs.parse(desk.request(), docs.Request)
    for wrong in ("24", "07", "x"):
        broken = msgspec.structs.replace(parsed, pcrs=parsed.pcrs | {wrong: bytes(32)})
        with pytest.raises(MalformedError, match="no such PCR"):
            challenged(desk.host, docs.encode(broken))
    more = msgspec.structs.replace(parsed, pcrs=parsed.pcrs | {"23": bytes(32)})
    refused(Step.DIGEST, desk.host, docs.encode(more))


# ── Challenges and answers ────────────────────────────────────────────────────────────────────────


def test_the_answer_to_another_challenge(desk: Desk, ca: hostca.Ca) -> None:
    one, two = (challenged(desk.host, desk.request()) for _ in range(2))
    answer = desk.answer(one.document)
    with pytest.raises(ConflictError, match="to another challenge"):
        hostca.certify(answer, two.pending, ca, days=1, now=now())
    # Said to be to the other one.
    parsed = docs.parse(answer, docs.Answer)
    relabelled = msgspec.structs.replace(parsed, challenge=two.pending.challenge)
    with pytest.raises(DeniedError, match="does not show the challenge's secret"):
        hostca.certify(docs.encode(relabelled), two.pending, ca, days=1, now=now())
    hostca.certify(answer, one.pending, ca, days=1, now=now())


def test_every_altered_byte_of_a_challenge(desk: Desk, ca: hostca.Ca) -> None:
    """The host refuses it, or its answer is no good."""
    made = challenged(desk.host, desk.request())
    answered = 0
    for at in range(0, len(made.document), 5):
        altered = made.document[:at] + bytes([made.document[at] ^ 1]) + made.document[at + 1 :]
        try:
            answer = desk.answer(altered)
        except (MalformedError, ConflictError, DeniedError):
            continue
        answered += 1
        with pytest.raises(ConflictError, match="to another challenge"):
            hostca.certify(answer, made.pending, ca, days=1, now=now())
    # Name and digest of the request are for people: they change the answer, not whether there is one.
    assert answered
    hostca.certify(desk.answer(made.document), made.pending, ca, days=1, now=now())


def test_every_altered_byte_of_an_answer(desk: Desk, ca: hostca.Ca) -> None:
    made = challenged(desk.host, desk.request())
    answer = desk.answer(made.document)
    for at in range(len(answer)):
        altered = answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :]
        with pytest.raises((MalformedError, ConflictError, DeniedError)):
            hostca.certify(altered, made.pending, ca, days=1, now=now())
    hostca.certify(answer, made.pending, ca, days=1, now=now())


def test_an_answer_that_comes_too_late(desk: Desk, ca: hostca.Ca) -> None:
    made = challenged(desk.host, desk.request())
    answer = desk.answer(made.document)
    for when in (now() + hostca.MAX_AGE + datetime.timedelta(minutes=1), now() - datetime.timedelta(hours=1)):
        with pytest.raises(ConflictError, match="make another"):
            hostca.certify(answer, made.pending, ca, days=1, now=when)


def test_a_host_that_waits_for_no_tpm(tmp_path: Path, own_host: Embedded) -> None:
    desk = Desk(tmp_path / "state", own_host)
    made = challenged(own_host, desk.request())
    own_host.process.kill()
    with pytest.raises(UnavailableError, match="the TPM did not quote"):
        desk.request()
    with pytest.raises(UnavailableError, match="the TPM did not open the challenge"):
        desk.answer(made.document)
    assert desk.recorded == []
    desk.close()


def test_a_cleared_tpm(tmp_path: Path, own_host: Embedded, ca: hostca.Ca) -> None:
    desk = Desk(tmp_path / "state", own_host)
    desk.install(certified(desk, ca))
    made = challenged(own_host, desk.request())
    desk.close()
    esys = Esys(own_host.connect, 20.0)
    esys.call("Clear", lambda e: e.clear(ESYS_TR.LOCKOUT))
    esys.close()
    cleared = Desk(desk.folder, own_host)
    with pytest.raises(UnavailableError, match="another TPM, or one that was cleared"):
        cleared.answer(made.document)
    cleared.close()
    # Set up again it has another key, for which neither challenge nor certificate are.
    own_host.record = provision(own_host.connect, command_s=20)
    with pytest.raises(TpmBlobError, match="of another key than the attestation key; remove it"):
        Desk(desk.folder, own_host)
    (desk.folder / "host.pem").unlink()
    (desk.folder / "root.json").unlink()
    anew = Desk(desk.folder, own_host)
    with pytest.raises(ConflictError, match="and this host's is"):
        anew.answer(made.document)
    anew.close()


# ── Issuing ───────────────────────────────────────────────────────────────────────────────────────


def test_no_certificate_outlives_its_ca(desk: Desk) -> None:
    short = Provider(now(), end=10 * DAY)
    ca = hostca.read_ca(short.root, short.key_pem, None)
    with pytest.raises(ConflictError, match="the CA's certificate ends on"):
        certified(desk, ca, days=11)
    certified(desk, ca, days=9)


def test_what_is_no_ca(provider: Provider, desk: Desk) -> None:
    record = desk.host.record
    leaf = provider.certificate(record.ak_public, record.ek_public)
    stranger = Provider(now())
    edwards = ed25519.Ed25519PrivateKey.generate()
    wrong: tuple[tuple[bytes, bytes, str], ...] = (
        (leaf, provider.key_pem, "not a CA certificate"),
        (provider.root, stranger.key_pem, "not that of its certificate"),
        (provider.root, b"x", "the CA's key does not read"),
        (
            provider.root,
            edwards.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "neither EC nor RSA",
        ),
        (b"x", provider.key_pem, "not certificates"),
        (
            2 * ssl.DER_cert_to_PEM_cert(provider.root).encode(),
            provider.key_pem,
            "not exactly one CA certificate",
        ),
    )
    for certificate, key, why in wrong:
        with pytest.raises(MalformedError, match=why):
            hostca.read_ca(certificate, key, None)
    assert provider.key_pem.decode() not in repr(hostca.read_ca(provider.root, provider.key_pem, None))


# ── Installing ────────────────────────────────────────────────────────────────────────────────────


def test_certificates_that_are_not_installed(
    desk: Desk, other: Embedded, provider: Provider, ca: hostca.Ca
) -> None:
    mine, theirs = desk.host.record, other.record
    good = certified(desk, ca)
    desk.install(good)
    before = (desk.folder / "host.pem").read_bytes(), len(desk.recorded)
    keys = (mine.ak_public, mine.ek_public)
    wrong = {
        "another host's": (provider.certificate(theirs.ak_public, theirs.ek_public), "of another key"),
        "another key's": (provider.certificate(*keys, key_of=theirs.ak_public), "of another key"),
        "another EK's": (
            provider.certificate(mine.ak_public, theirs.ek_public),
            "another endorsement key",
        ),
        "expired": (provider.certificate(*keys, start=-3 * DAY, end=-DAY), "not now"),
        "not yet": (provider.certificate(*keys, start=DAY, end=3 * DAY), "not now"),
        "a CA's": (provider.certificate(*keys, ca=True), "a CA's"),
        "the CA itself": (provider.root, "a CA's"),
        "a server's": (provider.certificate(*keys, usage=SERVER), "another use"),
        "nothing": (b"", "not a readable certificate"),
        "cut": (good[:-1], "not a readable certificate"),
    }
    for name, (der, why) in wrong.items():
        with pytest.raises(ConflictError, match=why) as caught:
            desk.install(der)
        assert "not a host certificate for this host" in str(caught.value), name
    assert ((desk.folder / "host.pem").read_bytes(), len(desk.recorded)) == before
    assert desk.link.host_certificate == good
    newer = certified(desk, ca)
    assert desk.install(newer).certificate == newer


def test_a_certificate_that_is_over_is_shown_as_such(desk: Desk, provider: Provider, ca: hostca.Ca) -> None:
    desk.install(certified(desk, ca))
    over = provider.certificate(
        desk.host.record.ak_public, desk.host.record.ek_public, start=-3 * DAY, end=-DAY
    )
    desk.link.install_certificate(over)
    report = desk.ask(enr.ShowHost())
    assert (report.valid, report.certificate) == (False, over)
    # A vault starts with it all the same: it is for verifiers to refuse.
    again = Desk(desk.folder, desk.host)
    assert again.link.host_certificate == over
    again.close()


@pytest.mark.parametrize(
    "content", [b"", b"x", b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", b"\xff"]
)
def test_a_stored_certificate_that_does_not_read(desk: Desk, content: bytes) -> None:
    write_file(desk.folder / "host.pem", content)
    with pytest.raises(TpmBlobError, match=r"host\.pem: .*; remove it, or install one for this host"):
        Desk(desk.folder, desk.host)


def test_a_stored_certificate_that_no_evidence_has_room_for(desk: Desk, provider: Provider) -> None:
    """It is for this TPM: whoever writes the file makes one of his own, as long as he likes."""
    record = desk.host.record
    for filled in (3000, MAX_HOST_CERTIFICATE_BYTES):
        der = provider.certificate(record.ak_public, record.ek_public, filled=filled)
        write_file(desk.folder / "host.pem", ssl.DER_cert_to_PEM_cert(der).encode())
        if len(der) <= MAX_HOST_CERTIFICATE_BYTES:
            Desk(desk.folder, desk.host).close()
        else:
            with pytest.raises(TpmBlobError, match=r"host\.pem: .* over 4096 bytes; remove it"):
                Desk(desk.folder, desk.host)


def test_a_disk_that_takes_nothing(desk: Desk, ca: hostca.Ca, monkeypatch: pytest.MonkeyPatch) -> None:
    good, newer = certified(desk, ca), certified(desk, ca)
    desk.install(good)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hostd.vault.tpmlink.write_file", full)
    with pytest.raises(UnavailableError, match="was not stored: No space left"):
        desk.install(newer)
    assert desk.link.host_certificate == good
    assert read_host_certificate(hostca.certificates((desk.folder / "host.pem").read_bytes())[0]).host == NAME
    assert os.listdir(desk.folder).count("host.pem") == 1


def test_what_is_not_recorded_is_not_answered(desk: Desk, ca: hostca.Ca) -> None:
    made = challenged(desk.host, desk.request())
    der = certified(desk, ca)

    def broken(*_: object, **__: object) -> int:
        raise UnavailableError("the ledger is closed")

    desk.desk = EnrolmentDesk(desk.link, broken)
    with pytest.raises(UnavailableError, match="the ledger is closed"):
        desk.answer(made.document)
    with pytest.raises(UnavailableError, match="the ledger is closed"):
        desk.install(der)
    assert desk.link.host_certificate is None
    assert not (desk.folder / "host.pem").exists()
