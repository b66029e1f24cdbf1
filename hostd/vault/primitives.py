"""Every cryptographic primitive of the vault, in one place. Each says what makes it safe.

Nothing here knows tenants, states or requests: callers check those first. Keys come in any buffer and go
out as `bytearray`, which the caller wipes; what a library leaves of one on stack or heap is overwritten
(`secretmem.scrubbed`). Nothing is logged and no error text carries data.

Sources: NIST SP 800-38D (GCM), SP 800-108 rev. 1 (KDF in counter mode), RFC 5869 (HKDF),
FIPS 186-5 (ECDSA, EdDSA, RSA).
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from guestlib.attest.canonical import canonical_aad
from guestlib.errors import InvalidCiphertextError
from hostd.core.keys import Algorithm
from hostd.platform import secretmem

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
SALT_BYTES: Final = 16
TAG_BYTES: Final = 16

CheckpointKey = ed25519.Ed25519PrivateKey
Secret = bytes | bytearray | memoryview
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey


class IntegrityError(Exception):
    """A wrapped key does not open: another root, another row, or altered bytes."""


# ── Wrapping ──────────────────────────────────────────────────────────────────────────────────────


def derive_kek(root: Secret, *, store: bytes, tenant: str, generation: int) -> bytearray:
    """The key-encryption key of one tenant, 32 bytes.

    HKDF-SHA256 with the store's random id as salt; the info names purpose, tenant and generation,
    so no two tenants, stores or generations share a key.
    """
    return _derive(root, store, b"hostd kek v1\0" + generation.to_bytes(4, "big") + tenant.encode())


def derive_salt_key(root: Secret, *, store: bytes, tenant: str) -> bytearray:
    """The key that a tenant's receipt salts come from, 32 bytes; derived as `derive_kek`, with a label of
    its own. It has no generation: receipts outlive rotations."""
    return _derive(root, store, b"hostd salt key v1\0" + tenant.encode())


def derive_checkpoint_key(root: Secret, *, store: bytes) -> CheckpointKey:
    """The key that signs the ledger's checkpoints: an Ed25519 seed derived as `derive_kek`, with a label of
    its own. It signs nothing else, and the same store and root key always give the same key."""
    seed = _derive(root, store, b"hostd checkpoint key v1\0")
    try:
        return ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    finally:
        secretmem.wipe(seed)


def _derive(root: Secret, store: bytes, info: bytes) -> bytearray:
    made = bytearray(KEY_BYTES)
    with secretmem.scrubbed():
        HKDF(hashes.SHA256(), KEY_BYTES, salt=store, info=info).derive_into(root, made)
    return made


def ed25519_public(private: ed25519.Ed25519PrivateKey) -> bytes:
    """The public key, 32 bytes (RFC 8032)."""
    return private.public_key().public_bytes_raw()


def receipt_salt(key: Secret, entry: int) -> bytes:
    """The salt of one ledger entry's commitments, 16 bytes: HMAC-SHA-256(key, label || entry number
    (8 bytes, big endian)), its first half. Whoever is told one learns nothing of another."""
    return hmac.digest(key, b"hostd salt" + entry.to_bytes(8, "big"), "sha256")[:SALT_BYTES]


def wrap(kek: Secret, material: Secret, binding: bytes) -> bytes:
    """nonce (12) || AES-256-GCM ciphertext and tag.

    A KEK wraps at most some thousand keys, far below the 2^32 bound for random nonces
    (SP 800-38D section 8.3). `binding` says what row the material belongs to.
    """
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(kek).encrypt(nonce, material, binding)


def unwrap(kek: Secret, wrapped: bytes, binding: bytes) -> bytearray:
    """The material.

    Raises:
        IntegrityError: it was not wrapped under this key for this row.
    """
    material = bytearray(max(0, len(wrapped) - NONCE_BYTES - TAG_BYTES))
    try:
        AESGCM(kek).decrypt_into(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], binding, material)
    except (InvalidTag, ValueError):
        secretmem.wipe(material)
        raise IntegrityError("wrapped key does not open") from None
    return material


# ── Symmetric keys ────────────────────────────────────────────────────────────────────────────────

_LABEL: Final = b"hostd message key v1\0"
HEADER_MAGIC: Final = b"HDC1"
OVERHEAD_BYTES: Final = len(HEADER_MAGIC) + 16 + 4 + SALT_BYTES + TAG_BYTES


def _message_key(key: Secret, salt: bytes) -> bytes:
    """SP 800-108 KDF in counter mode, HMAC-SHA256, one block: [1] || label || 00 || salt || [256]."""
    return hmac.digest(key, b"\0\0\0\1" + _LABEL + salt + b"\0\0\1\0", "sha256")


def seal(key: Secret, key_id: bytes, version: int, plaintext: bytes, aad: Mapping[str, str]) -> bytes:
    """Self-describing ciphertext: magic (4) || key id (16) || version (4, big endian) || salt (16) ||
    AES-256-GCM ciphertext || tag (16).

    Each message has a key of its own, derived with a random 16-byte salt, and uses it once with the
    all-zero nonce. Two messages share a key only if their salts collide: no bound on messages per
    key version that a caller could reach (2^64 messages for a collision by chance of one half).
    Header and AAD are authenticated.
    """
    header = HEADER_MAGIC + key_id + version.to_bytes(4, "big")
    salt = os.urandom(SALT_BYTES)
    body = AESGCM(_message_key(key, salt)).encrypt(bytes(NONCE_BYTES), plaintext, header + canonical_aad(aad))
    return header + salt + body


def parse_header(ciphertext: bytes) -> tuple[bytes, int]:
    """Key id (16 bytes) and version that a ciphertext names; nothing of it is verified yet.

    Raises:
        InvalidCiphertextError: it is not one of ours.
    """
    if len(ciphertext) < OVERHEAD_BYTES or ciphertext[:4] != HEADER_MAGIC:
        raise InvalidCiphertextError("not a hostd ciphertext")
    return ciphertext[4:20], int.from_bytes(ciphertext[20:24], "big")


def open_sealed(key: Secret, ciphertext: bytes, aad: Mapping[str, str]) -> bytes:
    """The plaintext of `seal`.

    Raises:
        InvalidCiphertextError: altered, or of another key, version or AAD.
    """
    header, salt, body = ciphertext[:24], ciphertext[24:40], ciphertext[40:]
    try:
        return AESGCM(_message_key(key, salt)).decrypt(bytes(NONCE_BYTES), body, header + canonical_aad(aad))
    except InvalidTag:
        raise InvalidCiphertextError("ciphertext, key and additional data do not belong together") from None


def mac(key: Secret, message: bytes) -> bytes:
    """HMAC-SHA-256, 32 bytes (FIPS 198-1)."""
    return hmac.digest(key, message, "sha256")


def mac_matches(key: Secret, message: bytes, tag: bytes) -> bool:
    """Compares in constant time; truncated tags do not match."""
    return hmac.compare_digest(mac(key, message), tag)


# ── Asymmetric keys ───────────────────────────────────────────────────────────────────────────────


_P256_BARE: Final = bytes.fromhex("3041020100301306072a8648ce3d020106082a8648ce3d030107042730250201010420")
"""PKCS#8 of a P-256 key up to its scalar (RFC 5915), which ends it;"""
_P256_WHOLE: Final = bytes.fromhex("308187020100301306072a8648ce3d020106082a8648ce3d030107046d306b0201010420")
"""the same where the public key follows:"""
_P256_PUBLIC: Final = bytes.fromhex("a144034200")
_P256_ORDER: Final = bytes.fromhex("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551")
_ED25519: Final = bytes.fromhex("302e020100300506032b657004220420")
"""PKCS#8 of an Ed25519 key up to its seed (RFC 8410)."""


