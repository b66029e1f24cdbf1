"""The guest's operations: arguments and results, each field with its published limit (`fields`).

One definition serves both hops. A worker decodes a guest's JSON into these structs (docs/protocol.md)
and the vault decodes the worker's MessagePack into them again: a worker that was taken over cannot
get anything past the vault that a guest could not send. Nothing here names the caller; who asks is
decided by the channel.

The batch operations are in `many_operations`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from hostd.ipc.fields import (
    MAX_AUDIT_ENTRIES,
    MAX_KEY_LIST,
    MAX_RANDOM_BYTES,
    Aad,
    Algorithm,
    Alias,
    Ciphertext,
    Data,
    EntryNumber,
    KeyRef,
    MacBytes,
    Nonce,
    SignatureBytes,
    SignatureScheme,
    Token,
    Version,
)
from hostd.ipc.many_operations import ManyOperation, ManyResult


class _Op(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    pass


class CreateKey(_Op, frozen=True, tag="CreateKey"):
    token: Token
    algorithm: Algorithm = "AES-256-GCM"
    alias: Alias | None = None


class DescribeKey(_Op, frozen=True, tag="DescribeKey"):
    key: KeyRef


class ListKeys(_Op, frozen=True, tag="ListKeys"):
    after: KeyRef | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_KEY_LIST)] = MAX_KEY_LIST


class Encrypt(_Op, frozen=True, tag="Encrypt"):
    key: KeyRef
    plaintext: Data
    aad: Aad = {}


class Decrypt(_Op, frozen=True, tag="Decrypt"):
    ciphertext: Ciphertext
    aad: Aad = {}
    key: KeyRef | None = None
    """If given, the ciphertext must be of this key."""


class GenerateDataKey(_Op, frozen=True, tag="GenerateDataKey"):
    key: KeyRef
    aad: Aad = {}
    length: Annotated[int, msgspec.Meta(ge=16, le=64)] = 32
    plaintext: bool = True
    """False: only the encrypted data key is given."""


class Sign(_Op, frozen=True, tag="Sign"):
    key: KeyRef
    message: Data
    scheme: SignatureScheme | None = None
    """None: the key algorithm's default."""


class Verify(_Op, frozen=True, tag="Verify"):
    key: KeyRef
    message: Data
    signature: SignatureBytes
    scheme: SignatureScheme | None = None
    version: Version | None = None


class GetPublicKey(_Op, frozen=True, tag="GetPublicKey"):
    key: KeyRef
    version: Version | None = None


class Mac(_Op, frozen=True, tag="Mac"):
    key: KeyRef
    message: Data


class VerifyMac(_Op, frozen=True, tag="VerifyMac"):
    key: KeyRef
    message: Data
    mac: MacBytes
    version: Version | None = None


class GenerateRandom(_Op, frozen=True, tag="GenerateRandom"):
    length: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANDOM_BYTES)]


class Rotate(_Op, frozen=True, tag="Rotate"):
    key: KeyRef
    token: Token


class Shred(_Op, frozen=True, tag="Shred"):
    key: KeyRef
    token: Token


class Health(_Op, frozen=True, tag="Health"):
    pass


class GetEvidence(_Op, frozen=True, tag="GetEvidence"):
    nonce: Nonce


class GetEvidenceLog(_Op, frozen=True, tag="GetEvidenceLog"):
    """A chunk of the IMA log from byte `offset`; the log of one boot only grows."""

    offset: Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class GetReceipt(_Op, frozen=True, tag="GetReceipt"):
    """The whole receipt of an answer that the caller's tenant got earlier, by its ledger entry."""

    ledger: EntryNumber


class GetAuditLog(_Op, frozen=True, tag="GetAuditLog"):
    """The ledger entries of the caller's tenant, from the first that comes after entry `after`."""

    after: EntryNumber | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_AUDIT_ENTRIES)] = MAX_AUDIT_ENTRIES


GatedOperation = (
    CreateKey
    | DescribeKey
    | ListKeys
    | Encrypt
    | Decrypt
    | GenerateDataKey
    | Sign
    | Verify
    | GetPublicKey
    | Mac
    | VerifyMac
    | GenerateRandom
    | Rotate
    | Shred
    | ManyOperation
)
UngatedOperation = Health | GetEvidence | GetEvidenceLog | GetReceipt | GetAuditLog
"""The first three must work when the host has drifted, to say why; the others speak of what was measured
when it happened. None uses a tenant's key."""
Operation = GatedOperation | UngatedOperation

