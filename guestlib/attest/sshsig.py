"""SSH signatures over documents, and how many officers made them (PROTOCOL.sshsig of OpenSSH).

    -----BEGIN SSH SIGNATURE-----
    base64, lines of 70 characters:  "SSHSIG" | u32 version 1 | string public key | string namespace |
                                     string reserved | string hash algorithm | string signature
    -----END SSH SIGNATURE-----

What is signed: "SSHSIG" | string namespace | string reserved | string hash algorithm | string H(message). A
signature file is one such block after the other. Blocks in any other form than ssh-keygen's are refused.

The key inside a signature proves nothing: only keys that the caller gives are ever used. RSA signatures are
rsa-sha2-256 or -512; signatures of a security key need that somebody touched it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from guestlib.errors import DeniedError, MalformedError
from guestlib.sshkeys import ECDSA, ED25519, RSA, SK_ED25519, PublicKey, Wire, check_blob, string

if TYPE_CHECKING:
    from collections.abc import Collection

MAGIC: Final = b"SSHSIG"
BEGIN: Final = b"-----BEGIN SSH SIGNATURE-----\n"
END: Final = b"-----END SSH SIGNATURE-----\n"
COLUMNS: Final = 70
MAX_SIGNATURES_BYTES: Final = 64 << 10
"""Sixteen signatures of the largest RSA keys have 50 KiB."""
MAX_SIGNATURES: Final = 16
_HASHES: Final = {"sha256": hashlib.sha256, "sha512": hashlib.sha512}
_USER_PRESENT: Final = 0x01
_CURVES: Final = {
    "ecdsa-sha2-nistp256": (ec.SECP256R1, hashes.SHA256),
    "ecdsa-sha2-nistp384": (ec.SECP384R1, hashes.SHA384),
    "ecdsa-sha2-nistp521": (ec.SECP521R1, hashes.SHA512),
}
_RSA_HASHES: Final = {"rsa-sha2-256": hashes.SHA256, "rsa-sha2-512": hashes.SHA512}


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature as it says of itself; nothing of it is verified."""

    key: bytes
    """The signer's public key, wire encoding."""
    namespace: str
    hash: str
    reserved: bytes
    format: str
    """Signature algorithm, such as `rsa-sha2-512`."""
    body: bytes
    """What follows the format inside the signature."""


def parse_signatures(data: bytes) -> tuple[Signature, ...]:
    """Parses a signature file: one block or more, nothing between them.

    Raises:
        MalformedError: empty, too large, too many, or not in the form that ssh-keygen writes.
    """
    if len(data) > MAX_SIGNATURES_BYTES:
        raise MalformedError(f"signatures: over {MAX_SIGNATURES_BYTES} bytes")
    blocks = data.split(END)
    if blocks.pop() or not blocks:
        raise MalformedError("signatures: none, or something after the last one")
    if len(blocks) > MAX_SIGNATURES:
        raise MalformedError(f"signatures: over {MAX_SIGNATURES}")
    return tuple(_parse(_unarmoured(block)) for block in blocks)


def armoured(blob: bytes) -> bytes:
    """A signature as a block, as ssh-keygen writes it."""
    text = base64.b64encode(blob)
    lines = [text[i : i + COLUMNS] + b"\n" for i in range(0, len(text), COLUMNS)]
    return BEGIN + b"".join(lines) + END


def _unarmoured(block: bytes) -> bytes:
    if not block.startswith(BEGIN):
        raise MalformedError("signature: not armoured as ssh-keygen does it")
    try:
        blob = base64.b64decode(block[len(BEGIN) :].replace(b"\n", b""), validate=True)
    except (binascii.Error, ValueError):
        raise MalformedError("signature: not base64") from None
    if armoured(blob) != block + END:
        raise MalformedError("signature: not armoured as ssh-keygen does it")
    return blob


def _parse(blob: bytes) -> Signature:
    wire = Wire(blob, "signature")
    if wire.take(len(MAGIC)) != MAGIC:
        raise wire.refuse("no SSHSIG")
    if (version := wire.u32()) != 1:
        raise wire.refuse(f"version {version}, 1 is known")
    key = wire.string(4096)
    namespace, reserved, algorithm = wire.string(256), wire.string(256), wire.string(16)
    body = Wire(wire.string(4096), "signature")
    wire.end()
    form = body.string(64)
    try:
        texts = [part.decode("ascii") for part in (namespace, algorithm, form)]
    except UnicodeDecodeError:
        raise wire.refuse("a name that is not ASCII") from None
    if not texts[0] or texts[1] not in _HASHES:
        raise wire.refuse("no namespace, or a hash that is neither sha256 nor sha512")
    if reserved:
        raise wire.refuse("the reserved field is not empty")
    return Signature(key, texts[0], texts[1], reserved, texts[2], body.rest())


