"""What a request costs the vault, in units of about 16 µs: a plain Encrypt of some hundred bytes is 1.

A batch of the gate is bounded by this and not by the number of its requests, so that nobody waits behind
another's signatures for longer than behind anything else. An estimate made when the request arrives,
for fairness alone: nothing is granted on it.

Measured with cryptography 50 and OpenSSL 4 on one core of an EPYC (Zen 4): AES-256-GCM 3.5 µs a message,
HMAC 1.3 µs, Ed25519 20 µs to sign and 62 µs to verify, ECDSA P-256 17 and 47 µs, RSA-3072 600 and 39 µs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hostd.core.keys import Algorithm
from hostd.ipc import operations as ops
from hostd.ipc.fields import MAX_BATCH_RSA_SIGNATURES
from hostd.ipc.many_operations import SignMany, VerifyMany

if TYPE_CHECKING:
    from collections.abc import Callable

UNIT_US: Final = 16
_OTHER_US: Final = 4
"""One item of symmetric work."""
_SIGN_US: Final = {Algorithm.RSA_3072: 600, Algorithm.ECDSA_P256: 17, Algorithm.ED25519: 20}
_VERIFY_US: Final = {Algorithm.RSA_3072: 39, Algorithm.ECDSA_P256: 47, Algorithm.ED25519: 62}

_SIGNING: Final = ops.Sign | SignMany
_VERIFYING: Final = ops.Verify | VerifyMany


def cost(operation: ops.Operation, algorithm: Callable[[str], Algorithm | None]) -> int:
    """Units, at least 1. `algorithm` looks up the caller's key; it is asked for signatures only."""
    items = len(getattr(operation, "items", (None,)))
    if isinstance(operation, _SIGNING | _VERIFYING):
        table = _SIGN_US if isinstance(operation, _SIGNING) else _VERIFY_US
        found = algorithm(operation.key)
        if found not in table:
            # No such key, or not for this, as yet: an alias may stand for any key when its turn comes.
            return 1 + max(_us(table, known, items) for known in table) // UNIT_US
        return 1 + _us(table, found, items) // UNIT_US
    return 1 + items * _OTHER_US // UNIT_US


def _us(table: dict[Algorithm, int], algorithm: Algorithm, items: int) -> int:
    """Of so many signatures, made or verified. More than may be made with an RSA key at once are refused."""
    if table is _SIGN_US and algorithm is Algorithm.RSA_3072:
        items = min(items, MAX_BATCH_RSA_SIGNATURES)
    return items * table[algorithm]
