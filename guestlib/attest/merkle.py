"""RFC 9162, section 2.1: how the ledger's entries are hashed, and checking that one is under a root.

Pure, standard library only; the ledger's own tree hashes with these.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

HASH_BYTES: Final = 32
MAX_PROOF: Final = 64
"""Hashes of an inclusion proof: the height of a tree of 2^64 leaves."""


def leaf_hash(entry: bytes) -> bytes:
    """MTH of one entry: SHA-256(0x00 || entry)."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\1" + left + right).digest()


def root_of(leaf: bytes, index: int, size: int, proof: Sequence[bytes]) -> bytes:
    """The root that an inclusion proof leads to: RFC 9162, section 2.1.3.2, step by step.

    `leaf` is a leaf's hash; `proof` begins with its sibling. The caller compares the root.

    Raises:
        ValueError: there is no such leaf, or the proof has not the length that its place demands.
    """
    if not 0 <= index < size:
        raise ValueError(f"no leaf {index} in a tree of {size}")
    at, last, root = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise ValueError("the proof is too long")
        if len(sibling) != HASH_BYTES:
            raise ValueError(f"a hash of {len(sibling)} bytes, not {HASH_BYTES}")
        if at & 1 or at == last:
            root = node_hash(sibling, root)
            while not at & 1 and at:
                at >>= 1
                last >>= 1
        else:
            root = node_hash(root, sibling)
        at >>= 1
        last >>= 1
    if last:
        raise ValueError("the proof is too short")
    return root
