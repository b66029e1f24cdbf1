"""The evidence document, the trust bundle, the binding: shapes only."""

from __future__ import annotations

import base64
import datetime
import json
import random
import ssl
from dataclasses import replace
from typing import Any

import pytest
from support_evidence import Host

from guestlib.attest.binding import evidence_qualifying, pass_qualifying
from guestlib.attest.bundle import TrustBundle, encode_bundle, parse_bundle
from guestlib.attest.evidence import (
    MAX_EVIDENCE_BYTES,
    LedgerHead,
    encode_evidence,
    encode_statement,
    parse_evidence,
)
from guestlib.errors import MalformedError


def canonical(fields: object) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def test_round_trip(host: Host) -> None:
    for changes in ({}, {"ima": None, "reference": None}):
        data = host.evidence(**changes)
        evidence = parse_evidence(data)
        assert encode_evidence(evidence) == data
    without = json.loads(data)
    del without["pcrs"], without["quote"]
    assert encode_statement(evidence.statement) == canonical(without)


def test_truncated_or_trailing(host: Host) -> None:
    data = host.evidence()
    for size in range(len(data)):
        with pytest.raises(MalformedError):
            parse_evidence(data[:size])
    for tail in (b" ", b"\n", b"\0", b"{}"):
        with pytest.raises(MalformedError):
            parse_evidence(data + tail)
    with pytest.raises(MalformedError, match="over"):
        parse_evidence(bytes(MAX_EVIDENCE_BYTES + 1))


def test_mutants_raise_nothing_else(host: Host) -> None:
    data, chance = host.evidence(), random.Random(5)
    for _ in range(5000):
        mutant = bytearray(data)
        for _ in range(chance.randint(1, 3)):
            mutant[chance.randrange(len(mutant))] = chance.choice(b'{}[]",:0-9.eE\\uaZ \0\xff')
        try:
            parsed = parse_evidence(bytes(mutant))
        except MalformedError:
            continue
        assert encode_evidence(parsed) == bytes(mutant)


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"1", b'"x"', b"NaN", b"{}", b"[" * 60000, b'{"a":' * 10000, b"9" * 60000, b"\xff"],
)
def test_other_json(text: bytes) -> None:
    for parse in (parse_evidence, parse_bundle):
        with pytest.raises(MalformedError):
            parse(text)


def paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [prefix]
    return [prefix, *(path for key in value for path in paths(value[key], (*prefix, key)))]


