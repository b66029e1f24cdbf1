"""Results as the client gives them: typed, frozen, each with its receipt.

`parse_result` gives a response's `ok` object its shape. A field that is missing or of the wrong type
is a `TransportError`: the other end does not speak this protocol. Fields this version does not know
are ignored, because hosts may only ever add some.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from guestlib.errors import HostdError, TransportError, from_wire
from guestlib.wire.fields import Fields as _Fields

if TYPE_CHECKING:
    from collections.abc import Callable


ReceiptWanted = Literal["none", "reference", "full"]
"""What of its receipt goes with an answer."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where the answer is recorded: the ledger entry, and the pass of readings it rests on.

    The rest is there if the receipt was asked for in full (`Client.submit`) or redeemed.
    """

    ledger: int
    passed: int
    document: bytes | None = field(default=None, repr=False)
    """The receipt itself, for `guestlib.attest.receipt.verify_receipt` (docs/receipts.md)."""
    request: bytes | None = field(default=None, repr=False)
    """Canonical bytes of the request as it was sent, and"""
    answer: bytes | None = field(default=None, repr=False)
    """of the answer as it came: what the receipt commits to. Only if it was asked for in full."""


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
class EncryptedMany(Result):
    ciphertexts: tuple[bytes, ...]
    """In the order of the items, as in every batch result."""
    key: str
    version: int


@dataclass(frozen=True, slots=True)
class DecryptedItem:
    plaintext: bytes = field(repr=False)
    version: int


@dataclass(frozen=True, slots=True)
class DecryptedMany(Result):
    items: tuple[DecryptedItem | HostdError, ...]
    """What each gave, or why it was refused."""
    key: str


@dataclass(frozen=True, slots=True)
class SignatureMany(Result):
    signatures: tuple[bytes, ...]
    key: str
    version: int
    scheme: str


@dataclass(frozen=True, slots=True)
class MacMany(Result):
    macs: tuple[bytes, ...]
    key: str
    version: int


@dataclass(frozen=True, slots=True)
class VerificationMany(Result):
    """The host's verdict on each item; nothing is raised for one that is not valid."""

    valid: tuple[bool, ...]
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
class ReceiptDocument(Result):
    document: bytes


@dataclass(frozen=True, slots=True)
class AuditLine:
    """An entry of the ledger as its line says, with its way to the page's head. Nothing is verified."""

    index: int
    line: str
    proof: tuple[bytes, ...]
    withheld: bool


@dataclass(frozen=True, slots=True)
class AuditPage(Result):
    """Entries of the caller's tenant, for `guestlib.attest.audit.verify_page`."""

    head: bytes
    lines: tuple[AuditLine, ...]
    next: int | None
    """Give it as `after` to get the next page; None on the last."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What the host answered to hello."""

    version: int
    limits: dict[str, float]


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


def _decrypted_item(f: _Fields, receipt: Receipt | None) -> DecryptedItem | HostdError:
    error = f.optional_object("error")
    if error is None:
        return DecryptedItem(f.data("plaintext"), f.number("version"))
    return from_wire(error.text("code"), error.text("message"), None if receipt is None else receipt.ledger)


def _verification_many(f: _Fields, receipt: Receipt | None) -> Result:
    return VerificationMany(receipt, f.truths("valid"), f.text("key"), f.number("version"))


def _audit_line(f: _Fields) -> AuditLine:
    return AuditLine(f.number("index"), f.text("line"), f.datas("proof"), f.optional_truth("withheld"))


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
    "EncryptMany": lambda f, r: EncryptedMany(r, f.datas("ciphertexts"), f.text("key"), f.number("version")),
    "DecryptMany": lambda f, r: DecryptedMany(
        r, tuple(_decrypted_item(_Fields(item), r) for item in f.items("items")), f.text("key")
    ),
    "SignMany": lambda f, r: SignatureMany(
        r, f.datas("signatures"), f.text("key"), f.number("version"), f.text("scheme")
    ),
    "MacMany": lambda f, r: MacMany(r, f.datas("macs"), f.text("key"), f.number("version")),
    "VerifyMany": _verification_many,
    "VerifyMacMany": _verification_many,
    "GenerateRandom": lambda f, r: Random(r, f.data("random")),
    "Health": lambda f, r: Health(r, f.text("gate"), f.text("reason"), f.text_map("components")),
    "GetEvidence": lambda f, r: Evidence(r, f.data("evidence"), f.number("log_bytes")),
    "GetEvidenceLog": lambda f, r: EvidenceChunk(r, f.data("data")),
    "GetReceipt": lambda f, r: ReceiptDocument(r, f.data("receipt")),
    "GetAuditLog": lambda f, r: AuditPage(
        r,
        f.data("head"),
        tuple(_audit_line(_Fields(item)) for item in f.items("entries")),
        f.optional_number("next"),
    ),
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
    return Receipt(fields.number("ledger"), fields.number("pass"), fields.optional_data("document"))


def parse_hello(ok: Any) -> Hello:
    fields = _Fields(ok)
    if fields.text("server") != "hostd":
        raise TransportError("the other end is not hostd")
    return Hello(fields.number("version"), fields.number_map("limits"))


def parse_error(value: Any) -> tuple[str, str, int | None]:
    """Code, message and ledger entry of an `error` object."""
    fields = _Fields(value)
    return fields.text("code"), fields.text("message"), fields.optional_number("ledger")
