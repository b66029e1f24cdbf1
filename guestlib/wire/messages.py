"""Results as the client gives them: typed, frozen, each with its receipt.

`parse_result` gives a response's `ok` object its shape. A field that is missing or of the wrong type
is a `TransportError`: the other end does not speak this protocol. Fields this version does not know
are ignored, because hosts may only ever add some.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from guestlib.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where the answer is recorded: the ledger entry, and the pass of readings it rests on."""

    ledger: int
    passed: int


@dataclass(frozen=True, slots=True)
class KeyVersion:
    version: int
    state: str
    created: str


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key. `version` is the one that encrypts and signs; `created` is UTC, ISO 8601."""

    id: str
    algorithm: str
    state: str
    version: int
    created: str
    usage: tuple[str, ...]
    versions: tuple[KeyVersion, ...]
    """The newest ones, oldest first."""
    schemes: tuple[str, ...]
    """Signature schemes, the default first; empty for a key that does not sign."""
    alias: str | None


@dataclass(frozen=True, slots=True)
class Result:
    """Base of all results. `receipt` is None if none was asked for, or the operation has none."""

    receipt: Receipt | None


@dataclass(frozen=True, slots=True)
class KeyResult(Result):
    key: KeyInfo


@dataclass(frozen=True, slots=True)
class KeyPage(Result):
    keys: tuple[KeyInfo, ...]
    next: str | None
    """Give it as `after` to get the next page; None on the last."""


@dataclass(frozen=True, slots=True)
class Encrypted(Result):
    ciphertext: bytes
    key: str
    version: int


@dataclass(frozen=True, slots=True)
class Decrypted(Result):
    plaintext: bytes = field(repr=False)
    key: str
    version: int


@dataclass(frozen=True, slots=True)
class DataKey(Result):
    ciphertext: bytes
    key: str
    version: int
    plaintext: bytes | None = field(repr=False)
    """None if only the encrypted form was asked for."""


@dataclass(frozen=True, slots=True)
class Signature(Result):
    signature: bytes
    key: str
    version: int
    scheme: str


@dataclass(frozen=True, slots=True)
class Verification(Result):
    """The host's verdict; the client's methods raise if it is not valid."""

    valid: bool
    key: str
    version: int


@dataclass(frozen=True, slots=True)
class PublicKey(Result):
    public_key: bytes
    """SubjectPublicKeyInfo, DER."""
    key: str
    version: int
    algorithm: str


@dataclass(frozen=True, slots=True)
class Mac(Result):
    mac: bytes
    key: str
    version: int


@dataclass(frozen=True, slots=True)
class Random(Result):
    random: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Health(Result):
    gate: str
    """`open` or `closed`."""
    reason: str
    components: dict[str, str]


@dataclass(frozen=True, slots=True)
class Evidence(Result):
    evidence: bytes
    """A JSON document, byte for byte as its digest was signed."""
    log_bytes: int


@dataclass(frozen=True, slots=True)
class EvidenceChunk(Result):
    data: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """What the host answered to hello."""

    version: int
    limits: dict[str, float]


_NONSENSE: Final = "the host's answer has an unexpected shape"


class _Fields:
    """Typed access to a JSON object."""

    __slots__ = ("_object",)

    def __init__(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise TransportError(_NONSENSE)
        self._object: dict[str, Any] = value

    def text(self, name: str) -> str:
        value = self._object.get(name)
        if not isinstance(value, str):
            raise TransportError(_NONSENSE)
        return value

    def optional_text(self, name: str) -> str | None:
        return None if self._object.get(name) is None else self.text(name)

    def number(self, name: str) -> int:
        value = self._object.get(name)
        if type(value) is not int or value < 0:
            raise TransportError(_NONSENSE)
        return value

    def optional_number(self, name: str) -> int | None:
        return None if self._object.get(name) is None else self.number(name)

    def truth(self, name: str) -> bool:
        value = self._object.get(name)
        if not isinstance(value, bool):
            raise TransportError(_NONSENSE)
        return value

    def data(self, name: str) -> bytes:
        try:
            return base64.b64decode(self.text(name), validate=True)
        except (binascii.Error, ValueError):
            raise TransportError(_NONSENSE) from None

    def optional_data(self, name: str) -> bytes | None:
        return None if self._object.get(name) is None else self.data(name)

    def items(self, name: str) -> list[Any]:
        value = self._object.get(name)
        if not isinstance(value, list):
            raise TransportError(_NONSENSE)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise TransportError(_NONSENSE)
        return tuple(values)

    def optional_texts(self, name: str) -> tuple[str, ...]:
        return () if self._object.get(name) is None else self.texts(name)

    def object(self, name: str) -> _Fields:
        return _Fields(self._object.get(name))

    def text_map(self, name: str) -> dict[str, str]:
        value = self._object.get(name)
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise TransportError(_NONSENSE)
        return dict(value)

    def number_map(self, name: str) -> dict[str, float]:
        value = self._object.get(name)
        if not isinstance(value, dict) or not all(type(item) in (int, float) for item in value.values()):
            raise TransportError(_NONSENSE)
        return dict(value)


def _key(fields: _Fields) -> KeyInfo:
    return KeyInfo(
        id=fields.text("id"),
        algorithm=fields.text("algorithm"),
        state=fields.text("state"),
        version=fields.number("version"),
        created=fields.text("created"),
        usage=fields.texts("usage"),
        versions=tuple(
            KeyVersion(item.number("version"), item.text("state"), item.text("created"))
            for item in map(_Fields, fields.items("versions"))
        ),
        schemes=fields.optional_texts("schemes"),
        alias=fields.optional_text("alias"),
    )


def _key_result(f: _Fields, receipt: Receipt | None) -> Result:
    return KeyResult(receipt, _key(f.object("key")))


def _verification(f: _Fields, receipt: Receipt | None) -> Result:
    return Verification(receipt, f.truth("valid"), f.text("key"), f.number("version"))


_PARSERS: Final[dict[str, Callable[[_Fields, Receipt | None], Result]]] = {
    "CreateKey": _key_result,
    "DescribeKey": _key_result,
    "Rotate": _key_result,
    "Shred": _key_result,
    "ListKeys": lambda f, r: KeyPage(
        r, tuple(_key(_Fields(item)) for item in f.items("keys")), f.optional_text("next")
    ),
    "Encrypt": lambda f, r: Encrypted(r, f.data("ciphertext"), f.text("key"), f.number("version")),
    "Decrypt": lambda f, r: Decrypted(r, f.data("plaintext"), f.text("key"), f.number("version")),
    "GenerateDataKey": lambda f, r: DataKey(
        r, f.data("ciphertext"), f.text("key"), f.number("version"), f.optional_data("plaintext")
    ),
    "Sign": lambda f, r: Signature(
        r, f.data("signature"), f.text("key"), f.number("version"), f.text("scheme")
    ),
    "Verify": _verification,
    "VerifyMac": _verification,
    "GetPublicKey": lambda f, r: PublicKey(
        r, f.data("public_key"), f.text("key"), f.number("version"), f.text("algorithm")
    ),
    "Mac": lambda f, r: Mac(r, f.data("mac"), f.text("key"), f.number("version")),
    "GenerateRandom": lambda f, r: Random(r, f.data("random")),
    "Health": lambda f, r: Health(r, f.text("gate"), f.text("reason"), f.text_map("components")),
    "GetEvidence": lambda f, r: Evidence(r, f.data("evidence"), f.number("log_bytes")),
    "GetEvidenceLog": lambda f, r: EvidenceChunk(r, f.data("data")),
}
OPERATIONS: Final = frozenset(_PARSERS)


def parse_result(operation: str, ok: Any, receipt: Receipt | None) -> Result:
    """The typed result of `operation`.

    Raises:
        TransportError: `ok` is not one.
    """
    return _PARSERS[operation](_Fields(ok), receipt)


def parse_receipt(value: Any) -> Receipt | None:
    if value is None:
        return None
    fields = _Fields(value)
    return Receipt(fields.number("ledger"), fields.number("pass"))


def parse_hello(ok: Any) -> Hello:
    fields = _Fields(ok)
    if fields.text("server") != "hostd":
        raise TransportError("the other end is not hostd")
    return Hello(fields.number("version"), fields.number_map("limits"))


def parse_error(value: Any) -> tuple[str, str, int | None]:
    """Code, message and ledger entry of an `error` object."""
    fields = _Fields(value)
    return fields.text("code"), fields.text("message"), fields.optional_number("ledger")
