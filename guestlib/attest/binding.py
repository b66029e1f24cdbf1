"""What the TPM is asked to sign: labelled, length-prefixed, the same bytes for vault and verifier.

Every value is SHA-256 over a label that names purpose and version, so nothing signed for one purpose
can be shown for another. Standard library only.
"""

from __future__ import annotations

import hashlib
from typing import Final

_EVIDENCE: Final = b"hostd evidence v1\0"
_PASS: Final = b"hostd pass v1\0"
_DIGEST_BYTES: Final = 32
MIN_NONCE_BYTES: Final = 16
MAX_NONCE_BYTES: Final = 64


def _digest(value: bytes) -> bytes:
    if len(value) != _DIGEST_BYTES:
        raise ValueError(f"a digest of {len(value)} bytes, not {_DIGEST_BYTES}")
    return value


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def evidence_qualifying(nonce: bytes, statement: bytes) -> bytes:
    """Qualifying data of the quote in an evidence document; 32 bytes.

    SHA-256(label || length of nonce (2 bytes) || nonce || SHA-256(statement)), where the statement is the
    canonical document without its quote and PCR values (`evidence.statement`).

    Raises:
        ValueError: the nonce is not 16 to 64 bytes.
    """
    if not MIN_NONCE_BYTES <= len(nonce) <= MAX_NONCE_BYTES:
        raise ValueError(f"a nonce of {len(nonce)} bytes, not {MIN_NONCE_BYTES} to {MAX_NONCE_BYTES}")
    content = len(nonce).to_bytes(2, "big") + nonce + hashlib.sha256(statement).digest()
    return hashlib.sha256(_EVIDENCE + content).digest()


def pass_qualifying(pass_number: int, evidence_digest: bytes, tree_size: int, tree_root: bytes) -> bytes:
    """Qualifying data of the quote over one batch; 32 bytes.

    SHA-256(label || pass (8 bytes) || evidence digest (32) || tree size (8) || tree root (32)), numbers
    big-endian: with the PCRs in this state and this evidence the ledger had this head.

    Raises:
        ValueError: a digest is not 32 bytes.
        OverflowError: a number is not one of 64 bits.
    """
    content = _u64(pass_number) + _digest(evidence_digest) + _u64(tree_size) + _digest(tree_root)
    return hashlib.sha256(_PASS + content).digest()
