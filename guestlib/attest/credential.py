"""Making a credential that one TPM alone can open, and only for one key in it (TPM2_MakeCredential).

A secret is encrypted to an endorsement key (EK) and bound to the Name of another key. TPM2_ActivateCredential
gives it back in the TPM that holds both, and nowhere else: whoever tells the secret has shown that the key
of that Name lives in the TPM of that EK.

TPM 2.0 part 1, section 24 (credentials), annexes B.10.4 (RSA) and C.6.4 (ECC) for the seed, section 11.4.10
for the key derivations. The EK is RSA-2048, P-256 or P-384 with AES in CFB mode, as TPM makers certify them.
No TSS, no I/O but the system's random numbers.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode

from guestlib.attest.quote import crypto_key
from guestlib.attest.tpm2 import HASHES, Alg, Attribute, Public, name_hash
from guestlib.errors import MalformedError

MAX_SECRET_BYTES: Final = 32
"""The TPM takes no more than a digest of the EK's nameAlg, of which SHA-256 is the shortest."""
_BLOCK: Final = 16
_LABEL: Final = b"IDENTITY\0"
_HASHES: Final[dict[Alg, hashes.HashAlgorithm]] = {
    Alg.SHA256: hashes.SHA256(),
    Alg.SHA384: hashes.SHA384(),
    Alg.SHA512: hashes.SHA512(),
}


@dataclass(frozen=True, slots=True)
class Credential:
    """What TPM2_ActivateCredential takes: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""

    id_object: bytes
    encrypted_secret: bytes


def make_credential(
    ek: Public, name: bytes, secret: bytes, *, ephemeral: ec.EllipticCurvePrivateKey | None = None
) -> Credential:
    """A credential with `secret` (1 to 32 bytes) for the key of Name `name` in the TPM of `ek`.

    `ephemeral` is for test vectors: the sender's key for an ECC EK, fresh if it is left out.

    Raises:
        MalformedError: the EK is not a restricted decryption key with AES in CFB mode, or is not a key.
        ValueError: the secret is not 1 to 32 bytes.
    """
    if not 0 < len(secret) <= MAX_SECRET_BYTES:
        raise ValueError(f"1 to {MAX_SECRET_BYTES} bytes")
    storage = Attribute.RESTRICTED | Attribute.DECRYPT
    if ek.attributes & (storage | Attribute.SIGN) != storage or not ek.aes_bits:
        raise MalformedError("endorsement key: not a restricted decryption key with AES in CFB mode")
    alg = name_hash(ek.name)
    seed, encrypted = _seed(ek, alg, ephemeral)
    key = _kdfa(alg, seed, b"STORAGE", name, ek.aes_bits // 8)
    identity = _cfb(key, _sized(secret))
    mac_key = _kdfa(alg, seed, b"INTEGRITY", b"", _HASHES[alg].digest_size)
    mac = hmac.digest(mac_key, identity + name, HASHES[alg])
    return Credential(_sized(_sized(mac) + identity), _sized(encrypted))


def _sized(data: bytes) -> bytes:
    """TPM2B."""
    return len(data).to_bytes(2, "big") + data


def _seed(ek: Public, alg: Alg, ephemeral: ec.EllipticCurvePrivateKey | None) -> tuple[bytes, bytes]:
    """The seed of the credential's keys, and what the EK recovers it from."""
    key, algorithm = crypto_key(ek), _HASHES[alg]
    if not isinstance(key, ec.EllipticCurvePublicKey):
        seed = os.urandom(algorithm.digest_size)
        return seed, key.encrypt(seed, padding.OAEP(padding.MGF1(algorithm), algorithm, _LABEL))
    sender = ephemeral or ec.generate_private_key(key.curve)
    numbers, size = sender.public_key().public_numbers(), -(-key.curve.key_size // 8)
    x, y = (number.to_bytes(size, "big") for number in (numbers.x, numbers.y))
    receiver_x = key.public_numbers().x.to_bytes(size, "big")
    # KDFe is the one-step derivation of SP 800-56A.
    kdfe = ConcatKDFHash(algorithm, algorithm.digest_size, otherinfo=_LABEL + x + receiver_x)
    return kdfe.derive(sender.exchange(ec.ECDH(), key)), _sized(x) + _sized(y)


def _kdfa(alg: Alg, key: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """SP 800-108 in counter mode; `size` bytes."""
    kdf = KBKDFHMAC(
        algorithm=_HASHES[alg],
        mode=Mode.CounterMode,
        length=size,
        rlen=4,
        llen=4,
        location=CounterLocation.BeforeFixed,
        label=label,
        context=context,
        fixed=None,
    )
    return kdf.derive(key)


def _cfb(key: bytes, data: bytes) -> bytes:
    """AES in CFB mode with feedback of a block and an initial vector of zeros. (`cryptography` has moved its
    own from place to place.)"""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305 - a block at a time
    sent, before = b"", bytes(_BLOCK)
    for at in range(0, len(data), _BLOCK):
        part = data[at : at + _BLOCK]
        before = bytes(a ^ b for a, b in zip(part, block.update(before), strict=False))
        sent += before
    return sent
