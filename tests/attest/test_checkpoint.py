"""Checkpoints as C2SP signed notes: outside vectors, what is refused, and any bytes at all."""

from __future__ import annotations

import base64
import json
import random
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from guestlib.attest.bundle import TrustBundle, encode_bundle, parse_bundle
from guestlib.attest.checkpoint import (
    MAX_NOTE_BYTES,
    MAX_SIGNATURES,
    QUOTE,
    Checkpoint,
    encode_checkpoint,
    parse_checkpoint,
    quoted_head,
    verify_checkpoint,
)
from guestlib.attest.notekey import VerifierKey, key_id, parse_key
from guestlib.attest.signedhead import SignedHead
from guestlib.errors import MalformedError, VerificationError

ORIGIN = "hostd-ledger/0123"
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = PRIVATE.public_key().public_bytes_raw()
KEY = VerifierKey(ORIGIN, PUBLIC)
ROOT = sha256(b"root").digest()
HEAD = SignedHead(1234, ROOT, 7, bytes(32), b"attest", b"signature", {0: bytes(32)})
NOTE = encode_checkpoint(ORIGIN, HEAD, b"ak", PUBLIC, PRIVATE.sign)


def bundle(*keys: VerifierKey) -> TrustBundle:
    return TrustBundle(frozenset({"x"}), channel_cas=(b"x",), ledger=tuple(map(str, keys or (KEY,))))


# Keys that others published: Go's note package, and the Go checksum database.
PUBLISHED = [
    "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k",
    "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8",
]


@pytest.mark.parametrize("text", PUBLISHED)
def test_keys_that_others_published(text: str) -> None:
    assert str(parse_key(text)) == text


