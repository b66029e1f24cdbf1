"""Fields of the guest's operations, each with its published limit (docs/protocol.md, "Limits").

Byte strings are base64 in JSON. Unknown fields, wrong types and values over a limit do not decode.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

MAX_DATA_BYTES = 64 << 10
"""Longest plaintext or message of one request; larger data goes by data keys."""
MAX_CIPHERTEXT_BYTES = MAX_DATA_BYTES + 1024
MAX_BATCH_ITEMS = 256
"""Items of one batch request. The dearest kind, verifying Ed25519, then takes the vault some 16 ms."""
MAX_BATCH_BYTES = 128 << 10
"""Plaintexts or messages of one batch request together: with 256 items, base64 and names a frame holds it
and its answer."""
MAX_BATCH_CIPHERTEXT_BYTES = MAX_BATCH_BYTES + MAX_BATCH_ITEMS * 56
"""Ciphertexts of one batch request together: what the largest EncryptMany gave is taken back at once (56:
`primitives.OVERHEAD_BYTES`)."""
MAX_BATCH_RSA_SIGNATURES = 16
"""Items of SignMany with an RSA key: 0.6 ms each, and callers wait for each other's."""
MAX_RANDOM_BYTES = 1024
MAX_AAD_PAIRS = 16
MAX_KEY_LIST = 100
MAX_VERSIONS_SHOWN = 16
"""Versions a KeyInfo lists: the newest ones."""
MAX_AUDIT_ENTRIES = 64
"""Ledger entries in one GetAuditLog answer."""
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
EntryNumber = Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]
SignatureBytes = Annotated[bytes, msgspec.Meta(min_length=1, max_length=1024)]
MacBytes = Annotated[bytes, msgspec.Meta(min_length=1, max_length=64)]
