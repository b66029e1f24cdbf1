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
from hostd.ipc.many_operations import SignMany, VerifyMany

if TYPE_CHECKING:
    from collections.abc import Callable

UNIT_US: Final = 16
_OTHER_US: Final = 4
"""One item of symmetric work."""
_SIGN_US: Final = {Algorithm.RSA_3072: 600, Algorithm.ECDSA_P256: 17, Algorithm.ED25519: 20}
_VERIFY_US: Final = {Algorithm.RSA_3072: 39, Algorithm.ECDSA_P256: 47, Algorithm.ED25519: 62}

_SIGNING: Final = (ops.Sign, SignMany)
_VERIFYING: Final = (ops.Verify, VerifyMany)


def cost(operation: ops.Operation, algorithm: Callable[[str], Algorithm | None]) -> int:
    """Units, at least 1. `algorithm` looks up the caller's key; it is asked for signatures only."""
    items = len(getattr(operation, "items", (None,)))
    each = _OTHER_US
    if isinstance(operation, _SIGNING):
        each = _of(_SIGN_US, algorithm(operation.key))
    elif isinstance(operation, _VERIFYING):
        each = _of(_VERIFY_US, algorithm(operation.key))
    return 1 + items * each // UNIT_US


def _of(table: dict[Algorithm, int], algorithm: Algorithm | None) -> int:
    """A key that is not there, or not for this, costs nothing but the looking up."""
    return 0 if algorithm is None else table.get(algorithm, 0)
