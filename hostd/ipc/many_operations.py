"""The batch operations: many items of one key in one request, and what they give.

Arguments as in the single operations (`hostd.ipc.operations`); besides each item's own limits, the number
of items and what they hold together are bounded, so that request and answer each fit a frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from hostd.ipc.fields import (
    MAX_BATCH_BYTES,
    MAX_BATCH_CIPHERTEXT_BYTES,
    MAX_BATCH_ITEMS,
    Aad,
    Ciphertext,
    Data,
    KeyRef,
    MacBytes,
    SignatureBytes,
    SignatureScheme,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One item: an object with the arguments that the single operation takes besides the key."""


class EncryptItem(_Item, frozen=True):
    plaintext: Data
    aad: Aad = {}


class DecryptItem(_Item, frozen=True):
    ciphertext: Ciphertext
    aad: Aad = {}


class MessageItem(_Item, frozen=True):
    message: Data


class VerifyItem(_Item, frozen=True):
    message: Data
    signature: SignatureBytes


class VerifyMacItem(_Item, frozen=True):
    message: Data
    mac: MacBytes


_COUNT = msgspec.Meta(min_length=1, max_length=MAX_BATCH_ITEMS)


def _bounded(sizes: Iterable[int], limit: int = MAX_BATCH_BYTES) -> None:
    """What all items hold together is bounded; msgspec makes a ValidationError of the ValueError."""
    if sum(sizes) > limit:
        raise ValueError(f"the items hold more than {limit} bytes")


# ── Operations ────────────────────────────────────────────────────────────────────────────────────


class _Op(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op"):
    pass


class EncryptMany(_Op, frozen=True, tag="EncryptMany"):
    """Each item encrypted with the key's current version, under an AAD of its own. All or none."""

    key: KeyRef
    items: Annotated[tuple[EncryptItem, ...], _COUNT]

    def __post_init__(self) -> None:
        _bounded(len(item.plaintext) for item in self.items)


class DecryptMany(_Op, frozen=True, tag="DecryptMany"):
    """Ciphertexts of one key, of any versions. Each item is answered by itself."""

    key: KeyRef
    items: Annotated[tuple[DecryptItem, ...], _COUNT]

    def __post_init__(self) -> None:
        _bounded((len(item.ciphertext) for item in self.items), MAX_BATCH_CIPHERTEXT_BYTES)


class SignMany(_Op, frozen=True, tag="SignMany"):
    """All or none. With an RSA key at most MAX_BATCH_RSA_SIGNATURES items."""

    key: KeyRef
    items: Annotated[tuple[MessageItem, ...], _COUNT]
    scheme: SignatureScheme | None = None

    def __post_init__(self) -> None:
        _bounded(len(item.message) for item in self.items)


class VerifyMany(_Op, frozen=True, tag="VerifyMany"):
    key: KeyRef
    items: Annotated[tuple[VerifyItem, ...], _COUNT]
    scheme: SignatureScheme | None = None
    version: Version | None = None

    def __post_init__(self) -> None:
        _bounded(len(item.message) for item in self.items)


class MacMany(_Op, frozen=True, tag="MacMany"):
    """All or none."""

    key: KeyRef
    items: Annotated[tuple[MessageItem, ...], _COUNT]

    def __post_init__(self) -> None:
        _bounded(len(item.message) for item in self.items)


class VerifyMacMany(_Op, frozen=True, tag="VerifyMacMany"):
    key: KeyRef
    items: Annotated[tuple[VerifyMacItem, ...], _COUNT]
    version: Version | None = None

    def __post_init__(self) -> None:
        _bounded(len(item.message) for item in self.items)


# ── Results ───────────────────────────────────────────────────────────────────────────────────────


class _Result(msgspec.Struct, frozen=True, omit_defaults=True):
    pass


class EncryptManyResult(_Result, frozen=True):
    ciphertexts: tuple[bytes, ...]
    """In the order of the items, as in every batch result."""
    key: str
    version: int


class ItemError(_Result, frozen=True):
    """Why one item was refused (`guestlib.errors`); the others are not touched by it."""

    code: str
    message: str


class DecryptedItem(_Result, frozen=True):
    """`plaintext` and `version`, or `error`."""

    plaintext: bytes | None = None
    version: int | None = None
    error: ItemError | None = None


class DecryptManyResult(_Result, frozen=True):
    items: tuple[DecryptedItem, ...]
    key: str


class SignManyResult(_Result, frozen=True):
    signatures: tuple[bytes, ...]
    key: str
    version: int
    scheme: str


class VerifyManyResult(_Result, frozen=True):
    """Of VerifyMany and VerifyMacMany."""

    valid: tuple[bool, ...]
    key: str
    version: int


class MacManyResult(_Result, frozen=True):
    macs: tuple[bytes, ...]
    key: str
    version: int


ManyOperation = EncryptMany | DecryptMany | SignMany | VerifyMany | MacMany | VerifyMacMany
ManyResult = EncryptManyResult | DecryptManyResult | SignManyResult | VerifyManyResult | MacManyResult