def changed(fields: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    return fields | {path[0]: changed(fields[path[0]], path[1:], value)}


ODD = (
    None,
    True,
    False,
    0,
    -1,
    1.0,
    2**64,
    10**400,
    "",
    "x",
    "ü",
    "\n",
    [],
    {},
    {"x": 1},
    ["x"],
    "0" * 70000,
)


def test_every_field_with_a_wrong_value(host: Host) -> None:
    fields = json.loads(host.evidence())
    allowed = {("ima",), ("reference",), ("tpm", "ek_certificate")}
    text = {("host", "name"), ("host", "version")}
    numbers = {("findings",), ("ledger", "size"), ("ima", "bytes"), ("ima", "entries")}
    for path in paths(fields):
        for value in ODD:
            if value is None and path in allowed:
                continue
            if (value == "x" and path in text) or (type(value) is int and value == 0 and path in numbers):
                continue
            with pytest.raises(MalformedError):
                parse_evidence(canonical(changed(fields, path, value)))


def test_every_field_missing_or_more(host: Host) -> None:
    fields = json.loads(host.evidence())
    for path in paths(fields):
        *parents, last = path or ("",)
        inner = fields
        for parent in parents:
            inner = inner[parent]
        if path and parents[:1] not in (["claims"], ["pcrs"]):
            fewer = {key: value for key, value in inner.items() if key != last}
            with pytest.raises(MalformedError):
                parse_evidence(canonical(changed(fields, tuple(parents), fewer)))
        if isinstance(inner, dict):
            with pytest.raises(MalformedError):
                parse_evidence(canonical(changed(fields, tuple(parents), inner | {"extra!": "x"})))


def test_a_second_spelling_is_refused(host: Host) -> None:
    data = host.evidence()
    fields = json.loads(data)
    nonce = fields["nonce"]
    spellings = [
        json.dumps(fields, sort_keys=True).encode(),
        json.dumps(fields, separators=(",", ":")).encode(),
        data.replace(nonce.encode(), nonce.upper().encode()),
        data.replace(b'"findings":0', b'"findings":0.0'),
        data.replace(b'"findings":0', b'"findings":-0'),
        data.replace(b'"findings":0', b'"findings":0,"findings":0'),
        data.replace(b'"gate":"open"', b'"gate":"closed","gate":"open"'),
        data.replace(b'"gate":"open"', b'"gate":"\\u006fpen"'),
        data.replace(b'"7":', b'"07":'),
        data.replace(b"2026-01-31T12:00:00Z", b"2026-1-31T12:00:00Z"),
        data.replace(b"2026-01-31T12:00:00Z", b"2026-01-31T12:00:00+00:00"),
    ]
    certificate = fields["channel_ca"]
    spellings.append(data.replace(certificate.encode(), (certificate[:8] + "\\n" + certificate[8:]).encode()))
    shuffled = dict(reversed(fields.items()))
    spellings.append(json.dumps(shuffled, separators=(",", ":")).encode())
    spellings = [spelling for spelling in spellings if spelling != data]
    assert len(spellings) >= 11
    for spelling in spellings:
        with pytest.raises(MalformedError):
            parse_evidence(spelling)


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": bytes(15)},
        {"nonce": bytes(65)},
        {"issued": datetime.datetime(2026, 1, 1)},  # noqa: DTZ001
        {"issued": datetime.datetime(2026, 1, 1, microsecond=1, tzinfo=datetime.UTC)},
        {"channel_ca": b""},
        {"claims": {}},
        {"claims": {"IMA": "verified"}},
        {"reference": bytes(31)},
        {"ledger": LedgerHead(-1, bytes(32))},
        {"ledger": LedgerHead(2**53, bytes(32))},
        {"ledger": LedgerHead(1, bytes(31))},
        {"findings": -1},
    ],
)
def test_a_statement_that_cannot_be_made(host: Host, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="breaks its limit"):
        replace(host.statement(), **changes)


# ── Binding ───────────────────────────────────────────────────────────────────────────────────────


def test_binding_vectors() -> None:
    """The same bytes for ever: a released value signed by a TPM must go on verifying."""
    import hashlib

    nonce, statement = bytes(range(16)), b"{}"
    by_hand = b"hostd evidence v1\0" + b"\0\x10" + nonce + hashlib.sha256(statement).digest()
    assert evidence_qualifying(nonce, statement) == hashlib.sha256(by_hand).digest()
    assert (
        evidence_qualifying(nonce, statement).hex()
        == "d66b8563af448d7fac4a9044b7aa68cd8980b4e2255773ef56ef0228bee49ec5"
    )
    by_hand = b"hostd pass v1\0" + (7).to_bytes(8, "big") + b"e" * 32 + (9).to_bytes(8, "big") + b"r" * 32
    assert pass_qualifying(7, b"e" * 32, 9, b"r" * 32) == hashlib.sha256(by_hand).digest()
    assert (
        pass_qualifying(7, b"e" * 32, 9, b"r" * 32).hex()
        == "799f8ca75b78f4f778ecd03a34d30b643230f5d26513859eb17894e5cd4c0b13"
    )


def test_binding_refuses_other_lengths() -> None:
    for size in (0, 15, 65):
        with pytest.raises(ValueError, match="nonce"):
            evidence_qualifying(bytes(size), b"")
    for digests in ((bytes(31), bytes(32)), (bytes(32), bytes(33))):
        with pytest.raises(ValueError, match="digest"):
            pass_qualifying(1, digests[0], 1, digests[1])
    with pytest.raises(OverflowError):
        pass_qualifying(-1, bytes(32), 1, bytes(32))
    with pytest.raises(OverflowError):
        pass_qualifying(1, bytes(32), 2**64, bytes(32))


