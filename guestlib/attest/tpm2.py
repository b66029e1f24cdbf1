"""TPM 2.0 structures that a verifier reads: public areas, attestations, signatures.

Sans-IO, standard library only; `quote` verifies what this module parses. TPM 2.0 part 2: 12.2.4
(TPMT_PUBLIC), 10.12.8 (TPMS_ATTEST), 11.3.4 (TPMT_SIGNATURE). Everything is big-endian, every length
is bounded, trailing bytes are refused.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Final

from guestlib.attest.reader import Reader
from guestlib.errors import MalformedError

MAX_PUBLIC_BYTES: Final = 1024
MAX_ATTEST_BYTES: Final = 1024
MAX_SIGNATURE_BYTES: Final = 1024
MAX_KEY_BYTES: Final = 512
"""RSA-4096; a coordinate of P-521 is 66."""
MAX_DIGEST_BYTES: Final = 64
MAX_NAME_BYTES: Final = 66
MAX_PCR_SELECT_BYTES: Final = 4

_MAGIC: Final = 0xFF544347
_ST_ATTEST_QUOTE: Final = 0x8018
_CFB: Final = 0x0043
_AES_BITS: Final = (128, 192, 256)


class Alg(enum.IntEnum):
    """TPM_ALG_ID, as far as it is spoken here."""

    RSA = 0x0001
    AES = 0x0006
    SHA256 = 0x000B
    SHA384 = 0x000C
    SHA512 = 0x000D
    NULL = 0x0010
    RSASSA = 0x0014
    RSAES = 0x0015
    RSAPSS = 0x0016
    OAEP = 0x0017
    ECDSA = 0x0018
    ECDH = 0x0019
    ECC = 0x0023


class Attribute(enum.IntFlag):
    """TPMA_OBJECT."""

    FIXED_TPM = 1 << 1
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    RESTRICTED = 1 << 16
    DECRYPT = 1 << 17
    SIGN = 1 << 18


HASHES: Final = {Alg.SHA256: "sha256", Alg.SHA384: "sha384", Alg.SHA512: "sha512"}
CURVE_BYTES: Final = {0x0003: 32, 0x0004: 48}
"""TPM_ECC_NIST_P256 and P384 → bytes of a coordinate."""
CURVE_P256: Final = 0x0003
CURVE_P384: Final = 0x0004


@dataclass(frozen=True, slots=True)
class RsaKey:
    """`modulus` is as long as the key; `exponent` is never 0 (the TPM's 0 means 65537)."""

    modulus: bytes
    exponent: int


@dataclass(frozen=True, slots=True)
class EccKey:
    """Coordinates, each as long as the curve's field (left-padded)."""

    curve: int
    x: bytes
    y: bytes


@dataclass(frozen=True, slots=True)
class Public:
    """An asymmetric key's public area."""

    name: bytes
    """nameAlg (2 bytes) and the digest of TPMT_PUBLIC (TPM 2.0 part 1, section 16)."""
    attributes: int
    policy: bytes
    scheme: Alg
    scheme_hash: Alg | None
    key: RsaKey | EccKey
    aes_bits: int
    """Of the AES key in CFB mode that protects what is under a storage key or EK; 0: none."""


@dataclass(frozen=True, slots=True)
class Attest:
    """A quote's TPMS_ATTEST, parsed and **not** verified."""

    qualified_signer: bytes
    extra_data: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int
    selection: tuple[int, ...]
    """PCR indices of the one bank in it, SHA-256."""
    pcr_digest: bytes


@dataclass(frozen=True, slots=True)
class EcdsaSignature:
    hash: Alg
    r: int
    s: int


@dataclass(frozen=True, slots=True)
class RsaSignature:
    scheme: Alg
    hash: Alg
    signature: bytes


Signature = EcdsaSignature | RsaSignature


def parse_public(data: bytes) -> Public:
    """Parses a TPM2B_PUBLIC (2 bytes of length, TPMT_PUBLIC) of an RSA or ECC key.

    Raises:
        MalformedError: it is not one, is of another kind, or has trailing bytes.
    """
    outer = Reader(data, "public area")
    area = outer.sized(MAX_PUBLIC_BYTES)
    outer.end()
    reader = Reader(area, "public area")
    kind = _alg(reader)
    if kind not in (Alg.RSA, Alg.ECC):
        raise reader.refuse("neither an RSA nor an ECC key")
    name_alg = _hash_alg(reader)
    attributes = reader.u32()
    policy = reader.sized(MAX_DIGEST_BYTES)
    aes_bits = _symmetric(reader)
    scheme = _alg(reader)
    scheme_hash = None if scheme in (Alg.NULL, Alg.RSAES) else _hash_alg(reader)
    key = _rsa(reader) if kind is Alg.RSA else _ecc(reader)
    reader.end()
    name = name_alg.to_bytes(2, "big") + hashlib.new(HASHES[name_alg], area).digest()
    return Public(name, attributes, policy, scheme, scheme_hash, key, aes_bits)


def _alg(reader: Reader) -> Alg:
    value = reader.u16()
    try:
        return Alg(value)
    except ValueError:
        raise reader.refuse(f"unknown algorithm 0x{value:04x}") from None


def _hash_alg(reader: Reader) -> Alg:
    alg = _alg(reader)
    if alg not in HASHES:
        raise reader.refuse(f"not an accepted hash: {alg.name}")
    return alg


def _symmetric(reader: Reader) -> int:
    """TPMT_SYM_DEF_OBJECT; the key's bits, 0 if it is none or not in CFB mode."""
    alg = _alg(reader)
    if alg is Alg.AES:
        bits, mode = reader.u16(), reader.u16()
        return bits if mode == _CFB and bits in _AES_BITS else 0
    if alg is not Alg.NULL:
        raise reader.refuse(f"not a symmetric algorithm: {alg.name}")
    return 0


def _rsa(reader: Reader) -> RsaKey:
    bits, exponent = reader.u16(), reader.u32()
    modulus = reader.sized(MAX_KEY_BYTES)
    if len(modulus) * 8 != bits:
        raise reader.refuse("the modulus is not as long as the key")
    return RsaKey(modulus, exponent or 65537)


def _ecc(reader: Reader) -> EccKey:
    curve = reader.u16()
    size = CURVE_BYTES.get(curve)
    if size is None:
        raise reader.refuse(f"not an accepted curve: 0x{curve:04x}")
    if _alg(reader) is not Alg.NULL:
        raise reader.refuse("a key derivation scheme")
    x, y = reader.sized(size), reader.sized(size)
    # Some TPMs leave leading zero bytes of a coordinate out.
    return EccKey(curve, x.rjust(size, b"\0"), y.rjust(size, b"\0"))


def parse_attest(data: bytes) -> Attest:
    """Parses the TPMS_ATTEST of a quote over one SHA-256 bank.

    Raises:
        MalformedError: it is not one (a TPM did not make it, or it attests something else).
    """
    if len(data) > MAX_ATTEST_BYTES:
        raise Reader(b"", "attestation").refuse(f"over {MAX_ATTEST_BYTES} bytes")
    reader = Reader(data, "attestation")
    if reader.u32() != _MAGIC:
        raise reader.refuse("not made by a TPM (magic)")
    if reader.u16() != _ST_ATTEST_QUOTE:
        raise reader.refuse("not a quote (type)")
    signer = reader.sized(MAX_NAME_BYTES)
    extra = reader.sized(MAX_DIGEST_BYTES)
    clock, resets, restarts, safe = reader.u64(), reader.u32(), reader.u32(), reader.u8()
    if safe > 1:
        raise reader.refuse("a boolean that is neither 0 nor 1")
    firmware = reader.u64()
    selection = _selection(reader)
    digest = reader.sized(MAX_DIGEST_BYTES)
    reader.end()
    return Attest(signer, extra, clock, resets, restarts, bool(safe), firmware, selection, digest)


def _selection(reader: Reader) -> tuple[int, ...]:
    if reader.u32() != 1:
        raise reader.refuse("not exactly one bank of PCRs")
    if _alg(reader) is not Alg.SHA256:
        raise reader.refuse("not the SHA-256 bank")
    size = reader.u8()
    if size > MAX_PCR_SELECT_BYTES:
        raise reader.refuse(f"a PCR bit map of {size} bytes")
    bits = int.from_bytes(reader.take(size), "little")
    indices = tuple(index for index in range(size * 8) if bits >> index & 1)
    if not indices:
        raise reader.refuse("no PCR is selected")
    return indices


def parse_signature(data: bytes) -> Signature:
    """Parses a TPMT_SIGNATURE: ECDSA, RSASSA or RSAPSS.

    Raises:
        MalformedError: it is not one, or is of another kind.
    """
    if len(data) > MAX_SIGNATURE_BYTES:
        raise Reader(b"", "signature").refuse(f"over {MAX_SIGNATURE_BYTES} bytes")
    reader = Reader(data, "signature")
    scheme = _alg(reader)
    if scheme not in (Alg.ECDSA, Alg.RSASSA, Alg.RSAPSS):
        raise reader.refuse(f"not a signature scheme: {scheme.name}")
    hash_alg = _hash_alg(reader)
    if scheme is not Alg.ECDSA:
        signature = reader.sized(MAX_KEY_BYTES)
        reader.end()
        return RsaSignature(scheme, hash_alg, signature)
    r, s = reader.sized(MAX_KEY_BYTES), reader.sized(MAX_KEY_BYTES)
    reader.end()
    return EcdsaSignature(hash_alg, int.from_bytes(r, "big"), int.from_bytes(s, "big"))


def name_hash(name: bytes) -> Alg:
    """The hash that a Name was made with, one of `HASHES`.

    Raises:
        MalformedError: it is not a Name of an object.
    """
    alg = next((alg for alg in HASHES if name[:2] == alg.to_bytes(2, "big")), None)
    if alg is None or len(name) != 2 + hashlib.new(HASHES[alg]).digest_size:
        raise MalformedError("not a Name of a key")
    return alg


def qualified_name(parent: bytes, name: bytes) -> bytes:
    """The qualified name of an object `name` under the qualified name or handle `parent`.

    nameAlg and its digest of (parent || name), TPM 2.0 part 1, section 16.

    Raises:
        MalformedError: `name` is not a Name of an object.
    """
    alg = name_hash(name)
    return alg.to_bytes(2, "big") + hashlib.new(HASHES[alg], parent + name).digest()


RH_ENDORSEMENT: Final = bytes.fromhex("4000000b")
"""The handle that stands for the endorsement hierarchy in qualified names."""
