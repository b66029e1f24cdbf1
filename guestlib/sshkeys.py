"""Public keys of officers, in OpenSSH's one-line form (pure; no cryptography).

A line is `type base64 name`, as in a `.pub` file; the name is required, because reports name officers. The
key inside is checked for form: RFC 4253, section 6.6 (RSA), RFC 5656, section 3.1 (ECDSA), RFC 8709, section
4 (Ed25519), PROTOCOL.u2f of OpenSSH (security keys). Options before the type (authorized_keys) are refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from guestlib.attest.reader import Reader
from guestlib.errors import MalformedError

MAX_LINE: Final = 4096
"""Characters; a line of an RSA key of 8192 bits has 1,400."""
MAX_NAME: Final = 64
RSA_BITS: Final = (2048, 8192)
ED25519: Final = "ssh-ed25519"
SK_ED25519: Final = "sk-ssh-ed25519@openssh.com"
RSA: Final = "ssh-rsa"
ECDSA: Final = {
    "ecdsa-sha2-nistp256": ("nistp256", 32),
    "ecdsa-sha2-nistp384": ("nistp384", 48),
    "ecdsa-sha2-nistp521": ("nistp521", 66),
}
"""Type → (name of the curve, bytes of a coordinate)."""
_LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key whose form was checked. Two keys are the same if their `blob` is."""

    type: str
    blob: bytes
    """The wire encoding, with the type in it."""
    name: str

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it."""
        digest = base64.b64encode(hashlib.sha256(self.blob).digest())
        return "SHA256:" + digest.decode().rstrip("=")


class Wire(Reader):
    """A reader of SSH's wire encoding (RFC 4251, section 5)."""

    __slots__ = ()

    def string(self, limit: int) -> bytes:
        """A `string` of at most `limit` bytes."""
        length = self.u32()
        if length > limit:
            raise self.refuse(f"a field of {length} bytes, at most {limit} are allowed")
        return self.take(length)

    def positive(self, limit: int) -> int:
        """An `mpint` over 0, in its shortest form, of at most `limit` bytes."""
        raw = self.string(limit)
        value = int.from_bytes(raw, "big")
        if value == 0 or mpint(value) != _LENGTH.pack(len(raw)) + raw:
            raise self.refuse("a number that is not positive, or not in its shortest form")
        return value

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data) - self._position)


def string(value: bytes) -> bytes:
    """`value` as a `string`."""
    return _LENGTH.pack(len(value)) + value


def mpint(value: int) -> bytes:
    """A number over 0 as an `mpint`, in its shortest form."""
    return string(value.to_bytes(value.bit_length() // 8 + 1, "big"))


def parse_public_key(line: str) -> PublicKey:
    """Parses one line.

    Raises:
        MalformedError: not of the form, a type that is not accepted, or an RSA key out of bounds.
    """
    if len(line) > MAX_LINE:
        raise MalformedError(f"public key: over {MAX_LINE} characters")
    parts = line.strip().split(" ", 2)
    if len(parts) != 3:
        raise MalformedError("public key: not `type base64 name`")
    kind, encoded, name = parts[0], parts[1], parts[2].strip()
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise MalformedError(f"public key: a name of 1 to {MAX_NAME} printable characters is needed")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise MalformedError("public key: not base64") from None
    if base64.b64encode(blob).decode() != encoded:
        raise MalformedError("public key: not base64 in its one form")
    check_blob(kind, blob)
    return PublicKey(kind, blob, name)


def check_blob(kind: str, blob: bytes) -> None:
    """Checks a key's wire encoding.

    Raises:
        MalformedError: not a key of this type, or of none that is accepted.
    """
    wire = Wire(blob, "public key")
    if wire.string(64) != kind.encode("utf-8", "replace"):
        raise wire.refuse("the type inside is another one")
    if kind == ED25519:
        _length(wire, 32)
    elif kind == SK_ED25519:
        _length(wire, 32)
        wire.string(256)
    elif kind in ECDSA:
        curve, size = ECDSA[kind]
        if wire.string(16) != curve.encode():
            raise wire.refuse("the curve is another one")
        if (point := wire.string(133))[:1] != b"\x04" or len(point) != 1 + 2 * size:
            raise wire.refuse("not an uncompressed point of the curve")
    elif kind == RSA:
        exponent, modulus = wire.positive(8), wire.positive(RSA_BITS[1] // 8 + 1)
        if not RSA_BITS[0] <= modulus.bit_length() <= RSA_BITS[1]:
            raise wire.refuse(
                f"RSA of {modulus.bit_length()} bits, {RSA_BITS[0]} to {RSA_BITS[1]} are accepted"
            )
        if exponent < 3 or exponent % 2 == 0 or modulus % 2 == 0:
            raise wire.refuse("not an RSA key")
    else:
        accepted = ", ".join((ED25519, *ECDSA, RSA, SK_ED25519))
        raise wire.refuse(f"type {kind!r} is not accepted; these are: {accepted}")
    wire.end()


def _length(wire: Wire, length: int) -> None:
    if len(wire.string(64)) != length:
        raise wire.refuse(f"not {length} bytes")