BY_NAME: dict[str, type[Operation]] = {
    cls.__name__: cls
    for cls in (
        CreateKey,
        DescribeKey,
        ListKeys,
        Encrypt,
        Decrypt,
        GenerateDataKey,
        Sign,
        Verify,
        GetPublicKey,
        Mac,
        VerifyMac,
        GenerateRandom,
        Rotate,
        Shred,
        *get_args(ManyOperation),
        Health,
        GetEvidence,
        GetEvidenceLog,
        GetReceipt,
        GetAuditLog,
    )
}


# ── Results ───────────────────────────────────────────────────────────────────────────────────────


class _Result(msgspec.Struct, frozen=True, omit_defaults=True):
    pass


class KeyVersionInfo(_Result, frozen=True):
    version: int
    state: str
    created: str


class KeyInfo(_Result, frozen=True):
    """What may be said of a key. `created` is UTC, ISO 8601."""

    id: str
    algorithm: str
    state: str
    version: int
    """The current version: the one that encrypts and signs."""
    created: str
    usage: tuple[str, ...]
    versions: tuple[KeyVersionInfo, ...]
    """The newest versions, at most MAX_VERSIONS_SHOWN, oldest first."""
    schemes: tuple[str, ...] = ()
    """Signature schemes, the default first."""
    alias: str | None = None


class KeyResult(_Result, frozen=True):
    key: KeyInfo


class KeyListResult(_Result, frozen=True):
    keys: tuple[KeyInfo, ...]
    next: str | None = None


class EncryptResult(_Result, frozen=True):
    ciphertext: bytes
    key: str
    version: int


class DecryptResult(_Result, frozen=True):
    plaintext: bytes
    key: str
    version: int


class DataKeyResult(_Result, frozen=True):
    ciphertext: bytes
    key: str
    version: int
    plaintext: bytes | None = None


class SignResult(_Result, frozen=True):
    signature: bytes
    key: str
    version: int
    scheme: str


class VerifyResult(_Result, frozen=True):
    valid: bool
    key: str
    version: int


class PublicKeyResult(_Result, frozen=True):
    public_key: bytes
    """SubjectPublicKeyInfo, DER."""
    key: str
    version: int
    algorithm: str


class MacResult(_Result, frozen=True):
    mac: bytes
    key: str
    version: int


class RandomResult(_Result, frozen=True):
    random: bytes


class HealthResult(_Result, frozen=True):
    gate: Literal["open", "closed"]
    reason: str
    """Empty if open; else the code that a request would get, never another VM's name."""
    components: dict[str, str]
    """Kind of component → status of its last reading, as far as the caller rests on it."""


class EvidenceResult(_Result, frozen=True):
    evidence: bytes
    """A JSON document (docs/protocol.md, "Evidence"), as bytes, because its digest is signed."""
    log_bytes: int
    """Length of the IMA log that the evidence speaks of; fetch it with GetEvidenceLog."""


class EvidenceLogResult(_Result, frozen=True):
    data: bytes


class ReceiptResult(_Result, frozen=True):
    receipt: bytes
    """A JSON document (docs/receipts.md), as bytes."""


class AuditEntry(_Result, frozen=True):
    index: int
    line: str
    """The entry as the ledger has it: what is hashed is its UTF-8."""
    proof: tuple[bytes, ...]
    """Its inclusion in the tree of the page's head, the leaf's sibling first."""
    withheld: bool = False
    """A later entry says that this answer never left."""


class AuditLogResult(_Result, frozen=True):
    head: bytes
    """A JSON document: the head that the proofs lead to, and its quote (docs/receipts.md)."""
    entries: tuple[AuditEntry, ...]
    next: int | None = None
    """Give it as `after` to go on; absent at the head's end. A page may hold no entry and have a next."""


Result = (
    KeyResult
    | KeyListResult
    | EncryptResult
    | DecryptResult
    | DataKeyResult
    | SignResult
    | VerifyResult
    | PublicKeyResult
    | MacResult
    | ManyResult
    | RandomResult
    | HealthResult
    | EvidenceResult
    | EvidenceLogResult
    | ReceiptResult
    | AuditLogResult
)
