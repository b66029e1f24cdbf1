"""The guest's operations: arguments and results, each field with its published limit.

One definition serves both hops. A worker decodes a guest's JSON into these structs (docs/protocol.md)
and the vault decodes the worker's MessagePack into them again: a worker that was taken over cannot
get anything past the vault that a guest could not send. Nothing here names the caller; who asks is
decided by the channel.

Byte strings are base64 in JSON. Unknown fields, wrong types and values over a limit do not decode.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

MAX_DATA_BYTES = 64 << 10
"""Longest plaintext or message of one request; larger data goes by data keys."""
MAX_CIPHERTEXT_BYTES = MAX_DATA_BYTES + 1024
MAX_RANDOM_BYTES = 1024
MAX_AAD_PAIRS = 16
MAX_KEY_LIST = 100
MAX_VERSIONS_SHOWN = 16
"""Versions a KeyInfo lists: the newest ones."""
IMA_CHUNK_BYTES = 96 << 10
"""Log bytes in one GetEvidenceLog answer: base64 of it fits a frame."""

Algorithm = Literal["AES-256-GCM", "HMAC-SHA-256", "ECDSA-P256", "Ed25519", "RSA-3072"]
SignatureScheme = Literal["ecdsa-sha256", "ed25519", "rsa-pss-sha256", "rsa-pkcs1-sha256"]

KeyRef = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
"""A key id (`key-` and 32 hex digits) or an alias of the caller's tenant (`alias/…`)."""
Alias = Annotated[str, msgspec.Meta(pattern=r"^alias/[A-Za-z0-9_.-]{1,100}\Z")]
Token = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.-]{8,64}\Z")]
"""Idempotency token: the same call with the same token is done once."""
Data = Annotated[bytes, msgspec.Meta(max_length=MAX_DATA_BYTES)]
Ciphertext = Annotated[bytes, msgspec.Meta(min_length=1, max_length=MAX_CIPHERTEXT_BYTES)]
Aad = Annotated[
    dict[
        Annotated[str, msgspec.Meta(min_length=1, max_length=128)],
        Annotated[str, msgspec.Meta(max_length=512)],
    ],
    msgspec.Meta(max_length=MAX_AAD_PAIRS),
]
"""Additional data, bound to the ciphertext and not secret: the object, keys in any order."""
Version = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]


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
    signature: Annotated[bytes, msgspec.Meta(min_length=1, max_length=1024)]
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
    mac: Annotated[bytes, msgspec.Meta(min_length=1, max_length=64)]
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
)
UngatedOperation = Health | GetEvidence | GetEvidenceLog
"""They must work when the host has drifted, to say why. They touch no key."""
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
        Health,
        GetEvidence,
        GetEvidenceLog,
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
    | RandomResult
    | HealthResult
    | EvidenceResult
    | EvidenceLogResult
)