def generate(algorithm: Algorithm) -> bytearray:
    """Fresh key material: 32 random bytes, or a private key as unencrypted PKCS#8 DER.

    What the library writes out leaves copies behind, so the short ones are written here: an Ed25519 seed is
    32 random bytes (RFC 8032, 5.1.5), a P-256 scalar is one of 1 to n - 1 (FIPS 186-5, A.2.2). An RSA key
    leaves its copies in the child that makes it (`hostd.vault.mint`).
    """
    match algorithm:
        case Algorithm.AES_256_GCM | Algorithm.HMAC_SHA_256:
            return secretmem.random(KEY_BYTES)
        case Algorithm.ECDSA_P256:
            return _generate_p256()
        case Algorithm.ED25519:
            seed = secretmem.random(KEY_BYTES)
            der = _joined(_ED25519, seed)
            secretmem.wipe(seed)
            return der
        case Algorithm.RSA_3072:
            private = rsa.generate_private_key(65537, 3072)
            return bytearray(
                private.private_bytes(
                    serialization.Encoding.DER,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )


def _generate_p256() -> bytearray:
    scalar = secretmem.random(KEY_BYTES)
    while not bytes(KEY_BYTES) < scalar < _P256_ORDER:
        scalar = secretmem.random(KEY_BYTES)
    bare = _joined(_P256_BARE, scalar)
    point = (
        load_private(Algorithm.ECDSA_P256, bare)
        .public_key()
        .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    )
    der = _joined(_P256_WHOLE, scalar, _P256_PUBLIC + point)
    secretmem.wipe(bare)
    secretmem.wipe(scalar)
    return der


def _joined(before: bytes, secret: bytearray, after: bytes = b"") -> bytearray:
    """The three after each other, in memory of their own."""
    made = bytearray(len(before) + len(secret) + len(after))
    made[: len(before)] = before
    made[len(before) : len(before) + len(secret)] = secret
    made[len(before) + len(secret) :] = after
    return made


def load_private(algorithm: Algorithm, material: Secret) -> PrivateKey:
    """The private key of `generate`'s DER.

    Raises:
        IntegrityError: it is not a key of this algorithm. (The wrapping was authentic: a defect.)
    """
    try:
        with secretmem.scrubbed():
            key = serialization.load_der_private_key(
                material, password=None, unsafe_skip_rsa_key_validation=True
            )
    except ValueError:
        raise IntegrityError("stored key does not parse") from None
    expected: dict[Algorithm, type] = {
        Algorithm.ECDSA_P256: ec.EllipticCurvePrivateKey,
        Algorithm.ED25519: ed25519.Ed25519PrivateKey,
        Algorithm.RSA_3072: rsa.RSAPrivateKey,
    }
    if not isinstance(key, expected[algorithm]):
        raise IntegrityError("stored key is of another algorithm")
    assert isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey)
    return key


