"""Every primitive against its standard, against OpenSSL, and against one changed byte."""

from __future__ import annotations

import hashlib
import hmac
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from guestlib.errors import InvalidCiphertextError
from hostd.core.keys import SCHEMES, Algorithm
from hostd.platform import secretmem
from hostd.vault import primitives
from hostd.vault.primitives import OVERHEAD_BYTES, IntegrityError
from tests.vault.support_keys import root

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
KEY_ID = bytes(range(16))
AAD = {"purpose": "disk", "vm": "web1"}

# ── Known answers ─────────────────────────────────────────────────────────────────────────────────


def hkdf(ikm: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2, a second time."""
    prk = hmac.digest(salt, ikm, "sha256")
    out, block = b"", b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.digest(prk, block + info + bytes([i]), "sha256")
        out += block
    return out[:length]


def test_the_second_hkdf_is_right() -> None:
    """RFC 5869, test case 1."""
    okm = hkdf(bytes([0x0B] * 22), bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


def test_kek_is_hkdf_over_store_generation_and_tenant() -> None:
    kek = primitives.derive_kek(KEY, store=b"s" * 16, tenant="red", generation=0x01020304)
    assert kek == hkdf(KEY, b"s" * 16, b"hostd kek v1\0\x01\x02\x03\x04red", 32)
    secret = root(KEY)
    with secret.view() as view:
        assert primitives.derive_kek(view, store=b"s" * 16, tenant="red", generation=0x01020304) == kek
    secret.wipe()


def test_no_two_keks_are_the_same() -> None:
    keks = {
        bytes(primitives.derive_kek(r, store=s, tenant=t, generation=g))
        for r in (KEY, OTHER_KEY)
        for s in (b"s" * 16, b"t" * 16)
        for t in ("", "red", "re", "d")
        for g in (0, 1, 0x64)
    }
    assert len(keks) == 2 * 2 * 4 * 3


def test_aes_gcm_is_nist_s() -> None:
    """GCM specification, test cases 14 (AES-256, one zero block) and 16 (with AAD)."""
    assert AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), b"").hex() == (
        "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    )
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
    plain = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    aad = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    nonce = bytes.fromhex("cafebabefacedbaddecaf888")
    cipher = bytes.fromhex(
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )
    assert primitives.unwrap(key, nonce + cipher, aad) == plain


def test_a_message_key_is_sp_800_108_in_counter_mode() -> None:
    """[i]32 || label || 00 || context || [L]32, one block of HMAC-SHA256 (SP 800-108r1, 4.1)."""
    salt = bytes(range(16))
    fixed = b"hostd message key v1" + b"\0" + salt + (256).to_bytes(4, "big")
    expected = hmac.new(KEY, (1).to_bytes(4, "big") + fixed, hashlib.sha256).digest()
    assert primitives._message_key(KEY, salt) == expected


def test_a_ciphertext_is_built_as_its_docstring_says() -> None:
    """Opened with nothing of the module under test: the format is on disks."""
    ciphertext = primitives.seal(KEY, KEY_ID, 7, b"plaintext", {"b": "2", "a": "1"})
    assert len(ciphertext) == OVERHEAD_BYTES + 9
    header, salt, body = ciphertext[:24], ciphertext[24:40], ciphertext[40:]
    assert header == b"HDC1" + KEY_ID + b"\0\0\0\7"
    label = b"hostd message key v1\0"
    key = hmac.new(KEY, b"\0\0\0\1" + label + salt + b"\0\0\1\0", hashlib.sha256).digest()
    aad = b"".join(len(t).to_bytes(4, "big") + t for t in (b"a", b"1", b"b", b"2"))
    assert AESGCM(key).decrypt(bytes(12), body, header + aad) == b"plaintext"


def test_hmac_is_rfc_4231_s() -> None:
    """Test case 2."""
    tag = primitives.mac(b"Jefe", b"what do ya want for nothing?")
    assert tag.hex() == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert primitives.mac_matches(b"Jefe", b"what do ya want for nothing?", tag)
    for wrong in (tag[:-1], tag[:16], b"", tag + b"\0", bytes(32), tag[:-1] + b"\0"):
        assert not primitives.mac_matches(b"Jefe", b"what do ya want for nothing?", wrong)
    assert not primitives.mac_matches(b"Jefe", b"what do ya want for nothing!", tag)


# ── Wrapping ──────────────────────────────────────────────────────────────────────────────────────


def test_wrap_and_every_changed_byte() -> None:
    wrapped = primitives.wrap(KEY, b"material", b"row")
    assert primitives.unwrap(KEY, wrapped, b"row") == b"material"
    assert primitives.wrap(KEY, b"material", b"row") != wrapped
    wrong = [(OTHER_KEY, wrapped, b"row"), (KEY, wrapped, b"rov"), (KEY, wrapped, b"row\0")]
    wrong += [(KEY, changed, b"row") for changed in changes(wrapped)]
    for case in wrong:
        with pytest.raises(IntegrityError):
            primitives.unwrap(*case)


def changes(data: bytes) -> list[bytes]:
    """Every byte flipped, every truncation, one byte more."""
    flipped = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    return [*flipped, *(data[:i] for i in range(len(data))), data + b"\0"]


# ── Sealing ───────────────────────────────────────────────────────────────────────────────────────

AADS = st.dictionaries(st.text(min_size=1, max_size=6), st.text(max_size=6), max_size=4)


@given(st.binary(max_size=100), AADS, st.integers(1, 2**31 - 1))
def test_open_gives_what_was_sealed(plaintext: bytes, aad: dict[str, str], version: int) -> None:
    ciphertext = primitives.seal(KEY, KEY_ID, version, plaintext, aad)
    assert primitives.parse_header(ciphertext) == (KEY_ID, version)
    assert primitives.open_sealed(KEY, ciphertext, aad) == plaintext
    turned = dict(reversed(aad.items()))
    assert primitives.open_sealed(KEY, ciphertext, turned) == plaintext


def open_it(ciphertext: bytes) -> bytes:
    return primitives.open_sealed(KEY, ciphertext, AAD)


@pytest.mark.parametrize("length", [0, 1, 33])
def test_every_changed_byte_of_a_ciphertext(length: int) -> None:
    ciphertext = primitives.seal(KEY, KEY_ID, 1, bytes(length), AAD)
    for changed in changes(ciphertext):
        # As the service does: the header is read first, and a text that is too short stops there.
        read = primitives.parse_header if len(changed) < OVERHEAD_BYTES else open_it
        with pytest.raises(InvalidCiphertextError):
            read(changed)


def test_another_key_and_other_data_do_not_open() -> None:
    ciphertext = primitives.seal(KEY, KEY_ID, 1, b"p", AAD)
    for key, aad in (
        (OTHER_KEY, AAD),
        (KEY, {}),
        (KEY, AAD | {"vm": "web2"}),
        (KEY, AAD | {"more": ""}),
        (KEY, {"purpose": "disk"}),
        (KEY, {"vm": "disk", "purpose": "web1"}),
    ):
        with pytest.raises(InvalidCiphertextError):
            primitives.open_sealed(key, ciphertext, aad)


@pytest.mark.parametrize(
    "header", [b"", b"HDC1", b"HDC1" + bytes(OVERHEAD_BYTES - 5), b"HDC2" + bytes(OVERHEAD_BYTES)], ids=len
)
def test_what_is_no_ciphertext_of_ours(header: bytes) -> None:
    with pytest.raises(InvalidCiphertextError, match="not a hostd ciphertext"):
        primitives.parse_header(header)


def test_no_two_messages_share_a_key() -> None:
    salts = {primitives.seal(KEY, KEY_ID, 1, b"", {})[24:40] for _ in range(2000)}
    assert len(salts) == 2000


@given(AADS, AADS)
def test_two_objects_never_give_the_same_bytes(one: dict[str, str], other: dict[str, str]) -> None:
    same = primitives.canonical_aad(one) == primitives.canonical_aad(other)
    assert same == (one == other)


@given(AADS)
def test_the_canonical_form_can_be_read_back(aad: dict[str, str]) -> None:
    """So it is injective: nothing of it is guessed."""
    raw, texts = primitives.canonical_aad(aad), []
    while raw:
        length = int.from_bytes(raw[:4], "big")
        texts.append(raw[4 : 4 + length].decode())
        raw = raw[4 + length :]
    assert dict(zip(texts[::2], texts[1::2], strict=True)) == aad
    assert texts[::2] == sorted(aad)


def test_pairs_do_not_run_into_each_other() -> None:
    forms = [
        {"ab": "c"},
        {"a": "bc"},
        {"abc": ""},
        {"a": "b", "c": ""},
        {"a": "", "b": "c"},
        {"a": "\0\0\0\1b"},
        {},
    ]
    assert len({primitives.canonical_aad(form) for form in forms}) == len(forms)


# ── Signatures, checked by OpenSSL ────────────────────────────────────────────────────────────────

PAIRS = [(a, s) for a, schemes in SCHEMES.items() for s in schemes]
OPENSSL = {
    "ecdsa-sha256": ["-rawin", "-digest", "sha256"],
    "ed25519": ["-rawin"],
    "rsa-pss-sha256": [
        *("-rawin", "-digest", "sha256", "-pkeyopt", "rsa_padding_mode:pss"),
        *("-pkeyopt", "rsa_pss_saltlen:32", "-pkeyopt", "rsa_mgf1_md:sha256"),
    ],
    "rsa-pkcs1-sha256": ["-rawin", "-digest", "sha256", "-pkeyopt", "rsa_padding_mode:pkcs1"],
}


@pytest.fixture(scope="module")
def materials() -> dict[Algorithm, bytes]:
    return {algorithm: bytes(primitives.generate(algorithm)) for algorithm in Algorithm}


def openssl(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["openssl", *arguments], cwd=tmp_path, check=False, capture_output=True, timeout=60)


@pytest.mark.parametrize(("algorithm", "scheme"), PAIRS)
def test_openssl_agrees(
    algorithm: Algorithm, scheme: str, materials: dict[Algorithm, bytes], tmp_path: Path
) -> None:
    message = os.urandom(100)
    private = primitives.load_private(algorithm, materials[algorithm])
    (tmp_path / "message").write_bytes(message)
    (tmp_path / "public").write_bytes(primitives.public_der(private))
    (tmp_path / "private").write_bytes(materials[algorithm])
    (tmp_path / "signature").write_bytes(primitives.sign(private, scheme, message))
    ours = openssl(
        tmp_path,
        *("pkeyutl", "-verify", "-pubin", "-keyform", "DER", "-inkey", "public"),
        *("-in", "message", "-sigfile", "signature", *OPENSSL[scheme]),
    )
    assert b"Verified Successfully" in ours.stdout, ours.stderr
    theirs = openssl(
        tmp_path,
        *("pkeyutl", "-sign", "-keyform", "DER", "-inkey", "private"),
        *("-in", "message", "-out", "theirs", *OPENSSL[scheme]),
    )
    assert theirs.returncode == 0, theirs.stderr
    signature = (tmp_path / "theirs").read_bytes()
    assert primitives.signature_matches(private, scheme, message, signature)


@pytest.mark.parametrize(("algorithm", "scheme"), PAIRS)
def test_a_signature_is_one_messages_one_schemes_and_one_keys(
    algorithm: Algorithm, scheme: str, materials: dict[Algorithm, bytes]
) -> None:
    private = primitives.load_private(algorithm, materials[algorithm])
    signature = primitives.sign(private, scheme, b"message")
    assert primitives.signature_matches(private, scheme, b"message", signature)
    assert not primitives.signature_matches(private, scheme, b"messagf", signature)
    for changed in changes(signature) if len(signature) < 100 else changes(signature)[::37]:
        assert not primitives.signature_matches(private, scheme, b"message", changed)
    for other in {s for _, s in PAIRS} - {scheme}:
        if other in SCHEMES[algorithm]:
            assert not primitives.signature_matches(private, other, b"message", signature)
        else:
            with pytest.raises(ValueError, match="does not sign"):
                primitives.sign(private, other, b"message")
            with pytest.raises(ValueError, match="does not verify"):
                primitives.signature_matches(private, other, b"message", signature)
    if algorithm is not Algorithm.RSA_3072:
        another = primitives.load_private(algorithm, primitives.generate(algorithm))
        assert not primitives.signature_matches(another, scheme, b"message", signature)


def test_fresh_material_is_of_its_kind(materials: dict[Algorithm, bytes], tmp_path: Path) -> None:
    for algorithm in (Algorithm.AES_256_GCM, Algorithm.HMAC_SHA_256):
        assert len(materials[algorithm]) == 32
        assert primitives.generate(algorithm) != materials[algorithm]
    names = {Algorithm.ECDSA_P256: b"prime256v1", Algorithm.ED25519: b"ED25519", Algorithm.RSA_3072: b"3072"}
    for algorithm, name in names.items():
        (tmp_path / "k").write_bytes(materials[algorithm])
        shown = openssl(tmp_path, "pkey", "-inform", "DER", "-in", "k", "-noout", "-text")
        assert name in shown.stdout


@pytest.mark.parametrize("algorithm", [Algorithm.ECDSA_P256, Algorithm.ED25519])
def test_what_is_written_here_is_what_the_library_writes(algorithm: Algorithm) -> None:
    for _ in range(50):
        material = primitives.generate(algorithm)
        assert material == primitives.load_private(algorithm, material).private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def test_a_scalar_is_above_zero_and_below_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    drawn = [0, order, order + 1, 2**256 - 1, order - 1]

    def planned(size: int) -> bytearray:
        return bytearray(drawn.pop(0).to_bytes(size, "big"))

    monkeypatch.setattr(secretmem, "random", planned)
    private = primitives.load_private(Algorithm.ECDSA_P256, primitives.generate(Algorithm.ECDSA_P256))
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.private_numbers().private_value == order - 1
    assert drawn == []


@pytest.mark.parametrize("algorithm", [Algorithm.ECDSA_P256, Algorithm.ED25519])
def test_what_a_key_is_made_from_is_wiped(algorithm: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    random, join, parts = secretmem.random, primitives._joined, []

    def drawn(size: int) -> bytearray:
        parts.append(random(size))
        return parts[-1]

    def joined(*pieces: Any) -> bytearray:
        parts.append(join(*pieces))
        return parts[-1]

    monkeypatch.setattr(secretmem, "random", drawn)
    monkeypatch.setattr(primitives, "_joined", joined)
    material = primitives.generate(algorithm)
    assert parts.pop() is material
    assert any(material)
    assert len(parts) >= 1
    assert not any(map(any, parts))


def test_the_seed_of_the_checkpoint_key_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    derive, seeds = primitives._derive, []

    def seen(*arguments: Any) -> bytearray:
        seeds.append(derive(*arguments))
        return seeds[-1]

    monkeypatch.setattr(primitives, "_derive", seen)
    primitives.derive_checkpoint_key(KEY, store=b"s" * 16)
    assert len(seeds) == 1
    assert not any(seeds[0])


def test_a_stored_key_of_another_algorithm_is_not_loaded(materials: dict[Algorithm, bytes]) -> None:
    asymmetric = list(SCHEMES)
    for stored in asymmetric:
        for wanted in asymmetric:
            if stored is not wanted:
                with pytest.raises(IntegrityError, match="another algorithm"):
                    primitives.load_private(wanted, materials[stored])
    for garbage in (b"", b"garbage", materials[Algorithm.RSA_3072][:500], bytes(32)):
        with pytest.raises(IntegrityError):
            primitives.load_private(Algorithm.RSA_3072, garbage)
