"""Requests and answers in their one canonical form, and the commitments to them in the ledger.

Canonical JSON: names sorted by code point, no white space, UTF-8 with nothing escaped that need not
be (RFC 8259, section 7: `"`, `\\` and what is below U+0020, with the short forms where there are any),
byte strings as base64 (RFC 4648, section 4, with padding), integers in decimal.

- A request is `{"args":{…},"op":"Name"}`, where an argument that has its default value (docs/protocol.md,
  "Operations") is left out, as is one that is null; likewise in each of the `items` of a batch operation.
- An answer is its `ok` object as it was received.

commitment = SHA-256(salt || canonical bytes). Standard library only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

SALT_BYTES: Final = 16
COMMITMENT_BYTES: Final = 32
DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "CreateKey": {"algorithm": "AES-256-GCM"},
    "ListKeys": {"limit": 100},
    "Encrypt": {"aad": {}},
    "Decrypt": {"aad": {}},
    "GenerateDataKey": {"aad": {}, "length": 32, "plaintext": True},
}
"""Operation → arguments whose default is not null. What is not here has none, or null."""
ITEM_DEFAULTS: Final[dict[str, dict[str, Any]]] = {"EncryptMany": {"aad": {}}, "DecryptMany": {"aad": {}}}
"""The same of each of a batch operation's `items`."""


def canonical(value: Any) -> bytes:
    """Canonical JSON of plain values; `bytes` in them become base64.

    Raises:
        ValueError: NaN, or a lone surrogate.
        TypeError: something that JSON has no form for.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_base64
    )
    return text.encode()


def _base64(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"JSON has no form for {type(value).__name__}")


def canonical_request(operation: str, args: Mapping[str, Any]) -> bytes:
    """The canonical bytes of a request: `args` as given to the client, or as they are on the wire."""
    given = _without_defaults(args, DEFAULTS.get(operation, {}))
    if isinstance(items := given.get("items"), list | tuple):
        defaults = ITEM_DEFAULTS.get(operation, {})
        given["items"] = [_without_defaults(item, defaults) for item in items]
    return canonical({"args": given, "op": operation})


def _without_defaults(args: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in args.items()
        if value is not None and not (name in defaults and _same(value, defaults[name]))
    }


def _same(value: Any, default: Any) -> bool:
    # `True == 1`: a boolean is not the integer default, nor the other way round.
    return type(value) is type(default) and bool(value == default)


def commitment(salt: bytes, body: bytes) -> bytes:
    """SHA-256(salt || canonical bytes); 32 bytes.

    Raises:
        ValueError: the salt is not 16 bytes.
    """
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a salt of {len(salt)} bytes, not {SALT_BYTES}")
    return hashlib.sha256(salt + body).digest()


def canonical_aad(aad: Mapping[str, str]) -> bytes:
    """Additional data as bytes: pairs sorted by name (code points), each string length-prefixed
    (4 bytes, big endian, of its UTF-8), so that no two objects give the same bytes."""
    parts: list[bytes] = []
    for name in sorted(aad):
        for text in (name, aad[name]):
            raw = text.encode()
            parts += (len(raw).to_bytes(4, "big"), raw)
    return b"".join(parts)
