"""SSH signatures: those of the real ssh-keygen hold, and nothing that differs from one does."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import random
import re
import shutil
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st

from guestlib.attest.sshsig import (
    BEGIN,
    END,
    MAX_SIGNATURES,
    MAX_SIGNATURES_BYTES,
    armoured,
    parse_signatures,
    verify_quorum,
    verify_signature,
)
from guestlib.errors import DeniedError, MalformedError
from guestlib.sshkeys import SK_ED25519, PublicKey, parse_public_key, string
from tests.support.officers import NAMESPACE, Officer, make

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
MESSAGE = b'{"format":"hostd-reference/2"}'
KINDS = [("ed25519", None), ("ecdsa", 256), ("ecdsa", 384), ("ecdsa", 521), ("rsa", 2048), ("rsa", 3072)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("officers")


@pytest.fixture(scope="module")
def officers(place: Path) -> dict[str, Officer]:
    return {
        f"{kind}{bits or ''}": make(place, f"{kind}{bits or ''}@test", kind, bits) for kind, bits in KINDS
    }


@pytest.fixture(scope="module")
def signed(officers: dict[str, Officer]) -> dict[str, bytes]:
    return {name: officer.sign(MESSAGE) for name, officer in officers.items()}


def verify(signatures: bytes, *keys: PublicKey, quorum: int = 1, message: bytes = MESSAGE) -> tuple[str, ...]:
    return verify_quorum(signatures, message, namespace=NAMESPACE, officers=keys, quorum=quorum)


@pytest.mark.parametrize("name", [f"{kind}{bits or ''}" for kind, bits in KINDS])
def test_every_type_of_key(name: str, officers: dict[str, Officer], signed: dict[str, bytes]) -> None:
    assert verify(signed[name], officers[name].key) == (f"{name}@test",)
    with pytest.raises(DeniedError, match="not over these bytes"):
        verify(signed[name], officers[name].key, message=MESSAGE + b" ")


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("name", ["ed25519", "rsa2048"])
def test_both_hashes(name: str, algorithm: str, officers: dict[str, Officer]) -> None:
    signature = officers[name].sign(MESSAGE, NAMESPACE, "-O", f"hashalg={algorithm}")
    assert parse_signatures(signature)[0].hash == algorithm
    assert verify(signature, officers[name].key)


def test_re_encoding_gives_the_very_bytes(signed: dict[str, bytes]) -> None:
    for signature in signed.values():
        body = signature.removeprefix(BEGIN).removesuffix(END).replace(b"\n", b"")
        assert armoured(base64.b64decode(body)) == signature


@pytest.mark.parametrize("name", [f"{kind}{bits or ''}" for kind, bits in KINDS])
def test_any_changed_byte_is_refused(
    name: str, officers: dict[str, Officer], signed: dict[str, bytes]
) -> None:
    """Every byte of the binary signature, and every byte of the block around it."""
    good, key = signed[name], officers[name].key
    blob = bytearray(base64.b64decode(good.removeprefix(BEGIN).removesuffix(END).replace(b"\n", b"")))
    rng = random.Random(name)
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1 << rng.randrange(8)
        with pytest.raises((DeniedError, MalformedError)):
            verify(armoured(bytes(changed)), key)
    for position in range(len(good)):
        text = bytearray(good)
        text[position] ^= 1 << rng.randrange(8)
        with pytest.raises((DeniedError, MalformedError)):
            verify(bytes(text), key)


def test_truncated(officers: dict[str, Officer], signed: dict[str, bytes]) -> None:
    good = signed["ed25519"]
    for length in range(1, len(good)):
        with pytest.raises(MalformedError):
            verify(good[:length], officers["ed25519"].key)


def test_any_changed_byte_of_the_message_is_refused(
    officers: dict[str, Officer], signed: dict[str, bytes]
) -> None:
    for position in range(len(MESSAGE)):
        changed = bytearray(MESSAGE)
        changed[position] ^= 1
        with pytest.raises(DeniedError):
            verify(signed["ed25519"], officers["ed25519"].key, message=bytes(changed))


def test_another_purpose(officers: dict[str, Officer]) -> None:
    officer = officers["ed25519"]
    with pytest.raises(DeniedError, match="for the purpose 'file', 'hostd-manifest' is needed"):
        verify(officer.sign(MESSAGE, "file"), officer.key)


def test_somebody_else(officers: dict[str, Officer], signed: dict[str, bytes]) -> None:
    stranger = officers["ecdsa256"].key
    with pytest.raises(DeniedError, match=re.escape(f"{stranger.fingerprint}, which is no")):
        verify(signed["ecdsa256"], officers["ed25519"].key)
    # Even where enough others have signed.
    with pytest.raises(DeniedError, match="no officer's key"):
        verify(signed["ed25519"] + signed["ecdsa256"], officers["ed25519"].key)


def test_quorum(officers: dict[str, Officer], signed: dict[str, bytes]) -> None:
    a, b = officers["ed25519"].key, officers["rsa2048"].key
    assert verify(signed["ed25519"] + signed["rsa2048"], a, b, quorum=2) == ("ed25519@test", "rsa2048@test")
    with pytest.raises(DeniedError, match=r"2 officers must sign, 1 did: ed25519@test$"):
        verify(signed["ed25519"], a, b, quorum=2)
    with pytest.raises(DeniedError, match="2 officers must sign, 1 did: ed25519@test; ed25519@test more"):
        verify(signed["ed25519"] * 2, a, b, quorum=2)
    with pytest.raises(DeniedError, match="1 officers must sign, 0 did: nobody"):
        verify(b"", a)


def test_a_key_under_another_name_is_the_same_officer(
    officers: dict[str, Officer], signed: dict[str, bytes]
) -> None:
    key = officers["ed25519"].key
    with pytest.raises(DeniedError, match="2 officers must sign, 1 did"):
        verify(signed["ed25519"] * 2, key, PublicKey(key.type, key.blob, "again"), quorum=2)


def test_bounds(officers: dict[str, Officer], signed: dict[str, bytes]) -> None:
    key = officers["ed25519"].key
    with pytest.raises(MalformedError, match="over 16"):
        verify(signed["ed25519"] * (MAX_SIGNATURES + 1), key)
    with pytest.raises(MalformedError, match="over 65536 bytes"):
        verify(BEGIN + b"A" * MAX_SIGNATURES_BYTES + END, key)
    huge = b"SSHSIG" + (1).to_bytes(4, "big") + b"\xff" * 100
    with pytest.raises(MalformedError, match="at most 4096"):
        verify(armoured(huge), key)


def test_what_lies_between_signatures_is_refused(
    officers: dict[str, Officer], signed: dict[str, bytes]
) -> None:
    good = signed["ed25519"]
    for variant in (b"\n" + good, good + b"\n", good + b"#\n" + good, good.replace(b"\n", b"\r\n")):
        with pytest.raises(MalformedError):
            verify(variant, officers["ed25519"].key)


def made(key: bytes, *, form: bytes, body: bytes, reserved: bytes = b"") -> bytes:
    """A signature block from its parts, as ssh-keygen puts them together."""
    parts = (key, NAMESPACE.encode(), reserved, b"sha512", string(form) + body)
    return armoured(b"SSHSIG" + (1).to_bytes(4, "big") + b"".join(map(string, parts)))


def payload(reserved: bytes = b"") -> bytes:
    digest = hashlib.sha512(MESSAGE).digest()
    return b"SSHSIG" + b"".join(map(string, (NAMESPACE.encode(), reserved, b"sha512", digest)))


def security_key(flags: int) -> tuple[PublicKey, bytes]:
    """A key and a signature as a security key makes them (PROTOCOL.u2f)."""
    private = ed25519.Ed25519PrivateKey.generate()
    blob = string(SK_ED25519.encode()) + string(private.public_key().public_bytes_raw()) + string(b"ssh:")
    counter = (7).to_bytes(4, "big")
    signed = hashlib.sha256(b"ssh:").digest() + bytes([flags]) + counter + hashlib.sha256(payload()).digest()
    body = string(private.sign(signed)) + bytes([flags]) + counter
    line = f"{SK_ED25519} {base64.b64encode(blob).decode()} token"
    return parse_public_key(line), made(blob, form=SK_ED25519.encode(), body=body)


def test_security_key() -> None:
    key, signature = security_key(1)
    assert verify(signature, key) == ("token",)
    key, signature = security_key(0)
    with pytest.raises(DeniedError, match="nobody touched"):
        verify(signature, key)


def test_algorithm_must_fit_the_key(officers: dict[str, Officer], signed: dict[str, bytes]) -> None:
    """SHA-1 (`ssh-rsa`) above all."""
    for name, form in (("rsa2048", b"ssh-rsa"), ("rsa2048", b"ssh-ed25519"), ("ed25519", b"rsa-sha2-256")):
        key = officers[name].key
        body = parse_signatures(signed[name])[0].body
        with pytest.raises(MalformedError, match="for a key of type"):
            verify(made(key.blob, form=form, body=body), key)


def test_reserved_field_is_empty() -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    blob = string(b"ssh-ed25519") + string(private.public_key().public_bytes_raw())
    key = PublicKey("ssh-ed25519", blob, "a")
    body = string(private.sign(payload()))
    assert verify(made(blob, form=b"ssh-ed25519", body=body), key) == ("a",)
    body = string(private.sign(payload(b"x")))
    with pytest.raises(MalformedError, match="reserved"):
        verify(made(blob, form=b"ssh-ed25519", body=body, reserved=b"x"), key)


def test_a_signature_is_not_taken_for_another_key(
    officers: dict[str, Officer], signed: dict[str, bytes]
) -> None:
    with pytest.raises(DeniedError, match="another key"):
        verify_signature(
            parse_signatures(signed["ed25519"])[0], MESSAGE, namespace=NAMESPACE, key=officers["rsa2048"].key
        )


@given(st.binary(max_size=400))
def test_anything_else_is_malformed(data: bytes) -> None:
    for candidate in (data, BEGIN + data + END, armoured(data), armoured(b"SSHSIG\0\0\0\x01" + data)):
        with contextlib.suppress(MalformedError):
            parse_signatures(candidate)


# ── Public keys ───────────────────────────────────────────────────────────────────────────────────


def test_public_keys(officers: dict[str, Officer]) -> None:
    for name, officer in officers.items():
        assert officer.key.name == f"{name}@test"
        assert officer.key.fingerprint.startswith("SHA256:")


def changed_line(line: str, change: Callable[[bytearray], None]) -> str:
    kind, encoded, name = line.split(" ", 2)
    blob = bytearray(base64.b64decode(encoded))
    change(blob)
    return f"{kind} {base64.b64encode(blob).decode()} {name}"


def test_malformed_public_keys(officers: dict[str, Officer], place: Path) -> None:
    good = officers["ed25519"].line
    kind, encoded, name = good.split(" ", 2)
    for line, reason in (
        ("", "not `type"),
        (f"{kind} {encoded}", "not `type"),
        (f"no-pty {kind} {encoded}", "not base64|a name of"),
        (f"{kind} {encoded[:-4]} {name}", "truncated"),
        (f"{kind} {encoded}AAAA {name}", "trailing"),
        (f"{kind} *{encoded} {name}", "not base64"),
        (f"{kind} {encoded} {'n' * 65}", "a name of"),
        (f"{kind} {encoded} a\x1bb", "a name of"),
        (f"ssh-rsa {encoded} {name}", "the type inside"),
        (f"{kind} {encoded} {'x' * 5000}", "over 4096"),
        (make(place, "small", "rsa", 1024).line, "1024 bits"),
    ):
        with pytest.raises(MalformedError, match=reason):
            parse_public_key(line)
    dsa = base64.b64encode(string(b"ssh-dss") + string(b"x")).decode()
    with pytest.raises(MalformedError, match="is not accepted"):
        parse_public_key(f"ssh-dss {dsa} old")


def test_cut_short_public_keys(officers: dict[str, Officer]) -> None:
    for officer in officers.values():
        blob = officer.key.blob
        for length in range(len(blob)):
            with pytest.raises(MalformedError):
                parse_public_key(f"{officer.key.type} {base64.b64encode(blob[:length]).decode()} x")


@given(st.text(max_size=200))
def test_any_text_is_a_key_or_malformed(line: str) -> None:
    for text in (line, f"ssh-ed25519 {line}", f"ssh-rsa AAAAB3NzaC1yc2E{line}"):
        with contextlib.suppress(MalformedError):
            parse_public_key(text)