def verify_quorum(
    signatures: bytes, message: bytes, *, namespace: str, officers: Collection[PublicKey], quorum: int
) -> tuple[str, ...]:
    """Names of the officers who signed `message`, sorted: at least `quorum`, each counted once.

    Every signature in the file must be one of them.

    Raises:
        MalformedError: not a signature file.
        DeniedError: a signature is nobody's, for another purpose, or does not hold; or there are too few.
    """
    names: list[str] = []
    if signatures:
        by_blob = {key.blob: key for key in officers}
        for signature in parse_signatures(signatures):
            key = by_blob.get(signature.key)
            if key is None:
                shown = PublicKey("", signature.key, "").fingerprint
                raise DeniedError(f"a signature by {shown}, which is no officer's key")
            verify_signature(signature, message, namespace=namespace, key=key)
            names.append(key.name)
    distinct = sorted(set(names))
    if len(distinct) < quorum:
        twice = sorted({name for name in names if names.count(name) > 1})
        again = f"; {', '.join(twice)} more than once" if twice else ""
        signed = ", ".join(distinct) or "nobody"
        raise DeniedError(f"{quorum} officers must sign, {len(distinct)} did: {signed}{again}")
    return tuple(distinct)


def verify_signature(signature: Signature, message: bytes, *, namespace: str, key: PublicKey) -> None:
    """Returns if `signature` is `key`'s over `message` for this purpose.

    Raises:
        DeniedError: it is not.
        MalformedError: the key or the signature is not of its form.
    """
    if signature.key != key.blob:
        raise DeniedError(f"a signature by another key than {key.name}'s")
    if signature.namespace != namespace:
        raise DeniedError(
            f"{key.name} signed for the purpose {signature.namespace!r}, {namespace!r} is needed"
        )
    digest = _HASHES[signature.hash](message).digest()
    signed = MAGIC + b"".join(
        string(part) for part in (namespace.encode(), signature.reserved, signature.hash.encode(), digest)
    )
    try:
        _verify(signature, signed, key)
    except InvalidSignature:
        raise DeniedError(f"the signature by {key.name} is not over these bytes") from None
    except ValueError as error:
        raise MalformedError(f"the signature by {key.name}: {error}") from error


def _verify(signature: Signature, signed: bytes, key: PublicKey) -> None:
    check_blob(key.type, key.blob)
    public, body = Wire(key.blob, "public key"), Wire(signature.body, "signature")
    public.string(64)
    accepted = tuple(_RSA_HASHES) if key.type == RSA else (key.type,)
    if signature.format not in accepted:
        raise MalformedError(f"signature: algorithm {signature.format!r} for a key of type {key.type}")
    if key.type in (ED25519, SK_ED25519):
        point = ed25519.Ed25519PublicKey.from_public_bytes(public.string(32))
        raw = body.string(64)
        if key.type == SK_ED25519:
            flags, counter = body.take(1), body.take(4)
            if not flags[0] & _USER_PRESENT:
                raise DeniedError(f"the signature by {key.name}: nobody touched the security key")
            application = hashlib.sha256(public.string(256)).digest()
            signed = application + flags + counter + hashlib.sha256(signed).digest()
        body.end()
        point.verify(raw, signed)
    elif key.type in ECDSA:
        curve, algorithm = _CURVES[key.type]
        public.string(16)
        numbers = Wire(body.string(160), "signature")
        body.end()
        size = ECDSA[key.type][1] + 1
        r, s = numbers.positive(size), numbers.positive(size)
        numbers.end()
        curve_key = ec.EllipticCurvePublicKey.from_encoded_point(curve(), public.string(133))
        curve_key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(algorithm()))
    else:
        exponent, modulus = public.positive(8), public.positive(1025)
        raw = body.string(1024)
        body.end()
        if len(raw) != (modulus.bit_length() + 7) // 8:
            raise MalformedError("signature: its length is not that of the RSA modulus")
        rsa_key = rsa.RSAPublicNumbers(exponent, modulus).public_key()
        rsa_key.verify(raw, signed, padding.PKCS1v15(), _RSA_HASHES[signature.format]())