def public_der(private: PrivateKey) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    return private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


_PSS: Final = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


def sign(private: PrivateKey, scheme: str, message: bytes) -> bytes:
    """Signature over the message: ECDSA as DER, Ed25519 64 bytes, RSA 384 bytes."""
    match private, scheme:
        case ec.EllipticCurvePrivateKey(), "ecdsa-sha256":
            return private.sign(message, ec.ECDSA(hashes.SHA256()))
        case ed25519.Ed25519PrivateKey(), "ed25519":
            return private.sign(message)
        case rsa.RSAPrivateKey(), "rsa-pss-sha256":
            return private.sign(message, _PSS, hashes.SHA256())
        case rsa.RSAPrivateKey(), "rsa-pkcs1-sha256":
            return private.sign(message, padding.PKCS1v15(), hashes.SHA256())
    raise ValueError(f"key does not sign with {scheme}")


def signature_matches(private: PrivateKey, scheme: str, message: bytes, signature: bytes) -> bool:
    """Whether the signature is this key's over the message."""
    try:
        match private, scheme:
            case ec.EllipticCurvePrivateKey(), "ecdsa-sha256":
                private.public_key().verify(signature, message, ec.ECDSA(hashes.SHA256()))
            case ed25519.Ed25519PrivateKey(), "ed25519":
                private.public_key().verify(signature, message)
            case rsa.RSAPrivateKey(), "rsa-pss-sha256":
                private.public_key().verify(signature, message, _PSS, hashes.SHA256())
            case rsa.RSAPrivateKey(), "rsa-pkcs1-sha256":
                private.public_key().verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
            case _:
                raise ValueError(f"key does not verify with {scheme}")
    except InvalidSignature:
        return False
    return True
