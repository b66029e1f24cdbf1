"""Parsing and verifying what a real TPM gives; and refusing everything else."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support_evidence import PCRS, Host
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPMA_OBJECT
from tpm2_pytss.types import TPM2B_PUBLIC, TPMT_SIG_SCHEME

from guestlib.attest.quote import AttestationKey, attestation_key, crypto_key, verify_quote
from guestlib.attest.steps import Step
from guestlib.attest.tpm2 import (
    Attribute,
    EccKey,
    Public,
    RsaKey,
    parse_attest,
    parse_public,
    parse_signature,
    qualified_name,
)
from guestlib.errors import MalformedError, VerificationError
from hostd.platform.tpm import Quote

QUALIFYING = bytes(range(32, 64))


@pytest.fixture(scope="module")
def quoted(host: Host) -> tuple[Quote, dict[int, bytes]]:
    return host.tpm.quote_with_pcrs(QUALIFYING, PCRS)


@pytest.fixture(scope="module")
def ak(host: Host) -> AttestationKey:
    return attestation_key(parse_public(host.tpm.record.ak_public))


def refused(step: Step, ak: AttestationKey, quote: Quote, qualifying: bytes, pcrs: dict[int, bytes]) -> None:
    with pytest.raises(VerificationError) as caught:
        verify_quote(ak, quote.attest, quote.signature, qualifying, pcrs)
    assert caught.value.step == step


def test_a_real_quote_holds(ak: AttestationKey, quoted: tuple[Quote, dict[int, bytes]]) -> None:
    quote, pcrs = quoted
    verified = verify_quote(ak, quote.attest, quote.signature, QUALIFYING, pcrs)
    assert verified.pcrs == pcrs
    assert verified.signer == ak.public.name
    assert verified.attest.selection == PCRS
    assert verified.attest.extra_data == QUALIFYING


def flipped(data: bytes) -> list[bytes]:
    return [
        data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]
        for position in range(len(data))
        for bit in (0x01, 0x80)
    ]


def test_every_flipped_byte_is_refused(ak: AttestationKey, quoted: tuple[Quote, dict[int, bytes]]) -> None:
    quote, pcrs = quoted
    for attest in flipped(quote.attest):
        with pytest.raises(VerificationError):
            verify_quote(ak, attest, quote.signature, QUALIFYING, pcrs)
    for signature in flipped(quote.signature):
        refused(Step.SIGNATURE, ak, Quote(quote.attest, signature), QUALIFYING, pcrs)
    for qualifying in (*flipped(QUALIFYING), QUALIFYING[:-1], QUALIFYING + b"\0", b""):
        refused(Step.QUALIFYING, ak, quote, qualifying, pcrs)
    for index, value in pcrs.items():
        for other in (*flipped(value), value + b"\0", value[:-1], b""):
            refused(Step.DIGEST, ak, quote, QUALIFYING, pcrs | {index: other})


def test_other_selections_are_refused(ak: AttestationKey, quoted: tuple[Quote, dict[int, bytes]]) -> None:
    quote, pcrs = quoted
    fewer = {index: value for index, value in pcrs.items() if index != 7}
    moved = fewer | {6: pcrs[7]}
    for other in (fewer, pcrs | {23: bytes(32)}, {}, moved):
        refused(Step.DIGEST, ak, quote, QUALIFYING, other)


def test_bytes_do_not_move_between_values(ak: AttestationKey, quoted: tuple[Quote, dict[int, bytes]]) -> None:
    """The digest is over the values put together: where one ends is not in it."""
    quote, pcrs = quoted
    moved = pcrs | {0: pcrs[0] + pcrs[1][:1], 1: pcrs[1][1:]}
    refused(Step.DIGEST, ak, quote, QUALIFYING, moved)


def test_truncated_or_trailing_bytes(ak: AttestationKey, quoted: tuple[Quote, dict[int, bytes]]) -> None:
    quote, pcrs = quoted
    for data, make in (
        (quote.attest, lambda d: Quote(d, quote.signature)),
        (quote.signature, lambda d: Quote(quote.attest, d)),
    ):
        for size in range(len(data)):
            refused(Step.SIGNATURE, ak, make(data[:size]), QUALIFYING, pcrs)
        refused(Step.SIGNATURE, ak, make(data + b"\0"), QUALIFYING, pcrs)
        refused(Step.SIGNATURE, ak, make(data + bytes(2000)), QUALIFYING, pcrs)


def test_mutants_raise_nothing_else(host: Host, quoted: tuple[Quote, dict[int, bytes]]) -> None:
    quote, _pcrs = quoted
    chance = random.Random(11)
    for data, parse in (
        (quote.attest, parse_attest),
        (quote.signature, parse_signature),
        (host.tpm.record.ak_public, lambda d: crypto_key(parse_public(d))),
        (host.tpm.record.ek_public, lambda d: crypto_key(parse_public(d))),
    ):
        for _ in range(3000):
            mutant = bytearray(data)
            for _ in range(chance.randint(1, 4)):
                mutant[chance.randrange(len(mutant))] = chance.choice((0, 1, 0xFF, chance.randrange(256)))
            del mutant[len(data) - chance.choice((0, 0, 0, 1, 5)) :]
            try:
                parse(bytes(mutant))
            except MalformedError:
                continue


def test_public_areas(host: Host) -> None:
    for data in (host.tpm.record.ak_public, host.tpm.record.ek_public, host.tpm.record.srk_public):
        public = parse_public(data)
        assert isinstance(public.key, EccKey)
        theirs = TPM2B_PUBLIC.unmarshal(data)[0]
        assert public.name == bytes(theirs.get_name())
        spki = crypto_key(public).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert spki == theirs.to_der()
        for size in range(len(data)):
            with pytest.raises(MalformedError):
                parse_public(data[:size])
        with pytest.raises(MalformedError, match="trailing"):
            parse_public(data + b"\0")
        longer = (len(data) - 1).to_bytes(2, "big") + data[2:] + b"\0"
        with pytest.raises(MalformedError, match="trailing"):
            parse_public(longer)


def test_a_quotes_signer_is_a_child_of_the_ek(host: Host, quoted: tuple[Quote, dict[int, bytes]]) -> None:
    ek, key = parse_public(host.tpm.record.ek_public).name, parse_public(host.tpm.record.ak_public).name
    child = qualified_name(qualified_name(bytes.fromhex("4000000b"), ek), key)
    assert parse_attest(quoted[0].attest).qualified_signer == child


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        (lambda a: a & ~Attribute.RESTRICTED, "RESTRICTED"),
        (lambda a: a & ~Attribute.SIGN, "SIGN"),
        (lambda a: a & ~Attribute.FIXED_TPM, "FIXED_TPM"),
        (lambda a: a & ~Attribute.FIXED_PARENT, "FIXED_PARENT"),
        (lambda a: a & ~Attribute.SENSITIVE_DATA_ORIGIN, "SENSITIVE_DATA_ORIGIN"),
        (lambda a: a | Attribute.DECRYPT, "may decrypt"),
    ],
)
def test_what_is_no_attestation_key(ak: AttestationKey, attributes: Callable[[int], int], why: str) -> None:
    with pytest.raises(VerificationError, match=why) as caught:
        attestation_key(replace(ak.public, attributes=int(attributes(ak.public.attributes))))
    assert caught.value.step == Step.KEY


def test_keys_that_are_none(ak: AttestationKey) -> None:
    off_curve = replace(ak.public, key=EccKey(3, bytes(31) + b"\1", bytes(31) + b"\1"))
    small = replace(ak.public, key=RsaKey(b"\xff" * 128, 65537))
    even = replace(ak.public, key=RsaKey(b"\xff" * 256, 4))
    for public in (off_curve, small, even):
        with pytest.raises(VerificationError) as caught:
            attestation_key(public)
        assert caught.value.step == Step.KEY


def test_another_tpms_key_does_not_verify(host: Host, quoted: tuple[Quote, dict[int, bytes]]) -> None:
    quote, pcrs = quoted
    other, _ = _made(host, "ecc256:ecdsa-sha256:null")
    refused(Step.SIGNATURE, attestation_key(other), quote, QUALIFYING, pcrs)


def _made(host: Host, algorithm: str) -> tuple[Public, Any]:
    """Another attestation key in the TPM, a primary that is flushed after one quote."""
    attributes = (
        TPMA_OBJECT.FIXEDTPM
        | TPMA_OBJECT.FIXEDPARENT
        | TPMA_OBJECT.SENSITIVEDATAORIGIN
        | TPMA_OBJECT.USERWITHAUTH
        | TPMA_OBJECT.RESTRICTED
        | TPMA_OBJECT.SIGN_ENCRYPT
    )
    template = TPM2B_PUBLIC.parse(algorithm, nameAlg="sha256", objectAttributes=attributes)
    esys = host.tpm._esys
    key, public, *_ = esys.call("CreatePrimary", lambda e: e.create_primary(None, template, ESYS_TR.OWNER))
    selection = "sha256:" + ",".join(map(str, PCRS))
    with esys.flushing(key):
        quote = esys.call("Quote", lambda e: e.quote(key, selection, QUALIFYING))
    return parse_public(public.marshal()), quote


@pytest.mark.parametrize(
    "algorithm",
    [
        "ecc384:ecdsa-sha384:null",
        "ecc256:ecdsa-sha256:null",
        "rsa2048:rsassa-sha256:null",
        "rsa2048:rsapss-sha256:null",
    ],
)
def test_other_algorithms(host: Host, algorithm: str) -> None:
    public, (attest, signature) = _made(host, algorithm)
    pcrs = host.tpm.read_pcrs(PCRS)
    key = attestation_key(public)
    verify_quote(key, bytes(attest), signature.marshal(), QUALIFYING, pcrs)
    for broken in flipped(signature.marshal())[::7]:
        refused(Step.SIGNATURE, key, Quote(bytes(attest), broken), QUALIFYING, pcrs)
    refused(Step.DIGEST, key, Quote(bytes(attest), signature.marshal()), QUALIFYING, pcrs | {7: b"\1" * 32})


def test_a_signature_of_another_scheme(host: Host) -> None:
    """RSASSA by a key whose scheme is RSAPSS is not that key's word, even if the numbers agree."""
    public, (attest, signature) = _made(host, "rsa2048:rsassa-sha256:null")
    pcrs = host.tpm.read_pcrs(PCRS)
    from guestlib.attest.tpm2 import Alg

    quote = Quote(bytes(attest), signature.marshal())
    for other in (replace(public, scheme=Alg.RSAPSS), replace(public, scheme_hash=Alg.SHA384)):
        refused(Step.SIGNATURE, attestation_key(other), quote, QUALIFYING, pcrs)


