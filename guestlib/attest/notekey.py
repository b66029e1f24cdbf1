"""Keys of C2SP signed notes: `name+key id+key`, as Go's `note` package writes them
(`hostd-ledger/4f1c…+90ab12cd+AT…`). Standard library only.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from guestlib.errors import MalformedError

ED25519: Final = 1
ID_BYTES: Final = 4
_KEY_BYTES: Final = 32
_NAME: Final = re.compile(r"[!-*,-~]{1,255}")
"""Printable ASCII without space and plus."""


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """An Ed25519 key by its name."""

    name: str
    public: bytes

    @property
    def id(self) -> bytes:
        """4 bytes: SHA-256(name || 0x0A || 0x01 || public key), its beginning."""
        return key_id(self.name, bytes((ED25519,)), self.public)

    def __str__(self) -> str:
        key = base64.b64encode(bytes((ED25519,)) + self.public).decode()
        return f"{self.name}+{self.id.hex()}+{key}"


def parse_key(text: str) -> VerifierKey:
    """Raises: MalformedError."""
    name, _, rest = text.partition("+")
    id_, _, encoded = rest.partition("+")
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise MalformedError(f"verifier key: {error}") from error
    if not _NAME.fullmatch(name) or len(raw) != 1 + _KEY_BYTES or raw[0] != ED25519:
        raise MalformedError("verifier key: not an Ed25519 key")
    key = VerifierKey(name, raw[1:])
    if str(key) != text or id_ != key.id.hex():
        raise MalformedError("verifier key: not encoded as it should be, or of another id")
    return key


def key_id(name: str, kind: bytes, public: bytes) -> bytes:
    """Key id of a signature type, 4 bytes."""
    return sha256(name.encode() + b"\n" + kind + public).digest()[:ID_BYTES]
