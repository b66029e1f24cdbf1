"""The documents of an enrolment: one form each, and values that must stay what they are."""

from __future__ import annotations

import hashlib
import hmac
import random
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestlib.errors import MalformedError
from hostd.core import enrolment as docs

IDENTITY = docs.Identity("host1", b"\0\1a", b"\0\1e", b"cert")
DOCUMENTS = (
    docs.Request("hostd-host-request/1", IDENTITY, {"0": bytes(32), "10": bytes([1]) * 32}, b"at", b"si"),
    docs.Challenge("hostd-host-challenge/1", "host1", b"\0\x0b" + bytes(32), bytes(32), b"cr", b"se"),
    docs.Answer("hostd-host-answer/1", bytes(32), bytes(range(32))),
    docs.Pending("hostd-host-pending/1", bytes(32), bytes(32), "host1", b"\0\1a", b"\0\1e", 7),
)
Any = docs.Request | docs.Challenge | docs.Answer | docs.Pending


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: type(d).__name__)
class TestForms:
    def test_round_trip(self, document: Any) -> None:
        assert docs.parse(docs.encode(document), type(document)) == document

    def test_no_other_form(self, document: Any) -> None:
        data = docs.encode(document)
        for other in (
            b"",
            data[:-1],
            data + b"\n",
            data.replace(b"  ", b" "),
            data.replace(b"/1", b"/2"),
            data.replace(b"{\n", b'{\n  "more": 1,\n', 1),
            data[:-3] + b',\n  "format": "x"\n}\n',
            b"[" * 60_000,
            b"x" * (docs.MAX_DOCUMENT_BYTES + 1),
        ):
            with pytest.raises(MalformedError, match=f"host {type(document).__name__.lower()}: "):
                docs.parse(other, type(document))
        for kind in {type(d) for d in DOCUMENTS} - {type(document)}:
            with pytest.raises(MalformedError):
                docs.parse(data, kind)

    def test_mutants_are_another_document_or_none(self, document: Any) -> None:
        data, chance = docs.encode(document), random.Random(7)
        for _ in range(2000):
            mutant = bytearray(data)
            mutant[chance.randrange(len(mutant))] ^= 1 << chance.randrange(8)
            try:
                parsed = docs.parse(bytes(mutant), type(document))
            except MalformedError:
                continue
            assert parsed != document
            assert docs.encode(parsed) == bytes(mutant)


def test_limits() -> None:
    for wrong in (
        docs.Answer("hostd-host-answer/1", bytes(31), bytes(32)),
        docs.Answer("hostd-host-answer/1", bytes(32), bytes(33)),
        docs.Challenge("hostd-host-challenge/1", "", b"\0\x0b" + bytes(32), bytes(32), b"cr", b"se"),
        docs.Challenge("hostd-host-challenge/1", "h", b"\0\x0c" + bytes(48), bytes(32), b"cr", b"se"),
        docs.Pending("hostd-host-pending/1", bytes(32), bytes(16), "h", b"\0\1a", b"\0\1e", 7),
        docs.Pending("hostd-host-pending/1", bytes(32), bytes(32), "h", b"\0\1a", b"\0\1e", -7),
    ):
        with pytest.raises(MalformedError):
            docs.parse(docs.encode(wrong), type(wrong))


@pytest.mark.parametrize(
    "name", ["a\nb", "\x1b[2J", "b\u00fccher", "-a", "a.", "*.a", "a\0", "a\n", "a" * 65]
)
def test_a_name_that_no_certificate_has(name: str) -> None:
    """A challenge's goes into the host's ledger, whoever wrote it."""
    for document in DOCUMENTS:
        if isinstance(document, docs.Challenge | docs.Pending):
            data = docs.encode(msgspec.structs.replace(document, host=name))
            with pytest.raises(MalformedError, match="host"):
                docs.parse(data, type(document))


@pytest.mark.parametrize("made", [-1, 253402300800, 10**18, 2**63])
def test_a_time_that_no_calendar_has(made: int) -> None:
    data = docs.encode(msgspec.structs.replace(DOCUMENTS[3], made=made))
    with pytest.raises(MalformedError, match="host pending: "):
        docs.parse(data, docs.Pending)


def test_what_is_signed_and_proved_stays_the_same() -> None:
    """By hand: a host and a provider of different versions must agree on it."""
    text = (
        '{\n  "host": "host1",\n  "ak_public": "AAFh",\n  "ek_public": "AAFl",\n'
        '  "ek_certificate": "Y2VydA=="\n}\n'
    )
    assert docs.encode(IDENTITY) == text.encode()
    request = docs.encode(DOCUMENTS[0]).decode()
    names = ["format", "identity", "host", "ak_public", "ek_public", "ek_certificate", "pcrs", "0", "10"]
    assert re.findall(r'"(\w+)": ', request) == [*names, "attest", "signature"]
    by_hand = hashlib.sha256(b"hostd host request v1\0" + text.encode()).digest()
    assert IDENTITY.qualifying() == by_hand
    secret, challenge = bytes(range(32)), hashlib.sha256(b"challenge").digest()
    expected = hmac.new(secret, b"hostd host answer v1\0" + challenge, hashlib.sha256).digest()
    assert docs.proof(secret, challenge) == expected


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_a_proof_is_of_one_secret_and_one_challenge(secret: bytes, challenge: bytes) -> None:
    other = bytes([secret[0] ^ 1]) + secret[1:]
    another = challenge[:-1] + bytes([challenge[-1] ^ 1])
    true = docs.proof(secret, challenge)
    assert true not in (docs.proof(other, challenge), docs.proof(secret, another), secret)
