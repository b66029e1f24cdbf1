"""What a request costs the vault, in units of about 16 µs: a plain Encrypt of some hundred bytes is 1.

A batch of the gate is bounded by this and not by the number of its requests, so that nobody waits behind
another's signatures for longer than behind anything else. An estimate made when the request arrives,
for fairness alone: nothing is granted on it.

Measured with cryptography 50 and OpenSSL 4 on one core of an EPYC (Zen 4): AES-256-GCM 3.5 µs a message,
HMAC 1.3 µs, Ed25519 20 µs to sign and 62 µs to verify, ECDSA P-256 17 and 47 µs, RSA-3072 600 and 39 µs.
64 KiB to encrypt or hash, with the commitments to them, 110 to 200 µs; a page of 100 keys 1 to 5 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.core.keys import Algorithm
from hostd.ipc import operations as ops
from hostd.ipc.fields import MAX_BATCH_RSA_SIGNATURES
from hostd.ipc.many_operations import SignMany, VerifyMany

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

UNIT_US: Final = 16
FULL_RECEIPT: Final = 4
"""Units of a receipt that goes with its answer: two proofs and the document, 60 us for one alone."""
_OTHER_US: Final = 4
"""One item of symmetric work."""
_KIB_US: Final = 3
"""A KiB of data: to encrypt or hash, and in the commitments to request and answer."""
_LISTED_US: Final = 48
"""One key of a list, with as many versions as are shown."""
_CHANGE_US: Final = {ops.CreateKey: 90, ops.Rotate: 900, ops.Shred: 900}
"""Rows of a key: of one with a hundred versions all are written anew."""
_SIGN_US: Final = {Algorithm.RSA_3072: 600, Algorithm.ECDSA_P256: 17, Algorithm.ED25519: 20}
_VERIFY_US: Final = {Algorithm.RSA_3072: 39, Algorithm.ECDSA_P256: 47, Algorithm.ED25519: 62}

_DATA: Final = ("plaintext", "ciphertext", "message")
_SIGNING: Final = ops.Sign | SignMany
_VERIFYING: Final = ops.Verify | VerifyMany


def cost(operation: ops.Operation, algorithm: Callable[[str], Algorithm | None]) -> int:
    """Units, at least 1. `algorithm` looks up the caller's key; it is asked for signatures only."""
    if isinstance(operation, ops.ListKeys):
        return 1 + operation.limit * _LISTED_US // UNIT_US
    if (change := _CHANGE_US.get(type(operation))) is not None:
        return 1 + change // UNIT_US
    items = getattr(operation, "items", (operation,))
    return 1 + (_work(operation, len(items), algorithm) + _bytes(items) * _KIB_US // 1024) // UNIT_US


def _bytes(items: Iterable[object]) -> int:
    """What is encrypted, decrypted or hashed."""
    found = (getattr(item, name, None) for item in items for name in _DATA)
    return sum(len(data) for data in found if isinstance(data, bytes))


def _work(operation: ops.Operation, items: int, algorithm: Callable[[str], Algorithm | None]) -> int:
    """Microseconds without what the data's length adds."""
    if isinstance(operation, _SIGNING | _VERIFYING):
        table = _SIGN_US if isinstance(operation, _SIGNING) else _VERIFY_US
        found = algorithm(operation.key)
        if found not in table:
            # No such key, or not for this, as yet: an alias may stand for any key when its turn comes.
            return max(_us(table, known, items) for known in table)
        return _us(table, found, items)
    return items * _OTHER_US


def _us(table: dict[Algorithm, int], algorithm: Algorithm, items: int) -> int:
    """Of so many signatures, made or verified. More than may be made with an RSA key at once are refused."""
    if table is _SIGN_US and algorithm is Algorithm.RSA_3072:
        items = min(items, MAX_BATCH_RSA_SIGNATURES)
    return items * table[algorithm]