def test_an_attestation_of_another_kind(host: Host, ak: AttestationKey) -> None:
    """The TPM certifies a key with the same attestation key: a true TPM structure, and no quote."""
    esys = host.tpm._esys
    keys = host.tpm._open_keys()
    attest, signature = esys.call(
        "Certify",
        lambda e: e.certify(keys.srk, keys.ak, QUALIFYING, TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL)),
    )
    quote = Quote(bytes(attest), signature.marshal())
    with pytest.raises(VerificationError, match="not a quote"):
        verify_quote(ak, quote.attest, quote.signature, QUALIFYING, {})


@pytest.mark.skipif(shutil.which("tpm2_checkquote") is None, reason="tpm2-tools are not installed")
def test_an_independent_verifier_agrees(
    ak: AttestationKey, quoted: tuple[Quote, dict[int, bytes]], tmp_path: Path
) -> None:
    quote, _pcrs = quoted
    pem = crypto_key(ak.public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    files = {"ak.pem": pem, "attest": quote.attest, "signature": quote.signature}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    def check(qualifying: bytes) -> int:
        return subprocess.run(
            ["tpm2_checkquote", "-u", tmp_path / "ak.pem", "-m", tmp_path / "attest", "-s",
             tmp_path / "signature", "-g", "sha256", "-q", qualifying.hex()],
            capture_output=True, check=False,
        ).returncode  # fmt: skip

    assert check(QUALIFYING) == 0
    assert check(QUALIFYING[::-1]) != 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: b"\0" * 4 + d[4:], "magic"),
        (lambda d: d[:4] + b"\x80\x17" + d[6:], "type"),
    ],
)
def test_attest_names_what_is_wrong(
    quoted: tuple[Quote, dict[int, bytes]], change: Callable[[bytes], bytes], why: str
) -> None:
    with pytest.raises(MalformedError, match=why):
        parse_attest(change(quoted[0].attest))


def test_attest_with_other_banks(quoted: tuple[Quote, dict[int, bytes]]) -> None:
    attest = quoted[0].attest
    at = len(attest) - 34 - 10
    none, two, sha1, sha384 = (
        attest[:at] + bytes.fromhex(head) + attest[-34:]
        for head in (
            "00000000",
            "00000002000b03ffffff000c03ffffff",
            "00000001000403ffffff",
            "00000001000c03ffffff",
        )
    )
    empty = attest[:at] + bytes.fromhex("00000001000b03000000") + attest[-34:]
    long = attest[:at] + bytes.fromhex("00000001000b05ffffffffff") + attest[-34:]
    for broken in (none, two, sha1, sha384, empty, long):
        with pytest.raises(MalformedError):
            parse_attest(broken)