# ── Bundle ────────────────────────────────────────────────────────────────────────────────────────


def test_bundle_round_trip(host: Host) -> None:
    for bundle in (
        host.bundle(),
        TrustBundle(require=frozenset({"files"}), channel_cas=(host.ca,)),
        TrustBundle(require=frozenset({"files"}), aks=(b"\0\1x",)),
    ):
        assert parse_bundle(encode_bundle(bundle)) == bundle


def good(host: Host) -> dict[str, Any]:
    fields = json.loads(encode_bundle(host.bundle()))
    assert isinstance(fields, dict)
    return fields


@pytest.mark.parametrize(
    "change",
    [
        {"format": "hostd-trust/2"},
        {"format": None},
        {"require": []},
        {"require": None},
        {"require": "ima"},
        {"require": [1]},
        {"require": ["IMA"]},
        {"aks": []},
        {"aks": ["*"]},
        {"aks": [""]},
        {"aks": None},
        {"aks": [base64.b64encode(bytes(2000)).decode()]},
        {"ek_roots": []},
        {"ek_roots": ["no PEM"]},
        {"channel_ca": None},
        {"channel_ca": ["x"]},
        {"channel_ca": []},
        {"channel_ca": {}},
        {"channel_ca": "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"},
        {"pcrs": {}},
        {"pcrs": []},
        {"pcrs": {"24": ["00" * 32]}},
        {"pcrs": {"07": ["00" * 32]}},
        {"pcrs": {"7": []}},
        {"pcrs": {"7": "00" * 32}},
        {"pcrs": {"7": ["00" * 31]}},
        {"reference": []},
        {"reference": ["00"]},
        {"reference": {}},
        {"unknown": 1},
        {"require_ima": False},
    ],
)
def test_bundles_that_are_none(host: Host, change: dict[str, Any]) -> None:
    parse_bundle(json.dumps(good(host)).encode())
    with pytest.raises(MalformedError, match="trust bundle"):
        parse_bundle(json.dumps(good(host) | change).encode())


def test_a_bundle_must_pin_and_require(host: Host) -> None:
    fields = good(host)
    for name in ("aks", "ek_roots", "channel_ca"):
        del fields[name]
    with pytest.raises(MalformedError, match="nothing is pinned"):
        parse_bundle(json.dumps(fields).encode())
    fields = good(host)
    del fields["require"]
    with pytest.raises(MalformedError, match="require"):
        parse_bundle(json.dumps(fields).encode())


def test_two_certificates_in_one_place(host: Host) -> None:
    pem = ssl.DER_cert_to_PEM_cert(host.ca)
    with pytest.raises(MalformedError):
        parse_bundle(json.dumps(good(host) | {"channel_ca": pem + pem}).encode())


def test_one_channel_ca_is_written_as_it_always_was_and_more_are_a_list(host: Host) -> None:
    pem = ssl.DER_cert_to_PEM_cert(host.ca)
    one = good(host)
    assert one["channel_ca"] == pem
    other = host.leaf()
    both = host.bundle(channel_cas=(host.ca, other))
    written = json.loads(encode_bundle(both))
    assert written["channel_ca"] == [pem, ssl.DER_cert_to_PEM_cert(other)]
    assert parse_bundle(encode_bundle(both)) == both
    assert parse_bundle(json.dumps(one | {"channel_ca": [pem]}).encode()) == host.bundle()


def test_a_key_given_twice(host: Host) -> None:
    text = encode_bundle(host.bundle()).replace(b'"require"', b'"require": ["x"], "require"')
    with pytest.raises(MalformedError, match="twice"):
        parse_bundle(text)


def test_the_bundle_needs_no_cryptography() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.path[:] = sys.argv[1:]; import guestlib.attest.bundle;"
        "sys.exit(any(m.split('.')[0] == 'cryptography' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, *sys.path], check=False).returncode == 0