def test_a_note_that_others_signed() -> None:
    """The example of the signed-note packages: our way of finding what is signed, and of naming keys."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    line = "Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM="
    key, raw = parse_key(PUBLISHED[0]), base64.b64decode(line)
    assert raw[:4] == key.id
    Ed25519PublicKey.from_public_bytes(key.public).verify(raw[4:], b"This is an example message.\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a+b",
        "a+00000000+",
        PUBLISHED[0].replace("530d903a", "530d903b"),
        PUBLISHED[0].replace("530d903a", "530D903A"),
        PUBLISHED[0].replace("example", "exam ple"),
        PUBLISHED[0].replace("+Aeky", "+Beky"),
        PUBLISHED[0] + "A",
        PUBLISHED[0] + "\n",
        "\u00e4" + PUBLISHED[0],
    ],
)
def test_keys_that_are_none(text: str) -> None:
    with pytest.raises(MalformedError, match="verifier key"):
        parse_key(text)


def test_the_form() -> None:
    lines = NOTE.decode().split("\n")
    assert lines[:4] == [ORIGIN, "1234", base64.b64encode(ROOT).decode(), ""]
    assert lines[4].startswith(f"\u2014 {ORIGIN} ")
    assert lines[6] == ""
    found = parse_checkpoint(NOTE)
    assert (found.origin, found.size, found.root, found.extensions) == (ORIGIN, 1234, ROOT, ())
    (name, id_, signature), (also, quote_id, quote) = found.signatures
    assert (name, also) == (ORIGIN, ORIGIN)
    assert id_ == sha256(ORIGIN.encode() + b"\n\x01" + PUBLIC).digest()[:4]
    PRIVATE.public_key().verify(signature, found.body)
    assert quote_id == key_id(ORIGIN, QUOTE, b"ak")
    assert quoted_head(quote) == HEAD


def test_who_vouches() -> None:
    assert verify_checkpoint(parse_checkpoint(NOTE), bundle()) == (ORIGIN,)
    other = VerifierKey(
        ORIGIN, Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
    )
    assert verify_checkpoint(parse_checkpoint(NOTE), bundle(other, KEY)) == (ORIGIN,)
    for unknown in (other, VerifierKey("hostd-ledger/other", PUBLIC)):
        with pytest.raises(VerificationError, match="no key of the trust bundle"):
            verify_checkpoint(parse_checkpoint(NOTE), bundle(unknown))
    with pytest.raises(VerificationError, match="no key of the trust bundle"):
        verify_checkpoint(parse_checkpoint(NOTE), TrustBundle(frozenset({"x"}), channel_cas=(b"x",)))


def test_a_quote_alone_vouches_for_size_and_root_only() -> None:
    """The TPM signs neither whose ledger it is nor what else the note says: who has the key does."""
    vectors = json.loads((Path(__file__).parents[1] / "vectors" / "receipt-good.json").read_text())
    head = json.loads(vectors["cases"][1]["document"])["head"]
    trust = parse_bundle(json.dumps(vectors["bundle"]).encode())

    def note(origin: str, more: str = "") -> Checkpoint:
        raw = key_id(origin, QUOTE, trust.aks[0]) + json.dumps(head).encode()
        signed = f"\u2014 {origin} {base64.b64encode(raw).decode()}\n"
        body = f"{origin}\n{head['size']}\n{head['root']}\n{more}\n"
        return parse_checkpoint((body + signed).encode())

    named = replace(trust, ledger=(str(KEY),))
    assert verify_checkpoint(note(ORIGIN), named) == ("TPM quote",)
    assert verify_checkpoint(note(ORIGIN), trust) == ("TPM quote",)
    for checkpoint, by in ((note("hostd-ledger/other"), named), (note(ORIGIN, "more\n"), named)):
        with pytest.raises(VerificationError, match="no key of the trust bundle"):
            verify_checkpoint(checkpoint, by)
    with pytest.raises(VerificationError, match="no key of the trust bundle"):
        verify_checkpoint(note(ORIGIN, "more\n"), trust)


def test_signatures_of_others_are_no_matter() -> None:
    witness = f"\u2014 witness.example {base64.b64encode(b'1234' + bytes(72)).decode()}\n".encode()
    assert verify_checkpoint(parse_checkpoint(NOTE + witness), bundle()) == (ORIGIN,)
    body, _, signed = NOTE.partition(b"\n\n")
    assert verify_checkpoint(parse_checkpoint(body + b"\n\n" + witness + signed), bundle()) == (ORIGIN,)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\n1234\n", b"\n1235\n"),
        (b"/0123\n", b"/0124\n"),
        (base64.b64encode(ROOT), base64.b64encode(bytes(32))),
    ],
)
def test_another_text_under_the_signature(old: bytes, new: bytes) -> None:
    with pytest.raises(VerificationError):
        verify_checkpoint(parse_checkpoint(NOTE.replace(old, new, 1)), bundle())


def test_a_line_more_in_the_text() -> None:
    found = parse_checkpoint(NOTE.replace(b"\n\n", b"\nmore\n\n"))
    assert found.extensions == ("more",)
    with pytest.raises(VerificationError, match="not a signature"):
        verify_checkpoint(found, bundle())


@pytest.mark.parametrize(
    "note",
    [
        b"",
        NOTE[:-1],
        NOTE.replace(b"\n\n", b"\n"),
        NOTE.replace(b"\n1234\n", b"\n01234\n"),
        NOTE.replace(b"\n1234\n", b"\n-1\n"),
        NOTE.replace(b"\n1234\n", b"\n9999999999999999999\n"),
        NOTE.replace(b"\n1234\n", b"\n\xd9\xa1\n"),
        NOTE.replace(base64.b64encode(ROOT), base64.b64encode(ROOT[1:])),
        NOTE.replace(base64.b64encode(ROOT), base64.b64encode(ROOT)[:-1]),
        NOTE.replace("\u2014".encode(), b"-"),
        NOTE.replace(b"/0123 ", b"/0123  "),
        NOTE.replace(b"hostd", b"host\x01"),
        NOTE.replace(b"hostd", b"host\r"),
        NOTE.replace(b"hostd", b"host\xff"),
        NOTE + b"\n",
        NOTE + "\u2014 a+b AAAAAAAA\n".encode(),
        NOTE + "\u2014 a AAAA\n".encode(),
        NOTE + "\u2014 a AAAAAAAA\n".encode() * MAX_SIGNATURES,
        NOTE + b"x" * MAX_NOTE_BYTES,
        b"\n" + NOTE,
        NOTE.replace(b"\n\n", b"\n\nx\n\n", 1),
    ],
)
def test_what_is_no_checkpoint(note: bytes) -> None:
    with pytest.raises(MalformedError, match="checkpoint"):
        parse_checkpoint(note)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    for note in (data, NOTE + data, data + NOTE):
        try:
            found = parse_checkpoint(note)
        except MalformedError:
            continue
        assert note.startswith(found.body + b"\n")


def test_mutations_never_verify_as_something_else() -> None:
    chance = random.Random(1)
    good = parse_checkpoint(NOTE)
    for _ in range(3000):
        data = bytearray(NOTE)
        match chance.randrange(3):
            case 0:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                del data[chance.randrange(len(data)) :]
            case 2:
                data.insert(chance.randrange(len(data)), chance.randrange(256))
        try:
            found = parse_checkpoint(bytes(data))
            verify_checkpoint(found, bundle())
        except (MalformedError, VerificationError):
            continue
        assert (found.origin, found.size, found.root, found.body) == (
            good.origin,
            good.size,
            good.root,
            good.body,
        )


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"size":1,"size":1}', b"[" * 100_000])
def test_a_quote_that_is_none(text: bytes) -> None:
    with pytest.raises(MalformedError, match="not a signed head"):
        quoted_head(text)


def test_the_bundle_has_the_key() -> None:
    made = TrustBundle(frozenset({"x"}), aks=(b"ak",), ledger=(str(KEY),))
    assert parse_bundle(encode_bundle(made)) == made
    with pytest.raises(MalformedError, match="verifier key"):
        parse_bundle(encode_bundle(made).replace(KEY.id.hex().encode(), b"00000000"))
